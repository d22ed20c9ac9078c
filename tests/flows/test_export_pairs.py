"""Pairs of promoted rounds as other trainers read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dpo_loop.exchange import PROMPT_SETS, read_prompts
from dpo_loop.layout import RunDir
from dpo_loop.types import PromptSet
from flows.exporting import export
from tests.flows.exports import FORCE, pair, read_back
from tests.flows.runs import publish


@pytest.fixture
def run(exportable: RunDir, tmp_path: Path) -> RunDir:
    """A copy that may be changed."""
    return RunDir(shutil.copytree(exportable.path, tmp_path / "run"))


def test_pairs_of_promoted_rounds_are_what_trl_reads(run: RunDir, tiny_llama: Path, tmp_path: Path) -> None:
    from trl import is_conversational, maybe_apply_chat_template

    made = export(run, tmp_path / "out", what="pairs")
    assert (made.rounds, made.format, made.figures) == ((1, 3), "trl", {"num_pairs": 4 + 6})
    rows = read_back(tmp_path / "out", tmp_path / "cache")
    assert rows == [
        {name: pair(number, index).model_dump(mode="json")[name] for name in ("prompt", "chosen", "rejected")}
        for number in (1, 3)
        for index in range(3 + number)
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert all(is_conversational(row) for row in rows)
    assert maybe_apply_chat_template(rows[1], tokenizer) == {
        "prompt": "<|user|>Say 1-1 “å”<|end|><|assistant|>",
        "chosen": "two words<|end|>",
        "rejected": "line\nbreak\t{}<|end|>",
    }


def test_pairs_for_axolotl_have_the_fields_of_its_chat_template_strategy(run: RunDir, tmp_path: Path) -> None:
    """docs/rlhf.qmd of axolotl, chat_template.default: field_messages `messages`, chosen and rejected one message each."""
    export(run, tmp_path / "out", what="pairs", round_number=1, pair_format="axolotl")
    first = read_back(tmp_path / "out", tmp_path / "cache")[0]
    assert first == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say 1-0 “å”"}],
        "chosen": {"role": "assistant", "content": "two words"},
        "rejected": {"role": "assistant", "content": "line\nbreak\t{}"},
    }


def test_pairs_as_parquet_keep_everything_that_is_known_of_them(run: RunDir, tmp_path: Path) -> None:
    made = export(run, tmp_path / "out", what="pairs", pair_format="parquet")
    rows = read_back(tmp_path / "out", tmp_path / "cache")
    assert [{name: row[name] for name in row if name != "round"} for row in rows if row["round"] == 3] == [
        pair(3, index).model_dump(mode="json") for index in range(6)
    ]
    assert [row["round"] for row in rows] == [1] * 4 + [3] * 6
    assert set(made.files) == {"train.parquet", "README.md", "LICENSE"}


def test_the_card_of_pairs_says_whose_licence_it_is_and_where_the_prompts_come_from(run: RunDir, tmp_path: Path) -> None:
    export(run, tmp_path / "out", what="pairs", round_number=1)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in text
    assert "This is the licence of the base model" in text
    assert "- pool.jsonl: licence not recorded" in text, "as far as the config says"
    known = PromptSet(source="org/prompts/train", revision="abc", licence="CC-BY-4.0", num_prompts=9)
    further = known.model_copy(update={"source": "xstest"})
    publish(
        run.round(0).stage("evalset"), {PROMPT_SETS: json.dumps([known.model_dump(mode="json"), further.model_dump(mode="json")])}
    )
    export(run, tmp_path / "again", what="pairs", round_number=1)
    text = (tmp_path / "again" / "README.md").read_text()
    assert "- org/prompts/train, revision abc: licence CC-BY-4.0" in text
    assert "xstest" not in text.split("## Licence")[1]


def test_pairs_of_a_round_that_was_not_promoted_go_out_by_force_alone(run: RunDir, tmp_path: Path) -> None:
    assert export(run, tmp_path / "all", what="pairs", force=FORCE).rounds == (1, 3), (
        "a force that names no round lets nothing else out"
    )
    made = export(run, tmp_path / "out", what="pairs", round_number=2, force=FORCE)
    assert (made.rounds, made.forced) == ((2,), FORCE)
    assert "Warning: exported without the blessing" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_of_a_run_really_played_no_pair_is_of_an_evaluation_prompt_and_the_merge_holds(whole_run: RunDir, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(whole_run.path, tmp_path / "run"))
    made = export(run, tmp_path / "pairs", what="pairs", pair_format="parquet")
    rows = read_back(tmp_path / "pairs", tmp_path / "cache")
    asked = [prompt.model_dump(mode="json")["messages"] for prompt in read_prompts(run.round(0).stage("evalset"))]
    assert (len(rows), made.rounds) == (made.figures["num_pairs"], (1, 2))
    assert len(rows) > 10
    assert not [row for row in rows if row["prompt"] in asked]
    merged = export(run, tmp_path / "merged", what="merged")
    assert merged.figures["merge_difference"] < 1e-4 < merged.figures["adapter_effect"]
