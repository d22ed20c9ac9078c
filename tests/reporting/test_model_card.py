"""The card says what the gate said, in Markdown that hostile text cannot leave and YAML that the hub reads."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dpo_loop.config import LoraShape, SftConfig, SigmoidLoss, TrainingConfig
from dpo_loop.reporting.model_card import Base, CardFacts, Sft, TrainedRound, code, markdown, render_card, rule_of
from dpo_loop.reporting.text import visible
from dpo_loop.types import CheckResult, GateReport, GateState, HumanDecision, JudgeCanary, PolicyRef, PromptSet, RoundSummary

HOSTILE = "<script>alert(1)</script> | a | **b** [c](javascript:d) `e` {{ 7*7 }} {% raw %}\n\n# f\n---\nlicense: mit\u202e @all http://g www.h $i$"
BASE = PolicyRef(base="org/base", revision="abc123", base_sha256="a" * 64)
CANDIDATE = BASE.model_copy(update={"adapter": "x", "adapter_sha256": "c" * 64})


def summary(number: int, **changes: Any) -> RoundSummary:
    values = {
        "round": number,
        "parent": "k" * 16 if number else None,
        "gate": GateState.PASS if number else None,
        "promoted": True,
        "num_pairs": 512 if number else None,
        "pass_rate": 0.5 + 0.05 * number,
        "win_rate_previous": 0.61 if number else None,
        "win_rate_anchor": 0.66 if number else None,
        "harmful_rate": 0.02,
        "over_refusal_rate": 0.1,
        "degenerate_rate": 0.0,
        "seconds": {},
        "report": None,
    }
    return RoundSummary.model_validate(values | changes)


def check(**changes: Any) -> CheckResult:
    values = {
        "id": "harm-previous",
        "metric": "harmful_rate",
        "rule": "non_inferior",
        "vs": "previous",
        "num_prompts": 210,
        "value": 0.0238,
        "reference": 0.0190,
        "delta": 0.0048,
        "ci_low": -0.011,
        "ci_high": 0.0231,
        "margin": 0.05,
        "state": GateState.PASS,
        "why": "fine",
    }
    return CheckResult.model_validate(values | changes)


def gate(state: GateState = GateState.PASS, **changes: Any) -> GateReport:
    values: dict[str, Any] = {
        "run_id": "demo",
        "round": 2,
        "state": state,
        "reasons": ("every check holds",),
        "candidate": CANDIDATE,
        "previous": BASE,
        "anchor": BASE,
        "validity": ({"id": "coverage", "state": "PASS", "why": "all prompts answered"},),
        "checks": (check(),),
        "rates": {name: {"pass_rate": 0.6, "harmful_rate": 0.0238, "num_tasks": 400} for name in ("candidate", "previous", "anchor")},
        "created_at": "2026-01-02T03:04:05+00:00",
        "prompt_sets": (PromptSet(source="core-v1", revision="1", licence="CC0-1.0", num_prompts=420),),
        "judge_canary": JudgeCanary(grader="guard", num_rows=60, num_right=58, num_ungraded=1, accuracy=0.97, kappa=0.9, sensitivity=0.95, specificity=1.0),
    }  # fmt: skip
    return GateReport.model_validate(values | changes)


def facts(**changes: Any) -> CardFacts:
    values: dict[str, Any] = {
        "run_id": "demo",
        "round": 2,
        "what": "adapter",
        "base": Base(name="org/base", hub_id="org/base"),
        "policy": CANDIDATE,
        "licence": "apache-2.0",
        "blessed": True,
        "training": TrainingConfig(loss=SigmoidLoss(kind="sigmoid", beta=0.1)),
        "judge": "openai gpt-x",
        "safety_judge": "rubric claude-x",
        "lineage": tuple(summary(number) for number in range(3)),
        "trained": (
            TrainedRound(
                1, 500, {"steps": 8, "weights_of_step": 6, "first_loss": 0.6931, "last_loss": 0.61, "last_accuracy": 0.75}
            ),
        ),
        "gate": gate(),
        "report_sha256": "e" * 64,
    }
    return CardFacts(**(values | changes))


def rendered(text: str) -> str:
    """As HTML, by a renderer that lets HTML through."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(text).text)


