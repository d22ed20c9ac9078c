"""Which judgements become pairs, and that every prompt is counted once whatever happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_loop.artifacts import materialize, read_manifest
from dpo_loop.config import PairingConfig
from dpo_loop.errors import CorruptArtifactError, NoPairsError
from dpo_loop.exchange import DROPPED, JUDGEMENTS, PAIRS, PROMPTS, completions_file, read_pairs
from dpo_loop.files import write_jsonl
from dpo_loop.pairing.stage import PAIR, Drop, Dropped, pair_all, why_not
from dpo_loop.types import (
    Completion,
    FinishReason,
    Message,
    PreferencePair,
    Prompt,
    PromptJudgement,
    Verdict,
    VerdictKind,
)


def prompt_of(number: int) -> Prompt:
    return Prompt.build(
        (Message(role="system", content="Be brief."), Message(role="user", content=f"Question {number}")), source="t"
    )


def completion(
    prompt: Prompt, name: str, *, text: str = "", tokens: int = 5, finish: FinishReason = FinishReason.STOP
) -> Completion:
    return Completion(
        id=f"{prompt.id}-{name}",
        prompt_id=prompt.id,
        k=0,
        text=text or f"answer {name}",
        prompt_token_ids=(1, 2, 3),
        token_ids=(*tuple(range(10, 10 + tokens - 1)), ord(name)) if tokens else (),
        finish_reason=finish,
        logprob=-1.0,
        policy_key="p",
        seed=0,
    )


def judgement(prompt: Prompt, kind: VerdictKind = VerdictKind.WINNER, *, winner: str = "a", margin: float = 1.0) -> PromptJudgement:
    a_id, b_id = f"{prompt.id}-a", f"{prompt.id}-b"
    verdict = Verdict(
        prompt_id=prompt.id,
        a_id=a_id,
        b_id=b_id,
        kind=kind,
        p_a=None if kind is VerdictKind.UNDECIDED else 0.5,
        winner_id=f"{prompt.id}-{winner}" if kind is VerdictKind.WINNER else None,
        margin=margin,
        ballot_keys=("k1", "k2"),
    )
    return PromptJudgement(prompt_id=prompt.id, best_id=a_id, worst_id=b_id, verdict=verdict)


def pair(
    run: Path, judgements: list[PromptJudgement], answers: list[Completion], prompts: list[Prompt], **config: Any
) -> tuple[list[PreferencePair], list[dict[str, Any]], dict[str, int]]:
    for name in ("prompts", "generate", "judge"):
        (run / name).mkdir(parents=True, exist_ok=True)
    write_jsonl(run / "prompts" / PROMPTS, prompts)
    write_jsonl(run / "generate" / completions_file(0), answers)
    write_jsonl(run / "judge" / JUDGEMENTS, judgements)
    inputs = {"prompts": run / "prompts", "completions": run / "generate", "judgements": run / "judge"}
    materialize(PAIR, run / "pair", config=PairingConfig(**config), **inputs)
    dropped = [json.loads(line) for line in (run / "pair" / DROPPED).read_text().splitlines()]
    manifest = read_manifest(run / "pair")
    assert manifest is not None
    return list(read_pairs(run / "pair")), dropped, manifest.outcome.tallies[0].parts


def test_a_clear_winner_becomes_a_pair_with_the_sampled_token_ids(tmp_path: Path) -> None:
    prompt = prompt_of(0)
    answers = [completion(prompt, "a"), completion(prompt, "b", tokens=7)]
    [made], dropped, parts = pair(tmp_path, [judgement(prompt, winner="b")], answers, [prompt])
    assert made.prompt == prompt.messages
    assert made.chosen == (Message(role="assistant", content="answer b"),)
    assert made.rejected == (Message(role="assistant", content="answer a"),)
    assert (made.chosen_token_ids, made.rejected_token_ids) == (answers[1].token_ids, answers[0].token_ids)
    assert (made.prompt_token_ids, made.margin, made.ballot_keys) == ((1, 2, 3), 1.0, ("k1", "k2"))
    assert dropped == []
    assert parts["pairs"] == 1


@pytest.mark.parametrize("kind", [kind for kind in VerdictKind if kind is not VerdictKind.WINNER])
def test_every_other_verdict_is_dropped_under_its_name(tmp_path: Path, kind: VerdictKind) -> None:
    good, bad = prompt_of(0), prompt_of(1)
    answers = [completion(p, name) for p in (good, bad) for name in "ab"]
    made, dropped, parts = pair(tmp_path, [judgement(good), judgement(bad, kind)], answers, [good, bad])
    assert [row.prompt_id for row in made] == [good.id]
    assert [(row["prompt_id"], row["reason"]) for row in dropped] == [(bad.id, kind.value)]
    assert parts[kind.value] == parts["pairs"] == 1


STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.mark.parametrize(
    ("changes", "config", "reason"),
    [
        ({}, {}, None),
        ({"margin": 0.19}, {}, Drop.LOW_MARGIN),
        ({"margin": 0.2}, {}, None),
        ({"a": {"text": " \n"}}, {}, Drop.EMPTY),
        ({"b": {"tokens": 0}}, {}, Drop.EMPTY),
        ({"a": {"text": "same"}, "b": {"text": "same "}}, {}, Drop.IDENTICAL),
        ({"a": {"finish": LENGTH}}, {}, Drop.TRUNCATED),
        ({"b": {"finish": LENGTH}}, {}, Drop.TRUNCATED),
        ({"b": {"finish": LENGTH}}, {"drop_truncated": False}, None),
        ({"a": {"tokens": 20}}, {}, None),
        ({"a": {"tokens": 21}}, {}, Drop.LENGTH_RATIO),
        ({"b": {"tokens": 21}}, {}, Drop.LENGTH_RATIO),
        ({"b": {"tokens": 21}}, {"max_length_ratio": 5.0}, None),
    ],
)  # fmt: skip
def test_the_filters(changes: dict[str, Any], config: dict[str, Any], reason: Drop | None) -> None:
    prompt = prompt_of(0)
    chosen, rejected = (completion(prompt, name, **changes.get(name, {})) for name in "ab")
    assert why_not(chosen, rejected, changes.get("margin", 1.0), PairingConfig(**config)) == reason


def test_answers_with_the_same_token_ids_are_identical_whatever_their_text() -> None:
    prompt = prompt_of(0)
    one = completion(prompt, "a")
    other = one.model_copy(update={"id": "other", "text": "decoded otherwise"})
    assert why_not(one, other, 1.0, PairingConfig()) is Drop.IDENTICAL


def test_too_few_pairs_end_the_round_with_all_counts_and_a_way_out(tmp_path: Path) -> None:
    prompts = [prompt_of(number) for number in range(5)]
    kinds = [VerdictKind.WINNER, VerdictKind.TIE, VerdictKind.TIE, VerdictKind.UNDECIDED, VerdictKind.INCONSISTENT]
    judgements = [judgement(prompt, kind) for prompt, kind in zip(prompts, kinds, strict=True)]
    answers = [completion(p, name) for p in prompts for name in "ab"]
    with pytest.raises(NoPairsError) as caught:
        pair(tmp_path, judgements, answers, prompts, min_pairs=2)
    message = str(caught.value)
    assert "1 of 5 prompts gave a preference pair; pairing.min_pairs is 2" in message
    assert "undecided 1, inconsistent 1, tie 2" in message
    assert "(tie)" in message
    assert caught.value.exit_code == 13
    assert not (tmp_path / "pair").exists()


def test_no_prompt_at_all_is_no_pair(tmp_path: Path) -> None:
    with pytest.raises(NoPairsError, match="0 of 0"):
        pair(tmp_path, [], [], [])


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    prompts = [prompt_of(number) for number in range(4)]
    judgements = [judgement(p, margin=1 / 3) for p in prompts[:3]] + [judgement(prompts[3], VerdictKind.WEAK)]
    answers = [completion(p, name) for p in prompts for name in "ab"]
    for run in ("one", "two"):
        pair(tmp_path / run, judgements, answers, prompts)
    for name in (PAIRS, DROPPED):
        assert (tmp_path / "one" / "pair" / name).read_bytes() == (tmp_path / "two" / "pair" / name).read_bytes()


def test_pairs_come_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    prompts = [prompt_of(number) for number in range(6)]
    answers = [completion(p, name) for p in reversed(prompts) for name in "ab"]
    made, _, _ = pair(tmp_path, [judgement(p) for p in reversed(prompts)], answers, prompts)
    assert [row.prompt_id for row in made] == [p.id for p in prompts]


@pytest.mark.parametrize("what", ["missing judgement", "unknown judgement", "twice", "missing answer", "other prompt"])
def test_files_that_do_not_belong_together_are_refused(what: str) -> None:
    prompts = [prompt_of(0), prompt_of(1)]
    judgements = [judgement(p) for p in prompts]
    answers = {c.id: c for p in prompts for c in (completion(p, "a"), completion(p, "b"))}
    match what:
        case "missing judgement":
            judgements.pop()
        case "unknown judgement":
            judgements.append(judgement(prompt_of(2)))
        case "twice":
            judgements.append(judgements[0])
        case "missing answer":
            del answers[f"{prompts[0].id}-b"]
        case "other prompt":
            name = f"{prompts[0].id}-b"
            answers[name] = answers[name].model_copy(update={"prompt_token_ids": (9,)})
    with pytest.raises(CorruptArtifactError):
        list(pair_all(prompts, judgements, answers, PairingConfig()))


sides = st.fixed_dictionaries(
    {"text": st.sampled_from(["", "  ", "x", "y"]), "tokens": st.integers(0, 9), "finish": st.sampled_from(FinishReason)}
)
cases = st.lists(
    st.tuples(st.sampled_from([*VerdictKind, None]), st.sampled_from("ab"), st.floats(0, 1), sides, sides), max_size=12
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases, st.booleans())
def test_every_prompt_is_a_pair_or_one_reason_and_swapping_the_winner_swaps_the_pair(
    cases: list[Any], drop_truncated: bool
) -> None:
    config = PairingConfig(drop_truncated=drop_truncated)
    prompts = [prompt_of(number) for number in range(len(cases))]
    made: dict[bool, list[PreferencePair | Dropped]] = {}
    for swap in (False, True):
        judgements, answers = [], {}
        for prompt, (kind, winner, margin, a, b) in zip(prompts, cases, strict=True):
            named = {"a": "b", "b": "a"}[winner] if swap else winner
            judgements.append(
                PromptJudgement(prompt_id=prompt.id, best_id=None, worst_id=None, verdict=None)
                if kind is None
                else judgement(prompt, kind, winner=named, margin=margin)
            )
            answers |= {c.id: c for c in (completion(prompt, "a", **a), completion(prompt, "b", **b))}
        made[swap] = list(pair_all(prompts, judgements, answers, config))
    assert len(made[False]) == len(prompts)
    for prompt, (kind, winner, margin, *_), item, other in zip(prompts, cases, made[False], made[True], strict=True):
        if isinstance(item, Dropped):
            assert isinstance(other, Dropped)
            assert (item.prompt_id, item.reason) == (prompt.id, other.reason)
            continue
        assert kind is VerdictKind.WINNER
        assert margin >= config.min_margin
        assert isinstance(other, PreferencePair)
        assert (item.chosen_id, item.rejected_id) == (other.rejected_id, other.chosen_id)
        assert item.chosen_id == f"{prompt.id}-{winner}"
        assert item.chosen_token_ids != item.rejected_token_ids
