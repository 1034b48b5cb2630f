"""The product never loads a pickle, runs code of a checkpoint, or starts a shell with a composed command."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("azu", "actors", "deployments", "configs")
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__",
    "torch.load", "ray.cloudpickle", "torch.hub.load", "torch.package.PackageImporter",
    "numpy.load", "np.load", "numpy.fromfile",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "pickle.load", "pickle.loads", "ray.cloudpickle.loads",
}  # fmt: skip
FORBIDDEN_KEYWORDS = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}
# The same rules for files that are not Python: scripts, templates, YAML, container files.
FORBIDDEN_WORDS = re.compile(
    r"pickle\.loads?\b|torch\.load\b|trust_remote_code\s*[=:]\s*true|(?<![\w.])eval\(|shell\s*=\s*true",
    re.IGNORECASE,
)


def faults(source: str) -> Iterator[str]:
    """Yield each forbidden import or call in Python code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        yield from (
            f"line {node.lineno}: import {name}"
            for name in names
            if name.split(".")[0] in FORBIDDEN_IMPORTS or name in FORBIDDEN_CALLS
        )
        if isinstance(node, ast.Call):
            if (called := ast.unparse(node.func)) in FORBIDDEN_CALLS:
                yield f"line {node.lineno}: {called}()"
            yield from (
                f"line {node.lineno}: {keyword.arg}"
                for keyword in node.keywords
                if isinstance(keyword.value, ast.Constant)
                and keyword.arg in FORBIDDEN_KEYWORDS
                and keyword.value.value is FORBIDDEN_KEYWORDS[keyword.arg]
            )


def product_files() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def test_the_product_has_no_forbidden_import_or_call() -> None:
    found = []
    for path in product_files():
        if path.suffix == ".py":
            found += [f"{path.relative_to(ROOT)}, {fault}" for fault in faults(path.read_text())]
        elif path.suffix != ".safetensors" and (match := FORBIDDEN_WORDS.search(path.read_text("utf-8"))):
            found.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from ray import cloudpickle\ncloudpickle.loads(x)",
        "import torch\ntorch.load(path)",
        "from torch import load",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "eval('1')",
        "subprocess.run(line, shell=True)",
        "yaml.load(text, Loader)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_a_forbidden_import_or_call_is_found(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source", ["model.eval()", "f(trust_remote_code=False)", "redis.eval(script)", "re.compile('x')"]
)
def test_allowed_code_with_a_similar_name_is_not_reported(source: str) -> None:
    assert not list(faults(source))
