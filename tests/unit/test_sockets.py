"""How symbols are divided over sockets that are open already."""

import pytest

from sluice.sockets import spread


@pytest.mark.parametrize(
    ("held", "wanted", "size", "parts"),
    [
        ([], "abcde", 2, ["ab", "cd", "e"]),
        ([], "", 2, []),
        (["ab", "c"], "abcd", 2, ["ab", "cd"]),
        (["ab", "c"], "bcdef", 2, ["bd", "ce", "f"]),
        (["ab", "cd"], "b", 2, ["b", ""]),
        (["ab", "cd"], "xyz", 2, ["xy", "z"]),
        (["abcd"], "abcd", 2, ["ab", "cd"]),
        (["ab"], "aab", 2, ["ab"]),
    ],
)
def test_who_has_a_place_keeps_it_and_others_fill_what_is_free(
    held: list[str], wanted: str, size: int, parts: list[str]
) -> None:
    assert spread(held, list(wanted), size) == [list(part) for part in parts]
