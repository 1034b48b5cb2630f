"""Stop strings end the text at any place in its tokens, and no part of them is ever returned."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from azu.engine.text import MARKUP, CompletionText, TextDecoder
from azu.engine.tokenizer import Tokenizer
from azu.protocol.sampling import SamplingParams


class Letters:
    """Decodes token ids as characters; an id above 1000 is the first half of one and has no text yet."""

    def __init__(self) -> None:
        self._half = ""

    def push(self, token_id: int) -> str:
        if token_id > 1000:
            self._half = chr(token_id - 1000)
            return ""
        text, self._half = self._half + chr(token_id), ""
        return text

    def finish(self) -> str:
        return self._half


def returned(pieces: Iterable[str], *stop: str, min_tokens: int = 0) -> list[str]:
    """Return the new text after each token, and last the rest at the end."""
    text = CompletionText(Words(pieces), stop, min_tokens)
    given = [text.push(index).text for index in range(len(list(pieces)))]
    return [*given, text.finish().text]


class Words:
    """Decodes token n as the nth piece."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = list(pieces)

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["Hello", " world", "!"], (), ["Hello", " world", "!", ""]),
        (["one", "\n", "two"], ("\n",), ["one", "", "", ""]),
        # The stop string begins inside one token and ends two tokens later.
        (["ab E", "N", "D cd"], ("END",), ["ab ", "", "", ""]),
        # A text that began like the stop string is returned as soon as it cannot become one.
        (["ab E", "N", "X"], ("END",), ["ab ", "", "ENX", ""]),
        (["ab EN"], ("END",), ["ab ", "EN"]),
        # The first one in the text ends it, in any order of the parameters.
        (["x STOP END"], ("END", "STOP"), ["x ", ""]),
        (["aab", "aac"], ("aac",), ["aab", "", ""]),
        (["aaa", "b"], ("aab",), ["a", "", ""]),
        # The mark before a token that stands between the parts of an answer is no text.
        (["ab.", f"{MARKUP}</think>", "\n"], (".</think>",), ["ab", "", "", ""]),
        (["ab.", f"{MARKUP}</thin", "g"], (".</think>",), ["ab", "", f".{MARKUP}</thing", ""]),
        (["ab", f"{MARKUP}</think>", "c"], ("</think>",), ["ab", "", "", ""]),
    ],
)
def test_text_ends_before_a_stop_string(
    pieces: list[str], stop: tuple[str, ...], expected: list[str]
) -> None:
    assert returned(pieces, *stop) == expected


def test_a_stop_string_is_ordinary_text_before_the_minimum_of_tokens() -> None:
    assert returned(["a.", "b.", "c."], ".", min_tokens=2) == ["a.", "b", "", ""]


def test_the_sequence_ends_with_the_token_that_completes_the_stop_string() -> None:
    text = CompletionText(Words(["ab E", "N", "D cd", "more"]), ("END",))

    assert [text.ends_with(index) for index in range(3)] == [False, False, True]


def test_a_half_character_at_the_end_may_complete_a_stop_string() -> None:
    text = CompletionText(Letters(), ("a!",))

    assert text.push(ord("a")).text == ""
    assert text.push(1000 + ord("!")).text == ""
    assert text.finish().text == ""
    assert text.stopped


def test_tokens_are_returned_with_their_text_and_tokens_of_a_stop_string_never() -> None:
    text = CompletionText(Words(["Hi", "", " there", " E", "N", "D"]), ("END",))

    offsets = [text.push(index).token_offsets for index in range(6)]

    # The fourth token's space is returned, but the token itself would show how the stop string begins.
    assert offsets == [(0,), (), (2, 2), (), (), ()]


def test_all_tokens_are_returned_at_the_end_of_an_ordinary_text() -> None:
    text = CompletionText(Words(["Hi", " E", "N", ""]), ("END",))

    pieces = [*(text.push(index) for index in range(4)), text.finish()]

    assert [offset for piece in pieces for offset in piece.token_offsets] == [0, 2, 4, 5]


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_the_returned_text_ends_before_the_first_complete_stop_string(
    pieces: list[str], stop: list[str]
) -> None:
    whole = "".join(pieces)
    # The text grows token by token: the stop string that is complete first ends it.
    grown = ("".join(pieces[: n + 1]) for n in range(len(pieces)))
    complete = next((text for text in grown if any(one in text for one in stop)), None)
    end = len(whole) if complete is None else min(complete.find(one) for one in stop if one in complete)

    assert "".join(returned(pieces, *stop)) == whole[:end]


_FOLDER = Path(__file__).parents[2] / "configs" / "models" / "tiny-dense"
_TEXT = "plain words 😀 漢字 naïve"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(_FOLDER)


def test_the_bytes_of_all_tokens_are_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(_TEXT)

    assert b"".join(tokenizer.token_bytes(token) or b"?" for token in ids).decode().endswith(_TEXT)


def test_a_decoder_from_json_decodes_the_same_text(tokenizer: Tokenizer) -> None:
    texts = []
    for decoder in (tokenizer, TextDecoder.from_json(tokenizer.to_json())):
        text = decoder.completion((), SamplingParams(max_tokens=99))
        texts.append("".join(text.push(token).text for token in tokenizer.encode(_TEXT)))

    assert texts[0] == texts[1]
    assert texts[0].strip() == _TEXT


