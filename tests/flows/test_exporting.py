"""Only what was blessed goes out, whole and checked; anything else is refused, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_loop.artifacts import sha256_file
from dpo_loop.errors import BusyError, CorruptArtifactError, InputError, PolicyError
from dpo_loop.exchange import CANARY, PAIRS
from dpo_loop.files import hold
from dpo_loop.layout import RunDir
from dpo_loop.policies import adapter_problems, read_policy
from dpo_loop.types import GateState, HumanDecision
from flows.card import hub_id_of
from flows.exporting import export
from flows.rounds import adopt_config, begin_round
from tests.flows.exports import FORCE, manifest_of, play_rounds, play_sft, recorded, refused
from tests.flows.runs import small_config


@pytest.fixture
def run(exportable: RunDir, tmp_path: Path) -> RunDir:
    """A copy that may be changed."""
    return RunDir(shutil.copytree(exportable.path, tmp_path / "run"))


def answer(model: Any, base: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(base)("count to five", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits


# ------------------------------------------------------------------------------------------------------------- policies


def test_the_current_policy_is_exported_as_an_adapter_that_peft_loads_by_itself(
    run: RunDir, tiny_llama: Path, tmp_path: Path
) -> None:
    made = export(run, tmp_path / "out", what="adapter")
    policy = read_policy(run.round(3).stage("train"))
    manifest = manifest_of(tmp_path / "out")
    assert manifest == made
    assert (manifest.rounds, manifest.gate_state, manifest.forced) == ((3,), GateState.NEEDS_REVIEW, None)
    assert manifest.report_sha256 == sha256_file(run.round(3).gate_report)
    assert isinstance(manifest.decision, HumanDecision)
    assert manifest.decision.reviewer == "bob"
    assert manifest.policy is not None
    assert (manifest.policy.key, manifest.policy.adapter_sha256) == (policy.key, policy.adapter_sha256)
    assert sha256_file(tmp_path / "out" / "adapter_model.safetensors") == sha256_file(
        Path(str(policy.adapter)) / "adapter_model.safetensors"
    )
    assert adapter_problems(tmp_path / "out", tiny_llama) == []
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tiny_llama)
    assert (answer(loaded, tiny_llama) - answer(AutoModelForCausalLM.from_pretrained(tiny_llama), tiny_llama)).abs().max() > 0.01


def test_the_card_the_licence_and_its_text_go_along(run: RunDir, tiny_llama: Path, tmp_path: Path) -> None:
    made = export(run, tmp_path / "out", what="adapter", round_number=1)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model, card.data.library_name) == ("mit", None, "peft")
    assert "base_model" not in card.content, "the hub knows no tiny-llama of ours"
    assert "A LoRA adapter for `tiny-llama`, trained with" in card.text
    assert "names the base by its path on the machine that made the export" in card.text
    assert "round 1 of run small" in card.text
    assert "Warning" not in card.text
    assert str(run.path) not in card.text
    assert (tmp_path / "out" / "LICENSE").read_bytes() == (tiny_llama / "LICENSE").read_bytes()
    assert made.licence == "mit"
    assert export(run, tmp_path / "said", what="adapter", licence="apache-2.0").licence == "apache-2.0"


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("# no metadata", "other"),
        ("---\n: [\n---\n", "other"),
        ("---\n- a\n---\n", "other"),
        ("---\nlicense: [a, b]\n---\n", "other"),
        ("---\nlicense: mit\n", "other"),
        (None, "other"),
    ],
)
def test_a_base_that_does_not_say_its_licence_is_referred_to(
    run: RunDir, tiny_llama: Path, tmp_path: Path, text: str | None, licence: str
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "LICENSE").unlink()
    (base / "README.md").unlink()
    if text is not None:
        (base / "README.md").write_text(text)
    for path in (run.config, run.round(1).blessing):
        path.write_text(path.read_text().replace(str(tiny_llama), str(base)))
    made = export(run, tmp_path / "out", what="adapter", round_number=1)
    assert (made.licence, "LICENSE" in made.files) == (licence, False)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == licence


def test_a_merged_model_needs_no_peft_and_says_what_the_adapter_says(run: RunDir, tiny_llama: Path, tmp_path: Path) -> None:
    made = export(run, tmp_path / "out", what="merged")
    manifest = manifest_of(tmp_path / "out")
    assert manifest.figures == made.figures
    assert made.figures["merge_difference"] <= made.figures["allowed"] <= 1e-3 < made.figures["adapter_effect"]
    assert made.figures["canary_distance"] < 1e-4
    export(run, tmp_path / "adapter", what="adapter")
    apart, together = (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    )
    assert (answer(apart, tiny_llama) - answer(together, tiny_llama)).abs().max() < 1e-4
    assert {"LICENSE", "README.md", "tokenizer.json", "chat_template.jinja", "config.json", "model.safetensors"} <= set(
        manifest.files
    )
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "transformers"


def test_the_start_policy_is_exported_as_the_model_that_it_is(run: RunDir, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no adapter: it is the model at .*tiny-llama\. Export it with --what merged"):
        export(run, tmp_path / "out", what="adapter", round_number=0)
    made = export(run, tmp_path / "out", what="merged", round_number=0, dtype="bfloat16")
    assert (made.gate_state, made.report_sha256, made.figures["stored_dtype"]) == (None, None, "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is torch.bfloat16


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_was_not_promoted_is_not_exported(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(
        run,
        out,
        r"round 2 of .* was not promoted \(FAIL: because it is FAIL\), so its policy is not exported",
        what="adapter",
        round_number=2,
    )
    refused(
        run,
        out,
        r"export a promoted round \(0, 1, 3\); or --force --reviewer NAME --reason WHY, which is kept",
        what="merged",
        round_number=2,
    )
    refused(run, out, r"\(FAIL: because it is FAIL\), so its pairs are not exported", what="pairs", round_number=2)
    refused(run, out, r"INCONCLUSIVE.*decide it \(`dpo-loop approve .* 4`\);", what="adapter", round_number=4)
    refused(run, out, "has no round 9; it has rounds 0 to 4", what="adapter", round_number=9)
    refused(run, out, r"round 0 of .* has no pairs; rounds with pairs: 1, 2, 3, 4", what="pairs", round_number=0)
    run.round(4).stage("gate").rename(tmp_path / "gate")
    refused(run, out, r"was not promoted \(its gate has not decided\)", what="adapter", round_number=4)


def test_a_run_that_has_blessed_nothing_yet_has_nothing_to_export(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    adopt_config(run, small_config(run.path))
    begin_round(run, 0)
    refused(run, tmp_path / "out", "has no blessed policy yet: its round 0 has not ended", what="adapter")
    refused(
        run,
        tmp_path / "out",
        "round 0 of .* has made no policy: its stage seed is not published",
        what="adapter",
        round_number=0,
        force=FORCE,
    )
    refused(run, tmp_path / "out", r"no promoted round of .* has pairs; those of other rounds \(none\)", what="pairs")


def test_a_place_that_is_in_use_is_left_alone(run: RunDir, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine").write_text("mine")
    refused(run, used, "--out: .*used is in use; give a directory that is empty or does not exist", what="adapter")
    refused(run, used / "mine", "is in use", what="adapter")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(run, tmp_path / "link", "link is a link; give a directory itself", what="adapter")
    with pytest.raises(InputError, match=r"--out: .*no does not exist; make it first"):
        export(run, tmp_path / "no" / "out", what="adapter")
    assert (used / "mine").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty", what="adapter")
    manifest_of(tmp_path / "empty")


def test_an_adapter_that_is_no_longer_the_recorded_one_is_refused(run: RunDir, tmp_path: Path) -> None:
    weights = run.round(3).stage("train") / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for what in ("adapter", "merged"):
        refused(
            run,
            tmp_path / "out",
            "the (adapter|policy) at .* (is not the one that was|has changed since it was) recorded",
            CorruptArtifactError,
            what=what,
        )
    weights.unlink()
    refused(run, tmp_path / "out", "adapter_model.safetensors is missing. Put it back", CorruptArtifactError, what="adapter")
    refused(run, tmp_path / "out", "adapter_model.safetensors is missing", PolicyError, what="merged")


def test_a_base_that_is_no_longer_the_recorded_one_is_not_merged(run: RunDir, tmp_path: Path) -> None:
    base = shutil.copytree(read_policy(run.round(0).stage("seed")).base, tmp_path / "tiny-llama")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    blessing = json.loads(run.current.read_text())
    blessing["policy"]["base"] = str(base)
    for path in (run.current, run.round(3).blessing):
        path.write_text(json.dumps(blessing))
    refused(run, tmp_path / "out", "has changed since it was recorded", CorruptArtifactError, what="merged")


def test_a_merge_that_is_not_the_policy_leaves_nothing(run: RunDir, tmp_path: Path) -> None:
    canary = run.round(3).stage("train") / CANARY
    told = json.loads(canary.read_text())
    for row in told["sequences"]:
        row["policy_logprobs"] = row["base_logprobs"]
    canary.write_text(json.dumps(told))
    refused(run, tmp_path / "out", "the canary that training left differ by", PolicyError, what="merged")


# --------------------------------------------------------------------------------------------------- what it stands on


def test_an_adapter_on_a_model_of_the_run_s_own_names_that_model_and_no_other(tiny_llama: Path, tmp_path: Path) -> None:
    """It named the hub id of the model before SFT, on which it is another policy."""
    run = play_sft(tmp_path, tiny_llama, model="org/tiny")
    made = export(run, tmp_path / "out", what="adapter")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None
    assert "base_model" not in card.content
    assert "A LoRA adapter for a model fine-tuned from `org/tiny` (SFT), trained with" in card.text
    assert "That model is not shipped here" in card.text
    assert "use `--what merged`" in card.text
    assert "- base: what round 0 made by SFT from `org/tiny`, sha256" in card.text
    assert "supervised fine-tuning (SFT) of all weights on 900 demonstrations" in card.text
    assert "loss from 2.5 to 0.75 in 30 steps" in card.text
    assert str(run.path) not in card.text
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run.round(0).stage("seed") / "model")
    assert made.policy is not None
    assert (made.policy.base, made.policy.fine_tuned) == ("org/tiny", True)
    merged = export(run, tmp_path / "merged", what="merged")
    data = ModelCard.load(tmp_path / "merged" / "README.md").data
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("org/tiny", "finetune")
    assert merged.policy == made.policy
    assert "base was fine-tuned from `org/tiny` (SFT); a judge" in read_text(export_to(run, tmp_path / "pairs", "pairs"))


def test_a_base_from_the_hub_is_named_by_its_id_and_revision(tiny_llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "models--tiny" / "snapshots" / "abc")
    run = play_rounds(tmp_path, base)
    config = json.loads((export_to(run, tmp_path / "out", "adapter") / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny", None)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == ("tiny", "adapter")
    assert "AutoPeftModelForCausalLM" in card.text
    places = ("/c/models--org--x/snapshots/1", "/c/models--gpt2/snapshots/1", "org/x", "gpt2", "/models/x", "rounds/000/seed/model")
    assert [hub_id_of(place) for place in places] == ["org/x", "gpt2", "org/x", "gpt2", None, None]


def export_to(run: RunDir, out: Path, what: Any) -> Path:
    export(run, out, what=what)
    return out


def read_text(out: Path) -> str:
    return (out / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------------ the place


def test_a_link_and_a_place_inside_the_run_are_refused_before_anything_is_recorded(run: RunDir, tmp_path: Path) -> None:
    """A link to an empty directory was recorded as an export, and then the rename failed with a traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    refused(run, tmp_path / "link", "link is a link", what="adapter")
    (tmp_path / "way").symlink_to(run.path)
    for out in (run.path, run.path / "out", run.round(1).path / "out", tmp_path / "way" / "out", run.path / "x" / ".." / "out"):
        refused(run, out, "is inside the run, whose files stay as they were made", what="adapter")
    refused(run, tmp_path / ("x" * 300), "cannot be used: File name too long", what="adapter")
    refused(run, tmp_path / ("x" * 250), "where an export is made before it is renamed, cannot be made", what="adapter")
    work = tmp_path / ".out.small.work"
    work.symlink_to(tmp_path / "empty")
    refused(run, tmp_path / "out", r"\.out\.small\.work, where .*, is in the way; remove it", what="adapter")
    work.unlink()
    work.write_text("mine")
    refused(run, tmp_path / "out", "is in the way", what="adapter")
    assert work.read_text() == "mine"


