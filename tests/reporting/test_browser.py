"""The page in a real browser: it is quiet, its tools work, hostile text does nothing."""

from __future__ import annotations

import hashlib
import json
import time
from datetime import datetime
from pathlib import Path
from random import Random

import pytest
from playwright.sync_api import Browser, expect

from dpo_loop.artifacts import materialize
from dpo_loop.reporting.answers import cases_of
from dpo_loop.reporting.index import write_index
from dpo_loop.reporting.page import RoundData, render_report
from dpo_loop.reporting.samples import samples_of
from dpo_loop.reporting.stage import REPORT
from dpo_loop.types import FinishReason, Grade, GradeRow, Message, Prompt, Side
from tests.reporting.browser import CARD, NEEDS_BROWSER, Watched
from tests.reporting.cases import case, full_gate
from tests.reporting.conftest import HOSTILE, Played
from tests.reporting.rounds import Flaws, Run

pytestmark = NEEDS_BROWSER


@pytest.mark.parametrize("number", range(4))
def test_a_page_logs_nothing_and_asks_nobody(played: Played, watched: Watched, number: int) -> None:
    page = watched.open(played.report(number))
    expect(page.locator("#samples-count")).to_have_text("20 of 596 samples shown")
    assert watched.asked == [played.report(number).as_uri()]


def test_the_index_leads_to_every_report(played: Played, run_path: Path, browser: Browser) -> None:
    write_index(run_path / "index.html", run_id="demo", history=tuple(played.run.history))
    watched = Watched(browser)
    page = watched.open(run_path / "index.html")
    page.get_by_role("link", name="round 2").click()
    expect(page).to_have_title("demo round 2: FAIL")
    page.get_by_role("link", name="All rounds").click()
    expect(page).to_have_title("demo: 4 rounds")
    assert not watched.said
    watched.context.close()


def test_filters_and_search_narrow_the_samples(played: Played, watched: Watched) -> None:
    page = watched.open(played.report(3))
    page.locator("#filter-side").select_option("benign")
    page.locator("#filter-change").select_option("reworded")
    sides = page.locator(f"{CARD} .head .chip:nth-child(2)").all_text_contents()
    assert sides
    assert set(sides) == {"benign"}
    page.locator("#filter-side").select_option("")
    page.locator("#filter-change").select_option("")
    page.locator("#filter-category").select_option("S13")
    expect(page.locator("#samples-count")).to_have_text("20 of 28 samples shown")
    page.get_by_role("button", name="Show more").click()
    expect(page.locator(CARD)).to_have_count(28)
    page.locator("#filter-category").select_option("")
    page.get_by_label("Text in prompt").fill("(TASK 17)")
    expect(page.locator(CARD)).to_have_count(1)
    expect(page.locator(f"{CARD} .prompt")).to_contain_text("(task 17)")
    page.get_by_label("Text in prompt").fill("no such words anywhere")
    expect(page.locator("#samples-count")).to_have_text("No sample matches.")


def test_the_counts_of_the_banner_lead_to_their_samples(played: Played, watched: Watched) -> None:
    page = watched.open(played.report(2))
    link = page.get_by_role("link", name="newly harmful")
    number = int(link.inner_text().split()[0])
    link.click()
    sealed = sum(
        played.run.lot[prompt.id] < 0.35
        for prompt in played.run.prompts
        if prompt.tags.get("sealed") and prompt.side is Side.HARMFUL
    )
    expect(page.locator("#samples-count")).to_contain_text(f"of {number - sealed} samples")
    assert set(page.locator(f"{CARD} .head .chip:nth-child(2)").all_text_contents()) == {"harmful"}


def test_a_count_of_the_banner_leads_there_again_and_back_clears_the_filters(played: Played, watched: Watched) -> None:
    """A link that is followed twice changes no hash, so that the second time nothing happened."""
    page = watched.open(played.report(2))
    link, count = page.get_by_role("link", name="newly harmful"), page.locator("#samples-count")
    link.click()
    shown = count.inner_text()
    assert "of 596" not in shown
    page.locator("#filter-change").select_option("")
    page.locator("#filter-side").select_option("")
    expect(count).to_contain_text("of 596")
    link.click()
    expect(count).to_have_text(shown)
    expect(page.locator("#filter-side")).to_have_value("harmful")
    page.get_by_role("navigation").get_by_role("link", name="Checks").click()
    expect(count).to_have_text(shown)
    page.go_back()
    expect(count).to_have_text(shown)
    page.go_back()
    expect(count).to_contain_text("of 596")
    expect(page.locator("#filter-side")).to_have_value("")


