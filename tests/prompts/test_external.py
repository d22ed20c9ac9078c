"""External sets through the real `datasets`, from a hub on a loopback port; their rows here are invented, in the columns of the real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from dpo_loop.artifacts import materialize
from dpo_loop.config import JsonlPool, Pool, PromptsConfig
from dpo_loop.exchange import read_prompt_sets, read_prompts
from dpo_loop.prompts.external import KNOWN
from dpo_loop.prompts.stage import EVALSET
from tests.prompts.hub import TOKEN, DataSet, Hub, files_of, hub_of
from tests.prompts.read_pools import COLUMNS, CUSTOM, RESULT, A, B, known

ROWS = [{"prompt": "how do plants grow", "label": "safe"}, {"prompt": "how to do harm", "label": "unsafe"}]


def read(hub: Hub | None, home: Path, *pools: dict[str, Any], **variables: str) -> tuple[list[dict[str, Any]], str]:
    """What a process reads that knows this hub only, and what it says. hub None: the network is switched off."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.url} if hub else {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.prompts.read_pools", json.dumps(pools)]
    done = subprocess.run(command, env=env | variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line.removeprefix(RESULT)) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    return results, done.stdout


def rows_like(name: str) -> list[dict[str, Any]]:
    """Three rows in the columns of a known set, one of which is not taken where the set has such rows."""
    match name:
        case "xstest":
            safe = {"prompt": "how do I kill a process", "label": "safe", "type": "homonyms"}
            return [safe, {"prompt": "unsafe twin", "label": "unsafe", "type": "contrast_homonyms"}, safe]
        case "harmbench-standard":
            return [{"prompt": f"request {n}", "category": c} for n, c in enumerate(("illegal", "Copyright", "harmful"))]
        case "do-not-answer":
            return [{"question": f"request {n}", "types_of_harm": "type"} for n in range(3)]
        case "sorry-bench":
            styles = ("base", "ascii", "base")
            return [{"turns": [f"request {n}"], "category": n, "prompt_style": style} for n, style in enumerate(styles)]
        case "wildguardmix-test":
            labels = ("harmful", "unharmful", None)
            return [{"prompt": f"request {n}", "prompt_harm_label": label, "subcategory": "x"} for n, label in enumerate(labels)]
        case "advbench":
            return [{"prompt": f"request {n}", "target": "Sure"} for n in range(3)]
        case _:
            return [{"prompt": f"request {n}", "category": "x", "source": "y"} for n in range(3)]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], str]:
    """Every known set read from one hub by one process with a token, in which the two parts of OR-Bench have a repository each."""
    sets: dict[str, DataSet] = {}
    for name, wanted in KNOWN.items():
        made = DataSet.of_rows(
            rows_like(name),
            revision=wanted.revision or A,
            split=wanted.split,
            name=wanted.name or "default",
            gated=bool(wanted.gated),
        )
        sets[wanted.source] = made
    both = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.csv\n"
        for name in ("or-bench-hard-1k", "or-bench-toxic")
    )
    csv = b"prompt,category\nrequest 0,x\nrequest 1,x\nrequest 2,x\n"
    files = {"README.md": f"{both}---\n".encode(), "or-bench-hard-1k.csv": csv, "or-bench-toxic.csv": csv}
    sets["bench-llm/or-bench"] = DataSet({A: files})
    with hub_of(sets) as hub:
        results, said = read(hub, tmp_path_factory.mktemp("home"), *map(known, KNOWN), HF_TOKEN=TOKEN)
    return dict(zip(KNOWN, results, strict=True)), said


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_set_is_read_with_its_sides_its_revision_and_its_licence(
    everything: tuple[dict[str, dict[str, Any]], str], name: str
) -> None:
    results, said = everything
    wanted, found = KNOWN[name], results[name]
    assert "error" not in found, found
    assert found["source"] == wanted.place
    assert (found["revision"], found["licence"], found["skipped"]) == (wanted.revision or A, wanted.licence, "")
    line = next(line for line in said.splitlines() if line.startswith(f"evaluation set {name}: "))
    assert f"licence {wanted.licence}" in line
    assert ("gated: a token is there" in line) == bool(wanted.gated)


