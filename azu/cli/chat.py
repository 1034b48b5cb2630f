"""`azu chat`: a conversation with a model, and what it has cost so far."""

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from azu.cli.credentials import open_client
from azu.cli.output import Exact, amount, console, unit
from azu.cli.prompt import shown

if TYPE_CHECKING:
    from azu.client import Client

_HELP = "/model MODEL, /system TEXT, /new for another conversation, /quit; Ctrl-C ends an answer"


def chat(
    model: Annotated[str, typer.Option(help="A Hub id or a built-in model.")] = "azu/tiny-dense",
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most new tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy.")] = None,
    exact: Exact = False,
) -> None:
    """Talk with a model: each question goes out with all that was said before. /quit or Ctrl-D ends it."""
    given: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    sampling = {name: value for name, value in given.items() if value is not None}
    talk = _Conversation(open_client(), model, system, sampling, exact=exact)
    with suppress(ImportError):
        import readline  # noqa: F401 - lines can be edited and called back
    console.print(Text(f"{model}. {_HELP}", "dim"))
    while (line := _typed()) is not None:
        word, _, rest = line.strip().partition(" ")
        match word:
            case "":
                pass
            case "/quit" | "/exit":
                break
            case "/model" if rest:
                talk.model = rest.strip()
            case "/system":
                talk.system = rest.strip()
            case "/new":
                talk.turns.clear()
            case _ if word.startswith("/"):
                console.print(Text(_HELP, "yellow"))
            case _:
                talk.ask(line.strip())
    talk.tell_cost()


def _typed() -> str | None:
    """Return the next line, None at the end."""
    while True:
        try:
            return input("> ")
        except EOFError:
            console.print()
            return None
        except KeyboardInterrupt:
            console.print(Text("\n/quit or Ctrl-D ends the conversation", "dim"))


class _Conversation:
    """What was said, and the jobs that it took; what is shown is what goes out with the next question."""

    def __init__(
        self, client: "Client", model: str, system: str, sampling: dict[str, Any], *, exact: bool
    ) -> None:
        self.model = model
        self.system = system
        self.turns: list[dict[str, str]] = []
        self._client = client
        self._sampling = sampling
        self._exact = exact
        self._charged: dict[str, int | None] = {}  # by job; None for one whose end is not known yet

    def ask(self, text: str) -> None:
        """Print the answer to a question; what came of one that was cut or failed stays too."""
        from azu.cli.advice import with_next_step
        from azu.errors import AzuError

        before = [{"role": "system", "content": self.system}] if self.system else []
        turn = {"role": "user", "content": text}
        stream = self._client.chat_stream([*before, *self.turns, turn], model=self.model, **self._sampling)
        said: list[str] = []
        try:
            for piece in shown(stream, self._client.url):
                said.append(piece)
            self._charged[stream.job_id] = stream.result().receipt.charged_lamports
        except KeyboardInterrupt:
            stream.close()
            console.print(Text("\nended: what came is paid", "yellow"))
        except AzuError as error:
            console.print(Text(with_next_step(error, "chat"), "red"), soft_wrap=True)
        if stream.job_id:
            self._charged.setdefault(stream.job_id, None)
        if said:
            self.turns += [turn, {"role": "assistant", "content": "".join(said)}]
        self.tell_cost()

    def tell_cost(self) -> None:
        """Print what all answers cost, as far as it is known."""
        from azu.errors import AzuError

        for job_id in [job_id for job_id, charged in self._charged.items() if charged is None]:
            with suppress(AzuError):  # it has not ended yet: the next time says it
                self._charged[job_id] = self._client.receipt(job_id).charged_lamports
        cost = amount(sum(filter(None, self._charged.values())), self._exact)
        more = ", without one that is being settled" if None in self._charged.values() else ""
        console.print(Text(f"{cost} {unit(self._exact)} so far{more}", "dim"))
