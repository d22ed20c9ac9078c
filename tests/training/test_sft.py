"""Which tokens of a demonstration are learnt, and what the objective makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoTokenizer

from dpo_loop.errors import InputError
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.models import build_accelerator, load_base
from dpo_loop.training.objectives.sft import Demonstration, SftExample, SftObjective, read_demonstrations, tokenize
from dpo_loop.types import PolicyRef
from tests.builders import CHAT_TEMPLATE, build_model

FILE = Path("demonstrations.jsonl")
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Leaves earlier answers out, as templates of thinking models leave out what was thought."""
STRICT = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHAT_TEMPLATE


def talk(*contents: str, first: str = "user") -> Demonstration:
    """Turns of a user and an assistant by turns; an opening `=` is a system turn."""
    messages, roles = [], ("user", "assistant") if first == "user" else ("assistant", "user")
    for content in contents:
        if content.startswith("="):
            messages.append({"role": "system", "content": content[1:]})
        else:
            messages.append({"role": roles[sum(m["role"] != "system" for m in messages) % 2], "content": content})
    return Demonstration.model_validate({"messages": messages})


def with_template(folder: Path, template: str) -> str:
    model = build_model(folder)
    (model / "chat_template.jinja").write_text(template)
    return str(model)


def shown(example: SftExample, model: str) -> tuple[str, str]:
    """The prompt, and the completion with what is learnt in brackets."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text, learnt = "", False
    for token, scored in zip(example.sequence.completion, example.scored, strict=True):
        text += ("[" if scored and not learnt else "]" if learnt and not scored else "") + tokenizer.decode([token])
        learnt = scored
    return tokenizer.decode(example.sequence.prompt), text + ("]" if learnt else "")


def learn(
    model: str, *rows: Demonstration, train_on: Literal["last_turn", "all_turns"] = "all_turns", max_length: int = 200
) -> list[tuple[str, str]]:
    examples, _ = tokenize(rows, model, max_length=max_length, train_on=train_on, where=FILE)
    return [shown(example, model) for example in examples]


def test_of_the_last_turn_the_answer_and_its_end_are_learnt(base: PolicyRef) -> None:
    assert learn(base.base, talk("=s", "count", "five", "say", "case"), train_on="last_turn") == [
        ("<|system|>s<|end|><|user|>count<|end|><|assistant|>five<|end|><|user|>say<|end|><|assistant|>", "[case<|end|>]")
    ]


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, MARKED, MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")]
)
def test_of_all_turns_every_answer_and_its_end_are_learnt(tmp_path: Path, template: str) -> None:
    """With the template's marks, also where they stop short of the end of the turn, and without."""
    model = with_template(tmp_path / "model", template)
    assert learn(model, talk("=s", "count", "five", "say", "case"), talk("count", "five")) == [
        ("<|system|>s<|end|><|user|>count<|end|><|assistant|>", "[five<|end|>]<|user|>say<|end|><|assistant|>[case<|end|>]"),
        ("<|user|>count<|end|><|assistant|>", "[five<|end|>]"),
    ]


@pytest.mark.parametrize("train_on", ["last_turn", "all_turns"])
@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE.replace("<|end|>{%", "<|end|>\n{%"), MARKED.replace("<|end|>{%", "<|end|>\n{%")]
)
def test_what_a_template_writes_after_the_end_of_the_turn_is_left_out(tmp_path: Path, template: str, train_on: Any) -> None:
    """T5: with ChatML the newline after <|im_end|> would be scored, though no engine ever samples it."""
    model = with_template(tmp_path / "model", template)
    assert learn(model, talk("count", "five"), train_on=train_on) == [("<|user|>count<|end|>\n<|assistant|>", "[five<|end|>]")]


def test_a_template_that_rewrites_earlier_turns_is_counted_out_of_all_turns_only(tmp_path: Path) -> None:
    model = with_template(tmp_path / "model", FORGETS)
    rows = [talk("count", "five", "say", "case"), talk("count", "five")]
    _, tally = tokenize(rows, model, max_length=200, train_on="all_turns", where=FILE)
    assert tally.parts == {"template_mismatch": 1, "trained": 1}
    assert [completion for _, completion in learn(model, *rows, train_on="last_turn")] == ["[case<|end|>]", "[five<|end|>]"]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED])
def test_an_answer_that_says_nothing_stays_context(tmp_path: Path, template: str) -> None:
    model = with_template(tmp_path / "model", template)
    assert learn(model, talk("count", " ", "say", "case"))[0][1].count("[") == (1 if template == CHAT_TEMPLATE else 2)
    assert learn(model, talk("count", "", "say", "case"))[0][1] == "[case<|end|>]"


def test_a_demonstration_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    model = with_template(tmp_path / "model", STRICT)
    for train_on in ("last_turn", "all_turns"):
        with pytest.raises(
            InputError, match=r"refuses the demonstration that begins 'five' \(roles: assistant user.*\): roles must"
        ):
            learn(model, talk("count", "five"), talk("five", "say", "case", first="assistant"), train_on=train_on)


def test_only_the_scored_tokens_count(base: PolicyRef) -> None:
    """The loss of two turns in one sequence is that of its answers, each after all that came before it."""
    model = load_base(base.base, accelerator=build_accelerator("float32"), frozen=True)
    ids = (5, 6, 7, 8, 9, 10, 11, 12)  # prompt 5 6, answers 7 8 and 11 12
    example = SftExample(TokenSequence(ids[:2], ids[2:]), (True, True, False, False, True, True))
    plain = SftExample(TokenSequence((5, 6), (7,)), (True,))
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    after = {position: float(logps[position - 1, ids[position]]) for position in range(1, 8)}
    for forward in ("padded", "auto"):
        objective = SftObjective(build_scorer(model, device=torch.device("cpu"), forward=forward), [example, plain])
        assert objective.size([0, 1]) == 5
        sums = {name: float(value) for name, value in objective.sums([0, 1], estimates={}).items()}
        assert sums["loss"] == pytest.approx(-(after[2] + after[3] + after[6] + after[7] + after[2]), abs=1e-4)
        assert objective.metrics(sums, [0, 1], step=0) == {"loss": pytest.approx(sums["loss"] / 5), "examples": 2}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ('{"prompt": "x"}', "no 'messages'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "does not end with an assistant turn"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "Input should be"),
        ("[1]", "list indices"),
    ],
)
def test_a_line_that_is_no_demonstration_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(json.dumps(talk("a", "b").model_dump()) + "\n" + line + "\n")
    with pytest.raises(InputError, match=f":2 .*{reason}"):
        read_demonstrations(path)


def test_blank_lines_at_the_end_are_no_demonstrations(tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(json.dumps(talk("a", "b").model_dump()) + "\n\n \n")
    assert len(read_demonstrations(path)) == 1


@pytest.mark.parametrize("train_on", ["last_turn", "all_turns"])
def test_demonstrations_of_which_none_fits_are_an_error(base: PolicyRef, train_on: Any) -> None:
    with pytest.raises(InputError, match=r"'too_long': 1"):
        tokenize([talk("count", "five")], base.base, max_length=2, train_on=train_on, where=FILE)
