"""`sluice install`: the systemd units, rendered for a prefix, a user and a number of shards."""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Final

import typer

PORTS: Final = {"collector": 9101, "orderbook": 9102, "flusher": 9103}
"""Where the first instance of each service serves its pages; every other one is 10 further."""
SLOTS: Final = ("a", "b")
_SETTINGS: Final = """\
# Sluice: what every process reads. See .env.example for all there is; passwords belong in
# /etc/sluice/credentials, one file a setting, readable by root alone.
SYMBOLS=binance:BTCUSDT,binance:ETHUSDT
REDIS_HOST=127.0.0.1
POSTGRES_HOST=127.0.0.1
"""


@dataclass(frozen=True)
class Instance:
    """One unit `sluice-<service>@<shard>-<slot>`; two slots take turns in a deploy."""

    service: str
    shard: int
    slot: str

    @property
    def port(self) -> int:
        """Where it serves its pages; no two instances share one."""
        return PORTS[self.service] + 10 * (len(SLOTS) * self.shard + SLOTS.index(self.slot))


def _own_settings(instance: Instance, shards: int, held: str) -> str:
    """Give an instance's own file: what it held, but for the share of the books, which is ours."""
    lines = [line for line in held.splitlines() if not line.startswith("BOOK_SHARD=")]
    if instance.service == "orderbook":
        lines.append(f"BOOK_SHARD={instance.shard}/{shards}")
    return "".join(f"{line}\n" for line in lines)


def _targets(ports: Mapping[Instance, int]) -> str:
    """Write what Prometheus' file_sd_configs reads: both slots, told apart from what they do."""
    groups = [
        {
            "targets": [f"127.0.0.1:{port}"],
            "labels": {"service": each.service, "shard": str(each.shard), "slot": each.slot},
        }
        for each, port in ports.items()
    ]
    return json.dumps(groups, indent=2) + "\n"


def templates() -> Traversable:
    """Give the directory of unit templates: in a checkout, or inside the installed package."""
    checkout = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
    return checkout if checkout.is_dir() else resources.files("sluice").joinpath("systemd")


def render(prefix: Path, user: str) -> dict[str, str]:
    """Give every unit's text by its file name."""
    return {
        unit.name: unit.read_text(encoding="utf-8")
        .replace("@PREFIX@", str(prefix))
        .replace("@USER@", user)
        for unit in sorted(templates().iterdir(), key=lambda unit: unit.name)
    }


def install(
    prefix: Annotated[
        Path, typer.Option(help="Where Sluice is installed; its bin/python is run.")
    ] = Path(sys.prefix),
    user: Annotated[str, typer.Option(help="The user the services run as.")] = "sluice",
    shards: Annotated[int, typer.Option(min=1, max=64, help="Instances of orderbook.")] = 1,
    root: Annotated[Path, typer.Option(help="Write below this instead of /.")] = Path("/"),
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
) -> None:
    """Write the systemd units, and a settings file where there is none; says each thing it does.

    Nothing is started. Exit code 1 where a file can not be written.
    """
    etc = root / "etc"
    files = {etc / "systemd" / "system" / name: text for name, text in render(prefix, user).items()}
    instances = [
        Instance(service, shard, slot)
        for service in PORTS
        for shard in range(shards if service == "orderbook" else 1)
        for slot in SLOTS
    ]
    ports = {}
    for each in instances:
        path = etc / "sluice" / f"{each.service}-{each.shard}-{each.slot}.env"
        held = path.read_text(encoding="utf-8") if path.exists() else f"METRICS_PORT={each.port}\n"
        files[path] = _own_settings(each, shards, held)
        named = re.search("^METRICS_PORT=([0-9]+)$", held, re.MULTILINE)
        ports[each] = int(named[1]) if named else each.port
    files[etc / "sluice" / "prometheus-targets.json"] = _targets(ports)
    settings = etc / "sluice" / "sluice.env"
    if settings.exists():
        typer.echo(f"kept     {settings}")
    else:
        files[settings] = _SETTINGS
    for name in ("redis_password", "postgres_password"):
        credential = etc / "sluice" / "credentials" / name
        if not credential.exists():
            files[credential] = ""
    for path, text in files.items():
        typer.echo(f"{'would write' if dry_run else 'wrote'}    {path}")
        if dry_run:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            if path.parent.name == "credentials":
                path.chmod(0o600)
        except OSError as error:
            typer.echo(f"{path}: {error.strerror}", err=True)
            raise typer.Exit(1) from error
    # The command reads `.env` where it is started: here it reads what the services read.
    link = etc / "sluice" / ".env"
    typer.echo(f"{'would link' if dry_run else 'linked'}   {link}")
    if not dry_run and not link.is_symlink():
        link.symlink_to(settings.name)
    first = " ".join(
        f"sluice-{each.service}@{each.shard}-{each.slot}"
        for each in instances
        if each.slot == SLOTS[0]
    )
    typer.echo(
        f"next: useradd --system {user}; fill in {settings};\n"
        f"      systemctl daemon-reload && systemctl enable --now {first} "
        "sluice-maintain.timer sluice.target"
    )
