"""Which of TRL 1.16's trainers has a loss, and the loss and LoRA gradients it finds: the second opinion of parity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from dpo_loop.config import KtoLoss, Loss, OrpoLoss, PairLoss, SigmoidLoss, SigmoidNormLoss, SimpoLoss
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.objectives.kto import Example
from tests.benchmarks.shapes import IdPair, move_adapter
from tests.benchmarks.trl_side import QUIET, OnTokenIds, base_model, columns, lora_config, loss_and_gradients, padding_tokenizer


def lacks(loss: Loss, *, nll_weight: float) -> str | None:
    """Why TRL cannot be asked for this loss; None where it can."""
    if nll_weight:
        return "TRL's NLL term is a mean over all chosen tokens of the micro-batch, not per sequence"
    if isinstance(loss, SigmoidLoss | SigmoidNormLoss) and loss.label_smoothing:
        return f"TRL's {loss.kind} ignores label_smoothing"
    return None


@dataclass(frozen=True)
class Trl:
    """model: a transformers directory. lora: of LoraConfig. out: where trainers may write. seed: of move_adapter."""

    model: str
    lora: Mapping[str, Any]
    out: Path
    seed: int

    def of_pairs(self, loss: PairLoss, pairs: Sequence[IdPair]) -> tuple[float, dict[str, Tensor]]:
        """By the DPOTrainer, whose names for losses and their settings are ours."""
        smoothing = {"label_smoothing": loss.label_smoothing} if getattr(loss, "label_smoothing", 0) else {}
        divergence = (
            {"f_divergence_type": loss.f_divergence, "f_alpha_divergence_coef": loss.f_alpha}
            if hasattr(loss, "f_divergence")
            else {}
        )
        settings = {"beta": loss.beta, "loss_type": [loss.kind], "ld_alpha": loss.ld_alpha, "use_weighting": loss.wpo}
        config = DPOConfig(**self._common(), max_length=None, router_aux_loss_coef=0.0, **settings, **smoothing, **divergence)
        return self._ask(OnTokenIds, config, columns(pairs))

    def of_examples(
        self, loss: KtoLoss, examples: Sequence[Example], mismatched: Sequence[TokenSequence]
    ) -> tuple[float, dict[str, Tensor]]:
        """By the KTOTrainer, with our choice of mismatched completions."""
        rows = [
            {"prompt_ids": list(each.sequence.prompt), "completion_ids": list(each.sequence.completion),
             "KL_completion_ids": list(other.completion), "label": each.desirable}
            for each, other in zip(examples, mismatched, strict=True)
        ]  # fmt: skip
        weights = {"desirable_weight": loss.desirable_weight, "undesirable_weight": loss.undesirable_weight}
        config = KTOConfig(
            **self._common(), max_length=None, beta=loss.beta, train_sampling_strategy="sequential",
            per_device_train_batch_size=len(rows), router_aux_loss_coef=0.0, **weights,
        )  # fmt: skip
        return self._ask(_KtoOnTokenIds, config, Dataset.from_list(rows))

    def without_reference(self, loss: SimpoLoss | OrpoLoss, pairs: Sequence[IdPair]) -> tuple[float, dict[str, Tensor]]:
        """By the experimental CPOTrainer and ORPOTrainer. TRL's NLL of ORPO is over prompts, too, and a mean over the tokens of a micro-batch:
        its log-probs and odds are taken, reduced as ours."""
        length = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
        rows = Dataset.from_list([{"prompt": "", "chosen": "c", "rejected": "r", "row": row} for row in range(len(pairs))])
        _LabelledIds.pairs = pairs
        if isinstance(loss, SimpoLoss):
            gamma = loss.beta * loss.gamma_beta_ratio
            settings = {"beta": loss.beta, "loss_type": "simpo", "simpo_gamma": gamma, "label_smoothing": loss.label_smoothing}
            return self._ask(_SimpoOnTokenIds, CPOConfig(**self._common(), max_length=length, cpo_alpha=0.0, **settings), rows)
        return self._ask(_OrpoOnTokenIds, ORPOConfig(**self._common(), max_length=length, beta=loss.beta), rows)

    def _common(self) -> dict[str, Any]:
        return {"output_dir": str(self.out), "bf16": False, "use_cpu": True, "gradient_checkpointing": False, **QUIET}

    def _ask(self, trainer_class: Any, config: Any, rows: Dataset) -> tuple[float, dict[str, Tensor]]:
        trainer = trainer_class(
            model=base_model(self.model, dtype=torch.float32, attention="eager"), args=config, train_dataset=rows,
            processing_class=padding_tokenizer(), peft_config=lora_config(self.lora),
        )  # fmt: skip
        move_adapter(trainer.model, seed=self.seed)
        return loss_and_gradients(trainer, micro_pairs=len(rows))


class _KtoOnTokenIds(KTOTrainer):
    def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
        return dataset


class _LabelledIds:
    """For trainers that tokenise row by row: what they get is a number."""

    pairs: Sequence[IdPair] = ()

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, list[int]]:
        prompt, *completions = self.pairs[feature["row"]]
        row = {}
        for side, completion in zip(("chosen", "rejected"), completions, strict=True):
            ids = [*prompt, *completion]
            labels = [-100] * len(prompt) + list(completion)
            row |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids), f"{side}_labels": labels}
        return row


class _SimpoOnTokenIds(_LabelledIds, CPOTrainer):
    pass


class _OrpoOnTokenIds(_LabelledIds, ORPOTrainer):
    def compute_loss(self, model: Any, inputs: Any, *_args: Any, **_kwargs: Any) -> Tensor:
        chosen_B, rejected_B, *_ = self.concatenated_forward(model, inputs)
        odds_B, *_ = self.odds_ratio_loss(chosen_B, rejected_B)
        return -chosen_B.mean() - odds_B.mean()
