"""The control plane's configuration is read back from its file; the error for a bad file has no secrets."""

import json
from pathlib import Path

import pytest

from azu.config import ControlConfig, load_network
from azu.errors import ConfigurationError


@pytest.fixture
def config(tmp_path: Path) -> ControlConfig:
    return ControlConfig(
        redis_url="redis://scheduler:secret@127.0.0.1:6379/0",
        pipeline_redis_url="redis://pipeline:secret@127.0.0.1:6379/0",
        books_url="wire://scheduler:secret@127.0.0.1:6380",
        home=tmp_path,
        http_host="127.0.0.1",
        http_port=8000,
        domain="azu.example",
        policy=load_network().policy,
        admin_key_sha256="ab" * 32,
        platform_address="0x" + "a1" * 20,
        chain_url="http://127.0.0.1:3001",
        model_roots=(tmp_path / "models",),
        max_model_bytes=1024,
        hf_token="hf_secret",
    )


def test_a_file_holds_the_complete_configuration(config: ControlConfig, tmp_path: Path) -> None:
    file = tmp_path / "control.json"
    file.write_text(config.to_json())

    assert ControlConfig.from_file(file) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [({"http_port": "secret"}, "http_port"), ({"new": "secret"}, "new"), ({"policy": {}}, "policy.price")],
)
def test_the_error_for_a_bad_file_names_the_file_and_has_no_secret(
    config: ControlConfig, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    file = tmp_path / "control.json"
    file.write_text(json.dumps(json.loads(config.to_json()) | change))

    with pytest.raises(ConfigurationError, match=named) as refused:
        ControlConfig.from_file(file)

    assert "secret" not in str(refused.value)
    assert str(file) in str(refused.value)


def test_the_error_for_a_missing_or_truncated_file_names_it(config: ControlConfig, tmp_path: Path) -> None:
    file = tmp_path / "control.json"
    with pytest.raises(ConfigurationError, match="No such file"):
        ControlConfig.from_file(file)

    file.write_text(config.to_json()[:100])
    with pytest.raises(ConfigurationError, match=str(file)):
        ControlConfig.from_file(file)
