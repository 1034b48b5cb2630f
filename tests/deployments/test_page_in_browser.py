"""The page in Chromium before a real ingress; the model is scripted. AZU_TEST_SCREENSHOTS keeps pictures."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount

pytest.importorskip("selenium")

from selenium.webdriver.common.keys import Keys
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from actors.placement import SCHEDULER
from azu.auth.signatures import sealed
from azu.devnet.faucet import fund
from azu.errors import ShardError
from azu.jobs.earned import EARNED
from azu.metrics import SEQUENCES, MetricsSnapshot
from azu.money.chain.wallet import balance_of
from azu.protocol.job import DeploymentStatus, Placement
from azu.protocol.node import Node, NodeState
from tests.builders import receipt, receipt_signed
from tests.deployments.local import NoNodes
from tests.deployments.served import Served, served
from tests.models.questions import built_in_folder
from tests.network.browser import Browser, chromium
from tests.redis_server import RunningRedis

pytestmark = pytest.mark.prove

MODEL = "azu/tiny-dense"
RICH = """# A heading

Some **bold** and *thin* words, `code`, a [link](https://azu.test/x), ![a picture](https://azu.test/p.png).

| left | right |
|:-----|------:|
| one  |     1 |

1. first
2. second
   - inner

```python
print("<b>not bold</b>")
```

<img src=x onerror="document.title='run'"> &amp; [run](javascript:alert(1))

> said"""


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(built_in_folder(MODEL))


@dataclass(frozen=True)
class Page:
    """A tab on the page, the ingress behind it, and what the model answers."""

    browser: Browser
    served: Served
    address: str
    api_key: str

    def answers(self, text: str, *, pause_s: float = 0.0) -> None:
        model = self.served.ingress.model
        model.token_ids = tuple(tokenizer().encode(text, add_special_tokens=False))
        model.pause_s, model.delay_s, model.error = pause_s, 0.0, None

    def open(self) -> None:
        self.browser.driver.get(self.served.url)

    def log_in(self, api_key: str = "") -> None:
        self.browser.find("#key").send_keys(api_key or self.api_key, Keys.ENTER)
        self.browser.wait_for("#model option", MODEL)

    def type(self, text: str) -> None:
        self.browser.find("#prompt").send_keys(text)

    def ask(self, text: str) -> None:
        self.type(text)
        self.browser.find("#send").click()

    def press(self, label: str, within: str = "body") -> None:
        found = [one for one in self.browser.all(f"{within} button") if one.text == label]
        assert found, f"there is no button {label}"
        found[-1].click()

    def ended(self, times: int) -> None:
        """Wait until so many answers have their cost."""
        self.browser.wait_until(lambda: len(self.browser.all(".model:not(.busy) .facts")) == times)

    def money(self) -> int:
        """Return what the user may spend."""
        asked = asyncio.run_coroutine_threadsafe(self.served.ingress.money(self.address), self.served.loop)
        return asked.result(60)[0]

    def turns(self) -> list[str]:
        return [one.text for one in self.browser.all("#messages .text")]

    def prompts(self) -> list[str]:
        """Return what models were asked, in the model's own template, the newest first."""

        async def find() -> list[tuple[int, ...]]:
            jobs = self.served.ingress.app.state.services.jobs
            return [one.job.prompt_token_ids for one in await jobs.of(self.address, 20)]

        found = asyncio.run_coroutine_threadsafe(find(), self.served.loop).result(60)
        return [tokenizer().decode(ids) for ids in found]


def template(*turns: str, system: str = "") -> str:
    """Return what the model reads for turns of a user and of itself."""
    roles = ["<|user|>", "<|assistant|>"] * len(turns)
    said = "".join(f"{role}{turn}<|end|>" for role, turn in zip(roles, turns, strict=False))
    return f"<|begin|>{system and f'<|system|>{system}<|end|>'}{said}<|assistant|>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture(scope="module")
def ingress(redis_server: RunningRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(redis_server.url, tmp_path_factory.mktemp("azu")) as running:
        yield running


@pytest.fixture
def page(browser: Browser, ingress: Served) -> Iterator[Page]:
    """The page as a browser shows it that was never there, and a user with a deposit."""
    browser.resize(1500, 900)
    browser.forget(ingress.url)
    asked = asyncio.run_coroutine_threadsafe(ingress.ingress.user(), ingress.loop)
    opened = Page(browser, ingress, *asked.result(60))
    opened.answers("Fine, thanks.")
    browser.complaints()  # of the test before
    opened.open()
    yield opened
    browser.driver.get("about:blank")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("AZU_TEST_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_what_is_shown_is_what_is_sent(page: Page) -> None:
    page.log_in()
    page.ask("How are you?")
    page.ended(1)
    page.answers("Yes.")
    page.ask("Really?")
    page.ended(2)

    assert page.turns() == ["How are you?", "Fine, thanks.", "Really?", "Yes."]
    assert page.prompts() == [template("How are you?", "Fine, thanks.", "Really?"), template("How are you?")]


def test_an_answer_belongs_to_the_conversation_that_it_began_in(page: Page) -> None:
    page.log_in()
    page.answers("It is a long story. " * 8, pause_s=0.05)
    page.ask("First chat?")
    page.browser.wait_for(".busy .text", "story")
    page.press("New chat")
    assert page.turns() == []
    page.answers("Another.")
    page.ask("Second chat?")
    page.ended(1)

    assert page.turns() == ["Second chat?", "Another."]
    assert page.prompts()[0] == template("Second chat?")
    page.press("First chat?")
    page.ended(1)
    assert page.turns() == ["First chat?", ("It is a long story. " * 8).strip()]


def test_a_stopped_and_a_cut_answer_are_sent_as_they_are_shown(page: Page) -> None:
    page.log_in()
    page.answers("One two three four five six seven eight nine ten", pause_s=0.2)
    page.ask("Count")
    page.browser.wait_for(".busy .text", "two")
    page.browser.find("body").send_keys(Keys.ESCAPE)
    assert "Stopped" in page.browser.wait_for(".model .facts", "Receipt")
    page.answers("It breaks")
    page.served.ingress.model.error = ShardError("a shard is damaged")
    page.ask("Again")
    assert "Cut off" in page.browser.wait_for(".model:last-child .facts", "Receipt")
    page.answers("Good.")
    page.ask("Now?")
    page.ended(3)

    shown = page.turns()
    assert shown[3] == "It breaks"
    assert page.prompts()[0] == template(*shown[:5])
    assert page.browser.text(".model .facts").count("A shard is damaged.") == 1
    assert [one.text for one in page.browser.all(".fault") if one.is_displayed()] == []


def test_an_answer_that_never_began_leaves_no_trace_and_its_question_comes_back(page: Page) -> None:
    page.log_in()
    page.answers("Fine.")
    page.ask("How are you?")
    page.ended(1)
    page.served.ingress.model.token_ids = ()
    page.served.ingress.model.error = ShardError("a shard is damaged")
    page.ask("Still there?")
    told = page.browser.wait_for("#chat-fault", "damaged")

    assert page.turns() == ["How are you?", "Fine."]
    assert page.browser.find("#prompt").get_attribute("value") == "Still there?"
    assert page.browser.text("body").count(told) == 1
    page.press("Ask again")
    page.browser.wait_for("#chat-fault", "damaged")
    assert page.turns() == ["How are you?", "Fine."]


def test_an_enter_that_ends_a_composition_sends_nothing(page: Page) -> None:
    page.log_in()
    page.type("にほん")
    for event in ("{isComposing: true}", "{keyCode: 229}"):
        given = f"Object.assign({event}, {{key: 'Enter', bubbles: true, cancelable: true}})"
        script = f"document.getElementById('prompt').dispatchEvent(new KeyboardEvent('keydown', {given}))"
        assert page.browser.driver.execute_script(f"return {script}"), "the page took it for its own"
    assert page.turns() == []
    page.type(Keys.ENTER)
    page.ended(1)

    assert page.prompts() == [template("にほん")]


def test_markdown_becomes_elements_and_nothing_in_it_runs_or_loads(page: Page, pictures: Path) -> None:
    page.log_in()
    page.answers(RICH)
    page.browser.find("#more summary").click()
    page.browser.fill("#most", "1000")
    page.ask("Show all")
    page.ended(1)
    find = page.browser.find
    page.browser.shoot(pictures / "markdown.png")

    assert find(".model h3").text == "A heading"
    assert find(".model td.right").text == "1"
    assert find(".model ol ul li").text == "inner"
    assert find(".model pre").text == 'print("<b>not bold</b>")'
    assert find(".model blockquote").text == "said"
    assert [link.get_attribute("href") for link in page.browser.all(".model .text a")] == [
        "https://azu.test/x", "https://azu.test/p.png",
    ]  # fmt: skip
    assert page.browser.all(".model img") == []
    assert "onerror" in find(".model").text
    assert page.browser.driver.title == "azu"
    assert page.browser.complaints() == []


def test_code_is_copied_without_its_frame(page: Page) -> None:
    page.log_in()
    page.answers("```\nls -l\n```")
    page.ask("Code?")
    page.ended(1)
    page.press("Copy", ".code")
    page.browser.wait_for(".code", "Copied")
    page.browser.find("#prompt").send_keys(Keys.CONTROL, "v")

    assert page.browser.find("#prompt").get_attribute("value") == "ls -l"


def test_a_growing_text_keeps_its_complete_blocks_and_ends_like_the_whole(page: Page) -> None:
    script = """
        const { Markdown } = await import("/page/markdown.js");
        const text = arguments[0];
        const [grown, whole] = ["div", "div"].map((name) => document.createElement(name));
        const shown = new Markdown(grown);
        let first = null, kept = true;
        for (let end = 1; end <= text.length; end += 1) {
            shown.show(text.slice(0, end));
            if (end === 20) first = grown.firstChild;
            kept &&= end <= 20 || grown.firstChild === first;
        }
        new Markdown(whole).show(text);
        return [kept, grown.innerHTML === whole.innerHTML, whole.children.length];
    """
    assert page.browser.run(script, RICH) == [True, True, 7]


def test_a_question_is_asked_in_other_words_and_an_answer_again(page: Page) -> None:
    page.log_in()
    page.ask("How are you?")
    page.ended(1)
    page.answers("Better.")
    page.press("Ask again")
    page.browser.wait_for(".model .text", "Better.")
    page.ended(1)
    page.press("Edit", ".you")
    page.browser.fill(".you textarea", "Who are you?")
    page.answers("A network.")
    page.press("Send", ".you")
    page.browser.wait_for(".model .text", "A network.")
    page.ended(1)

    assert page.turns() == ["Who are you?", "A network."]
    assert page.prompts() == [template("Who are you?"), template("How are you?"), template("How are you?")]


def test_the_system_prompt_and_the_sampling_belong_to_the_conversation(page: Page) -> None:
    page.log_in()
    page.browser.find("#more summary").click()
    page.browser.fill("#system", "Be short.")
    page.browser.fill("#temperature", "0.5")
    page.ask("Who are you?")
    page.ended(1)
    page.press("New chat")
    page.ask("And now?")
    page.ended(1)

    assert page.prompts() == [template("And now?"), template("Who are you?", system="Be short.")]
    page.press("Who are you?")
    assert page.browser.find("#temperature").get_attribute("value") == "0.5"
    assert "Be short." in page.browser.text("#sent-system")


def test_chats_outlive_the_page_and_an_answer_that_lost_its_page_goes_on(page: Page) -> None:
    page.log_in()
    page.answers("One two three four five six seven eight nine ten", pause_s=0.3)
    page.ask("Count")
    page.browser.wait_for(".busy .text", "four")
    page.browser.driver.refresh()
    page.browser.wait_for(".model .facts", "The page was closed")
    page.browser.wait_for("#balance", "HYPE")
    page.press("Continue")
    page.browser.wait_for(".model .text", "ten")
    page.ended(1)

    assert page.turns() == ["Count", "One two three four five six seven eight nine ten"]
    assert len(page.prompts()) == 1


def test_two_tabs_show_the_same_chat_and_neither_overwrites_the_other(page: Page) -> None:
    page.log_in()
    page.ask("How are you?")
    page.ended(1)
    driver = page.browser.driver
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    page.open()
    page.log_in()
    page.browser.wait_for(".model .text", "Fine, thanks.")
    page.answers("Slowly, very slowly, it comes.", pause_s=0.2)
    page.ask("And you?")
    page.browser.wait_for(".busy .text", "Slowly")
    driver.switch_to.window(first)
    page.browser.wait_for(".model:last-child .text", "Slowly")
    assert not page.browser.find("#send").is_enabled()
    page.browser.wait_for(".model:last-child .text", "it comes.")
    page.ended(2)
    # A tab that has not heard of the other's change.
    page.browser.run("const { current } = await import('/page/chat.js'); current().version -= 1;")
    page.ask("Lost?")
    page.browser.wait_for("#chat-fault", "another tab")

    assert page.turns()[2:] == ["And you?", "Slowly, very slowly, it comes."]
    assert page.browser.find("#prompt").get_attribute("value") == "Lost?"
    assert len(page.prompts()) == 2
    page.browser.find("#chat-list .small").click()
    driver.switch_to.window(driver.window_handles[-1])
    page.browser.wait_until(lambda: page.turns() == [])
    driver.close()
    driver.switch_to.window(first)


def test_a_full_browser_is_told_of_and_the_chat_goes_on(page: Page) -> None:
    page.log_in()
    page.browser.limit_storage(page.served.url, 1)
    page.ask("How are you?")
    page.ended(1)
    page.browser.wait_for("#keep-fault", "no room")
    page.browser.limit_storage(page.served.url, None)
    page.ask("And now?")
    page.ended(2)

    assert not page.browser.find("#keep-fault").is_displayed()
    assert page.prompts()[0] == template("How are you?", "Fine, thanks.", "And now?")


def test_what_a_question_waits_for_is_told(page: Page) -> None:
    page.log_in()
    page.served.ingress.model.delay_s = 6.0
    page.ask("How are you?")
    told = page.browser.wait_for(".busy .facts", "Reading the prompt")
    page.ended(1)

    assert re.fullmatch(r"Reading the prompt: \d+ tokens\.", told)


def test_the_cost_is_told_before_and_after(page: Page) -> None:
    page.log_in()
    page.type("How are you?")
    before = page.browser.wait_for("#price", "At most")
    available = page.money()
    page.browser.find("#send").click()
    page.ended(1)
    spent = available - page.money()

    facts = page.browser.text(".model .facts")
    assert f"{spent / 1e8:.8f}".rstrip("0") + " HYPE" in facts
    prompt_tokens = int(facts.split(" · ")[-3].split(" + ")[0])
    assert f"for {prompt_tokens} tokens and an answer of 200" in before


# A wallet as browsers have them; the test signs what it is asked to.
WALLET = """
    const provider = { request: ({ method, params }) => new Promise((resolve, reject) => {
        window.asked = { method, params, resolve, reject };
    }) };
    const announce = () => dispatchEvent(new CustomEvent("eip6963:announceProvider", { detail: {
        info: { uuid: "1", name: "Test Wallet", icon: "data:,", rdns: "test.azu" }, provider,
    } }));
    addEventListener("eip6963:requestProvider", announce);
"""


def asked_of_wallet(page: Page, method: str) -> list[str]:
    script = f"return window.asked?.method === '{method}' && window.asked.params"
    page.browser.wait_until(lambda: page.browser.driver.execute_script(script) is not False)
    return page.browser.driver.execute_script(script)


def test_a_wallet_signs_in_and_signing_out_ends_its_key(page: Page) -> None:
    wallet: LocalAccount = Account.create()
    with page.browser.before_each_page(WALLET):
        page.open()
    page.press("Sign in with Test Wallet")
    asked_of_wallet(page, "eth_requestAccounts")
    page.browser.run("window.asked.reject({ code: 4001, message: 'no' })")
    page.browser.wait_for("#key-fault", "declined")
    page.press("Sign in with Test Wallet")
    asked_of_wallet(page, "eth_requestAccounts")
    page.browser.run("window.asked.resolve(arguments[0])", [wallet.address])
    message, address = asked_of_wallet(page, "personal_sign")
    text = bytes.fromhex(message.removeprefix("0x")).decode()
    signed = wallet.sign_message(encode_defunct(text=text)).signature.to_0x_hex()
    page.browser.run("window.asked.resolve(arguments[0])", signed)
    page.browser.wait_for("#balance", "0 HYPE")
    secret = page.browser.driver.execute_script("return sessionStorage.getItem('azu-key')")
    page.press("Sign out")
    page.browser.wait_until(lambda: page.browser.find("#key").is_displayed())

    assert address == wallet.address
    assert wallet.address in text
    assert secret.startswith("azu-sk-")
    page.browser.find("#key").send_keys(secret, Keys.ENTER)
    page.browser.wait_for("#key-fault", "not valid")


@pytest.fixture
def wallet_page(page: Page, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Page, LocalAccount, str]]:
    """The page of a user whose wallet is in the browser, the wallet, and the URL of a local chain."""
    services = page.served.ingress.app.state.services
    command = [sys.executable, "-m", "azu.cli", "devnet", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as devnet:
        assert devnet.stdout is not None
        url = devnet.stdout.readline().split()[-1]
        monkeypatch.setattr(services, "config", replace(services.config, chain_url=url))
        wallet: LocalAccount = Account.create()
        opened = asyncio.run_coroutine_threadsafe(page.served.ingress.open_key(wallet), page.served.loop)
        with page.browser.before_each_page(WALLET):
            page.open()
        page.log_in(opened.result(60))
        yield page, wallet, url
        devnet.terminate()


def signs(page: Page, wallet: LocalAccount) -> dict[str, Any]:
    """Have the wallet sign the typed data that it is asked to, and return it."""
    asked_of_wallet(page, "eth_requestAccounts")
    page.browser.run("window.asked.resolve(arguments[0])", [wallet.address])
    script = "return window.asked?.method"
    page.browser.wait_until(lambda: page.browser.driver.execute_script(script) != "eth_requestAccounts")
    if page.browser.driver.execute_script(script) == "eth_chainId":
        page.browser.run("window.asked.resolve('0x1')")
    address, text = asked_of_wallet(page, "eth_signTypedData_v4")
    assert address == wallet.address.lower()
    data: dict[str, Any] = json.loads(text)
    signed = wallet.sign_typed_data(full_message=data)
    page.browser.run("window.asked.resolve(arguments[0])", signed.signature.to_0x_hex())
    return data


def test_a_wallet_sends_a_deposit_to_the_platform_that_the_browser_knows(
    wallet_page: tuple[Page, LocalAccount, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, wallet, url = wallet_page
    services = page.served.ingress.app.state.services
    platform = services.config.platform_address
    fund(url, wallet.address, 10**8)
    fund(url, platform, 10**8)
    page.browser.driver.execute_script("location.hash = '#account'")
    page.press("Send with Test Wallet")
    page.browser.wait_for("#deposit-told", "Say how many HYPE")
    page.browser.fill("#amount", "0.25")
    page.press("Send with Test Wallet")
    data = signs(page, wallet)
    # The ingress of this test has no treasury, which would credit it.
    page.browser.wait_for("#deposit-told", "The chain does not know 0x")

    assert data["domain"]["chainId"] == 1
    assert (data["message"]["destination"], data["message"]["amount"]) == (platform, "0.25")
    assert balance_of(platform, chain_url=url) == 125_000_000
    assert page.browser.find("#transfer").get_attribute("value").startswith("0x")
    other = "0x" + "88" * 20
    monkeypatch.setattr(services, "config", replace(services.config, platform_address=other))
    page.press("Send with Test Wallet")
    page.browser.wait_for("#deposit-told", f"was {platform} in this browser and is {other} now")
    assert page.browser.complaints() == []


def test_a_lender_claims_with_a_wallet(wallet_page: tuple[Page, LocalAccount, str]) -> None:
    page, wallet, _ = wallet_page
    page.browser.driver.execute_script("location.hash = '#lend'")
    page.browser.wait_for("#claim", "moves no money")
    page.press("Claim with Test Wallet")
    data = signs(page, wallet)
    page.browser.wait_for("#claim-told", "Claimed")
    page.browser.wait_until(lambda: not page.browser.find("#claim").is_displayed())

    assert data["domain"]["verifyingContract"] == page.served.ingress.config.platform_address
    earned = asyncio.run_coroutine_threadsafe(
        page.served.ingress.app.state.services.books.earnings(wallet.address.lower()), page.served.loop
    )
    assert earned.result(60).claimed


def test_a_browser_without_a_wallet_is_told_of_the_command_line(page: Page) -> None:
    page.browser.wait_for("#no-wallet .login-command", f"azu login {page.served.url}#")
    page.browser.wait_for("#welcome .deposit-address", page.served.ingress.config.platform_address)


SIGNER: LocalAccount = Account.from_key("0x" + "09" * 32)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"charged_lamports": 1}, "It was changed"),
        ({"topology": []}, "It was changed"),
        ({"note": "paid"}, "It was changed"),
        ({"signer": "0x" + "12" * 20}, "did not certify"),
        ({"signature": "0x" + "11" * 65}, "It was changed"),
        ({"signature": "0x00"}, "It was changed"),
        ({"signature": None}, "It is not signed"),
        ({"key": None}, "It is not signed"),
    ],
)
@pytest.mark.parametrize("lamports", [80, 10**17], ids=["small", "large"])
def test_a_receipt_is_checked_in_the_browser(page: Page, change: dict, fault: str, lamports: int) -> None:
    price = lamports // 40
    given = receipt(
        charged_lamports=lamports,
        platform_lamports=lamports - 64,
        lamports_per_token_layer=price,
        model_id="t\u00e4/\u7dbd",
    )
    document = sealed(given, SIGNER.address.lower(), receipt_signed(SIGNER, given)) | change
    script = "return (await import('/page/verify.js')).faultOf(arguments[0])"

    found = page.browser.run(script, json.dumps(document))
    assert (fault in found) if fault else found == ""


def test_a_signed_receipt_whose_parts_are_not_the_whole_is_told(page: Page) -> None:
    given = receipt(charged_lamports=79)
    document = sealed(given, SIGNER.address.lower(), receipt_signed(SIGNER, given))
    found = page.browser.run(
        "return (await import('/page/verify.js')).faultOf(arguments[0])", json.dumps(document)
    )
    assert found == "Its parts are not what was charged."


class SomeNodes(NoNodes):
    """Four nodes of one owner, on which two models run."""

    def __init__(self, owner: str) -> None:
        self._owner = owner

    async def nodes(self) -> tuple[Node, ...]:
        names = ("ada", "ben", "cleo", "a-node-with-a-long-name")
        links = {name: 0.0004 * place for place, name in enumerate(names, 1)}
        return tuple(
            Node(
                node_id=name, name=name, payout_address=self._owner, device="NVIDIA GeForce RTX 4090",
                vram_total_bytes=24 * 2**30, vram_free_bytes=(5 + 4 * place) * 2**30, vram_used_bytes=2**30,
                memory_bytes_per_s=1e12, flops_per_s=1e13, load=0.4, links_s=links,
                state=NodeState.ALIVE if place < 3 else NodeState.SUSPECT,
            )
            for place, name in enumerate(names)
        )  # fmt: skip

    async def deployments(self) -> tuple[DeploymentStatus, ...]:
        moe = (
            Placement("ada", "l0", (0, 3), {1: (0, 1)}), Placement("cleo", "l1", (3, 6), {4: (0, 1, 2, 3)}),
            Placement("a-node-with-a-long-name", "e0", (3, 3), {1: (2, 3), 2: (0, 1, 2, 3)}),
        )  # fmt: skip
        dense = (Placement("ben", "l0", (0, 4)), Placement("cleo", "l1", (4, 6)))
        return (
            DeploymentStatus("azu/tiny-moe", "r1", "running", 3, 6, moe, tuple(one.node for one in moe)),
            DeploymentStatus(MODEL, "r1", "running", 1, 6, dense, tuple(one.node for one in dense)),
        )

    async def metrics(self) -> MetricsSnapshot:
        return MetricsSnapshot({(SEQUENCES.name, ("azu/tiny-moe", "running")): 2.0}, {})


def test_a_lender_sees_what_was_earned_and_what_the_nodes_hold(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = page.served.ingress.app.state.services
    monkeypatch.setitem(services._actors, SCHEDULER, SomeNodes(page.address))
    hour = int(time.time()) // 3600

    async def earn() -> None:
        for ago, model, lamports in ((0, MODEL, 1200), (1, MODEL, 1200), (2, "azu/tiny-moe", 2400)):
            key = f"{EARNED}{page.address}:{(hour - ago) // 24}"
            await services._redis.hincrby(key, f"{hour - ago}/{model}", lamports)

    asyncio.run_coroutine_threadsafe(earn(), page.served.loop).result(60)
    page.log_in()
    page.browser.driver.execute_script("location.hash = '#lend'")
    nodes = page.browser.wait_for("#my-nodes", "azu/tiny-moe: ")
    shown = page.browser.text("#lend")

    assert "0.000048 HYPE, 0.000002 HYPE per hour" in shown
    assert [row.text for row in page.browser.all("#earned-by tr")] == [
        f"{MODEL} 0.000024 HYPE", "azu/tiny-moe 0.000024 HYPE",
    ]  # fmt: skip
    assert "none before this address claims" in shown
    assert nodes.count("azu/tiny-moe: ") == 3


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1600])
def test_every_view_is_open_to_all_and_fits(
    page: Page, pictures: Path, width: int, dark: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    actors = page.served.ingress.app.state.services._actors
    monkeypatch.setitem(actors, SCHEDULER, SomeNodes(page.address))
    browser, faults = page.browser, []
    browser.resize(width, 800 if width > 400 else 740, dark=dark)

    def look(name: str) -> None:
        browser.shoot(pictures / f"{name}-{width}-{'dark' if dark else 'light'}.png")
        faults.extend(f"{name} {barrier}" for barrier in browser.barriers())
        if browser.is_wider_than_its_window():
            faults.append(f"{name} is wider than its window")

    browser.wait_for("#welcome .deposit-address", "0x")
    look("welcome")
    page.log_in()
    page.type("How are you?")
    browser.wait_for("#price", "At most")
    look("ready")
    browser.find("#send").click()
    page.ended(1)
    page.answers(RICH, pause_s=0.001)
    browser.find("#more summary").click()
    browser.fill("#most", "900")
    browser.fill("#system", "Be short.")
    look("settings")
    browser.find("#more summary").click()
    page.ask("Show all that you can.")
    page.ended(2)
    look("chat")
    for view in ("network", "lend", "receipts", "account"):
        browser.driver.execute_script(f"location.hash = '#{view}'")
        if view == "network":
            browser.wait_for("#nodes", "cleo")
            browser.wait_for("#picture svg", "layers")
        if view == "lend":
            browser.wait_for("#my-nodes", "ada")
        if view == "receipts":
            browser.find("#jobs a").click()
            browser.wait_for("#receipt", "Where it went")
        look(view)
    assert faults == []
    assert browser.complaints() == []
