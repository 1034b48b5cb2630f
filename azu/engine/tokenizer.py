"""Text to token ids and back, as the model's own tokenizer does it."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment, TemplateError, meta
from transformers import AutoTokenizer

from azu.architecture.config import GENERATION_CONFIG_FILE, read_json
from azu.engine.answer_parser import AnswerParser
from azu.engine.text_decoder import TextDecoder
from azu.engine.time_limit import OutOfTime, time_limit
from azu.errors import BrokenCheckpoint, InvalidRequest

# What transformers parses chat templates with beside Jinja's own.
_EXTENSIONS = ("jinja2.ext.loopcontrols",)
# A template is a program by whoever made the model, and takes milliseconds.
_TEMPLATE_S = 5.0
# What one raises that was not made for the messages, or for any.
_REFUSALS = (
    TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip


class Tokenizer(TextDecoder):
    """The tokenizer in a folder of config and tokenizer files; never code of the model's own."""

    def __init__(self, folder: Path) -> None:
        """Raises BrokenCheckpoint when the folder has no tokenizer that can be loaded."""
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            super().__init__(self._tokenizer.backend_tokenizer, _ends(self._tokenizer, folder))
        except Exception as error:  # whatever the libraries meet in foreign files
            raise BrokenCheckpoint(f"the tokenizer cannot be loaded: {error}") from error

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """Return the tokenizer of config and tokenizer files, by name; raises BrokenCheckpoint."""
        with tempfile.TemporaryDirectory(prefix="azu-tokenizer-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            return cls(Path(folder))

    def encode(self, text: str) -> list[int]:
        """Return a text's token ids with the special tokens the model expects around a prompt."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def takes_tools(self) -> bool:
        """Say whether the chat template writes tools down and calls of them can be told from the answer."""
        response: Any = getattr(self._tokenizer, "response_template", None)
        fields = response.get("fields") if isinstance(response, dict) else None
        if not self._tokenizer.chat_template or not isinstance(fields, dict) or "tool_calls" not in fields:
            return False
        try:
            template = self._tokenizer.get_chat_template(tools=[])
            # What is read before it is set is what the template is given.
            parsed = Environment(autoescape=False, extensions=_EXTENSIONS).parse(template)  # noqa: S701
            return "tools" in meta.find_undeclared_variables(parsed)
        except (TemplateError, ValueError):
            return False

    def answer_parser(
        self, prompt_token_ids: Sequence[int], tools: Sequence[Mapping[str, Any]]
    ) -> AnswerParser:
        """Return a parser of the answer to a prompt for which `takes_tools` is true."""
        prompt: str = self._tokenizer.decode(list(prompt_token_ids))
        return AnswerParser(self._tokenizer.response_template, prompt, tools)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Return the token ids of a chat in the model's own template, ready for the assistant's answer.

        Raises InvalidRequest when the model has no template, or the template refuses the messages or does not
        come to an end.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template; use completions", param="messages")
        try:
            with time_limit(_TEMPLATE_S):
                text = self._tokenizer.apply_chat_template(
                    list(messages), tools=tools, add_generation_prompt=True, tokenize=False
                )
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        except OutOfTime as error:
            raise InvalidRequest(
                f"the chat template was not done in {_TEMPLATE_S:.0f} s", param="messages"
            ) from error
        except _REFUSALS as error:
            raise InvalidRequest(
                f"the chat template refuses the messages: {error}", param="messages"
            ) from error
        return ids


def _ends(tokenizer: Any, folder: Path) -> frozenset[int]:
    """Return the tokens that end an answer and are no part of it."""
    path = folder / GENERATION_CONFIG_FILE
    said = read_json(path).get("eos_token_id") if path.exists() else None
    ids = [*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id]
    return frozenset(token_id for token_id in ids if isinstance(token_id, int))
