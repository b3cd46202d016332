"""What must hold after any fault, judged from outside: the exchange's truth, SQL and Redis.

Each `check_...` is a pure function of values and names what violates it. `judge` gathers the values
once everything has come to rest and gives a verdict, which is green, red or inconclusive: a fault
that never hit and a check that compared nothing prove nothing.
"""

import asyncio
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Literal, NamedTuple, Self

import asyncpg
from redis.asyncio import Redis

from sluice.queue import Balance, balance_of, book_key
from sluice.settings import Market
from tests.faults.waiting import CEILING
from tests.truth import Book, Trade, Truth, levels

TABLES = {
    "trade": "trades",
    "orderbook_snapshot": "orderbook_snapshots",
    "kline": "klines",
    "ticker": "tickers",
    "gap": "gaps",
}
"""The table of each kind of record."""

Range = tuple[int, int]
"""First and last id, both included."""


class Violation(NamedTuple):
    """One promise that was broken: which, where and how, and by how many ids."""

    invariant: str
    where: str
    detail: str
    ids: int = 1

    def __str__(self) -> str:
        return f"{self.invariant} ({self.where}): {self.detail}"


class InconclusiveError(Exception):
    """Nothing was violated, but too little happened for that to mean anything."""


@dataclass
class Verdict:
    """What was violated, and what keeps the rest from being proof."""

    violations: list[Violation] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> Literal["green", "red", "inconclusive"]:
        """Red where anything was violated, inconclusive where there is a doubt, else green."""
        if self.violations:
            return "red"
        return "inconclusive" if self.doubts else "green"

    def require(self) -> None:
        """Raise unless it is green.

        Raises:
            AssertionError: it is red; the message names every violation.
            InconclusiveError: there is a doubt.
        """
        if self.violations:
            raise AssertionError("\n".join(map(str, self.violations)))
        if self.doubts:
            raise InconclusiveError("; ".join(self.doubts))


class GapRow(NamedTuple):
    """A stored gap of a market's trades."""

    ids: Range
    status: str


class BookRow(NamedTuple):
    """A stored or served book; `name` says which."""

    name: str
    update_id: int
    trusted_depth: int
    book: Book


# Trades ---------------------------------------------------------------------------------------


def check_complete(
    market: str, published: Sequence[Trade], stored: Sequence[Trade], gaps: Sequence[GapRow]
) -> list[Violation]:
    """Published = stored or explained by gaps: nothing is missing silently or invented."""
    named = _Ranges(
        [
            *((trade.first_id, trade.trade_id) for trade in stored),
            *(gap.ids for gap in gaps if gap.status != "filled"),
        ]
    )
    missing = [trade.trade_id for trade in published if trade.trade_id not in named]
    known = {trade.trade_id for trade in published}
    invented = [row.trade_id for row in stored if not {row.first_id, row.trade_id} <= known]
    return [
        *_of_ids("complete", market, "neither stored nor explained", missing),
        *_of_ids("complete", market, "stored and never published", invented),
    ]


def check_explanations(
    market: str,
    published: Sequence[Trade],
    stored: Sequence[Trade],
    gaps: Sequence[GapRow],
    hidden: Sequence[Range],
) -> list[Violation]:
    """A gap at rest is closed, and calls lost or absent only what the exchange does not serve."""
    held = _Ranges((trade.first_id, trade.trade_id) for trade in stored)
    unserved = _Ranges(hidden)
    explained = _Ranges(gap.ids for gap in gaps if gap.status in {"absent", "lost"})
    given_up = [
        trade.trade_id
        for trade in published
        if trade.trade_id in explained
        and trade.trade_id not in held
        and trade.trade_id not in unserved
    ]
    return [
        *(
            Violation("explanations", market, f"a gap is still open: {_printed(gap.ids)}")
            for gap in gaps
            if gap.status == "open"
        ),
        *_of_ids("explanations", market, "given up though the exchange serves it", given_up),
    ]


def check_distinct(market: str, stored: Sequence[Trade]) -> list[Violation]:
    """No (market, trade_id) is stored twice, whatever its time, nor within an aggregate."""
    twice, highest = [], -1
    for row in sorted(stored, key=lambda row: (row.first_id, row.trade_id)):
        if row.first_id <= highest:
            twice.append(row.trade_id)
        highest = max(highest, row.trade_id)
    return _of_ids("distinct", market, "stored more than once", twice)


