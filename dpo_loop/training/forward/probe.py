"""Which forward a model may be trained with: a few random sequences, scored each in a forward of its own and by ours, must agree.

Whether a model keeps trees apart cannot be told from its name: attention without transformers' interface, state-space layers and attention
by position in the row all ignore the layout without a word. So it is measured, in the mode and the precision that it is trained in, with the
adapter on and off, past the model's windows where sequences will be; a model that disagrees is trained on padded rows, and the reason
is recorded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from dpo_loop.errors import PolicyError
from dpo_loop.training.forward import shortcuts
from dpo_loop.training.forward.head import head_of
from dpo_loop.training.forward.logprobs import Scorer, bare_model, completion_logprobs, set_attention
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.forward.tree_attention import NAME
from dpo_loop.training.forward.yardstick import Yardstick, allowed_in, computed_in, difference, num_draws, other_roundings
from dpo_loop.training.loop.accumulation import out_of_memory
from dpo_loop.training.positions import check_rotary

_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "window_size",
    "attention_chunk_size",
    "keep_window_size",
    "index_topk",
)
"""Names, in transformers' configs, of lengths past which attention is another one."""
_PAST = 16
"""Tokens beyond the last window that matters."""
_GROSS = 25.0
"""An excess that no rounding and no expert chosen by it explains."""