def test_without_a_script_no_tool_is_offered(played: Played, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(played.report(3).as_uri())
    expect(page.locator(".filters")).to_be_hidden()
    expect(page.locator(".tools")).to_be_hidden()
    assert page.locator("noscript").count() == 1
    context.close()


def test_a_long_category_widens_neither_table_nor_filter(tmp_path: Path, browser: Browser) -> None:
    cases = [case(Side.TASK, "++-", category="category_" * 30 + str(i), ask=str(i)) for i in range(2)]
    data = RoundData(run_id="run_" * 60, run_dir="r", round=2, gate=full_gate(), cases=cases, samples=samples_of(cases))
    (tmp_path / "report.html").write_text(render_report(data), encoding="utf-8")
    watched = Watched(browser, width=390)
    page = watched.open(tmp_path / "report.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for column in ("newly bad", "fixed"):
        box = page.locator(".categories th", has_text=column).bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= 390
    watched.context.close()


def test_the_keyboard_moves_searches_and_opens(played: Played, watched: Watched) -> None:
    page = watched.open(played.report(3))
    cards = page.locator(CARD)
    for key, focused in (("j", 0), ("j", 1), ("j", 2), ("k", 1)):
        page.keyboard.press(key)
        expect(cards.nth(focused)).to_be_focused()
    assert cards.nth(1).evaluate("box => getComputedStyle(box).outlineStyle") == "solid"
    page.keyboard.press("k")
    assert cards.nth(0).locator(".written").count() == 1  # the prompt alone
    page.keyboard.press("o")
    assert cards.nth(0).locator(".answers .written").count() >= 1
    page.keyboard.press("?")
    expect(page.locator("#samples-keys")).to_have_attribute("open", "")
    page.keyboard.press("/")
    expect(page.get_by_label("Text in prompt")).to_be_focused()
    page.keyboard.type("jk")
    expect(page.get_by_label("Text in prompt")).to_have_value("jk")
    page.keyboard.press("Escape")
    expect(page.get_by_label("Text in prompt")).not_to_be_focused()


def test_the_keyboard_goes_on_behind_the_first_page(played: Played, watched: Watched) -> None:
    page = watched.open(played.report(3))
    for _ in range(25):
        page.keyboard.press("j")
    expect(page.locator(CARD).nth(24)).to_be_focused()


def test_a_permalink_leads_to_its_sample_whatever_is_filtered(played: Played, watched: Watched) -> None:
    last = played.run.prompts[17].id
    page = watched.open(played.report(3), f"#p-{last}")
    expect(page.locator(f"#p-{last}")).to_be_focused()
    expect(page.locator(f"#p-{last}")).to_be_in_viewport()
    page.locator("#filter-side").select_option("harmful")
    expect(page.locator(f"#p-{last}")).to_have_count(0)
    page.evaluate(f"location.hash = ''; location.hash = '#p-{last}'")
    expect(page.locator(f"#p-{last}")).to_be_focused()


def test_labels_are_kept_and_download_as_a_file(played: Played, watched: Watched) -> None:
    page = watched.open(played.report(3))
    cards = page.locator(CARD)
    expect(page.get_by_role("button", name="Download labels")).to_be_disabled()
    cards.nth(0).get_by_role("button", name="agree").click()
    cards.nth(1).get_by_role("button", name="should be refusal").click()
    cards.nth(2).get_by_role("button", name="agree").click()
    cards.nth(2).get_by_role("button", name="agree").click()  # taken back
    expect(cards.nth(1).get_by_role("button", name="should be refusal")).to_have_attribute("aria-pressed", "true")
    ids = [str(cards.nth(i).get_attribute("id"))[2:] for i in range(2)]
    page.reload()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download 2 labels").click()
    assert waiting.value.suggested_filename == "labels.json"
    file = json.loads(Path(waiting.value.path()).read_text())
    assert (file["run_id"], file["round"], len(file["gate_report_sha256"])) == ("demo", 3, 64)
    assert "for their own records" in file["about"]
    first, second = sorted(file["labels"], key=lambda row: ids.index(row["prompt_id"]))
    assert (first["prompt_id"], first["label"]) == (ids[0], first["judged"])
    assert (second["prompt_id"], second["label"], second["policy"], second["side"]) == (ids[1], "refusal", "candidate", "harmful")
    prompts = {prompt.id: prompt.text for prompt in played.run.prompts}
    for row in file["labels"]:
        assert row["prompt_sha256"] == hashlib.sha256(prompts[row["prompt_id"]].encode()).hexdigest()
        assert row["response_sha256"] == hashlib.sha256(row["response"].encode()).hexdigest()
        assert abs(datetime.fromisoformat(row["labelled_at"]).timestamp() - time.time()) < 60
    page.locator("#filter-mark").select_option("labelled")
    expect(cards).to_have_count(2)


def test_a_label_of_a_redacted_answer_holds_nothing_of_it(tmp_path: Path, watched: Watched) -> None:
    cases = [case(Side.HARMFUL, "rrc", texts=("no", "no", "a secret"))]
    data = RoundData(
        run_id="r", run_dir="r", round=2, gate=full_gate(), cases=cases, samples=samples_of(cases), answers_files=("r/g.jsonl",)
    )
    (tmp_path / "report.html").write_text(render_report(data), encoding="utf-8")
    page = watched.open(tmp_path / "report.html")
    expect(page.locator(".answer.candidate")).to_contain_text("redacted, 8 characters; read r/g.jsonl")
    page.get_by_role("button", name="agree").click()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download 1 labels").click()
    [row] = json.loads(Path(waiting.value.path()).read_text())["labels"]
    assert set(row) == {"prompt_id", "prompt_sha256", "policy", "side", "category", "judged", "label", "labelled_at"}


def test_the_word_diff_loses_no_word(played: Played, watched: Watched) -> None:
    page = watched.open(played.report(3))
    rng = Random(3)
    for _ in range(50):
        before, after = (" ".join(rng.choice("abcd\n") for _ in range(rng.randint(0, 12))) for _ in range(2))
        runs = page.evaluate("([before, after]) => wordDiff(before, after)", [before, after])
        if runs is not None:
            assert ["".join(words for _, words in side) for side in runs] == [before, after]
            kept = [[word for same, words in side if same for word in words.split()] for side in runs]
            assert kept[0] == kept[1]
    assert page.evaluate("wordDiff('one two three', 'one 2 three')") == [
        [[True, "one "], [False, "two"], [True, " three"]],
        [[True, "one "], [False, "2"], [True, " three"]],
    ]
    assert page.evaluate("wordDiff('all other words', 'nothing in common here')") is None
    assert page.locator(f"{CARD} .candidate ins").count() > 0
    assert page.locator(f"{CARD} .previous del").count() > 0


def test_hostile_text_does_nothing(tmp_path: Path, watched: Watched) -> None:
    texts = (HOSTILE, "</script><!--<script>", "long " * 40_000, "\x00\x1b[31m\u202e\u2066", "\ud800 alone", "__proto__", "")
    prompts = [
        Prompt.build((Message(role="user", content=f"{HOSTILE} {i}"),), source="t", tags={"side": "benign"})
        for i in range(len(texts))
    ]
    rows = [
        GradeRow.model_construct(prompt_id=prompt.id, side=Side.BENIGN, category=HOSTILE, policy=policy, response=text + suffix, num_tokens=1,
                                 finish_reason=FinishReason.STOP, grade=Grade.COMPLIANCE, rationale=HOSTILE, no_answer="", cluster_id="")
        for prompt, text in zip(prompts, texts, strict=True)
        for policy, suffix in (("previous", " before"), ("candidate", ""))
    ]  # fmt: skip
    cases = cases_of(prompts, rows)
    data = RoundData(run_id=HOSTILE, run_dir=HOSTILE, round=1, cases=cases, samples=samples_of(cases))
    (tmp_path / "report.html").write_text(render_report(data), encoding="utf-8")
    page = watched.open(tmp_path / "report.html")
    expect(page.locator(CARD)).to_have_count(len(texts))
    assert "owned" not in page.title().split("<script>")[0]
    assert page.evaluate("document.title.startsWith(\"<script>document.title='owned'\")")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert page.get_by_text("{{ 7*7 }}").count() > 0
    shown = page.locator("main").inner_text()
    assert not set(shown) & set("\x00\x1b\u202e\u2066")
    assert "⟨U+D800⟩ alone" in shown
    assert "more characters in grades.jsonl" in shown
    assert page.evaluate("({}).owned === undefined")


def test_two_thousand_samples_of_three_policies_open_at_once(tmp_path: Path, watched: Watched) -> None:
    """The target is 2 s; a shared machine gets more here, and the real figure is printed."""
    run = Run(tmp_path / "big", num_each=667)
    rng, words = Random(5), Path(__file__).read_text().split()
    long = {prompt.id: " ".join(rng.choices(words, k=150)) for prompt in run.prompts}
    good = Flaws(0.3, 0.01, 0.10)
    run.play(0, {"candidate": good})
    inputs = run.play(1, {"candidate": Flaws(0.31, 0.03, 0.1), "previous": good, "anchor": good}, overrides=long)
    started = time.monotonic()
    materialize(REPORT, run.report_dir(1), **inputs)
    rendered_s = time.monotonic() - started
    path = run.report_dir(1) / "report.html"
    size = path.stat().st_size
    assert size <= 3_000_000
    started = time.monotonic()
    page = watched.open(path)
    expect(page.locator("#samples-count")).to_contain_text("samples shown")
    interactive_s = time.monotonic() - started
    started = time.monotonic()
    page.get_by_label("Text in prompt").fill("lever")
    expect(page.locator(CARD).first).to_be_visible()
    found_s = time.monotonic() - started
    print(
        f"\n{size / 1e6:.2f} MB, made in {rendered_s:.2f} s, interactive after {interactive_s:.2f} s, a search takes {found_s:.2f} s"
    )
    assert interactive_s < 10
    assert found_s < 10
