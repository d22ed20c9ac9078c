"""Loss and LoRA gradients against TRL 1.16 on the same token ids, the same weights and the same reference, for every loss both have.

Building a trainer takes seconds, so the DPOTrainer is built once and its settings are switched from loss to loss.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer

from dpo_loop.config import KtoLoss
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.objectives.kto import KtoObjective, mismatched, split_pairs
from dpo_loop.types import PolicyRef
from tests.training.trl_trainers import (
    CHOSEN,
    COMMON,
    REJECTED,
    ROWS,
    Ours,
    dpo_trainer,
    lora_shape,
    move_away_from_the_reference,
    plain_model,
    reference_free_trainer,
    set_loss,
)


@pytest.fixture(scope="module")
def ours(base: PolicyRef) -> Ours:
    model = get_peft_model(plain_model(base), lora_shape()).eval()
    move_away_from_the_reference(model)
    return Ours(model, build_scorer(model, device=torch.device("cpu"), forward="auto"), plain_model(base))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


@pytest.fixture(scope="module")
def dpo(ours: Ours, base: PolicyRef, out: Path) -> Any:
    """A DPOTrainer with our adapter, whose reference is the base."""
    trainer = dpo_trainer(out, plain_model(base), base, peft_config=lora_shape())
    ours.give_adapter(trainer.model)
    return trainer


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "sigmoid"},
        {"kind": "sigmoid", "ld_alpha": 0.3},
        {"kind": "sigmoid", "wpo": True},
        {"kind": "sigmoid", "f_divergence": "forward_kl"},
        {"kind": "sigmoid", "f_divergence": "js_divergence"},
        {"kind": "sigmoid", "f_divergence": "alpha_divergence"},
        {"kind": "sigmoid", "f_divergence": "alpha_divergence", "f_alpha": 0.8, "ld_alpha": 0.3, "wpo": True},
        {"kind": "sigmoid_norm"},
        {"kind": "sigmoid_norm", "f_divergence": "js_divergence", "ld_alpha": 0.0},
        {"kind": "robust", "label_smoothing": 0.2},
        {"kind": "robust", "f_divergence": "js_divergence"},
        {"kind": "exo_pair", "label_smoothing": 0.1},
        {"kind": "exo_pair", "f_divergence": "js_divergence"},
        {"kind": "hinge"},
        # Not with wpo: TRL weighs in place, which the backward pass of its relu refuses.
        {"kind": "hinge", "f_divergence": "alpha_divergence"},
        {"kind": "ipo"},
        {"kind": "ipo", "f_divergence": "js_divergence", "ld_alpha": 0.5},
        {"kind": "nca_pair", "ld_alpha": 0.3},
        {"kind": "sppo_hard"},
        {"kind": "sppo_hard", "beta": 0.1, "wpo": True},
        {"kind": "apo_zero"},
        {"kind": "apo_zero", "ld_alpha": 0.3, "wpo": True},
        {"kind": "apo_down"},
    ],
    ids=lambda loss: "-".join(map(str, loss.values())),
)
def test_a_loss_and_its_gradient_equal_those_of_trls_dpo_trainer(ours: Ours, dpo: Any, loss: dict[str, Any]) -> None:
    objective = ours.pairs(loss)
    set_loss(dpo, objective)
    sums = objective.sums(ROWS, estimates={})
    assert float(sums["moved"]) > 1.0  # the reference is elsewhere, so the loss is not that at the reference by construction
    ours.assert_equals(dpo.model, dpo.compute_loss(dpo.model, dpo.data_collator(list(dpo.train_dataset))), objective)


def test_the_nll_term_equals_trls_sft_term_of_a_batch_of_one_pair(ours: Ours, dpo: Any) -> None:
    """TRL's is a mean over all chosen tokens of the micro-batch, ours a mean per sequence: with one pair they are the same."""
    objective = ours.pairs({"kind": "sigmoid"}, nll_weight=0.2)
    set_loss(dpo, objective)
    dpo.loss_types, dpo.loss_weights = ["sigmoid", "sft"], [1.0, 0.2]
    ours.assert_equals(dpo.model, dpo.compute_loss(dpo.model, dpo.data_collator([dpo.train_dataset[3]])), objective, rows=[3])


