"""A policy that cannot be used is named before an engine starts, and a run directory can move."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_loop.errors import CorruptArtifactError, PolicyError
from dpo_loop.layout import RunDir
from dpo_loop.policies import (
    ADAPTER_ORIGIN,
    adapter_problems,
    base_name,
    describe_policy,
    model_problems,
    read_blessing,
    read_policy,
    write_blessing,
    write_policy,
)
from dpo_loop.types import Blessing
from tests.builders import write_safetensors

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The files of a model directory; nothing here loads weights."""
    base = tmp_path / "model"
    base.mkdir()
    write_safetensors(base / "model.safetensors", {"model.embed_tokens.weight": ("BF16", (4, 2))})
    for name, text in {
        "config.json": "{}",
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
    }.items():
        (base / name).write_text(text)
    return base


def lora(path: Path, *, base: str = "model", rank: int = 8, **fields: object) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "base_model_name_or_path": base} | fields)
    )
    halves = {f"{Q_PROJ}.lora_A.weight": ("F32", (rank, 2)), f"{Q_PROJ}.lora_B.weight": ("F32", (2, rank))}
    write_safetensors(path / "adapter_model.safetensors", halves)
    return path


def test_a_whole_model_has_no_problems(model: Path) -> None:
    assert model_problems(model) == []


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "no *.safetensors weights"),
        ("tokenizer.json", "has no tokenizer"),
        ("chat_template.jinja", "has no chat template"),
    ],
)
def test_each_missing_part_of_a_model_is_named(model: Path, gone: str, said: str) -> None:
    (model / gone).unlink()
    assert any(said in problem for problem in model_problems(model))
    with pytest.raises(PolicyError, match="cannot be used"):
        describe_policy(model)


def test_a_missing_weight_shard_is_named(model: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    write_safetensors(model / "model-1.safetensors", {"a": ("F32", (1,))})
    assert [problem for problem in model_problems(model) if "model-2.safetensors is missing" in problem]


@pytest.mark.parametrize("text", ["{broken", "[]", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_a_damaged_json_file_of_a_model_is_named_beside_the_other_problems(model: Path, name: str, text: str) -> None:
    (model / name).write_bytes(text.encode("latin-1"))
    (model / "tokenizer.json").unlink()
    said = model_problems(model)
    assert [problem for problem in said if problem.startswith(f"{model / name} is damaged: ")]
    assert [problem for problem in said if "has no tokenizer" in problem]


def test_a_tokenizer_config_that_cannot_be_read_is_not_also_said_to_lack_a_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text("{broken")
    assert len(model_problems(model)) == 1


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_a_weight_map_is_named(model: Path, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    (problem,) = model_problems(model)
    assert "model.safetensors.index.json has no weight_map" in problem


@pytest.mark.parametrize("name", ["adapter_config.json", ADAPTER_ORIGIN])
def test_a_damaged_json_file_of_an_adapter_is_named(model: Path, tmp_path: Path, name: str) -> None:
    adapter = lora(tmp_path / "adapter")
    (adapter / name).write_text('{"r": 8,')
    (problem,) = adapter_problems(adapter, model)
    assert problem.startswith(f"{adapter / name} is damaged: ")


def test_an_adapter_for_another_base_is_refused_by_hash_and_by_name(model: Path, tmp_path: Path) -> None:
    assert adapter_problems(lora(tmp_path / "good"), model) == []
    assert "trained on other, not on" in adapter_problems(lora(tmp_path / "named", base="other"), model)[0]
    (lora(tmp_path / "hashed") / ADAPTER_ORIGIN).write_text(json.dumps({"base_sha256": "0" * 64}))
    assert "trained on another base" in adapter_problems(tmp_path / "hashed", model)[0]


@pytest.mark.parametrize(
    ("path", "name"),
    [("/runs/demo/rounds/000/seed/model", "model"), ("/cache/models--Qwen--Qwen3-8B/snapshots/0123abc", "Qwen/Qwen3-8B")],
)
def test_an_adapter_names_its_base_without_a_path_of_this_machine(path: str, name: str) -> None:
    assert base_name(str(Path(path))) == name


@pytest.mark.parametrize("made_for", ["Qwen/Qwen3-8B", "/elsewhere/models--Qwen--Qwen3-8B/snapshots/89abcdef", "/models/Qwen3-8B"])
def test_an_adapter_of_a_hub_model_fits_the_snapshot_that_the_hub_hands_out(model: Path, tmp_path: Path, made_for: str) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "0123abc"
    shutil.copytree(model, snapshot)
    adapter = lora(tmp_path / "adapter", base=made_for)
    assert adapter_problems(adapter, snapshot) == []
    assert adapter_problems(adapter, Path("Qwen/Qwen3-8B")) == []
    assert describe_policy(snapshot, adapter=adapter).adapter == str(adapter)
    assert "trained on Qwen/Qwen2-7B, not on" in adapter_problems(lora(tmp_path / "other", base="Qwen/Qwen2-7B"), snapshot)[0]


def test_a_rank_above_the_engines_and_another_kind_of_adapter_are_refused(model: Path, tmp_path: Path) -> None:
    assert (
        "rank 32, above the engine's max_lora_rank 16" in adapter_problems(lora(tmp_path / "big", rank=32), model, max_rank=16)[0]
    )
    assert "IA3" in adapter_problems(lora(tmp_path / "ia3", peft_type="IA3"), model)[0]
    assert "adapter_config.json is missing" in adapter_problems(tmp_path / "nothing", model)[0]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("w.weight", "F64"), ("w.weight", "F8_E4M3"), ("w.qweight", "I32"), ("w.weight", "U8"), ("w.bias", "F64")],
)
def test_weights_that_are_not_plain_floats_are_named_with_their_type(model: Path, name: str, dtype: str) -> None:
    """Loading casts them without a word: what is trained over is then not what the checkpoint says."""
    write_safetensors(model / "model.safetensors", {"v.weight": ("F32", (2,)), name: (dtype, (2,)), "position_ids": ("I64", (2,))})
    (problem,) = model_problems(model)
    assert f"holds {name} as {dtype} (1 such tensors)" in problem
    assert "save it again" in problem


def test_only_the_files_that_are_loaded_are_looked_at(model: Path) -> None:
    """Some publishers put the same weights beside them in another format and type."""
    write_safetensors(model / "consolidated.safetensors", {"w.weight": ("F8_E4M3", (2,))})
    assert model_problems(model) == []
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert model_problems(model) == []
    write_safetensors(model / "model-1.safetensors", {"a": ("F64", (1,))})
    assert "holds a as F64" in model_problems(model)[0]


def test_a_model_that_says_it_is_quantised_is_refused_with_the_key_that_trains_in_4_bits(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    (problem,) = model_problems(model)
    assert "is quantised (gptq)" in problem
    assert "training.quantize_base: nf4" in problem


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "not a safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes where its header promises"),
        (lambda path: path.write_bytes(b"\2\0\0\0\0\0\0\0[]"), "not an object"),
        (lambda path: path.write_bytes(b'\x08\0\0\0\0\0\0\0{"a":{}}'), "does not describe tensors"),
        (lambda path: path.write_bytes(b""), "not a safetensors file"),
    ],
)
def test_weights_that_are_not_whole_are_named(model: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(model / "model.safetensors")
    (problem,) = model_problems(model)
    assert problem.startswith(f"{model / 'model.safetensors'} is damaged: ")
    assert said in problem


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "olora"}, "changes the base"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']"),
        ({"trainable_token_indices": [1]}, "trained embeddings"),
        ({"bias": "all"}, "trains biases of the base"),
        ({"lora_bias": True}, "has biases of its own"),
        ({"rank_pattern": {"q_proj": 4}}, "another rank in some modules"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "fused parameters"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
    ],
)
def test_an_adapter_that_is_more_than_lora_on_linear_layers_is_refused_by_name(
    model: Path, tmp_path: Path, fields: dict[str, object], said: str
) -> None:
    (problem,) = adapter_problems(lora(tmp_path / "adapter", **fields), model)
    assert said in problem


