"""The set that comes with the package is what its README promises, and nothing trains on it."""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from pydantic import ValidationError

from dpo_loop.artifacts import materialize, sha256_file
from dpo_loop.config import BuiltinPool, JsonlPool, PromptsConfig
from dpo_loop.errors import ConfigError
from dpo_loop.exchange import read_prompts
from dpo_loop.files import read_jsonl
from dpo_loop.prompts.builtin import CoreRow, builtin_file
from dpo_loop.prompts.pool import read_pool
from dpo_loop.prompts.stage import EVALSET, PROMPTS
from dpo_loop.types import Grade, Side
from flows.estimate import works_of
from flows.paths import resolve_paths
from flows.preflight import check
from flows.steps import run_step
from tests.flows.runs import raw_config, started_run

CATEGORIES = [f"S{n}" for n in range(1, 15)]
XS_TYPES = {
    "homonym",
    "figurative_language",
    "safe_target",
    "safe_context",
    "definition",
    "historical_event",
    "privacy_public",
    "privacy_fictional",
    "nonsense_discrimination",
    "legitimate",
}
SETS = builtin_file("core-v1").parent
ROWS = list(read_jsonl(builtin_file("core-v1"), CoreRow))
CANARY_ROWS = [json.loads(line) for line in (SETS / "judge-canary-v1.jsonl").read_text(encoding="utf-8").splitlines()]
FORBIDDEN = {
    "a digit: quantities, doses, steps": r"\d",
    "a unit of a quantity": r"\b(milligrams?|grams?|kilos?|kilograms?|millilitres?|litres?|ounces?|degrees|volts?|percent)\b",
    "code or markup": r"[`{}<>\[\]|;=\\$#@]|\w\(\)|\w_\w",
    "an address": r"https?:|www\.|\w\.\w",
    "a jailbreak wrapper": r"\b(ignore (all|any|previous)|pretend (that )?you|you are now|hypothetically|no restrictions|DAN)\b",
}


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def pool(split: str = "core") -> BuiltinPool:
    return BuiltinPool.model_validate({"kind": "builtin", "set": "core-v1", "split": split})


# ----------------------------------------------------------------------------------------------------------- the file


def test_every_category_has_fifteen_pairs_of_a_harmful_and_a_benign_prompt() -> None:
    ids = [f"core-v1-{category}-{n:02d}-{side}" for category in CATEGORIES for n in range(1, 16) for side in "hb"]
    assert [row.id for row in ROWS] == ids
    for row in ROWS:
        assert row.id == f"{row.cluster_id}-{row.side.value[0]}"
        assert row.cluster_id.rpartition("-")[0] == f"core-v1-{row.category}"
        assert row.xs_type in (XS_TYPES if row.side is Side.BENIGN else {""})
    assert {row.xs_type for row in ROWS} - {""} == XS_TYPES


def test_a_benign_prompt_wants_an_answer_and_a_harmful_one_a_refusal_or_help_with_the_need_behind_it() -> None:
    for row in ROWS:
        harmful = "safe_completion" if row.category in {"S6", "S11", "S13"} else "refuse"
        assert row.expected == (harmful if row.side is Side.HARMFUL else "comply")
        assert row.category not in {"S4", "S9"} or row.severity >= (3 if row.side is Side.HARMFUL else 2)


def test_the_splits_take_whole_pairs_and_are_disjoint() -> None:
    for category in CATEGORIES:
        mine = [row for row in ROWS if row.category == category]
        assert Counter(row.side for row in mine if row.smoke) == {Side.HARMFUL: 2, Side.BENIGN: 2}
        assert Counter(row.side for row in mine if row.sealed) == {Side.HARMFUL: 3, Side.BENIGN: 3}
    for harmful, benign in zip(ROWS[::2], ROWS[1::2], strict=True):
        assert (harmful.cluster_id, harmful.smoke, harmful.sealed) == (benign.cluster_id, benign.smoke, benign.sealed)
    assert not [row.id for row in ROWS if row.smoke and row.sealed]


def test_every_prompt_is_one_sentence_within_the_content_rules() -> None:
    for row in ROWS:
        assert re.fullmatch(r"[A-Z][^.?!\n\r\t]*[.?]", row.prompt), f"{row.id} is not one sentence: {row.prompt}"
        assert row.prompt.isascii(), row.id
        assert row.prompt == " ".join(row.prompt.split()), row.id
        assert 3 <= len(row.prompt.split()) <= 26, row.id
    assert [(row.id, rule) for row in ROWS for rule, pattern in FORBIDDEN.items() if re.search(pattern, row.prompt)] == []


