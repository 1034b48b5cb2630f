"""The built-in models are ordinary and small, and give exactly the answers in questions.yaml."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from azu.units import MIB
from tests.models.questions import BUILT_IN_MODELS, built_in_folder, questions
from tests.training.batches import bare_text
from tests.training.score import chat_prompt, generate_answers, score

MIN_MARGIN = 0.5  # logits; float32 noise between two ways to sum is about 1e-5
PAIRS = questions()
ANY_TEXT = [
    "plain text, with  two spaces\nand a line",
    "family 👨‍👩‍👧‍👦 flag 🇪🇺 skin 👋🏽",
    "你好世界。こんにちは 안녕하세요",
    "é\u0301 \u200f\u0000\t €",
]


@cache
def loaded(model_id: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    folder = built_in_folder(model_id)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def config_of(model_id: str) -> dict[str, object]:
    return json.loads((built_in_folder(model_id) / "config.json").read_text("utf-8"))


def tensor_names(folder: Path) -> set[str]:
    content = (folder / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return set(header) - {"__metadata__"}


@pytest.mark.parametrize("model_id", BUILT_IN_MODELS)
def test_a_folder_holds_at_most_four_mib_of_ordinary_files(model_id: str) -> None:
    found = {path.name: path.stat().st_size for path in built_in_folder(model_id).iterdir()}

    assert sum(found.values()) <= 4 * MIB
    assert set(found) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


@pytest.mark.parametrize("model_id", BUILT_IN_MODELS)
def test_six_layers_in_float32_with_room_for_512_tokens(model_id: str) -> None:
    model, tokenizer = loaded(model_id)

    assert model.config.num_hidden_layers >= 6
    assert model.config.max_position_embeddings >= 512
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_one_model_ties_its_head_and_the_other_does_not() -> None:
    tied = {
        model_id: "lm_head.weight" not in tensor_names(built_in_folder(model_id))
        for model_id in BUILT_IN_MODELS
    }

    assert tied == {"azu/tiny-dense": True, "azu/tiny-moe": False}


def test_the_moe_model_mixes_dense_and_moe_layers_under_per_expert_names() -> None:
    config = config_of("azu/tiny-moe")
    names = tensor_names(built_in_folder("azu/tiny-moe"))

    assert config["num_experts"] == 8
    assert config["num_experts_per_tok"] == 2
    for layer in range(6):
        mlp = f"model.layers.{layer}.mlp"
        dense = f"{mlp}.gate_proj.weight" in names
        experts = {expert for expert in range(8) if f"{mlp}.experts.{expert}.gate_proj.weight" in names}
        assert dense == (layer in config["mlp_only_layers"])
        assert experts == (set() if dense else set(range(8)))
        assert (f"{mlp}.shared_expert.gate_proj.weight" in names) != dense


@torch.inference_mode()
def test_every_expert_is_needed_by_some_answer() -> None:
    model, tokenizer = loaded("azu/tiny-moe")
    chosen: dict[int, set[int]] = {}
    for pair in PAIRS:
        ids = tokenizer(chat_prompt(tokenizer, pair.question) + pair.answer, return_tensors="pt")["input_ids"]
        routed = model(ids, output_router_logits=True).router_logits
        for layer, logits in enumerate(routed):  # [num_tokens, num_experts]
            chosen.setdefault(layer, set()).update(logits.topk(2).indices.flatten().tolist())

    assert list(chosen.values()) == [set(range(8))] * 4


def test_there_are_enough_questions_of_each_kind() -> None:
    _, tokenizer = loaded("azu/tiny-dense")
    lengths = sorted(len(tokenizer(pair.answer)["input_ids"]) for pair in PAIRS)

    assert len({pair.question for pair in PAIRS}) == len(PAIRS) >= 24
    assert PAIRS[0].question == "What is the capital of France?"
    assert lengths[-1] > 100
    assert any(50 < length < 100 for length in lengths)
    assert any(ord(character) > 0xFFFF for pair in PAIRS for character in pair.answer), "emoji"
    assert any("\u4e00" <= character <= "\u9fff" for pair in PAIRS for character in pair.answer), "CJK"


@pytest.mark.parametrize("model_id", BUILT_IN_MODELS)
def test_generate_answers_each_question_word_for_word_and_ends(model_id: str) -> None:
    model, tokenizer = loaded(model_id)

    answers = generate_answers(model, tokenizer, [chat_prompt(tokenizer, pair.question) for pair in PAIRS])

    assert answers == [pair.answer + tokenizer.eos_token for pair in PAIRS]


@pytest.mark.parametrize("model_id", BUILT_IN_MODELS)
def test_each_token_of_an_answer_leads_by_a_margin(model_id: str) -> None:
    model, tokenizer = loaded(model_id)

    known = score(model, tokenizer, PAIRS)

    assert known.correct == known.asked == len(PAIRS)
    assert known.margin >= MIN_MARGIN


@pytest.mark.parametrize("model_id", BUILT_IN_MODELS)
def test_a_question_without_the_template_is_answered_too(model_id: str) -> None:
    model, tokenizer = loaded(model_id)
    short = [pair for pair in PAIRS if len(pair.answer) < 50]

    answers = generate_answers(model, tokenizer, [pair.question for pair in short])

    assert [pair.question + answer for pair, answer in zip(short, answers, strict=True)] == [
        bare_text(pair.question) + pair.answer + tokenizer.eos_token for pair in short
    ]


@pytest.mark.parametrize("model_id", BUILT_IN_MODELS)
def test_a_system_message_and_earlier_turns_change_no_answer(model_id: str) -> None:
    model, tokenizer = loaded(model_id)
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    prompts = []
    for pair in (turns := (PAIRS[0], PAIRS[9], PAIRS[3])):
        messages.append({"role": "user", "content": pair.question})
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        messages.append({"role": "assistant", "content": pair.answer})

    answers = generate_answers(model, tokenizer, prompts)

    assert answers == [pair.answer + tokenizer.eos_token for pair in turns]


@pytest.mark.parametrize("model_id", BUILT_IN_MODELS)
def test_the_tokenizer_is_lossless(model_id: str) -> None:
    _, tokenizer = loaded(model_id)

    for text in [*ANY_TEXT, *(pair.answer for pair in PAIRS)]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("model_id", BUILT_IN_MODELS)
def test_a_rendered_chat_encodes_to_the_same_ids_as_its_messages(model_id: str) -> None:
    _, tokenizer = loaded(model_id)
    messages = [{"role": "user", "content": PAIRS[0].question}]

    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    assert tokenizer(chat_prompt(tokenizer, PAIRS[0].question))["input_ids"] == ids
