"""Loss and gradients of the product's forward against separate forwards. `python -m tests.benchmarks.parity --model DIR --loss NAME [--json]`

Random pairs that make it hard: prompts and completions that several pairs share, one-token prompts and completions, sequences past a
sliding window, an adapter whose B is not zero. One side is the product's path: its adapter, the forward that its probe chose (packed, or
padded for a `reason`), its objective. The other is one plain forward per sequence: peft's own LoRA layers, the model's own eager attention
and head, autograd. The third is TRL's trainer, where it has the loss. fp32, reference = the base, on the CPU.

    loss_diff        |ours - separate| / |separate|           trl_loss_diff, trl_grad_rel_diff    ours against TRL's; null: see `trl`
    grad_rel_diff    relative L2 of the LoRA gradients        logps_diff    greatest difference of a log-prob, relative above 1 nat

--model: any causal language model of transformers, with or without a tokenizer. Ends with 1 and a message if anything cannot be computed.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model
from pydantic import TypeAdapter
from torch import Tensor
from transformers import AutoConfig

from dpo_loop.config import KtoLoss, LoraShape, Loss, OrpoLoss, SimpoLoss, TrainingConfig
from dpo_loop.errors import DpoLoopError
from dpo_loop.training.forward.logprobs import TokenScores
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.models import add_adapter, load_base, set_training_mode
from dpo_loop.training.objectives.examples import Examples, examples_of
from dpo_loop.training.objectives.kto import mismatched, split_pairs
from tests.benchmarks.our_side import lora_of, sequences_of
from tests.benchmarks.shapes import IdPair, move_adapter, relative_l2, vocabulary
from tests.benchmarks.trl_losses import Trl, lacks
from tests.benchmarks.trl_side import base_model, lora_config
from tests.training.world import make_pair

KINDS = (
    "sigmoid", "sigmoid_norm", "robust", "exo_pair", "hinge", "ipo", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "simpo", "orpo", "kto",
)  # fmt: skip
NAMES: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in KINDS} | {
    "dpo": {"kind": "sigmoid"},
    "cdpo": {"kind": "sigmoid", "label_smoothing": 0.1},
    "rdpo": {"kind": "robust"},
    "dpo_norm": {"kind": "sigmoid_norm"},
    "length_normalised_dpo": {"kind": "sigmoid_norm"},
    "exo": {"kind": "exo_pair"},
    "nca": {"kind": "nca_pair"},
    "sppo": {"kind": "sppo_hard"},
    "ld": {"kind": "sigmoid", "ld_alpha": 0.5},
    "ld_dpo": {"kind": "sigmoid", "ld_alpha": 0.5},
    "wpo": {"kind": "sigmoid", "wpo": True},
    "nll": {"kind": "sigmoid", "nll_weight": 0.2},
    **{
        name: {"kind": "sigmoid", "f_divergence": name}
        for name in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    },
    "js": {"kind": "sigmoid", "f_divergence": "js_divergence"},
    "alpha": {"kind": "sigmoid", "f_divergence": "alpha_divergence"},
}
"""What each NAME means; hyphens and capitals are as good as underscores and small letters."""
MIN_PAIRS = 6
MAX_LENGTH = 1_000_000
"""Of a training whose pairs are never too long."""
LONGEST_WINDOW = 256
"""Sequences past a longer one would take gigabytes of eager attention; where the product trains on such, its probe checks that at the start."""


def named(name: str) -> tuple[Loss, float]:
    """The loss of a NAME and the weight of its NLL term."""
    settings = json.loads(name) if name.startswith("{") else NAMES.get(name.lower().replace("-", "_"))
    if settings is None:
        raise SystemExit(f"there is no loss {name!r}; known: {', '.join(NAMES)}, or a loss of the config as JSON")
    rest = {key: value for key, value in settings.items() if key != "nll_weight"}
    loss: Loss = TypeAdapter(Loss).validate_python(rest)
    return loss, settings.get("nll_weight", 0.0)


def hard_pairs(num_pairs: int, *, vocab_size: int, beyond: int, seed: int) -> list[IdPair]:
    """beyond: tokens that one of the sequences must have at least; 0 for none in particular."""
    draw = Random(seed)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab_size) for _ in range(draw.randint(least, most)))

    shared, first, second, third = ids(7, 15), ids(5, 16), ids(3, 12), ids(4, 9)
    pairs = [
        IdPair(shared, first, second),
        IdPair(ids(1, 1), ids(4, 12), ids(1, 1)),
        IdPair(shared, first, third),  # a prompt and a completion of the first pair again
        IdPair(
            ids(max(5, beyond // 2), max(18, beyond // 2)),
            ids(max(6, beyond), max(9, beyond)),
            ids(max(9, beyond), max(17, beyond)),
        ),
        IdPair(shared, second, third),  # chosen here, rejected there
        IdPair(ids(4, 16), ids(1, 1), ids(3, 17)),
    ]
    return pairs + [IdPair(ids(1, 20), ids(1, 17), ids(1, 17)) for _ in range(num_pairs - len(pairs))]


def window_of(model: Path) -> int:
    """Tokens beyond which this model attends no longer to everything before, if that is near; else 0."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    window = min((each for each in windows if isinstance(each, int)), default=0)
    room = getattr(config, "max_position_embeddings", None) or math.inf
    return window + 7 if 0 < window <= LONGEST_WINDOW and 2 * window + 14 < room else 0


