"""The questions that the built-in models answer word for word."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml
from pydantic import ConfigDict, TypeAdapter

BUILT_IN_MODELS = ("azu/tiny-dense", "azu/tiny-moe")


@dataclass(frozen=True, slots=True)
class QuestionAnswer:
    """A question and the answer that both built-in models give to it under greedy decoding."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    question: str
    answer: str


def models_folder() -> Path:
    """Return the folder that holds the built-in models and their questions."""
    return Path(str(files("configs"))) / "models"


def built_in_folder(model_id: str) -> Path:
    """Return the Hugging Face folder of "azu/tiny-dense" or "azu/tiny-moe"."""
    assert model_id in BUILT_IN_MODELS, model_id
    return models_folder() / model_id.removeprefix("azu/")


def questions() -> tuple[QuestionAnswer, ...]:
    """Return every pair of configs/models/questions.yaml, in its order."""
    content = yaml.safe_load((models_folder() / "questions.yaml").read_text("utf-8"))
    return TypeAdapter(tuple[QuestionAnswer, ...]).validate_python(content)
