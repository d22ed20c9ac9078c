"""Both sides of the parity with TRL: our policy, and TRL's trainers on the token ids of the same pairs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from pydantic import TypeAdapter
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_loop.config import Loss
from dpo_loop.training.forward.logprobs import Scorer, completion_logprobs
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.objectives.kto import KtoObjective
from dpo_loop.training.objectives.preferences import PairObjective, sequences_of
from dpo_loop.types import PolicyRef
from tests.training.world import make_pair, make_pairs

LOSS_TOLERANCE = 5e-5
"""Absolute; relative to losses above 1, which in fp32 have no more digits."""
GRADIENT_TOLERANCE = 2e-4
"""facts/training.md §13: relative L2 over all LoRA gradients."""

# Ten ragged pairs, then a one-token prompt with one-token completions.
PAIRS = [*make_pairs(10, seed=3, max_completion=30), make_pair("short", prompt=(7,), chosen=(0,), rejected=(9,))]
CHOSEN, REJECTED = sequences_of(PAIRS)
ROWS = range(len(PAIRS))


@dataclass(frozen=True)
class Ours:
    """A policy of peft alone, away from its reference; TRL patches the forward of the models that it holds."""

    model: Any
    scorer: Scorer
    reference: Any

    @property
    def adapter(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if ".default." in name}

    def reference_logps(self, sequences: list[TokenSequence]) -> list[Tensor]:
        with torch.no_grad():
            logps_N = completion_logprobs(self.reference, sequences, device=torch.device("cpu"))
        return list(torch.split(logps_N, [len(each.completion) for each in sequences]))

    def pairs(self, loss: dict[str, Any], *, nll_weight: float = 0.0) -> PairObjective:
        free = loss["kind"] in ("simpo", "orpo")
        return PairObjective(
            self.scorer,
            CHOSEN,
            REJECTED,
            chosen_reference=None if free else self.reference_logps(CHOSEN),
            rejected_reference=None if free else self.reference_logps(REJECTED),
            loss=TypeAdapter(Loss).validate_python(loss),
            nll_weight=nll_weight,
            start_tolerance=None,
        )

    def assert_equals(self, theirs: Any, theirs_loss: Tensor, objective: PairObjective | KtoObjective, rows: Any = ROWS) -> None:
        """theirs: the model that theirs_loss was computed with; it is given our adapter by `give_adapter` before."""
        estimates = {name: value.item() for name, value in objective.estimates(rows).items()}
        sums = objective.sums(rows, estimates=estimates)
        loss = sums["loss"] / objective.size(rows)
        assert loss.item() == pytest.approx(theirs_loss.item(), abs=LOSS_TOLERANCE * max(1.0, abs(loss.item())))
        ours = gradients(loss, self.adapter)
        expected = gradients(theirs_loss, {n: p for n, p in theirs.named_parameters() if ".default." in n})
        assert ours.keys() == expected.keys()
        assert relative_l2(ours, expected) < GRADIENT_TOLERANCE

    def give_adapter(self, model: Any) -> None:
        theirs = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.adapter.items():
                theirs[name].copy_(parameter)


def gradients(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def relative_l2(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return float(difference / sum(float(grad.double().square().sum()) for grad in theirs.values())) ** 0.5


def plain_model(base: PolicyRef) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.base, dtype=torch.float32)


def lora_shape(target: str | list[str] = "all-linear") -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=target, task_type="CAUSAL_LM")


def move_away_from_the_reference(model: Any) -> None:
    """LoRA B away from where it was, so that neither the log-ratios nor the gradient of A are at zero."""
    noise = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B.default." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))


COMMON: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": []}


def dpo_trainer(out: Path, model: Any, base: PolicyRef, *, peft_config: LoraConfig | None) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class OnTokenIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

    rows = [
        {"prompt_ids": list(p.prompt_token_ids), "chosen_ids": list(p.chosen_token_ids), "rejected_ids": list(p.rejected_token_ids)}
        for p in PAIRS
    ]
    return OnTokenIds(
        model=model,
        args=DPOConfig(output_dir=str(out), max_length=None, use_weighting=True, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base.base),
        peft_config=peft_config,
    )


def set_loss(trainer: Any, objective: PairObjective) -> None:
    loss = objective.loss
    trainer.loss_types, trainer.loss_weights, trainer.beta = [loss.kind], [1.0], loss.beta
    trainer.label_smoothing = getattr(loss, "label_smoothing", 0.0)
    trainer.ld_alpha, trainer.use_weighting = loss.ld_alpha, loss.wpo
    trainer.f_divergence_type = getattr(loss, "f_divergence", "reverse_kl")
    trainer.f_alpha_divergence_coef = getattr(loss, "f_alpha", 0.5)


def reference_free_trainer(trainer_class: Any, args: Any, base: PolicyRef) -> Any:
    from datasets import Dataset

    class OnTokenIds(trainer_class):
        def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, list[int]]:
            pair, row = PAIRS[feature["row"]], {}
            for side, completion in (("chosen", pair.chosen_token_ids), ("rejected", pair.rejected_token_ids)):
                ids = [*pair.prompt_token_ids, *completion]
                row |= {
                    f"{side}_input_ids": ids,
                    f"{side}_attention_mask": [1] * len(ids),
                    f"{side}_labels": [-100] * len(pair.prompt_token_ids) + list(completion),
                }
            return row

    rows = [{"prompt": "", "chosen": "c", "rejected": "r", "row": row} for row in ROWS]
    return OnTokenIds(
        model=plain_model(base),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base.base),
        peft_config=lora_shape(),
    )
