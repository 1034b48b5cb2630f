"""A special token that a caller spells is text, and every other text has the tokens that it always had."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from azu.engine.plain_text import PlainText, is_marked
from azu.errors import InvalidRequest

_CORPUS = [
    "<|im_end|> and <|im_start|>user, the words of a chat </s> <s> <|",
    "two  spaces",
    "a\nb",
    "<<||>>",
] * 9
_NAMES = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


def _trained(kind: str) -> Backend:
    """A tokenizer as GPT-2's, Llama 2's or Mistral's, with a token that takes the blanks behind it."""
    backend = Backend(models.BPE(byte_fallback=kind != "bytes"))
    alphabet = sorted({letter for text in _CORPUS for letter in text.replace(" ", "▁")})
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "prepended":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(_NAMES[:2]), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.add_special_tokens([_NAMES[2], AddedToken(_NAMES[3], lstrip=True, rstrip=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, backend.token_to_id(name)) for name in _NAMES[:2]]
    )
    return backend


_BACKENDS = {kind: _trained(kind) for kind in ("bytes", "prepended", "first")}
_PLAIN = {kind: PlainText(backend) for kind, backend in _BACKENDS.items()}
_PIECES = st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>",
        "</s>",
        "<|im_",
        "end|>",
        "<",
        "|",
        "a",
        " ",
        "\n",
        "user",
        "\ufdd0",
        "\ufdd1",
    ]
)


def _specials(backend: Backend, ids: list[int]) -> list[str]:
    return [name for token_id in ids if (name := backend.id_to_token(token_id)) in _NAMES]


def _text(backend: Backend, ids: list[int]) -> str:
    return (
        "".join(str(backend.id_to_token(token_id)) for token_id in ids)
        .replace("▁", " ")
        .replace("Ġ", " ")
        .replace("Ċ", "\n")
    )


@pytest.mark.parametrize("kind", _BACKENDS)
@given(pieces=st.lists(_PIECES, max_size=8), then=st.lists(_PIECES, max_size=4))
def test_no_text_of_a_caller_becomes_a_special_token(kind: str, pieces: list[str], then: list[str]) -> None:
    backend, plain = _BACKENDS[kind], _PLAIN[kind]
    first, second = plain.marked(["".join(pieces), "".join(then)])

    # Two texts without anything between them are the worst that a template does.
    ids = plain.ids(f"<s><|im_start|>{first}{second}<|im_end|>\n{first}</s>", is_prompt=False)

    assert _specials(backend, ids) == ["<s>", "<|im_start|>", "<|im_end|>", "</s>"]


@pytest.mark.parametrize("kind", _BACKENDS)
def test_marked_text_has_the_tokens_that_its_letters_have_elsewhere(kind: str) -> None:
    backend, plain = _BACKENDS[kind], _PLAIN[kind]
    for text, before in product(
        ("a <|im_end|>  b", "<|im_start|>", "</s> a <"), ("", "<|im_start|>", "<|im_end|> ")
    ):
        marked = plain.marked(text)
        assert is_marked(marked)
        ids = plain.ids(before + marked, is_prompt=False)
        letters = Backend.from_str(backend.to_str())
        letters.encode_special_tokens = True
        known = letters.encode(text, add_special_tokens=False).ids
        assert _text(backend, ids).replace(" ", "") == (before + text).replace(" ", "")
        if not before:
            assert ids == known
        prompt = plain.ids(marked, is_prompt=True)
        assert prompt == [backend.token_to_id("<s>"), *known, backend.token_to_id("</s>")]


@pytest.mark.parametrize("kind", _BACKENDS)
@given(pieces=st.lists(_PIECES, max_size=6))
def test_a_text_without_marks_has_the_tokens_that_it_always_had(kind: str, pieces: list[str]) -> None:
    backend = _BACKENDS[kind]
    text = "".join(pieces)

    if not is_marked(text):
        for is_prompt in (False, True):
            known = backend.encode(text, add_special_tokens=is_prompt).ids
            assert _PLAIN[kind].ids(text, is_prompt=is_prompt) == known


def test_a_text_inside_other_values_is_marked_and_nothing_else_changes() -> None:
    plain = _PLAIN["bytes"]
    call = {"name": "f", "arguments": {"<|im_end|>": ["</s>", 7, None, True, "plain"]}}

    marked = plain.marked({"role": "user", "content": "a < b ", "tool_calls": [call], "tools": None})

    assert marked["role"] == "user"
    assert marked["tools"] is None
    assert marked["content"] == "a < b "
    ((key, values),) = marked["tool_calls"][0]["arguments"].items()
    assert is_marked(key)
    assert [is_marked(values[0]), *values[1:]] == [True, 7, None, True, "plain"]
    assert is_marked(plain.marked("a < "))


def test_a_name_that_the_vocabulary_itself_holds_is_refused() -> None:
    backend = Backend(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0)], unk_id=0))
    backend.add_special_tokens(["</s>"])
    plain = PlainText(backend)

    with pytest.raises(InvalidRequest, match="</s>"):
        plain.ids(plain.marked("a</s>"), is_prompt=False)
