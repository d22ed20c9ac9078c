"""How OpenMP's threads wait: a little and then asleep, unless somebody has said otherwise."""

import pytest

from dpo_loop.openmp import wait_briefly


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
    ],
)
def test_what_somebody_has_set_stays(given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    environment = dict(given)
    monkeypatch.setattr("os.environ", environment)
    wait_briefly()
    assert environment == expected