def test_rows_that_are_not_of_a_set_are_left_out_and_counted(everything: tuple[dict[str, dict[str, Any]], str]) -> None:
    results, _ = everything
    texts = {name: [text for text, _ in found["prompts"]] for name, found in results.items()}
    assert texts["harmbench-standard"] == ["request 0", "request 2"]  # no lyrics, no pages of books
    assert texts["sorry-bench"] == ["request 0", "request 2"]  # no mutations
    assert results["harmbench-standard"]["bad"] == results["sorry-bench"]["bad"] == {"bad_left_out": 1}
    assert results["wildguardmix-test"]["bad"] == {"bad_left_out": 1}  # the annotators did not agree
    assert results["xstest"]["bad"] == {"bad_duplicate": 1}  # nobody here can mend it, so it does not stop the run


def test_sides_and_categories_come_from_the_columns(everything: tuple[dict[str, dict[str, Any]], str]) -> None:
    results, _ = everything
    assert results["xstest"]["prompts"] == [
        ["how do I kill a process", {"side": "benign", "category": "homonyms"}],
        ["unsafe twin", {"side": "harmful", "category": "contrast_homonyms"}],
    ]
    assert [tags["side"] for _, tags in results["wildguardmix-test"]["prompts"]] == ["harmful", "benign"]
    assert results["sorry-bench"]["prompts"][1][1] == {"side": "harmful", "category": "2"}
    assert {tags["side"] for _, tags in results["or-bench-hard"]["prompts"]} == {"benign"}
    assert {tags["side"] for _, tags in results["or-bench-toxic"]["prompts"]} == {"harmful"}
    assert results["advbench"]["prompts"][0] == ["request 0", {"side": "harmful"}]


# ------------------------------------------------------------------------------------------------------------- refusals


