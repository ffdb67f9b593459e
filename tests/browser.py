"""A page as people see it: Debian's headless Chromium, driven by Selenium."""

from __future__ import annotations

import base64
import shutil
import time
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

_FLAGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--window-size=1280,900"),
)


class Browser:
    """Chromium with one page open, and what it had to say."""

    def __init__(self) -> None:
        options = Options()
        options.binary_location = str(shutil.which("chromium"))
        for flag in _FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = Service(str(shutil.which("chromedriver")))
        self.driver = webdriver.Chrome(options=options, service=service)

    def open(self, page: Path) -> None:
        """Open a report, and wait until all its charts are drawn."""
        self.driver.get(page.resolve().as_uri())
        for _ in range(600):
            if self.run("return document.body.dataset.ready"):
                return
            time.sleep(0.1)
        raise AssertionError(f"not drawn within a minute: {self.said()}")

    def run(self, script: str, *arguments: object) -> object:
        """What a script returns in the page."""
        return self.driver.execute_script(script, *arguments)

    def said(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        return [f"{e['level']} {e['message']}" for e in self.driver.get_log("browser")]

    def emulate(self, dark: bool = False, width: int = 1280, height: int = 900) -> None:
        """A dark or light screen of this size; a narrow one is a phone's."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.command("Emulation.setDeviceMetricsOverride", **size)

    def printed(self) -> bytes:
        """The page as PDF."""
        found = self.command("Page.printToPDF", printBackground=True)
        return base64.b64decode(found["data"])

    def picture(self, file: Path, top: float = 0, height: float = 900) -> None:
        """A part of the page as PNG."""
        width = self.run("return document.documentElement.clientWidth")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        found = self.command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(found["data"]))

    def command(self, name: str, **parameters: object) -> dict[str, str]:
        """A command of Chromium's own protocol."""
        found: dict[str, str] = self.driver.execute_cdp_cmd(name, parameters)
        return found

    def close(self) -> None:
        self.driver.quit()


def start_browser() -> Browser:
    """Chromium; a test that needs it is skipped where it is not."""
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"no {program}; Debian's packages chromium and chromium-driver have it")
    return Browser()
