"""What the spool has taken comes back, in order, whoever died."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from sluice.queue import Segment
from sluice.spool import Batch, Spool, SpoolFullError, adopt

MIB = 2**20


def batch(number: int) -> Batch:
    field = "binance:BTCUSDT:trade"
    return Batch("trade", [b"[%d]" % number, b"[%d]" % -number], [Segment(field, number, number)])


def drain(spool: Spool) -> list[Batch]:
    batches = []
    while (oldest := spool.oldest()) is not None:
        position, content = oldest
        batches.append(content)
        spool.remove(position)
    return batches


def test_batches_return_in_order_with_their_segments(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "spool", MIB)
    for number in range(1, 101):
        spool.append(batch(number))
    assert (spool.batches, spool.records) == (100, 200)
    assert drain(spool) == [batch(number) for number in range(1, 101)]
    assert (spool.batches, spool.records, spool.bytes) == (0, 0, 0)
    spool.close()


def test_an_empty_file_is_deleted_and_a_full_one_is_kept(tmp_path: Path) -> None:
    empty, full = Spool.create(tmp_path, MIB), Spool.create(tmp_path, MIB)
    full.append(batch(1))
    empty.close()
    full.close()
    assert [path for path in tmp_path.iterdir() if path.suffix == ".spool"] == [full.path]


def test_a_batch_is_synced_before_append_returns(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "spool", MIB)
    # The file system of a test does not forget, so what is asked of it has to do.
    asked = {
        name: spool._database.execute(f"PRAGMA {name}").fetchone()[0]  # noqa: SLF001  # a setting of this connection alone
        for name in ("journal_mode", "synchronous")
    }
    spool.close()
    assert asked == {"journal_mode": "wal", "synchronous": 2}


def test_at_its_bound_it_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, 100)
    spool.append(batch(1))
    with pytest.raises(SpoolFullError):
        spool.append(Batch("trade", [b"x" * 100]))
    assert drain(spool) == [batch(1)]
    spool.close()


def test_a_held_file_is_not_adopted_and_a_free_one_is(tmp_path: Path) -> None:
    held, free = Spool.create(tmp_path, MIB), Spool.create(tmp_path, MIB)
    held.append(batch(1))
    free.append(batch(2))
    free.close()
    (adopted,) = adopt(tmp_path, MIB)
    assert drain(adopted) == [batch(2)]
    adopted.close()
    held.close()


def test_what_a_killed_process_had_spooled_is_adopted(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from sluice.spool import Batch, Spool\n"
        "spool = Spool.create(pathlib.Path(sys.argv[1]), 2**20)\n"
        "number = 0\n"
        "while True:\n"
        "    number += 1\n"
        "    spool.append(Batch('trade', [b'%d' % number]))\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        taken = [int(process.stdout.readline()) for _ in range(20)][-1]
        os.kill(process.pid, signal.SIGKILL)
        taken = max([taken, *(int(line) for line in process.stdout if line.endswith("\n"))])
    (adopted,) = adopt(tmp_path, MIB)
    items = [int(item) for content in drain(adopted) for item in content.items]
    assert items == list(range(1, len(items) + 1))
    assert len(items) >= taken
    adopted.close()


def test_an_unreadable_file_is_set_aside_and_the_others_are_adopted(tmp_path: Path) -> None:
    good = Spool.create(tmp_path, MIB)
    good.append(batch(1))
    good.close()
    (tmp_path / "bad.spool").write_bytes(b"no database at all" * 100)
    (adopted,) = adopt(tmp_path, MIB)
    assert drain(adopted) == [batch(1)]
    assert (tmp_path / "bad.spool.broken").exists()
    adopted.close()


@pytest.mark.parametrize(
    "error", [sqlite3.OperationalError("disk is full"), OSError(errno.EMFILE, "too many open")]
)
def test_a_file_that_can_not_be_opened_now_is_adopted_later(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool.create(tmp_path, MIB)
    spool.append(batch(1))
    spool.close()

    def refuse(_: Spool) -> None:
        raise error

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Spool, "_open", refuse)
        assert adopt(tmp_path, MIB) == []
    (adopted,) = adopt(tmp_path, MIB)
    assert drain(adopted) == [batch(1)]
    adopted.close()


def test_a_damaged_batch_is_an_error_of_its_file(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, MIB)
    spool.append(batch(1))
    spool._database.execute("UPDATE batches SET content = x'c1'")  # noqa: SLF001  # as a bad disk would
    with pytest.raises(sqlite3.DatabaseError, match="damaged"):
        spool.oldest()
    spool.close()


def test_a_directory_that_is_not_there_holds_no_spools(tmp_path: Path) -> None:
    assert adopt(tmp_path / "none", MIB) == []
