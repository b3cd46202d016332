"""`python -m collector.replay`: the trades, candles and tickers of a recording, to Redis lists.

What the sockets did not bring can not be fetched from a recording. A missing trade is named by a
gap that is lost; its times, too, are the recording's.
"""

import asyncio
import sys
from contextlib import aclosing
from functools import partial
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from collector.ledger import TRADE
from sluice.connections import connect_redis
from sluice.exchanges.base import BadFrameError
from sluice.fitness import redis_is_fit, spool_is_fit
from sluice.lifecycle import Process, run_service
from sluice.publisher import Publisher
from sluice.queue import Holes, head_field
from sluice.recording import BadRecordingError
from sluice.records import Gap, Kline, Ticker, Trade
from sluice.replay import LOOK_SECONDS, Replay, emptied, parse_arguments

CAUSE: Final = "not in the recording"


async def run(replay: Replay, process: Process) -> None:
    """Push what the recording holds, to its end or until the process is told to stop."""
    settings, stop = process.settings, process.stop
    spool_is_fit(settings)
    redis = connect_redis(settings)
    try:
        await redis_is_fit(redis, process.health)
        publisher = Publisher(redis, settings)
        process.metrics.append(publisher.metrics)
        publisher_stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(publisher.run(publisher_stop))
            last_read = await _play(replay, publisher, redis, stop)
            await emptied(publisher, stop)
            await _name_missing(redis, publisher, last_read, stop)
            publisher_stop.set()
    finally:
        await redis.aclose()


async def _play(
    replay: Replay, publisher: Publisher, redis: Redis, stop: asyncio.Event
) -> dict[tuple[str, str], int]:
    """Push every record; gives when each market's last trade was read."""
    exchange = replay.tape.exchange
    last_read: dict[tuple[str, str], int] = {}
    async with aclosing(replay.lines(publisher, redis, stop)) as lines:
        async for line in lines:
            if line.symbol is not None:
                continue
            try:
                messages = exchange.parse(line.payload, line.ts_recv)
            except BadFrameError as error:
                publisher.put_bad_frame(line.payload, f"{exchange.name}: {error}")
                continue
            for message in messages:
                if not isinstance(message, Trade | Kline | Ticker):
                    continue
                if not replay.takes(message.symbol):
                    continue
                if isinstance(message, Trade):
                    last_read[message.exchange, message.symbol] = line.ts_recv
                publisher.put(message)
    return last_read


async def _name_missing(
    redis: Redis, publisher: Publisher, last_read: dict[tuple[str, str], int], stop: asyncio.Event
) -> None:
    """Put a gap for each hole that the push script found."""
    for (exchange, symbol), read_at in last_read.items():
        field = head_field(exchange, symbol, TRADE)
        while not stop.is_set():
            try:
                holes = await Holes(redis, field).read()
            except (RedisError, OSError):
                await asyncio.sleep(LOOK_SECONDS)
                continue
            for hole in holes:
                publisher.put(_gap(exchange, symbol, (hole.first, hole.last), read_at))
            break


def _gap(exchange: str, symbol: str, ids: tuple[int, int], read_at: int) -> Gap:
    first, last = ids
    return Gap(
        exchange=exchange,
        symbol=symbol,
        gap_id=f"{head_field(exchange, symbol, TRADE)}:{first}-{last}:replay",
        channel=TRADE,
        from_id=first,
        to_id=last,
        ts_from=None,
        ts_to=None,
        cause=CAUSE,
        status="lost",
        tries=0,
        revision=0,
        ts_opened=read_at,
        ts_closed=read_at,
    )


if __name__ == "__main__":
    try:
        replay = parse_arguments()
    except (BadRecordingError, OSError) as error:
        sys.exit(f"{error}")
    run_service("collector", partial(run, replay), port=0, needs_symbols=False)
