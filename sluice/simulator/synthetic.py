"""The synthetic source: seeded markets in real time."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

from sluice.simulator.exchange import Exchange
from sluice.simulator.feed import Feed
from sluice.simulator.market import Instrument, Market, instrument
from sluice.simulator.tape import Trade

TICK = 0.01  # seconds between two turns: what happened in one is sent together
MAX_BACKLOG_US = 500_000  # played in one turn, so that sockets are served in between
SKIP_US = 5_000_000  # a source that fell further behind than this lets the time pass
RESERVED_IDS = 100_000


class SyntheticSymbol:
    """One market, and the ids it hands out."""

    def __init__(self, market: Market, feed: Feed, now: int) -> None:
        self.market = market
        self.feed = feed
        facts = market.instrument
        self.trade_id = facts.first_trade_id - 1
        self.update_id = facts.first_update_id
        feed.tape.book.load(self.update_id, market.levels())
        feed.start(now)
        market.start(now * 1000)

    def play(self, until_us: int) -> None:
        """Let everything up to `until_us` (microseconds) happen and be sent."""
        feed = self.feed
        while feed.next_edge * 1000 <= until_us:
            edge = feed.next_edge
            self._advance(edge * 1000)
            feed.advance(edge)
        self._advance(until_us)
        feed.settle()

    def _advance(self, until_us: int) -> None:
        feed = self.feed
        for step in self.market.advance(until_us):
            time = step.time_us // 1000 + feed.skew
            for price, quantity in step.fills:
                self.trade_id += 1
                feed.trade(
                    Trade(self.trade_id, price, quantity, time, step.buyer_is_maker), step.order_id
                )
            for change in step.changes:
                self.update_id += 1
                feed.change((self.update_id, self.update_id), [change])
            feed.quote()


def open_symbols(exchange: Exchange, now: int) -> list[SyntheticSymbol]:
    """Open the configured markets at `now` (milliseconds)."""
    config = exchange.config
    kept = _read_state(config.state)
    listed: list[Instrument] = []
    for symbol in config.symbols:
        facts = instrument(symbol)
        if symbol in kept:
            facts = replace(
                facts, first_trade_id=kept[symbol][0] + 1, first_update_id=kept[symbol][1] + 1
            )
        listed.append(facts)
    total = sum(facts.weight for facts in listed)
    return [
        SyntheticSymbol(
            Market(facts, config.seed, exchange.rate * facts.weight / total),
            exchange.list_symbol(facts),
            now,
        )
        for facts in listed
    ]


class SyntheticSource:
    """Plays the markets against the wall clock."""

    def __init__(self, exchange: Exchange) -> None:
        self.state = "waiting"
        self._exchange = exchange
        self._symbols = open_symbols(exchange, exchange.true_now())
        self._set_rates(exchange.rate)

    async def run(self) -> None:
        """Play until cancelled."""
        exchange = self._exchange
        await exchange.ready()
        played = self._restart()
        saved = 0
        while True:
            await asyncio.sleep(TICK)
            if not exchange.is_running.is_set():
                self.state = "stopped"
                await exchange.is_running.wait()
                played = self._restart()
            self.state = "playing"
            now = exchange.true_now() * 1000
            if not played <= now <= played + SKIP_US:
                played = self._restart()
            played = min(now, played + MAX_BACKLOG_US)
            for symbol in self._symbols:
                symbol.play(played)
            if played - saved > 1_000_000:  # noqa: PLR2004 - once a second
                saved = played
                self.save(reserved=RESERVED_IDS)

    def set_rate(self, rate: float) -> None:
        """Change how many trades a second all markets make together."""
        self._exchange.rate = rate
        self._set_rates(rate)

    def save(self, reserved: int = 0) -> None:
        """Keep the ids; `reserved` more than given out, lest a killed simulator repeats some."""
        path = self._exchange.config.state
        if path is None:
            return
        ids = {
            symbol.market.instrument.symbol: (
                symbol.trade_id + reserved,
                symbol.update_id + reserved,
            )
            for symbol in self._symbols
        }
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(ids))
        part.replace(path)

    def _set_rates(self, rate: float) -> None:
        total = sum(symbol.market.instrument.weight for symbol in self._symbols)
        for symbol in self._symbols:
            symbol.market.rate = rate * symbol.market.instrument.weight / total

    def _restart(self) -> int:
        now = self._exchange.true_now()
        for symbol in self._symbols:
            symbol.market.start(now * 1000)
            symbol.feed.start(now)
        return now * 1000


def _read_state(path: Path | None) -> dict[str, tuple[int, int]]:
    if path is None or not path.exists():
        return {}
    return {symbol: (int(t), int(u)) for symbol, (t, u) in json.loads(path.read_text()).items()}
