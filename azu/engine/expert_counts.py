"""Choices of experts are counted at both ends: by the router that sends tokens and by the set that gets them.

What a router says comes with each step. What an expert set got the pipeline asks the set itself, after the
steps: it never goes through the router's hands. Where they differ nothing shows who is wrong, so the smaller
number is paid, and no owner gains by counting the work of another one's set as that of its own pieces. The
rest is the platform's. A set that does not answer says nothing against its router.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from azu.errors import FrameError
from azu.protocol.step import ExpertWork

# Several seconds of steps: the pipeline asks twice a second.
_KEPT_STEPS = 4096

Holder = tuple[int, int | None]  # a layer, and an expert set or None for the router's own stage
Counts = tuple[int | None, int, int]  # a holder in one layer, what its router said, what it got itself
Received = Mapping[int, Mapping[int, int]]  # step -> layer -> the choices that one expert set got


class ReceivedChoices:
    """The choices that an expert set got in its last steps; other threads may ask for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: dict[tuple[int, int], Counter[int]] = {}  # epoch and step -> layer -> choices
        self._forgotten = (-1, -1)

    def add(self, epoch: int, step: int, layer: int, choices: int) -> None:
        """Count the choices of one request."""
        with self._lock:
            self._steps.setdefault((epoch, step), Counter())[layer] += choices
            while len(self._steps) > _KEPT_STEPS:
                oldest = next(iter(self._steps))
                del self._steps[oldest]
                self._forgotten = max(self._forgotten, oldest)

    def of(self, epoch: int, steps: Collection[int]) -> Received | None:
        """Return what came in these steps, None when some of it is forgotten."""
        with self._lock:
            if (epoch, min(steps)) <= self._forgotten:
                return None
            return {step: dict(self._steps[epoch, step]) for step in steps if (epoch, step) in self._steps}


@dataclass(frozen=True, slots=True)
class ReportedStep:
    """What routers say of one step; of its sequences those in `paid` are paid for it.

    `nodes` has the node of every holder under the topology of the step.
    """

    step: int
    work: tuple[ExpertWork, ...]
    paid: frozenset[int]
    nodes: Mapping[Holder, str]

    def compared(self, received: Mapping[int, Received]) -> "Iterator[Difference]":
        """Yield where this differs from what expert sets say, by their indices; those missing say nothing."""
        said: Counter[Holder] = Counter()
        for entry in self.work:
            said[entry.layer, entry.expert_set] += sum(entry.choices.values())
        by_layer: defaultdict[int, list[Counts]] = defaultdict(list)
        for layer, expert_set in self.nodes:
            own = got = said[layer, expert_set]
            if expert_set is not None and expert_set in received:
                got = received[expert_set].get(self.step, {}).get(layer, 0)
            by_layer[layer].append((expert_set, own, got))
        for layer, counts in by_layer.items():
            if any(own != got for _, own, got in counts):
                paid = _paid(counts)
                for expert_set, own, got in counts:
                    if not own == got == paid[expert_set]:
                        yield Difference((layer, expert_set), own, got, paid[expert_set])


@dataclass(frozen=True, slots=True)
class Difference:
    """The choices of one holder in a step: what its router said, what it got itself, and what is paid."""

    holder: Holder
    said: int
    got: int
    paid: int

    def __str__(self) -> str:
        layer, expert_set = self.holder
        who = "the router's stage" if expert_set is None else f"expert set {expert_set}"
        return (
            f"layer {layer}: {who} ran {self.said} choices by its router's count and {self.got} by its own; "
            f"{self.paid} are paid"
        )


def _paid(counts: Iterable[Counts]) -> dict[int | None, int]:
    """Return what each holder of a layer is paid for.

    It is the smaller of the two numbers. What a set got and its router does not say leaves less for those who
    may be paid for it: first for the router's own stage, then for each other set, any of which may have
    agreed with the router about it.
    """
    paid = {expert_set: min(said, got) for expert_set, said, got in counts}
    unsaid = {expert_set: max(0, got - said) for expert_set, said, got in counts}
    too_many = sum(paid.values()) + sum(unsaid.values()) - sum(said for _, said, _ in counts)
    less = {
        expert_set: too_many - (unsaid[expert_set] + paid[None] if expert_set is not None else 0)
        for expert_set in paid
    }
    return {expert_set: max(0, choices - max(0, less[expert_set])) for expert_set, choices in paid.items()}


def check_received(answer: object, steps: Collection[int]) -> Received:
    """Return what an expert set says it got in some steps; raises FrameError for anything else."""
    try:
        is_fine = all(
            step in steps
            and all(type(layer) is type(got) is int and got >= 0 for layer, got in layers.items())
            for step, layers in cast(Received, answer).items()
        )
    except Exception as error:
        raise FrameError(f"it does not say what it got ({type(error).__name__})") from error
    if not is_fine:
        raise FrameError("it says that it got what no step sends")
    return cast(Received, answer)
