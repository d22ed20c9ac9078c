"""Which forward a model may be trained with: a few random sequences, scored each in a forward of its own and by ours, must agree.

Whether a model keeps trees apart cannot be told from its name: attention without transformers' interface, state-space layers and attention
by position in the row all ignore the layout without a word. So it is measured, with the adapter on and off, past the model's sliding
window where sequences will be; a model that disagrees is trained on padded rows, and the reason is recorded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Literal

import torch
from torch import Tensor

from dpo_loop.training.forward import lora_linear
from dpo_loop.training.forward.head import head_of
from dpo_loop.training.forward.logprobs import Scorer, bare_model, completion_logprobs, set_attention
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.forward.tree_attention import NAME

_TOLERANCE = {torch.float32: 1e-4}
"""Largest difference of a log-prob, relative to its size where that is above 1."""
_COARSE_TOLERANCE = 3e-2
"""Mean difference for weights of lower precision, where single tokens differ by more from one kernel to the next."""


def build_scorer(
    model: Any, *, device: torch.device, forward: Literal["auto", "padded"], longest: int = 0, autocast: Any = nullcontext
) -> Scorer:
    """The fastest forward that the probe accepts; the model is left with the attention that it needs.

    longest: tokens of the longest sequence that will be scored; a sliding window below it is probed past its edge.
    autocast: what makes the context in which the scorer will be called.
    """
    bare = bare_model(model)
    native = vars(bare).setdefault("attention_before_packing", bare.config._attn_implementation)  # a model may be probed again
    head = head_of(bare)
    packed = [Scorer(model, device, True, each, native) for each in (head, None)] if forward == "auto" else []
    padded = [Scorer(model, device, False, each, native) for each in (head, None)]
    refusals = [] if packed else ["asked for"]
    sequences = _sequences(bare.config.get_text_config(), longest)
    with _undisturbed(model), torch.no_grad(), autocast():
        expected = [_expected(model, sequences, device, bare=off) for off in (False, True)]
        lora_linear.speed_up(model)
        for scorer in (*packed, *padded):
            try:
                set_attention(model, NAME if scorer.packed else native)
                difference = max(
                    _difference(scorer, sequences, each, bare=off) for off, each in zip((False, True), expected, strict=True)
                )
            except Exception as error:  # a model that cannot be packed fails in its own way
                refusals.append(f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            if difference <= _tolerance(model):
                return _settled(scorer, difference, refusals)
            refusals.append(
                f"log-probs {'when packed ' if scorer.packed else ''}differ by {difference:.2g} nats from separate forwards"
            )
    set_attention(model, native)
    return Scorer(model, device, False, None, native, "padded, the model's own head: " + "; ".join(dict.fromkeys(refusals)))


def _settled(scorer: Scorer, difference: float, refusals: Sequence[str]) -> Scorer:
    reason = "packed" if scorer.packed else "padded"
    reason += "" if scorer.head is not None else ", the model's own head"
    reason += f": log-probs of separate forwards to {difference:.1e}"
    if refusals:
        reason += f" ({'; '.join(dict.fromkeys(refusals))})"
    return Scorer(scorer.model, scorer.device, scorer.packed, scorer.head, scorer.native_attention, reason)


def _tolerance(model: Any) -> float:
    return _TOLERANCE.get(next(bare_model(model).parameters()).dtype, _COARSE_TOLERANCE)


def _sequences(config: Any, longest: int) -> list[TokenSequence]:
    """Two prompts with three and two completions, one of them of one token; a one-token prompt; beyond the window if that matters."""
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(config.vocab_size) for _ in range(count))

    window = getattr(config, "sliding_window", None)
    far = window + 7 if isinstance(window, int) and window < longest else 0
    trees = [(ids(9), (5, 1, 12)), (ids(max(17, far // 2)), (max(8, far - far // 2), max(14, far // 2))), (ids(1), (6, 3))]
    return [TokenSequence(prompt, ids(count)) for prompt, counts in trees for count in counts]


def _expected(model: Any, sequences: Sequence[TokenSequence], device: torch.device, *, bare: bool) -> Tensor:
    """One sequence at a time, by the model's own eager attention if it has several: transformers' sdpa drops soft-caps."""
    with suppress(ValueError):
        set_attention(model, "eager")
    with _adapter_off(model, bare):
        return torch.cat([completion_logprobs(model, [sequence], device=device) for sequence in sequences])


def _difference(scorer: Scorer, sequences: Sequence[TokenSequence], expected_N: Tensor, *, bare: bool) -> float:
    """NaN, which no tolerance admits, becomes infinite."""
    with _adapter_off(scorer.model, bare):
        off_N = (scorer(sequences).logps_N - expected_N).abs() / expected_N.abs().clamp(min=1)
    worst = off_N.max() if _tolerance(scorer.model) in _TOLERANCE.values() else off_N.mean()
    return float(torch.nan_to_num(worst, nan=float("inf")))


def _adapter_off(model: Any, off: bool) -> Any:
    return model.disable_adapter() if off and hasattr(model, "disable_adapter") else nullcontext()


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Dropout off and adapters that change something, for the time of the probe: a fresh adapter's B is zero and would hide what it does.

    PEFT flips `requires_grad` when an adapter is switched off; that is put back, too.
    """
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kept = {p: p.detach().clone() for name, p in model.named_parameters() if ".lora_B." in name and not p.any()}
    noise = torch.Generator().manual_seed(0)
    model.eval()
    with torch.no_grad():
        for parameter in kept:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=noise))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in kept.items():
                parameter.copy_(values)
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
