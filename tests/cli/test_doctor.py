"""`azu doctor` finds what is wrong and what to do about it, and reports nothing bad where all is well."""

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path

import pytest

from azu.auth.certificates import (
    HEAD_LIFE,
    Authority,
    certificate_pem,
    new_key,
    new_request,
    read_request,
)
from azu.cli import doctor_checks
from azu.cli.doctor_checks import MACHINE_CHECKS, Finding, Severity, check_network, run_check
from azu.config import NodeLinks, Settings
from azu.launch.admin import AdminFacts, admin_file_kept
from azu.launch.membership import TlsFiles, head_files
from azu.launch.network_process import home_locked
from azu.money.ledger.durability import DURABLE_CONFIG
from tests.client.ingress import Ingress, Reply, running_ingress
from tests.redis_server import RunningRedis, start_redis


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AZU_", "REDIS_", "HYPERLIQUID_")):
            monkeypatch.delenv(name)


def state_of(about: str, findings: Iterable[Finding]) -> Severity:
    (one,) = (finding for finding in findings if finding.about == about)
    assert one.state is Severity.OK or one.advice, "a finding that is not well has advice"
    return one.state


@contextmanager
def encrypted(context: ssl.SSLContext) -> Iterator[None]:
    """Listen at every address, and answer a handshake of TLS."""

    def serve(server: socket.socket) -> None:
        with suppress(OSError):  # the server was closed
            while True:
                server.accept()[0].close()

    with (
        socket.create_server(("0.0.0.0", 0)) as plain,
        context.wrap_socket(plain, server_side=True) as server,
    ):
        answering = threading.Thread(target=serve, args=(server,), daemon=True)
        answering.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
    answering.join()