class SeparateForwards:
    """A scorer of one plain forward per sequence."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, torch.device("cpu")

    def __call__(self, sequences: Sequence[TokenSequence], *, with_collisions: bool = False) -> TokenScores:
        logps, collisions = [], []
        for prompt, completion in sequences:
            logits_TV = self.model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
            logps_TV = logits_TV[len(prompt) - 1 : -1].float().log_softmax(-1)
            logps.append(logps_TV.gather(1, torch.tensor(completion)[:, None]).squeeze(1))
            collisions.append((2 * logps_TV.detach()).logsumexp(-1))
        return TokenScores(torch.cat(logps), torch.cat(collisions) if with_collisions else None)


@dataclass(frozen=True)
class Found:
    loss: float
    gradients: dict[str, Tensor]
    logps_N: Tensor


def found_by(scorer: Any, model: Any, examples: Examples) -> Found:
    """Loss and gradient over all rows, through the product's objective, with its reference scored by the same scorer."""
    with torch.no_grad(), model.disable_adapter():
        reference_N = scorer(examples.referred).logps_N if examples.referred else torch.empty(0)
    reference = list(torch.split(reference_N, [len(sequence.completion) for sequence in examples.referred]))
    objective = examples.build(scorer, reference, None)
    rows = range(len(examples.rows))
    with torch.no_grad():
        estimates = {name: float(value) for name, value in objective.estimates(rows).items()}
        logps_N = scorer([sequence for row in examples.rows for sequence in row]).logps_N
    loss = objective.sums(rows, estimates=estimates)["loss"] / objective.size(rows)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return Found(float(loss.detach()), dict(zip(parameters, gradients, strict=True)), logps_N)


def examples_for(pairs: Sequence[IdPair], name: str) -> Examples:
    """As the `train` stage makes them of a round's pairs."""
    loss, nll_weight = named(name)
    records = [make_pair(f"p{row}", prompt=p.prompt, chosen=p.chosen, rejected=p.rejected) for row, p in enumerate(pairs)]
    config = TrainingConfig(loss=loss, nll_weight=nll_weight, max_length=MAX_LENGTH)
    return examples_of(records, held_out=(), feedback=None, base=Path(), config=config)


