"""Serve accepts configs/serve.yaml; it builds azu's application and holds no secret."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray._common.utils import import_attr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from azu.config import ControlConfig, load_network
from azu.errors import Unavailable
from deployments.control_plane import unless_changed

FILE = Path(__file__).parents[2] / "configs" / "serve.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_serve_accepts_it_and_builds_the_control_plane_and_the_ingress(config) -> None:
    (application,) = ServeDeploySchema.model_validate(config).applications

    built = build(import_attr(application.import_path), application.args)

    deployments = {one.name: one for one in build_app(built, name=application.name).deployments}
    assert deployments.keys() == {"control", "ingress"}
    # Only the head has the passwords.
    for deployment in deployments.values():
        assert deployment.ray_actor_options["resources"] == {"node:__internal_head__": 0.001}


@pytest.mark.parametrize("args", [{}, {"folder": "~/.azu/serve", "admin_key": "secret"}, {"folder": 7}])
def test_unknown_arguments_are_refused(config, args: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        build(import_attr(config["applications"][0]["import_path"]), args)


def test_a_replica_fails_its_health_check_when_its_file_changed(tmp_path: Path) -> None:
    read = ControlConfig(
        redis_url="redis://ingress:old@127.0.0.1:6379/0", pipeline_redis_url="", books_url="",
        home=tmp_path,
        http_host="127.0.0.1", http_port=8000, domain="azu.example", policy=load_network().policy,
        admin_key_sha256="ab" * 32, platform_address="0x" + "a1" * 20, chain_url="http://127.0.0.1:1",
        model_roots=(), max_model_bytes=1,
    )  # fmt: skip
    file = tmp_path / "ingress.json"
    file.write_text(read.to_json())
    unless_changed(file, read)

    file.write_text(replace(read, redis_url="redis://ingress:new@127.0.0.1:6380/0").to_json())
    with pytest.raises(Unavailable, match="has changed"):
        unless_changed(file, read)
