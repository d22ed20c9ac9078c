"""The train stage as a user meets it: what it publishes, what it refuses, when it stops."""

import json
import math
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_loop.artifacts import scratch
from dpo_loop.config import LoraShape, OptimizerConfig
from dpo_loop.errors import CorruptArtifactError, InputError, NoPairsError, PolicyError, TrainingDivergedError
from dpo_loop.exchange import CANARY, DROPPED, METRICS
from dpo_loop.policies import ADAPTER_ORIGIN, adapter_problems, describe_policy, read_policy
from dpo_loop.types import PolicyRef
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
    assert lines[-1].startswith("train: dpo step 6/6, loss ")


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


def test_long_identical_and_empty_pairs_are_dropped_with_a_reason_and_counted(tmp_path: Path, base: PolicyRef) -> None:
    odd = [
        make_pair("long", prompt=(5,) * 100, chosen=(6,) * 28 + (END,), rejected=(7,)),
        make_pair("same", prompt=(5,), chosen=(6, END), rejected=(6, END)),
        make_pair("none", prompt=(5,), chosen=(END,), rejected=()),
        make_pair("fits", prompt=(5,) * 100, chosen=(6,) * 27 + (END,), rejected=(7,)),
    ]
    pairs = write_pairs(tmp_path / "pair", odd + make_pairs(8))
    manifest = train(tmp_path, pairs=pairs, policy=base, config=training_config(max_length=128))
    assert manifest.outcome.tallies[0].parts == {"trained": 9, "too_long": 1, "identical": 1, "empty": 1}
    reasons = {row["prompt_id"]: (row["reason"], row["num_tokens"]) for row in rows(stage_dir(tmp_path) / DROPPED)}
    assert reasons == {"long": ("too_long", 129), "same": ("identical", 3), "none": ("empty", 2)}


def test_a_round_whose_pairs_are_all_too_long_is_invalid_with_the_counts(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    with pytest.raises(NoPairsError, match="'too_long': 44"):
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

    from dpo_loop.training.models import build_accelerator, load_policy
    from dpo_loop.training.preferences import DpoObjective, sequences_of
    from dpo_loop.training.reference import reference_logprobs

    accelerator = build_accelerator("float32")
    chosen, rejected = sequences_of(make_pairs(8))
    bare = adapted.model_copy(update={"adapter": None, "adapter_sha256": None})
    values = reference_logprobs(bare, [*chosen, *rejected], accelerator=accelerator, keep=tmp_path, max_tokens=400)
    objective = DpoObjective(
        load_policy(adapted, accelerator=accelerator),
        chosen,
        rejected,
        chosen_reference=values[:8],
        rejected_reference=values[8:],
        config=training_config(),
        device=torch.device("cpu"),
        start_tolerance=1e-3,
    )
    sums = {name: value.item() for name, value in objective.sums(range(8)).items()}
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
