"""The clock for what is kept: no step of the machine's clock moves it, the chain's time does."""

from azu.clock import SteadyClock, since_boot_ms, wall_clock_ms

DAY_MS = 86_400_000
NOW_MS = 1_790_000_000_000


class Machine:
    """A machine's two clocks."""

    def __init__(self) -> None:
        self.wall_ms, self.elapsed_ms = NOW_MS, 5
        self.clock = SteadyClock(lambda: self.wall_ms, lambda: self.elapsed_ms)

    def passes(self, ms: int) -> None:
        self.wall_ms += ms
        self.elapsed_ms += ms


def test_it_follows_a_clock_that_is_set_right_bit_by_bit() -> None:
    machine = Machine()
    for _ in range(100):
        machine.passes(60_000)
        machine.wall_ms += 500
        assert machine.clock() == machine.wall_ms


def test_it_goes_on_through_a_step_and_follows_again_once_the_step_is_undone() -> None:
    for step_ms in (30 * DAY_MS, -DAY_MS):
        machine = Machine()
        machine.wall_ms += step_ms
        machine.passes(3_600_000)
        assert machine.clock() == NOW_MS + 3_600_000
        machine.wall_ms -= step_ms
        machine.passes(1)
        machine.wall_ms += 10
        assert machine.clock() == machine.wall_ms


def test_the_chains_time_counts_more_than_the_machines() -> None:
    machine = Machine()
    machine.wall_ms = NOW_MS + 30 * DAY_MS
    begun = SteadyClock(lambda: machine.wall_ms, lambda: machine.elapsed_ms)
    assert begun() == NOW_MS + 30 * DAY_MS, "it has nothing else to go by at its start"

    begun.hears(NOW_MS)

    machine.passes(1_000)
    assert begun() == NOW_MS + 1_000
    begun.hears(NOW_MS + 500)
    assert begun() == NOW_MS + 1_000, "an answer of the chain is a little old"


def test_the_real_clocks_go() -> None:
    assert abs(SteadyClock()() - wall_clock_ms()) < 60_000
    assert since_boot_ms() > 0
