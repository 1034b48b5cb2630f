"""What the network shows of its nodes and books."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.telemetry import certificate_ends, show_books, show_head, show_nodes
from azu import metrics
from azu.auth.certificates import read_certificate
from azu.config import TlsConfig
from azu.launch.membership import head_files
from azu.metrics import Meter
from azu.money.ledger.transfers import (
    CHAIN,
    PLATFORM,
    SUSPENSE,
    user_available,
    user_reserved,
    worker_earned,
    worker_paid,
    worker_paying,
)
from azu.money.overview import totals_of
from azu.protocol.node import NodeState
from azu.units import MIB
from tests.builders import ALICE, BOB, OWNERS, node


def test_charges_are_what_platform_and_workers_ever_got() -> None:
    meter = Meter()
    balances = {
        CHAIN: -1_000,
        PLATFORM: 20,
        user_available(ALICE): 700,
        user_available(BOB): 50,
        user_reserved(ALICE): 150,
        worker_earned(OWNERS[0]): 10,
        worker_paying(OWNERS[0]): 40,
        worker_paid(OWNERS[0]): 25,
        worker_paid(OWNERS[1]): 5,
    }
    show_books(meter, totals_of(balances))

    shown = meter.snapshot()

    assert shown.value(metrics.LAMPORTS_EARNED) == 80
    assert shown.value(metrics.LAMPORTS_CHARGED) == 100
    assert shown.value(metrics.LAMPORTS_PAID) == 30
    held = {labels: value for (name, labels), value in shown.values.items() if name == "azu_lamports_held"}
    assert held == {
        ("user_available",): 750, ("user_reserved",): 150, ("worker_earned",): 10, ("worker_paying",): 40,
    }  # fmt: skip


def test_nodes_show_their_live_memory_and_a_state_without_nodes_shows_zero() -> None:
    meter = Meter()
    show_nodes(
        meter,
        [
            node("ada", 64 * MIB, vram_free_bytes=16 * MIB, vram_used_bytes=40 * MIB, load=0.5),
            node("ben", 32 * MIB, state=NodeState.DEAD),
        ],
    )

    shown = meter.snapshot()

    assert shown.value(metrics.NODES, "alive") == shown.value(metrics.NODES, "dead") == 1
    assert shown.values["azu_nodes", ("suspect",)] == 0
    assert shown.value(metrics.NODE_VRAM_FREE, "ada") == 16 * MIB
    assert shown.value(metrics.NODE_VRAM_USED) == 40 * MIB
    assert ("azu_node_vram_used_bytes", ("ben",)) not in shown.values
    # A counter that begins with its first event shows no increase at it.
    assert shown.values["azu_bad_frames_total", ("ben",)] == shown.values["azu_left_out_total", ("ben",)] == 0


def test_the_head_shows_its_free_disk_and_when_its_certificates_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = head_files(tmp_path, ["192.0.2.1"])
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(files.ray.certificate))
    config = SimpleNamespace(tls=TlsConfig(files.ingress.certificate, files.ingress.key))
    meter = Meter()

    ends_s = certificate_ends(config)  # type: ignore[arg-type]
    show_head(meter, tmp_path, ends_s)

    shown = meter.snapshot()
    for name, certificate in (("ingress", files.ingress.certificate), ("ray", files.ray.certificate)):
        ends = read_certificate(certificate.read_bytes()).not_valid_after_utc
        assert shown.value(metrics.CERTIFICATE_ENDS, name) == ends.timestamp()
    assert 0 < shown.value(metrics.DISK_FREE, "jobs") < 1
    show_head(meter, tmp_path / "elsewhere", {})
    assert meter.snapshot().values == {}, "what cannot be measured is unknown"
    monkeypatch.setenv("RAY_USE_TLS", "0")
    config.tls = None
    assert certificate_ends(config) == {}  # type: ignore[arg-type]


def test_what_is_in_suspense_is_shown() -> None:
    meter = Meter()
    show_books(meter, totals_of({CHAIN: -5, SUSPENSE: 5}))

    assert meter.snapshot().value(metrics.LAMPORTS_HELD, "suspense") == 5


def test_what_books_hold_that_do_not_answer_is_unknown_and_counters_stay() -> None:
    meter = Meter()
    show_books(meter, totals_of({CHAIN: -30, PLATFORM: 20, SUSPENSE: 10}))
    show_books(meter, None)

    left = {name for name, _ in meter.snapshot().values}
    assert left == {"azu_lamports_charged_total", "azu_lamports_earned_total", "azu_lamports_paid_total"}
