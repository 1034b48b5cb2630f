"""Text to token ids and back, as the model's own tokenizer does it."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError
from transformers import AutoTokenizer

from azu.engine.text_decoder import TextDecoder
from azu.errors import BrokenCheckpoint, InvalidRequest


class Tokenizer(TextDecoder):
    """The tokenizer in a folder of config and tokenizer files; never code of the model's own."""

    def __init__(self, folder: Path) -> None:
        """Raises BrokenCheckpoint when the folder has no tokenizer that can be loaded."""
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            super().__init__(self._tokenizer.backend_tokenizer)
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

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Return the token ids of a chat in the model's own template, ready for the assistant's answer.

        Raises InvalidRequest when the model has no template or the template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template; use completions", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise InvalidRequest(
                f"the chat template refuses the messages: {error}", param="messages"
            ) from error
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
