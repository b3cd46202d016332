"""The text of the schema, its migrations, and which versions of TimescaleDB are known to be bad."""

import re

import pytest

from sluice.schema import (
    SCHEMA_VERSION,
    read_migrations,
    read_schema,
    timescaledb_faults,
    version_numbers,
)


@pytest.mark.parametrize(
    ("version", "postgres", "is_community", "words"),
    [
        ((2, 18, 2), (17, 5), False, ["too old"]),
        ((2, 19, 3), (17, 12), False, []),
        ((2, 26, 2), (17, 11), True, ["candles twice"]),
        ((2, 26, 3), (17, 11), True, []),
        ((2, 26, 2), (17, 12), True, ["candles twice", "17.12"]),
        ((2, 27, 2), (17, 12), True, ["17.12"]),
        ((2, 27, 3), (17, 12), True, []),
        ((2, 29, 2), (17, 11), True, []),
        ((2, 29, 2), (17, 12), True, ["2.31.2"]),
        ((2, 30, 9), (18, 7), True, ["jobs"]),
        ((2, 31, 2), (18, 8), True, []),
        ((2, 32, 0), (16, 16), True, ["jobs"]),
        ((2, 32, 0), (18, 6), True, []),
        ((2, 32, 1), (16, 16), True, []),
        ((2, 33, 0), (18, 7), True, []),
        ((3, 0, 0), (15, 99), True, []),
    ],
)
def test_a_known_bad_version_is_told_from_a_good_one(
    version: tuple[int, ...],
    postgres: tuple[int, int],
    *,
    is_community: bool,
    words: list[str],
) -> None:
    faults = list(timescaledb_faults(version, postgres=postgres, is_community=is_community))

    assert len(faults) == len(words)
    assert all(word in fault for word, fault in zip(words, faults, strict=True))


def test_a_version_is_read() -> None:
    assert version_numbers("2.19.3") == (2, 19, 3)
    assert version_numbers("2.20.0-dev") == (2, 20, 0)


def test_every_version_since_the_first_has_its_migration() -> None:
    assert [migration.version for migration in read_migrations()] == [*range(2, SCHEMA_VERSION + 1)]
    assert re.findall(r"ours constant integer := (\d+)", read_schema()) == [str(SCHEMA_VERSION)]