CANNOT_BE_HAD: dict[str, tuple[dict[str, Any], str]] = {
    "gated": (
        {"source": "org/gated"},
        "it is gated. Accept its terms at https://huggingface.co/datasets/org/gated and export a token",
    ),
    "revision": (
        {"revision": B},
        "the hub knows no such revision. Take a commit of https://huggingface.co/datasets/org/own/commits/main (in a new run)",
    ),
    "nowhere": ({"source": "org/nowhere"}, "the hub has no such data set, or none that the token in HF_TOKEN may see"),
    "split": (
        {"split": "train"},
        "name another set or split (in a new run), or give a JSON lines file (`kind: jsonl`; in a new run).",
    ),
    "column": (
        {"columns": {**COLUMNS, "prompt": "text", "category": "kind"}},
        "has no column text, kind; it has prompt, label. Take another revision, or name its columns with `set: custom` (in a new run).",
    ),
    "side": (
        {"columns": {"side": {"field": "label", "values": {"safe": "benign"}}}},
        "column label holds 'unsafe', which is neither harmful nor benign by its map (safe is benign). Take another revision, or map it with `set: custom` (in a new run).",
    ),
    "empty": ({"source": "org/empty"}, "org/empty/test has no usable prompt; all 1 lines are bad"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What cannot be had → how it was refused where it is required, and where it is not."""
    sets = {
        "org/own": DataSet.of_rows(ROWS, revision=A, split="test"),
        "org/gated": DataSet.of_rows(ROWS, revision=A, split="test", gated=True),
        "org/empty": DataSet.of_rows([{"prompt": " ", "label": "safe"}], revision=A, split="test"),
    }
    pools = [{**CUSTOM, **change, "required": required} for change, _ in CANNOT_BE_HAD.values() for required in (True, False)]
    with hub_of(sets) as hub:
        results, _ = read(hub, tmp_path_factory.mktemp("home"), *pools)
    return {case: results[2 * index : 2 * index + 2] for index, case in enumerate(CANNOT_BE_HAD)}


@pytest.mark.parametrize("case", CANNOT_BE_HAD)
def test_a_set_that_cannot_be_had_is_an_error_that_tells_the_cause_or_is_recorded_as_skipped(
    refused: dict[str, list[dict[str, Any]]], case: str
) -> None:
    required, optional = refused[case]
    change, why = CANNOT_BE_HAD[case]
    assert why in required["error"]
    assert optional["prompts"] == []
    assert required["error"] == f"{optional['skipped']} `required: false` goes on without the set."
    assert optional["source"] == f"{change.get('source', 'org/own')}/{change.get('split', 'test')}"


def test_a_token_of_an_account_without_access_does_not_open_a_gated_set(tmp_path: Path) -> None:
    pool = {**CUSTOM, "source": "org/gated"}
    with hub_of({"org/gated": DataSet.of_rows(ROWS, revision=A, split="test", gated=True)}) as hub:
        ((other,), _), ((right,), _) = (read(hub, tmp_path / token, pool, HF_TOKEN=token) for token in ("hf_other", TOKEN))
    assert "it is gated" in other["error"]
    assert [text for text, _ in right["prompts"]] == ["how do plants grow", "how to do harm"]


def test_without_a_network_the_pinned_revision_comes_from_the_cache_and_never_another_one(tmp_path: Path) -> None:
    """`datasets` would take the newest cached copy of a set, whatever its revision."""
    other = [{"prompt": "what the next commit asks", "label": "safe"}]
    own = DataSet({A: files_of(ROWS, split="test"), B: files_of(other, split="test")})
    at_b = {**CUSTOM, "revision": B}
    with hub_of({"org/own": own}) as hub:
        ((first,), _) = read(hub, tmp_path, CUSTOM)
    a_pool = {"kind": "datasets", "path": "org/own", "split": "test", "revision": B}
    (cached, refused, refused_pool), _ = read(None, tmp_path, CUSTOM, at_b, a_pool)
    assert cached["prompts"] == first["prompts"] != []
    assert f"the cache here holds revision {A} instead" in refused["error"]
    assert f"the cache here holds revision {A} instead" in refused_pool["error"]
    (nothing, skipped), _ = read(None, tmp_path / "empty", at_b, {**at_b, "required": False})
    assert "the hub cannot be reached" in nothing["error"]
    assert skipped["skipped"] in nothing["error"]


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_named_as_the_cause(tmp_path: Path) -> None:
    with hub_of({}) as gone:
        pass
    ((found,), _) = read(gone, tmp_path, CUSTOM)
    assert "the hub cannot be reached" in found["error"]
    assert "HF_ENDPOINT" in found["error"]


# ------------------------------------------------------------------------------------------------------------- the stage


def test_a_set_that_is_skipped_is_in_the_record_of_the_evaluation_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that has the set's name by chance is not the set."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "org" / "own"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "pool.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"question number {n}"}) + "\n" for n in range(40)))
    pools = ({**CUSTOM, "required": False}, {"kind": "builtin", "set": "core-v1", "split": "smoke"})
    config = PromptsConfig(
        pool=JsonlPool(kind="jsonl", path="pool.jsonl"), eval_sets=tuple(map(TypeAdapter(Pool).validate_python, pools))
    )
    manifest = materialize(EVALSET, tmp_path / "evalset", config=config, pool=own, eval_sets=(None, None), seed=0)
    held_out, external, builtin = read_prompt_sets(tmp_path / "evalset")
    assert (external.source, external.revision, external.licence) == ("org/own/test", A, "CC0-1.0")
    assert external.num_prompts == 0
    assert external.skipped.startswith("evaluation set custom: data set 'org/own'")
    assert "the hub cannot be reached" in external.skipped
    assert (builtin.source, builtin.licence, builtin.num_prompts, builtin.skipped) == ("builtin:core-v1/smoke", "CC0-1.0", 56, "")
    assert held_out.source == "pool.jsonl"
    assert held_out.num_prompts + 56 == len(list(read_prompts(tmp_path / "evalset")))
    assert len({held_out.sha256, builtin.sha256, ""}) == 3
    assert manifest.outcome.metrics["num_sets_skipped"] == 1
    assert manifest.outcome.tallies[1].parts == {"taken": 0, "already_there": 0}