def check_fields(
    market: str, published: Sequence[Trade], stored: Sequence[Trade]
) -> list[Violation]:
    """Every field is as it was published, to the last digit."""
    truth = {trade.trade_id: trade for trade in published}
    return [
        Violation(
            "fields", market, f"trade {row.trade_id}: {name} is {ours}, published was {theirs}"
        )
        for row in stored
        if {row.first_id, row.trade_id} <= truth.keys()
        for name, ours, theirs in zip(Trade._fields, row, _joined(truth, row), strict=True)
        if ours != theirs
    ]


def _joined(truth: Mapping[int, Trade], row: Trade) -> Trade:
    """Give what the row must say: the last of its trades, with the quantities of all."""
    parts = (truth.get(trade_id) for trade_id in range(row.first_id, row.trade_id + 1))
    quantity = sum((Decimal(part.quantity) for part in parts if part), Decimal())
    last = truth[row.trade_id]
    return last._replace(first_id=row.first_id, quantity=format(quantity, "f"))


# Books ----------------------------------------------------------------------------------------


def check_book(market: str, row: BookRow, truth: Book) -> list[Violation]:
    """The book is the true one at its update id: every level given, and none left out.

    `truth` holds at least as many levels a side as the row's longer side, or all there are.
    """
    depth = max(len(row.book.bids), len(row.book.asks))
    found = []
    for side in ("bids", "asks"):
        ours, theirs = getattr(row.book, side), getattr(truth, side)
        wanted = min(depth, row.trusted_depth, len(theirs))
        if ours == theirs[: len(ours)] and len(ours) >= wanted:
            continue
        level = next(
            (index for index, (our, their) in enumerate(zip(ours, theirs)) if our != their),  # noqa: B905  # up to the shorter
            min(len(ours), len(theirs)),
        )
        found.append(
            Violation(
                "books",
                market,
                f"{row.name}, update {row.update_id}: {side} differ at level {level + 1}:"
                f" {_at(ours, level)} instead of {_at(theirs, level)}",
            )
        )
    return found


# Queues, freshness, resources, faults ---------------------------------------------------------


def check_balance(
    kind: str, balance: Balance, *, rows: int | None = None, dead: int = 0
) -> list[Violation]:
    """Pushed = acked + dead + length; at rest nothing waits and only what was planted is dead.

    `rows` is how many rows SQL counts, where the table was empty when the counters were zero: what
    was acked was stored, once or more often.
    """
    found = []
    if not balance.is_exact:
        found.append(f"pushed is not acked + dead + length: {balance}")
    if balance.length:
        found.append(f"{balance.length} records still wait")
    if balance.dead != dead:
        found.append(f"{balance.dead} dead letters instead of {dead}")
    if rows is not None and rows > balance.acked:
        found.append(f"{rows} rows, but only {balance.acked} records were acked")
    if rows == 0 and balance.acked:
        found.append(f"{balance.acked} records were acked, and the table is empty")
    return [Violation("balance", kind, detail) for detail in found]


async def check_fresh(
    truth: Truth, database: asyncpg.Connection, market: Market, *, within: float = CEILING
) -> list[Violation]:
    """A trade that is published from now on is stored within so many seconds."""
    before = await truth.last_id(market.symbol) or 0
    deadline = asyncio.get_running_loop().time() + within
    while asyncio.get_running_loop().time() < deadline:
        if (await _last_stored(database, market) or 0) > before:
            return []
        await asyncio.sleep(0.05)
    detail = f"nothing newer than {before} was stored within {within:g} s"
    return [Violation("fresh", str(market), detail)]


class Resources(NamedTuple):
    """What a process holds now; `tasks` are asyncio's, known of our own process only."""

    memory_bytes: int
    descriptors: int
    threads: int
    tasks: int = 0

    @classmethod
    def of(cls, pid: int) -> Self:
        """Look at another process.

        Raises:
            ProcessLookupError: it has ended.
        """
        process = Path("/proc") / str(pid)
        lines = (process / "status").read_text(encoding="utf-8").splitlines()
        status = dict(line.split(":", 1) for line in lines)
        if "VmRSS" not in status:
            raise ProcessLookupError(f"process {pid} has ended")
        memory = int(status["VmRSS"].split()[0]) * 1024
        descriptors = len(list((process / "fd").iterdir()))
        return cls(memory, descriptors, int(status["Threads"]))

    @classmethod
    def of_self(cls) -> Self:
        """Look at this process, from within its event loop."""
        return cls.of(os.getpid())._replace(tasks=len(asyncio.all_tasks()))


def check_resources(
    name: str, baseline: Resources, now: Resources, *, allowance: Resources
) -> list[Violation]:
    """Memory, descriptors, threads and tasks are back to their baseline, give or take."""
    return [
        Violation("resources", name, f"{what}: {amount} after {before}")
        for what, before, amount, more in zip(
            Resources._fields, baseline, now, allowance, strict=True
        )
        if amount > before + more
    ]


