"""The treasury shows what alerts need: the platform's account, its limits, its disk, copies and audits."""

from pathlib import Path

import pytest

from azu import metrics
from azu.errors import Unavailable
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


def test_what_chain_or_signer_do_not_answer_is_unknown_and_not_as_it_was_before(
    world: World, tmp_path: Path
) -> None:
    class Away(Signer):
        async def status(self) -> SignerStatus:
            raise Unavailable("the signer is away")

    meter = Meter()
    of_chain = {metrics.WALLET.name, metrics.ACTIONS_LEFT.name, metrics.FEE_MISSING.name}
    of_signer = {metrics.LIMIT_USED.name}

    def shown() -> set[str]:
        return {name for name, _ in meter.snapshot().values} - {metrics.DISK_FREE.name}

    async def scenario(parts: Open) -> None:
        platform = (fresh_address(),)
        survey = Survey(parts.chain, Signer(), platform, tmp_path)  # type: ignore[arg-type]
        await survey.show(meter)
        assert shown() == of_chain | of_signer
        world.devnet.fault("server_error_before", path="/info", times=None)
        with pytest.raises(Unavailable):
            await survey.show(meter)
        assert shown() == of_signer
        world.devnet.no_faults()
        with pytest.raises(Unavailable):
            await Survey(parts.chain, Away(), platform, tmp_path).show(meter)  # type: ignore[arg-type]
        assert shown() == of_chain

    world.run(scenario)


@pytest.mark.parametrize("damaged", ["", "[]", '{"backup": "yesterday"}', '{"backup": 1.5}'])
def test_a_damaged_note_says_nothing_and_is_written_anew(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "done.json").write_text(damaged)

    assert last_done(tmp_path) == {}
    note_done(tmp_path, "backup", 7)
    assert last_done(tmp_path) == {"backup": 7}
