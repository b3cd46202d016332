"""Every failpoint: which process comes by it, and what it takes to make one.

Four processes are killed side by side, each a lane: a collector of one market for what it reads and
pushes, another of the other market for what it repairs, the books, and the flusher.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import asyncpg
from redis.asyncio import Redis

from collector.ledger import gaps_key
from sluice.queue import HEADS, UNANCHORED, RecordQueue, head_field, holes_key
from tests.acceptance.processes import Processes
from tests.faults import redis_faults
from tests.integration.flusher_rig import trade

READ: Final = "BTCUSDT"
REPAIRED: Final = "ETHUSDT"
PLANTED: Final = "PLANTED"
"""A market that no exchange has: what a test puts into the queue itself."""

Lane = Literal["reads", "repairs", "books", "stores"]


class Place(NamedTuple):
    """A failpoint's lane, and what happens while it is waited for."""

    lane: Lane
    needs: str = ""


PLACES: Final[dict[str, Place]] = {
    "stream.connected": Place("reads"),
    "stream.subscribed": Place("reads"),
    "stream.frame_read": Place("reads"),
    "stream.asked": Place("reads", "silence"),
    "stream.closed": Place("reads", "closed sockets"),
    "coverage.windows_kept": Place("reads", "missing candles"),
    "candles.windows_read": Place("reads"),
    "candles.leased": Place("reads", "missing candles"),
    "candles.filled_read": Place("reads", "missing candles"),
    "candles.gap_pushed": Place("reads", "missing candles"),
    "candles.gap_kept": Place("reads", "missing candles"),
    "candles.page_read": Place("reads", "missing candles"),
    "candles.page_pushed": Place("reads", "missing candles"),
    "candles.end_pushed": Place("reads", "missing candles"),
    "candles.gap_closed": Place("reads", "missing candles"),
    "candles.filled_forgotten": Place("reads", "missing candles"),
    "publisher.queues_found": Place("reads"),
    "publisher.queues_measured": Place("reads"),
    "publisher.taken": Place("reads"),
    "publisher.pushed": Place("reads"),
    "publisher.redis_asked": Place("reads"),
    "publisher.heads_read": Place("reads"),
    "publisher.holes_pushed": Place("reads", "older heads"),
    "publisher.frames_kept": Place("reads", "bad frames"),
    "publisher.frames_trimmed": Place("reads", "bad frames"),
    "publisher.spools_adopted": Place("reads"),
    "publisher.spool_opened": Place("reads", "refusals"),
    "publisher.spooled": Place("reads", "refusals"),
    "publisher.spool_read": Place("reads", "refusals"),
    "publisher.returned": Place("reads", "refusals"),
    "publisher.spool_removed": Place("reads", "refusals"),
    "publisher.spool_closed": Place("reads", "refusals"),
    "backfill.work_counted": Place("repairs"),
    "backfill.leasing": Place("repairs", "gaps"),
    "backfill.page_read": Place("repairs", "gaps"),
    "backfill.page_pushed": Place("repairs", "gaps"),
    "backfill.released": Place("repairs", "gaps"),
    "ledger.time_read": Place("repairs", "gaps"),
    "ledger.gaps_read": Place("repairs", "gaps"),
    "ledger.holes_asked": Place("repairs", "gaps"),
    "ledger.gap_pushed": Place("repairs", "gaps"),
    "ledger.gap_kept": Place("repairs", "gaps"),
    "ledger.gap_closed": Place("repairs", "gaps"),
    "ledger.gap_explained": Place("repairs", "gaps that stay"),
    "ledger.holes_explained": Place("repairs", "gaps that stay"),
    "anchors.firsts_read": Place("repairs"),
    "anchors.connected": Place("repairs"),
    "anchors.missing_read": Place("repairs", "no head"),
    "anchors.explained_read": Place("repairs", "no head"),
    "anchors.table_asked": Place("repairs", "no head"),
    "ledger.holes_reopened": Place("repairs", "no head"),
    "anchors.anchored": Place("repairs", "no head"),
    "anchors.windows_known": Place("repairs"),
    "anchors.windows_clear": Place("repairs"),
    "anchors.windows_stored": Place("repairs"),
    "anchors.gaps_known": Place("repairs"),
    "anchors.gaps_stored": Place("repairs"),
    "anchors.orphan_read": Place("repairs", "forgotten gaps"),
    "ledger.gap_adopted": Place("repairs", "forgotten gaps"),
    "backfill.lease_extended": Place("repairs", "retired gaps"),
    "backfill.held_told": Place("repairs", "retired gaps"),
    "aggregates.ends_connected": Place("repairs", "retired gaps"),
    "aggregates.market_read": Place("repairs", "retired gaps"),
    "aggregates.ends_read": Place("repairs", "retired gaps"),
    "aggregates.middle_read": Place("repairs", "retired gaps"),
    "aggregates.rows_connected": Place("repairs", "retired gaps"),
    "aggregates.rows_read": Place("repairs", "retired gaps"),
    "polling.head_read": Place("repairs", "refused sockets"),
    "liveness.head_read": Place("repairs", "a silent market"),
    "liveness.hole_pushed": Place("repairs", "a silent market"),
    "budget.asked": Place("books"),
    "budget.reported": Place("books"),
    "rest.answered": Place("books"),
    "rest.part_read": Place("books"),
    "latest.written": Place("books"),
    "latest.deleted": Place("books", "missing changes"),
    "coverage.read": Place("books"),
    "coverage.noted": Place("books"),
    "coverage.windows_pushed": Place("books"),
    "stream.pinged": Place("books", "quiet books"),
    "leases.holders_read": Place("stores"),
    "leases.shared": Place("stores"),
    # The one before died with its name told.
    "leases.dead_forgotten": Place("stores"),
    "writer.connected": Place("stores"),
    "writer.made_durable": Place("stores"),
    "writer.staged": Place("stores"),
    "writer.identified": Place("stores"),
    "writer.watch_connected": Place("stores", "slow writes"),
    "writer.watch_answered": Place("stores", "slow writes"),
    "writer.rolled_back": Place("stores", "poison"),
    "markets.read": Place("stores"),
    "markets.assigned": Place("stores", "new markets"),
    "markets.read_again": Place("stores", "new markets"),
    "flusher.counted": Place("stores"),
    "flusher.claimed": Place("stores"),
    "flusher.markets_known": Place("stores"),
    "flusher.begun": Place("stores"),
    "flusher.copied": Place("stores"),
    "flusher.inserted": Place("stores"),
    "flusher.committed": Place("stores"),
    "flusher.acking": Place("stores"),
    "flusher.acked": Place("stores"),
}
UNREACHED: Final = {
    "candles.absence_pushed": "it takes an exchange that has only some candles of a window",
    "anchors.window_adopted": "it takes a Redis that forgets a window while it is refilled",
    "publisher.shed_noted": "it takes a spool that is full while Redis refuses; chaos fills both",
    "leases.released": "it comes only when the process is told to end",
    "candles.filled_noted": "it takes a window of more candles than a page holds",
}
"""Places that no process comes by, and why."""


