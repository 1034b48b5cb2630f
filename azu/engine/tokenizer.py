"""Text to token ids and back, as the model's own tokenizer does it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from azu.errors import BrokenCheckpoint, InvalidRequest

# How much of a prompt a stream decodes with: enough for any token that joins with the ones before it.
_CONTEXT_TOKENS = 8


class Tokenizer:
    """The tokenizer in a folder of config and tokenizer files; never code of the model's own."""

    def __init__(self, folder: Path) -> None:
        """Raises BrokenCheckpoint when the folder has no tokenizer that can be loaded."""
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            self._backend: Backend = self._tokenizer.backend_tokenizer
        except Exception as error:  # whatever the libraries meet in foreign files
            raise BrokenCheckpoint(f"the tokenizer cannot be loaded: {error}") from error

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

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """Return one token's text, special or not."""
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text

    def stream(self, prompt_token_ids: Sequence[int]) -> "TextStream":
        """Return a stream of the text that follows a prompt."""
        return TextStream(self._backend, prompt_token_ids[-_CONTEXT_TOKENS:])


class TextStream:
    """Turns token ids into text as they come; a piece never ends inside a character."""

    def __init__(self, backend: Backend, context: Sequence[int]) -> None:
        self._backend = backend
        self._context = list(context)
        self._stream = DecodeStream(ids=list(context), skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._given = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that is certain after these tokens, "" if none is yet."""
        text = ""
        for token_id in token_ids:
            self._token_ids.append(token_id)
            text += self._stream.step(self._backend, token_id) or ""
        self._given += len(text)
        return text

    def finish(self) -> str:
        """Return what was held back: the start of a character that never came is shown as U+FFFD."""
        before = self._backend.decode(self._context, skip_special_tokens=True)
        text: str = self._backend.decode(self._context + self._token_ids, skip_special_tokens=True)
        return text[len(before) + self._given :]