def build_scorer(
    model: Any, *, device: torch.device, forward: Literal["auto", "padded"], longest: int = 0, autocast: Any = nullcontext
) -> Scorer:
    """The fastest forward that the probe accepts; the model is left with the attention that it needs.

    model: in the mode in which it will be used. longest: tokens of the longest sequence that will be scored; windows below it are probed past
    their edges. autocast: what makes the context in which the scorer will be called. Raises PolicyError for a model whose own forward
    fails, differs from call to call, or differs from batch to batch.
    """
    bare = bare_model(model)
    check_rotary(bare.config, longest, bare.config.name_or_path)
    native = vars(bare).setdefault("attention_before_packing", bare.config._attn_implementation)  # a model may be probed again
    head = head_of(bare)
    refusals = ["asked for"] if forward == "padded" else list(_row_positions(bare.config.get_text_config()))
    sequences, region_N = _sequences(bare.config.get_text_config(), longest)
    routes = [(True, each) for each in (head, None) if not refusals] + [(False, head), (False, None)]
    ways = [Scorer(model, device, *route, native, shortcuts=taken) for taken in (True, False) for route in routes]
    with _undisturbed(model, device), torch.no_grad(), autocast():
        shortcuts.leave(bare)
        yardsticks = [_yardstick(model, sequences, region_N.to(device), device, bare=off) for off in (False, True)]
        for scorer in ways:
            try:
                (shortcuts.take if scorer.shortcuts else shortcuts.leave)(bare)
                set_attention(model, NAME if scorer.packed else native)
                worst, excess = (max(pair) for pair in zip(*_judged(scorer, sequences, yardsticks), strict=True))
            except Exception as error:  # a model that cannot be packed fails in its own way
                if out_of_memory(error):
                    raise
                if scorer is ways[-1]:
                    raise _unusable(model, error) from error
                refusals.append(f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            if excess <= 1:
                return _settled(scorer, worst, refusals)
            refusals.append(f"log-probs {'when packed ' if scorer.packed else ''}differ by {worst:.2g} nats from separate forwards")
    if excess > _GROSS:
        raise PolicyError(
            f"{bare.config.name_or_path}: log-probs differ by {worst:.2g} nats between a forward of several sequences and one of each, which "
            "no rounding explains; such a model cannot be trained here: take another one, or lower max_length below its windows"
        )
    return replace(ways[-1], reason="padded, the model's own head: " + "; ".join(dict.fromkeys(refusals)))


def _settled(scorer: Scorer, worst: float, refusals: Sequence[str]) -> Scorer:
    reason = "packed" if scorer.packed else "padded"
    reason += "" if scorer.head is not None else ", the model's own head"
    reason += "" if scorer.shortcuts else ", the model's own modules"
    reason += f": log-probs of separate forwards to {worst:.1e}"
    if refusals:
        reason += f" ({'; '.join(dict.fromkeys(refusals))})"
    return replace(scorer, reason=reason)


def _row_positions(config: Any) -> Iterator[str]:
    """What no probe of ours would find: what begins at a place in the row that only a full micro-batch reaches."""
    if getattr(config, "attn_temperature_tuning", None):  # Llama 4's, by the place and not by position_ids
        yield f"attention changes past token {config.floor_scale} of a row"


def _sequences(config: Any, longest: int) -> tuple[list[TokenSequence], Tensor]:
    """Two prompts with three and two completions, one of them of one token; a one-token prompt. One tree reaches past all windows that matter.

    And, for each completion token, how many windows lie before it.
    """
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(config.vocab_size) for _ in range(count))

    windows = [window for name in _WINDOWS if isinstance(window := getattr(config, name, None), int) and 0 < window < longest]
    far = max(windows, default=-_PAST) + _PAST
    trees = [(ids(9), (5, 1, 12)), (ids(max(17, far // 2)), (max(8, far - far // 2), max(14, far // 2))), (ids(1), (6, 3))]
    sequences = [TokenSequence(prompt, ids(count)) for prompt, counts in trees for count in counts]
    places = [place for prompt, completion in sequences for place in range(len(prompt), len(prompt) + len(completion))]
    return sequences, torch.tensor([sum(place > window for window in windows) for place in places])


def _yardstick(model: Any, sequences: Sequence[TokenSequence], region_N: Tensor, device: torch.device, *, bare: bool) -> Yardstick:
    """One sequence at a time, by the model's own eager attention if it has several: transformers' sdpa drops soft-caps."""
    with suppress(ValueError):
        set_attention(model, "eager")
    kind = computed_in(model, device)
    allowed, rounding = allowed_in(kind), []

    def separate(some: Sequence[TokenSequence]) -> Tensor:
        return torch.cat([completion_logprobs(model, [sequence], device=device) for sequence in some])

    with _adapter_off(model, bare):
        try:
            expected_N = separate(sequences)
            again_N = separate(sequences[:1])
            for seed in range(num_draws(kind)):
                with other_roundings(model, device, seed=seed):
                    rounding.append(difference(separate(sequences), expected_N))
        except Exception as error:
            if out_of_memory(error):
                raise
            raise _unusable(model, error) from error
    if not (changed := difference(again_N, expected_N[: len(again_N)]).max()) <= allowed:
        raise PolicyError(
            f"{bare_model(model).config.name_or_path}: two forwards of the same tokens differ by {changed:.2g} nats, so policy and reference would: "
            "dropout or other noise is live in the mode in which it is trained. Set its share to 0 in config.json, or leave "
            "gradient_checkpointing off"
        )
    return Yardstick(expected_N, torch.stack(rounding), region_N, allowed)


def _unusable(model: Any, error: Exception) -> PolicyError:
    return PolicyError(
        f"{bare_model(model).config.name_or_path}: the model's own forward fails ({type(error).__name__}: {error}".splitlines()[0]
        + "); adapt other layers (lora.target), or take another model"
    )


def _judged(scorer: Scorer, sequences: Sequence[TokenSequence], yardsticks: Sequence[Yardstick]) -> Iterator[tuple[float, float]]:
    for off, yardstick in zip((False, True), yardsticks, strict=True):
        with _adapter_off(scorer.model, off):
            yield yardstick.compare(scorer(sequences).logps_N)


def _adapter_off(model: Any, off: bool) -> Any:
    return model.disable_adapter() if off and hasattr(model, "disable_adapter") else nullcontext()


@contextmanager
def _undisturbed(model: Any, device: torch.device) -> Iterator[None]:
    """The adapter's dropout off and adapters that change something, for the time of the probe: a fresh adapter's B is zero and would hide what it
    does. Whatever draws random numbers leaves their state as it was.

    PEFT flips `requires_grad` when an adapter is switched off; that is put back, too.
    """
    drops = [module for name, module in model.named_modules() if ".lora_dropout." in name and module.training]
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kept = {p: p.detach().clone() for name, p in model.named_parameters() if ".lora_B." in name and not p.any()}
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in kept:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=noise))
    try:
        for module in drops:
            module.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for parameter, values in kept.items():
                parameter.copy_(values)
        for module in drops:
            module.train()
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
