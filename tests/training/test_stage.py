"""The train stage as a user meets it: what it publishes, what it refuses, when it stops."""

import json
import math
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_loop.artifacts import scratch
from dpo_loop.config import AlarmLimits, AlarmsConfig, HeldOutConfig, LoraShape, OptimizerConfig
from dpo_loop.errors import CorruptArtifactError, InputError, NoPairsError, PolicyError, TrainingDivergedError
from dpo_loop.exchange import ALARMS, CANARY, DROPPED, METRICS
from dpo_loop.files import write_jsonl
from dpo_loop.policies import ADAPTER_ORIGIN, adapter_problems, describe_policy, read_policy
from dpo_loop.training.loop.fit import CHECKPOINTS
from dpo_loop.training.loop.held_out import held_out_rows
from dpo_loop.types import PolicyRef, PreferencePair
from flows.progress import is_progress
from tests.builders import build_adapter, build_model
from tests.training.world import END, make_pair, make_pairs, stage_dir, train, training_config, write_pairs


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_publishes_an_adapter_that_prefers_chosen_more_than_before(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    manifest = train(tmp_path, pairs=pairs, policy=base, config=training_config(epochs=4, optimizer=OptimizerConfig(lr=2e-2)))
    metrics = rows(stage_dir(tmp_path) / METRICS)
    assert [row["step"] for row in metrics] == list(range(1, 25))
    assert [row["pairs"] for row in metrics[:6]] == [8, 8, 8, 8, 8, 4]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert max(row["loss"] for row in metrics[-6:]) < math.log(2) - 0.05
    assert min(row["accuracy"] for row in metrics[-6:]) > 0.8
    assert metrics[-1]["margin"] == pytest.approx(metrics[-1]["chosen_reward"] - metrics[-1]["rejected_reward"])
    assert metrics[-1]["kl"] > 0
    assert manifest.outcome.metrics["steps"] == 24
    made = read_policy(stage_dir(tmp_path))
    assert made.base == base.base
    assert adapter_problems(Path(made.adapter), Path(base.base), max_rank=4) == []
    assert describe_policy(Path(made.base), adapter=Path(made.adapter)).key == made.key
    assert json.loads((Path(made.adapter) / ADAPTER_ORIGIN).read_text()) == {"base_sha256": base.base_sha256}


def test_every_progress_line_is_one_that_the_command_line_shows(
    tmp_path: Path, base: PolicyRef, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, pairs=pairs, policy=base, config=training_config())
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not is_progress("train", line)] == []
    assert "train: reference 88/88 completions" in lines
    assert lines[-1].startswith("train: sigmoid step 6/6, loss ")
    assert lines[-1].endswith(" tok/s, 0 s left")


