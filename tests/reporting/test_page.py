from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.artifacts import Stage, materialize
from dpo_loop.evaluation.stage import GATE_INVALID
from dpo_loop.files import write_jsonl
from dpo_loop.reporting.page import RoundData, render_report
from dpo_loop.reporting.samples import samples_of
from dpo_loop.reporting.stage import REPORT
from dpo_loop.types import GateState, PolicyRef, RoundSummary, Side, StageOutcome
from tests.reporting.cases import case
from tests.reporting.conftest import HOSTILE, Played
from tests.reporting.rounds import SEALED, Flaws, Run


class Page(HTMLParser):
    """What a browser would make of the page: elements with their attributes, text outside script and style, the data block."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.raw: list[tuple[dict[str, str | None], str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open.append(tag)
            self.raw.append((dict(attrs) | {"tag": tag}, ""))

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            attrs, before = self.raw[-1]
            self.raw[-1] = (attrs, before + data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(next(text for attrs, text in self.raw if attrs.get("id") == "samples-data"))

    @property
    def samples(self) -> list[dict[str, Any]]:
        return self.data["samples"]


def attributes(page: Page, name: str) -> Iterator[str]:
    return (value for _, attrs in page.elements if (value := attrs.get(name)) is not None)


def test_the_banner_tells_state_reason_and_what_to_do(played: Played) -> None:
    start, good, broken, close = (Page(html) for html in played.pages)
    assert "START The start policy" in start.text
    assert "PASS Every check holds: 7 of 7 against previous and anchor" in good.text
    assert "There is nothing to do." in good.text
    assert "FAIL Harmful compliance rose from" in broken.text
    assert "dpo-loop approve" not in broken.text
    assert "INCONCLUSIVE Too little evidence" in close.text
    where = os.path.relpath(played.run.path)
    where = str(played.run.path) if where.startswith("..") else where
    for verb in ("approve", "reject"):
        assert f'dpo-loop {verb} {where} 3 --reviewer "your name" --reason "why"' in close.text


def test_every_check_is_drawn_against_its_limit(played: Played) -> None:
    page = Page(played.pages[3])
    drawings = [
        attrs["aria-label"] for tag, attrs in page.elements if tag == "svg" and (attrs.get("class") or "").startswith("interval")
    ]
    assert len(drawings) == 7
    assert [label.rsplit(": ", 1)[1] for label in drawings].count("INCONCLUSIVE") >= 1
    harm = re.search(r"harm-previous: ([-\d.]+) points, interval ([-\d.]+) to ([-\d.]+), limit 5.0: PASS", " ".join(drawings))
    assert harm is not None
    assert float(harm[2]) < float(harm[1]) < float(harm[3]) < 5.0


def test_trends_begin_with_the_second_graded_round_and_training_curves_follow_the_metrics(played: Played) -> None:
    titles = [
        [attrs["aria-label"] for tag, attrs in Page(html).elements if tag == "svg" and attrs.get("class") == "chart"]
        for html in played.pages
    ]
    assert [title.split(" by ")[0] for title in titles[0]] == ["Length of answers"]
    assert [title.split(" by ")[0] for title in titles[3]] == [
        *("Harmful compliance and over-refusal", "Pass rate", "Win rate", "Harm and over-refusal", "Length of answers"),
        *("Loss", "Reward margin", "Log-prob change per token", "Preference accuracy", "KL estimate", "Gradient norm"),
    ]
    assert "chosen: " in titles[3][7]
    assert "rejected: " in titles[3][7]


def test_counts_rates_and_seconds_are_shown(played: Played) -> None:
    text = Page(played.pages[1]).text
    assert "Judging: 800 prompts" in text
    assert "pairs 512" in text
    assert "generate 1 min 01 s" in text
    assert "win rate against previous" in text
    rates = played.run.history[1]
    assert f"pass rate {100 * rates.pass_rate:.1f} %" in text


def test_changed_samples_come_first_side_by_side(played: Played) -> None:
    samples = Page(played.pages[2]).samples
    assert len(samples) == 600 - 2 * len(SEALED)
    order = [sample["change"] for sample in samples]
    assert order == sorted(order, key=["worse", "worse_than_anchor", "better", "better_than_anchor", "reworded", "same"].index)
    assert (samples[0]["side"], samples[0]["change"]) == ("harmful", "worse")
    assert samples[0]["why"].startswith("newly harmful against previous")
    assert list(samples[0]["answers"]) == ["anchor", "previous", "candidate"]
    start = Page(played.pages[0]).samples
    assert {sample["change"] for sample in start} == {"bad", "good"}
    assert list(start[0]["answers"]) == ["candidate"]


@pytest.mark.parametrize("number", range(4))
def test_a_page_asks_nobody_for_anything(played: Played, number: int) -> None:
    page = Page(played.pages[number])
    assert not list(attributes(page, "src"))
    assert all(href.startswith("#") or href == "../../../index.html" for href in attributes(page, "href"))
    assert not [tag for tag, _ in page.elements if tag in {"link", "iframe", "img", "object", "embed", "base", "form"}]
    without_samples = re.sub(r'<script type="application/json".*?</script>', "", played.pages[number], flags=re.DOTALL)
    assert "http:" not in without_samples
    assert "https:" not in without_samples
    assert "@import" not in without_samples


@pytest.mark.parametrize("number", range(4))
def test_the_policy_of_a_page_names_its_own_script_and_style_and_nothing_else(played: Played, number: int) -> None:
    page = Page(played.pages[number])
    [policy] = [
        attrs["content"] for tag, attrs in page.elements if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for attrs, content in page.raw:
        if attrs.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{attrs['tag']}-src 'sha256-{digest}'" in policy
    assert not list(attributes(page, "style"))
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_ids_are_unique_and_references_resolve(played: Played) -> None:
    for html in played.pages:
        page = Page(html)
        ids = list(attributes(page, "id"))
        assert len(ids) == len(set(ids))
        wanted = {href[1:].partition("?")[0] for href in attributes(page, "href") if href.startswith("#")} | set(
            re.findall(r"url\(#([^)]+)\)", html)
        )
        assert wanted <= set(ids)


def test_hostile_answers_are_data_and_never_markup(played: Played) -> None:
    html = played.pages[1]
    assert html.count("<script") == html.count("</script>") == 2
    assert "onerror=" not in re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.DOTALL)
    assert not set(html) & set("\x00\u202e\u2028")
    page = Page(html)
    by_prompt = {sample["id"]: sample for sample in page.samples}
    shown = by_prompt[played.run.prompts[0].id]["texts"][-1]
    assert shown == HOSTILE.replace("\x00", "␀").replace("\u202e", "⟨U+202E⟩").replace("\u2028", "⟨U+2028⟩")
    assert "49" not in shown
    long = by_prompt[played.run.prompts[1].id]["texts"][-1]
    assert len(long) < 4_100
    assert long.endswith("196,000 more characters in grades.jsonl")


def test_hostile_reasons_and_names_are_escaped(tmp_path: Path) -> None:
    ref = PolicyRef(base="b", base_sha256="0" * 64)
    gate = tmp_path / "rounds" / "001" / "gate"
    gate.parent.mkdir(parents=True)
    materialize(
        GATE_INVALID, gate, reasons=(HOSTILE, "<b>second</b>"), candidate=None, previous=ref, anchor=ref, run_id="r", round=1
    )
    html = render(tmp_path, gate=gate)
    assert "<img" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;document.title" in html
    assert "INVALID" in Page(html).text


EMPTY: dict[str, Any] = dict.fromkeys(("gate", "prompts", "grades", "judgements", "pairs", "train"))
NO_RATES: dict[str, Any] = dict.fromkeys(("pass_rate", "win_rate_previous", "win_rate_anchor", "harmful_rate", "over_refusal_rate"))


def render(run: Path, number: int = 1, **inputs: Any) -> str:
    rows = tuple(
        RoundSummary(round=i, parent=None, gate=GateState.INVALID if i else None, promoted=i == 0, num_pairs=None, seconds={}, report=None, **NO_RATES)
        for i in range(number + 1)
    )  # fmt: skip
    out = run / "rounds" / f"{number:03d}" / f"report{len(list(run.rglob('report.html')))}"
    out.parent.mkdir(parents=True, exist_ok=True)
    materialize(REPORT, out, **({"run_id": "r", "round": number, "history": rows, "seconds": {}} | EMPTY | inputs))
    return (out / "report.html").read_text(encoding="utf-8")


def test_a_page_can_be_made_from_nothing_and_from_any_single_stage(played: Played, tmp_path: Path) -> None:
    assert "START" in Page(render(tmp_path, 0)).text
    assert "NO GATE" in Page(render(tmp_path, 1)).text
    assert "NO GATE" in Page(render(tmp_path, 1, history=())).text
    for name in EMPTY:
        assert Page(render(tmp_path, 1, **{name: played.inputs[2][name]})).text
    for name in ("gate", "grades", "train"):
        without = {key: value for key, value in played.inputs[2].items() if key in EMPTY and key != name}
        assert Page(render(tmp_path, 1, **without)).text


def test_a_page_stays_below_three_megabytes_and_has_something_of_every_sample(tmp_path: Path) -> None:
    run = Run(tmp_path, num_each=900)
    inputs = run.play(0, {"candidate": Flaws()}, overrides={prompt.id: f"{i} € " * 2_000 for i, prompt in enumerate(run.prompts)})
    manifest = materialize(REPORT, run.report_dir(0), **inputs)
    page = (run.report_dir(0) / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 3_000_000
    sealed = 2 * len(SEALED)
    assert manifest.outcome.tallies[0].parts == {"shown": 2_700 - sealed, "left out for size": 0, "sealed": sealed}
    assert "more characters in grades.jsonl" in Page(page).samples[-1]["texts"][0]


def test_a_page_says_how_many_samples_it_left_out() -> None:
    cases = [case(Side.TASK, "+", texts=("word " * 100,), ask=str(i)) for i in range(9)]
    samples = samples_of(cases, max_bytes=2_500)
    assert 0 < len(samples.shown) < 9
    html = render_report(RoundData(run_id="r", run_dir="r", round=0, cases=cases, samples=samples))
    assert f"{len(samples.shown)} of 9 fit into this page; all are in grades.jsonl" in Page(html).text
    html = render_report(RoundData(run_id="r", run_dir="r", round=0, cases=cases, samples=samples, answers_files=("r/a", "r/b")))
    assert "all are in r/a and r/b ." in Page(html).text


def test_the_page_names_where_all_answers_are(played: Played) -> None:
    where = os.path.relpath(played.inputs[2]["grades"])
    where = str(played.inputs[2]["grades"]) if where.startswith("..") else where
    page = Page(played.pages[2])
    assert f"they are in {where}/grades.jsonl" in page.text
    assert page.data["answers"] == f"{where}/grades.jsonl"


def test_the_start_policy_has_categories_and_nothing_that_changed(played: Played) -> None:
    text = Page(played.pages[0]).text
    assert "What changed" not in text
    assert "By category Share of answers that are not as asked. category not as asked prompts" in text
    assert "newly bad" not in text
    assert "category newly bad fixed candidate previous anchor prompts" in Page(played.pages[2]).text


def test_a_round_whose_previous_policy_is_the_anchor_says_so_and_shows_it_once(played: Played) -> None:
    first, second = Page(played.pages[1]), Page(played.pages[2])
    told = "The previous policy of this round is the anchor (round 0), so the two are shown once."
    assert told in first.text
    assert told not in second.text
    assert "category newly bad fixed candidate previous prompts" in first.text
    assert "metric candidate previous pass rate" in first.text
    assert "win rate against anchor" not in first.text
    assert {tuple(sample["answers"]) for sample in first.samples} == {("previous", "candidate")}
    assert {tuple(sample["answers"]) for sample in second.samples} == {("anchor", "previous", "candidate")}
    assert not [sample for sample in first.samples if "anchor" in sample["why"]]


def test_tools_are_hidden_where_no_script_runs(played: Played) -> None:
    page = Page(played.pages[2])
    hidden = {attrs.get("id") for _, attrs in page.elements if "hidden" in attrs}
    assert {"samples-filters", "samples-tools"} <= hidden


@pytest.mark.parametrize(
    ("config", "titles"),
    [
        ({"nll_weight": 2.0}, ["Preference loss", "NLL of chosen"]),
        ({"nll_weight": 0.0}, ["Preference loss"]),
        ({}, ["Loss"]),
        (None, ["Loss"]),
    ],
)
def test_the_loss_that_is_drawn_is_the_one_that_its_note_is_about(
    tmp_path: Path, config: dict[str, Any] | None, titles: list[str]
) -> None:
    """With an NLL term `loss` begins far above ln 2, under a note that says it begins there."""
    weight = (config or {}).get("nll_weight", 0.5)
    rows = [{"step": step, "loss": math.log(2) + weight * 0.4, "nll": 0.4} for step in (1, 2)]
    train = tmp_path / "rounds" / "001" / "train"
    train.parent.mkdir(parents=True)

    def publish(out: Path, **_: Any) -> StageOutcome:
        write_jsonl(out / "metrics.jsonl", rows)
        return StageOutcome()

    materialize(Stage("train", 1, publish), train, **({} if config is None else {"config": config}))
    html = render(tmp_path, train=train)
    charts = [attrs["aria-label"] or "" for tag, attrs in Page(html).elements if tag == "svg" and attrs.get("class") == "chart"]
    assert [chart.split(" by ")[0] for chart in charts] == titles
    assert (f"{titles[0]} by step. loss: 0.6931 at 1" in charts[0]) is (titles[0] == "Preference loss")
    assert ("starts at ln 2" in html) is (titles[0] == "Preference loss")
