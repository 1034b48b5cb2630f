"""With the credentials of ingress and scheduler a member makes the calls of their own process alone."""

import asyncio
from collections.abc import Iterator

import pytest

from azu.money.books import Books, Totals
from azu.money.books_process import allowed_to
from tests.redteam.conftest import MALLORY, Attacked

pytestmark = pytest.mark.prove

ACTORS = ("ingress", "scheduler")
# Those of a network that admits nodes: tickets are made by such a call too.
ALLOWED = allowed_to(object())  # type: ignore[arg-type]
# Each of them would move money to the member, if its caller were believed.
FORGED = (
    (
        "apply",
        {
            "transfer": {
                "kind": "deposit",
                "id": "deposit:0x1",
                "address": MALLORY,
                "lamports": 10**9,
                "at_ms": 1,
            }
        },
    ),
    ("view", {"number": 0, "after": 0}),
    ("command", {"text": "{}"}),
    ("audit", {"wallet_lamports": None}),
)


@pytest.fixture
def unmoved(attacked: Attacked) -> Iterator[None]:
    """Check that no lamport of the books moved during a test, and that their audit is clean."""

    async def read() -> Totals:
        books = Books(attacked.network.books_url, silence_s=60)
        try:
            assert (await books.audit()).findings == ()
            return await books.totals()
        finally:
            await books.close()

    before = asyncio.run(read())
    yield
    assert asyncio.run(read()) == before


def books_url(attacked: Attacked, actor: str) -> str:
    (url,) = {url for url in attacked.act(actor, "urls_in_memory") if url.startswith("wire://")}
    return url


@pytest.mark.usefixtures("unmoved")
@pytest.mark.parametrize("actor", ACTORS)
def test_a_stolen_credential_makes_no_call_of_another(attacked: Attacked, actor: str) -> None:
    url = books_url(attacked, actor)
    others = set().union(*ALLOWED.values()) - ALLOWED[actor]
    assert len(others) > 2
    forged = dict(FORGED)

    answers = {verb: attacked.act(actor, "books_answer", url, verb, forged.get(verb, {})) for verb in others}

    assert {verb: answer["refusal"][0] for verb, answer in answers.items()} == dict.fromkeys(
        others, "Forbidden"
    )
    # The search works: a call of its own is answered.
    assert attacked.act(actor, "books_answer", url, "totals", {})["refusal"] is None


@pytest.mark.usefixtures("unmoved")
@pytest.mark.parametrize("actor", ACTORS)
def test_a_stolen_credential_is_that_of_no_other_caller(attacked: Attacked, actor: str) -> None:
    url = books_url(attacked, actor)

    for other in ALLOWED.keys() - {actor}:
        taken = url.replace(f"wire://{actor}:", f"wire://{other}:")
        assert attacked.act(actor, "books_answer", taken, "totals", {})["answer"] is None
