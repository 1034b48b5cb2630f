"""A model's own sampling, from its generation_config.json, read as transformers' generate does."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from azu.errors import BrokenCheckpoint
from azu.protocol.sampling import SamplingParams

_FILE = "generation_config.json"
# What generate samples with when the file says no more than that it samples.
_TOP_K = 50
_TEMPERATURE = 1.0


class _GenerationConfig(BaseModel):
    """The part of the file that azu has; others' files hold much more."""

    model_config = ConfigDict(extra="ignore")

    do_sample: bool | None = None
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    min_new_tokens: int | None = Field(default=None, ge=0)


def default_sampling(files: Mapping[str, bytes]) -> SamplingParams:
    """Return the sampling of a model whose config files these are, greedy when they say nothing.

    Raises BrokenCheckpoint when generation_config.json is malformed.
    """
    try:
        found = _GenerationConfig.model_validate_json(files.get(_FILE, b"{}"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BrokenCheckpoint(f"{_FILE}: {place or 'the file'}: {first['msg']}") from error
    temperature = _TEMPERATURE if found.temperature is None else found.temperature
    top_k = _TOP_K if found.do_sample and found.top_k is None else found.top_k or 0
    return SamplingParams(
        max_tokens=1,
        temperature=temperature if found.do_sample else 0.0,
        top_k=top_k,
        top_p=1.0 if found.top_p is None else found.top_p,
        min_p=found.min_p or 0.0,
        repetition_penalty=1.0 if found.repetition_penalty is None else found.repetition_penalty,
        min_tokens=found.min_new_tokens or 0,
    )