def test_the_hub_reads_base_licence_tags_and_results(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(render_card(facts()))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name, data.license) == ("org/base", "peft", "apache-2.0")
    assert {"dpo", "dpo-loop", "preference-optimization", "lora"} <= set(data.tags)
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"pass_rate": 0.6, "harmful_rate": 0.0238, "win_rate_previous": 0.61, "win_rate_anchor": 0.66}
    assert data.model_name == "demo-round-2"
    merged = ModelCard(render_card(facts(what="merged"))).data
    assert (merged.library_name, "lora" in merged.tags, merged.to_dict()["base_model_relation"]) == (
        "transformers",
        False,
        "finetune",
    )


def test_the_body_says_lineage_training_verdict_checks_judges_sets_and_limits() -> None:
    text = render_card(facts())
    for said in (
        "| 2 | 512 | PASS | promoted | 60.0 % | 2.0 % | 10.0 % | 61.0 % |",
        "sigmoid loss, beta 0.1;",
        "learning rate 5e-06",
        "| 1 | 500 | 8 | 0.6931 | 6 | 0.61 | 75.0 % | – | – |",
        "**PASS**, decided at 2026-01-02",
        "| harm-previous | harmful compliance no worse than previous by more than 5.0 points | 210 | 2.4 % | 1.9 % | +0.5 | −1.1 to +2.3 | PASS |",
        "each of its ends is a one-sided 95 % confidence limit",
        "| coverage | PASS | all prompts answered |",
        "58 of 60 known answers graded right",
        "preference judge: openai gpt-x",
        "safety judge: rubric claude-x",
        "prompt set core-v1, revision 1: 420 prompts, licence CC0-1.0",
        f"`{'e' * 64}`",
        "single-turn English",
        "heuristic margins",
        "is not a certification",
    ):
        assert said in text, said
    assert "Warning" not in text
    assert "num tasks" not in text, "counts are no rates"


def test_every_table_has_as_many_cells_in_a_row_as_in_its_head() -> None:
    page = rendered(
        render_card(facts(gate=gate(checks=(check(), check(id="x", delta=None, ci_low=None, vs=None, rule="ceiling")))))
    )
    tables = re.findall(r"<table>.*?</table>", page, re.DOTALL)
    assert len(tables) == 5
    for table in tables:
        widths = {row.count("<td") + row.count("<th") for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)}
        assert len(widths) == 1
        assert "<td></td>" not in table


def test_a_check_is_a_sentence_with_its_margin_and_one_sign_for_all_figures() -> None:
    """It said "harmful compliance no worse than previous" and, apart from it, "5.0"; an interval had a hyphen where the change had a minus."""

    def row(**changes: Any) -> str:
        text = render_card(facts(gate=gate(checks=(check(id="x", **changes),)), alpha=0.025))
        assert "a one-sided 97.5 % confidence limit" in text
        [found] = [line for line in text.splitlines() if line.startswith("| x |")]
        return found

    alone = {"delta": None, "reference": None, "vs": None}
    assert row(rule="ceiling", metric="degenerate_rate", margin=0.03, value=0.001, ci_low=0.0, ci_high=0.0033, **alone) == (
        "| x | degenerate output stays below 3.0 % | 210 | 0.1 % | – | – | 0.0 to 0.3 % | PASS |"
    )
    assert "| win rate against previous stays above 45.0 % |" in row(
        rule="floor", metric="win_rate", margin=0.45, delta=None, reference=None
    )
    assert "| pass rate no worse than anchor by more than 5.0 points | 210 | 2.4 % | 1.9 % | −7.2 | −9.0 to −1.0 |" in row(
        metric="pass_rate", vs="anchor", delta=-0.072, ci_low=-0.09, ci_high=-0.01
    )
    ppl = {"metric": "perplexity", "task": "held-out", "value": 12.3456, "reference": 11.5, "delta": 0.031, "ci_high": 0.052}
    assert (
        "| perplexity of held-out no worse than previous by more than 5.0 % | 210 | 12.35 | 11.5 | +3.1 % | −1.1 to +5.2 % |"
        in row(**ppl)
    )
    assert "| accuracy of sums no worse than previous by more than 5.0 points | 210 | 2.4 % |" in row(
        metric="accuracy", task="sums"
    )
    assert "| 2.4 %, 3 of them partial | 1.9 % |" in row(num_partial=3)
    assert "partial" not in row(num_partial=0)


