"""Repairs wait after vain ones; a job that causes losses is found among those that run beside it."""

import asyncio
import random

from hypothesis import given
from hypothesis import strategies as st

from azu.cluster.repairs import RepairTurns, Suspects


def test_waits_after_vain_repairs_grow_up_to_a_limit_and_vary() -> None:
    waited_s: list[float] = []

    async def note(seconds: float) -> None:
        waited_s.append(seconds)

    async def rest() -> None:
        turns = RepairTurns(random.Random(3), note)
        for vain in range(10):
            await turns.rest(vain)

    asyncio.run(rest())

    longest_s = [1, 2, 4, 8, 15, 15, 15, 15, 15]
    assert all(most / 2 <= waited <= most for most, waited in zip(longest_s, waited_s, strict=True))
    assert len(set(waited_s[4:])) == 5


def test_a_job_that_comes_further_between_losses_is_never_to_blame() -> None:
    suspects = Suspects()
    for progress in range(20):
        assert suspects.lost({("long", 0): progress}).guilty == frozenset()


def test_a_choice_is_to_blame_though_the_others_of_its_job_come_further() -> None:
    suspects = Suspects()
    for loss in range(2):
        assert suspects.lost({("job", 0): loss, ("job", 1): 4}).guilty == frozenset()
    assert suspects.lost({("job", 0): 2, ("job", 1): 4}).guilty == {"job"}


def test_what_has_ended_is_forgotten() -> None:
    suspects = Suspects()
    for _ in range(2):
        suspects.lost({("job", 0): 4})
    suspects.forget("job")
    assert suspects.lost({("job", 0): 4}).guilty == frozenset()


@given(st.permutations(range(6)), st.integers(0, 5), st.integers(1, 6))
def test_the_third_loss_blames_the_guilty_job_alone(order: list[int], bad: int, together: int) -> None:
    """Suspects run one by one in any order, the others as before: only the bad one loses pieces."""
    progress = dict.fromkeys(((f"job-{one}", 0) for one in range(6)), 0)
    guilty = (f"job-{bad}", 0)
    suspects, losses = Suspects(), 0
    first = {choice: 0 for choice in progress if choice == guilty or choice[0] < f"job-{together}"}
    suspicion = suspects.lost(first)
    suspicion = suspects.lost(first)
    assert suspicion.guilty == frozenset()
    for one in order:
        choice = (f"job-{one}", 0)
        if choice == guilty:
            suspicion = suspects.lost({choice: 0})
            losses += 1
            break
        progress[choice] += 1

    assert losses == 1
    assert suspicion.guilty == {guilty[0]}
    assert guilty not in suspicion.alone
