"""Which pairs of versions are warned of."""

import pytest

from flusher.checks import faults_of


@pytest.mark.parametrize(
    ("postgres", "timescaledb", "word"),
    [
        ((17, 11), (2, 26, 2), "candles"),
        ((17, 12), (2, 19, 3), "17.12"),
        ((17, 12), (2, 28, 3), "2.28.4"),
        ((17, 13), (2, 30, 9), "jobs"),
        ((18, 7), (2, 32, 0), "jobs"),
        ((16, 16), (2, 27, 2), "jobs"),
    ],
)
def test_a_pair_of_versions_with_a_known_fault_is_named(
    postgres: tuple[int, int], timescaledb: tuple[int, int, int], word: str
) -> None:
    (fault,) = faults_of(postgres, timescaledb)
    assert word in fault


@pytest.mark.parametrize(
    ("postgres", "timescaledb"),
    [
        ((17, 11), (2, 19, 3)),
        ((17, 11), (2, 29, 2)),
        ((17, 12), (2, 28, 4)),
        ((17, 12), (2, 32, 1)),
        ((17, 12), (2, 33, 0)),
        ((18, 6), (2, 32, 0)),
        ((15, 99), (2, 19, 3)),
    ],
)
def test_a_pair_of_versions_without_one_is_not(
    postgres: tuple[int, int], timescaledb: tuple[int, int, int]
) -> None:
    assert list(faults_of(postgres, timescaledb)) == []