def test_every_rule_is_told() -> None:
    vetoed = check(rule="veto", margin=1 / 210)
    assert rule_of(vetoed) == "in no category a prompt with new harmful compliance against previous"
    assert rule_of(check(rule="veto", margin=3 / 210)) == "in no category 3 prompts with new harmful compliance against previous"
    wins = check(metric="win_rate", margin=0.1)
    assert rule_of(wins) == "win rate no worse than an even match against previous by more than 10.0 points"
    assert rule_of(check(metric="capability", task="sums")) == "capability of sums no worse than previous by more than 5.0"
    assert rule_of(check(rule="new")) == "harmful compliance new against previous 5.0 %"


def test_negative_figures_of_training_have_the_same_sign() -> None:
    text = render_card(facts(trained=(TrainedRound(1, 5, {"steps": 8, "last_margin": -0.25, "last_kl": 1e-5}),)))
    assert "| − |" not in text
    assert "| −0.25 | 1e-05 |" in text


def test_a_base_that_is_not_on_the_hub_is_in_no_metadata_and_the_card_says_how_to_load_it() -> None:
    text = render_card(facts(base=Base(name="tiny", hub_id=None)))
    assert "base_model" not in text
    assert "A LoRA adapter for `tiny`, trained with iterative" in text
    assert "`adapter_config.json` names the base by its path on the machine that made the export." in text
    assert 'PeftModel.from_pretrained(base, "THIS_FOLDER")' in text
    on_hub = render_card(facts())
    assert "AutoPeftModelForCausalLM" in on_hub
    assert "by its path" not in on_hub
    assert "How to load" not in render_card(facts(what="merged"))
    assert "base_model" not in render_card(facts(what="merged", base=Base(name="tiny", hub_id=None)))


def test_an_adapter_on_what_sft_made_is_no_adapter_of_the_model_before_it() -> None:
    sft = Sft(SftConfig(), 900, {"steps": 30, "first_loss": 2.5, "last_loss": 0.75})
    base = Base(name="org/base", hub_id="org/base", is_fine_tuned=True)
    text = render_card(facts(base=base, sft=sft))
    assert "base_model" not in text
    assert "A LoRA adapter for a model fine-tuned from `org/base` (SFT), trained with" in text
    assert "That model is not shipped here" in text
    assert "use `--what merged`" in text
    assert "bring the run's `rounds/000/seed/model` along" in text
    assert "- base: what round 0 made by SFT from `org/base`, revision" in text
    merged = render_card(facts(base=base, sft=sft, what="merged"))
    assert "A model, made from `org/base` by supervised fine-tuning (SFT) and then trained with iterative" in merged
    assert ModelCard(merged).data.base_model == "org/base"
    for each in (text, merged):
        assert (
            "Round 0: supervised fine-tuning (SFT) of all weights on 900 demonstrations; learning rate 0.0001, linear; 1 epoch, 64 examples a step; "
            "loss from 2.5 to 0.75 in 30 steps." in each
        )
        assert "Then DPO on LoRA adapters" in each
    assert "It was made by supervised fine-tuning (SFT)." in render_card(
        facts(base=base, sft=sft, what="merged", round=0, gate=None)
    )


def test_sft_of_an_adapter_leaves_the_base_what_it_is() -> None:
    text = render_card(facts(sft=Sft(SftConfig(lora=LoraShape(rank=4)), None, {})))
    assert ModelCard(text).data.base_model == "org/base"
    assert "A LoRA adapter for `org/base`, trained with" in text
    assert (
        "supervised fine-tuning (SFT) of a LoRA adapter of rank 4 on demonstrations; learning rate 0.0001, linear; 1 epoch" in text
    )
    assert "SFT" not in render_card(facts())


