"""The ledger of gaps: which holes are old enough to be named, and which named ones are closed.

The push script keeps the holes of each stream in Redis (`sluice.queue`). A hole that outlives
GAP_SETTLE_MS becomes a row in `gaps`; when no hole is left in its range the row is closed as
`filled`. Ids that the venue does not have, or no longer serves, get rows of their own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec
from redis.asyncio import Redis

from sluice import failpoints, records
from sluice.clock import now_micros
from sluice.queue import PREFIX, Hole, Holes, RecordQueue, Segment, head_field
from sluice.records import Gap
from sluice.settings import Market

TRADE: Final = "trade"
MOST_CAUSE: Final = 200
"""The most characters of a cause that a record takes."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a look at a stream's holes calls for."""

    to_open: list[Hole]
    to_close: list[Gap]


def gaps_key(stream: str) -> str:
    """Name the hash of a stream's open gaps: `gap_id` to the record as it was pushed last."""
    return f"{PREFIX}:gaps:{stream}"


def judge(
    holes: Iterable[Hole], open_gaps: Sequence[Gap], now_ms: int, settle_ms: int
) -> Judgement:
    """Say which holes have to be named, and which gaps have no hole left."""
    holes = list(holes)
    to_open = [
        hole
        for hole in holes
        if now_ms - hole.opened_ms >= settle_ms
        and not any(covers(gap, hole.first, hole.last) for gap in open_gaps)
    ]
    to_close = [
        gap for gap in open_gaps if not any(touches(gap, hole.first, hole.last) for hole in holes)
    ]
    return Judgement(to_open, to_close)


def _range(gap: Gap) -> tuple[int, int]:
    assert gap.from_id is not None and gap.to_id is not None  # noqa: S101, PT018  # the ledger opens gaps by id only
    return gap.from_id, gap.to_id


def covers(gap: Gap, first: int, last: int) -> bool:
    """Tell whether a range of ids lies within a gap."""
    gap_first, gap_last = _range(gap)
    return gap_first <= first and last <= gap_last


def touches(gap: Gap, first: int, last: int) -> bool:
    """Tell whether a range of ids and a gap have any in common."""
    gap_first, gap_last = _range(gap)
    return gap_first <= last and first <= gap_last


class Ledger:
    """The holes and the open gaps of one market's trades, in Redis.

    Every step names the gap first and forgets the hole after: whoever dies in between, the next
    one repeats it under the same `gap_id` with a higher revision. Raises redis' errors.
    """

    def __init__(self, redis: Redis, market: Market) -> None:
        self.market = market
        self.field = head_field(market.exchange, market.symbol, TRADE)
        self._redis = redis
        self._gaps_key = gaps_key(self.field)
        self._holes = Holes(redis, self.field)
        self._gap_queue = RecordQueue(redis, "gap")
        self._trade_queue = RecordQueue(redis, TRADE)

    async def holes(self) -> list[Hole]:
        """Read the holes, lowest first."""
        await failpoints.reach("ledger.holes_asked")
        return await self._holes.read()

    async def open_gaps(self) -> list[Gap]:
        """Read the gaps that are worked on."""
        kept = await self._redis.hvals(self._gaps_key)
        await failpoints.reach("ledger.gaps_read")
        return [msgspec.json.decode(item, type=Gap) for item in kept]

    async def settle(self, settle_ms: int, cause: str) -> list[Gap]:
        """Name the holes that are old enough and close what is filled; gives the open gaps."""
        seconds, micros = await self._redis.time()
        await failpoints.reach("ledger.time_read")
        now_ms = seconds * 1000 + micros // 1000
        gaps = await self.open_gaps()
        judgement = judge(await self.holes(), gaps, now_ms, settle_ms)
        for hole in judgement.to_open:
            gap = self._gap(hole.first, hole.last, f"{hole.opened_ms}", cause, "open")
            await self._keep(gap)
            gaps.append(gap)
        for gap in judgement.to_close:
            await self._close(gap, "filled")
            gaps.remove(gap)
        return gaps

    async def tried(self, gap: Gap, note: str = "") -> Gap:
        """Count an attempt at a gap; a note, if it is new, is added to the cause. Gives the gap."""
        cause = gap.cause if note in gap.cause else f"{gap.cause}; {note}"[:MOST_CAUSE]
        gap = _revised(gap, tries=gap.tries + 1, cause=cause)
        await self._keep(gap)
        return gap

    async def explain(
        self, first: int, last: int, status: Literal["absent", "lost"], cause: str
    ) -> None:
        """Name ids that can not be had and take them out of the holes.

        Where they are a whole open gap, that is what becomes of it; else they get a row of their
        own.
        """
        gaps = await self.open_gaps()
        whole = [gap for gap in gaps if _range(gap) == (first, last)]
        for gap in whole:
            why = f"{gap.cause}; {cause}"[:MOST_CAUSE]
            await self._push(_revised(gap, status=status, cause=why, ts_closed=now_micros()))
            await self._redis.hdel(self._gaps_key, gap.gap_id)
            await failpoints.reach("ledger.gap_explained")
        if not whole:
            tries = max((gap.tries for gap in gaps if covers(gap, first, last)), default=0)
            part = self._gap(first, last, status, cause, status)
            await self._push(msgspec.structs.replace(part, tries=tries))
        await self._trade_queue.push([], [Segment(self.field, first, last)])
        await failpoints.reach("ledger.holes_explained")

    async def reopen(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Make ranges of ids holes again, as if they had just been missed."""
        await self._holes.reopen(ranges)
        await failpoints.reach("ledger.holes_reopened")

    async def adopt(self, gap: Gap) -> None:
        """Work on an open gap of the table's that Redis does not know."""
        await self._redis.hsetnx(self._gaps_key, gap.gap_id, records.encode(gap))
        await failpoints.reach("ledger.gap_adopted")

    async def _keep(self, gap: Gap) -> None:
        await self._push(gap)
        await self._redis.hset(self._gaps_key, gap.gap_id, records.encode(gap))
        await failpoints.reach("ledger.gap_kept")

    async def _close(self, gap: Gap, status: Literal["filled"]) -> None:
        await self._push(_revised(gap, status=status, ts_closed=now_micros()))
        await self._redis.hdel(self._gaps_key, gap.gap_id)
        await failpoints.reach("ledger.gap_closed")

    async def _push(self, gap: Gap) -> None:
        await self._gap_queue.push([records.encode(gap)])
        await failpoints.reach("ledger.gap_pushed")

    def _gap(
        self,
        first: int,
        last: int,
        mark: str,
        cause: str,
        status: Literal["open", "absent", "lost"],
    ) -> Gap:
        now = now_micros()
        return Gap(
            exchange=self.market.exchange,
            symbol=self.market.symbol,
            gap_id=f"{self.field}:{first}-{last}:{mark}",
            channel=TRADE,
            from_id=first,
            to_id=last,
            ts_from=None,
            ts_to=None,
            cause=cause,
            status=status,
            tries=0,
            revision=now,
            ts_opened=now,
            ts_closed=None if status == "open" else now,
        )


def _revised(gap: Gap, **changes: object) -> Gap:
    # The clock, not a count: after a restore of Redis a count would begin below what SQL has.
    return msgspec.structs.replace(gap, revision=max(gap.revision + 1, now_micros()), **changes)
