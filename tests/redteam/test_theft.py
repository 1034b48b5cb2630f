"""Theft, tried for real: before its earnings mature a member has gained nothing, and what it holds goes back.

The member runs code of its own in every process of Ray, lends a node, and has the credentials of the ingress
and of the scheduler. The lines run in this order over one network.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.auth.signatures import ReverseJob, Withdrawal, sign_command, sign_withdrawal
from azu.client import Client
from azu.client.http import trusting
from azu.client.known_network import known_network
from azu.errors import AzuError, Unauthenticated
from azu.money.books import Books
from azu.money.chain.api import ChainClient
from azu.money.chain.networks import network_at
from azu.money.chain.wallet import transfer_hype
from azu.units import LAMPORTS_PER_HYPE
from tests.redteam.conftest import HONEST, HONEST_WALLET, MALLORY, MALLORY_WALLET, Attacked
from tests.unix_users import MONEY, RAY

pytestmark = pytest.mark.prove

MODEL = "azu/tiny-moe"
PROMPT = "Tell me how azu works."
TOKENS = 24
FUNDS = LAMPORTS_PER_HYPE
DEPOSIT = 5 * LAMPORTS_PER_HYPE
LIMIT = 1_000_001
TIMEOUT_S = 60.0
UNKNOWN = "f" * 56
LIES = ("more tokens", "inflated work", "all work is mine", "work in a layer of others", "an unknown node")

_Answer = TypeVar("_Answer")


@dataclass
class Market:
    """The network with a payer who has money; `clients` are by address."""

    attacked: Attacked
    payer: LocalAccount
    clients: dict[str, Client]
    deposited: str = ""

    def ask(self, question: Callable[[Books], Awaitable[_Answer]]) -> _Answer:
        """Ask the books, with the credential of their owner."""

        async def inside() -> _Answer:
            books = Books(self.attacked.network.books_url, silence_s=60)
            try:
                return await question(books)
            finally:
                await books.close()

        return asyncio.run(inside())

    def on_chain(self, address: str) -> int:
        """Return the lamports in a wallet."""

        async def inside() -> int:
            chain = ChainClient(network_at(self.attacked.network.chain_url))
            try:
                return await chain.spot_balance(address)
            finally:
                await chain.close()

        return asyncio.run(inside())

    def gained(self) -> int:
        """Return what the member has: in its wallet beside its own money, or ready to be withdrawn."""
        balance = self.ask(lambda books: books.balance(MALLORY))
        return self.on_chain(MALLORY) - FUNDS + balance.available_lamports + balance.withdrawing_lamports

    def prompt(self) -> Counter[str]:
        """Pay for an answer; return the workers' shares by address."""
        client = self.clients[self.payer.address]
        answer = client.generate(PROMPT, model=MODEL, max_tokens=TOKENS, ignore_eos=True)
        receipt = client.receipt(answer.job_id)
        return Counter(dict(receipt.worker_lamports))

    def available(self) -> int:
        return self.clients[self.payer.address].balance().available_lamports

    def pieces(self) -> list[str]:
        """Return the actors of the member's pieces."""
        deployments = self.clients[MALLORY_WALLET.address].network().deployments
        return [piece.actor for one in deployments for piece in one.topology if piece.node == "mallory"]

    def wire(self, actor: str) -> str:
        """Return the URL, with the secret, by which an actor calls the books, as the member finds it."""
        (url,) = {url for url in self.attacked.act(actor, "urls_in_memory") if url.startswith("wire://")}
        return url

    def signed(self, job_id: str, nonce: int) -> str:
        """Return an admin's command that reverses a job."""
        admin = Account.from_key((self.attacked.money_home / "devnet-admin.key").read_text())
        command = ReverseJob(job_id=job_id, nonce=nonce, expires_at_ms=time.time_ns() // 1_000_000 + 60_000)
        return sign_command(admin, command, self.attacked.network.platform_address)

    def call(self, actor: str, verb: str, **arguments: Any) -> dict[str, Any]:
        """Have the member make a call of the books with an actor's credential, from within it."""
        answer: dict[str, Any] = self.attacked.act(actor, "books_answer", self.wire(actor), verb, arguments)
        return answer


@pytest.fixture(scope="module")
def market(attacked: Attacked) -> Market:
    network = attacked.network
    payer: LocalAccount = Account.create()
    clients = {}
    for wallet in (payer, HONEST_WALLET, MALLORY_WALLET):
        network.fund(wallet.address, 2 * DEPOSIT if wallet is payer else FUNDS)
        client = Client(network.url, tls=trusting(network.authority), platform=network.platform_address)
        client.login(wallet)
        clients[wallet.address] = client
    for wallet in (HONEST_WALLET, MALLORY_WALLET):
        clients[wallet.address].claim_earnings(wallet)
    market = Market(attacked, payer, clients)
    market.deposited = transfer_hype(payer, network.platform_address, DEPOSIT, chain_url=network.chain_url)
    assert clients[payer.address].deposit(market.deposited, payer.address).status == "credited"
    return market


@pytest.fixture(autouse=True)
def nothing_gained(market: Market) -> Iterator[None]:
    """Check after each line that the member has gained nothing, and that the books are right."""
    yield
    assert market.gained() == 0
    assert market.ask(lambda books: books.audit()).findings == ()


def refusals(answers: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    return {name: answer["refusal"] and answer["refusal"][0] for name, answer in answers.items()}


def test_it_writes_no_credit(market: Market) -> None:
    attacked = market.attacked
    credit = {"kind": "deposit", "id": "deposit:0x1", "address": MALLORY, "lamports": 10**9, "at_ms": 1}
    before = market.ask(lambda books: books.totals())

    answers = {actor: market.call(actor, "apply", transfer=credit) for actor in ("ingress", "scheduler")}

    assert refusals(answers) == dict.fromkeys(answers, "Forbidden")
    ports = sorted(attacked.ports_of(MONEY) | attacked.ports_of(RAY))
    assert attacked.act("head", "redis_answers", ports, []) == []
    # Nor is another's transfer credited to it, nor one that never happened.
    mallory = market.clients[MALLORY_WALLET.address]
    for tx_hash in (market.deposited, "0x" + "ab" * 32):
        with pytest.raises(AzuError):
            mallory.deposit(tx_hash, MALLORY)
    assert market.ask(lambda books: books.totals()) == before


def test_it_mints_no_withdrawal(market: Market) -> None:
    payer, lamports = market.payer.address.lower(), LAMPORTS_PER_HYPE
    tried = {
        "of the payer": {"address": payer, "lamports": lamports},
        "of what it lacks": {"address": MALLORY, "lamports": lamports},
    }
    answers = {}
    for name, of in tried.items():
        asked = Withdrawal(**of, nonce=1, expires_at_ms=time.time_ns() // 1_000_000 + 60_000)
        signature = sign_withdrawal(MALLORY_WALLET, asked, market.attacked.network.platform_address)
        fields = {"expires_at_ms": asked.expires_at_ms, "nonce": asked.nonce, **of}
        answers[name] = market.call("ingress", "withdraw", withdrawal=fields, signature=signature)

    assert refusals(answers) == {"of the payer": "Forbidden", "of what it lacks": "InsufficientBalance"}


def test_its_lying_pieces_earn_no_more_than_honest_ones(market: Market) -> None:
    honest, named = market.prompt(), bad_frames(market)
    assert market.pieces(), "it has a part in the model"
    assert honest[MALLORY] > 0

    for lie in LIES:
        for piece in market.pieces():
            market.attacked.act(piece, "lie", lie)
        lied = market.prompt()
        # The pieces may have moved since.
        honest |= market.prompt()
        assert lied[MALLORY] <= honest[MALLORY], lie
        assert lied[HONEST] <= honest[HONEST], lie

    assert bad_frames(market) > named, "lies were told"
    print(f"\n{len(LIES)} lies: {bad_frames(market) - named} bad frames of its node")


def bad_frames(market: Market) -> int:
    nodes = market.clients[MALLORY_WALLET.address].network().nodes
    return sum(node.bad_frames for node in nodes if node.name == "mallory")


def test_a_deposit_goes_to_no_other_address(market: Market) -> None:
    client, network = market.clients[market.payer.address], market.attacked.network
    shown = market.attacked.act("ingress", "show_platform", MALLORY)
    try:
        for signed in (
            client.platform,
            lambda: client.withdraw(market.payer, LAMPORTS_PER_HYPE),
            lambda: client.claim_earnings(market.payer),
            lambda: client.login(market.payer),
        ):
            with pytest.raises(Unauthenticated, match="the one that you know"):
                signed()
    finally:
        market.attacked.act("ingress", "show_platform", shown)
    assert client.platform().address.lower() == network.platform_address


def test_a_new_client_knows_by_the_id_that_another_platform_is_shown(market: Market) -> None:
    network = market.attacked.network
    assert known_network(network.url, network.network_id).platform == network.platform_address
    shown = market.attacked.act("ingress", "show_platform", MALLORY)
    try:
        with pytest.raises(Unauthenticated, match="do not use it"):
            known_network(network.url, network.network_id)
    finally:
        market.attacked.act("ingress", "show_platform", shown)


def test_what_it_settles_to_itself_is_given_back(market: Market) -> None:
    attacked, network = market.attacked, market.attacked.network
    client = market.clients[market.payer.address]
    limited = Client(network.url, tls=trusting(network.authority))
    limited.login(market.payer, spend_limit_lamports=LIMIT)
    before, earned = market.available(), market.ask(lambda books: books.earnings(MALLORY)).earned_lamports
    (node,) = (one.node_id for one in client.network().nodes if one.name == "mallory")
    attacked.act("ingress", "keep_keys")

    # A request is in flight, and a key with a limit passes.
    stream = client.stream(PROMPT, model=MODEL, max_tokens=400, ignore_eos=True)
    next(iter(stream))
    assert limited.balance().available_lamports < before
    in_flight = before - market.available()
    keys = attacked.act("ingress", "kept_keys")
    assert len(keys) == 2
    limited_key = next(key for key in keys if is_limited(market, key))
    (whole_key,) = set(keys) - {limited_key}
    stolen = [client.jobs(1)[0].job_id]

    def settle(job_id: str, payee: str) -> None:
        """Settle more tokens than were asked, in layers of others and in some that are not there."""
        # So little that it is slower than any node.
        work = {str(layer): {payee: 1} for layer in range(10)}
        done = market.call(
            "scheduler", "settle", job_id=job_id, prompt_tokens=10**9, completion_tokens=10**9, work=work,
            ending={"state": "done", "finish_reason": "length"},
        )  # fmt: skip
        assert done["refusal"] is None, done

    settle(stolen[0], node)

    def reserve(key: str, lamports: int) -> dict[str, Any]:
        job_id = f"job-{len(stolen):024x}"
        price = market.call("ingress", "price")["answer"]
        done = market.call(
            "ingress", "reserve", bearer=key, job_id=job_id, model_id=MODEL, revision="r", num_layers=1,
            prompt_tokens=0, max_tokens=lamports // price,
        )  # fmt: skip
        stolen.extend([job_id] if done["refusal"] is None else [])
        return done

    assert reserve(limited_key, LIMIT)["refusal"] is None
    assert reserve(limited_key, 2)["refusal"][3] == "spend_limit_reached"
    assert reserve(whole_key, 1000)["refusal"] is None
    assert reserve(whole_key, market.available())["refusal"] is None
    assert market.available() < 2, "all that the keys' owner had"
    for job_id in stolen[1:]:
        settle(job_id, UNKNOWN if job_id == stolen[2] else node)
    stream.close()

    taken = before - market.available()
    shares = market.ask(lambda books: books.earnings(MALLORY)).earned_lamports - earned
    assert before - 1 <= taken <= before
    assert shares < taken
    held = market.ask(lambda books: books.totals()).held_lamports["held"]
    assert held >= 800, "what an unknown node did is held"
    # The treasury looks every second; none of this is owed yet.
    time.sleep(5)
    assert market.gained() == 0

    # The payer knows its own jobs, and of the one in flight that it was charged for more than came.
    own = {job.job_id for job in client.jobs()} - {stolen[0]}
    paid = market.ask(lambda books: books.reversible(market.payer.address.lower())).jobs
    found = [job.job_id for job in paid if job.job_id not in own]
    assert set(found) == set(stolen)
    for number, job_id in enumerate(found):
        text = market.signed(job_id, number)
        market.ask(lambda books, text=text: books.command(text))

    assert market.available() == before
    assert market.ask(lambda books: books.earnings(MALLORY)).earned_lamports == earned
    # The treasury pays all the time: a withdrawal of the payer's own arrives.
    wallet = market.on_chain(market.payer.address)
    client.withdraw(market.payer, LAMPORTS_PER_HYPE)
    deadline_s = time.monotonic() + TIMEOUT_S
    while market.on_chain(market.payer.address) != wallet + LAMPORTS_PER_HYPE:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    print(
        f"\n{in_flight} lamports stood reserved for requests in flight; with the keys that passed {taken} of "
        f"{before} were settled, {shares} of them to the member, {LIMIT - 1} by the key with a limit of "
        f"{LIMIT}; all were given back before they matured"
    )


def is_limited(market: Market, key: str) -> bool:
    """Whether a key has a limit, as the member sees it."""
    known = market.call("ingress", "key", bearer=key)["answer"]
    return known["spend_limit_lamports"] is not None