def test_this_machine_can_run_azu(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for name in ("Python", "packages", "key files"):
        found = run_check(name, MACHINE_CHECKS[name], settings)
        assert all(one.state is not Severity.BAD for one in found)


def test_what_listens_is_listed_and_plain_ports_that_others_reach_are_bad(tmp_path: Path) -> None:
    members = head_files(tmp_path / "head", ["127.0.0.1"]).ingress
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(members.certificate, members.key)

    def found() -> dict[str, Finding]:
        return {one.about: one for one in doctor_checks._listeners(tmp_path)}

    with home_locked(tmp_path), socket.create_server(("127.0.0.1", 0)) as own:
        assert str(own.getsockname()[1]) in found()["listens at 127.0.0.1"].found
        assert {one.state for one in found().values()} == {Severity.OK}
        with encrypted(context):
            assert found()["listens at 0.0.0.0"].state is Severity.OK
            with socket.create_server(("0.0.0.0", 0)) as plain:
                port, bad = plain.getsockname()[1], found()["listens at 0.0.0.0"]
    assert bad.state is Severity.BAD
    assert bad.advice.startswith(f"not encrypted: {port};")


def test_a_key_file_that_others_can_read_is_named(tmp_path: Path) -> None:
    head_files(tmp_path, ["192.0.2.1"])
    settings = Settings(home=tmp_path)
    assert state_of("key files", MACHINE_CHECKS["key files"](settings)) is Severity.OK

    (tmp_path / "books" / "nodes.key").chmod(0o644)

    (finding,) = MACHINE_CHECKS["key files"](settings)
    assert finding.state is Severity.BAD
    assert finding.advice == f"chmod 600 {tmp_path}/books/nodes.key"


def test_a_taken_port_is_a_warning(tmp_path: Path, redis_server: RunningRedis) -> None:
    settings = Settings(home=tmp_path, http_port=redis_server.port)

    assert state_of(f"port {redis_server.port}", MACHINE_CHECKS["port"](settings)) is Severity.WARNING


def test_a_redis_that_could_lose_money_is_bad(tmp_path: Path, redis_server: RunningRedis) -> None:
    settings = Settings(home=tmp_path, redis_host="127.0.0.1", redis_port=redis_server.port)
    found = list(MACHINE_CHECKS["Redis"](settings))

    assert state_of("append-only file", found) is Severity.BAD
    assert state_of("durability", found) is Severity.BAD
    assert state_of("Redis link", found) is Severity.OK  # the connection does not leave the machine


def test_a_redis_as_azu_starts_it_is_well(tmp_path: Path) -> None:
    running = start_redis(tmp_path, DURABLE_CONFIG)
    settings = Settings(home=tmp_path / "home", redis_host="127.0.0.1", redis_port=running.port)

    found = list(MACHINE_CHECKS["Redis"](settings))
    running.stop()

    assert {one.about: one.state for one in found} == {
        "REDIS_HOST": Severity.OK,
        "Redis link": Severity.OK,
        "Redis": Severity.OK,
        "append-only file": Severity.OK,
        "durability": Severity.OK,
    }
    assert state_of("Redis", MACHINE_CHECKS["Redis"](settings)) is Severity.BAD  # it does not answer now


def test_the_advice_for_a_ledger_file_with_a_torn_tail_is_a_repair(tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    (folder / "redis.conf").write_text("requirepass x\nport 1\n")
    (folder / "appendonly.aof").write_bytes(b"*2\r\n$6\r\nSELECT\r\n$1\r\n0\r\n*2\r\n$4\r\nINC")

    found = list(MACHINE_CHECKS["Redis"](Settings(home=tmp_path)))

    assert [one.advice for one in found if one.about == "append-only file"] == ["azu ledger repair"]


def test_the_connection_to_a_redis_on_another_machine_has_to_be_encrypted(tmp_path: Path) -> None:
    for tls, state in ((False, Severity.BAD), (True, Severity.OK)):
        # No server is there; the kind of connection is reported all the same.
        settings = Settings(home=tmp_path, redis_host="redis.invalid", redis_tls=tls)

        assert state_of("Redis link", MACHINE_CHECKS["Redis"](settings)) is state


def answering(
    ingress: Ingress, nodes: NodeLinks = NodeLinks.LOCAL, *, chain_url: str = "http://127.0.0.1:1"
) -> Ingress:
    from importlib.metadata import version

    ingress.replies["GET /health"] = Reply({"status": "ok"})
    platform = {"address": "0x0", "chain_url": chain_url, "version": version("azu"), "nodes": nodes}
    ingress.replies["GET /v1/platform"] = Reply(platform)
    return ingress


@pytest.mark.prove
def test_the_checks_run_where_packages_are_missing(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('cryptography', 'packaging', 'psutil', 'redis')));"
    )
    program += "from azu.cli import doctor_checks as d; from azu.config import Settings;"
    program += "print(*(one.about for one in d.diagnose(Settings(url='http://127.0.0.1:9')).machine))"
    environment = os.environ | {"AZU_HOME": str(tmp_path)}

    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )

    assert {"Python", "packages", "capacity", "Redis"} <= set(done.stdout.split())


@pytest.mark.parametrize(
    ("nodes", "state", "words"),
    [
        (NodeLinks.ENCRYPTED, Severity.OK, "encrypted"),
        (NodeLinks.LOCAL, Severity.OK, "all on the head's machine"),
        (NodeLinks.FOREIGN, Severity.WARNING, "azu did not start this Ray cluster: it gives no tickets"),
    ],
)
def test_each_connection_is_reported_as_encrypted_or_not(
    tmp_path: Path, nodes: NodeLinks, state: Severity, words: str
) -> None:
    with running_ingress() as ingress:
        answering(ingress, nodes)
        found = list(check_network(Settings(home=tmp_path, url=ingress.url)))

    told = {one.about: one.found for one in found}
    assert state_of("between nodes", found) is state
    assert told["between nodes"].startswith(words)
    assert told["ingress link"].startswith("not encrypted, but within this machine")
    assert state_of("azu's version", found) is Severity.OK
    assert state_of("nodes", found) is Severity.UNKNOWN  # this machine has no key


def test_an_unencrypted_chain_on_another_machine_is_a_warning(tmp_path: Path) -> None:
    with running_ingress() as ingress:
        answering(ingress, NodeLinks.ENCRYPTED, chain_url="http://chain.example")
        found = list(check_network(Settings(home=tmp_path, url=ingress.url)))

    assert state_of("chain link", found) is Severity.WARNING


