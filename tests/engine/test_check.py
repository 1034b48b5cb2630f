"""Every family, cut into uneven stages, gives the whole model's tokens and logits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from azu.engine.check import CheckReport, check, uneven_boundaries
from azu.errors import InvalidRequest
from tests.engine.families import FAMILIES, MOE_FAMILIES, save_model
from tests.few import few

# Of the kinds: tied head, alibi, experts.
_EVERY_TIME = ("llama-tied", "bloom", "qwen2_moe")
_FAMILIES = [
    family if family in _EVERY_TIME else pytest.param(family, marks=pytest.mark.prove) for family in FAMILIES
]


@pytest.fixture(scope="module")
def differences() -> Iterator[dict[str, dict[str, float]]]:
    """Way of cutting -> family -> distance of its logits from the whole model's; printed at the end."""
    found: dict[str, dict[str, float]] = {}
    yield found
    for way, families in found.items():
        worst = max(families, key=families.__getitem__)
        within = f"logits within {families[worst]:.1e} ({worst})"
        print(f"\n{len(families)} families {way}: all tokens equal, {within}")


def difference(report: CheckReport) -> float:
    """Return how much the logits of a model that passed the check differ."""
    assert report.reason is None
    assert report.passed
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff <= 1e-4
    return report.max_abs_logit_diff


@pytest.mark.parametrize("family", _FAMILIES)
def test_family_in_three_uneven_stages_equals_the_whole(
    family: str, tmp_path: Path, differences: dict[str, dict[str, float]]
) -> None:
    report = check(save_model(family, tmp_path), model=family, num_stages=3)

    differences.setdefault("in 3 uneven stages", {})[family] = difference(report)


@pytest.mark.prove
@pytest.mark.parametrize("family", [f for f in _FAMILIES if getattr(f, "values", (f,))[0] in MOE_FAMILIES])
def test_experts_on_three_holders_equal_the_whole(
    family: str, tmp_path: Path, differences: dict[str, dict[str, float]]
) -> None:
    report = check(save_model(family, tmp_path), model=family, num_stages=3, expert_holders=3)

    differences.setdefault("with experts over 3 holders", {})[family] = difference(report)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA card")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_on_a_gpu_equals_the_whole_on_the_cpu(family: str, tmp_path: Path) -> None:
    holders = 3 if family in MOE_FAMILIES else 0

    report = check(
        save_model(family, tmp_path), model=family, num_stages=3, expert_holders=holders, device="cuda:0"
    )

    assert report.passed, report.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.prove
def test_half_precision_checkpoint_equals_the_whole(dtype: torch.dtype, tmp_path: Path) -> None:
    report = check(
        save_model("qwen2_moe", tmp_path, dtype=dtype), model="half", num_stages=2, expert_holders=2
    )

    assert report.passed, report.reason


@pytest.mark.parametrize("num_stages", few([6, 1]))
def test_built_in_model_passes_with_few_and_many_stages(num_stages: int) -> None:
    folder = Path(__file__).parents[2] / "configs" / "models" / "tiny-dense"

    assert check(folder, model="azu/tiny-dense", num_stages=num_stages).passed


def test_model_that_cannot_be_cut_is_reported_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 32}'
    )

    report = check(tmp_path, model="recurrent", num_stages=2)

    assert not report.supported
    assert report.reason is not None
    assert "recurrent" in report.reason


def test_more_stages_than_layers_are_refused() -> None:
    folder = Path(__file__).parents[2] / "configs" / "models" / "tiny-dense"

    with pytest.raises(InvalidRequest, match="stages"):
        check(folder, model="azu/tiny-dense", num_stages=7)


@pytest.mark.parametrize("num_layers", [1, 2, 6, 24, 61])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 6])
def test_uneven_boundaries_cover_every_layer_once(num_layers: int, num_stages: int) -> None:
    if num_stages > num_layers:
        pytest.skip("more stages than layers")

    boundaries = uneven_boundaries(num_layers, num_stages)

    assert boundaries[0] == 0
    assert boundaries[-1] == num_layers
    assert list(boundaries) == sorted(set(boundaries))
