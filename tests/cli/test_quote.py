"""`azu quote` says what an answer would cost, and asks for none."""

from pathlib import Path

import pytest

from azu.api.jobs import PredictionLine, QuoteResponse
from azu.cli.quote import drawn as draw
from tests.cli.test_main import azu
from tests.cli.test_output import drawn
from tests.client.ingress import Reply, running_ingress

QUOTE = QuoteResponse(
    model="m/one", num_layers=6, prompt_tokens=1200, max_tokens=256, expected_tokens=80,
    lamports_per_token_layer=2, max_lamports=17_472, expected_lamports=15_360, prediction=None,
)  # fmt: skip


def test_a_quote_fits_the_terminal_and_names_both_prices() -> None:
    predicted = PredictionLine(tokens_per_s=41.25, time_per_output_token_s=0.02, lamports_per_token=12)
    shown = drawn(draw(QUOTE.model_copy(update={"prediction": predicted}), exact=False))

    assert max(map(len, shown.splitlines())) <= 80
    for words in (
        "0.00017472 HYPE for 256",
        "0.0001536 HYPE for 80",
        "1,200 tokens through 6",
        "41.2 tokens/s",
    ):
        assert words in shown
    assert "not known before the model is up" in drawn(draw(QUOTE, exact=True))


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--raw"], {"prompt": "Why?"}),
        (["--max-tokens", "9"], {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 9}),
    ],
)
def test_the_question_goes_to_the_quote_alone(
    tmp_path: Path, options: list[str], asked: dict[str, object]
) -> None:
    with running_ingress() as ingress:
        ingress.replies["POST /v1/quote"] = Reply(QUOTE.model_dump(mode="json"))
        done = azu("quote", "Why?", *options, "--exact", home=tmp_path, AZU_URL=ingress.url, AZU_API_KEY="k")

    assert "17472 lamports for 256" in done.stdout
    (request,) = ingress.requests
    assert request.body == {"model": "azu/tiny-dense", "n": 1} | asked