def test_problems_that_the_ingress_tells_are_bad(tmp_path: Path) -> None:
    with running_ingress() as ingress:
        answering(ingress, NodeLinks.ENCRYPTED)
        ingress.replies["GET /health"] = Reply({"status": "ok", "problems": ["the ledger went back by 3"]})
        found = list(check_network(Settings(home=tmp_path, url=ingress.url)))

    assert [one.found for one in found if one.state is Severity.BAD] == ["the ledger went back by 3"]


def test_a_clock_that_differs_is_bad(tmp_path: Path) -> None:
    import httpx

    for ahead_s, state in ((0, Severity.OK), (-60, Severity.BAD), (60, Severity.BAD)):
        now = 1_700_000_000.5
        reply = httpx.Response(200, headers={"date": formatdate(now + ahead_s, usegmt=True)})

        assert state_of("clock", doctor_checks._clock(reply, now, now + 0.1)) is state


def test_an_ingress_that_does_not_answer_is_bad_only_where_one_is_expected(tmp_path: Path) -> None:
    expected = Settings(home=tmp_path, url="http://127.0.0.1:9")

    assert state_of("ingress", check_network(expected)) is Severity.BAD
    assert state_of("ingress", check_network(Settings(home=tmp_path, http_port=9))) in (
        Severity.WARNING,
        Severity.OK,  # if the machine that tests has a network of its own
    )


def test_a_certificate_that_ends_soon_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head_files(tmp_path, ["192.0.2.1"])
    settings = Settings(home=tmp_path)
    assert state_of("head's certificate", doctor_checks._own_certificates(settings)) is Severity.OK

    now = datetime.now(UTC) + HEAD_LIFE - timedelta(days=13)
    monkeypatch.setattr(doctor_checks, "_now", lambda: now)

    for about in ("head's certificate", "ingress's certificate"):
        assert state_of(about, doctor_checks._own_certificates(settings)) is Severity.WARNING


def test_a_nodes_certificate_is_a_warning_in_the_last_quarter_of_its_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, life = datetime.now(UTC), timedelta(days=7)
    authority, key = Authority.new("azu nodes", now), read_request(new_request(new_key()))
    files = TlsFiles.of(tmp_path / "networks" / "a1")
    files.write(certificate_pem(authority.sign(key, ["192.0.2.7"], now, life)), authority.pem)

    for age, state in ((1, Severity.OK), (5, Severity.OK), (6, Severity.WARNING), (8, Severity.BAD)):
        monkeypatch.setattr(doctor_checks, "_now", lambda age=age: now + timedelta(days=age))
        found = doctor_checks._own_certificates(Settings(home=tmp_path))
        assert state_of("node's certificate", found) is state


@pytest.mark.parametrize(
    ("nodes", "state"),
    [
        (NodeLinks.LOCAL, Severity.OK),
        (NodeLinks.ENCRYPTED, Severity.BAD),
        (NodeLinks.FOREIGN, Severity.WARNING),
    ],
)
def test_one_user_for_money_and_members_is_bad_where_others_can_join(
    tmp_path: Path, nodes: NodeLinks, state: Severity
) -> None:
    with running_ingress() as ingress:
        answering(ingress, nodes)
        facts = AdminFacts(
            url=ingress.url,
            admin_key="k",
            network_id="",
            domain="",
            certificate=None,
            nodes=nodes,
            why_one_user="a",
        )
        with admin_file_kept(tmp_path, facts):
            found = list(check_network(Settings(home=tmp_path)))

    assert state_of("Unix users", found) is state


def test_the_command_prints_json_and_fails_if_something_is_bad(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
    (tmp_path / "credentials.json").write_text("{}")
    (tmp_path / "credentials.json").chmod(0o644)

    done = subprocess.run(
        [sys.executable, "-m", "azu.cli", "doctor", "--json"],
        env=kept | {"AZU_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert {"about", "state", "found", "advice"} == set(told["machine"][0])
    assert any(one["advice"].startswith("chmod 600") for one in told["machine"])
