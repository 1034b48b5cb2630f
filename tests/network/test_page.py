"""The page in a real browser. AZU_TEST_SCREENSHOTS names a folder for its screenshots."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from azu.launch.local_network import LocalNetwork
from azu.units import hype_from_lamports
from tests.network.browser import Browser, chromium
from tests.network.user import User

pytest.importorskip("selenium")

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

DESKTOP, PHONE = (1280, 800), (400, 860)
QUESTION = "Tell me how azu works."
MODEL = "azu/tiny-moe"
_SLOW_BYTES_PER_S = 9000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("AZU_TEST_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def page(browser: Browser, network: LocalNetwork) -> Browser:
    """The page as a browser shows it that was never there."""
    browser.resize(*DESKTOP)
    browser.slow_down(-1)
    browser.forget(network.url)
    browser.driver.get(network.url)
    browser.wait_for("#health", "Up")
    return browser


def log_in(page: Browser, key: str) -> None:
    page.find("#key").send_keys(key, Keys.ENTER)


def choose(page: Browser, model: str) -> None:
    page.wait_for("#model option", model)
    page.find(f"#model option[value='{model}']").click()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["1280", "400"])
def test_a_chat_streams_and_shows_its_cost(
    page: Browser, user: User, pictures: Path, size: tuple[int, int]
) -> None:
    width = size[0]
    page.resize(*size)
    page.shoot(pictures / f"welcome-{width}.png")
    log_in(page, user.api_key)
    choose(page, MODEL)
    page.slow_down(_SLOW_BYTES_PER_S)
    page.find("#prompt").send_keys(QUESTION, Keys.ENTER)

    page.wait_for(".busy .facts", "tokens/s")
    early = page.text(".busy .text")[:20]
    page.wait_for(".busy .text", "hidden states")
    if size == DESKTOP:
        page.wait_for("#picture .token")
    page.shoot(pictures / f"chat-in-progress-{width}.png")
    assert not page.is_wider_than_its_window()
    assert page.find("#stop").is_displayed()
    page.slow_down(-1)
    facts = page.wait_for(".model .facts", "Receipt")
    page.resize(*size, dark=True)
    page.shoot(pictures / f"chat-dark-{width}.png")

    assert page.text(".model .text").startswith(early)
    job = user.http.get("/v1/jobs?limit=1").json()["data"][0]
    assert f"{hype_from_lamports(job['charged_lamports'])} HYPE" in facts
    assert page.complaints() == []


def test_stopping_ends_the_job_and_charges_the_delivered_tokens(page: Browser, user: User) -> None:
    log_in(page, user.api_key)
    choose(page, MODEL)
    page.slow_down(2000)
    page.find("#prompt").send_keys(QUESTION, Keys.ENTER)
    page.wait_for(".busy .facts", "HYPE so far")
    page.find("body").send_keys(Keys.ESCAPE)

    assert "Stopped" in page.wait_for(".model .facts", "Receipt")
    page.slow_down(-1)
    page.find(".model .facts a").click()
    shown = page.wait_for("#receipt", "Where it went")
    job = user.http.get("/v1/jobs?limit=1").json()["data"][0]
    assert job["status"] == "cancelled"
    assert job["job_id"] in shown
    assert f"{job['charged_lamports']:,} lamports" in shown


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["1280", "400"])
def test_the_network_view_shows_the_pieces_of_each_node(
    page: Browser, user: User, pictures: Path, size: tuple[int, int]
) -> None:
    log_in(page, user.api_key)
    page.resize(*size)
    page.find("nav a[href='#network']").click()
    page.wait_for("#nodes", "ada")
    page.wait_for("#models", MODEL)
    page.shoot(pictures / f"network-{size[0]}.png")

    found = user.http.get("/v1/network").json()
    names = [element.text for element in page.all("#nodes strong")]
    assert names == sorted(node["name"] for node in found["nodes"])
    drawn = page.run("return document.getElementById('picture').textContent")
    assert all(node["name"] in drawn for node in found["nodes"])
    assert " ms" in drawn  # the time between two nodes
    shown = page.text("#models")
    for model in found["deployments"]:
        for piece in model["topology"]:
            start, end = piece["layers"]
            if end - start > 1:
                assert re.search(rf"{piece['node']}\s+layers {start}.{end - 1}", shown)
    assert re.search(r"experts \d.\d of layer", shown)
    assert not page.is_wider_than_its_window()
    assert page.complaints() == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["1280", "400"])
def test_a_receipt_shows_every_payment(
    page: Browser, user: User, pictures: Path, size: tuple[int, int]
) -> None:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 12, "ignore_eos": True}
    usage = user.http.post("/v1/completions", json=body).raise_for_status().json()["usage"]
    log_in(page, user.api_key)
    page.resize(*size)
    page.find("nav a[href='#receipts']").click()
    page.wait_for("#jobs", "job-")
    page.find("#jobs a").click()
    shown = page.wait_for("#receipt", "The platform")
    page.shoot(pictures / f"receipt-{size[0]}.png")

    assert f"{usage['cost_lamports']:,} lamports" in shown
    assert "Checked in this browser" in shown
    rows = [row.text.rsplit(" ", 1) for row in page.all("#receipt .amounts tbody tr")]
    paid = [int(lamports.replace(",", "")) for who, lamports in rows if who != "Back to you"]
    assert sum(paid) == usage["cost_lamports"]
    assert not page.is_wider_than_its_window()


def test_the_keyboard_reaches_everything(page: Browser, user: User) -> None:
    log_in(page, user.api_key)
    page.wait_for("#model option", MODEL)
    reached = set()
    page.find("h1 a").send_keys("")
    for _ in range(30):
        focused = page.driver.switch_to.active_element
        reached.add(focused.get_attribute("id") or focused.text)
        focused.send_keys(Keys.TAB)

    views = {"Chat", "Network", "Receipts", "Account"}
    assert {*views, "forget", "Chats", "Settings", "model", "prompt", "send"} <= reached


def test_errors_are_sentences(page: Browser, poor_user: User, pictures: Path) -> None:
    log_in(page, "azu-sk-wrong")
    wrong = page.wait_for("#key-fault", "not valid")
    log_in(page, poor_user.api_key)
    choose(page, MODEL)
    page.find("#prompt").send_keys(QUESTION, Keys.ENTER)
    poor = page.wait_for("#chat-fault", "Deposit some HYPE")
    page.shoot(pictures / "refused.png")
    page.driver.execute_script("location.hash = '#receipts/job-nonsense'")
    missing = page.wait_for("#receipt-fault", "no such job")

    for sentence in (wrong, poor, missing):
        assert re.fullmatch(r"[A-Z].*\.", sentence)
    assert page.find("#prompt").get_attribute("value") == QUESTION


def test_the_key_stays_in_its_tab_until_it_is_removed(page: Browser, user: User) -> None:
    log_in(page, user.api_key)
    page.wait_for("#balance", "HYPE")
    assert page.driver.execute_script("return Object.values(sessionStorage)") == [user.api_key]
    assert page.driver.execute_script("return [localStorage.length, document.cookie]") == [0, ""]
    page.find("#forget").click()

    assert page.driver.execute_script("return sessionStorage.length") == 0
    assert page.find("#key").is_displayed()
    assert page.all("#nodes li") == []
