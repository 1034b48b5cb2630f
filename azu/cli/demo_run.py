"""The demo: a new network, a deposit, one paid prompt for each built-in model, and the report."""

import asyncio
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eth_account import Account
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from azu.cli.output import Listing, ProgressPrinter, Step, table
from azu.client import Client
from azu.launch.local_network import LocalNetwork, demo_network
from azu.money.books import Books
from azu.money.chain.wallet import transfer_hype
from azu.units import LAMPORTS_PER_HYPE, hype_from_lamports

MODELS = ("azu/tiny-dense", "azu/tiny-moe")
QUESTION = "What is the capital of France?"
_FUNDED_LAMPORTS = 10 * LAMPORTS_PER_HYPE
_DEPOSIT_LAMPORTS = LAMPORTS_PER_HYPE


@dataclass(frozen=True, slots=True)
class DemoRun:
    """One paid prompt."""

    model: str
    prompt: str
    text: str
    prompt_tokens: int
    completion_tokens: int
    layers: int
    token_layers: int
    charged_lamports: int
    platform_lamports: int
    worker_lamports: Mapping[str, int]
    balance_before_lamports: int
    balance_after_lamports: int
    topology: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The result of the demo; `ledger_sum_lamports` is the sum of all accounts, which is always zero."""

    runs: tuple[DemoRun, ...]
    ledger_sum_lamports: int
    seconds: float

    def to_json(self) -> str:
        """Return the report as one JSON object."""
        return json.dumps(asdict(self))


def run_demo(progress: ProgressPrinter) -> DemoReport:
    """Run the demo; everything that it started is stopped when it returns, also when it is interrupted."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="azu-") as home:
        with progress.steps() as step, demo_network(Path(home), step) as network:
            client = _paying_client(network, step)
            runs = tuple(_ask(client, model, step, progress) for model in MODELS)
            ledger_sum = asyncio.run(_ledger_sum(network.books_url))
            step("Stopping everything")
        report = DemoReport(runs, ledger_sum, round(time.monotonic() - started, 1))
    for run in report.runs:
        progress.print(_topology(run), _receipt(run))
    progress.print(
        f"All accounts sum to {hype_from_lamports(ledger_sum)} HYPE. Done in {report.seconds:.1f} s."
    )
    return report


def _paying_client(network: LocalNetwork, step: Step) -> Client:
    """Make a wallet, move HYPE on the devnet to the platform and claim the deposit."""
    step("Depositing 1 HYPE from a new wallet")
    account = Account.create()
    network.fund(account.address, _FUNDED_LAMPORTS)
    tx_hash = transfer_hype(account, network.platform_address, _DEPOSIT_LAMPORTS, chain_url=network.chain_url)
    client = Client(network.url, "")  # whatever key this machine has
    client.login(account, label="demo")
    client.deposit(tx_hash, account.address)
    return client


def _ask(client: Client, model: str, step: Step, progress: ProgressPrinter) -> DemoRun:
    step(f"Cutting and placing {model}")
    before = client.balance().available_lamports
    stream = client.chat_stream([{"role": "user", "content": QUESTION}], model=model)
    with progress.answer(model, QUESTION) as write:
        for text in stream:
            write(text)
    generation = stream.result()
    receipt = generation.receipt
    return DemoRun(
        model=model,
        prompt=QUESTION,
        text=generation.text,
        prompt_tokens=receipt.prompt_tokens,
        completion_tokens=receipt.completion_tokens,
        layers=receipt.num_layers,
        token_layers=receipt.token_layers,
        charged_lamports=receipt.charged_lamports,
        platform_lamports=receipt.platform_lamports,
        worker_lamports=dict(receipt.worker_lamports),
        balance_before_lamports=before,
        balance_after_lamports=client.balance().available_lamports,
        topology=tuple(piece.model_dump() for piece in receipt.topology),
    )


async def _ledger_sum(books_url: str) -> int:
    return (await Books(books_url).totals()).sum_lamports


def _topology(run: DemoRun) -> Listing:
    rows = []
    for line in run.topology:
        start, end = line["layers"]
        experts = "; ".join(
            f"layer {layer}: {', '.join(map(str, ids))}" for layer, ids in line["experts"].items()
        )
        rows.append((line["node"], line["actor"], f"{start} to {end - 1}" if end > start else "", experts))
    columns = ["node", "actor", "layers", "experts beside or apart"]
    return table(columns, rows, title=f"{run.model}: placement")


def _receipt(run: DemoRun) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(justify="right")
    tokens = f"{run.prompt_tokens} prompt + {run.completion_tokens} completion"
    grid.add_row(f"{tokens} tokens x {run.layers} layers", f"{run.token_layers} token-layers")
    grid.add_row("charged", f"{hype_from_lamports(run.charged_lamports)} HYPE")
    grid.add_row("platform", f"{hype_from_lamports(run.platform_lamports)} HYPE")
    for address, lamports in sorted(run.worker_lamports.items()):
        grid.add_row(f"worker {address}", f"{hype_from_lamports(lamports)} HYPE")
    before, after = run.balance_before_lamports, run.balance_after_lamports
    grid.add_row("balance", f"{hype_from_lamports(before)} to {hype_from_lamports(after)} HYPE")
    return Panel(grid, title=Text(f"receipt: {run.model}"), title_align="left", expand=False)