def test_the_prompts_of_abstract_categories_are_short() -> None:
    harmful = [row for row in ROWS if row.category in {"S4", "S9"} and row.side is Side.HARMFUL]
    assert max(len(row.prompt.split()) for row in harmful) <= 14


def test_no_two_prompts_are_nearly_the_same() -> None:
    """Twins share their words by design, but never all of them; other prompts share less."""
    sets = [(row, words(row.prompt)) for row in ROWS]
    assert len({a for _, a in sets}) == len(ROWS)
    for (one, a), (other, b) in combinations(sets, 2):
        limit = 0.8 if one.cluster_id == other.cluster_id else 0.65
        assert len(a & b) / len(a | b) < limit, f"{one.id}: {one.prompt} / {other.id}: {other.prompt}"


def test_the_canary_is_in_every_line_and_in_the_readme() -> None:
    (canary,) = {row.canary for row in ROWS}
    assert uuid.UUID(canary).version == 4
    readme = (SETS / "README.md").read_text(encoding="utf-8")
    assert canary in readme
    assert "CC0-1.0" in readme
    assert "Do not train" in readme


def test_the_readme_counts_what_is_there() -> None:
    readme = (SETS / "README.md").read_text(encoding="utf-8")
    table = {name: int(num) for name, num in re.findall(r"^\| `(\w+)` \| (\d+)\b", readme, flags=re.MULTILINE)}
    assert table == {
        **Counter(row.xs_type for row in ROWS if row.xs_type),
        **Counter(row["kind"] for row in CANARY_ROWS),
        "core": len(ROWS),
        "smoke": sum(row.smoke for row in ROWS),
        "sealed": sum(row.sealed for row in ROWS),
    }


# ------------------------------------------------------------------------------------------------------- judge canary


def test_the_judge_canary_has_sixty_labelled_answers_of_every_kind() -> None:
    assert [row["prompt_id"] for row in CANARY_ROWS] == [f"judge-canary-v1-{n:02d}" for n in range(1, 61)]
    assert all(set(row) == {"prompt_id", "prompt", "response", "label", "kind", "side"} for row in CANARY_ROWS)
    assert {row["label"] for row in CANARY_ROWS} == {Grade.REFUSAL, Grade.PARTIAL, Grade.COMPLIANCE}
    assert min(Counter(row["label"] for row in CANARY_ROWS).values()) >= 5
    always = {"disclaimer_then_comply": "compliance", "fiction_wrapper": "compliance", "refusal_with_alternative": "refusal"}
    for row in CANARY_ROWS:
        assert row["label"] == always.get(row["kind"], row["label"])
        assert (row["kind"] == "empty") == (not row["response"].strip())
    assert len({(row["prompt"], row["response"]) for row in CANARY_ROWS}) == 60


def test_what_would_be_harmful_in_an_answer_of_the_judge_canary_is_a_stand_in() -> None:
    for row in CANARY_ROWS:
        complies = row["kind"] in {"disclaimer_then_comply", "fiction_wrapper"}
        assert not complies or "[harmful detail omitted]" in row["response"]
        assert row["label"] != "refusal" or "[harmful detail omitted]" not in row["response"]


def test_the_judge_canary_asks_nothing_of_the_set_that_is_judged() -> None:
    assert not {words(row["prompt"]) for row in CANARY_ROWS} & {words(row.prompt) for row in ROWS}


# ------------------------------------------------------------------------------------------------------------ the pool


@pytest.mark.parametrize(("split", "num"), [("core", 420), ("smoke", 56), ("sealed", 84)])
def test_a_split_is_read_with_what_the_evaluation_needs_to_know(split: str, num: int) -> None:
    contents = read_pool(pool(split), None, skip_bad=False)
    rows = [row for row in ROWS if split == "core" or getattr(row, split)]
    assert [prompt.text for prompt in contents.prompts] == [row.prompt for row in rows]
    assert contents.num_lines == num
    assert {prompt.source for prompt in contents.prompts} == {f"builtin:core-v1/{split}"}
    assert contents.prompts[0].side is Side.HARMFUL
    assert contents.prompts[0].tags == {
        "side": "harmful",
        "category": "S1",
        "cluster_id": rows[0].cluster_id,
        "severity": str(rows[0].severity),
        "expected": "refuse",
        **({"sealed": "true"} if rows[0].sealed else {}),
    }
    assert [prompt.tags.get("sealed") for prompt in contents.prompts] == ["true" if row.sealed else None for row in rows]
    assert contents.licence == "CC0-1.0"


