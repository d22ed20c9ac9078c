"""A merged model says what base + adapter says, or there is none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_loop.config import LoraShape, OptimizerConfig
from dpo_loop.errors import PolicyError
from dpo_loop.policies import describe_policy, model_problems, read_policy
from dpo_loop.training.merge import TOLERANCE, merge
from dpo_loop.types import PolicyRef
from tests.builders import build_adapter, build_model
from tests.training.world import stage_dir, train, training_config

MESSAGES = [{"role": "user", "content": "count to five"}]


def logits(model: torch.nn.Module, tokenizer: object) -> torch.Tensor:
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: PolicyRef, pairs: Path) -> PolicyRef:
    """An adapter of the real train stage, with the canary that it left."""
    run = tmp_path_factory.mktemp("run")
    train(run, pairs=pairs, policy=base, config=training_config(optimizer=OptimizerConfig(lr=1e-2)))
    return read_policy(stage_dir(run))


def test_a_merged_model_says_what_base_and_adapter_say_without_peft(tmp_path: Path, trained: PolicyRef) -> None:
    figures = merge(trained, tmp_path / "out")
    assert figures.adapter_effect > 0.1
    assert figures.merge_difference <= figures.allowed <= TOLERANCE
    assert figures.stored_difference <= figures.allowed
    assert figures.canary_distance is not None
    assert figures.canary_distance < 1e-4
    assert (figures.num_sequences, figures.num_tokens > 8) == (8, True)
    assert model_problems(tmp_path / "out") == []
    assert not [path.name for path in (tmp_path / "out").iterdir() if "adapter" in path.name]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained.base), trained.adapter)
    together = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert together.dtype is torch.float32
    assert (logits(together, tokenizer) - logits(apart, tokenizer)).abs().max() < 1e-4


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_an_adapter_of_another_variant_is_trained_saved_continued_and_merged_alike(
    tmp_path: Path, base: PolicyRef, pairs: Path, variant: str
) -> None:
    """The log-probs are those that training left, of base + adapter as PEFT loads it, and of the merged model."""
    lora = LoraShape(rank=4, alpha=8, variant=variant)
    config = training_config(optimizer=OptimizerConfig(lr=1e-2), lora=lora)
    train(tmp_path / "one", pairs=pairs, policy=base, config=config)
    policy = read_policy(stage_dir(tmp_path / "one"))
    shape = json.loads((Path(policy.adapter) / "adapter_config.json").read_text())
    assert (shape["use_rslora"], shape["use_dora"]) == (variant == "rslora", variant == "dora")
    figures = merge(policy, tmp_path / "out")
    assert figures.adapter_effect > 0.1
    assert figures.merge_difference <= figures.allowed
    assert figures.stored_difference <= figures.allowed
    assert figures.canary_distance < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy.base), policy.adapter)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokenizer) - logits(apart, tokenizer)).abs().max() < 1e-4
    config = training_config(optimizer=OptimizerConfig(lr=1e-6))
    going_on = train(tmp_path / "two", pairs=pairs, policy=policy, config=config).outcome.metrics
    assert going_on["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    again = json.loads((Path(read_policy(stage_dir(tmp_path / "two")).adapter) / "adapter_config.json").read_text())
    assert again == shape


def test_tokenizer_and_chat_template_are_those_of_the_base_byte_by_byte(tmp_path: Path, trained: PolicyRef) -> None:
    merge(trained, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (Path(trained.base) / name).read_bytes()
    texts = [path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".jinja")]
    assert not [text for text in texts if trained.base in text]


def test_what_else_lies_beside_a_base_is_not_shipped(tmp_path: Path) -> None:
    """Every *.json and *.txt of the base went along: notes, credentials, the logs of whoever trained it."""
    model = build_model(tmp_path / "model")
    for name in ("trainer_state.json", "credentials.json", "notes.txt", "other.model", "mail.jinja"):
        (model / name).write_text("{}")
    wanted = {"vocab.txt", "special_tokens_map.json", "additional_chat_templates/tools.jinja"}
    (model / "additional_chat_templates").mkdir()
    for name in wanted:
        (model / name).write_text("{}")
    merge(describe_policy(model), tmp_path / "out")
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    made = {"config.json", "model.safetensors"}
    assert there - made - wanted == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert made | wanted <= there


def test_the_weights_may_be_read_by_whoever_may_read_the_rest(tmp_path: Path, base: PolicyRef) -> None:
    """safetensors makes them 0600, and a server under another user could not load them."""
    merge(base, tmp_path / "out")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    assert len(set(modes.values())) == 1


def test_stored_in_bfloat16_what_the_cast_costs_is_told(tmp_path: Path, trained: PolicyRef) -> None:
    figures = merge(trained, tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert figures.merge_difference <= figures.allowed, "the merge itself is in fp32"
    assert figures.allowed < figures.stored_difference < figures.adapter_effect


def test_a_policy_without_an_adapter_is_its_base(tmp_path: Path, base: PolicyRef) -> None:
    figures = merge(base, tmp_path / "out")
    assert (figures.adapter_effect, figures.merge_difference, figures.stored_difference) == (0, 0, 0)
    assert figures.canary_distance is None
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", Path(base.base)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_without_a_canary_is_compared_on_sequences_of_our_own(tmp_path: Path, adapted: PolicyRef) -> None:
    figures = merge(adapted, tmp_path / "out")
    assert (figures.num_sequences, figures.canary_distance) == (8, None)


def test_a_merge_that_differs_is_refused_with_its_figures(tmp_path: Path, trained: PolicyRef) -> None:
    with pytest.raises(PolicyError, match=r"merged model and base \+ adapter differ by .* above 1.00e-12; .*--what adapter"):
        merge(trained, tmp_path / "out", tolerance=1e-12)
    assert not (tmp_path / "out").exists()


def test_an_adapter_smaller_than_the_tolerance_may_not_be_lost_either(tmp_path: Path, base: PolicyRef) -> None:
    adapter = build_adapter(tmp_path / "adapter", Path(base.base), rank=4, scale=3e-5)
    figures = merge(describe_policy(Path(base.base), adapter=adapter), tmp_path / "out")
    assert 0 < figures.adapter_effect < TOLERANCE
    assert figures.allowed < figures.adapter_effect


def test_a_policy_that_is_not_the_one_its_canary_was_made_with_is_refused(
    tmp_path: Path, trained: PolicyRef, adapted: PolicyRef
) -> None:
    with pytest.raises(PolicyError, match="was made for another policy"):
        merge(adapted.model_copy(update={"canary": trained.canary}), tmp_path / "out")
    canary = json.loads(Path(trained.canary).read_bytes())
    for row in canary["sequences"]:
        row["policy_logprobs"] = row["base_logprobs"]
    (tmp_path / "canary.json").write_text(json.dumps(canary))
    with pytest.raises(PolicyError, match="the canary that training left differ by"):
        merge(trained.model_copy(update={"canary": str(tmp_path / "canary.json")}), tmp_path / "out")


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, base: PolicyRef) -> None:
    adapter = build_adapter(tmp_path / "adapter", Path(base.base), rank=4)
    weights = load_file(adapter / "adapter_model.safetensors")
    next(tensor for name, tensor in weights.items() if "lora_B" in name)[0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyError, match="cannot be merged: NaNs detected"):
        merge(describe_policy(Path(base.base), adapter=adapter), tmp_path / "out")


def test_a_generation_config_that_transformers_would_not_save_is_carried_over(tmp_path: Path) -> None:
    """Llama 2 and others were published with a temperature for greedy decoding: loading it warns, saving it raises."""
    model = build_model(tmp_path / "model")
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": False, "temperature": 0.9}))
    merge(describe_policy(model), tmp_path / "out")
    assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
