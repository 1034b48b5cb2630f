"""Single tokens as text and bytes, and a decoder that was sent elsewhere."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from azu.engine.text_decoder import TextDecoder
from azu.engine.tokenizer import Tokenizer
from azu.protocol.sampling import SamplingParams

_FOLDER = Path(__file__).parents[2] / "configs" / "models" / "tiny-dense"
_TEXT = "plain words 😀 漢字 naïve"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(_FOLDER)


def test_bytes_of_all_tokens_are_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(_TEXT)

    assert b"".join(tokenizer.token_bytes(token) or b"?" for token in ids).decode().endswith(_TEXT)


def test_a_decoder_that_was_sent_elsewhere_reads_the_same_text(tokenizer: Tokenizer) -> None:
    elsewhere, ids = TextDecoder.from_json(tokenizer.to_json()), tokenizer.encode(_TEXT)

    assert elsewhere.decode(ids) == tokenizer.decode(ids)
    assert elsewhere.stream(()).push(ids) == tokenizer.stream(()).push(ids)


def test_a_stop_string_is_seen_across_the_tokens_of_its_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 😀漢 more")
    sampling = SamplingParams(max_tokens=99, stop=("😀漢",))
    text = tokenizer.completion((), sampling)

    shown = "".join(text.push(token).text for token in ids)

    assert shown.strip() == "ok"
    assert text.stopped


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
