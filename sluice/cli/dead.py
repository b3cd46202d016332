"""`sluice dead`: the records that the database refused, and what to do with them."""

import base64
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar

import msgspec
import typer
from redis.asyncio import Redis

from sluice.cli.output import EXIT_UNEXPLAINED, Json, run, show
from sluice.cli.queues import Name, parse_name
from sluice.clock import MICROS_PER_SECOND
from sluice.connections import connect_redis
from sluice.queue import RecordQueue, find_queues
from sluice.records import KINDS, RejectedRecordError, TooNewError, decode
from sluice.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Look at dead letters, and retry, edit or drop them.")
Number = Annotated[int, typer.Argument(min=1, help="The letter's number in `sluice dead list`.")]
_EXCERPT: Final = 60
T = TypeVar("T")


class Letter(msgspec.Struct):
    """A dead letter as the flusher writes it; `raw_base64` where the bytes were no text."""

    queue: str
    reason: str
    time: int
    raw: str | None = None
    raw_base64: str | None = None

    @property
    def item(self) -> bytes:
        """The record's bytes as they came off the queue."""
        return (
            self.raw.encode() if self.raw is not None else base64.b64decode(self.raw_base64 or "")
        )


@app.command("list")
def list_letters(*, as_json: Json = False) -> None:
    """List the dead letters of all queues, oldest first. Exit code 1 where there are any."""

    async def work(redis: Redis) -> list[dict[str, Any]]:
        return [
            _row(queue.name, number, msgspec.json.decode(raw, type=Letter))
            for queue in await find_queues(redis, KINDS)
            for number, raw in enumerate(await _letters(redis, queue.name), 1)
        ]

    rows = _run(work)
    show(rows, as_json=as_json, empty="no dead letters")
    if rows:
        raise typer.Exit(EXIT_UNEXPLAINED)


@app.command("show")
def show_letter(name: Name, number: Number) -> None:
    """Print one letter whole."""
    raw = _run(lambda redis: _letter(redis, name, number))
    typer.echo(msgspec.json.format(raw, indent=2))


@app.command("retry")
def retry(
    name: Name,
    number: Annotated[int | None, typer.Argument(min=1, help="All where left out.")] = None,
) -> None:
    """Put letters back at the tail of their queue, as they were."""

    async def work(redis: Redis) -> int:
        queue = _queue(redis, name)
        letters = (
            await _letters(redis, name) if number is None else [await _letter(redis, name, number)]
        )
        moved = 0
        for raw in letters:
            moved += await queue.revive(raw, msgspec.json.decode(raw, type=Letter).item)
        return moved

    typer.echo(f"{_run(work)} put back at the tail of {name}")


@app.command("edit")
def edit(
    name: Name,
    number: Number,
    record: Annotated[str, typer.Argument(help="The record as it should have been, JSON.")],
) -> None:
    """Put a mended record at the tail of the queue in place of a letter."""
    try:
        decode(parse_name(name)[0], record.encode())
    except (RejectedRecordError, TooNewError) as error:
        raise typer.BadParameter(str(error)) from error

    async def work(redis: Redis) -> bool:
        raw = await _letter(redis, name, number)
        return await _queue(redis, name).revive(raw, record.encode())

    typer.echo("put at the tail" if _run(work) else "the letter was gone already")


@app.command("drop")
def drop(
    name: Name,
    number: Number,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a letter for good; prints what is deleted."""
    raw = _run(lambda redis: _letter(redis, name, number))
    typer.echo(raw.decode())
    if not yes:
        typer.confirm("Delete it for good?", abort=True)
    gone = _run(lambda redis: _queue(redis, name).revive(raw, None))
    typer.echo("deleted" if gone else "the letter was gone already")


def _run(work: Callable[[Redis], Awaitable[T]]) -> T:
    async def with_redis(settings: Settings) -> T:
        redis = connect_redis(settings)
        try:
            return await work(redis)
        finally:
            await redis.aclose()

    return run(with_redis)


def _queue(redis: Redis, name: str) -> RecordQueue:
    return RecordQueue(redis, *parse_name(name))


async def _letters(redis: Redis, name: str) -> list[bytes]:
    return await redis.lrange(_queue(redis, name).dead_key, 0, -1)  # type: ignore[return-value]  # bytes, as no decoding is asked for


async def _letter(redis: Redis, name: str, number: int) -> bytes:
    letters = await _letters(redis, name)
    if number > len(letters):
        raise typer.BadParameter(f"{name} has {len(letters)} dead letters")
    return letters[number - 1]


def _row(name: str, number: int, letter: Letter) -> dict[str, Any]:
    died = datetime.fromtimestamp(letter.time / MICROS_PER_SECOND, UTC)
    return {
        "queue": name,
        "number": number,
        "died": f"{died:%Y-%m-%d %H:%M:%S}",
        "reason": letter.reason,
        "record": _visible(letter.item[:_EXCERPT].decode(errors="replace")),
    }


def _visible(text: str) -> str:
    """Escape what a terminal would obey."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )
