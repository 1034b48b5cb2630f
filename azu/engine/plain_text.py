"""Text that only spells special tokens: a caller's "<|im_end|>" becomes the tokens of its letters.

Special are those that the tokenizer says are, and those that the chat template writes around turns.
"""

import json
from collections.abc import Mapping, Set
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from azu.errors import InvalidRequest

# No text has these two code points: Unicode keeps them for use inside programs.
_MARK = "\ufdd0"  # stands inside a special token's name, which then is no longer the token
_BEFORE = "\ufdd1"
_UNUSED = str.maketrans("", "", _MARK + _BEFORE)
_Value = TypeVar("_Value")


def is_marked(text: str) -> bool:
    """Return whether a text has a mark."""
    return _MARK in text


class PlainText:
    """Marks callers' texts, and makes tokens of a prompt in which they stand beside special tokens."""

    def __init__(self, backend: Backend, around_turns: Set[int] = frozenset()) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._specials = {
            token_id: token.content
            for token_id, token in added.items()
            if (token.special or token_id in around_turns) and token.content.strip()
        }
        self._names = frozenset(self._specials.values())
        self._beginnings = {name[:length] for name in self._names for length in range(1, len(name))}
        # Finds added tokens as the tokenizer does, and makes no tokens of anything else.
        self._finder = Backend(models.BPE())
        if backend.normalizer is not None:
            self._finder.normalizer = backend.normalizer
        self._finder.add_tokens(list(added.values()))

    def marked(self, value: _Value) -> _Value:
        """Return a text, or a value made of texts, with a mark in each special token that it spells.

        A beginning of one at a text's end is marked too: the template may write the rest behind it.
        """
        found: Any = value
        if isinstance(value, str):
            text = value.translate(_UNUSED)
            while (again := self._marked_once(text)) != text:
                text = again  # a name may stand inside another
            end = text.rstrip()
            longest = min(len(end), max(map(len, self._beginnings), default=0))
            if any(end[-length:] in self._beginnings for length in range(1, longest + 1)):
                text = end + _MARK + text[len(end) :]
            found = text
        elif isinstance(value, Mapping):
            found = {self.marked(key): self.marked(one) for key, one in value.items()}
        elif isinstance(value, list | tuple):
            found = [self.marked(one) for one in value]
        return found  # type: ignore[no-any-return]

    def _marked_once(self, text: str) -> str:
        found = self._finder.encode(text, add_special_tokens=False)
        places = [0]
        for token_id, (begin, end) in zip(found.ids, found.offsets, strict=True):
            name = self._finder.id_to_token(token_id)
            if name in self._names and _MARK not in text[begin : end + 1]:
                # Some tokens take the blanks before them.
                places.append(1 + max(begin, text.find(name, begin, end)))
        return _MARK.join(text[begin:end] for begin, end in pairwise([*places, len(text)]))

    def ids(self, text: str, *, is_prompt: bool) -> list[int]:
        """Return the token ids of a text without its marks; of a prompt, with the special tokens around it.

        Raises InvalidRequest where the tokenizer has no other tokens for a marked name than the special one.
        """
        encoding = self._backend.encode(text, add_special_tokens=is_prompt)
        ids: list[int] = []
        run: list[int] = []  # the tokens of text since `start`
        start = 0
        for token_id, span, is_around in zip(
            encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True
        ):
            begin, end = span
            if is_around:
                begin = end = len(text) if ids or run else 0
            elif token_id not in self._specials or _MARK in text[begin : end + 1]:
                run.append(token_id)
                continue
            ids += [*self._run(text, start, begin, run), token_id]
            run, start = [], end
        return ids + self._run(text, start, len(text), run)

    def _run(self, text: str, start: int, end: int, known: list[int]) -> list[int]:
        """Return the tokens of text between two special tokens; they are known where nothing is marked."""
        if _MARK not in (marked := text[start:end]):
            return known
        plain = marked.translate(_UNUSED)
        # A tokenizer may begin the first text of a prompt in another way than a later one.
        found = self._letters.encode(plain if start == 0 else _BEFORE + plain, add_special_tokens=False).ids
        ids: list[int] = found if start == 0 else found[1:]
        if special := [self._specials[token_id] for token_id in ids if token_id in self._specials]:
            raise InvalidRequest(f"this model cannot read {special[0]!r} as text")
        return ids

    @cached_property
    def _letters(self) -> Backend:
        """A tokenizer that reads the names of special tokens as text."""
        described = json.loads(self._backend.to_str())
        for token in described["added_tokens"]:
            token["special"] |= token["id"] in self._specials
        letters = Backend.from_str(json.dumps(described))
        letters.no_truncation()
        letters.no_padding()
        letters.encode_special_tokens = True
        letters.add_tokens([AddedToken(_BEFORE, normalized=False)])
        return letters