def test_an_export_that_could_not_be_published_is_told_apart_from_one_that_was(run: RunDir, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.small.work"

    def occupy() -> None:
        while not work.is_dir():
            time.sleep(0.005)
        out.mkdir()
        (out / "mine").write_text("mine")

    somebody = threading.Thread(target=occupy, daemon=True)
    somebody.start()
    with pytest.raises(InputError, match=r"out could not be made: Directory not empty.*Nothing was exported, and .* says so"):
        export(run, out, what="merged")
    begun, failed = recorded(run)
    assert (begun["event"], failed["event"], failed["why"]) == ("begun", "failed", "Directory not empty")
    assert begun["export_sha256"] == failed["export_sha256"]
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert not work.exists()
    export(run, tmp_path / "other", what="adapter")
    begun, done = recorded(run)[2:]
    assert (begun["event"], done["event"], begun["out"]) == ("begun", "done", str(tmp_path / "other"))
    assert begun["export_sha256"] == done["export_sha256"] == sha256_file(tmp_path / "other" / "export.json")


def test_all_files_of_an_export_may_be_read_by_the_same_people(run: RunDir, tmp_path: Path) -> None:
    """safetensors made the weights of a merged model 0600: a server under another user could not load them."""
    out = export_to(run, tmp_path / "out", "merged")
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_pairs_that_changed_since_they_were_made_are_refused(run: RunDir, tmp_path: Path) -> None:
    path = run.round(1).stage("pair") / PAIRS
    path.write_text(path.read_text().replace("two words", "bad words"))
    refused(run, tmp_path / "out", "pairs.jsonl has changed since stage pair published it", CorruptArtifactError, what="pairs")


def test_two_exports_of_a_run_do_not_meet(run: RunDir, tmp_path: Path) -> None:
    with hold(run.path / ".export.lock", wait_s=0, what="x"), pytest.raises(BusyError, match=r"an export of .* is held by another"):
        export(run, tmp_path / "out", what="adapter", wait_s=0.1)


def test_a_record_that_is_damaged_is_named_and_nothing_goes_out_unrecorded(run: RunDir, tmp_path: Path) -> None:
    (run.exports).write_text("not JSON\n{}\n")
    with pytest.raises(CorruptArtifactError, match=r"exports\.jsonl:1 is damaged.*put it back from a copy"):
        export(run, tmp_path / "out", what="adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
