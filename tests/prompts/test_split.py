from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_loop.artifacts import materialize
from dpo_loop.config import JsonlPool, PromptsConfig
from dpo_loop.errors import InputError, PromptFileError
from dpo_loop.exchange import read_prompts
from dpo_loop.prompts.stage import EVALSET, PROMPTS
from dpo_loop.types import StageManifest

POOL = JsonlPool(kind="jsonl", path="pool.jsonl")
CONFIG = PromptsConfig(pool=POOL, num_per_round=30, num_buckets=4, eval_fraction=0.25, max_eval=40)
QUESTIONS = [f"question number {n}" for n in range(300)]


def jsonl(file: Path, questions: Sequence[str], side: str = "task") -> Path:
    file.write_text("".join(json.dumps({"prompt": text, "tags": {"side": side}}) + "\n" for text in questions))
    return file


def split(
    root: Path,
    questions: Sequence[str],
    *,
    config: PromptsConfig = CONFIG,
    harmful: Sequence[str] = (),
    rounds: Sequence[int] = (1, 2, 3, 4),
    seed: int = 0,
) -> tuple[list[str], list[list[str]], list[StageManifest]]:
    """(evaluation prompts, prompts of each round, manifests), all as texts in order."""
    root.mkdir(exist_ok=True)
    pool = jsonl(root / "pool.jsonl", questions)
    sets: tuple[Path, ...] = ()
    if harmful:
        sets = (jsonl(root / "harmful.jsonl", harmful, "harmful"),)
        config = config.model_copy(update={"eval_sets": (JsonlPool(kind="jsonl", path="harmful.jsonl"),)})
    evalset = root / "evalset"
    manifests = [materialize(EVALSET, evalset, config=config, pool=pool, eval_sets=sets, seed=seed)]
    taken = []
    for number in rounds:
        out = root / f"prompts{number}"
        manifests.append(materialize(PROMPTS, out, config=config, pool=pool, evalset=evalset, round=number, seed=seed))
        taken.append([prompt.text for prompt in read_prompts(out)])
    return [prompt.text for prompt in read_prompts(evalset)], taken, manifests


def test_no_round_sees_an_evaluation_prompt_or_another_rounds_prompt(tmp_path: Path) -> None:
    evaluated, rounds, manifests = split(tmp_path, QUESTIONS)
    everything = [*evaluated, *(text for taken in rounds for text in taken)]
    assert len(everything) == len(set(everything))
    assert len(evaluated) == 40
    assert all(len(taken) == 30 for taken in rounds)
    assert [manifest.outcome.metrics.get("bucket") for manifest in manifests] == [None, 0, 1, 2, 3]


def test_an_evaluation_prompt_stays_one_when_it_is_typed_differently(tmp_path: Path) -> None:
    _, rounds, _ = split(tmp_path / "a", QUESTIONS, rounds=(1,))
    shouted = [text.upper().replace(" ", "  ") for text in rounds[0][:5]]
    evaluated, others, _ = split(tmp_path / "b", QUESTIONS, harmful=shouted, rounds=(1,))
    assert evaluated[-5:] == shouted
    assert not {*rounds[0][:5]} & {*others[0]}


def test_the_evaluation_share_beyond_max_eval_is_not_trained_on_either(tmp_path: Path) -> None:
    few = CONFIG.model_copy(update={"max_eval": 5, "num_per_round": 300})
    many = CONFIG.model_copy(update={"max_eval": 300, "num_per_round": 300})
    small, rounds, manifests = split(tmp_path / "few", QUESTIONS, config=few)
    large, same_rounds, _ = split(tmp_path / "many", QUESTIONS, config=many)
    assert small == large[:5]
    assert rounds == same_rounds
    assert len(large) + sum(map(len, rounds)) == 300
    assert manifests[0].outcome.tallies[0].parts["beyond_max_eval"] == len(large) - 5


