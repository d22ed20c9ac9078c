"""Evaluation prompts held back for a second look: a hash decides, pairs stay whole, and nobody trains on either part."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dpo_loop.artifacts import materialize
from dpo_loop.config import BuiltinPool, JsonlPool, PromptsConfig
from dpo_loop.errors import InputError
from dpo_loop.exchange import read_prompt_sets, read_prompts
from dpo_loop.prompts.stage import EVALSET, PROMPTS, RESERVE
from dpo_loop.types import Prompt, Side

CONFIG = PromptsConfig(
    pool=JsonlPool(kind="jsonl", path="pool.jsonl"),
    eval_sets=(BuiltinPool(kind="builtin", set="core-v1"), JsonlPool(kind="jsonl", path="more.jsonl")),
    num_per_round=1_000,
    num_buckets=1,
    eval_fraction=0.4,
    max_eval=150,
    eval_reserve=0.3,
)
QUESTIONS = [f"question number {n}" for n in range(400)]
# The last two are in the pool as well.
FURTHER = [*(f"further question {n}" for n in range(40)), *QUESTIONS[:2]]


def carved(root: Path, config: PromptsConfig = CONFIG, *, seed: int = 0) -> tuple[list[Prompt], list[Prompt]]:
    """(main, reserve); the stages are published below `root`."""
    root.mkdir(exist_ok=True)
    for name, texts in (("pool.jsonl", QUESTIONS), ("more.jsonl", FURTHER)):
        (root / name).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    inputs = {"config": config, "pool": root / "pool.jsonl", "eval_sets": (None, root / "more.jsonl"), "seed": seed}
    for stage in (EVALSET, RESERVE):
        materialize(stage, root / stage.name, **inputs)
    return list(read_prompts(root / EVALSET.name)), list(read_prompts(root / RESERVE.name))


def test_main_and_reserve_are_the_whole_set_and_share_no_prompt_and_no_pair(tmp_path: Path) -> None:
    main, reserve = carved(tmp_path / "parts")
    whole = carved_whole(tmp_path / "whole")
    ids = [prompt.id for prompt in (*main, *reserve)]
    assert len(ids) == len(set(ids))
    assert set(ids) == {prompt.id for prompt in whole}
    clusters = [{prompt.tags["cluster_id"] for prompt in part if "cluster_id" in prompt.tags} for part in (main, reserve)]
    assert not clusters[0] & clusters[1]
    assert len(clusters[0] | clusters[1]) == 210
    in_order = {prompt.id: place for place, prompt in enumerate(whole)}
    for part in (main, reserve):
        assert [in_order[prompt.id] for prompt in part] == sorted(in_order[prompt.id] for prompt in part)


def carved_whole(root: Path) -> list[Prompt]:
    """The evaluation set of the same config without a reserve."""
    root.mkdir()
    for name, texts in (("pool.jsonl", QUESTIONS), ("more.jsonl", FURTHER)):
        (root / name).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    config = CONFIG.model_copy(update={"eval_reserve": 0.0})
    inputs = {"config": config, "pool": root / "pool.jsonl", "eval_sets": (None, root / "more.jsonl"), "seed": 0}
    materialize(EVALSET, root / "evalset", **inputs)
    with pytest.raises(
        InputError, match=r"no evaluation prompts in reserve: eval_reserve 0.0 .*Raise prompts.eval_reserve \(in a new run\)"
    ):
        materialize(RESERVE, root / "reserve", **inputs)
    return list(read_prompts(root / "evalset"))


def test_every_side_gives_about_its_share_and_both_twins_of_a_pair_are_together(tmp_path: Path) -> None:
    main, reserve = carved(tmp_path)
    sides = [Counter(prompt.side for prompt in part) for part in (main, reserve)]
    for side in Side:
        # Three standard deviations of a share of 0.3; of pairs where there are pairs.
        num = sides[0][side] + sides[1][side]
        assert abs(sides[1][side] / num - 0.3) < 3 * (0.3 * 0.7 / num) ** 0.5
    assert sides[1][Side.HARMFUL] == sides[1][Side.BENIGN]


def test_the_split_follows_from_the_seed_alone(tmp_path: Path) -> None:
    first, again, other = carved(tmp_path / "a"), carved(tmp_path / "b"), carved(tmp_path / "c", seed=1)
    assert first == again
    assert {prompt.id for prompt in first[1]} != {prompt.id for prompt in other[1]}


def test_a_larger_reserve_holds_the_smaller_one(tmp_path: Path) -> None:
    small, large = (
        {prompt.id for prompt in carved(tmp_path / str(share), CONFIG.model_copy(update={"eval_reserve": share}))[1]}
        for share in (0.2, 0.5)
    )
    assert small < large


def test_everything_in_reserve_leaves_nothing_to_evaluate(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"or all are in reserve.*lower prompts.eval_reserve \(in a new run\)"):
        carved(tmp_path, CONFIG.model_copy(update={"eval_reserve": 1.0}))


def test_no_round_trains_on_either_part(tmp_path: Path) -> None:
    """`further question` prompts are of a further set: nothing but the two parts keeps a copy of them in the pool from training."""
    main, reserve = carved(tmp_path)
    pool = tmp_path / "pool.jsonl"
    pool.write_text(pool.read_text() + "".join(json.dumps({"prompt": text.upper()}) + "\n" for text in FURTHER[:40]))
    inputs = {"config": CONFIG, "pool": pool, "evalset": tmp_path / "evalset", "round": 1, "seed": 0}
    manifest = materialize(PROMPTS, tmp_path / "prompts", reserve=tmp_path / "reserve", **inputs)
    taken = {prompt.text.lower() for prompt in read_prompts(tmp_path / "prompts")}
    assert taken
    assert not taken & {prompt.text for prompt in (*main, *reserve)}
    assert not taken & set(FURTHER)
    assert manifest.outcome.tallies[0].total == 440


def test_a_reserve_that_nobody_names_stops_the_round(tmp_path: Path) -> None:
    """Or its prompts of further sets could be trained on."""
    carved(tmp_path)
    inputs = {"config": CONFIG, "pool": tmp_path / "pool.jsonl", "evalset": tmp_path / "evalset", "round": 1, "seed": 0}
    with pytest.raises(InputError, match="give the stage `reserve`"):
        materialize(PROMPTS, tmp_path / "prompts", **inputs)


def test_each_part_says_where_its_prompts_come_from(tmp_path: Path) -> None:
    parts = carved(tmp_path)
    records = [read_prompt_sets(tmp_path / name) for name in ("evalset", "reserve")]
    for prompts, sets in zip(parts, records, strict=True):
        assert [found.source for found in sets] == ["pool.jsonl", "builtin:core-v1/core", "more.jsonl"]
        assert [found.licence for found in sets] == ["", "CC0-1.0", ""]
        assert {found.source: found.num_prompts for found in sets} == Counter(prompt.source for prompt in prompts)
        assert len({found.sha256 for found in sets}) == 3
    assert records[0][1].num_prompts + records[1][1].num_prompts == 420
    assert all(len(found.sha256) == 64 for sets in records for found in sets)
