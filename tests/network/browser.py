"""Debian's Chromium, driven through ChromeDriver; it fetches nothing of its own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

pytest.importorskip("selenium")

_TIMEOUT_S = 60.0
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
        WebDriverWait(self.driver, _TIMEOUT_S).until(
            lambda _: self.all(selector) and words in self.text(selector), f"{selector} never said {words!r}"
        )
        return self.text(selector)

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
