"""All problems of a config come at once, each with the key that mends it; nothing is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_loop.artifacts import fingerprint
from dpo_loop.errors import ConfigError, PromptFileError, StaleArtifactError
from dpo_loop.layout import RunDir
from flows.config import apply_overrides, changed_keys, load_config, read_raw
from flows.preflight import check, checked_config, preflight
from flows.rounds import adopt_config, begin_round
from flows.steps import read_run_config, run_step
from tests.builders import write_safetensors
from tests.flows.runs import raw_config, small_config, started_run, write_config


def problems_of(raw: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(raw)
    return caught.value.problems


def keys_of(problems: list[str]) -> set[str]:
    return {line.partition(":")[0] for line in problems}


def training(**keys: object) -> dict[str, object]:
    return {"training": {"loss": {"kind": "sigmoid"}} | keys}


def test_a_whole_config_has_no_problems(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", raw_config(tmp_path / "run"))
    assert checked_config(path) == load_config(path)
    assert not (tmp_path / "run").exists()


def test_unknown_key_wrong_type_missing_file_rank_and_judge_key_are_listed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    raw = raw_config(
        tmp_path / "run",
        rounds="three",
        surprise=1,
        prompts={"pool": {"kind": "jsonl", "path": str(tmp_path / "no.jsonl")}, "num_bucketz": 3},
        judge={"kind": "openai", "model": "m", "api_key_env": "ABSENT_KEY", "free": True},
        training={"loss": {"kind": "sigmoid"}, "lora": {"rank": 64}},
        start={"kind": "model", "model": str(tmp_path / "no-model")},
    )
    assert keys_of(problems_of(raw)) == {
        "rounds",
        "surprise",
        "prompts.num_bucketz",
        "prompts.pool.path",
        "judge.api_key_env",
        "training.lora.rank",
        "start.model",
    }


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"run_id": "Bad_ID"}, {"run_id"}),
        ({"run_id": None, "seed": "x"}, {"run_id", "seed"}),
        ({"training": {"lora": {"rank": 64}}}, {"training.loss"}),
        ({"gate": {"checks": []}}, {"gate.checks"}),
        ({"gate": {"checks": [{"id": "a", "metric": "harmful_rate", "rule": "ceiling", "margn": 1}]}}, {"gate.checks.0.margin", "gate.checks.0.margn"}),
        ({"gate": {"checks": 2 * [{"id": "a", "metric": "harmful_rate", "rule": "ceiling", "margin": 1}]}}, {"gate"}),
        ({"generation": {"engine": {"kind": "vllm"}}}, {"generation.engine.kind"}),
        ({"grading": {"task": {"kind": "verifier", "function": "builtins:len"}}}, {"grading.safety"}),
        ({"surprise": {"a": [1]}, "rounds": [1], "world": 3}, {"surprise", "rounds", "world"}),
    ],
)  # fmt: skip
def test_problems_beside_a_wrong_required_key_are_listed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], keys: set[str]
) -> None:
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    others: dict[str, object] = {
        "judge": {"kind": "openai", "model": "m", "api_key_env": "ABSENT_KEY", "free": True},
        "start": {"kind": "model", "model": str(tmp_path / "no-model")},
        "prompts": {"pool": {"kind": "jsonl", "path": str(tmp_path / "no.jsonl")}, "eval_sets": [{"kind": "jsonl", "pth": "x"}]},
    }
    also = {"judge.api_key_env", "start.model", "prompts.pool.path", "prompts.eval_sets.0.path", "prompts.eval_sets.0.pth"}
    if "training" in changes:
        also.add("training.lora.rank")
    assert keys_of(problems_of(raw_config(tmp_path / "run", **others, **changes))) == keys | also


def test_a_limit_that_cannot_be_read_breaks_no_other_key(tmp_path: Path) -> None:
    engine = {"kind": "vllm_offline", "max_lora_rank": "256x", "max_model_len": []}
    raw = raw_config(tmp_path / "run", generation={"engine": engine, "max_new_tokens": 4096})
    raw["training"] = {"loss": {"kind": "sigmoid"}, "lora": {"rank": 128}}
    assert keys_of(problems_of(raw)) == {"generation.engine.max_lora_rank", "generation.engine.max_model_len"}


def test_a_config_of_nothing_names_what_is_missing() -> None:
    assert keys_of(problems_of({})) == {
        "run_id",
        "run_dir",
        "start",
        "prompts",
        "generation",
        "judge",
        "training",
        "grading",
        "gate",
    }


def test_the_command_prints_the_problems_without_a_traceback_and_starts_nothing(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", raw_config(tmp_path / "run", surprise=1))
    command = [sys.executable, "-m", "flows.cli", "run", str(path), "--set", "training.lora.rank=999"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "surprise: unknown key" in ended.stderr
    assert "training.lora.rank: 999 is above" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_paths_of_union_members_are_those_of_the_file(tmp_path: Path) -> None:
    raw = raw_config(
        tmp_path,
        start={"kind": "sft", "model": "m", "demonstrations": "d", "sft": {"optimizer": {"lr": -1}}},
        gate={"checks": [{"id": "a", "metric": "pass_rate", "rule": "floor", "margin": 7}]},
        judge={"kind": "oracle"},
    )
    assert keys_of(problems_of(raw)) >= {"start.sft.optimizer.lr", "gate.checks.0.margin", "judge"}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"world": None}, "start.model"),
        ({"start": {"kind": "model", "model": "world:weights"}}, "start.model"),
        ({"answering": {"max_new_tokens": 128}}, "answering.max_new_tokens"),
        ({"grading": {"safety": {"kind": "heuristic"}}}, "gate.checks.0.metric"),
        ({"stage_python": {"train": "/no/such/python"}}, "stage_python.train"),
        ({"stage_python": {"bake": sys.executable}}, "stage_python.bake"),
        ({"judge": {"kind": "verifier", "function": "no_such_module:f"}}, "judge.function"),
        ({"judge": {"kind": "verifier", "function": "dpo_loop.quickstart.verifier:no_such"}}, "judge.function"),
        (training(lora={"variant": "dora"}), "training.lora.variant"),
        (training(lora={"target": "q_proj, model.lm_head"}), "training.lora.target"),
        (training(quantize_base="nf4", dtype="float32"), "training.quantize_base"),
        (training(accelerate_config="nowhere.yaml"), "training.accelerate_config"),
        (training(loss={"kind": "kto"}, feedback="nowhere.jsonl"), "training.feedback"),
    ],
)
def test_preflight_names_the_key(tmp_path: Path, changes: dict[str, object], key: str) -> None:
    assert key in keys_of(problems_of(raw_config(tmp_path / "run", **changes)))


def test_adapters_that_no_engine_serves_are_refused_with_the_way_out(tmp_path: Path) -> None:
    start = {
        "kind": "sft",
        "model": "world:model",
        "demonstrations": "world:demonstrations.jsonl",
        "sft": {"lora": {"variant": "dora", "rank": 99}},
    }
    raw = raw_config(tmp_path / "run", start=start, **training(lora={"variant": "rslora"}))
    problems = problems_of(raw)
    assert keys_of(problems) == {"start.sft.lora.variant", "start.sft.lora.rank"}
    assert any("dora is not served by vLLM, which every round's policy must be; take rslora or lora" in line for line in problems)


def test_a_run_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert keys_of(problems_of(raw_config(tmp_path / "taken"))) == {"run_dir"}
    assert keys_of(problems_of(raw_config(tmp_path / "taken" / "run"))) == {"run_dir"}


def test_an_incomplete_model_and_a_foreign_adapter_are_named_before_an_engine_starts(tmp_path: Path) -> None:
    model, adapter, incomplete = tmp_path / "base", tmp_path / "adapter", tmp_path / "incomplete"
    for directory in (model, adapter, incomplete):
        directory.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    write_safetensors(model / "model.safetensors", {"w.weight": ("F32", (1,))})
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 32, "base_model_name_or_path": "org/other"}')
    halves = {"base_model.model.q.lora_A.weight": ("F32", (32, 1)), "base_model.model.q.lora_B.weight": ("F32", (1, 32))}
    write_safetensors(adapter / "adapter_model.safetensors", halves)
    problems = preflight(small_config(tmp_path / "run", start={"kind": "model", "model": str(model), "adapter": str(adapter)}))
    assert len(problems) == 2
    assert "org/other" in problems[0]
    assert "rank 32, above the engine's max_lora_rank 16" in problems[1]
    (incomplete / "config.json").write_text('{"max_position_embeddings": 64}')
    lines = preflight(small_config(tmp_path / "run", start={"kind": "model", "model": str(incomplete)}))
    assert [line.partition(":")[0] for line in lines] == ["start.model", "start.model", "generation.engine.max_model_len"]


def test_overrides_reach_nested_keys_and_lists() -> None:
    raw = {"a": {"b": 1}, "c": [{"d": 2}], "e": None}
    assert apply_overrides(raw, ["a.b=[1, 2]", "c.0.d=x", "e.f=1e-5", "g=null"]) == {
        "a": {"b": [1, 2]},
        "c": [{"d": "x"}],
        "e": {"f": 1e-5},
        "g": None,
    }
    assert raw["a"] == {"b": 1}
    with pytest.raises(ConfigError) as caught:
        apply_overrides(raw, ["a.b.c=1", "no-equals", "c.5.d=1"])
    assert len(caught.value.problems) == 3


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: 1e-5\nb: -2E+3\nc: 1.5e4\nd: 1e-5x\ne: 12e\n")
    assert read_raw(tmp_path / "c.yaml") == {"a": 1e-5, "b": -2e3, "c": 1.5e4, "d": "1e-5x", "e": "12e"}


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a:\n  b: 1\n  b: 2\n")
    with pytest.raises(ConfigError, match="the key b is there twice"):
        read_raw(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "is not YAML"),
        ("? {a: b}\n: 1\n", "a key must be a single word"),
        ("? [a, b]\n: 1\n", "a key must be a single word"),
        ("- 1", "holds list"),
        ("a: \xff".encode("latin-1"), "cannot be read"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, text: str | bytes, says: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=says):
        load_config(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("value", [".inf", ".nan"])
@pytest.mark.parametrize("key", ["training.optimizer.lr", "generation.temperature", "training.nll_weight", "review_timeout_s"])
def test_a_figure_without_end_is_refused(tmp_path: Path, key: str, value: str) -> None:
    assert keys_of(problems_of(apply_overrides(raw_config(tmp_path / "run"), [f"{key}={value}"]))) == {key}


def test_a_run_refuses_another_config_but_not_more_rounds(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    adopt_config(run, small_config(tmp_path, rounds=9, review_timeout_s=5))
    assert json.loads(run.config.read_text())["rounds"] == 9
    with pytest.raises(StaleArtifactError, match=r"training\.optimizer\.lr: 5e-06 → 0\.001"):
        adopt_config(run, small_config(tmp_path, training={"loss": {"kind": "sigmoid"}, "optimizer": {"lr": 1e-3}}))
    assert json.loads(run.config.read_text())["training"]["optimizer"]["lr"] == 5e-6


def test_any_key_may_change_while_no_stage_is_published(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    adopt_config(run, small_config(tmp_path))
    begin_round(run, 0)
    adopt_config(run, small_config(tmp_path, seed=7))
    assert read_run_config(run).seed == 7


def test_a_way_out_that_an_error_names_is_open_on_the_same_run(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    before = fingerprint(read_run_config(run))
    raw = raw_config(tmp_path)
    ways_out = ["prompts.skip_bad=true", "prompts.reuse=cycle", "generation.engine.canary_tolerance=0.5"]
    adopt_config(run, check(apply_overrides(raw, ways_out)))
    config = read_run_config(run)
    assert (config.prompts.skip_bad, config.prompts.reuse, config.generation.engine.canary_tolerance) == (True, "cycle", 0.5)
    assert fingerprint(config) == before, "what was published stays current"


def test_a_bad_line_is_skipped_on_the_run_that_refused_it(tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps({"prompt": f"what is {number} + 1?"}) + "\n" for number in range(40)) + "{broken\n")
    prompts = {"pool": {"kind": "jsonl", "path": str(pool)}}
    run = started_run(tmp_path / "run", prompts=prompts)
    with pytest.raises(PromptFileError, match="--skip-bad-prompts"):
        run_step(run, 0, "evalset")
    adopt_config(run, small_config(run.path, prompts={**prompts, "skip_bad": True}))
    made = run_step(run, 0, "evalset")
    adopt_config(run, small_config(run.path, prompts=prompts))
    assert run_step(run, 0, "evalset") == made


def test_a_model_that_moved_is_the_same_config(tmp_path: Path) -> None:
    one, other = (small_config(tmp_path, start={"kind": "model", "model": str(tmp_path / place / "m")}) for place in "ab")
    assert changed_keys(one, other) == []
