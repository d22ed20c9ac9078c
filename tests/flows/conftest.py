"""What several files of tests share, made once; the heavy imports only where it is used."""

from pathlib import Path

import pytest

from dpo_loop.layout import RunDir


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.flows.exports import build_base

    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def exportable(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """See `play_rounds`. Copy it; do not change it."""
    from tests.flows.exports import play_rounds

    return play_rounds(tmp_path_factory.mktemp("exportable"), tiny_llama)
