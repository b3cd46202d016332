"""`sluice queues`: how deep each queue is, how old, how fast, and what lies at its head."""

import asyncio
import time
from collections import Counter
from typing import Annotated, Any, Final

import msgspec
import typer
from redis.asyncio import Redis

from sluice.cli.output import EXIT_UNEXPLAINED, Json, run, show
from sluice.clock import MICROS_PER_SECOND, now_micros
from sluice.connections import connect_postgres, connect_redis
from sluice.queue import Balance, RecordQueue, balance_of, find_queues, parse_queue_name
from sluice.records import KINDS, Record, RejectedRecordError, TooNewError, decode
from sluice.settings import Settings
from sluice.spool import waiting

RATE_SECONDS: Final = 1.0
_ROWS: Final = {
    "trade": "SELECT count(*) FROM trades",
    "orderbook_snapshot": "SELECT count(*) FROM orderbook_snapshots",
    "kline": "SELECT count(*) FROM klines",
    "ticker": "SELECT count(*) FROM tickers",
    "gap": "SELECT count(*) FROM gaps",
    "book_audit": "SELECT count(*) FROM book_audits",
}
Name = Annotated[
    str,
    typer.Argument(
        help=f"One of {', '.join(KINDS)}; where QUEUE_SHARDS made more lists, also such as trade:1."
    ),
]

app = typer.Typer(invoke_without_command=True, help="Show the queues; `peek` shows their records.")


@app.callback()
def queues(
    context: typer.Context,
    *,
    is_sql: Annotated[
        bool, typer.Option("--sql", help="Compare with the rows of the tables; counts them all.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show each queue: depth, bytes, age of the oldest record, rates, time to drain, balance.

    `in` and `out` are records a second over one second. `pushed`, `acked`, `dead` and `shed` count
    since the start of this Redis; `is_exact` says that pushed = acked + dead + depth. `spooled` is
    what waits in SPOOL_DIR here, `shed` what was lost before it could be pushed, and `letters` the
    dead letters that are still there. So what ever came is pushed + spooled + shed.

    With --sql it shows the accounts of each kind: `duplicates` is acked less rows, at rest, as long
    as no rows were dropped. A gap that is told again counts as one.

    Exit code 1 where a balance is not exact or letters are dead; 3 when a server can not be
    reached.
    """
    if context.invoked_subcommand is not None:
        return

    async def work(settings: Settings) -> list[dict[str, Any]]:
        redis = connect_redis(settings)
        try:
            spooled = await asyncio.to_thread(waiting, settings.spool_dir)
            if is_sql:
                return await accounts(redis, settings, spooled)
            return await survey(redis, spooled)
        finally:
            await redis.aclose()

    rows = run(work)
    show(rows, as_json=as_json, empty="no queues")
    if any(row["letters"] or not row["is_exact"] for row in rows):
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


async def accounts(redis: Redis, settings: Settings, spooled: Counter[str]) -> list[dict[str, Any]]:
    """Give a row a kind: what became of its records, and the rows there are of them."""
    connection = await connect_postgres(settings)
    try:
        found = []
        for kind in KINDS:
            # Rows first: what was stored by then and is acked later is no negative duplicate.
            rows = await connection.fetchval(_ROWS[kind], timeout=600)
            queues = await find_queues(redis, [kind])
            balance = await balance_of(redis, kind)
            found.append(
                {
                    "queue": kind,
                    "pushed": balance.pushed,
                    "acked": balance.acked,
                    "dead": balance.dead,
                    "depth": balance.length,
                    "spooled": sum(spooled[queue.name] for queue in queues),
                    "shed": sum([await queue.shed() for queue in queues]),
                    "rows": rows,
                    "duplicates": balance.acked - rows,
                    "letters": sum([await queue.dead_length() for queue in queues]),
                    "is_exact": balance.is_exact,
                }
            )
        return found
    finally:
        await connection.close()


async def survey(redis: Redis, spooled: Counter[str]) -> list[dict[str, Any]]:
    """Look at every queue twice, a second apart; gives a row each. Raises redis' errors."""
    found = await find_queues(redis, KINDS)
    began = time.monotonic()
    before = [await queue.balance() for queue in found]
    await asyncio.sleep(RATE_SECONDS)
    return [
        await _row(queue, earlier, time.monotonic() - began, spooled[queue.name])
        for queue, earlier in zip(found, before, strict=True)
    ]


async def _row(queue: RecordQueue, before: Balance, seconds: float, spooled: int) -> dict[str, Any]:
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
        "dead": balance.dead,
        "spooled": spooled,
        "shed": await queue.shed(),
        "letters": await queue.dead_length(),
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
