"""TRL's DPOTrainer on given token ids: the peer of train_vs_trl, and of parity for the losses it has.

A pass is `trainer.train()` over one epoch, with its own data loader, sampler, optimizer and clipping; logging, saving and progress bars are
off. The columns are pre-tokenised, so its tokenisation is skipped and both sides see the same ids. Nothing of dpo_loop is imported here:
what its rooms do to a process on import stays out of the peer's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from tests.benchmarks.shapes import IdPair, move_adapter

disable_progress_bar()

QUIET: dict[str, Any] = {"logging_strategy": "no", "save_strategy": "no", "report_to": [], "disable_tqdm": True}


class OnTokenIds(DPOTrainer):
    """Takes the columns as they are, and tells how long its pass over the reference took."""

    precompute_s = 0.0

    def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        made = super()._precompute_ref_logps(*args, **kwargs)
        self.precompute_s = time.perf_counter() - began
        return made


def padding_tokenizer() -> PreTrainedTokenizerFast:
    """All that a trainer wants of a tokenizer here is a padding id."""
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>", bos_token="<pad>")


def columns(pairs: Sequence[IdPair]) -> Dataset:
    return Dataset.from_list(
        [{"prompt_ids": list(p.prompt), "chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected)} for p in pairs]
    )


def lora_config(lora: Mapping[str, Any]) -> LoraConfig:
    return LoraConfig(**lora, task_type="CAUSAL_LM")


def base_model(path: str, *, dtype: torch.dtype, attention: str | None = None) -> Any:
    """attention: None takes transformers' default, but eager for a model with an attention soft-cap, which sdpa would drop."""
    if attention is None and getattr(AutoConfig.from_pretrained(path).get_text_config(), "attn_logit_softcapping", None):
        attention = "eager"
    chosen = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **chosen)


def loss_and_gradients(trainer: Any, *, micro_pairs: int, checkpointing: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over all rows and its gradient, by the trainer's own compute_loss, micro_pairs at a time.

    In eval mode, but where checkpointing needs train mode: TRL switches `nn.Dropout` off, not the functional dropout of OPT and its like.
    """
    model, rows, loss = trainer.model, list(trainer.train_dataset), 0.0
    model.train(checkpointing)
    model.zero_grad(set_to_none=True)
    for start in range(0, len(rows), micro_pairs):
        micro = rows[start : start + micro_pairs]
        inputs = trainer._prepare_inputs(trainer.data_collator(micro))
        with trainer.compute_loss_context_manager():
            part = trainer.compute_loss(model, inputs) * len(micro) / len(rows)
        trainer.accelerator.backward(part)
        loss += float(part.detach())
    gradients = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss, gradients


class TrlSide:
    """What train_vs_trl asks of a side. lora: of LoraConfig; the adapter is moved away from the base, which is the reference."""

    def __init__(
        self, model: str, pairs: Sequence[IdPair], *, out: Path, lora: Mapping[str, Any], micro_pairs: int, pairs_per_step: int,
        checkpointing: bool, device: str,
    ) -> None:  # fmt: skip
        cuda = device == "cuda"
        config = DPOConfig(
            output_dir=str(out), per_device_train_batch_size=micro_pairs, gradient_accumulation_steps=pairs_per_step // micro_pairs,
            num_train_epochs=1, bf16=cuda, use_cpu=not cuda, max_length=None, gradient_checkpointing=checkpointing,
            dataloader_pin_memory=cuda, learning_rate=5e-6, beta=0.1, router_aux_loss_coef=0.0, precompute_ref_log_probs=True, **QUIET,
        )  # fmt: skip
        self.micro_pairs, self.checkpointing = micro_pairs, checkpointing
        self.trainer = OnTokenIds(
            model=base_model(model, dtype=torch.bfloat16 if cuda else torch.float32), args=config, train_dataset=columns(pairs),
            processing_class=padding_tokenizer(), peft_config=lora_config(lora),
        )  # fmt: skip
        self.model = self.trainer.model
        move_adapter(self.model)
        self.facts = {"precompute_s": self.trainer.precompute_s}

    def gradients(self) -> dict[str, torch.Tensor]:
        return loss_and_gradients(self.trainer, micro_pairs=self.micro_pairs, checkpointing=self.checkpointing)[1]

    def one_pass(self, *, online: bool) -> None:
        """An epoch. online: the reference is forwarded beside the policy in every step, by switching the adapter off."""
        self.trainer.precompute_ref_logps = not online
        self.trainer.train()
