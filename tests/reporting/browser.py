"""A page in the system's Chromium, driven by playwright."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
NEEDS_BROWSER = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")]
CARD = "article.sample"


class Watched:
    """A page, all that it says on the console and all that it asks for."""

    def __init__(self, browser: Browser, *, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True)  # type: ignore[arg-type]
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, path: Path, fragment: str = "") -> Page:
        self.opened = path.as_uri()
        self.page.goto(self.opened + fragment)
        return self.page

    def strange(self) -> list[str]:
        """What it said, and what it asked for apart from itself and the file of labels that it made."""
        return [*self.said, *(url for url in self.asked if url.partition("#")[0] != self.opened and not url.startswith("blob:"))]