def test_a_stop_string_is_found_across_the_tokens_of_its_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 😀漢 more")
    sampling = SamplingParams(max_tokens=99, stop=("😀漢",))
    text = tokenizer.completion((), sampling)

    shown = "".join(text.push(token).text for token in ids)

    assert shown.strip() == "ok"
    assert text.stopped


@pytest.mark.parametrize("markup", [{}, {4: "<|user|>"}])
def test_a_stop_string_that_is_a_special_token_stops_by_its_id(
    tokenizer: Tokenizer, markup: dict[int, str]
) -> None:
    (special,) = tokenizer.encode("<|user|>", takes_special=True)
    ids = [*tokenizer.encode("one E"), special, *tokenizer.encode("two")]
    sampling = SamplingParams(max_tokens=99, stop=("END", "<|user|>"))
    for decoder in (tokenizer, TextDecoder.from_json(tokenizer.to_json())):
        text = decoder.completion((), sampling, markup)

        deltas = [text.push(token) for token in ids]

        assert "".join(delta.text for delta in deltas).endswith("one E")
        assert sum(len(delta.token_offsets) for delta in deltas) == len(tokenizer.encode("one E"))
        text = decoder.completion((), sampling, markup)
        assert [text.ends_with(token) for token in ids].index(True) == ids.index(special)


def test_a_word_keeps_its_space_and_a_byte_its_value_in_a_sentencepiece_vocabulary() -> None:
    vocabulary = {"<unk>": 0, "▁Hello": 1, "<0xF0>": 2, "▁": 3}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    decoder = TextDecoder(backend)

    assert decoder.token_text(1) == " Hello"
    assert decoder.token_bytes(1) == b" Hello"
    assert decoder.token_bytes(2) == b"\xf0"


_BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
_WORDS = {"▁Hello": 256, "▁": 257, "b": 258, "漢": 259, "'": 260, "</s>": 261}


@pytest.fixture(scope="module")
def byte_fallback() -> TextDecoder:
    backend = Backend(models.BPE(_BYTES | _WORDS, [], byte_fallback=True))
    backend.add_special_tokens(["</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextDecoder(backend)


def _texts(decoder: TextDecoder, token_ids: Iterable[int], context: Iterable[int] = ()) -> list[str]:
    """Return the text after each token, and last the rest."""
    text = decoder.completion(tuple(context), SamplingParams(max_tokens=99))
    return [*(text.push(token_id).text for token_id in token_ids), text.finish().text]


@pytest.mark.parametrize(
    ("context", "tokens", "expected"),
    [
        ((256,), (0xC3, 0xA9, 258), ["", "é", "b", ""]),
        # The tokenizer decodes all three bytes as bad ones; what was returned stays.
        ((256,), (0xC3, 0xA9, 0xE2, 258), ["", "é", "", "\ufffdb", ""]),
        ((), (0xFF, 0xFF, 0xC3, 0xA9), ["\ufffd", "\ufffd", "", "é", ""]),
        ((), (0xC3, 0xA9, 0xE2), ["", "é", "", "\ufffd"]),
        # A word keeps its space behind a byte, also behind the prompt's.
        ((), (0xC3, 0xA9, 256), ["", "é", " Hello", ""]),
        ((0x41,), (256,), [" Hello", ""]),
        # The prompt's half character is no part of the answer, nor is a prompt's U+FFFD.
        ((256, 0xC3), (0xA9, 258), ["\ufffd", "b", ""]),
        ((0xEF, 0xBF, 0xBD), (258,), ["b", ""]),
        ((256,), (261, 261, 256), ["", "", " Hello", ""]),
    ],
)
def test_single_bytes_become_text_as_they_come(
    byte_fallback: TextDecoder, context: tuple[int, ...], tokens: tuple[int, ...], expected: list[str]
) -> None:
    assert _texts(byte_fallback, tokens, context) == expected


@given(st.data())
def test_no_tokens_make_decoding_fail_and_characters_in_bytes_arrive_whole(
    byte_fallback: TextDecoder, tokenizer: Tokenizer, data: st.DataObject
) -> None:
    token = st.one_of(st.integers(0, 261), st.integers(0x80, 0xFF), st.integers(0, 2**31))
    tokens = data.draw(st.lists(token, max_size=40))
    context = data.draw(st.lists(token, max_size=9))
    for decoder in (byte_fallback, tokenizer):
        assert all(isinstance(text, str) for text in _texts(decoder, tokens, context))

    text = data.draw(st.text(st.characters(codec="utf-8"), max_size=9))
    arrived = "".join(_texts(byte_fallback, [*tokens, 258, *text.encode()], context))
    assert arrived.endswith("b" + text)


def test_a_run_that_is_no_character_is_returned_before_it_grows_long(tokenizer: Tokenizer) -> None:
    first_byte = tokenizer.encode("漢")[-3:][0]
    texts = _texts(tokenizer, [first_byte] * 40)

    assert any(texts[:20])
    assert "".join(texts) == "\ufffd" * 40


def test_a_text_that_turns_back_goes_on() -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="c"))
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")])

    assert _texts(TextDecoder(backend), (0, 1, 2)) == ["a", "b", "c", ""]