def test_what_peft_and_the_engine_both_understand_is_no_problem(model: Path, tmp_path: Path) -> None:
    fields = {
        "layers_to_transform": [0],
        "alpha_pattern": {"q_proj": 4},
        "use_rslora": True,
        "init_lora_weights": "gaussian",
        "bias": "none",
    }
    assert adapter_problems(lora(tmp_path / "adapter", **fields), model, max_rank=8) == []


def test_dora_may_be_trained_on_but_not_served(model: Path, tmp_path: Path) -> None:
    adapter = lora(tmp_path / "adapter", use_dora=True)
    assert adapter_problems(adapter, model) == []
    (problem,) = adapter_problems(adapter, model, max_rank=8)
    assert "is a DoRA adapter, which vLLM does not serve; merge it" in problem


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{Q_PROJ}.lora_A.weight": ("F32", (4, 2)), f"{Q_PROJ}.lora_B.weight": ("F32", (2, 8))}, "of rank 4, but its adapter_config.json says r = 8"),
        ({f"{Q_PROJ}.lora_A.weight": ("F32", (8, 2))}, "only one of lora_A and lora_B"),
        ({f"{Q_PROJ}.lora_A.weight": ("I32", (8, 2)), f"{Q_PROJ}.lora_B.weight": ("F32", (2, 8))}, "as I32"),
        ({"base_model.model.model.embed_tokens.weight": ("F32", (8, 2))}, "is not a LoRA weight"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": ("F32", (8, 2))}, "is not a LoRA weight"),
        (
            {"base_model.model.lm_head.lora_A.weight": ("F32", (8, 2)), "base_model.model.lm_head.lora_B.weight": ("F32", (2, 8))},
            "adapts lm_head; the head and the embeddings cannot be adapted",
        ),
        ({}, "holds no tensors"),
    ],
)  # fmt: skip
def test_adapter_weights_that_are_not_what_the_config_says_are_named(
    model: Path, tmp_path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], said: str
) -> None:
    adapter = lora(tmp_path / "adapter")
    write_safetensors(adapter / "adapter_model.safetensors", tensors)
    assert [problem for problem in adapter_problems(adapter, model) if said in problem]


def test_a_run_directory_can_move(model: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(model, run.round(0).stage("seed") / "model")
    work = run.round(1).path / ".train.work"  # a stage writes its policy before it is published
    lora(work / "adapter")
    write_policy(work, describe_policy(run.round(0).stage("seed") / "model", adapter=work / "adapter"))
    work.rename(run.round(1).stage("train"))
    policy = read_policy(run.round(1).stage("train"))
    assert policy.adapter == str(run.round(1).stage("train") / "adapter")
    blessing = Blessing(round=1, policy=policy, gate_state=None, report_sha256=None, decision=None, blessed_at="now")
    write_blessing(run.current, blessing, run=run.path)

    moved = RunDir(run.path.rename(tmp_path / "elsewhere"))
    for found in (read_policy(moved.round(1).stage("train")), read_blessing(moved.current, run=moved.path).policy):
        assert found.base == str(moved.round(0).stage("seed") / "model")
        assert found.adapter == str(moved.round(1).stage("train") / "adapter")
        assert found.key == policy.key
    with pytest.raises(CorruptArtifactError, match=r"policy\.json is missing"):
        read_policy(moved.round(1).stage("judge"))
