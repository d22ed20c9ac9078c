"""`dpo-loop estimate` says whether training fits: into this machine, or into a card that is not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flows.cli import main
from tests.flows.runs import publish, raw_config, write_config
from tests.training.shapes import LLAMA_8B, write_shape

FSDP2 = Path(__file__).parents[2] / "deploy" / "accelerate" / "fsdp2.yaml"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_shape(tmp_path / "llama", LLAMA_8B)


def estimated(folder: Path, model: str, *options: str, **training: Any) -> tuple[Result, dict[str, Any]]:
    raw = raw_config(
        folder / "run",
        start={"kind": "model", "model": model},
        training={"loss": {"kind": "sigmoid"}, **training},
        generation={"engine": {"kind": "vllm_offline", "max_model_len": 2048, "max_lora_rank": 16}, "max_new_tokens": 16},
    )
    done = CliRunner().invoke(main, ["estimate", str(write_config(folder / "c.yaml", raw)), "--json", *options])
    assert done.exit_code == 0, done.output
    told: dict[str, Any] = json.loads(done.output.splitlines()[-1])["training"]
    return done, told


def test_a_card_that_is_not_here_is_asked_about(tmp_path: Path, llama: Path) -> None:
    done, told = estimated(tmp_path, str(llama), "--memory-gib", "24")
    assert (told["device"], told["limit_bytes"], told["fits"]) == ("cuda", 24 * 2**30, True)
    assert "limit: a GPU of 24 GiB" in done.output
    assert f"micro-batches of {told['micro_batch_tokens']:,} tokens, with gradient checkpointing, on the GPU" in done.output


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1", "1e308"])
def test_a_size_that_no_card_has_is_refused(size: str, tmp_path: Path, llama: Path) -> None:
    raw = raw_config(tmp_path / "run", start={"kind": "model", "model": str(llama)})
    done = CliRunner().invoke(main, ["estimate", str(write_config(tmp_path / "c.yaml", raw)), "--memory-gib", size])
    assert done.exit_code == 2
    assert "--memory-gib" in done.output


def test_an_accelerate_config_says_how_many_processes_share_the_machine_and_whether_the_base_is_in_shards(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _, one = estimated(tmp_path, str(llama))
    path = tmp_path / "accelerate.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    whole, told = estimated(tmp_path, str(llama), accelerate_config=str(path))
    assert told["limit_bytes"] == one["limit_bytes"] // 4
    assert "shared by 4 processes" in whole.output
    assert "shards" not in whole.output
    shards, told = estimated(tmp_path, str(llama), accelerate_config=str(FSDP2))
    assert told["limit_bytes"] == one["limit_bytes"] // 8
    assert "fsdp2.yaml shards is counted as if every process held all of it" in shards.output


def test_an_accelerate_config_that_cannot_be_used_is_named(tmp_path: Path, llama: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: auto\n")
    training = {"loss": {"kind": "sigmoid"}, "accelerate_config": str(path)}
    raw = raw_config(tmp_path / "run", start={"kind": "model", "model": str(llama)}, training=training)
    done = CliRunner().invoke(main, ["estimate", str(write_config(tmp_path / "c.yaml", raw))])
    assert done.exit_code == 2
    assert "accelerate.yaml: num_processes is auto" in done.output


def test_without_checkpointing_it_is_a_way_out(tmp_path: Path, llama: Path) -> None:
    done, told = estimated(tmp_path, str(llama), "--memory-gib", "18", gradient_checkpointing=False)
    assert told["fits"] is False
    assert "training.gradient_checkpointing: auto" in done.output
    done, _ = estimated(tmp_path, str(llama), "--memory-gib", "12")
    assert "gradient_checkpointing: auto" not in done.output


def test_what_does_not_fit_has_ways_out(tmp_path: Path, llama: Path) -> None:
    done, told = estimated(tmp_path, str(llama), "--memory-gib", "12")
    assert told["fits"] is False
    assert "will probably not fit. Ways out: a smaller training.max_length" in done.output
    assert "training.quantize_base: nf4" in done.output
    _, smaller = estimated(tmp_path, str(llama), "--memory-gib", "12", quantize_base="nf4")
    assert smaller["fits"] is True


def test_the_parts_add_up_to_the_peak(tmp_path: Path, llama: Path) -> None:
    _, told = estimated(tmp_path, str(llama), "--memory-gib", "80")
    parts = ("weights_bytes", "adapter_bytes", "activations_bytes", "head_bytes", "runtime_bytes")
    assert sum(told[part] for part in parts) == told["total_bytes"]


def test_the_limit_of_a_machine_is_shared_by_its_processes(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _, one = estimated(tmp_path, str(llama))
    _, two = estimated(tmp_path, str(llama), num_processes=2)
    assert (one["device"], two["limit_bytes"]) == ("cpu", one["limit_bytes"] // 2)


def test_gpus_are_asked_of_the_driver(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA L4, 23034'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{driver.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _, told = estimated(tmp_path, str(llama))
    assert (told["device"], told["limit_bytes"], told["limit_of"]) == ("cuda", 23034 * 2**20, "NVIDIA L4")


def test_a_model_that_the_run_makes_is_not_known_before_it(tmp_path: Path) -> None:
    done, told = estimated(tmp_path, "world:model")
    assert "made by the run itself" in told["unknown"]
    assert "training of one round: world:model is made by the run itself" in done.output
    publish(tmp_path / "run" / "rounds" / "000" / "world", {})
    write_shape(tmp_path / "run" / "rounds" / "000" / "world" / "model", LLAMA_8B)
    _, told = estimated(tmp_path, "world:model")
    assert told["weights_bytes"] > 2**30


def test_a_model_of_the_hub_that_was_not_downloaded_is_not_an_error(tmp_path: Path) -> None:
    done, told = estimated(tmp_path, "nobody/has-this-model")
    assert "not in the local Hugging Face cache" in told["unknown"]
    assert "hf download nobody/has-this-model" in done.output
