"""Loss and LoRA gradients against TRL's DPOTrainer on the same token ids, the same weights and the same reference."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_loop.training.models import build_accelerator, trainable_parameters
from dpo_loop.training.preferences import DpoObjective, sequences_of
from dpo_loop.training.reference import reference_logprobs
from dpo_loop.types import PolicyRef, PreferencePair
from tests.training.world import make_pair, make_pairs, training_config

LOSS_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 2e-4
"""facts/training.md §13: relative L2 over all LoRA gradients."""


def test_loss_and_gradients_equal_trl_for_a_fresh_adapter_over_the_base(tmp_path: Path, base: PolicyRef) -> None:
    trainer = trl_trainer(tmp_path, AutoModelForCausalLM.from_pretrained(base.base, dtype=torch.float32), fresh=True)
    assert_same_loss_and_gradients(trainer, reference=base, scratch=tmp_path)


def test_loss_and_gradients_equal_trl_for_a_continued_adapter(tmp_path: Path, adapted: PolicyRef) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapted.base, dtype=torch.float32)
    trainer = trl_trainer(tmp_path, PeftModel.from_pretrained(model, adapted.adapter, is_trainable=True), fresh=False)
    assert_same_loss_and_gradients(trainer, reference=adapted, scratch=tmp_path)


def ragged_pairs() -> list[PreferencePair]:
    """Ten ragged pairs, then a one-token prompt with one-token completions."""
    return [*make_pairs(10, seed=3, max_completion=30), make_pair("short", prompt=(7,), chosen=(0,), rejected=(9,))]


def trl_trainer(out: Path, model: Any, *, fresh: bool) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class OnTokenIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

    rows = [
        {"prompt_ids": list(p.prompt_token_ids), "chosen_ids": list(p.chosen_token_ids), "rejected_ids": list(p.rejected_token_ids)}
        for p in ragged_pairs()
    ]
    base = model.get_base_model() if not fresh else model
    args = DPOConfig(
        output_dir=str(out / "trl"), beta=0.1, bf16=False, max_length=None, gradient_checkpointing=False, use_cpu=True, report_to=[]
    )
    shape = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") if fresh else None
    return OnTokenIds(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base.name_or_path),
        peft_config=shape,
    )


def assert_same_loss_and_gradients(trainer: Any, *, reference: PolicyRef, scratch: Path) -> None:
    model = trainer.model
    move_away_from_the_reference(model)
    theirs_loss = trainer.compute_loss(model, trainer.data_collator(list(trainer.train_dataset)))
    theirs_loss.backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters() if ".default." in name}

    ours_model = without_trl(model, reference)
    parameters = trainable_parameters(ours_model, adapter_only=True)
    assert parameters.keys() == theirs.keys()
    chosen, rejected = sequences_of(ragged_pairs())
    accelerator = build_accelerator("float32")
    values = reference_logprobs(reference, [*chosen, *rejected], accelerator=accelerator, keep=scratch, max_tokens=100)
    objective = DpoObjective(
        ours_model,
        chosen,
        rejected,
        chosen_reference=values[: len(chosen)],
        rejected_reference=values[len(chosen) :],
        config=training_config(),
        device=torch.device("cpu"),
        start_tolerance=None,
    )
    sums = objective.sums(range(len(chosen)))
    loss = sums["loss"] / len(chosen)
    loss.backward()
    assert float(sums["moved"]) > 1.0  # the reference is elsewhere, so the loss is not ln 2 by construction
    assert loss.item() == pytest.approx(theirs_loss.item(), abs=LOSS_TOLERANCE)
    ours = {name: parameter.grad for name, parameter in parameters.items()}
    assert relative_l2(ours, theirs) < GRADIENT_TOLERANCE


def move_away_from_the_reference(model: Any) -> None:
    """LoRA B away from where it was, so that neither the log-ratios nor the gradient of A are at zero."""
    noise = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B.default." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))


def without_trl(model: Any, reference: PolicyRef) -> Any:
    """A model built by peft alone with the same adapter weights: TRL patches the forward of the one it holds."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if ".default." in name}
    shape = copy.deepcopy(model.peft_config["default"])
    ours = PeftModel(AutoModelForCausalLM.from_pretrained(reference.base, dtype=torch.float32), shape).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".default." in name:
                parameter.copy_(weights[name])
    return ours


def relative_l2(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return float(difference / sum(float(grad.double().square().sum()) for grad in theirs.values())) ** 0.5
