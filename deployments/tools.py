"""Tools: what a request says of them, and the model's calls as OpenAI's answers have them."""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from azu.errors import InvalidRequest
from azu.protocol.job import JobOutcome
from deployments.answers import Part
from deployments.messages import Text

if TYPE_CHECKING:
    from azu.engine.answer_parser import AnswerParser


def _not_forced(choice: Any) -> Any:
    # Nothing here keeps a model from writing something else.
    if choice in (None, "auto", "none"):
        return choice
    raise InvalidRequest(
        "the model may call a tool (auto) or not (none); it cannot be made to",
        param="tool_choice",
        code="unsupported_parameter",
    )


ToolChoice = Annotated[Literal["auto", "none"] | None, BeforeValidator(_not_forced)]


def _writable(schema: Any) -> Any:
    try:
        json.dumps(schema, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError("cannot be written down") from error
    return schema


Schema = Annotated[dict[str, Any], BeforeValidator(_writable)]


class _Function(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: Text | None = None
    parameters: Schema | None = None
    strict: Literal[False] | None = None


class Tool(BaseModel):
    """A function that the model may call; nothing holds its arguments to a schema (`strict`)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: _Function

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates take it."""
        said = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}} | said}


async def with_calls(
    parts: AsyncIterator[Part | JobOutcome], parsers: "Sequence[AnswerParser]"
) -> AsyncIterator[Part | JobOutcome]:
    """Tell the calls in the texts of a job's choices from the rest; the parsers are the choices' own."""
    counts = [0] * len(parsers)
    async for part in parts:
        if isinstance(part, JobOutcome):
            yield part
            continue
        parser = parsers[part.choice]
        found = [parser.push(part.text)]
        if part.finish_reason is not None:
            found.append(parser.finish())
        calls = tuple(call for one in found for call in one.tool_calls)
        counts[part.choice] += len(calls)
        yield replace(
            part,
            text="".join(one.content for one in found),
            reasoning="".join(one.reasoning for one in found),
            tool_calls=calls,
            num_calls=counts[part.choice],
        )
