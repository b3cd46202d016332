"""The spool: where batches wait on disk while Redis refuses them or is away.

Each process writes a file of its own under SPOOL_DIR, SQLite in WAL mode with full sync, so what
`append` has taken survives kill -9 and the loss of power. A file belongs to nobody: its writer
holds a lock, and a file whose lock is free is adopted by whoever looks next. Batches return in the
order they came.
"""

import fcntl
import os
import sqlite3
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from loguru import logger

from sluice.queue import Segment, parse_queue_name, queue_name

_SUFFIX: Final = ".spool"
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS batches (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    records INTEGER NOT NULL,
    content BLOB NOT NULL
)
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """Records that are pushed together onto one list, with the runs of ids they make up."""

    kind: str
    items: Sequence[bytes]
    segments: Sequence[Segment] = ()
    shard: int = 0


class _Content(msgspec.Struct, array_like=True):
    items: Sequence[bytes]
    segments: Sequence[tuple[str, int, int]]


class SpoolFullError(Exception):
    """The spool is at its bound, or its disk is full; nothing was taken."""


class Spool:
    """One file of batches, first in, first out; its methods block on the disk.

    `max_bytes` bounds the records held. Raises OSError where the directory can not be used, and
    BlockingIOError where another process holds the file.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._database = self._open()
        except BaseException:
            os.close(self._lock)
            raise

    @classmethod
    def create(cls, directory: Path, max_bytes: int) -> "Spool":
        """Begin a file of our own under a directory, which is made where it is missing."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(directory / f"{uuid.uuid4().hex}{_SUFFIX}", max_bytes)

    def _open(self) -> sqlite3.Connection:
        # Calls come one after another, from whichever worker thread is free.
        database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            database.execute(_SCHEMA)
            self.batches, self.records, self.bytes = database.execute(
                "SELECT count(*), coalesce(sum(records), 0), coalesce(sum(length(content)), 0)"
                " FROM batches"
            ).fetchone()
        except BaseException:
            database.close()
            raise
        # The file's name must survive the loss of power as its content does.
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return database

    def append(self, batch: Batch) -> None:
        """Take a batch; when this returns it is on the disk.

        Raises:
            SpoolFullError: it does not fit.
        """
        content = msgspec.msgpack.encode(
            _Content(batch.items, [(s.field, s.first, s.last) for s in batch.segments])
        )
        if self.bytes + len(content) > self._max_bytes:
            raise SpoolFullError(f"{self.path}: {self._max_bytes} bytes are taken")
        try:
            self._database.execute(
                "INSERT INTO batches (kind, records, content) VALUES (?, ?, ?)",
                (queue_name(batch.kind, batch.shard), len(batch.items), content),
            )
        except sqlite3.OperationalError as error:
            raise SpoolFullError(f"{self.path}: {error}") from error
        self.batches += 1
        self.records += len(batch.items)
        self.bytes += len(content)

    def oldest(self) -> tuple[int, Batch] | None:
        """Give the oldest batch and its position, or None where there is none.

        Raises:
            sqlite3.DatabaseError: the file is damaged.
        """
        row = self._database.execute(
            "SELECT position, kind, content FROM batches ORDER BY position LIMIT 1"
        ).fetchone()
        if row is None:
            return None
        position, name, content = row
        try:
            kind, shard = parse_queue_name(name)
            read = msgspec.msgpack.decode(content, type=_Content)
        except (msgspec.MsgspecError, ValueError) as error:
            raise sqlite3.DatabaseError(f"batch {position} is damaged: {error}") from error
        segments = [Segment(*segment) for segment in read.segments]
        return position, Batch(kind, read.items, segments, shard)

    def remove(self, position: int) -> None:
        """Drop a batch: Redis has it."""
        row = self._database.execute(
            "DELETE FROM batches WHERE position = ? RETURNING records, length(content)", (position,)
        ).fetchone()
        if row is not None:
            self.batches -= 1
            self.records -= row[0]
            self.bytes -= row[1]

    def close(self) -> None:
        """Let go of the file, and delete it where it is empty."""
        self._database.close()
        if self.batches == 0:
            self.path.unlink(missing_ok=True)
            # The lock goes last: who finds the name finds either both files or none.
            self.path.with_name(self.path.name + ".lock").unlink(missing_ok=True)
        os.close(self._lock)


def adopt(directory: Path, max_bytes: int) -> list[Spool]:
    """Open every file under a directory that no live process holds, oldest first.

    A file that is no database any more is set aside as `.broken`, and an ERROR says so. One that
    can not be opened now, on a full disk or without a free descriptor, stays for the next look.
    """
    try:
        files = sorted(directory.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime)
    except OSError:
        return []
    adopted = []
    for path in files:
        try:
            adopted.append(Spool(path, max_bytes))
        except BlockingIOError:
            continue
        except (sqlite3.OperationalError, OSError) as error:
            logger.error("spool {}: can not be opened now ({}); it stays", path.name, error)
        except sqlite3.DatabaseError as error:
            logger.error(
                "spool {}: unreadable ({}); set aside as .broken, its records are lost unless "
                "sqlite3 .recover reads them",
                path.name,
                error,
            )
            path.replace(path.with_name(path.name + ".broken"))
    return adopted


def waiting(directory: Path) -> Counter[str]:
    """Count the records that wait under a directory, by the name of their list, and lock nothing.

    What a file's writer is about to delete, or can not be read, counts for nothing.
    """
    found: Counter[str] = Counter()
    for path in directory.glob(f"*{_SUFFIX}"):
        with (
            suppress(sqlite3.Error),
            closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database,
        ):
            names = database.execute("SELECT kind, sum(records) FROM batches GROUP BY kind")
            found.update(dict(names.fetchall()))
    return found
