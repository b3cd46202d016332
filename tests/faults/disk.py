"""A small file system, and a full one. Mounting needs root."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path

import pytest

_BLOCK_BYTES = 65536


@contextmanager
def small_file_system(path: Path, megabytes: int) -> Iterator[Path]:
    """Mount a file system of this size over an empty directory; skips the test where it may not.

    A server is put on it by giving it the directory before its first start.
    """
    if problem := mount(path, megabytes):
        pytest.skip(problem)
    try:
        yield path
    finally:
        unmount(path)


def mount(path: Path, megabytes: int) -> str:
    """Mount a file system of this size over an empty directory; says why where it may not."""
    if os.geteuid() != 0:
        return "only root may mount a small file system"
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"this root may not mount: {done.stderr.strip()}" if done.returncode else ""


def unmount(path: Path) -> None:
    """Take a small file system off again."""
    # Lazily: a server that was just killed may hold it for another moment.
    subprocess.run(["umount", "--lazy", path], check=True)  # noqa: S607  # the system's own


@contextmanager
def filled(path: Path) -> Iterator[int]:
    """Leave no room on the file system that holds the directory; gives the bytes it took."""
    filler = path / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            for size in (_BLOCK_BYTES, 1):
                while _could_write(file.fileno(), size):
                    pass
        yield filler.stat().st_size
    finally:
        filler.unlink()


def _could_write(descriptor: int, size: int) -> bool:
    try:
        os.write(descriptor, b"\0" * size)
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        return False
    return True