def compare(model: Path, name: str, *, num_pairs: int, seed: int) -> dict[str, Any]:
    loss, nll_weight = named(name)
    pairs = hard_pairs(num_pairs, vocab_size=vocabulary(model), beyond=window_of(model), seed=seed)
    examples = examples_for(pairs, name)

    accelerator = Accelerator(cpu=True, mixed_precision="no")
    ours_model = add_adapter(load_base(str(model), accelerator=accelerator, frozen=True), LoraShape(rank=4, alpha=8), seed=0)
    set_training_mode(ours_model, gradient_checkpointing=False)
    move_adapter(ours_model, seed=seed)
    longest = max(sequence.num_forwarded for row in examples.rows for sequence in row)
    scorer = build_scorer(ours_model, device=accelerator.device, forward="auto", longest=longest)
    ours = found_by(scorer, ours_model, examples)

    lora = lora_of(ours_model)
    plain = get_peft_model(base_model(str(model), dtype=torch.float32, attention="eager"), lora_config(lora)).eval()
    move_adapter(plain, seed=seed)
    separate = found_by(SeparateForwards(plain), plain, examples)

    told: dict[str, Any] = {
        "loss_diff": relative(ours.loss, separate.loss),
        "grad_rel_diff": relative_l2(ours.gradients, separate.gradients),
        "packed": scorer.packed,
        "reason": scorer.reason,
        "logps_diff": float(((ours.logps_N - separate.logps_N).abs() / separate.logps_N.abs().clamp(min=1)).max()),
        "loss": ours.loss,
        "trl_loss_diff": None,
        "trl_grad_rel_diff": None,
        "trl": lacks(loss, nll_weight=nll_weight),
    }
    if told["trl"] is None:
        with tempfile.TemporaryDirectory() as out:
            trl_loss, trl_gradients = by_trl(Trl(str(model), lora, Path(out), seed), loss, pairs)
        told |= {"trl_loss_diff": relative(ours.loss, trl_loss), "trl_grad_rel_diff": relative_l2(ours.gradients, trl_gradients)}
        told["trl"] = f"compared; its loss is {trl_loss:.6g}"
    if bad := [key for key, value in told.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise SystemExit(f"{', '.join(bad)} is not finite: {told}")
    return told


def by_trl(trl: Trl, loss: Loss, pairs: list[IdPair]) -> tuple[float, dict[str, Tensor]]:
    if isinstance(loss, KtoLoss):
        examples = split_pairs(*sequences_of(pairs))
        return trl.of_examples(loss, examples, mismatched(examples, max_length=MAX_LENGTH))
    if isinstance(loss, SimpoLoss | OrpoLoss):
        return trl.without_reference(loss, pairs)
    return trl.of_pairs(loss, pairs)


def relative(ours: float, theirs: float) -> float:
    """A loss of exactly 0 has nothing to be compared with: NaN, which is refused."""
    return abs(ours - theirs) / abs(theirs) if theirs else math.nan


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Loss and gradients of the product's forward against separate forwards, and against TRL."
    )
    parser.add_argument("--model", type=Path, required=True, help="a transformers model directory")
    parser.add_argument("--loss", required=True, help=", ".join(NAMES))
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line, and nothing else on stdout")
    given = parser.parse_args(words)
    if given.pairs < MIN_PAIRS:
        raise SystemExit(f"--pairs {given.pairs}: at least {MIN_PAIRS}, each of which is hard in a way of its own")
    if not (given.model / "config.json").is_file():
        raise SystemExit(f"{given.model} is not a transformers model directory: it has no config.json")
    try:
        told = compare(given.model, given.loss, num_pairs=given.pairs, seed=given.seed)
    except DpoLoopError as error:
        raise SystemExit(f"parity could not be computed for {given.model}: {error}") from error
    if given.json:
        print(json.dumps(told))
        return
    width = max(map(len, told))
    for key, value in told.items():
        print(f"{key:{width}}  {value:.3g}" if isinstance(value, float) else f"{key:{width}}  {value}")


if __name__ == "__main__":
    main()