@dataclass
class Surroundings:
    """What can be made to happen around a process."""

    running: Processes
    redis: Redis
    dsn: str
    planted: int = 0
    poison: int = 0

    async def control(self, path: str, body: object | None = None) -> Any:  # JSON
        """Ask the exchange's control port."""
        return await asyncio.to_thread(self.running.control, path, body)

    async def order(self, kind: str, on: str, count: int = 1, **options: float) -> None:
        """Have the exchange inject a fault."""
        await self.control("faults", {"kind": kind, "on": on, "count": count, "options": options})

    async def plant(self, price: str, symbol: str) -> None:
        """Put a trade into the queue that no exchange published."""
        self.planted += 1
        await RecordQueue(self.redis, "trade").push([trade(self.planted, price, symbol)])


async def _silence(around: Surroundings) -> None:
    await around.order("drop", f"{READ.lower()}@[tk]*", 30)
    await asyncio.sleep(0.5)


async def _missing_candles(around: Surroundings) -> None:
    await around.order("drop", f"{READ.lower()}@kline*", 2)
    await asyncio.sleep(5)


async def _closed_sockets(around: Surroundings) -> None:
    await around.order("close", f"{READ.lower()}@trade", code=1011)
    await asyncio.sleep(2)


async def _older_heads(around: Surroundings) -> None:
    """Redis is back from a copy, and no trade comes by which the pushes would notice."""
    await around.order("drop", f"{READ.lower()}@trade", 40)
    await asyncio.sleep(0.2)
    field = head_field("binance", READ, "trade")
    head = await around.redis.hget(HEADS, field)
    if head is not None:
        await around.redis.hset(HEADS, field, str(int(head) - 20))
    await asyncio.sleep(2)


async def _bad_frames(around: Surroundings) -> None:
    await around.order("truncate", f"{READ.lower()}@trade", 2)
    await asyncio.sleep(0.3)


async def _refusals(around: Surroundings) -> None:
    async with redis_faults.memory_full(around.redis):
        await asyncio.sleep(1)
    await asyncio.sleep(1)


async def _gaps(around: Surroundings) -> None:
    await around.order("drop", f"{REPAIRED.lower()}@trade", 2)
    await asyncio.sleep(0.3)


