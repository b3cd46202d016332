"""A private Debian root with Redis and PostgreSQL, for machines that have neither."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

SUITE: Final = "trixie"
PACKAGES: Final = ("postgresql-17-timescaledb", "redis-server")
POSTGRES_BIN: Final = Path("usr/lib/postgresql/17/bin")
TEMPLATE: Final = Path("var/lib/postgresql/template")
"""Where a root keeps the data directory that new servers start from."""

Say = Callable[[str], None]


class RootError(RuntimeError):
    """Why there is no root, fit for an operator."""


def is_root(path: Path) -> bool:
    """Whether the path holds a finished root."""
    return (path / POSTGRES_BIN / "postgres").is_file()


def why_not() -> str | None:
    """Give the reason why no root can be made or used here, or None where one can."""
    if os.geteuid() != 0:
        return "not root"
    if shutil.which("apt-get") is None:
        return "no apt-get here"
    probe = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "true"],
        capture_output=True,
        check=False,
    )
    return None if probe.returncode == 0 else "this root may not mount"


def ensure_root(services: Path, say: Say) -> Path:
    """Give the root under `services`, made now where it is missing (about 500 MB, 40 s).

    It is made beside its place and renamed when it is whole, under a lock: a build that was killed
    leaves nothing that looks finished, and a second one waits for the first. SLUICE_SERVICES names
    a root to use instead.

    Raises:
        RootError: it could not be made; the message holds the last lines of the build.
    """
    if named := os.environ.get("SLUICE_SERVICES"):
        root = Path(named).resolve()
        if not is_root(root):
            raise RootError(f"SLUICE_SERVICES: {named} holds no finished root")
    else:
        root = services.resolve() / "root"
        if not is_root(root):
            make_root(root, say)
    with locked(root.parent / f"{root.name}.lock"):
        if not (root / TEMPLATE).is_dir():
            _make_template(root)
    return root


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the file's lock, waiting for it; gives its descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def make_root(root: Path, say: Say) -> None:
    """Make a root where there is none; a second call at the same time waits for the first.

    Raises:
        RootError: it could not be made; nothing of it is left.
    """
    with locked(root.parent / f"{root.name}.lock") as lock:
        if is_root(root):
            return
        for rest in root.parent.glob(f"{root.name}.partial*"):
            _remove(rest)
        if shutil.which("mmdebstrap") is None:
            _install_mmdebstrap(say)
        say(f"making a private Debian root in {root}, once (about 500 MB)")
        partial = root.parent / f"{root.name}.partial"
        command = [
            *("setpriv", "--pdeathsig", "TERM", "mmdebstrap", "--variant=apt"),
            f"--include={','.join(PACKAGES)}",
            *(SUITE, str(partial)),
        ]
        # The build inherits the lock: should this process be killed, nobody builds until all of the
        # build is gone too.
        lines = _follow(command, say, pass_fds=(lock,))
        if lines is not None:
            _remove(partial)
            raise RootError("\n".join(["mmdebstrap failed:", *lines]))
        partial.rename(root)


def _follow(command: list[str], say: Say, *, pass_fds: tuple[int, ...] = ()) -> list[str] | None:
    """Run a command and tell its steps; gives its last lines if it failed."""
    last: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=pass_fds,
    ) as process:
        assert process.stdout is not None  # noqa: S101  # it was asked for
        for line in process.stdout:
            last = [*last[-9:], line.rstrip()]
            if line.startswith("I: "):
                say(f"  {line[3:].rstrip()}")
    return last if process.returncode else None


def _install_mmdebstrap(say: Say) -> None:
    say("installing mmdebstrap")
    wanted = ("mmdebstrap", "debian-archive-keyring", "gpg", "mount")
    for command in (
        ["apt-get", "-q", "update"],
        ["apt-get", "-qy", "--no-install-recommends", "install", *wanted],
    ):
        say(f"  {' '.join(command)}")
        lines = _follow(["env", "DEBIAN_FRONTEND=noninteractive", *command], say)
    if lines is not None:
        raise RootError("\n".join(["apt-get could not install mmdebstrap:", *lines]))


def _make_template(root: Path) -> None:
    """Make the data directory that new servers copy: its user is `sluice`, all else is default."""
    partial = TEMPLATE.with_name("template.partial")
    _remove(root / partial)
    initdb = [
        *("setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"),
        *(f"/{POSTGRES_BIN}/initdb", f"--pgdata=/{partial}", "--username=sluice"),
        *("--encoding=UTF8", "--locale=C.UTF-8", "--auth=trust", "--data-checksums", "--no-sync"),
    ]
    made = subprocess.run(
        inside(root, None, initdb), capture_output=True, text=True, check=False, cwd="/"
    )
    if made.returncode:
        raise RootError(f"initdb failed:\n{made.stdout}{made.stderr}")
    (root / partial).rename(root / TEMPLATE)


def inside(
    root: Path, directory: Path | None, command: list[str], *, has_own_ipc: bool = False
) -> list[str]:
    """Give the command line that runs a command in the root, with `directory` as its /srv.

    It keeps its process id. What it mounts is seen by it alone and goes with it.
    """
    script = (
        'mount --rbind /dev "$0/dev" && mount -t tmpfs tmpfs "$0/dev/shm" && '
        'mount --rbind /proc "$0/proc" && '
        '{ [ -z "$1" ] || mount --bind "$1" "$0/srv"; } && '
        'root=$0 && shift && exec chroot "$root" "$@"'
    )
    return [
        *("unshare", "--mount", "--propagation", "private"),
        *(["--ipc"] if has_own_ipc else []),
        *("sh", "-c", script, str(root), str(directory or "")),
        *command,
    ]


def _remove(path: Path) -> None:
    """Remove a tree that may hold a root, never what is mounted in it."""
    if not path.exists():
        return
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    points = [Path(line.split()[4]) for line in mounts]
    for point in sorted((p for p in points if path in p.parents), reverse=True):
        subprocess.run(["umount", "--lazy", point], check=True)
    shutil.rmtree(path)
