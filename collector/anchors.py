"""What Redis has forgotten is read from the table: where a record begins, and which gaps are open.

A head is missing when a market is new, or when Redis came back empty. The push script notes the
first id it saw since; whatever the table lacks below that id becomes holes again.

An open gap is orphaned when Redis came back without it, or never heard of it: it is pushed before
it is kept. Whatever the table lacks of its ids becomes holes again, and it is worked on.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

import asyncpg
from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from collector.aggregates import subtract
from collector.backfill import Venue
from collector.ledger import TRADE, Ledger
from sluice import failpoints, records
from sluice.backoff import Backoff
from sluice.budget import Priority
from sluice.clock import MICROS_PER_SECOND, now_micros
from sluice.connections import access_problem, connect_postgres
from sluice.exchanges.base import BadFrameError
from sluice.queue import UNANCHORED, WINDOWS, RecordQueue
from sluice.records import Gap
from sluice.rest import RestError
from sluice.settings import Settings

POLL_SECONDS: Final = 1.0
ORPHANS_SECONDS: Final = 30.0
HOUR: Final = 3600 * MICROS_PER_SECOND
"""The longest time that a venue answers one question about aggregates for."""

_MISSING: Final = """
WITH held AS (
    SELECT first_id, trade_id FROM trades
    WHERE market_id = market($1, $2) AND trade_id < $3
      AND time >= (SELECT time FROM trades WHERE market_id = market($1, $2) AND trade_id < $3
                   ORDER BY time DESC LIMIT 1) - interval '2 days'
)
SELECT before + 1 AS first, first_id - 1 AS last FROM (
    SELECT first_id, lag(trade_id) OVER (ORDER BY trade_id) AS before FROM held
    UNION ALL
    SELECT $3::bigint, max(trade_id) FROM held
) AS pairs WHERE first_id > before + 1 ORDER BY 1
"""
"""What the table lacks of a market's last two days before the first id seen since.

What Redis lost is at the end of what the table has; older holes have rows in `gaps`.
"""

_OPEN: Final = """
SELECT gap_id, from_id, to_id, cause, tries, revision,
       (extract(epoch FROM opened_at) * 1000000)::bigint AS ts_opened
FROM gaps
WHERE market_id = market($1, $2) AND channel = 'trade' AND status = 'open' AND from_id IS NOT NULL
"""

_OPEN_WINDOWS: Final = """
SELECT m.exchange, m.symbol, g.gap_id, g.channel, g.cause, g.tries, g.revision,
       (extract(epoch FROM g.from_time) * 1000000)::bigint AS ts_from,
       (extract(epoch FROM g.to_time) * 1000000)::bigint AS ts_to,
       (extract(epoch FROM g.opened_at) * 1000000)::bigint AS ts_opened
FROM gaps AS g JOIN markets AS m USING (market_id)
WHERE g.status = 'open' AND g.from_id IS NULL AND g.channel LIKE 'kline\\_%'
"""

_IS_RECORDED: Final = """
SELECT EXISTS (SELECT FROM trades WHERE market_id = market($1, $2) AND trade_id < $3)
"""
"""Whether the table knows the market from before; what came since may be in it already."""

_MISSING_WITHIN: Final = """
SELECT before + 1 AS first, first_id - 1 AS last FROM (
    SELECT first_id, lag(trade_id, 1, $3::bigint - 1) OVER (ORDER BY trade_id) AS before
    FROM trades WHERE market_id = market($1, $2) AND trade_id BETWEEN $3 AND $4
    UNION ALL
    SELECT $4::bigint + 1, coalesce(max(trade_id), $3::bigint - 1)
    FROM trades WHERE market_id = market($1, $2) AND trade_id BETWEEN $3 AND $4
) AS held WHERE first_id > before + 1 ORDER BY 1
"""
"""What the table lacks from one id to another, both included."""

_EXPLAINED: Final = """
SELECT from_id, to_id FROM gaps
WHERE market_id = market($1, $2) AND channel = 'trade' AND status IN ('absent', 'lost')
  AND from_id IS NOT NULL
