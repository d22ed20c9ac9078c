from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Browser, sync_playwright

from dpo_loop.artifacts import materialize
from dpo_loop.reporting.stage import REPORT
from tests.reporting.browser import BROWSER, Watched
from tests.reporting.rounds import Flaws, Run


class Played(NamedTuple):
    """A run of four rounds: start, a good one, one that lost its refusals, one too close to call. inputs, pages: by round."""

    run: Run
    inputs: list[dict[str, Any]]
    pages: list[str]

    def report(self, number: int) -> Path:
        return self.run.report_dir(number) / "report.html"


HOSTILE = (
    "<script>document.title='owned'</script></script><img src=x onerror=\"document.title='owned'\">"
    "\u202egnp.exe\u2028\x00{{ 7*7 }} <!-- ]]> &lt;b&gt; https://evil.example/?q=1"
)


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    run = Run(tmp_path_factory.mktemp("runs") / "demo")
    start, good = Flaws(0.4, 0.02, 0.12), Flaws(0.3, 0.01, 0.10)
    hostile = {run.prompts[0].id: HOSTILE, run.prompts[1].id: "long " * 40_000, run.prompts[2].id: ""}
    inputs = [
        run.play(0, {"candidate": start}),
        run.play(1, {"candidate": good, "previous": start, "anchor": start}, overrides=hostile),
        run.play(2, {"candidate": Flaws(0.25, 0.35, 0.01), "previous": good, "anchor": start}),
        run.play(3, {"candidate": Flaws(0.31, 0.03, 0.10), "previous": good, "anchor": start}),
    ]
    pages = []
    for number, given in enumerate(inputs):
        materialize(REPORT, run.report_dir(number), **given)
        pages.append((run.report_dir(number) / "report.html").read_text(encoding="utf-8"))
    return Played(run, inputs, pages)


@pytest.fixture(scope="session")
def run_path(played: Played) -> Path:
    return played.run.path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of a module: while playwright is open, asyncio.run of other tests would find its event loop running."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    made = Watched(browser)
    yield made
    assert made.strange() == []
    made.context.close()
