from __future__ import annotations

from pathlib import Path

from dpo_loop.reporting.index import write_index
from tests.reporting.conftest import Played
from tests.reporting.test_page import Page, attributes


def test_the_index_links_every_report_relative_to_itself(played: Played, run_path: Path) -> None:
    history = list(played.run.history)
    assert history[2].report is not None
    history[2] = history[2].model_copy(update={"report": str(run_path / history[2].report)})  # an absolute path is made relative
    write_index(run_path / "index.html", run_id="demo", history=tuple(history))
    page = Page((run_path / "index.html").read_text(encoding="utf-8"))
    links = list(attributes(page, "href"))
    assert links == [f"rounds/{number:03d}/report/report.html" for number in range(4)]
    assert all((run_path / link).is_file() for link in links)


def test_the_index_tells_lineage_states_and_reasons(played: Played, tmp_path: Path) -> None:
    write_index(tmp_path / "index.html", run_id="demo", history=tuple(played.run.history))
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "round 1 made the policy that generates next" in page.text
    [drawing] = [attrs["aria-label"] for tag, attrs in page.elements if tag == "svg"]
    assert drawing.split("; ")[:4] == [
        "round 0, promoted",
        "round 1 from round 0, promoted",
        "round 2 from round 1, not promoted",
        "round 3 from round 1, not promoted",
    ]
    assert "Round 2: harmful compliance rose" in page.text
    assert "INCONCLUSIVE" in page.text
    assert "http:" not in html
    assert "https:" not in html
    assert not list(attributes(page, "style"))


def test_an_index_of_no_rounds_is_a_page_too(tmp_path: Path) -> None:
    write_index(tmp_path / "index.html", run_id="<b>", history=())
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "no policy yet" in html
    assert "<b>" not in html


def test_a_promotion_by_a_person_is_marked(played: Played, tmp_path: Path) -> None:
    history = [*played.run.history[:3], played.run.history[3].model_copy(update={"promoted": True})]
    write_index(tmp_path / "index.html", run_id="demo", history=tuple(history))
    assert "INCONCLUSIVE approved" in Page((tmp_path / "index.html").read_text(encoding="utf-8")).text
