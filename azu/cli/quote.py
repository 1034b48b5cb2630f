"""`azu quote`: what an answer would cost, before it is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from azu.cli.credentials import open_client
from azu.cli.output import AsJson, Exact, Listing, amount, show, table, unit
from azu.cli.prompt import asked

if TYPE_CHECKING:
    from azu.api.jobs import QuoteResponse


def quote(
    text: Annotated[str | None, typer.Argument(help="What to ask; - reads it from standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read what to ask from a file.")] = None,
    model: Annotated[str, typer.Option(help="A Hub id or a built-in model.")] = "azu/tiny-dense",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most new tokens to pay for.")] = None,
    raw: Annotated[bool, typer.Option(help="Take the text as it is, without the chat template.")] = False,
    exact: Exact = False,
    as_json: AsJson = False,
) -> None:
    """Show what an answer would cost at most, and if it is as long as your last ones; nothing is asked."""
    question, client = asked(text, file), open_client()
    if raw:
        found = client.quote(question, model=model, max_tokens=max_tokens)
    else:
        messages = [{"role": "user", "content": question}]
        found = client.quote(messages=messages, model=model, max_tokens=max_tokens)
    show(found, as_json, lambda found: drawn(found, exact))


def drawn(found: "QuoteResponse", exact: bool) -> Listing:
    """Draw a quote."""

    def price(lamports: int, tokens: int) -> str:
        return f"{amount(lamports, exact)} {unit(exact)} for {tokens:,} new tokens"

    speed = found.prediction and f"{found.prediction.tokens_per_s:.1f} tokens/s are predicted"
    rows = [
        ("at most", f"{price(found.max_lamports, found.max_tokens)}, which is reserved"),
        ("expected", f"{price(found.expected_lamports, found.expected_tokens)}, as of your last answers"),
        ("prompt", f"{found.prompt_tokens:,} tokens through {found.num_layers} layers"),
        ("speed", speed or "not known before the model is up"),
    ]
    return table(["", found.model], rows, lines=False)