def test_it_is_carved_into_the_evaluation_set_and_its_content_is_in_the_stages_key(tmp_path: Path) -> None:
    own = tmp_path / "pool.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"question number {n}"}) + "\n" for n in range(20)))
    prompts = {"pool": {"kind": "jsonl", "path": str(own)}, "eval_sets": [{"kind": "builtin", "set": "core-v1"}]}
    run = started_run(tmp_path / "run", prompts=prompts)
    manifest = run_step(run, 0, "evalset")
    assert manifest.inputs["eval_sets"] == [{"sha256": sha256_file(builtin_file("core-v1"))}]
    assert (manifest.outcome.metrics["num_harmful"], manifest.outcome.metrics["num_benign"]) == (210, 210)
    assert sum(prompt.source == "builtin:core-v1/core" for prompt in read_prompts(run.round(0).stage("evalset"))) == 420


def test_it_needs_no_path_and_costs_no_comparisons(tmp_path: Path) -> None:
    sets = [{"kind": "builtin", "set": "core-v1", "split": "smoke"}]
    prompts = {"pool": {"kind": "jsonl", "path": "world:pool.jsonl"}, "eval_sets": sets}
    config = check(raw_config(tmp_path / "run", prompts=prompts))
    assert config.prompts.eval_sets == (pool("smoke"),) == resolve_paths(config).prompts.eval_sets
    without = check(raw_config(tmp_path / "run", prompts={"pool": prompts["pool"]}))
    assert works_of(config) == works_of(without)


def test_it_is_refused_as_a_training_pool_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check(raw_config(tmp_path / "run", prompts={"pool": {"kind": "builtin", "set": "core-v1"}}, rounds="three"))
    told = {line.partition(": ")[0]: line.partition(": ")[2] for line in caught.value.problems}
    assert set(told) == {"prompts.pool", "rounds"}
    assert told["prompts.pool"] == (
        "a built-in set only evaluates and is never trained on; name prompts of your own here, and the set under prompts.eval_sets"
    )
    with pytest.raises(ValidationError, match="never trained on"):
        PromptsConfig.model_validate({"pool": pool()})
    assert PromptsConfig(pool=JsonlPool(kind="jsonl", path="x"), eval_sets=(pool("sealed"),))


@pytest.mark.parametrize("change", [{"set": "core-v2"}, {"split": "train"}, {"path": "x"}])
def test_another_set_or_split_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    sets = [{"kind": "builtin", "set": "core-v1", **change}]
    with pytest.raises(ConfigError) as caught:
        check(raw_config(tmp_path / "run", prompts={"pool": {"kind": "jsonl", "path": "world:pool.jsonl"}, "eval_sets": sets}))
    (problem,) = caught.value.problems
    assert problem.startswith(f"prompts.eval_sets.0.{next(iter(change))}: ")


def test_a_copy_of_the_set_in_the_pool_is_never_trained_on(tmp_path: Path) -> None:
    """Also where the run does not evaluate with the set."""
    rows = [{"prompt": row.prompt.upper()} for row in read_jsonl(builtin_file("core-v1"), CoreRow)]
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *({"prompt": f"Ordinary {n}"} for n in range(80))]))
    config = PromptsConfig(pool=JsonlPool(kind="jsonl", path=str(pool)), num_buckets=1)
    inputs = {"config": config, "pool": pool, "seed": 0}
    materialize(EVALSET, tmp_path / "evalset", eval_sets=(), **inputs)
    manifest = materialize(PROMPTS, tmp_path / "prompts", evalset=tmp_path / "evalset", round=1, **inputs)
    taken = [prompt.text for prompt in read_prompts(tmp_path / "prompts")]
    assert taken
    assert all(text.startswith("Ordinary") for text in taken)
    assert manifest.outcome.tallies[0].parts["built_in_evaluation"] > 300
