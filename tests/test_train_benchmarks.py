"""The benchmarks of training, run on a tiny model: that they compare what they say they compare. What they find is in their lab log."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from dpo_loop.training.forward.logprobs import TokenScores
from dpo_loop.training.forward.sequences import TokenSequence
from tests.benchmarks import parity, train_vs_trl
from tests.benchmarks.parity import MIN_PAIRS, NAMES, SeparateForwards, compare, examples_for, found_by, hard_pairs, named
from tests.benchmarks.shapes import Case, draw_pairs, move_adapter, relative_l2, shape
from tests.benchmarks.trl_side import base_model, lora_config
from tests.builders import build_model

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
GRADIENT_TOLERANCE = 2e-4
"""facts/training.md §13, against TRL."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without a tokenizer."""
    model = build_model(tmp_path_factory.mktemp("tiny") / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    return model


@pytest.mark.slow
def test_both_sides_train_the_same_and_the_last_line_says_how_fast(tiny: Path) -> None:
    words = ["--model", str(tiny), "--cases", "20/10", "--pairs", "8", "--repeats", "1", "--json"]
    command = [sys.executable, "-m", "tests.benchmarks.train_vs_trl", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(done.stdout.splitlines()[-1])["cases"]
    assert (case["prompt"], case["completion"], case["packed"]) == (20, 10, True)
    assert 0 < case["grad_rel_diff"] < GRADIENT_TOLERANCE  # exactly 0 would be one side compared with itself
    for opening in ("", "online_"):
        ours, trl = (case[f"{opening}{side}_pairs_per_s"] for side in ("ours", "trl"))
        assert case[f"{opening}speed_ratio"] == pytest.approx(ours / trl)
        ours, trl = (case[f"{opening}{side}_peak_mb"] for side in ("ours", "trl"))
        assert case[f"{opening}memory_ratio"] == pytest.approx(ours / trl)


def test_parity_compares_the_packed_forward_with_separate_ones_and_with_trl(tiny: Path) -> None:
    told = compare(tiny, "sigmoid", num_pairs=MIN_PAIRS, seed=0)
    assert told["packed"]
    assert told["loss_diff"] < 1e-5
    assert 0 < told["grad_rel_diff"] < 1e-5
    assert told["trl_loss_diff"] < 5e-5
    assert 0 < told["trl_grad_rel_diff"] < GRADIENT_TOLERANCE


def test_parity_of_a_loss_that_trl_lacks_says_so_as_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parity.main(["--model", str(tiny), "--loss", "cDPO", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["grad_rel_diff"] < 1e-5
    assert (told["trl_loss_diff"], told["trl_grad_rel_diff"]) == (None, None)
    assert "label_smoothing" in told["trl"]


class LeakyForwards(SeparateForwards):
    """Every completion also sees the one before it: what a packed row does whose branches are not kept apart."""

    def __call__(self, sequences: Sequence[TokenSequence], *, with_collisions: bool = False) -> TokenScores:
        before = ((), *(completion for _, completion in sequences))
        leaky = [TokenSequence(prompt + other, own) for other, (prompt, own) in zip(before, sequences, strict=False)]
        return super().__call__(leaky, with_collisions=with_collisions)


def test_a_forward_whose_branches_see_each_other_is_found_out(tiny: Path) -> None:
    pairs = hard_pairs(MIN_PAIRS, vocab_size=320, beyond=0, seed=0)
    model = get_peft_model(base_model(str(tiny), dtype=torch.float32, attention="eager"), lora_config(LORA)).eval()
    move_adapter(model)
    right, wrong = (
        found_by(forwards(model), model, examples_for(pairs, "sigmoid")) for forwards in (SeparateForwards, LeakyForwards)
    )
    assert relative_l2(wrong.gradients, right.gradients) > 0.1


def test_a_model_that_is_none_ends_parity_without_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"no config\.json"):  # a text: the exit code is 1
        parity.main(["--model", str(tmp_path), "--loss", "dpo", "--json"])
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_not_measured_where_there_is_none() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        train_vs_trl.main(["--device", "cuda", "--shape", "7b"])


def test_every_name_is_a_loss_and_an_unknown_one_lists_them() -> None:
    assert {named(name)[0].kind for name in NAMES} <= set(NAMES)
    assert named("APO-zero") == named("apo_zero")
    assert named('{"kind": "ipo", "ld_alpha": 0.3}')[0].ld_alpha == 0.3
    with pytest.raises(SystemExit, match="sppo_hard"):
        named("ppo")


def test_hard_pairs_share_prompts_and_completions_and_reach_beyond_a_window() -> None:
    pairs = hard_pairs(9, vocab_size=50, beyond=40, seed=1)
    used = [(pair.prompt, completion) for pair in pairs for completion in (pair.chosen, pair.rejected)]
    assert len(set(used)) < len(used)  # a completion in two pairs
    assert len({pair.prompt for pair in pairs}) < len(pairs)
    lengths = [(len(prompt), len(completion)) for prompt, completion in used]
    assert min(lengths)[0] == 1
    assert min(completion for _, completion in lengths) == 1
    assert max(completion for _, completion in lengths) >= 40


def test_a_case_draws_ragged_pairs_about_its_lengths_and_always_the_same() -> None:
    pairs = draw_pairs(Case(100, 40), 50, vocab_size=30)
    assert pairs == draw_pairs(Case(100, 40), 50, vocab_size=30)
    assert {len(pair.prompt) for pair in pairs} <= set(range(75, 126))
    assert {len(pair.rejected) for pair in pairs} <= set(range(30, 51))
    assert len({len(pair.chosen) for pair in pairs}) > 5


def test_the_25m_shape_is_the_one_of_the_facts_page() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape("25m"))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(25.7e6, rel=0.005)


def test_gradients_of_other_parameters_are_not_compared() -> None:
    one = {"a": torch.ones(2)}
    assert relative_l2({"a": torch.tensor([1.0, 1.1])}, one) == pytest.approx(0.1 / 2**0.5, rel=1e-5)
    with pytest.raises(SystemExit, match="not the same parameters"):
        relative_l2({"b": torch.ones(2)}, one)
