"""A chat's messages, as OpenAI's clients send them and as templates take them."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def finite_text(text: Any) -> Any:
    """Refuse a lone surrogate: it is no character and cannot be written down or tokenised."""
    if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is not valid Unicode")
    return text


Text = Annotated[str, BeforeValidator(finite_text)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A text part of a message's content."""

    type: Literal["text"]
    text: Text


class CalledFunction(_Strict):
    """A function that the model called; `arguments` is a JSON object as text."""

    name: Text = Field(min_length=1, max_length=64)
    arguments: Text

    def for_template(self) -> dict[str, Any]:
        """Return it with its arguments as the values they are."""
        return {"name": self.name, "arguments": json.loads(self.arguments)}

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        try:
            is_object = isinstance(json.loads(self.arguments), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise ValueError("arguments is not a JSON object")
        return self


class MadeCall(_Strict):
    """A call in an earlier answer."""

    id: Text = Field(min_length=1, max_length=128)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Strict):
    """One turn of a chat; what clients send back of an answer of ours is taken too."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = Field(default=None, max_length=256)
    tool_calls: list[MadeCall] | None = None
    tool_call_id: Text | None = Field(default=None, max_length=128)
    reasoning_content: Text | None = None
    # What an answer of ours or of OpenAI's says by null or nothing.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[None] | None = Field(default=None, max_length=0)

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant calls tools")
        if (self.tool_call_id is None) != (self.role != "tool"):
            raise ValueError("tool_call_id belongs to the answer of a tool")
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content")
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        said: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content or ()]
        said["content"] = "".join(parts)
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                said[name] = value
        if self.tool_calls:
            said["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function.for_template()}
                for call in self.tool_calls
            ]
        return said
