"""Processes that wait for imports do without the parts of torch and transformers that azu does not use."""

import subprocess
import sys
from pathlib import Path

import pytest

UNUSED = ("sympy", "torch._dynamo", "torch.distributed.tensor", "torch._inductor")


def modules_after(program: str) -> set[str]:
    """Return the names of all modules after a program ran in a new interpreter."""
    shown = f"{program}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", shown], capture_output=True, text=True, check=True, timeout=100
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.prove
def test_a_stage_imports_no_compiler_and_finds_the_real_one_later() -> None:
    start = "from azu.models.slim import import_for_stages; import_for_stages(); "
    engine = start + "import azu.engine.experts, azu.engine.stage_runner, azu.models.registry"

    assert modules_after(engine).isdisjoint(UNUSED)
    later = modules_after(
        engine + "; import torch; assert torch.compiler.is_compiling() is False; torch._dynamo"
    )
    assert "torch._dynamo.convert_frame" in later


@pytest.mark.prove
@pytest.mark.parametrize("model_id", ["azu/tiny-dense", "azu/tiny-moe"])
def test_a_model_is_cut_loaded_and_run_without_the_compiler(model_id: str, tmp_path: Path) -> None:
    loaded = modules_after(
        "from azu.models.slim import import_for_stages; import_for_stages(); "
        "from pathlib import Path; from azu.models import describe; from azu.models.cut import cut; "
        "from azu.models.sources import find_source; "
        "from azu.engine.local import LocalPipeline, local_topology; "
        "from azu.protocol.sampling import SamplingParams; "
        f"folder, own = Path({str(tmp_path)!r}), find_source({model_id!r}, None, ()).folder; "
        "made = cut(own, folder, model_id='m', revision='r', architecture=describe(own)); "
        "topology = local_topology(made, (0, made.num_layers), expert_holders=2, num_blocks=16); "
        "LocalPipeline(made, topology, folder).generate([[3, 4, 5]], SamplingParams(max_tokens=2))"
    )

    assert loaded.isdisjoint(["torch._dynamo", "torch._inductor"])


@pytest.mark.prove
def test_threads_share_what_stands_for_the_compiler_and_find_the_real_one_in_what_it_lacks() -> None:
    loaded = modules_after(
        "from azu.models.slim import import_for_stages, without_compiler; import_for_stages(); "
        "import torch; without_compiler.__enter__(); without_compiler.__enter__(); "
        "without_compiler.__exit__(); import torch._dynamo as stand_in; "
        "assert stand_in.disable(len) is len, 'one thread has left, and another is there'; "
        "assert stand_in.config.cache_size_limit; without_compiler.__exit__(); "
        "assert torch._dynamo is not stand_in"
    )

    assert "torch._dynamo.convert_frame" in loaded


@pytest.mark.prove
def test_tokenizers_work_without_torch() -> None:
    loaded = modules_after(
        "from azu.models.slim import import_for_tokenizers; import_for_tokenizers(); "
        "from azu.engine.tokenizer import Tokenizer; from azu.models.sources import find_source; "
        "own = Tokenizer(find_source('azu/tiny-dense', None, []).folder); "
        "assert own.encode('Hello', takes_special=False); "
        "assert own.render_chat([{'role': 'user', 'content': 'Hello'}], None)"
    )

    assert "torch" not in loaded
