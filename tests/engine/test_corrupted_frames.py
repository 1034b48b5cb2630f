"""A link that damages frames: every damaged frame is refused, its sender is named, no answer changes."""

import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from azu.engine import stage_runner as runner
from azu.engine.stage import build_stage
from azu.engine.stage_contract import BadFrame, Handoff, blamed
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import StepBatch, StepResult
from tests.engine.conftest import CutModel
from tests.engine.corruption import WAYS
from tests.engine.test_replay import _Deployment, _prompts

SEED = int(os.environ.get("AZU_TEST_SEED", "1"))
BOUNDARIES = (0, 2, 4, 6)
CHANCE = 0.5
PROMPTS = _prompts(4, 11, 1)
SAMPLING = [
    SamplingParams(max_tokens=6, ignore_eos=True),
    SamplingParams(max_tokens=5, temperature=0.9, top_k=40, repetition_penalty=1.1, seed=7, ignore_eos=True),
    SamplingParams(max_tokens=7, temperature=0.7, seed=8, ignore_eos=True),
]
REPEATED = "repeated"


class _BadLink:
    """Passes frames between the stages of a deployment and damages some of them."""

    def __init__(self, deployment: _Deployment, chance: random.Random) -> None:
        self._pipeline = deployment.pipeline
        self._chance = chance
        self._earlier: dict[int, list[bytes]] = {}
        self.damaged = 0
        self.refused: Counter[str] = Counter()
        deployment.pipeline._through = self.through

    def through(self, batch: StepBatch) -> StepResult:
        frame: bytes | None = None
        first = max(0, batch.replay.first - 1) if batch.replay else 0
        for index in range(first, len(self._pipeline.stages)):
            output = self._carried(index, batch, frame)
            if not isinstance(output, Handoff):
                return output
            batch, frame = output.batch, output.frame
        raise AssertionError("the last stage returned no result")

    def _carried(self, index: int, batch: StepBatch, frame: bytes | None) -> Handoff | StepResult:
        stage = self._pipeline.stages[index]
        if frame is None:
            return stage.run(batch, frame)
        if self._chance.random() >= CHANCE:
            self._earlier.setdefault(index, []).append(frame)
            return stage.run(batch, frame)
        way = self._chance.choice((*WAYS, None))
        if way is None:
            # It arrives unchanged, and then a second time.
            self._earlier.setdefault(index, []).append(frame)
            stage.run(batch, frame)
            bad: bytes | None = frame
        else:
            bad = way(self._chance, frame, self._earlier.get(index, []))
        self.damaged += 1
        name = REPEATED if way is None else way.__name__
        try:
            stage.run(batch, bad)
        except BadFrame as error:
            self.refused[name] += error.sender == index - 1
            raise
        raise AssertionError(f"a frame that was {name} is accepted")


def _run(model: CutModel, link_chance: random.Random | None) -> tuple[_Deployment, Counter[str]]:
    deployment = _Deployment(model, BOUNDARIES, num_blocks=16)
    deployment.add(PROMPTS, SAMPLING)
    if link_chance is None:
        deployment.run()
        return deployment, Counter()
    link = _BadLink(deployment, link_chance)
    while deployment.pipeline.engine.num_sequences:
        try:
            deployment.step()
        except BadFrame as error:
            # As the pipeline does: the blamed stage is replaced.
            deployment.lose(*blamed(error, stage=error.sender + 1).stages)
    assert link.refused.total() == link.damaged
    return deployment, link.refused


@pytest.fixture(autouse=True)
def _weights_mapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse the weights of a stage that is built again: only its KV cache is new and empty."""
    built: dict[Any, Any] = {}
    build = build_stage

    def build_once(structure: Any, span: Any, *rest: Any) -> Any:
        if span not in built:
            built[span] = build(structure, span, *rest)
        return built[span]

    monkeypatch.setattr(runner, "build_stage", build_once)


@pytest.mark.parametrize("least", [60, pytest.param(10_000, marks=pytest.mark.prove)])
def test_every_damaged_frame_is_refused_and_no_answer_changes(
    cut_model: Callable[[str], CutModel], least: int
) -> None:
    model, chance = cut_model("llama"), random.Random(SEED)
    expected, _ = _run(model, None)
    refused: Counter[str] = Counter()
    jobs = 0

    while refused.total() < least:
        got, counted = _run(model, chance)
        assert got.tokens == expected.tokens
        assert got.work == expected.work
        refused += counted
        jobs += len(got.tokens)

    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(refused.items()))
    print(f"\n{refused.total()} damaged frames, {refused.total()} refused, each with its sender named;")
    print(f"{jobs} jobs, all with the tokens and shares of an undisturbed run. {kinds}.")
