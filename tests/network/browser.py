"""Debian's Chromium, driven through ChromeDriver; it fetches nothing of its own."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

pytest.importorskip("selenium")

_TIMEOUT_S = 60.0
_AXE = Path(__file__).parent / "vendor" / "axe.min.js"
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


class Browser:
    """One tab on the page."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def find(self, selector: str) -> WebElement:
        """Return the element that a CSS selector names."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        """Return all such elements."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Return the text that a reader sees there; "" if there is none."""
        return " ".join(element.text for element in self.all(selector))

    def wait_for(self, selector: str, words: str = "") -> str:
        """Wait until the element shows a text; return all that it shows."""
        self._patience().until(
            lambda _: self.all(selector) and words in self.text(selector), f"{selector} never said {words!r}"
        )
        return self._patience().until(lambda _: self.text(selector) or " ").strip()

    def _patience(self) -> WebDriverWait[webdriver.Chrome]:
        # The page draws an element anew while it is read.
        stale = [StaleElementReferenceException]
        return WebDriverWait(self.driver, _TIMEOUT_S, ignored_exceptions=stale)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        self._patience().until(lambda _: condition())

    def fill(self, selector: str, text: str) -> None:
        """Write a text in the place of what a field has."""

        def filled(_: webdriver.Chrome) -> bool:
            field = self.find(selector)
            field.clear()
            field.send_keys(text)
            return True

        self._patience().until(filled)

    def run(self, script: str, *arguments: object) -> Any:
        """Run the body of an asynchronous function in the page; return what it returns."""
        body = f"return (async (...arguments) => {{{script}}})(...arguments)"
        return self.driver.execute_script(body, *arguments)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the viewport."""
        self._command(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", {"features": [scheme]})

    def slow_down(self, bytes_per_s: int) -> None:
        """Limit the speed at which responses arrive."""
        self._command("Network.enable", {})
        rates = {"latency": 0, "downloadThroughput": bytes_per_s, "uploadThroughput": -1, "offline": False}
        self._command("Network.emulateNetworkConditions", rates)

    @contextmanager
    def before_each_page(self, script: str) -> Iterator[None]:
        """Run a script in each page that opens meanwhile, before the page's own."""
        added = self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
        yield
        self._command("Page.removeScriptToEvaluateOnNewDocument", added)

    def barriers(self) -> list[str]:
        """Return what axe-core finds on the page that keeps people out."""
        if not self.driver.execute_script("return 'axe' in window"):
            self.driver.execute_script(_AXE.read_text())
        found = self.run("return (await axe.run(document)).violations")
        return [
            f"{one['id']}: {node['html'][:120]} {node['failureSummary']}"
            for one in found
            for node in one["nodes"]
        ]

    def forget(self, origin: str) -> None:
        """Remove all that an origin keeps, and leave it."""
        self.driver.get(f"{origin}/page/icon.svg")
        self.driver.execute_script("sessionStorage.clear()")
        self.driver.get("about:blank")
        self._command("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})

    def limit_storage(self, origin: str, quota_bytes: int | None) -> None:
        """Give an origin so much room for what it keeps; None for the usual."""
        quota = {} if quota_bytes is None else {"quotaSize": quota_bytes}
        self._command("Storage.overrideQuotaForOrigin", {"origin": origin, **quota})

    def shoot(self, path: Path) -> None:
        """Write what the viewport shows as a PNG."""
        assert self.driver.save_screenshot(str(path))

    def is_wider_than_its_window(self) -> bool:
        """Return whether a reader would have to scroll sideways."""
        script = "return document.documentElement.scrollWidth > innerWidth"
        return bool(self.driver.execute_script(script))

    def complaints(self) -> list[str]:
        """Return the errors on the console, without those of requests that the test expects to fail."""
        lines = [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
        return [line for line in lines if "the server responded with a status of 4" not in line]

    def _command(self, name: str, arguments: dict[str, object]) -> None:
        self.driver.execute_cdp_cmd(name, arguments)


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Run Chromium with an empty profile; fails where it is not installed."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.fail("this test needs Debian's chromium and chromium-driver: apt-get install them")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options, Service(driver))
    try:
        yield Browser(running)
    finally:
        running.quit()