async def _gaps_that_stay(around: Surroundings) -> None:
    """What the socket withheld is gone from REST too."""
    await _withhold(around, "hide")


async def _retired_gaps(around: Surroundings) -> None:
    """Only the venue's aggregates still hold what the socket withheld."""
    await _withhold(around, "retire")


async def _withhold(around: Surroundings, then: Literal["hide", "retire"]) -> None:
    async def withheld() -> list[list[int]]:
        found: list[list[int]] = (await around.control(f"truth?symbol={REPAIRED}"))["withheld"]
        return found[-1:]

    before = await withheld()
    await around.order("drop", f"{REPAIRED.lower()}@trade")
    while (after := await withheld()) == before:
        await asyncio.sleep(0.02)
    last = after[0][1]
    await around.control(then, {"symbol": REPAIRED, "from_id": last, "to_id": last})
    await asyncio.sleep(2)


async def _no_head(around: Surroundings) -> None:
    field = head_field("binance", REPAIRED, "trade")
    # In one step, and the note of an earlier loss too: that is how Redis forgets.
    async with around.redis.pipeline(transaction=True) as pipeline:
        pipeline.hdel(HEADS, field)
        pipeline.hdel(UNANCHORED, field)
        await pipeline.execute()
    await asyncio.sleep(1)


async def _forgotten_gaps(around: Surroundings) -> None:
    """An open gap is stored, and then Redis knows nothing of the market."""
    field = head_field("binance", REPAIRED, "trade")
    await around.order("rest_500", f"historicalTrades/{REPAIRED}", 5)
    await _gaps(around)
    connection = await asyncpg.connect(around.dsn, timeout=60)
    try:
        while not await connection.fetchval("SELECT count(*) FROM gaps WHERE status = 'open'"):
            await _gaps(around)
            await around.order("rest_500", f"historicalTrades/{REPAIRED}")
    finally:
        await connection.close()
    async with around.redis.pipeline(transaction=True) as pipeline:
        pipeline.hdel(HEADS, field)
        pipeline.hdel(UNANCHORED, field)
        pipeline.delete(gaps_key(field), holes_key(field))
        await pipeline.execute()
    await asyncio.sleep(1)


async def _a_silent_market(around: Surroundings) -> None:
    await around.order("drop", f"{REPAIRED.lower()}@trade", 30)
    await asyncio.sleep(0.5)


async def _refused_sockets(around: Surroundings) -> None:
    await around.order("refuse_handshake", f"{REPAIRED.lower()}@trade", 3)
    await around.order("close", f"{REPAIRED.lower()}@trade", code=1011)
    await asyncio.sleep(1)


async def _slow_writes(around: Surroundings) -> None:
    """Somebody else holds the table for longer than the flusher's patience."""
    connection = await asyncpg.connect(around.dsn, timeout=60)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE trades IN ACCESS EXCLUSIVE MODE")
            await asyncio.sleep(3)
    finally:
        await connection.close()
    await asyncio.sleep(0.5)


async def _missing_changes(around: Surroundings) -> None:
    await around.order("drop", "*@depth*", 1)
    await asyncio.sleep(1)


async def _quiet_books(around: Surroundings) -> None:
    await around.order("drop", "*@depth*", 50)
    await asyncio.sleep(4)


async def _poison(around: Surroundings) -> None:
    around.poison += 1
    await around.plant("0", PLANTED)
    await asyncio.sleep(0.5)


async def _new_markets(around: Surroundings) -> None:
    await around.plant("1", f"{PLANTED}{around.planted}")
    await asyncio.sleep(0.5)


NEEDS: Final[dict[str, Callable[[Surroundings], Awaitable[None]]]] = {
    "silence": _silence,
    "closed sockets": _closed_sockets,
    "missing candles": _missing_candles,
    "older heads": _older_heads,
    "bad frames": _bad_frames,
    "refusals": _refusals,
    "gaps": _gaps,
    "gaps that stay": _gaps_that_stay,
    "retired gaps": _retired_gaps,
    "refused sockets": _refused_sockets,
    "slow writes": _slow_writes,
    "no head": _no_head,
    "forgotten gaps": _forgotten_gaps,
    "a silent market": _a_silent_market,
    "missing changes": _missing_changes,
    "quiet books": _quiet_books,
    "poison": _poison,
    "new markets": _new_markets,
}


@asynccontextmanager
async def happening(needs: str, around: Surroundings) -> AsyncIterator[None]:
    """Make something happen again and again while the process is waited for."""

    async def repeat() -> None:
        while True:
            await NEEDS[needs](around)

    if not needs:
        yield
        return
    happens = asyncio.create_task(repeat())
    try:
        yield
    finally:
        happens.cancel()
        await asyncio.wait([happens])
        if not happens.cancelled():
            happens.result()