def test_loss_and_gradients_equal_trl_for_a_continued_adapter(out: Path, base: PolicyRef, adapted: PolicyRef) -> None:
    def continued() -> Any:
        return PeftModel.from_pretrained(plain_model(base), adapted.adapter, is_trainable=True).eval()

    trainer = dpo_trainer(out, continued(), base, peft_config=None)  # the reference is the adapter as it is now
    model, reference = continued(), continued()
    for each in (trainer.model, model):
        move_away_from_the_reference(each)
    ours = Ours(model, build_scorer(model, device=torch.device("cpu"), forward="auto"), reference)
    objective = ours.pairs({"kind": "sigmoid"})
    set_loss(trainer, objective)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    ours.assert_equals(trainer.model, loss, objective)


@pytest.mark.parametrize("loss", [KtoLoss(kind="kto"), KtoLoss(kind="kto", beta=0.5, desirable_weight=1.3, undesirable_weight=0.7)])
def test_kto_and_its_gradient_equal_those_of_trls_kto_trainer(ours: Ours, base: PolicyRef, out: Path, loss: KtoLoss) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    class OnTokenIds(KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

    examples = split_pairs(CHOSEN, REJECTED)
    others = mismatched(examples, max_length=512)
    objective = KtoObjective(
        ours.scorer,
        examples,
        reference=ours.reference_logps([each.sequence for each in examples]),
        mismatched=others,
        mismatched_reference=ours.reference_logps(others),
        loss=loss,
        nll_weight=0.0,
        start_tolerance=None,
    )
    rows = [
        {
            "prompt_ids": list(sequence.prompt),
            "completion_ids": list(sequence.completion),
            "KL_completion_ids": list(other.completion),
            "label": desirable,
        }
        for (sequence, desirable), other in zip(examples, others, strict=True)
    ]
    weights = {"desirable_weight": loss.desirable_weight, "undesirable_weight": loss.undesirable_weight}
    trainer = OnTokenIds(
        model=plain_model(base),
        args=KTOConfig(
            output_dir=str(out), beta=loss.beta, max_length=None, train_sampling_strategy="sequential", **weights, **COMMON
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base.base),
        peft_config=lora_shape(),
    )
    ours.give_adapter(trainer.model)
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    ours.assert_equals(trainer.model, theirs, objective, rows=range(len(examples)))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_and_its_gradient_equal_those_of_trls_cpo_trainer(
    ours: Ours, base: PolicyRef, out: Path, label_smoothing: float
) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0, "label_smoothing": label_smoothing}
    trainer = reference_free_trainer(CPOTrainer, CPOConfig(output_dir=str(out), max_length=512, **settings, **COMMON), base)
    ours.give_adapter(trainer.model)
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    loss = {"kind": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5, "label_smoothing": label_smoothing}
    ours.assert_equals(trainer.model, theirs, ours.pairs(loss))


def test_orpo_and_its_gradient_equal_those_of_trls_orpo_trainer_but_for_the_reduction_of_the_nll(
    ours: Ours, base: PolicyRef, out: Path
) -> None:
    """TRL's NLL is over prompt and completion, a mean over the tokens of the micro-batch; here their log-probs are reduced as ours."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = reference_free_trainer(ORPOTrainer, ORPOConfig(output_dir=str(out), max_length=512, beta=0.2, **COMMON), base)
    ours.give_adapter(trainer.model)
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    odds_B, *_ = trainer.odds_ratio_loss(chosen, rejected)
    ours.assert_equals(trainer.model, -chosen.mean() - odds_B.mean(), ours.pairs({"kind": "orpo", "beta": 0.2}))
