"""QLoRA: fp32 adapters over a base in 4 bits, on a GPU; without one nothing here runs, and tests/training/test_models.py has the refusal."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dpo_loop.config import LoraShape, OptimizerConfig
from dpo_loop.exchange import METRICS
from dpo_loop.policies import describe_policy, read_policy
from dpo_loop.training.merge import merge
from dpo_loop.training.models import add_adapter, build_accelerator, load_base, trainable_parameters
from tests.builders import build_model
from tests.training.test_stage import rows
from tests.training.world import stage_dir, train, training_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes"),
]


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_the_base_is_in_4_bits_and_the_adapter_in_fp32(tmp_path: Path, variant: str) -> None:
    base = load_base(
        str(build_model(tmp_path / "model", hidden=128)),
        accelerator=build_accelerator("bfloat16"),
        frozen=True,
        quantize_base="nf4",
    )
    assert base.is_loaded_in_4bit
    assert type(base.model.layers[0].mlp.up_proj.weight).__name__ == "Params4bit"
    assert base.lm_head.weight.dtype == torch.bfloat16
    model = add_adapter(base, LoraShape(rank=4, variant=variant), seed=0)
    assert {p.dtype for p in trainable_parameters(model, adapter_only=True).values()} == {torch.float32}


def test_policy_and_reference_are_quantised_alike_and_the_canary_is_that_of_what_is_served(tmp_path: Path, pairs: Path) -> None:
    """Step 0 is ln 2 only over the same 4-bit base (T27); the canary and the merge are of the base that an engine has."""
    policy = describe_policy(build_model(tmp_path / "model", hidden=128))
    config = training_config(quantize_base="nf4", dtype="bfloat16", optimizer=OptimizerConfig(lr=1e-3), gradient_checkpointing=True)
    train(tmp_path, pairs=pairs, policy=policy, config=config)
    metrics = rows(stage_dir(tmp_path) / METRICS)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    figures = merge(read_policy(stage_dir(tmp_path)), tmp_path / "out")
    assert figures.canary_distance < 5e-2
