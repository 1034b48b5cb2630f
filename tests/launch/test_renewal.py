"""Each node is started again before its certificate ends: in its turn, and at the end without."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from azu.api.network import RestartResponse
from azu.launch.membership import CertificateLife
from azu.launch.renewal import Renewal

START = datetime(2026, 11, 1, tzinfo=UTC)
DAY = timedelta(days=1)
LIFE = CertificateLife(START + 3 * DAY, START + 7 * DAY)
LATER = CertificateLife(START + 6 * DAY, START + 10 * DAY)
NAMES = ("ada-0", "ada-1")


@dataclass
class Machine:
    """Two nodes; `answers` is what the network says of a node's turn."""

    answers: dict[str, RestartResponse | None] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)

    def renewal(self, life: CertificateLife = LIFE) -> Renewal:
        return Renewal(NAMES, life, self._ask, self.restarted.append)

    def _ask(self, name: str) -> RestartResponse | None:
        self.asked.append(name)
        return self.answers.get(name)


def answer(*, turn: bool, left: bool = False) -> RestartResponse:
    return RestartResponse(turn=turn, left=left)


def steps(renewal: Renewal, start: datetime, length: timedelta, each: timedelta) -> datetime:
    """Take steps for a while and return the time of the last one."""
    now = start
    while now <= start + length:
        renewal.step(now)
        now += each
    return now


def test_nothing_is_asked_before_a_certificate_is_to_be_renewed() -> None:
    machine = Machine()
    renewal = machine.renewal()

    renewal.take(LATER, START + 2 * DAY)
    steps(renewal, START, 3 * DAY, DAY / 24)

    assert machine.asked == []


def test_the_nodes_are_started_again_one_after_the_other_once_their_pieces_have_moved() -> None:
    machine = Machine({"ada-0": answer(turn=True)})
    renewal = machine.renewal()
    renewal.take(LATER, LIFE.renewed_from)

    now = steps(renewal, LIFE.renewed_from, timedelta(minutes=5), timedelta(seconds=30))
    assert machine.restarted == []
    assert set(machine.asked) == {"ada-0"}
    machine.answers["ada-0"] = answer(turn=True, left=True)
    assert renewal.step(now) == "ada-0"
    machine.answers["ada-1"] = answer(turn=False)
    now = steps(renewal, now, timedelta(minutes=5), timedelta(seconds=30))
    assert machine.restarted == ["ada-0"]
    machine.answers["ada-1"] = answer(turn=True, left=True)
    steps(renewal, now, timedelta(minutes=5), timedelta(seconds=30))

    assert machine.restarted == ["ada-0", "ada-1"]


def test_pieces_that_find_no_other_place_hold_a_node_up_for_ten_minutes() -> None:
    machine = Machine({"ada-0": answer(turn=True), "ada-1": answer(turn=False)})
    renewal = machine.renewal()
    renewal.take(LATER, LIFE.renewed_from)

    now = steps(renewal, LIFE.renewed_from, timedelta(minutes=9), timedelta(seconds=30))
    assert machine.restarted == []
    steps(renewal, now, timedelta(minutes=2), timedelta(seconds=30))

    assert machine.restarted == ["ada-0"]


def test_at_the_end_a_node_waits_for_no_turn_and_no_answer() -> None:
    for silent in (answer(turn=False), None):
        machine = Machine(dict.fromkeys(NAMES, silent))
        renewal = machine.renewal()
        renewal.take(LATER, LIFE.renewed_from)

        now = steps(renewal, LIFE.renewed_from, 3 * DAY - DAY / 24, DAY / 24)
        assert machine.restarted == []
        steps(renewal, now, DAY / 12, DAY / 24)

        assert machine.restarted == ["ada-0", "ada-1"]


def test_the_next_certificate_is_renewed_as_the_first() -> None:
    machine = Machine(dict.fromkeys(NAMES, answer(turn=True, left=True)))
    renewal = machine.renewal()
    renewal.take(LATER, LIFE.renewed_from)
    steps(renewal, LIFE.renewed_from, timedelta(minutes=1), timedelta(seconds=30))
    assert machine.restarted == list(NAMES)

    renewal.take(LATER, LATER.renewed_from - timedelta(seconds=1))
    steps(renewal, LATER.renewed_from, timedelta(minutes=1), timedelta(seconds=30))
    assert machine.restarted == list(NAMES)
    renewal.take(CertificateLife(START + 9 * DAY, START + 13 * DAY), LATER.renewed_from)
    steps(renewal, LATER.renewed_from, timedelta(minutes=1), timedelta(seconds=30))

    assert machine.restarted == [*NAMES, *NAMES]


def test_the_network_is_asked_at_most_twice_a_minute() -> None:
    machine = Machine(dict.fromkeys(NAMES, answer(turn=False)))
    renewal = machine.renewal()
    renewal.take(LATER, LIFE.renewed_from)

    steps(renewal, LIFE.renewed_from, timedelta(minutes=1), timedelta(milliseconds=500))

    assert len(machine.asked) <= 3
