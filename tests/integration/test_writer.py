"""One connection to one table, beside another one."""

import asyncio

import pytest

import flusher.writer
from flusher.tables import TABLES
from flusher.writer import Writer
from sluice import records
from sluice.settings import Settings
from tests.faults.postgres_faults import table_locked
from tests.faults.waiting import eventually
from tests.integration.flusher_rig import SYMBOL, connected, fetch, stored_ids, trade
from tests.servers import Database

MARKET = ("binance", SYMBOL)
WAITING = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'sluice-flusher'
  AND wait_event_type = 'Lock'
"""


async def test_two_writers_of_the_same_rows_never_wait_for_each_other_in_a_circle(
    postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever waits here waits for this test, which may take its time.
    for name in ("lock_timeout", "statement_timeout"):
        monkeypatch.setitem(flusher.writer._SESSION, name, "120s")  # noqa: SLF001  # to be patient
    monkeypatch.setattr(flusher.writer, "COMMAND_SECONDS", 120.0)
    settings = Settings.model_validate(
        {name.lower(): value for name, value in postgres.environment.items()}
    )
    table = TABLES["trade"]
    first, second = await Writer.open(settings, table), await Writer.open(settings, table)
    try:
        await first.learn([MARKET])
        ((market_id,),) = await fetch(postgres, "SELECT market_id FROM markets")

        def lines(*ids: int) -> bytes:
            rows = [records.decode_row("trade", trade(trade_id)) for trade_id in ids]
            return table.lines([market_id] * len(rows), rows) or b""

        async def wait_for_locks(count: int) -> None:
            async def do_wait() -> bool:
                return await fetch(postgres, WAITING) == [(count,)]

            await eventually(do_wait)

        await first.write(lines(0))  # so that the chunk is there
        async with connected(postgres) as other:
            transaction = other.transaction()
            await transaction.start()
            await other.execute(
                "INSERT INTO trades (market_id, time, trade_id, first_id, price, quantity, side,"
                " received_at) SELECT market_id, time + interval '2 ms', 2, 2, price, quantity,"
                " side, received_at FROM trades"
            )
            one = asyncio.create_task(first.write(lines(1, 2, 3)))
            await wait_for_locks(1)
            # In its own order it would hold 3 and wait for 2, and the first one the other way.
            two = asyncio.create_task(second.write(lines(3, 2, 1)))
            await wait_for_locks(2)
            await transaction.rollback()
        written = await asyncio.gather(one, two)
    finally:
        first.close()
        second.close()
    assert sorted(written) == [(0, {}), (3, {})]
    assert await stored_ids(postgres) == [0, 1, 2, 3]


async def test_a_slow_statement_is_not_taken_for_a_lost_answer(
    postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bool] = []
    look = Writer._is_at_work  # noqa: SLF001  # to count its answers

    async def counted(writer: Writer) -> bool:
        looks.append(await look(writer))
        return looks[-1]

    monkeypatch.setattr(Writer, "_is_at_work", counted)
    monkeypatch.setattr(flusher.writer, "SILENCE_SECONDS", 0.02)
    monkeypatch.setitem(flusher.writer._SESSION, "lock_timeout", "120s")  # noqa: SLF001  # to be patient
    settings = Settings.model_validate(
        {name.lower(): value for name, value in postgres.environment.items()}
    )
    table = TABLES["trade"]
    writer = await Writer.open(settings, table)
    try:
        await writer.learn([MARKET])
        ((market_id,),) = await fetch(postgres, "SELECT market_id FROM markets")
        line = table.lines([market_id], [records.decode_row("trade", trade(1))])
        assert line is not None
        looks.clear()
        async with table_locked(postgres, "trades"):
            writing = asyncio.create_task(writer.write(line))
            await eventually(lambda: len(looks) >= 3)
        assert await writing == (1, {})
        assert all(looks)
    finally:
        writer.close()
