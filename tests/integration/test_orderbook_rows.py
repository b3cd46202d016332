"""What the orderbook process pushes arrives in the tables as it was meant."""

from redis.asyncio import Redis

from sluice.records import BookAudit, OrderbookSnapshot, encode
from tests.integration.flusher_rig import DAY, drained, fetch, flushing, push
from tests.servers import Database


async def test_rows_and_audits_arrive(
    redis: Redis, redis_environment: dict[str, str], postgres: Database
) -> None:
    row = OrderbookSnapshot(
        "simulator", "BTCUSDT", DAY, 7, 5, DAY - 3, DAY - 1, [("1.10", "2")], [("1.20", "3.0")], 40
    )
    audits = [BookAudit("simulator", "BTCUSDT", DAY + n, 7 + n, 2000, n) for n in range(2)]
    await push(redis, [encode(row)], "orderbook_snapshot")
    await push(redis, [encode(audit) for audit in [*audits, *audits]], "book_audit")
    async with flushing({**redis_environment, **postgres.environment}) as flusher:
        await drained(redis, "orderbook_snapshot", "book_audit")
        await flusher.stop()
    assert await fetch(
        postgres,
        "SELECT update_id, sync_id, trusted_depth, bid_prices::text, ask_sizes::text"
        " FROM orderbook_snapshots",
    ) == [(7, 5, 40, "{1.10}", "{3.0}")]
    assert await fetch(
        postgres,
        "SELECT update_id, levels_compared, levels_different FROM book_audits ORDER BY time",
    ) == [(7, 2000, 0), (8, 2000, 1)]
