"""Every mutant can still be made of the code as it is now."""

import shutil
from pathlib import Path

import pytest

from tests.mutants.table import MUTANTS, Edit, Mutant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_and_names_a_test_that_is_there(mutant: Mutant, tmp_path: Path) -> None:
    for path in {edit.path for edit in mutant.edits}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for edit in mutant.edits:
        edit.apply(tmp_path)
        compile((tmp_path / edit.path).read_text(encoding="utf-8"), edit.path, "exec")
    names = (ROOT / mutant.tests).read_text(encoding="utf-8")
    assert mutant.keyword.split(" and ")[0] in names


def test_text_that_is_not_there_once_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\nb = 1\n")
    Edit("code.py", "a = 1", "a = 2").apply(tmp_path)
    assert (tmp_path / "code.py").read_text() == "a = 2\nb = 1\n"
    for old in ("a = 1", " = "):
        with pytest.raises(ValueError, match=r"code\.py: stands there"):
            Edit("code.py", old, "").apply(tmp_path)
