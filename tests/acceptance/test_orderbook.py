"""Books that are never wrong: the whole process against an exchange that misbehaves."""

import asyncio
import os
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from redis.asyncio import Redis

from sluice.records import OrderbookSnapshot
from tests.acceptance import orderbook_rig as rig

SYMBOLS = ("BTCUSDT", "ETHUSDT")
MARKETS = {"SYMBOLS": ",".join(f"simulator:{symbol}" for symbol in SYMBOLS)}
SIMULATED = ("--symbols", ",".join(SYMBOLS), "--rate", "40")
SEEDS = range(1, int(os.environ.get("SEEDS", "2")) + 1)
DEPTH_FAULTS = {"drop": 0.04, "duplicate": 0.04, "reorder": 0.03, "truncate": 0.02, "nan": 0.02}
REST_FAULTS = {"stale_snapshot": 0.3, "rest_503": 0.1, "rest_truncated": 0.1, "rest_html": 0.05}


async def all_live(redis: Redis) -> bool:
    return all([await rig.latest(redis, symbol) is not None for symbol in SYMBOLS])


async def none_live(redis: Redis) -> bool:
    return not any([await rig.latest(redis, symbol) is not None for symbol in SYMBOLS])


async def row_counts(redis: Redis) -> dict[str, int]:
    counts = dict.fromkeys(SYMBOLS, 0)
    for row in await rig.rows(redis):
        counts[row.symbol] += 1
    return counts


async def time_to_sync(redis: Redis, simulated: rig.Exchange) -> float:
    """Break one book and give the seconds until readers have its next sync."""
    before = await rig.latest(redis, "BTCUSDT")
    began = time.monotonic()
    await simulated.post("faults", kind="drop", count=1, on="btcusdt@depth@100ms")

    async def is_back() -> bool:
        book = await rig.latest(redis, "BTCUSDT")
        return book is not None and (before is None or book["sync_id"] > before["sync_id"])

    await rig.eventually(is_back, "the next sync")
    return time.monotonic() - began


async def all_have_rows(redis: Redis) -> bool:
    return min((await row_counts(redis)).values()) > 0


@pytest.mark.parametrize("seed", SEEDS)
async def test_no_row_is_ever_wrong(
    redis: Redis, redis_environment: dict[str, str], tmp_path: Path, seed: int
) -> None:
    async with rig.exchange(tmp_path, *SIMULATED, "--seed", str(seed)) as simulated:
        rates = DEPTH_FAULTS | REST_FAULTS
        await simulated.post("rates", seed=seed, rates=rates)
        environment = rig.environment(
            simulated, redis_environment, **MARKETS, BOOK_AUDIT_SECONDS="0.5"
        )
        with rig.process("orderbook", log=tmp_path / "log", **environment) as books:

            async def enough_went_wrong() -> bool:
                counts = await simulated.counts()
                broken = counts.get("drop", 0) + counts.get("truncate", 0)
                rows = await row_counts(redis)
                return broken >= 4 and min(rows.values()) >= 15

            await rig.eventually(enough_went_wrong, "four breaks and fifteen rows a market")
            await simulated.post("quiet")
            await rig.eventually(lambda: all_live(redis), "both books live again")
            seconds = await time_to_sync(redis, simulated)
            print(f"seed {seed}: in sync again {seconds:.2f} s after a break")
            before = await row_counts(redis)

            async def goes_on() -> bool:
                now = await row_counts(redis)
                is_audited = bool(await rig.audits(redis))
                return is_audited and all(now[s] >= before[s] + 5 for s in SYMBOLS)

            await rig.eventually(goes_on, "rows of both books after the faults, and an audit")
            assert await rig.exit_code(books) == 0
        assert await none_live(redis)
        stored = await rig.rows(redis)
        assert await rig.assert_true(simulated, stored) == len(stored)
    assert_one_row_an_instant(stored)
    assert not [audit for audit in await rig.audits(redis) if audit.levels_different]
    # A break is found at that message and named: no row stands within the window missed.
    missed = [gap for gap in await rig.gaps(redis) if gap.channel == "depth"]
    assert missed
    windows = [(gap.ts_to - gap.ts_from) / 1e6 for gap in missed if gap.ts_from and gap.ts_to]
    print(
        f"seed {seed}: {len(stored)} rows, {len(windows)} windows, back in sync after "
        + ", ".join(f"{window:.1f}" for window in windows)
        + " s, with stale, late and failing images"
    )
    for gap in missed:
        assert gap.ts_from is not None
        assert gap.ts_to is not None
        assert not [
            row
            for row in stored
            if row.symbol == gap.symbol and gap.ts_from < row.ts_event < gap.ts_to
        ]