@settings(max_examples=6)
@given(st.sets(st.integers(min_value=0, max_value=500), min_size=60, max_size=120), st.integers(min_value=0, max_value=3))
def test_lines_added_to_the_pool_move_no_other_prompt(
    tmp_path_factory: pytest.TempPathFactory, numbers: set[int], seed: int
) -> None:
    everything = CONFIG.model_copy(update={"num_per_round": 1_000, "max_eval": 1_000, "num_buckets": 2})
    some = [f"question number {n}" for n in sorted(numbers)]
    more = [*reversed(some), *(f"another {n}" for n in range(40))]
    root = tmp_path_factory.mktemp("pools")
    before = split(root / "before", some, config=everything, rounds=(1, 2), seed=seed)
    after = split(root / "after", more, config=everything, rounds=(1, 2), seed=seed)
    assert [text for text in after[0] if text in some] == before[0]
    for taken_before, taken_after in zip(before[1], after[1], strict=True):
        assert [text for text in taken_after if text in some] == taken_before


def test_the_seed_decides_the_split_and_the_order(tmp_path: Path) -> None:
    first = split(tmp_path / "a", QUESTIONS, seed=1)
    assert split(tmp_path / "b", QUESTIONS[::-1], seed=1)[:2] == first[:2]
    assert split(tmp_path / "c", QUESTIONS, seed=2)[:2] != first[:2]


def test_fresh_prompts_run_out_with_a_way_out_and_a_cycle_begins_again(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"round 5 has no fresh prompts: .* 4 buckets.*num_buckets.*`cycle`"):
        split(tmp_path / "fresh", QUESTIONS, rounds=(5,))
    again = CONFIG.model_copy(update={"reuse": "cycle"})
    _, (first, fifth), manifests = split(tmp_path / "cycle", QUESTIONS, config=again, rounds=(1, 5))
    assert first == fifth
    assert [manifest.outcome.metrics["cycle"] for manifest in manifests[1:]] == [0, 1]


def test_an_empty_bucket_and_an_empty_evaluation_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is empty, the pool has only 3 prompts.*num_buckets"):
        split(
            tmp_path / "a", QUESTIONS[:3], config=CONFIG.model_copy(update={"num_buckets": 500, "eval_fraction": 1.0}), rounds=(1,)
        )
    with pytest.raises(InputError, match=r"no evaluation prompts.*eval_fraction"):
        split(tmp_path / "b", QUESTIONS, config=CONFIG.model_copy(update={"eval_fraction": 0.0}))


def test_every_line_of_every_file_is_accounted_for(tmp_path: Path) -> None:
    evaluated, rounds, manifests = split(tmp_path / "plain", QUESTIONS, rounds=(1,))
    harmful = ["how to steal?", "how to rob?", evaluated[0], rounds[0][0]]
    _, _, with_set = split(tmp_path / "with_set", QUESTIONS, harmful=harmful, rounds=(1,))
    (pool,) = manifests[0].outcome.tallies
    assert with_set[0].outcome.tallies[0] == pool
    assert with_set[0].outcome.tallies[1].parts == {"taken": 3, "already_there": 1}
    assert with_set[0].outcome.metrics == {
        "num_prompts": 43,
        "num_task": 40,
        "num_harmful": 3,
        "num_benign": 0,
        "num_sets_skipped": 0,
    }
    held_out = pool.parts["held_out"] + pool.parts["beyond_max_eval"]
    assert held_out + pool.parts["for_rounds"] == pool.total == 300
    (before,), (after,) = manifests[1].outcome.tallies, with_set[1].outcome.tallies
    assert before.total == after.total == 300
    assert before.parts["evaluation"] == held_out
    assert after.parts["evaluation"] == held_out + 1
    assert after.parts["beyond_num_per_round"] == before.parts["beyond_num_per_round"] - 1


def test_bad_lines_stop_the_stage_or_are_counted_in_its_manifest(tmp_path: Path) -> None:
    pool = jsonl(tmp_path / "pool.jsonl", QUESTIONS)
    pool.write_text(pool.read_text() + "{\n" + pool.read_text().splitlines()[0] + "\n")
    with pytest.raises(PromptFileError, match="line 301: not json"):
        materialize(EVALSET, tmp_path / "evalset", config=CONFIG, pool=pool, eval_sets=(), seed=0)
    skipping = CONFIG.model_copy(update={"skip_bad": True})
    manifest = materialize(EVALSET, tmp_path / "evalset", config=skipping, pool=pool, eval_sets=(), seed=0)
    (tally,) = manifest.outcome.tallies
    assert (tally.total, tally.parts["bad_not_json"], tally.parts["bad_duplicate"]) == (302, 1, 1)