def test_what_people_wrote_stays_text() -> None:
    decision = HumanDecision(decision="approve", reviewer=HOSTILE, reason=HOSTILE, report_sha256="e" * 64, decided_at="now")
    hostile = facts(
        base=Base(name=HOSTILE, hub_id=HOSTILE),
        licence=HOSTILE,
        judge=HOSTILE,
        safety_judge=HOSTILE,
        blessed=False,
        decision=decision,
        forced={"reviewer": HOSTILE, "reason": HOSTILE, "at": "now"},
        lineage=(summary(0), summary(1, accepted_judge_risk=HOSTILE)),
        gate=gate(
            reasons=(HOSTILE,),
            checks=(check(id=HOSTILE, waived_by=HOSTILE),),
            validity=({"id": HOSTILE, "state": "PASS", "why": HOSTILE},),
            prompt_sets=(PromptSet(source=HOSTILE, revision=HOSTILE, licence=HOSTILE, num_prompts=1),),
        ),
    )
    text, plain = (
        render_card(hostile),
        render_card(facts(blessed=False, forced={"reviewer": "a", "reason": "b", "at": "now"}, decision=decision)),
    )
    assert ModelCard(text).data.license == HOSTILE, "in YAML it is a value"
    assert ModelCard(text).data.base_model == HOSTILE
    page = rendered(text)
    tags = set(re.findall(r"<(\w+)", page))
    assert tags == set(re.findall(r"<(\w+)", rendered(plain)))
    assert "script" not in tags
    assert not re.search(r"<(a|img)\b", page)
    assert page.count("<h1>") == 1
    assert "49" not in page.replace("2026", "")
    assert "{{ 7*7 }}" in html.unescape(page)
    assert "\u202e" not in ModelCard(text).text
    assert len(re.findall(r"<tr>", page)) == len(re.findall(r"<tr>", rendered(plain))) - 1, "one round less, no row more"


@given(st.text(alphabet=st.sampled_from("a1 \n\t\\`*_[]()<>#|~$&@!-+=.:/wW{}%\"'\u202e"), max_size=30))
def test_any_text_is_rendered_as_itself(text: str) -> None:
    shown = re.sub(r"\s+", " ", visible(text))
    for before in ("x ", "- "):
        [line] = [token for token in MarkdownIt().enable("table").parse(f"{before}{markdown(text)} y") if token.type == "inline"]
        parts = line.children or []
        assert {part.type for part in parts} <= {"text", "text_special"}
        assert "".join(part.content for part in parts) == (f"x {shown} y" if before == "x " else f"{shown} y".lstrip())
    [row] = re.findall(
        r"<tbody>.*</tbody>", MarkdownIt().enable("table").render(f"|a|b|\n|-|-|\n|{markdown(text)}|{code(text)}|\n"), re.DOTALL
    )
    assert row.count("<td>") == 2


def test_links_and_mentions_that_only_the_hub_makes_are_broken_up() -> None:
    """GitHub's and the hub's Markdown link what CommonMark leaves alone."""
    assert markdown("see http://a.b, www.c.d, me@e.f") == "see http:&#47;/a.b, www&#46;c.d, me&#64;e.f"


def test_a_forced_export_says_so_before_anything_else() -> None:
    forced = {"reviewer": "ann", "reason": "red team needs it", "at": "2026-01-02"}
    text = render_card(facts(blessed=False, forced=forced, gate=gate(GateState.FAIL)))
    first = ModelCard(text).text.strip().splitlines()[2]
    assert first.startswith("> **Warning: exported without the blessing of the safety gate.** Its gate said FAIL. ann forced")
    assert first.endswith("because: red team needs it")
    assert "No gate has decided about it" in render_card(facts(blessed=False, forced=forced, gate=None, report_sha256=None))


def test_the_card_of_a_candidate_that_was_not_promoted_says_so() -> None:
    lineage = (summary(0), summary(1), summary(2, gate=GateState.FAIL, promoted=False))
    text = render_card(
        facts(blessed=False, lineage=lineage, gate=gate(GateState.FAIL, reasons=("harm rose",), anchor_round=1, topped_up=True))
    )
    assert "> **Not blessed: this round was not promoted, and what it made is not to be shipped.** Its gate said FAIL." in text
    assert "| 2 | 512 | FAIL | not promoted |" in text
    assert "the policy of round 1. The reserve of prompts was asked too" in text
    assert "- harm rose" in text


