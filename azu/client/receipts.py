"""What a receipt charges, against what came: the client counts the tokens of an answer itself."""

from azu.api.receipts import ReceiptLines
from azu.units import hype_from_lamports


def difference(receipt: ReceiptLines, received_tokens: int) -> str | None:
    """Return how a receipt differs from an answer that came whole; None if it does not.

    `received_tokens` are the answer's tokens, of all its choices.
    """
    found = []
    if receipt.completion_tokens != received_tokens:
        found.append(f"{receipt.completion_tokens} tokens of the answer were charged, {received_tokens} came")
    tokens = receipt.prompt_tokens + receipt.completion_tokens
    highest = tokens * receipt.num_layers * receipt.lamports_per_token_layer
    if receipt.charged_lamports > highest:
        charged, cost = hype_from_lamports(receipt.charged_lamports), hype_from_lamports(highest)
        found.append(f"{charged} HYPE were charged, its tokens cost {cost}")
    return "; ".join(found) or None