def test_the_adapter_carries_no_path_and_no_order_that_changes_between_machines(
    tmp_path: Path, base: PolicyRef, pairs: Path
) -> None:
    train(tmp_path, pairs=pairs, policy=base, config=training_config())
    config = json.loads((stage_dir(tmp_path) / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "model"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert {name.split(".")[-1] for name in config["target_modules"]} == {
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    }  # fmt: skip
    weights = load_file(stage_dir(tmp_path) / "adapter" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.float32"}
    assert not any("lm_head" in name or "embed" in name for name in weights)


def test_the_canary_says_what_a_plain_forward_of_the_published_adapter_says(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    train(tmp_path, pairs=pairs, policy=base, config=training_config(optimizer=OptimizerConfig(lr=1e-2)))
    made = read_policy(stage_dir(tmp_path))
    canary = json.loads((stage_dir(tmp_path) / CANARY).read_text())
    assert (canary["base_sha256"], canary["adapter_sha256"]) == (made.base_sha256, made.adapter_sha256)
    assert len(canary["sequences"]) == 8
    assert max(plain_difference(row, made.base, None, "base_logprobs") for row in canary["sequences"]) < 1e-5
    assert max(plain_difference(row, made.base, made.adapter, "policy_logprobs") for row in canary["sequences"]) < 1e-5
    moved = [abs(p - b) for row in canary["sequences"] for p, b in zip(row["policy_logprobs"], row["base_logprobs"], strict=True)]
    assert sum(moved) / len(moved) > 1e-2


def plain_difference(row: dict, base: str, adapter: str | None, field: str) -> float:
    """Largest difference between a canary's log-probs and one unpadded forward through transformers' own head."""
    import torch

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = torch.tensor([row["prompt_token_ids"] + row["token_ids"]])
    with torch.no_grad():
        logps = model(ids).logits[0].log_softmax(-1)
    start = len(row["prompt_token_ids"])
    expected = [float(logps[start + i - 1, token]) for i, token in enumerate(row["token_ids"])]
    return max(abs(a - b) for a, b in zip(expected, row[field], strict=True))


def test_an_adapter_is_continued_with_its_own_rank_and_starts_at_ln_2(tmp_path: Path, adapted: PolicyRef, pairs: Path) -> None:
    config = training_config(lora=LoraShape(rank=16, alpha=32), optimizer=OptimizerConfig(lr=1e-6))
    manifest = train(tmp_path, pairs=pairs, policy=adapted, config=config)
    before = load_file(Path(adapted.adapter) / "adapter_model.safetensors")
    after = load_file(stage_dir(tmp_path) / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-4
    assert manifest.outcome.metrics["lora_rank"] == 4
    assert rows(stage_dir(tmp_path) / METRICS)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_fresh_adapter_over_an_adapted_policy_has_the_configs_rank_and_no_ln_2(
    tmp_path: Path, adapted: PolicyRef, pairs: Path
) -> None:
    manifest = train(tmp_path, pairs=pairs, policy=adapted, config=training_config(start="fresh"))
    assert manifest.outcome.metrics["lora_rank"] == 4
    assert abs(manifest.outcome.metrics["first_loss"] - math.log(2)) > 1e-3


def test_run_start_as_reference_gives_the_rewards_of_the_adapter_so_far(
    tmp_path: Path, base: PolicyRef, adapted: PolicyRef, pairs: Path
) -> None:
    config = training_config(reference="run_start", optimizer=OptimizerConfig(lr=1e-9), pairs_per_step=44)
    train(tmp_path, pairs=pairs, policy=adapted, run_start=base, config=config)
    (row,) = rows(stage_dir(tmp_path) / METRICS)
    assert row["kl"] > 1e-2
    assert abs(row["loss"] - math.log(2)) > 1e-3


def test_pairs_that_cannot_be_trained_on_are_dropped_with_a_reason_and_counted(tmp_path: Path, base: PolicyRef) -> None:
    odd = [
        make_pair("long", prompt=(5,) * 100, chosen=(6,) * 28 + (END,), rejected=(7,)),
        make_pair("same", prompt=(5,), chosen=(6, END), rejected=(6, END)),
        make_pair("half", prompt=(5,), chosen=(END,), rejected=()),
        make_pair("mute", prompt=(5,), chosen=(), rejected=()),
        make_pair("none", prompt=(), chosen=(6, END), rejected=(7,)),
        make_pair("full", prompt=(5,) * 128, chosen=(6, END), rejected=(7,)),
        make_pair("fits", prompt=(5,) * 100, chosen=(6,) * 27 + (END,), rejected=(7,)),
    ]
    pairs = write_pairs(tmp_path / "pair", odd + make_pairs(8))
    manifest = train(tmp_path, pairs=pairs, policy=base, config=training_config(max_length=128))
    counts = {"trained": 9, "too_long": 1, "identical": 1, "one_sided": 1, "empty": 2, "prompt_too_long": 1}
    assert manifest.outcome.tallies[0].parts == counts
    reasons = {row["prompt_id"]: (row["reason"], row["num_tokens"]) for row in rows(stage_dir(tmp_path) / DROPPED)}
    assert reasons == {
        "long": ("too_long", 129),
        "same": ("identical", 3),
        "half": ("one_sided", 2),
        "mute": ("empty", 1),
        "none": ("empty", 2),
        "full": ("prompt_too_long", 130),
    }


@pytest.mark.parametrize("token", [320, -1])
def test_a_token_id_that_the_model_does_not_have_is_named_with_its_pair(token: int, tmp_path: Path, base: PolicyRef) -> None:
    odd = make_pair("odd", prompt=(5,), chosen=(6, token), rejected=(7,))
    pairs = write_pairs(tmp_path / "pair", [*make_pairs(3), odd])
    with pytest.raises(
        InputError, match=rf"pair 4 \(prompt odd, odd-c over odd-r\) has the token id {token} in its chosen.*320 tokens"
    ):
        train(tmp_path, pairs=pairs, policy=base, config=training_config())
    assert not stage_dir(tmp_path).exists()


def test_held_out_pairs_are_looked_at_and_not_trained_on(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    held_out = HeldOutConfig(share=0.2, min_pairs=4, every_steps=2)
    manifest = train(tmp_path, pairs=pairs, policy=base, config=training_config(held_out=held_out))
    assert manifest.outcome.tallies[0].parts == {"trained": 36, "held_out": 8}
    metrics = rows(stage_dir(tmp_path) / METRICS)
    assert [row["step"] for row in metrics if "held_out_loss" in row] == [2, 4, 5]
    assert sum(row["pairs"] for row in metrics) == manifest.outcome.metrics["pairs_seen"] == 36
    assert manifest.outcome.metrics["last_held_out_accuracy"] == metrics[-1]["held_out_accuracy"]
    assert manifest.outcome.metrics["last_held_out_margin"] == metrics[-1]["held_out_margin"]


def pairs_of(ids: list[str]) -> list[PreferencePair]:
    """Each id is a prompt of its own."""
    tokens = {prompt_id: (5, number) for number, prompt_id in enumerate(sorted(set(ids)))}
    return [make_pair(prompt_id, prompt=tokens[prompt_id], chosen=(row, END), rejected=(7,)) for row, prompt_id in enumerate(ids)]


def test_pairs_of_one_prompt_are_held_out_together_and_more_pairs_move_none_back() -> None:
    config = HeldOutConfig(share=0.25, min_pairs=2)
    ids = [f"p{index % 10}" for index in range(40)]
    held = held_out_rows(pairs_of(ids), config, seed=0)
    prompts = {ids[row] for row in held}
    assert len(held) == 8  # two prompts of four pairs; a third would be more than 10 pairs
    assert {row for row, prompt in enumerate(ids) if prompt in prompts} == set(held)
    assert {[*reversed(ids)][row] for row in held_out_rows(pairs_of([*reversed(ids)]), config, seed=0)} == prompts
    more = [*ids, *(f"q{index}" for index in range(20))]
    assert {more[row] for row in held_out_rows(pairs_of(more), config, seed=0)} & set(ids) <= prompts | set(ids)
    assert held_out_rows(pairs_of(ids), config, seed=1) != held
    assert held_out_rows(pairs_of(ids), HeldOutConfig(share=0.25, min_pairs=9), seed=0) == []
    assert held_out_rows(pairs_of(ids), HeldOutConfig(share=0.0), seed=0) == []
    assert len(held_out_rows(pairs_of(ids), HeldOutConfig(share=1.0, min_pairs=1), seed=0)) == 20


def test_the_same_prompt_under_two_ids_is_held_out_under_both() -> None:
    """Merged sets know one prompt under several ids: one of them was trained on while the other was held out."""
    plain = pairs_of([f"p{index}" for index in range(40)])
    again = [pair.model_copy(update={"prompt_id": f"again-{pair.prompt_id}"}) for pair in plain]
    rewritten = [pair.model_copy(update={"prompt_token_ids": (9, *pair.prompt_token_ids)}) for pair in again]
    pairs = [*plain, *again, *rewritten]
    for seed in range(5):
        held = held_out_rows(pairs, HeldOutConfig(share=0.2, min_pairs=2), seed=seed)
        assert len(held) == 24
        assert held == sorted(row + block for row in held if row < 40 for block in (0, 40, 80))


def test_pairs_that_contradict_one_another_or_come_again_are_not_trained_on(tmp_path: Path, base: PolicyRef) -> None:
    one = make_pair("one", prompt=(5,), chosen=(6, END), rejected=(7, END))
    pairs = [
        one,
        one.model_copy(update={"prompt_id": "same tokens", "chosen_id": "other"}),
        make_pair("says a", prompt=(8,), chosen=(6, END), rejected=(7, END)),
        make_pair("says b", prompt=(8,), chosen=(7, END), rejected=(6, END)),
        make_pair("says a", prompt=(8,), chosen=(6, END), rejected=(7, END)),
        make_pair("best", prompt=(9,), chosen=(6, END), rejected=(7, END)),
        make_pair("best", prompt=(9,), chosen=(6, END), rejected=(8, END)),
        make_pair("best", prompt=(9,), chosen=(7, END), rejected=(8, END)),
    ]
    manifest = train(tmp_path, pairs=write_pairs(tmp_path / "pair", pairs), policy=base, config=training_config())
    assert manifest.outcome.tallies[0].parts == {"trained": 4, "duplicate": 1, "contradictory": 3}
    reasons = [(row["prompt_id"], row["reason"]) for row in rows(stage_dir(tmp_path) / DROPPED)]
    assert reasons == [
        ("same tokens", "duplicate"),
        ("says a", "contradictory"),
        ("says b", "contradictory"),
        ("says a", "contradictory"),
    ]


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_a_loss_without_a_reference_computes_none(
    kind: str, tmp_path: Path, base: PolicyRef, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, pairs=pairs, policy=base, config=training_config(loss={"kind": kind}))
    assert "completions" not in capsys.readouterr().out
    assert not {"kl", "chosen_logprob_change"} & rows(stage_dir(tmp_path) / METRICS)[0].keys()


def test_kto_learns_from_pairs_and_from_feedback_beside_them(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    feedback = tmp_path / "feedback.jsonl"
    turns = [[{"role": "user", "content": "count"}, {"role": "assistant", "content": "one two"[:end]}] for end in range(1, 7)]
    write_jsonl(feedback, [{"messages": each, "thumbs_up": index % 2 == 0} for index, each in enumerate(turns)])
    config = training_config(loss={"kind": "kto"}, feedback=str(feedback), held_out=HeldOutConfig(share=0.1, min_pairs=2))
    manifest = train(tmp_path, pairs=pairs, policy=base, config=config, feedback=feedback)
    assert [(tally.of, tally.parts) for tally in manifest.outcome.tallies] == [
        ("pairs", {"trained": 40, "held_out": 4}),
        ("feedback", {"trained": 6}),
    ]
    metrics = rows(stage_dir(tmp_path) / METRICS)
    assert sum(row["examples"] for row in metrics) == manifest.outcome.metrics["examples_seen"] == 2 * 40 + 6
    assert "pairs_seen" not in manifest.outcome.metrics
    assert metrics[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert "held_out_loss" in metrics[-1]


def test_figures_that_the_last_step_has_none_of_are_of_the_last_one_that_has(tmp_path: Path, base: PolicyRef) -> None:
    """Seven examples, six a step: the last step has a single one, so there is no margin of it."""
    feedback = tmp_path / "feedback.jsonl"
    turns = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "five"}]
    write_jsonl(feedback, [{"messages": turns, "thumbs_up": True}])
    pairs = write_pairs(tmp_path / "pair", make_pairs(3))
    config = training_config(loss={"kind": "kto"}, feedback=str(feedback), pairs_per_step=3)
    manifest = train(tmp_path, pairs=pairs, policy=base, config=config, feedback=feedback)
    first, last = rows(stage_dir(tmp_path) / METRICS)
    assert (first["examples"], last["examples"]) == (6, 1)
    figures = manifest.outcome.metrics
    assert figures["last_loss"] == last["loss"]
    assert figures["last_margin"] == first["margin"]
    missing = {"chosen_logprob_change", "rejected_logprob_change"} - last.keys()
    assert len(missing) == 1
    assert all(figures[f"last_{name}"] == first[name] for name in missing)


def test_alarms_are_published_said_once_and_counted(
    tmp_path: Path, base: PolicyRef, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alarms = AlarmsConfig(kl=AlarmLimits(warn=1e-9, stop=None), window_steps=2)
    manifest = train(tmp_path, pairs=pairs, policy=base, config=training_config(alarms=alarms))
    found = [row for row in rows(stage_dir(tmp_path) / ALARMS) if row["name"] == "kl"]
    assert [(row["level"], row["step"], row["limit"]) for row in found] == [("warn", 2, 1e-9)]
    said = [line for line in capsys.readouterr().out.splitlines() if "alarm, warn" in line]
    assert len([line for line in said if "training.alarms.kl.warn" in line]) == 1
    assert manifest.outcome.metrics["alarms"] == len(rows(stage_dir(tmp_path) / ALARMS))


def test_an_alarm_that_stops_makes_the_round_invalid_and_names_the_key(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    alarms = AlarmsConfig(kl=AlarmLimits(warn=1e-12, stop=1e-9), window_steps=2)
    with pytest.raises(TrainingDivergedError, match=r"training\.alarms\.kl\.stop"):
        train(tmp_path, pairs=pairs, policy=base, config=training_config(alarms=alarms))
    assert not stage_dir(tmp_path).exists()
    kept = [(row["name"], row["level"]) for row in rows(scratch(stage_dir(tmp_path)) / ALARMS)]
    assert ("kl", "stop") in kept


def test_a_checkpoint_names_what_it_was_made_from(tmp_path: Path, adapted: PolicyRef, pairs: Path) -> None:
    hot = training_config(optimizer=OptimizerConfig(lr=1e30, warmup_ratio=0.0), checkpoint_every_steps=1)
    with pytest.raises(TrainingDivergedError):
        train(tmp_path, pairs=pairs, policy=adapted, config=hot)
    (checkpoint,) = (scratch(stage_dir(tmp_path)) / CHECKPOINTS).glob("step-*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    made_from = manifest["provenance"]
    assert made_from["initial_adapter_sha256"] == adapted.adapter_sha256
    assert (made_from["base_sha256"], made_from["reference"]) == (adapted.base_sha256, adapted.key)
    assert made_from["config"]["optimizer"]["lr"] == 1e30
    assert "num_processes" not in made_from["config"]
    assert {"order", "token_ids", "stage_key", "stage_version"} <= made_from.keys()
    assert manifest["circumstances"]["num_processes"] == 1
    assert {"packed", "versions", "micro_batch_tokens"} <= manifest["circumstances"].keys()


def test_a_round_whose_pairs_are_all_too_long_is_invalid_with_the_counts(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    with pytest.raises(NoPairsError, match="'prompt_too_long': 41, 'too_long': 3"):
        train(tmp_path, pairs=pairs, policy=base, config=training_config(max_length=2))
    assert not stage_dir(tmp_path).exists()


def test_an_adapter_of_another_base_is_refused_before_anything_is_loaded(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    train(tmp_path / "one", pairs=pairs, policy=base, config=training_config())
    other = describe_policy(build_model(tmp_path / "model", seed=5))
    adapter = stage_dir(tmp_path / "one") / "adapter"
    mixed = other.model_copy(update={"adapter": str(adapter), "adapter_sha256": read_policy(adapter.parent).adapter_sha256})
    with pytest.raises(PolicyError, match="was trained on another base"):
        train(tmp_path / "two", pairs=pairs, policy=mixed, config=training_config())


def test_weights_that_changed_since_they_were_recorded_are_refused(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    adapter = build_adapter(tmp_path / "adapter", Path(base.base), rank=4)
    recorded = describe_policy(Path(base.base), adapter=adapter)
    build_adapter(adapter, Path(base.base), rank=4, seed=9)
    with pytest.raises(CorruptArtifactError, match="has changed since it was recorded"):
        train(tmp_path, pairs=pairs, policy=recorded, config=training_config())


def test_a_reference_that_is_not_the_policy_aborts_at_the_first_step(tmp_path: Path, adapted: PolicyRef, pairs: Path) -> None:
    """T12: the reference was computed with the adapter off."""
    import torch

    from dpo_loop.training.forward.probe import build_scorer
    from dpo_loop.training.models import build_accelerator, load_policy
    from dpo_loop.training.objectives.preferences import PairObjective, sequences_of
    from dpo_loop.training.reference import reference_logprobs

    accelerator = build_accelerator("float32")
    chosen, rejected = sequences_of(make_pairs(8))
    bare = adapted.model_copy(update={"adapter": None, "adapter_sha256": None})
    values = reference_logprobs(bare, [*chosen, *rejected], accelerator=accelerator, keep=tmp_path, max_tokens=400)
    objective = PairObjective(
        build_scorer(load_policy(adapted, accelerator=accelerator), device=torch.device("cpu"), forward="auto"),
        chosen,
        rejected,
        chosen_reference=values[:8],
        rejected_reference=values[8:],
        loss=training_config().loss,
        nll_weight=0.0,
        start_tolerance=1e-3,
    )
    sums = {name: value.item() for name, value in objective.sums(range(8), estimates={}).items()}
    with pytest.raises(TrainingDivergedError, match="the loss must be ln 2"):
        objective.metrics(sums, range(8), step=0)
    assert objective.metrics(sums, range(8), step=1)["kl"] > 0


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_metrics(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    hot = training_config(optimizer=OptimizerConfig(lr=1e30, warmup_ratio=0.0))
    with pytest.raises(TrainingDivergedError, match="diverged at step 2") as caught:
        train(tmp_path, pairs=pairs, policy=base, config=hot)
    kept = scratch(stage_dir(tmp_path)) / METRICS
    assert str(kept) in str(caught.value)
    assert "loss 0.6931" in str(caught.value)
    assert [row["step"] for row in rows(kept)] == [1]
    assert not stage_dir(tmp_path).exists()


def test_the_head_cannot_be_adapted(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    with pytest.raises(InputError, match="lm_head"):
        train(tmp_path, pairs=pairs, policy=base, config=training_config(lora=LoraShape(target="q_proj, lm_head")))


def test_a_target_that_the_model_does_not_have_is_named(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    with pytest.raises(InputError, match="c_attn"):
        train(tmp_path, pairs=pairs, policy=base, config=training_config(lora=LoraShape(target="c_attn")))
