from pathlib import Path

import pytest

from dpo_loop.policies import describe_policy
from dpo_loop.types import PolicyRef
from tests.builders import build_adapter, build_model
from tests.training.world import make_pairs, write_pairs


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> PolicyRef:
    """A random Llama without an adapter."""
    return describe_policy(build_model(tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="session")
def adapted(base: PolicyRef, tmp_path_factory: pytest.TempPathFactory) -> PolicyRef:
    """The same Llama with an adapter that changes what it says."""
    adapter = build_adapter(tmp_path_factory.mktemp("adapted") / "adapter", Path(base.base), rank=4)
    return describe_policy(Path(base.base), adapter=adapter)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 pairs: five steps of eight and one of four."""
    return write_pairs(tmp_path_factory.mktemp("pair"), make_pairs(44))
