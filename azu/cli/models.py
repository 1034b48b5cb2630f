"""`azu models`: what can be asked, at which price and speed."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from azu.cli.credentials import open_client
from azu.cli.output import AsJson, Exact, amount, show, table, unit

if TYPE_CHECKING:
    from azu.api.openai import ModelLine

_MILLION = 10**6
_READY = "A model that is ready comes up at the first prompt: azu prompt --model MODEL"


def models(exact: Exact = False, as_json: AsJson = False) -> None:
    """Show the models that are here: price, longest text, state, and the speed that was measured."""
    show(open_client().models(), as_json, lambda found: drawn(found, exact))


def drawn(found: "list[ModelLine]", exact: bool) -> RenderableType:
    """Draw models as a table."""
    rows = [
        (
            one.id,
            amount(_MILLION * one.lamports_per_token, exact),
            f"{one.max_model_len:,}",
            one.state,
            "-" if one.tokens_per_s is None else f"{one.tokens_per_s:.1f}",
        )
        for one in found
    ]
    columns = ["model", f"1M tokens, {unit(exact)}", "context", "state", "tokens/s"]
    return Group(table(columns, rows, lines=False), Text(_READY, "dim"))
