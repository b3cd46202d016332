"""Which versions of TimescaleDB are known to be bad for this use."""

import pytest

from sluice.cli.database import read_schema, timescaledb_fault


@pytest.mark.parametrize(
    ("version", "postgres", "is_community", "is_sound"),
    [
        ((2, 18, 2), (17, 5), False, False),
        ((2, 19, 3), (17, 12), False, True),
        ((2, 26, 2), (17, 11), True, False),
        ((2, 26, 3), (17, 11), True, True),
        ((2, 26, 4), (17, 12), True, False),
        ((2, 27, 2), (17, 12), True, False),
        ((2, 27, 3), (17, 12), True, True),
        ((2, 29, 2), (17, 11), True, True),
        ((2, 29, 2), (17, 12), True, False),
        ((2, 30, 9), (18, 7), True, False),
        ((2, 31, 2), (18, 8), True, True),
        ((2, 32, 0), (16, 16), True, False),
        ((2, 32, 1), (16, 16), True, True),
        ((2, 33, 0), (18, 7), True, True),
        ((3, 0, 0), (18, 7), True, True),
    ],
)
def test_a_known_bad_version_is_told_from_a_good_one(
    version: tuple[int, ...],
    postgres: tuple[int, int],
    *,
    is_community: bool,
    is_sound: bool,
) -> None:
    fault = timescaledb_fault(version, is_community=is_community, postgres=postgres)

    assert (fault is None) == is_sound


def test_the_schema_is_found() -> None:
    assert "CREATE EXTENSION IF NOT EXISTS timescaledb" in read_schema()