"""


class Anchors:
    """Looks after the markets whose head is missing, and now and then after orphaned gaps.

    `first_pushed` is the lowest id that this process pushed of each stream: where neither Redis nor
    the table knows a market, it is all that is known of what was recorded.
    """

    def __init__(
        self,
        redis: Redis,
        ledgers: Sequence[Ledger],
        venues: Mapping[str, Venue],
        first_pushed: Mapping[str, int],
        settings: Settings,
    ) -> None:
        self._redis = redis
        self._ledgers = ledgers
        self._venues = venues
        self._first_pushed = first_pushed
        self._settings = settings
        self.backfill_hours = settings.backfill_hours
        self._gap_queue = RecordQueue(redis, "gap")
        self._orphans_at = time.monotonic() + ORPHANS_SECONDS

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`; the servers' errors never leave here."""
        backoff = Backoff(first=0.5, most=15.0)
        while not stop.is_set():
            delay = POLL_SECONDS
            try:
                await self._step()
                backoff.reset()
            except (RedisError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                if backoff.failures == 0:
                    problem = access_problem(error)
                    level = "ERROR" if problem else "WARNING"
                    told = problem or error
                    logger.log(level, "what was recorded before is not known yet: {}", told)
                delay = backoff.next_delay()
            except (RestError, BadFrameError) as error:
                logger.warning("where the record should begin is not known yet: {}", error)
                delay = backoff.next_delay()
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await stop.wait()

    async def _step(self) -> None:
        ledgers = list(self._ledgers)
        if not ledgers:
            return
        firsts = await self._redis.hmget(UNANCHORED, [ledger.field for ledger in ledgers])
        await failpoints.reach("anchors.firsts_read")
        pending = [
            (ledger, int(first))
            for ledger, first in zip(ledgers, firsts, strict=True)
            if first is not None
        ]
        are_orphans_due = time.monotonic() >= self._orphans_at
        if not pending and not are_orphans_due:
            return
        connection = await connect_postgres(self._settings, command_timeout=300)
        await failpoints.reach("anchors.connected")
        try:
            for ledger, first in pending:
                await self._anchor(connection, ledger, first)
            if are_orphans_due:
                for ledger in ledgers:
                    await self._adopt_orphans(connection, ledger)
                await self._adopt_windows(connection)
                self._orphans_at = time.monotonic() + ORPHANS_SECONDS
        finally:
            await connection.close(timeout=5)

    async def _adopt_orphans(self, connection: asyncpg.Connection, ledger: Ledger) -> None:
        # In this order: what was closed before the first question is in the table by the last.
        known = {gap.gap_id for gap in await ledger.open_gaps()}
        await failpoints.reach("anchors.gaps_known")
        if await self._gap_queue.length():
            return
        market = (ledger.market.exchange, ledger.market.symbol)
        await failpoints.reach("anchors.gaps_stored")
        orphans = [
            row for row in await connection.fetch(_OPEN, *market) if row["gap_id"] not in known
        ]
        if not orphans:
            return
        explained = await self._explained(connection, market)
        for row in orphans:
            found = await connection.fetch(_MISSING_WITHIN, *market, row["from_id"], row["to_id"])
            await failpoints.reach("anchors.orphan_read")
            await ledger.reopen(
                subtract([(each["first"], each["last"]) for each in found], explained)
            )
            await ledger.adopt(
                Gap(
                    *market,
                    channel=TRADE,
                    ts_from=None,
                    ts_to=None,
                    status="open",
                    ts_closed=None,
                    **row,
                )
            )
        logger.info("{}: {} open gaps that Redis had forgotten", ledger.field, len(orphans))

    async def _adopt_windows(self, connection: asyncpg.Connection) -> None:
        """Have the open windows of candles that Redis has forgotten refilled."""
        known = set(await self._redis.hkeys(WINDOWS))
        await failpoints.reach("anchors.windows_known")
        waiting = await self._gap_queue.length()
        await failpoints.reach("anchors.windows_clear")
        if waiting:
            return
        rows = await connection.fetch(_OPEN_WINDOWS)
        await failpoints.reach("anchors.windows_stored")
        for row in rows:
            if row["gap_id"].encode() not in known:
                gap = Gap(from_id=None, to_id=None, status="open", ts_closed=None, **row)
                await self._redis.hsetnx(WINDOWS, gap.gap_id, records.encode(gap))
                await failpoints.reach("anchors.window_adopted")
                logger.info("{}: a window that Redis had forgotten", gap.gap_id)

    async def _explained(
        self, connection: asyncpg.Connection, market: tuple[str, str]
    ) -> list[tuple[int, int]]:
        rows = await connection.fetch(_EXPLAINED, *market)
        await failpoints.reach("anchors.explained_read")
        return [(row["from_id"], row["to_id"]) for row in rows]

    async def _anchor(self, connection: asyncpg.Connection, ledger: Ledger, first: int) -> None:
        market = (ledger.market.exchange, ledger.market.symbol)
        found = await connection.fetch(_MISSING, *market, first)
        await failpoints.reach("anchors.missing_read")
        holes = subtract(
            [(row["first"], row["last"]) for row in found],
            await self._explained(connection, market),
        )
        await failpoints.reach("anchors.table_asked")
        if not found and not await connection.fetchval(_IS_RECORDED, *market, first):
            holes = await self._unrecorded(ledger, first)
        await ledger.reopen(holes)
        await self._redis.hdel(UNANCHORED, ledger.field)
        await failpoints.reach("anchors.anchored")
        if holes:
            count = sum(last - low + 1 for low, last in holes)
            logger.info("{}: {} trades before {} are fetched", ledger.field, count, first)

    async def _unrecorded(self, ledger: Ledger, first: int) -> list[tuple[int, int]]:
        """Find what is missing of a market that the table does not know."""
        began = self._first_pushed.get(ledger.field, first)
        lost = [(began, first - 1)] if began < first else []
        return [*await self._wanted_history(ledger, began), *lost]

    async def _wanted_history(self, ledger: Ledger, first: int) -> list[tuple[int, int]]:
        """Find the range of ids that BACKFILL_HOURS asks for at a market's first start."""
        hours = self.backfill_hours
        if hours == 0:
            return []
        venue = self._venues[ledger.market.exchange]
        symbol = ledger.market.symbol
        now = now_micros()
        since = now - int(hours * HOUR)
        # A market may be younger than the hours, or without a trade in the first of them.
        while since < now:
            request = venue.exchange.aggregates_request(symbol, since, min(since + HOUR, now))
            body = await venue.rest.get(request, Priority.BACKFILL)
            trades = venue.exchange.read_aggregates(symbol, body, now_micros())
            if trades:
                low = trades[0].first_id
                return [(low, first - 1)] if low < first else []
            since += HOUR
        return []
