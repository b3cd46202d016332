"""Writes a recording of the synthetic market, and the results it must give.

Everything in it follows from the seed: the same arguments write the same bytes.
"""

import gzip
import json
from pathlib import Path

from sluice.simulator import oracle, payloads
from sluice.simulator.config import SimulatorConfig
from sluice.simulator.exchange import Exchange
from sluice.simulator.synthetic import open_symbols
from sluice.simulator.tape import Levels

START = 1_790_000_000_000  # exchange time of the first line, milliseconds
SNAPSHOT_AFTER = 1_000  # milliseconds of diffs that a client would have buffered
LATENCY_US = 3_000
STREAMS = ("trade", "depth@100ms", "bookTicker")


class _Writer:
    """Takes what is published for one symbol as lines of a file."""

    is_combined = True
    is_in_microseconds = False
    buffered = 0

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.now_us = 0

    def send(self, data: bytes) -> None:
        head = 2 if data[1] < 126 else 4 if data[1] == 126 else 10  # noqa: PLR2004 - RFC 6455
        self.write(data[head:])

    def write(self, text: bytes) -> None:
        self.lines.append(b"%d %b\n" % (self.now_us + LATENCY_US, text))


def record(
    directory: Path, *, seed: int, seconds: float, symbols: tuple[str, ...], rate: float
) -> list[Path]:
    """Write `simulated_<symbol>.gz` for each symbol and `simulated.json`, the results.

    Args:
        directory: Where the files go.
        seed: Decides everything.
        seconds: Of exchange time.
        symbols: The markets.
        rate: Trades a second of all markets together.

    Returns:
        The files written.
    """
    exchange = Exchange(SimulatorConfig(seed=seed, rate=rate, symbols=symbols))
    files: list[tuple[str, Path]] = []
    for symbol in open_symbols(exchange, START):
        name = symbol.market.instrument.symbol
        writer = _Writer()
        for stream in STREAMS:
            exchange.hub.subscribe(f"{name.lower()}@{stream}", writer)
        for now in range(START, START + int(seconds * 1000) + 1, 10):
            writer.now_us = now * 1000
            symbol.play(now * 1000)
            if now == START + SNAPSHOT_AFTER:
                book = symbol.feed.tape.book
                levels = Levels(book.update_id, book.bids, book.asks)
                writer.write(payloads.snapshot(levels, 5_000))
        path = directory / f"simulated_{name.lower()}.gz"
        with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
            file.writelines(writer.lines)
        files.append((name, path))
    answer = directory / "simulated.json"
    answer.write_text(json.dumps(oracle.results(files), indent=0) + "\n")
    return [*(path for _, path in files), answer]
