"""What a correct pipeline must hold after a recording.

Computed from the lines of the recording alone, with exact decimals, apart from the tapes and the
books of the simulator. The shape is the one of `oracles/*.json` beside the real recordings.
"""

import hashlib
import json
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

from sluice.simulator.recording import read_lines

MINUTE = 60_000


def plain(number: Decimal) -> str:
    """Print a decimal without exponent and without trailing zeros."""
    printed = f"{number:f}"
    return printed.rstrip("0").rstrip(".") if "." in printed else printed


class SymbolOracle:
    """The results of one symbol's lines."""

    def __init__(self) -> None:
        self._trades: list[tuple[int, Decimal, Decimal, int, bool]] = []
        self._sides: dict[str, dict[Decimal, Decimal]] = {}
        self._snapshot_id = 0
        self._buffered: list[dict[str, object]] = []
        self._diffs = self._applied = self._last_id = self._last_time = 0

    def take(self, stream: str, payload: bytes) -> None:
        """Read one line; an empty `stream` is the snapshot."""
        message = json.loads(payload)
        if not stream:
            self._snapshot_id = self._last_id = message["lastUpdateId"]
            self._sides = {
                side: {Decimal(price): Decimal(size) for price, size in message[side]}
                for side in ("bids", "asks")
            }
            for diff in self._buffered:
                self._apply(diff)
        elif message.get("e") == "trade":
            self._trades.append(
                (
                    message["t"],
                    Decimal(message["p"]),
                    Decimal(message["q"]),
                    message["T"],
                    message["m"],
                )
            )
        elif message.get("e") == "depthUpdate":
            self._diffs += 1
            if self._snapshot_id:
                self._apply(message)
            else:
                self._buffered.append(message)

    def result(self) -> dict[str, object]:
        """Give `{"trade": .., "book": ..}`."""
        return {"trade": self._trade_result(), "book": self._book_result()}

    def _apply(self, diff: dict[str, object]) -> None:
        first, last = diff["U"], diff["u"]
        assert isinstance(first, int)  # noqa: S101 - the exchange's own messages
        assert isinstance(last, int)  # noqa: S101 - likewise
        if last <= self._last_id:
            return
        if first > self._last_id + 1:
            raise ValueError(f"a hole before update {first}")
        for side, levels in (("bids", diff["b"]), ("asks", diff["a"])):
            assert isinstance(levels, list)  # noqa: S101 - likewise
            for price, size in levels:
                if Decimal(size):
                    self._sides[side][Decimal(price)] = Decimal(size)
                else:
                    self._sides[side].pop(Decimal(price), None)
        self._last_id = last
        self._applied += 1
        assert isinstance(diff["E"], int)  # noqa: S101 - likewise
        self._last_time = diff["E"]

    def _trade_result(self) -> dict[str, object]:
        rows = self._trades
        bars: dict[int, list[tuple[Decimal, Decimal]]] = {}
        for _, price, size, time, _ in rows:
            bars.setdefault(time // MINUTE * MINUTE, []).append((price, size))
        return {
            "count": len(rows),
            "first_id": rows[0][0],
            "last_id": rows[-1][0],
            "sum_qty": plain(sum((row[2] for row in rows), Decimal(0))),
            "sum_px_qty": plain(sum((row[1] * row[2] for row in rows), Decimal(0))),
            "buyer_is_maker": sum(row[4] for row in rows),
            "first_T": rows[0][3],
            "last_T": rows[-1][3],
            "bars_1m_MARKET_only": [
                [
                    opened,
                    plain(fills[0][0]),
                    plain(max(price for price, _ in fills)),
                    plain(min(price for price, _ in fills)),
                    plain(fills[-1][0]),
                    plain(sum((size for _, size in fills), Decimal(0))),
                    len(fills),
                ]
                for opened, fills in sorted(bars.items())
            ],
        }

    def _book_result(self) -> dict[str, object]:
        bids = sorted(self._sides["bids"].items(), reverse=True)
        asks = sorted(self._sides["asks"].items())
        digest = hashlib.sha256()
        for side, levels in (("bid", bids), ("ask", asks)):
            for price, size in levels:
                digest.update(f"{side} {plain(price)} {plain(size)}\n".encode())
        return {
            "snapshot_lastUpdateId": self._snapshot_id,
            "diffs": self._diffs,
            "applied": self._applied,
            "last_u": self._last_id,
            "last_E": self._last_time,
            "levels": [len(bids), len(asks)],
            "sha256": digest.hexdigest(),
            "top20_bids": [[plain(price), plain(size)] for price, size in bids[:20]],
            "top20_asks": [[plain(price), plain(size)] for price, size in asks[:20]],
        }


def results(files: Iterable[tuple[str, Path]]) -> dict[str, object]:
    """Compute the results of recordings, given as symbol and file, files in order of time."""
    oracles: dict[str, SymbolOracle] = {}
    for symbol, path in files:
        oracle = oracles.setdefault(symbol, SymbolOracle())
        for line in read_lines(path, symbol):
            oracle.take(line.stream, line.payload)
    return {"symbols": {symbol: oracle.result() for symbol, oracle in oracles.items()}}
