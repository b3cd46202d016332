"""cryptofeed's TradePostgres alone, for `benchmarks.flusher`: runs in an environment of its own.

Takes one JSON object on stdin: where the database is, the trades, and the writer's settings. Prints
one: seconds and CPU seconds from the first trade handed over to the last one written. cryptofeed is
AGPL-3.0 and needs Python 3.13, so nothing of it is installed with the project.
"""

import asyncio
import json
import sys
import time
from decimal import Decimal
from typing import Any

from cryptofeed.backends.postgres import TradePostgres  # type: ignore[import-not-found]
from cryptofeed.types import Trade  # type: ignore[import-not-found]

COLUMNS = {
    "exchange": "market_id",
    "timestamp": "time",
    "receipt_timestamp": "received_at",
    "side": "side",
    "price": "price",
    "amount": "quantity",
    "id": "trade_id",
}


async def write(
    database: dict[str, Any], trades: list[list[Any]], settings: dict[str, Any]
) -> None:
    """Hand all trades to the writer as a feed does, and wait until it has written them."""
    if settings.pop("exact", False):
        settings["numeric_type"] = str
    writer = TradePostgres(
        **database, table="trades", custom_columns=COLUMNS, overflow="block", **settings
    )
    ready = [
        (
            Trade(
                *(market, "BTC-USDT", side, Decimal(quantity), Decimal(price), micros / 1e6),
                id=str(trade_id),
            ),
            received / 1e6,
        )
        for market, micros, trade_id, price, quantity, side, received in trades
    ]
    async with asyncio.TaskGroup() as tasks:
        await writer.connect()
        began, cpu = time.perf_counter(), time.process_time()
        writer.start_writer(tasks, "writer")
        for trade, received in ready:
            await writer(trade, received)
        await writer.stop()
    json.dump(
        {
            "seconds": time.perf_counter() - began,
            "cpu": time.process_time() - cpu,
            "written": writer.stats.written,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    asyncio.run(write(**json.load(sys.stdin)))
