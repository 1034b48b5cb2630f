"""A whole deployment in one process: the stages and expert sets of a cut model, linked by function calls."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path

from torch import Tensor

from azu.engine.accounting import Work
from azu.engine.experts import ExpertRunner
from azu.engine.pipeline import EnginePipeline
from azu.engine.scheduler import SchedulerConfig
from azu.engine.scheduler import Sequence as EngineSequence
from azu.engine.stage_contract import Handoff, StageSpec
from azu.engine.stage_runner import StageRunner
from azu.errors import AzuError, DeadlineExceeded, InternalError
from azu.models.config_json import eos_token_ids
from azu.protocol.job import FinishReason, TokenEvent
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import StepBatch, StepResult
from azu.protocol.structure import LayerKind, Structure
from azu.protocol.topology import ExpertSet, LayerSpan, Prediction, Stage, Topology


@dataclass(slots=True)
class Completion:
    """The completion of a prompt."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    work: Work = field(default_factory=dict)
    error: AzuError | None = None

    def add(self, event: TokenEvent) -> None:
        """Append the tokens of an event, and take its work when it is the last one."""
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        if event.finish_reason is not None:
            self.finish_reason, self.work, self.error = event.finish_reason, event.work, event.error


class LocalPipeline:
    """Runs prompts through a topology whose pieces are loaded from the shards in one folder."""

    def __init__(
        self,
        structure: Structure,
        topology: Topology,
        shard_folder: Path,
        scheduling: SchedulerConfig | None = None,
        *,
        device: str = "cpu",
        on_logits: Callable[[Sequence[int], Tensor], None] | None = None,
    ) -> None:
        """Load every piece on one device; `on_logits` gets the logits that the last stage samples from."""
        self._structure = structure
        self._folder = shard_folder
        self._device = device
        self._paths = {shard.name: shard_folder / shard.file_name for shard in structure.shards}
        self._on_logits = on_logits
        self.topology = topology
        self.link = LocalExpertLink(
            {expert_set.index: self.load_experts(expert_set) for expert_set in topology.expert_sets}
        )
        self.stages = [self.load_stage(stage) for stage in topology.stages]
        self.engine = EnginePipeline(
            structure,
            topology,
            scheduling or SchedulerConfig(topology.num_blocks, topology.block_size),
            eos_token_ids(shard_folder),
        )
        self.in_flight: deque[StepBatch] = deque()
        self._ids = count(1)

    def load_stage(self, stage: Stage) -> StageRunner:
        """Load a stage of the topology."""
        spec = StageSpec(
            structure=self._structure,
            stage=stage,
            topology=self.topology,
            shard_paths=self._paths,
            config_folder=self._folder,
            device=self._device,
        )
        return StageRunner(spec, self.link, on_logits=self._on_logits)

    def load_experts(self, expert_set: ExpertSet) -> ExpertRunner:
        """Load an expert set of the topology."""
        return ExpertRunner(self._structure, expert_set.experts, self._paths, self._folder, self._device)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete prompts of token ids together, each with its own sampling or all with the same."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        completions: dict[int, Completion] = {}
        for prompt, params in zip(prompts, each, strict=True):
            sequence_id = next(self._ids)
            self.engine.add(EngineSequence(sequence_id, tuple(prompt), params))
            completions[sequence_id] = Completion()
        while self.engine.num_sequences:
            for sequence_id, event in self.step().items():
                completions[sequence_id].add(event)
        return list(completions.values())

    def step(self) -> dict[int, TokenEvent]:
        """Start as many steps as may be in flight, then run the oldest of them through all stages."""
        while (batch := self.engine.next_batch()) is not None:
            self.stages[-1].see(self.engine.seen_by(batch))
            self.in_flight.append(batch)
        if not self.in_flight:
            raise InternalError("sequences wait, but no step can run")
        return self.engine.complete(self._through(self.in_flight.popleft()))

    def _through(self, batch: StepBatch) -> StepResult:
        frame: bytes | None = None
        first = max(0, batch.replay.first - 1) if batch.replay else 0
        for stage in self.stages[first:]:
            output = stage.run(batch, frame)
            if not isinstance(output, Handoff):
                return output
            batch, frame = output.batch, output.frame
        raise InternalError("the last stage sampled nothing")


def local_topology(
    structure: Structure,
    boundaries: Sequence[int],
    *,
    expert_holders: int = 0,
    num_blocks: int = 256,
    block_size: int = 16,
) -> Topology:
    """Return a topology on invented nodes: stages between the boundaries (0, ..., number of layers).

    With `expert_holders` the experts of every MoE layer are divided among that many expert sets.
    """
    moe = [layer for layer in structure.layers if layer.kind is LayerKind.MOE]
    spans = [LayerSpan(start, end) for start, end in pairwise(boundaries)]
    return Topology(
        model_id=structure.model_id,
        revision=structure.revision,
        epoch=1,
        stages=tuple(
            Stage(
                index=index,
                node_id=f"stage-{index}",
                span=span,
                experts={
                    layer.index: () if expert_holders else tuple(range(layer.num_experts))
                    for layer in moe
                    if layer.index in span
                },
                vram_bytes=0,
            )
            for index, span in enumerate(spans)
        ),
        expert_sets=tuple(
            ExpertSet(
                index=holder,
                node_id=f"experts-{holder}",
                experts={
                    layer.index: tuple(range(holder, layer.num_experts, expert_holders)) for layer in moe
                },
                vram_bytes=0,
            )
            for holder in range(expert_holders if moe else 0)
        ),
        num_blocks=num_blocks,
        block_size=block_size,
        prediction=Prediction(tokens_per_s=0.0, time_per_output_token_s=0.0, lamports_per_token=0),
    )


@dataclass(frozen=True, slots=True)
class _Pending:
    answer: "Future[bytes]"

    def result(self, timeout_s: float) -> bytes:
        try:
            return self.answer.result(timeout_s)
        except FutureTimeoutError as error:
            raise DeadlineExceeded("experts did not answer in time") from error


class LocalExpertLink:
    """Calls expert sets in threads, so that they run while the router's stage runs its local experts."""

    def __init__(self, runners: dict[int, ExpertRunner]) -> None:
        self.runners = runners
        self._threads = ThreadPoolExecutor(max(1, len(runners)), thread_name_prefix="experts")

    def start(self, expert_set: int, layer: int, request: bytes) -> _Pending:
        """Run a request in another thread."""
        return _Pending(self._threads.submit(self.runners[expert_set].run, layer, request))
