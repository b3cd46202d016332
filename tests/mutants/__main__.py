"""`make mutants [MUTANTS='fence spool']`: a line a mutant; exit 1 where one lives."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from sluice.cli.debian import ensure_root
from tests.conftest import SERVICES
from tests.mutants.table import MUTANTS, Mutant

ROOT: Final = Path(__file__).parents[2]
PARTS: Final = (
    *("collector", "flusher", "orderbook", "sluice", "tests"),
    *("schema.sql", "migrations", "pyproject.toml"),
)
CEILING: Final = 600.0
FAILED: Final = 1
"""What pytest exits with where tests failed, and not for instance where there are none."""


def main(words: Sequence[str]) -> int:
    mutants = [
        mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)
    ]
    if not mutants:
        print(
            "no mutant has such a name; there are", *(mutant.name for mutant in MUTANTS), sep="\n"
        )
        return 2
    # One for all copies, or each would bring its own.
    root = ensure_root(SERVICES, lambda line: print(line, file=sys.stderr))
    os.environ["SLUICE_SERVICES"] = str(root)
    with tempfile.TemporaryDirectory(prefix="sluice-mutants-") as directory:
        # A test that fails anyway proves nothing.
        files = sorted({mutant.tests for mutant in mutants})
        keyword = " or ".join(f"({mutant.keyword})" for mutant in mutants)
        if (code := _pytest(_copy(Path(directory)), files, keyword)) != 0:
            print(f"the tests exit with {code} on the code as it is")
            return 2
        living = [mutant.name for mutant in mutants if not _dies(mutant, Path(directory))]
    print(f"{len(mutants)} mutants, {len(mutants) - len(living)} killed, {len(living)} live")
    return 1 if living else 0


def _dies(mutant: Mutant, directory: Path) -> bool:
    tree = _copy(directory)
    for edit in mutant.edits:
        edit.apply(tree)
    began = time.monotonic()
    code = _pytest(tree, [mutant.tests], mutant.keyword)
    is_dead = code == FAILED
    word = "killed" if is_dead else f"LIVES (pytest exits with {code})"
    where = f"{mutant.tests} -k '{mutant.keyword}'"
    print(f"{mutant.name}: {word} in {time.monotonic() - began:.1f} s by {where}", flush=True)
    return is_dead


def _copy(directory: Path) -> Path:
    """Make a fresh copy of the tree."""
    tree = directory / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=_ignored)
        else:
            shutil.copy(source, tree / part)
    return tree


def _ignored(_: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if name == "__pycache__"}


def _pytest(tree: Path, files: Sequence[str], keyword: str) -> int:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *files, "-k", keyword],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=CEILING,
        check=False,
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
