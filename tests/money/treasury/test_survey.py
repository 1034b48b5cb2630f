"""The treasury shows what alerts need: the platform's account, its limits, its disk, copies and audits."""

from pathlib import Path

import pytest

from azu import metrics
from azu.metrics import Meter
from azu.money.signer.calls import SignerStatus
from azu.money.treasury.survey import Survey, last_done, note_done
from azu.units import LAMPORTS_PER_HYPE
from tests.money.chain.running import fresh_address
from tests.money.treasury.world import Open, World


class Signer:
    """Of the signer only what it says of its limits is asked."""

    async def status(self) -> SignerStatus:
        return SignerStatus(day_parts={"withdrawal": 0.25})


def test_the_account_its_limits_and_what_was_done_are_shown(world: World, tmp_path: Path) -> None:
    meter = Meter()
    note_done(tmp_path, "backup", 5_000)
    note_done(tmp_path, "audit", 6_000)
    note_done(tmp_path, "backup", 7_500)

    async def scenario(parts: Open) -> None:
        platform = fresh_address()
        survey = Survey(parts.chain, Signer(), (platform,), tmp_path)  # type: ignore[arg-type]
        await survey.show(meter)
        assert meter.snapshot().value(metrics.FEE_MISSING) == 1
        # The faucet gives the fee for some new accounts too.
        world.devnet.fund(platform, 3 * LAMPORTS_PER_HYPE)
        await survey.show(meter)

    world.run(scenario)

    shown = meter.snapshot()
    assert shown.value(metrics.WALLET) == 3 * LAMPORTS_PER_HYPE
    assert shown.value(metrics.FEE_MISSING) == 0
    assert shown.value(metrics.ACTIONS_LEFT) > 0
    assert shown.value(metrics.LIMIT_USED, "withdrawal") == 0.25
    assert shown.value(metrics.LAST_DONE, "backup") == 7.5
    assert shown.value(metrics.LAST_DONE, "audit") == 6
    assert 0 < shown.value(metrics.DISK_FREE, "money") < 1


@pytest.mark.parametrize("damaged", ["", "[]", '{"backup": "yesterday"}', '{"backup": 1.5}'])
def test_a_damaged_note_says_nothing_and_is_written_anew(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "done.json").write_text(damaged)

    assert last_done(tmp_path) == {}
    note_done(tmp_path, "backup", 7)
    assert last_done(tmp_path) == {"backup": 7}
