"""Preference pairs as other trainers read them. The file is called `train`, so that `datasets.load_dataset(DIR)` finds it and nothing else.

trl       train.jsonl     {"prompt": [messages], "chosen": [message], "rejected": [message]}: TRL's conversational preference format
axolotl   train.jsonl     {"messages": [messages], "chosen": message, "rejected": message}: its DPO strategy `chat_template.default`
parquet   train.parquet   TRL's columns and everything else that is known of a pair: its round, ids, token ids, margin
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, assert_never

from dpo_loop.files import write_jsonl
from dpo_loop.types import PreferencePair

PairFormat = Literal["trl", "axolotl", "parquet"]


def write_pairs(out: Path, pair_format: PairFormat, pairs: Iterable[tuple[int, PreferencePair]]) -> None:
    """pairs: each with the number of its round."""
    rows = ({"round": number, **pair.model_dump(mode="json")} for number, pair in pairs)
    match pair_format:
        case "trl":
            write_jsonl(out / "train.jsonl", ({name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows))
        case "axolotl":
            write_jsonl(
                out / "train.jsonl",
                ({"messages": row["prompt"], "chosen": row["chosen"][0], "rejected": row["rejected"][0]} for row in rows),
            )
        case "parquet":
            _write_parquet(out / "train.parquet", list(rows))
        case _:
            assert_never(pair_format)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset, Features, List, Value, disable_progress_bars

    disable_progress_bars()
    turns, ids = List({"role": Value("string"), "content": Value("string")}), List(Value("int32"))
    text = dict.fromkeys(("prompt_id", "chosen_id", "rejected_id"), Value("string"))
    tokens = dict.fromkeys(("prompt_token_ids", "chosen_token_ids", "rejected_token_ids"), ids)
    features = {
        "round": Value("int32"),
        **dict.fromkeys(("prompt", "chosen", "rejected"), turns),
        **text,
        **tokens,
        "margin": Value("float64"),
        "ballot_keys": List(Value("string")),
    }
    # Named one by one: a key of a pair that has no type here is an error, not a guess.
    Dataset.from_list(rows, features=Features(features)).to_parquet(path)
