"""The client says if a receipt charges other tokens than came."""

from azu.api.receipts import ReceiptLines
from azu.auth.signatures import receipt_facts
from azu.client.receipts import difference
from tests.builders import receipt


def lines(**given: object) -> ReceiptLines:
    return ReceiptLines.model_validate(receipt_facts(receipt(**given)))


def test_an_answer_that_came_whole_is_charged_as_it_came() -> None:
    assert difference(lines(), 6) is None
    assert difference(lines(charged_lamports=0), 6) is None


def test_tokens_that_never_came_are_named() -> None:
    assert difference(lines(), 5) == "6 tokens of the answer were charged, 5 came"
    assert difference(lines(), 7) == "6 tokens of the answer were charged, 7 came"


def test_a_charge_above_the_price_of_the_tokens_is_named() -> None:
    assert (
        difference(lines(charged_lamports=81), 6) == "0.00000081 HYPE were charged, its tokens cost 0.0000008"
    )