def assert_one_row_an_instant(stored: list[OrderbookSnapshot]) -> None:
    """Whoever wrote it, one instant of the grid has one book."""
    by_instant = defaultdict(list)
    for row in stored:
        by_instant[row.symbol, row.ts_grid].append((row.update_id, row.bids, row.asks))
    for (symbol, instant), books in by_instant.items():
        assert instant % 100_000 == 0
        assert all(book == books[0] for book in books), f"{symbol} at {instant}"


async def test_one_book_out_of_sync_delays_no_other(
    redis: Redis, redis_environment: dict[str, str], tmp_path: Path
) -> None:
    async with rig.exchange(tmp_path, *SIMULATED) as simulated:
        environment = rig.environment(simulated, redis_environment, **MARKETS)
        with rig.process("orderbook", log=tmp_path / "log", **environment) as books:
            await rig.eventually(lambda: all_have_rows(redis), "rows of both books")
            await simulated.post("faults", kind="rest_503", count=1_000_000, on="depth/BTCUSDT")
            await simulated.post("faults", kind="drop", count=1, on="btcusdt@depth@100ms")

            async def is_lost() -> bool:
                return await rig.latest(redis, "BTCUSDT") is None

            await rig.eventually(is_lost, "the broken book leaves Redis")
            before = await row_counts(redis)

            async def other_goes_on() -> bool:
                return (await row_counts(redis))["ETHUSDT"] >= before["ETHUSDT"] + 10

            await rig.eventually(other_goes_on, "rows of the other book")
            assert (await row_counts(redis))["BTCUSDT"] == before["BTCUSDT"]
            assert await is_lost()
            await simulated.post("quiet")
            await rig.eventually(lambda: all_live(redis), "the broken book returns")

            async def window_is_known() -> bool:
                return bool(await rig.gaps(redis))

            await rig.eventually(window_is_known, "the window of the broken book")
            assert await rig.exit_code(books) == 0
        await rig.assert_true(simulated, await rig.rows(redis))
    lost = [gap for gap in await rig.gaps(redis) if gap.channel == "depth"]
    assert [gap.symbol for gap in lost] == ["BTCUSDT"]


async def test_a_cut_socket_is_a_window_for_every_book(
    redis: Redis, redis_environment: dict[str, str], tmp_path: Path
) -> None:
    async with rig.exchange(tmp_path, *SIMULATED) as simulated:
        environment = rig.environment(simulated, redis_environment, **MARKETS)
        with rig.process("orderbook", log=tmp_path / "log", **environment) as books:
            await rig.eventually(lambda: all_have_rows(redis), "rows of both books")
            await simulated.post("faults", kind="cut", on="*@depth@100ms")

            async def windows_are_known() -> bool:
                return {gap.symbol for gap in await rig.gaps(redis)} == set(SYMBOLS)

            await rig.eventually(windows_are_known, "a window for each book")
            assert await rig.exit_code(books) == 0
        await rig.assert_true(simulated, await rig.rows(redis))
        asked = [path for _, path, _ in await simulated.get("requests") if "/depth" in path]
    assert len(asked) <= 2 * len(SYMBOLS) + 2  # one image a book and sync, and no storm


