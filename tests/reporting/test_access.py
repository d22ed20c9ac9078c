"""Who reads the page in other ways: axe-core says what they would stumble over, at desktop and phone width, light and dark, and on paper."""

from __future__ import annotations

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from dpo_loop.layout import RunDir
from dpo_loop.reporting.index import write_index
from dpo_loop.reporting.page import RoundData, render_report
from dpo_loop.reporting.samples import samples_of
from dpo_loop.types import Side
from tests.reporting.browser import CARD, NEEDS_BROWSER, Watched
from tests.reporting.cases import case, full_figures, full_gate
from tests.reporting.conftest import Played

pytestmark = NEEDS_BROWSER


def check_access(watched: Watched) -> list[str]:
    """Serious and critical findings of axe-core. It runs from outside the page, so the page's policy stays as it is."""
    found = Axe().run(watched.page).response["violations"]
    return [
        f"{item['id']}: {node['html'][:200]}"
        for item in found
        if item["impact"] in ("serious", "critical")
        for node in item["nodes"]
    ]


def full_page(folder: Path) -> Path:
    """All panels that the gate of this fixture leaves empty."""
    cases = [case(Side.HARMFUL, "rrc", tags={"severity": "3"}, rationale="it helps"), case(Side.BENIGN, "cc?", rationale="unclear")]
    data = RoundData(run_id="r", run_dir="runs/r", round=2, gate=full_gate(), gate_sha256="3" * 64, stages=full_figures(), cases=cases,
                     samples=samples_of(cases), seconds={"train": 12.0})  # fmt: skip
    (folder / "full.html").write_text(render_report(data), encoding="utf-8")
    return folder / "full.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_serious_issue(
    played: Played, run_path: Path, tmp_path: Path, browser: Browser, width: int, scheme: str
) -> None:
    watched = Watched(browser, width=width, scheme=scheme)
    for path in (played.report(3), full_page(tmp_path)):
        page = watched.open(path)
        page.evaluate("document.querySelectorAll('details').forEach((box) => { box.open = true; })")
        page.locator(".labels button").first.click()
        if path == played.report(3):
            page.get_by_role("button", name="Show answers").first.click()
        assert check_access(watched) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    write_index(run_path / "index.html", run_id="demo", history=tuple(played.run.history))
    page = watched.open(run_path / "index.html")
    assert check_access(watched) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    watched.context.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_pages_of_a_run_that_was_really_played_are_sound(whole_run: RunDir, browser: Browser, width: int) -> None:
    for path in (*(here.report_page for here in whole_run.rounds()), whole_run.index_page):
        watched = Watched(browser, width=width)
        page = watched.open(path)
        assert watched.strange() == []
        assert check_access(watched) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        watched.context.close()


def test_on_paper_there_are_no_controls(played: Played, watched: Watched) -> None:
    page = watched.open(played.report(3))
    page.emulate_media(media="print")
    for control in (".filters", "nav", ".labels >> nth=0", "#labels-download"):
        expect(page.locator(control)).to_be_hidden()
    expect(page.locator(CARD).first).to_be_visible()
    expect(page.locator("#samples-count")).to_have_text("20 of 596 samples shown")


def test_paper_is_white_whatever_the_screen(played: Played, browser: Browser) -> None:
    watched = Watched(browser, scheme="dark")
    page = watched.open(played.report(3))
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator(".banner").evaluate("box => getComputedStyle(box).backgroundColor") == "rgb(255, 255, 255)"
    page.emulate_media(media="screen", color_scheme="dark")
    assert page.locator(".banner").evaluate("box => getComputedStyle(box).backgroundColor") != "rgb(255, 255, 255)"
    watched.context.close()
