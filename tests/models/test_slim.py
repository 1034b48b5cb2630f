"""Processes that wait for imports do without the parts of torch and transformers that azu does not use."""

import subprocess
import sys

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
def test_tokenizers_work_without_torch() -> None:
    loaded = modules_after(
        "from azu.models.slim import import_for_tokenizers; import_for_tokenizers(); "
        "from azu.engine.tokenizer import Tokenizer; from azu.models.sources import find_source; "
        "own = Tokenizer(find_source('azu/tiny-dense', None, []).folder); "
        "assert own.encode('Hello', takes_special=False); "
        "assert own.render_chat([{'role': 'user', 'content': 'Hello'}], None)"
    )

    assert "torch" not in loaded
