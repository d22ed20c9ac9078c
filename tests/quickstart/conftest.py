from __future__ import annotations

from pathlib import Path

import pytest

from dpo_loop.artifacts import materialize
from dpo_loop.config import TinyWorldConfig
from dpo_loop.quickstart.stage import WORLD

SMALL = TinyWorldConfig(seed=5, num_demonstrations=1_000, wrong_demonstrations=0.3, num_prompts=500, num_harmful=60, num_benign=40)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published world stage of SMALL."""
    out = tmp_path_factory.mktemp("world") / "world"
    materialize(WORLD, out, config=SMALL)
    return out
