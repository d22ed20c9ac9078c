"""What the generation tests share with their child processes: where things lie, and the configs of the stages."""

from __future__ import annotations

from pathlib import Path

from dpo_loop.config import AnswerConfig, EngineConfig, GenerationConfig
from dpo_loop.policies import describe_policy
from dpo_loop.types import PolicyRef

ENGINE = EngineConfig(kind="vllm_offline", max_model_len=256, max_num_seqs=16, max_lora_rank=8)
GENERATION = GenerationConfig(engine=ENGINE, k=3, temperature=0.7, top_p=0.95, max_new_tokens=40, shard_size=4)
ANSWERING = AnswerConfig(temperature=0.0, max_new_tokens=24)
NUM_PROMPTS = 22
NUM_SHARDS = 6
"""ceil(22 / 4): the last one is not full. One prompt more is too long."""


class World:
    """A base model, two adapters for it, their canaries, prompts; and the run directory the stages write into."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base, self.adapter, self.other_adapter = root / "base", root / "adapter", root / "other_adapter"
        self.head_adapter = root / "head_adapter"
        self.canary, self.other_canary, self.base_canary = root / "canary.json", root / "other.json", root / "base.json"
        self.prompts = root / "prompts"
        self.rounds = root / "rounds"

    def policy(self) -> PolicyRef:
        return describe_policy(self.base, adapter=self.adapter, canary=self.canary)

    def other_policy(self) -> PolicyRef:
        return describe_policy(self.base, adapter=self.other_adapter, canary=self.other_canary)

    def base_policy(self) -> PolicyRef:
        return describe_policy(self.base, canary=self.base_canary)

    def generate_inputs(self, *, seed: int = 7) -> dict[str, object]:
        return {
            "prompts": self.prompts,
            "policy": self.policy(),
            "config": GENERATION,
            "run_id": "tiny",
            "round": 1,
            "seed": seed,
        }