def test_a_person_s_decision_is_told() -> None:
    decision = HumanDecision(
        decision="approve", reviewer="ann", reason="read 40 samples", report_sha256="e" * 64, decided_at="2026-01-03"
    )
    lineage = (summary(0), summary(1, gate=GateState.NEEDS_REVIEW))
    text = render_card(facts(decision=decision, lineage=lineage, gate=gate(GateState.NEEDS_REVIEW)))
    assert "A person decided: **approve** by ann at 2026-01-03, because: read 40 samples" in text
    assert "| NEEDS\\_REVIEW | promoted, by a person |" in text


def test_the_start_policy_has_rates_of_its_own_and_no_gate() -> None:
    text = render_card(facts(round=0, what="merged", policy=BASE, lineage=(summary(0),), trained=(), gate=None, report_sha256=None))
    assert "The start policy has no gate" in text
    assert "| pass rate | 50.0 % |" in text
    assert {result.metric_type for result in ModelCard(text).data.eval_results} == {
        "pass_rate",
        "harmful_rate",
        "over_refusal_rate",
        "degenerate_rate",
    }


def test_a_policy_without_a_single_rate_has_no_model_index() -> None:
    nothing = summary(0, pass_rate=None, harmful_rate=None, over_refusal_rate=None, degenerate_rate=None)
    text = render_card(facts(round=0, policy=BASE, lineage=(nothing,), trained=(), gate=None))
    assert "model-index" not in text


def test_pairs_have_no_results_of_a_model() -> None:
    text = render_card(facts(what="pairs", rounds_of_pairs=(1, 2), figures={"num_pairs": 900}))
    data = ModelCard(text).data
    assert (data.eval_results, data.base_model, data.library_name) == (None, None, None)
    assert "This is the licence of the base model, which wrote the answers, and so is the field `license` above." in text
    assert "by their source:\n\n- not recorded\n" in text
    pool = PromptSet(source="org/prompts/train", revision="abc", licence="CC-BY-4.0", num_prompts=9)
    told = render_card(facts(what="pairs", rounds_of_pairs=(1, 2), pool=pool))
    assert "- org/prompts/train, revision abc: licence CC-BY-4.0\n" in told
    assert "licence not recorded" in render_card(facts(what="pairs", pool=pool.model_copy(update={"licence": ""})))
    assert "prompts have terms of their own" not in render_card(facts())
    assert "Preference pairs of rounds 1, 2 of run demo" in text
    assert "900 pairs." in text


def test_an_unknown_licence_points_to_the_base_model() -> None:
    text = render_card(facts(licence="other"))
    assert ModelCard(text).data.license == "other"
    assert "license_name: see-the-base-model" in text
    assert "Other: see the base model." in text


def test_a_merge_tells_how_it_was_checked() -> None:
    figures = {"num_tokens": 400, "num_sequences": 8, "merge_difference": 2e-6, "adapter_effect": 3.5, "stored_dtype": "bfloat16", "stored_difference": 0.04, "canary_distance": 1e-7}  # fmt: skip
    text = render_card(facts(what="merged", figures=figures))
    assert (
        "Merged once, in float32, from the base. Over 400 tokens of 8 known sequences its logits differ from those of base and adapter by at most "
        "2e-06, where the adapter changes them by up to 3.5; as stored, in bfloat16, by at most 0.04. Its log-probs are those that training left "
        "behind to 1e-07 nats a token." in text
    )
    assert "behind to" not in render_card(facts(what="merged", figures=figures | {"canary_distance": None}))


@pytest.mark.parametrize(
    ("text", "shown"), [("a", "`a`"), ("a`b", "`` a`b ``"), ("``", "``` `` ```"), ("a|b", "`a¦b`"), ("a\nb", "`a b`")]
)
def test_code_keeps_its_fence(text: str, shown: str) -> None:
    assert code(text) == shown
