"""How a command shows rows: a table for people, JSON for programs."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import asyncpg
import msgspec
import typer
from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sluice.settings import Settings, load_or_exit

EXIT_UNEXPLAINED = 1
EXIT_UNREACHABLE = 3

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
T = TypeVar("T")


def show(rows: Sequence[Mapping[str, Any]], *, as_json: bool, empty: str) -> None:
    """Print the rows; `empty` is what a person reads where there are none."""
    if as_json:
        sys.stdout.write(msgspec.json.encode([dict(row) for row in rows], enc_hook=str).decode())
        sys.stdout.write("\n")
        return
    console = stdout_console()
    if not rows:
        console.print(empty)
        return
    table = Table(*rows[0], box=None, header_style="bold")
    for row in rows:
        # Text, not markup: a reason or a name may hold brackets and colons.
        table.add_row(*(Text("" if value is None else str(value)) for value in row.values()))
    console.print(table)


def stdout_console() -> Console:
    """Give what a command prints on: a pipe or a file is no narrow screen, nothing is cut there."""
    return Console(width=None if sys.stdout.isatty() else 200)


def run(work: Callable[[Settings], Awaitable[T]]) -> T:
    """Run a command's work with the settings; a server that is away is one line and exit 3."""
    settings = load_or_exit()

    async def call() -> T:
        return await work(settings)

    try:
        return asyncio.run(call())
    except (OSError, RedisError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error} (sluice doctor names the fix)\n")
        raise typer.Exit(EXIT_UNREACHABLE) from error
