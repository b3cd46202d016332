"""`sluice queues`: how deep each queue is, how old, how fast, and what lies at its head."""

import asyncio
import time
from typing import Annotated, Any, Final

import msgspec
import typer
from redis.asyncio import Redis

from sluice.cli.output import EXIT_UNEXPLAINED, Json, run, show
from sluice.clock import MICROS_PER_SECOND, now_micros
from sluice.connections import connect_redis
from sluice.queue import Balance, RecordQueue, find_queues, parse_queue_name
from sluice.records import KINDS, Record, RejectedRecordError, TooNewError, decode
from sluice.settings import Settings

RATE_SECONDS: Final = 1.0
Name = Annotated[
    str,
    typer.Argument(
        help=f"One of {', '.join(KINDS)}; where QUEUE_SHARDS made more lists, also such as trade:1."
    ),
]

app = typer.Typer(invoke_without_command=True, help="Show the queues; `peek` shows their records.")


@app.callback()
def queues(context: typer.Context, *, as_json: Json = False) -> None:
    """Show each queue: depth, bytes, age of the oldest record, rates, time to drain, balance.

    `in` and `out` are records a second over one second. Exit code 1 where a balance is not exact
    or letters are dead; 3 when Redis can not be reached.
    """
    if context.invoked_subcommand is not None:
        return

    async def work(settings: Settings) -> list[dict[str, Any]]:
        redis = connect_redis(settings)
        try:
            return await survey(redis)
        finally:
            await redis.aclose()

    rows = run(work)
    show(rows, as_json=as_json, empty="no queues")
    if any(row["dead"] or not row["is_exact"] for row in rows):
        raise typer.Exit(EXIT_UNEXPLAINED)


@app.command("peek")
def peek(
    name: Name,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many, oldest first.")] = 5,
    *,
    as_json: Json = False,
) -> None:
    """Show the oldest records of a queue by the names of their fields; nothing is taken."""
    kind, shard = parse_name(name)

    async def work(settings: Settings) -> list[bytes]:
        redis = connect_redis(settings)
        try:
            claim = await RecordQueue(redis, kind, shard).claim(count, 2**20)
            return claim.items
        finally:
            await redis.aclose()

    show([_named(kind, item) for item in run(work)], as_json=as_json, empty="the queue is empty")


def parse_name(name: str) -> tuple[str, int]:
    """Give the kind and the shard of a list that an operator named."""
    try:
        kind, shard = parse_queue_name(name)
    except ValueError:
        kind, shard = "", 0
    if kind not in KINDS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(KINDS)}")
    return kind, shard


async def survey(redis: Redis) -> list[dict[str, Any]]:
    """Look at every queue twice, a second apart; gives a row each. Raises redis' errors."""
    found = await find_queues(redis, KINDS)
    began = time.monotonic()
    before = [await queue.balance() for queue in found]
    await asyncio.sleep(RATE_SECONDS)
    return [
        await _row(queue, earlier, time.monotonic() - began)
        for queue, earlier in zip(found, before, strict=True)
    ]


async def _row(queue: RecordQueue, before: Balance, seconds: float) -> dict[str, Any]:
    balance = await queue.balance()
    oldest = await queue.head_item()
    incoming = (balance.pushed - before.pushed) / seconds
    outgoing = (balance.acked + balance.dead - before.acked - before.dead) / seconds
    shrinking = outgoing - incoming
    return {
        "queue": queue.name,
        "depth": balance.length,
        "bytes": await queue.memory(),
        "oldest_s": _age(queue.kind, oldest) if oldest else None,
        "in": round(incoming),
        "out": round(outgoing),
        "drained_in_s": round(balance.length / shrinking) if shrinking > 0 else None,
        "pushed": balance.pushed,
        "acked": balance.acked,
        "dead": await queue.dead_length(),
        "is_exact": balance.is_exact,
    }


def _age(kind: str, item: bytes) -> float | None:
    try:
        record = decode(kind, item)
    except (RejectedRecordError, TooNewError):
        return None
    received: int | None = getattr(record, "ts_recv", getattr(record, "ts_opened", None))
    return None if received is None else round((now_micros() - received) / MICROS_PER_SECOND, 1)


def _named(kind: str, item: bytes) -> dict[str, Any]:
    try:
        record: Record = decode(kind, item)
    except (RejectedRecordError, TooNewError) as error:
        return {"error": str(error), "raw": item[:200].decode(errors="replace")}
    return msgspec.structs.asdict(record)