def doubts_of(hits: Mapping[str, int]) -> list[str]:
    """Name the faults that were meant to happen and did not."""
    return [f"the fault {fault!r} never hit" for fault, count in hits.items() if not count]


# Judging --------------------------------------------------------------------------------------


async def judge(
    truth: Truth,
    database: asyncpg.Connection,
    redis: Redis,
    markets: Iterable[Market],
    *,
    hits: Mapping[str, int],
    dead: Mapping[str, int] | None = None,
    are_counters_whole: bool = True,
    are_books_wanted: bool = True,
    start_ids: Mapping[Market, int] | None = None,
    within: float = CEILING,
) -> Verdict:
    """Check everything that can be seen from outside, once the pipeline has come to rest.

    The exchange publishes nothing more; books may still be written. Each market gets `within`
    seconds in which its holes are filled or explained, and each queue in which it is empty once.

    `hits` says how often each intended fault really happened, `dead` how many dead letters were
    planted by kind of record. Where Redis lost its counters `are_counters_whole` is False and they
    are not compared with SQL. `start_ids` are the ids from which on a market must be complete; by
    default it is the lowest one that is stored or explained.
    """
    verdict = Verdict(doubts=doubts_of(hits))
    for market in markets:
        start = (start_ids or {}).get(market)
        await _judge_trades(verdict, truth, database, market, start, within)
        compared = await _judge_books(verdict, truth, database, redis, market)
        if are_books_wanted and not compared:
            verdict.doubts.append(f"{market}: no book was stored")
    for kind, table in TABLES.items():
        # Rows first: once the queue is empty, all that was stored by then has been acked.
        rows = await database.fetchval(f"SELECT count(*) FROM {table}")
        verdict.violations += check_balance(
            kind,
            await _drained(redis, kind, within),
            rows=rows if are_counters_whole else None,
            dead=(dead or {}).get(kind, 0),
        )
    return verdict


async def _drained(redis: Redis, kind: str, within: float) -> Balance:
    """Give the balance once nothing waits, or after so many seconds as it is."""
    deadline = asyncio.get_running_loop().time() + within
    while (balance := await balance_of(redis, kind)).length:
        if asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.05)
    return balance


async def wait_until_stored(
    truth: Truth, database: asyncpg.Connection, market: Market, *, within: float = CEILING
) -> list[Violation]:
    """Wait until the newest trade published before now is stored or explained."""
    last = await truth.last_id(market.symbol)
    deadline = asyncio.get_running_loop().time() + within
    while last is not None:
        highest = max(
            await _last_stored(database, market) or 0,
            max((gap.ids[1] for gap in await stored_gaps(database, market)), default=0),
        )
        if highest >= last:
            break
        if asyncio.get_running_loop().time() > deadline:
            detail = f"trade {last} is neither stored nor explained after {within:g} s"
            return [Violation("drained", str(market), f"{detail}; the newest is {highest}")]
        await asyncio.sleep(0.05)
    return []


async def _judge_trades(
    verdict: Verdict,
    truth: Truth,
    database: asyncpg.Connection,
    market: Market,
    start: int | None,
    within: float,
) -> None:
    """Judge what was published until now; holes get `within` seconds to be filled or explained."""
    last = await truth.last_id(market.symbol)
    if last is None:
        verdict.doubts.append(f"{market}: no trade was published")
        return
    deadline = asyncio.get_running_loop().time() + within
    while True:
        stored = await stored_trades(database, market)
        violations = await _check_trades(truth, database, market, (start, last), stored)
        if not violations or asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.2)
    verdict.violations += violations
    if not stored:
        verdict.doubts.append(f"{market}: no trade was stored")


async def _check_trades(
    truth: Truth,
    database: asyncpg.Connection,
    market: Market,
    ids: tuple[int | None, int],
    stored: Sequence[Trade],
) -> list[Violation]:
    """Check the trades with these ids, from the lowest that is known where the first is None."""
    start, last = ids
    gaps = await stored_gaps(database, market)
    known = [*(row.first_id for row in stored), *(gap.ids[0] for gap in gaps)]
    first = min(known, default=last) if start is None else start
    published = await truth.trades(market.symbol, first, last)
    stored = [row for row in stored if first <= row.first_id and row.trade_id <= last]
    name = str(market)
    return [
        *check_complete(name, published, stored, gaps),
        *check_explanations(name, published, stored, gaps, await truth.hidden(market.symbol)),
        *check_distinct(name, stored),
        *check_fields(name, published, stored),
    ]


