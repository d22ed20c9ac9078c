"""What a producer is asked for, and what all producers do: load the policy, prove it, hand the rows over."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from dpo_loop.config import EngineConfig, ProducedTask
from dpo_loop.errors import DpoLoopError
from dpo_loop.files import read_json, write_json, write_text
from dpo_loop.generation.canary import check_canary, read_canary
from dpo_loop.progress import say
from dpo_loop.types import CapabilityRow, PolicyRef, Record, content_id


class Request(Record):
    """Paths are absolute. rows: file to write; problem: file for the message of a DpoLoopError, whose exit code the process ends with; proof: file
    for the canary's figures, where the policy has a canary."""

    task: ProducedTask = Field(discriminator="kind")
    policy: PolicyRef
    engine: EngineConfig
    file: str | None
    """The task's path."""
    seed: int
    rows: str
    problem: str
    proof: str


def answer_request(produce: Callable[[Request], list[CapabilityRow]]) -> None:
    """The main function of a producer. Ends the process."""
    request = read_json(Path(sys.argv[1]), Request)
    try:
        rows = produce(request)
    except DpoLoopError as error:
        write_text(Path(request.problem), str(error))
        sys.exit(error.exit_code)
    write_text(Path(request.rows), "".join(row.model_dump_json() + "\n" for row in rows))


def model_arguments(request: Request) -> dict[str, Any]:
    """Where and as what transformers loads the base: as the engine would."""
    import torch

    on_gpu = torch.cuda.is_available()
    dtype = "float32" if request.engine.dtype == "auto" and not on_gpu else request.engine.dtype
    return {"dtype": dtype, "device": "cuda" if on_gpu else "cpu"}


def policy_on(request: Request, base: Any) -> Any:
    """The policy: `base`, a transformers model, with the adapter where there is one. Raises CanaryError if it is not what it should be."""
    model = base
    if request.policy.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(base, request.policy.adapter)
    model.eval()
    canary = read_canary(request.policy)
    if canary is not None:
        longest = request.engine.max_model_len - 1
        figures = check_canary(_Transformers(model), canary, tolerance=request.engine.canary_tolerance, max_tokens=longest)
        say(f"canary passed: {figures}")
        write_json(Path(request.proof), asdict(figures))
    return model


class _Transformers:
    """Log-probs by transformers+peft, one sequence at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def score(self, sequences: Sequence[tuple[int, ...]], *, with_adapter: bool) -> list[list[float]]:
        if with_adapter:
            return [self._score(ids) for ids in sequences]
        with self._model.disable_adapter():
            return [self._score(ids) for ids in sequences]

    def _score(self, ids: tuple[int, ...]) -> list[float]:
        import torch

        with torch.inference_mode():
            tokens_T = torch.tensor(ids, device=self._model.device)
            logps_TV = self._model(tokens_T[None]).logits[0].float().log_softmax(-1)
        return [float(x) for x in logps_TV[:-1].gather(1, tokens_T[1:, None])[:, 0]]


class ItemIds:
    """Ids that are hashes of content, the same for every policy; an item that is there twice has two."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def of(self, *content: Any) -> str:
        id = content_id(*content)
        self._seen[id] += 1
        return id if self._seen[id] == 1 else content_id(*content, self._seen[id])
