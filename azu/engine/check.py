"""`azu check`: cut a model, run it stage by stage, and compare tokens and logits with transformers' own."""

import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from azu.engine.local import LocalPipeline, local_topology
from azu.engine.scheduler import SchedulerConfig
from azu.errors import BrokenCheckpoint, InvalidRequest, UnsupportedModel
from azu.models.cut import cut
from azu.models.description import Architecture
from azu.models.inspection import describe
from azu.protocol.sampling import SamplingParams

_NEW_TOKENS = 12
_PROMPT_LENGTHS = (5, 19, 1, 11)
_SEED = 1
_BLOCK_SIZE = 4
# Shorter than the longest prompt: its chunks share steps with the decoded tokens of other sequences.
_PREFILL_CHUNK_TOKENS = 8
# The rounding of float32 when sums have another order, for logits around 1.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The result of a check. `supported` is False, with a `reason`, when the model cannot be cut or read."""

    model: str
    architecture: str | None
    stages: int
    layers: int | None
    tokens_equal: bool
    max_abs_logit_diff: float | None
    supported: bool
    reason: str | None

    @property
    def passed(self) -> bool:
        """Whether azu's tokens and logits are those of the whole model."""
        return self.supported and self.tokens_equal and self.reason is None


def check(
    folder: Path, *, model: str, num_stages: int, expert_holders: int = 0, device: str = "cpu"
) -> CheckReport:
    """Run a model folder in stages on a device and whole on the CPU, in float32, on random token ids.

    With `expert_holders` all experts are in that many expert sets. The stages have different sizes, because
    an even cut would hide mistakes in counting. Raises InvalidRequest for more stages than the model has
    layers.
    """
    try:
        architecture = describe(folder)
    except (UnsupportedModel, BrokenCheckpoint) as error:
        return CheckReport(model, None, num_stages, None, False, None, False, error.message)
    num_layers = len(architecture.layers)
    if not 1 <= num_stages <= num_layers:
        raise InvalidRequest(f"{num_layers} layers cannot make {num_stages} stages", param="stages")
    report = CheckReport(model, architecture.name, num_stages, num_layers, False, None, True, None)
    prompts = _prompts(architecture)
    try:
        tokens, logits = _run_stages(folder, architecture, prompts, num_stages, expert_holders, device)
    except (UnsupportedModel, BrokenCheckpoint) as error:
        return replace(report, supported=False, reason=error.message)
    expected_tokens, expected_logits = _run_whole(folder, prompts)
    equal = tokens == expected_tokens
    difference = max(
        float((ours - theirs).abs().max()) for ours, theirs in zip(logits, expected_logits, strict=True)
    )
    scale = max(1.0, *(float(theirs.abs().max()) for theirs in expected_logits))
    reason = None
    if not equal:
        reason = "the tokens differ from transformers' own"
    elif difference > _TOLERANCE * scale:
        reason = f"the logits differ by {difference:.1e}"
    return replace(report, tokens_equal=equal, max_abs_logit_diff=difference, reason=reason)


def uneven_boundaries(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return the boundaries of stages, each at least as long as the one before: (0, 1, 3, 6) for 6 in 3."""
    weights = range(1, num_stages + 1)
    spare = num_layers - num_stages
    ends = [stage + spare * sum(weights[:stage]) // sum(weights) for stage in range(1, num_stages + 1)]
    return (0, *ends)


def _prompts(architecture: Architecture) -> list[list[int]]:
    generator = torch.Generator().manual_seed(_SEED)
    room = architecture.context_length - _NEW_TOKENS
    return [
        torch.randint(architecture.vocab_size, (max(1, min(length, room)),), generator=generator).tolist()
        for length in _PROMPT_LENGTHS
    ]


def _run_stages(
    folder: Path,
    architecture: Architecture,
    prompts: Sequence[Sequence[int]],
    num_stages: int,
    expert_holders: int,
    device: str,
) -> tuple[list[list[int]], list[Tensor]]:
    with tempfile.TemporaryDirectory(prefix="azu-check-") as out:
        structure = cut(folder, Path(out), model_id=folder.name, revision="check", architecture=architecture)
        # In half precision the order of sums changes tokens; in float32 only a mistake does.
        structure = replace(structure, dtype="float32")
        seen: dict[int, list[Tensor]] = defaultdict(list)

        def keep(sequence_ids: Sequence[int], logits: Tensor) -> None:
            for sequence_id, row in zip(sequence_ids, logits, strict=True):
                seen[sequence_id].append(row.cpu().clone())

        longest = max(len(prompt) for prompt in prompts) + _NEW_TOKENS
        num_blocks = len(prompts) * -(-longest // _BLOCK_SIZE)
        pipeline = LocalPipeline(
            structure,
            local_topology(
                structure,
                uneven_boundaries(structure.num_layers, num_stages),
                expert_holders=expert_holders,
                num_blocks=num_blocks,
                block_size=_BLOCK_SIZE,
            ),
            Path(out),
            SchedulerConfig(num_blocks, _BLOCK_SIZE, prefill_chunk_tokens=_PREFILL_CHUNK_TOKENS),
            device=device,
            on_logits=keep,
        )
        done = pipeline.generate(prompts, SamplingParams(max_tokens=_NEW_TOKENS, ignore_eos=True))
        for one in done:
            if one.error is not None:
                raise one.error
        return [one.token_ids for one in done], [torch.stack(seen[key]) for key in sorted(seen)]


def _run_whole(folder: Path, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
    # Plain greedy decoding in place of the folder's own defaults, and no end before the limit.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens, logits = [], []
    for prompt in prompts:
        input_ids = torch.tensor([list(prompt)])
        out = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=_NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        logits.append(torch.cat(out.logits).float())
    return tokens, logits
