"""A hostile checkpoint is refused with its file's name; no code runs, nothing is charged or half-written."""

import asyncio
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.deployments.local import LocalIngress, local_ingress
from tests.models.questions import built_in_folder

pytestmark = pytest.mark.prove

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Exploit:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


def _index(folder: Path, name: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    (folder / WEIGHTS).rename(folder.parent.parent / "outside.safetensors")


def _change(folder: Path, name: str, **given: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | given))


def index_leads_out(folder: Path, canary: Path) -> None:
    _index(folder, "../../outside.safetensors")


def index_is_absolute(folder: Path, canary: Path) -> None:
    _index(folder, str(folder.parent.parent / "outside.safetensors"))


def link_leads_out(folder: Path, canary: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent.parent / "elsewhere.safetensors")


def link_leads_to_itself(folder: Path, canary: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)


def pickle_under_the_name(folder: Path, canary: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Exploit(canary)))


def old_pickle_under_the_name(folder: Path, canary: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Exploit(canary), protocol=0).ljust(4096))


def pickle_beside(folder: Path, canary: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(canary)))


def huge_header(folder: Path, canary: Path) -> None:
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 2**26))
        file.truncate(2**27)


def weights_without_end(folder: Path, canary: Path) -> None:
    with (folder / WEIGHTS).open("wb") as file:
        file.truncate(2**42)


def header_beyond_the_file(folder: Path, canary: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}")


def offsets_beyond_the_file(folder: Path, canary: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


def truncated(folder: Path, canary: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def not_a_number(folder: Path, canary: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[-1]
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def tensor_missing(folder: Path, canary: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[sorted(tensors)[5]]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def code_of_its_own(folder: Path, canary: Path) -> None:
    (folder / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    _change(folder, "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}, model_type="evil")


def code_of_its_own_beside_a_known_type(folder: Path, canary: Path) -> None:
    (folder / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    _change(folder, "config.json", auto_map={"AutoConfig": "modeling_evil.Evil"}, trust_remote_code=True)


def config_without_end(folder: Path, canary: Path) -> None:
    _change(folder, "config.json", num_hidden_layers=10**9)


def config_nested_without_end(folder: Path, canary: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


def tokenizer_is_none(folder: Path, canary: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\x80\x04pickle")


def template_that_climbs(folder: Path, canary: Path) -> None:
    climb = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(climb)


# How a good model is damaged, and a word of the error message.
HOSTILE: dict[Callable[[Path, Path], None], str] = {
    index_leads_out: INDEX,
    index_is_absolute: INDEX,
    link_leads_out: WEIGHTS,
    link_leads_to_itself: "safetensors",
    pickle_under_the_name: WEIGHTS,
    old_pickle_under_the_name: WEIGHTS,
    pickle_beside: ".bin",
    huge_header: WEIGHTS,
    weights_without_end: "takes up to",
    header_beyond_the_file: WEIGHTS,
    offsets_beyond_the_file: WEIGHTS,
    truncated: WEIGHTS,
    not_a_number: WEIGHTS,
    tensor_missing: "",
    code_of_its_own: "auto_map",
    code_of_its_own_beside_a_known_type: "auto_map",
    config_without_end: "config.json",
    config_nested_without_end: "config.json",
    tokenizer_is_none: "tokenizer",
    template_that_climbs: "template",
}


def test_every_hostile_checkpoint_is_refused_by_name(redis_url: str, tmp_path: Path) -> None:
    root, canary = tmp_path / "here" / "models", tmp_path / "canary"
    for damage in HOSTILE:
        folder = root / damage.__name__
        shutil.copytree(built_in_folder("azu/tiny-dense"), folder)
        damage(folder, canary)

    async def ask(ingress: LocalIngress, name: str, api_key: str) -> tuple[int, dict[str, str]]:
        body = {"model": str(root / name), "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        async with ingress.client(api_key) as client:
            reply = await client.post("/v1/chat/completions", json=body)
        return reply.status_code, reply.json().get("error", {})

    async def scenario() -> None:
        async with local_ingress(redis_url, tmp_path / "home", model_roots=(root,)) as ingress:
            ingress.cut_first()
            address, api_key = await ingress.user()
            before = await ingress.money(address)
            for damage, word in HOSTILE.items():
                status, error = await ask(ingress, damage.__name__, api_key)
                assert status == 400, (damage.__name__, status, error)
                assert word in error["message"], (damage.__name__, error)
                assert await ingress.money(address) == before, damage.__name__
            shutil.copytree(built_in_folder("azu/tiny-dense"), root / "good")
            assert (await ask(ingress, "good", api_key))[0] == 200

    asyncio.run(asyncio.wait_for(scenario(), 300))

    assert not canary.exists()
    cut = [path for path in (tmp_path / "home" / "registry").rglob("*") if path.is_file()]
    kept = {path.parent.parent.name.rpartition("-")[0] for path in cut if path.name == "structure.json"}
    assert all(name.endswith("good") for name in kept)
    print(f"{len(HOSTILE)} hostile checkpoints refused by name, nothing run, charged or half-written")