async def _judge_books(
    verdict: Verdict, truth: Truth, database: asyncpg.Connection, redis: Redis, market: Market
) -> int:
    """Judge every stored book and the served one; gives how many were stored."""
    rows = await stored_books(database, market)
    served = await served_book(redis, market)
    for row in [*rows, *([served] if served else [])]:
        depth = max(len(row.book.bids), len(row.book.asks), 1)
        book = await truth.book(market.symbol, row.update_id, depth)
        if book is None:
            verdict.doubts.append(f"{market}: the book at {row.update_id} is no longer known")
        else:
            verdict.violations += check_book(str(market), row, book)
    return len(rows)


async def stored_trades(database: asyncpg.Connection, market: Market) -> list[Trade]:
    """Read all trades of a market, ascending by id."""
    rows = await database.fetch(
        "SELECT trade_id, first_id, price::text, quantity::text, side,"
        " (extract(epoch FROM time) * 1000000)::bigint"
        " FROM trades WHERE market_id = market($1, $2) ORDER BY trade_id",
        market.exchange,
        market.symbol,
    )
    return [Trade(*row) for row in rows]


async def stored_gaps(database: asyncpg.Connection, market: Market) -> list[GapRow]:
    """Read the gaps of a market's trades that name ids."""
    rows = await database.fetch(
        "SELECT from_id, to_id, status FROM gaps WHERE market_id = market($1, $2)"
        " AND channel = 'trade' AND from_id IS NOT NULL ORDER BY from_id",
        market.exchange,
        market.symbol,
    )
    return [GapRow((row["from_id"], row["to_id"]), row["status"]) for row in rows]


async def stored_books(database: asyncpg.Connection, market: Market) -> list[BookRow]:
    """Read all stored books of a market, in order of time."""
    rows = await database.fetch(
        "SELECT time, update_id, trusted_depth, bid_prices, bid_sizes, ask_prices, ask_sizes"
        " FROM orderbook_snapshots WHERE market_id = market($1, $2) ORDER BY time",
        market.exchange,
        market.symbol,
    )
    return [
        BookRow(
            f"the row of {row['time']:%H:%M:%S.%f}",
            row["update_id"],
            row["trusted_depth"],
            Book(
                list(zip(row["bid_prices"], row["bid_sizes"], strict=True)),
                list(zip(row["ask_prices"], row["ask_sizes"], strict=True)),
            ),
        )
        for row in rows
    ]


async def served_book(redis: Redis, market: Market) -> BookRow | None:
    """Read the latest book as it is served, or None where there is none."""
    data, update_id = await redis.hmget(
        book_key(market.exchange, market.symbol), ["data", "update_id"]
    )
    if data is None or update_id is None:
        return None
    served = json.loads(data)
    book = Book(levels(served["bids"]), levels(served["asks"]))
    return BookRow("the served book", int(update_id), 0, book)


async def _last_stored(database: asyncpg.Connection, market: Market) -> int | None:
    last: int | None = await database.fetchval(
        "SELECT max(trade_id) FROM trades WHERE market_id = market($1, $2)",
        market.exchange,
        market.symbol,
    )
    return last


# Ranges ---------------------------------------------------------------------------------------


class _Ranges:
    """Ids in ranges, which may overlap, for asking whether one is among them."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self.merged: list[Range] = []
        for first, last in sorted(ranges):
            if self.merged and first <= self.merged[-1][1] + 1:
                self.merged[-1] = (self.merged[-1][0], max(self.merged[-1][1], last))
            else:
                self.merged.append((first, last))

    def __contains__(self, number: int) -> bool:
        index = bisect_right(self.merged, number, key=lambda each: each[0]) - 1
        return index >= 0 and number <= self.merged[index][1]


def _of_ids(invariant: str, where: str, what: str, ids: Sequence[int]) -> list[Violation]:
    """Name ids in one violation, or none where there are none."""
    if not ids:
        return []
    runs = [_printed(each) for each in _Ranges((number, number) for number in ids).merged]
    shown = ", ".join(runs[:10]) + (f" and {len(runs) - 10} more ranges" if runs[10:] else "")
    return [Violation(invariant, where, f"{what}: {len(ids)} ids: {shown}", len(ids))]


def _printed(ids: Range) -> str:
    first, last = ids
    return str(first) if first == last else f"{first}-{last}"


def _at(side: Sequence[tuple[object, object]], index: int) -> str:
    return " x ".join(map(str, side[index])) if index < len(side) else "nothing"
