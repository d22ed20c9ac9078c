"""A small training set-up: a random Llama, pairs of random token ids of ragged lengths, a run directory to publish in."""

from __future__ import annotations

import random
from pathlib import Path

from dpo_loop.artifacts import materialize
from dpo_loop.config import LoraShape, OptimizerConfig, SigmoidLoss, TrainingConfig
from dpo_loop.exchange import PAIRS
from dpo_loop.files import write_jsonl
from dpo_loop.training.stage import TRAIN
from dpo_loop.types import Message, PolicyRef, PreferencePair, StageManifest

END = 0
"""End-of-turn token of tests.builders' tokenizer."""


def make_pairs(num_pairs: int, *, seed: int = 0, max_completion: int = 12) -> list[PreferencePair]:
    """Random ids below 300 with prompts of 1 to 20 tokens and completions of 1 to max_completion."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, 300) for _ in range(draw.randint(low, high)))

    pairs = []
    for index in range(num_pairs):
        chosen, rejected = (*ids(0, max_completion - 1), END), ids(1, max_completion)
        pairs.append(make_pair(f"p{index}", prompt=ids(1, 20), chosen=chosen, rejected=rejected))
    return pairs


def make_pair(prompt_id: str, *, prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> PreferencePair:
    return PreferencePair(
        prompt=(Message(role="user", content=prompt_id),),
        chosen=(Message(role="assistant", content="a"),),
        rejected=(Message(role="assistant", content="b"),),
        prompt_id=prompt_id,
        chosen_id=f"{prompt_id}-c",
        rejected_id=f"{prompt_id}-r",
        prompt_token_ids=prompt,
        chosen_token_ids=chosen,
        rejected_token_ids=rejected,
        margin=1.0,
        ballot_keys=(),
    )


def write_pairs(folder: Path, pairs: list[PreferencePair]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / PAIRS, pairs)
    return folder


def training_config(**changes: object) -> TrainingConfig:
    """Fast and fp32: rank 4, eight pairs per step, a checkpoint every other step."""
    values = {
        "loss": SigmoidLoss(kind="sigmoid", beta=0.1),
        "lora": LoraShape(rank=4, alpha=8),
        "optimizer": OptimizerConfig(lr=1e-3),
        "pairs_per_step": 8,
        "micro_batch_tokens": 200,
        "dtype": "float32",
        "checkpoint_every_steps": 2,
        "max_length": 128,
    }
    return TrainingConfig.model_validate(values | changes)


def train(
    run: Path,
    *,
    pairs: Path,
    policy: PolicyRef,
    config: TrainingConfig,
    run_start: PolicyRef | None = None,
    round_number: int = 1,
    feedback: Path | None = None,
) -> StageManifest:
    """Publish the train stage at <run>/rounds/NNN/train."""
    out = stage_dir(run, round_number)
    out.parent.mkdir(parents=True, exist_ok=True)
    return materialize(TRAIN, out, pairs=pairs, policy=policy, run_start=run_start or policy, config=config, feedback=feedback)


def stage_dir(run: Path, round_number: int = 1) -> Path:
    return run / "rounds" / f"{round_number:03d}" / "train"
