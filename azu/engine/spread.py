"""The module that stands where a layer's experts were, when some of them are on other nodes."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from azu.engine.context import StepContext
from azu.engine.expert_frames import TokenSlices, decode_answer
from azu.engine.experts import ExpertLink, HeldExperts, PendingExperts
from azu.engine.faults import ExpertsFailed, is_bad_frame
from azu.errors import AzuError, FrameError
from azu.protocol.topology import ExpertSet

_HERE = -1
_NOBODY = -2


@dataclass(frozen=True, slots=True)
class SpreadLayer:
    """A MoE layer whose experts are not all beside their router.

    `router_bytes` counts what one token activates beside the experts, `expert_bytes` one expert's parameters.
    """

    layer: int
    num_experts: int
    node_id: str
    router_bytes: int
    expert_bytes: int
    expert_sets: tuple[ExpertSet, ...]


@dataclass(frozen=True, slots=True)
class _Asked:
    """Token slices on their way to an expert set: `theirs` [T, k] are its choices, `rows` their tokens."""

    expert_set: ExpertSet
    theirs: Tensor
    rows: Tensor
    sent: TokenSlices
    request: bytes
    pending: PendingExperts


class SpreadExperts(nn.Module):
    """Fans routed tokens out to expert sets, runs the local experts meanwhile, merges in a fixed order.

    Takes and gives what an experts module does: hidden [T, H], ids [T, k], weights [T, k] -> [T, H].
    """

    def __init__(
        self,
        spread: SpreadLayer,
        held: HeldExperts | None,
        link: ExpertLink,
        context: StepContext,
        timeout_s: float,
    ) -> None:
        super().__init__()
        self._spread = spread
        self._held = held
        self._module = held.module if held is not None else None
        self._link = link
        self._context = context
        self._timeout_s = timeout_s
        self._holders = _holders(spread, held)
        self._num_chosen = [0] * spread.num_experts

    @property
    def layer(self) -> int:
        """Which layer's experts these are."""
        return self._spread.layer

    @property
    def num_chosen(self) -> tuple[int, ...]:
        """How often each expert was chosen since this stage came up."""
        return tuple(self._num_chosen)

    def relink(self, expert_sets: Iterable[ExpertSet], link: ExpertLink) -> None:
        """Learn where the experts are now; those beside the router stay."""
        layer = self._spread.layer
        chosen = tuple(one for one in expert_sets if layer in one.experts)
        self._spread, self._link = replace(self._spread, expert_sets=chosen), link
        self._holders = _holders(self._spread, self._held)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum [T, H] of every token's experts."""
        padding = self._context.layout.padding
        if padding is None:
            return self._merged(hidden, ids, weights)
        # Only tokens travel and are paid for, not the padding between them.
        rows = padding.flatten().nonzero()[:, 0]
        out = torch.zeros_like(hidden)
        out[rows] = self._merged(hidden[rows], ids[rows], weights[rows])
        return out

    def _merged(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = _counts(ids, self._spread.num_experts)
        self._num_chosen = [before + count for before, count in zip(self._num_chosen, counts, strict=True)]
        owners = self._owners(ids, counts)
        # Every call of the layer is on its way before anything here waits or computes.
        asked = deque(self._ask(owners, hidden, ids, weights))
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        if self._held is not None:
            out += self._held(hidden, ids.masked_fill(owners != _HERE, -1), weights)
        self._count(self._spread.node_id, (owners == _HERE).sum(1), router=True)
        while asked:
            one = asked.popleft()
            try:
                answer = self._answer(one, hidden.device)
            except ExpertsFailed as error:
                theirs = ids.masked_fill(~one.theirs, -1)
                self._do_without(one.expert_set, theirs, error)
                counts = _counts(theirs, self._spread.num_experts)
                asked += self._ask(self._owners(theirs, counts), hidden, theirs, weights)
                continue
            self._count(one.expert_set.node_id, one.theirs.sum(1), router=False)
            out.index_add_(0, one.rows, answer.float())
        return out.to(hidden.dtype)

    def _ask(self, owners: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor) -> list[_Asked]:
        """Send every expert set what it serves of some choices."""
        asked = []
        for chosen in self._spread.expert_sets:
            theirs = owners == chosen.index
            rows = theirs.any(1).nonzero()[:, 0]
            if not len(rows):
                continue
            sent = TokenSlices(
                self._context.step,
                hidden[rows],
                ids.masked_fill(~theirs, -1)[rows],
                weights.masked_fill(~theirs, 0)[rows],
            )
            request = sent.encode()
            pending = self._link.start(chosen.index, self._spread.layer, request)
            asked.append(_Asked(chosen, theirs, rows, sent, request, pending))
        return asked

    def _answer(self, asked: _Asked, device: torch.device) -> Tensor:
        try:
            answer = asked.pending.result(self._timeout_s)
            return decode_answer(answer, asked.request, asked.sent, self._spread.layer, device)
        except AzuError as error:
            raise ExpertsFailed(asked.expert_set.index, error.message) from error

    def _do_without(self, chosen: ExpertSet, ids: Tensor, error: ExpertsFailed) -> None:
        """Have replicas serve instead of a set that is gone, until the next topology.

        Raises the error without them, and for a bad answer: whoever sent it is to be put away first.
        """
        holders = {
            # Whoever is the only one is asked again, and is to blame then.
            expert: tuple(one for one in them if one != chosen.index) or them
            for expert, them in self._holders.items()
        }
        asked = set(ids.flatten().tolist()) - {-1}
        if is_bad_frame(error) or any(chosen.index in holders[expert] for expert in asked):
            raise error
        self._holders = holders

    def _owners(self, ids: Tensor, counts: Collection[int]) -> Tensor:
        """Return who serves each choice [T, k]: an expert set's index, _HERE or _NOBODY (of an id of -1).

        Replicas share by load.
        """
        load = dict.fromkeys((chosen.index for chosen in self._spread.expert_sets), 0)
        owner = []
        for expert, count in enumerate(counts):
            if not count:
                owner.append(_NOBODY)
                continue
            owner.append(min(self._holders[expert], key=lambda index: (load.get(index, -1), index)))
            if owner[-1] != _HERE:
                load[owner[-1]] += count
        return torch.tensor([*owner, _NOBODY], device=ids.device)[ids]

    def _count(self, node_id: str, choices: Tensor, *, router: bool) -> None:
        extra = self._spread.router_bytes if router else 0
        self._context.add_work(self._spread.layer, node_id, choices * self._spread.expert_bytes + extra)


def _counts(ids: Tensor, num_experts: int) -> Collection[int]:
    """Return how often each expert is chosen; -1 is no choice."""
    counts: list[int] = torch.bincount(ids.flatten() + 1, minlength=num_experts + 1).tolist()
    return counts[1:]


def _holders(spread: SpreadLayer, held: HeldExperts | None) -> Mapping[int, tuple[int, ...]]:
    local = held.experts if held is not None else ()
    holders: dict[int, tuple[int, ...]] = dict.fromkeys(local, (_HERE,))
    for expert in set(range(spread.num_experts)) - set(local):
        holders[expert] = tuple(
            chosen.index for chosen in spread.expert_sets if expert in chosen.experts.get(spread.layer, ())
        )
        if not holders[expert]:
            raise FrameError(f"expert {expert} of layer {spread.layer} is in no expert set")
    return holders