async def test_fifty_books_return_from_a_cut_without_a_storm(
    redis: Redis, redis_environment: dict[str, str], tmp_path: Path
) -> None:
    symbols = [f"COIN{number}USDT" for number in range(50)]
    async with rig.exchange(tmp_path, "--symbols", ",".join(symbols), "--rate", "150") as simulated:
        # Images of 100 levels, so that the budget has them for all at once.
        markets = {"SYMBOLS": ",".join(f"simulator:{name}" for name in symbols)}
        environment = rig.environment(simulated, redis_environment, BOOK_DEPTH="100", **markets)
        environment |= {"SNAPSHOT_INTERVAL_MS": "1000", "SNAPSHOT_DEPTH": "2", "PUBLISH_DEPTH": "2"}
        syncs = dict.fromkeys(symbols, 0)

        async def all_have_a_newer_sync() -> bool:
            books = {name: await rig.latest(redis, name) for name in symbols}
            return all(book and book["sync_id"] > syncs[name] for name, book in books.items())

        async def asked() -> Counter[str]:
            found = (re.search(r"/depth\?.*symbol=(\w+)", path) for path in await depth_requests())
            return Counter(match[1] for match in found if match)

        async def depth_requests() -> list[str]:
            return [path for _, path, _ in await simulated.get("requests")]

        with rig.process("orderbook", log=tmp_path / "log", **environment) as books:
            await rig.eventually(all_have_a_newer_sync, "all books are live")
            before = await asked()
            for name in symbols:
                book = await rig.latest(redis, name)
                syncs[name] = book["sync_id"] if book else 0
            await simulated.post("faults", kind="cut", on="*@depth@100ms")
            await rig.eventually(all_have_a_newer_sync, "all books are live again")
            after = await asked() - before
            assert await rig.exit_code(books) == 0
    # One image a book; a few came before the changes that they had to reach.
    assert set(after) == set(symbols)
    assert after.total() <= 1.5 * len(symbols)


async def test_two_processes_write_the_same_rows(
    redis: Redis, redis_environment: dict[str, str], tmp_path: Path
) -> None:
    seconds = float(os.environ.get("SIDE_BY_SIDE_SECONDS", "3"))
    async with rig.exchange(tmp_path, *SIMULATED) as simulated:
        environment = rig.environment(simulated, redis_environment, **MARKETS)
        one_log, other_log = tmp_path / "one" / "log", tmp_path / "other" / "log"
        one_log.parent.mkdir()
        other_log.parent.mkdir()
        seen: list[int] = []

        is_over = asyncio.Event()

        async def watch() -> None:
            while not is_over.is_set():
                book = await rig.latest(redis, "BTCUSDT")
                if book is not None:
                    seen.append(book["update_id"])
                await asyncio.sleep(0.01)

        with rig.process("orderbook", log=one_log, **environment) as one:
            await rig.eventually(lambda: all_live(redis), "the first process is live")
            watching = asyncio.create_task(watch())
            with rig.process("orderbook", log=other_log, **environment) as other:
                await rig.eventually(lambda: syncs(redis, 2), "rows of two syncs")
                await asyncio.sleep(seconds / 2)
                other.kill()
            with rig.process("orderbook", log=other_log, **environment) as other:
                await rig.eventually(lambda: syncs(redis, 3), "rows of three syncs")
                await asyncio.sleep(seconds / 2)
                assert await rig.exit_code(other) == 0
            assert await rig.exit_code(one) == 0
        # Not cancelled: the client may take a cancellation for a timeout, and the loop would go on.
        is_over.set()
        await watching
        stored = await rig.rows(redis)
        await rig.assert_true(simulated, stored)
    assert_one_row_an_instant(stored)
    assert len({(row.symbol, row.ts_grid) for row in stored}) < len(stored)
    assert seen == sorted(seen)


async def syncs(redis: Redis, count: int) -> bool:
    stored = await rig.rows(redis)
    return all(
        len({row.sync_id for row in stored if row.symbol == symbol}) >= count for symbol in SYMBOLS
    )
