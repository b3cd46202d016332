"""Where each kind of record goes: its table, its COPY line, its key and its conflict rule.

A new kind is one entry of TABLES. The lines of numbers are not escaped: before a batch is written,
one pass over its bytes shows that there is nothing to escape or to misread. NULL is the empty text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from sluice.records import BookAudit, Gap, Kline, OrderbookSnapshot, Ticker, Trade

MICROS: Final = "micros"
"""A column staged as integer microseconds and stored as timestamptz."""
_NUMBERS: Final = b"0123456789.-\t\n"
_ARRAYS: Final = _NUMBERS + b"{,}"
_NO_ARRAY: Final = "?"
"""Stands where levels are no decimals; no alphabet has it."""


@dataclass(frozen=True)
class Table:
    """One table and the way into it.

    `columns` gives name and type in the order of a line. `key` orders every insert, so that two
    writers never wait for each other in a circle. `line` gives a record's line, with the market's
    id. `alphabet` is what lines are made of, but for the letters of `words`; without one
    the lines are escaped and need no look. `newest` names the column by which a later record
    replaces an earlier one; without it the first one stays. Where candles are made of the table,
    `late_after` is how old (an SQL interval) a row is that they may have been made without: where
    such rows are is written to `late_ranges` with them.
    """

    name: str
    columns: Sequence[tuple[str, str]]
    key: Sequence[str]
    line: Callable[[Any, int], str]
    alphabet: bytes | None = _NUMBERS
    words: Sequence[bytes] = ()
    newest: str | None = None
    late_after: str | None = None

    @property
    def staging(self) -> str:
        """The temporary table that COPY fills."""
        return f"staged_{self.name}"

    @cached_property
    def create_staging(self) -> str:
        """SQL that makes the temporary table of a connection."""
        columns = ", ".join(
            f"{name} {'bigint' if kind == MICROS else kind}" for name, kind in self.columns
        )
        return f"CREATE TEMP TABLE IF NOT EXISTS {self.staging} ({columns}) ON COMMIT DELETE ROWS"

    @cached_property
    def insert(self) -> str:
        """SQL that moves the staged rows into the table, in the order of the key."""
        names = ", ".join(name for name, _ in self.columns)
        values = ", ".join(
            f"'epoch'::timestamptz + {name} * interval '1 microsecond'" if kind == MICROS else name
            for name, kind in self.columns
        )
        key = ", ".join(self.key)
        if self.newest is None:
            distinct, order, action = "", key, "NOTHING"
        else:
            distinct, order = f"DISTINCT ON ({key})", f"{key}, {self.newest} DESC"
            changes = ", ".join(
                f"{name} = EXCLUDED.{name}" for name, _ in self.columns if name not in self.key
            )
            action = (
                f"UPDATE SET {changes} WHERE EXCLUDED.{self.newest} > {self.name}.{self.newest}"
            )
        # Every name is a literal of this module.
        return self._note_late + (
            f"INSERT INTO {self.name} ({names}) SELECT {distinct} {values} "  # noqa: S608
            f"FROM {self.staging} ORDER BY {order} ON CONFLICT ({key}) DO {action}"
        )

    @property
    def _note_late(self) -> str:
        """SQL before the insert that names each hour of late rows; the insert counts alone."""
        if self.late_after is None:
            return ""
        return (
            "WITH late AS (INSERT INTO late_ranges (from_time, to_time, market_ids) "  # noqa: S608  # literals
            "SELECT 'epoch'::timestamptz + min(time) * interval '1 microsecond', "
            "'epoch'::timestamptz + max(time) * interval '1 microsecond', "
            f"array_agg(DISTINCT market_id) FROM {self.staging} WHERE time < "
            f"(SELECT (extract(epoch FROM now() - interval '{self.late_after}') * 1e6)::bigint) "
            "GROUP BY time / 3600000000) "
        )

    def is_clean(self, data: bytes, rows: int) -> bool:
        """Tell whether COPY will read the text as `rows` lines, each with a field a column."""
        if self.alphabet is None:
            return True
        # A word hides no number: PostgreSQL reads none of such letters, so it refuses the row.
        rest = data.translate(None, self.alphabet)
        return (
            len(rest) == sum(len(word) * rest.count(word) for word in self.words)
            and data.count(b"\n") == rows
            and data.count(b"\t") == rows * (len(self.columns) - 1)
        )


def _trade(record: Trade, market_id: int) -> str:
    return (
        f"{market_id}\t{record.ts_event}\t{record.trade_id}\t{record.first_id}\t{record.price}\t"
        f"{record.quantity}\t{record.side}\t{record.ts_recv}\n"
    )


def _array(texts: list[str]) -> str:
    joined = ",".join(texts)
    has_only_digits = not texts or joined.replace(",", "").replace(".", "").isdigit()
    is_plain = has_only_digits and joined.count(",") == max(len(texts) - 1, 0)
    return f"{{{joined}}}" if is_plain else _NO_ARRAY


def _snapshot(record: OrderbookSnapshot, market_id: int) -> str:
    return (
        f"{market_id}\t{record.ts_grid}\t{record.update_id}\t{record.sync_id}\t{record.ts_event}\t"
        f"{record.ts_recv}\t{record.trusted_depth}\t"
        f"{_array([price for price, _ in record.bids])}\t{_array([s for _, s in record.bids])}\t"
        f"{_array([price for price, _ in record.asks])}\t{_array([s for _, s in record.asks])}\n"
    )


def _kline(record: Kline, market_id: int) -> str:
    return (
        f"{market_id}\t{record.interval}\t{record.ts_open}\t{record.ts_close}\t{record.open}\t"
        f"{record.high}\t{record.low}\t{record.close}\t{record.volume}\t{record.quote_volume}\t"
        f"{record.trade_count}\t{record.taker_buy_volume}\t{record.taker_buy_quote_volume}\t"
        f"{record.first_trade_id}\t{record.last_trade_id}\t{record.ts_recv}\n"
    )


def _or_null(value: str | int | None) -> str | int:
    return "" if value is None else value


def _ticker(record: Ticker, market_id: int) -> str:
    return (
        f"{market_id}\t{record.kind}\t{record.ts_event}\t{record.last_price}\t{record.open}\t"
        f"{record.high}\t{record.low}\t{record.volume}\t{record.quote_volume}\t"
        f"{_or_null(record.bid_price)}\t{_or_null(record.bid_size)}\t{_or_null(record.ask_price)}\t"
        f"{_or_null(record.ask_size)}\t{_or_null(record.trade_count)}\t{record.ts_recv}\n"
    )


def _escape(text: str) -> str:
    for raw, escaped in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(raw, escaped)
    return text


def _gap(record: Gap, market_id: int) -> str:
    return (
        f"{_escape(record.gap_id)}\t{market_id}\t{_escape(record.channel)}\t"
        f"{_or_null(record.from_id)}\t{_or_null(record.to_id)}\t{_or_null(record.ts_from)}\t"
        f"{_or_null(record.ts_to)}\t{_escape(record.cause)}\t{record.status}\t{record.tries}\t"
        f"{record.revision}\t{record.ts_opened}\t{_or_null(record.ts_closed)}\n"
    )


def _audit(record: BookAudit, market_id: int) -> str:
    return (
        f"{market_id}\t{record.ts_event}\t{record.update_id}\t"
        f"{record.levels_compared}\t{record.levels_different}\n"
    )


def _numeric(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "numeric") for name in names)


TABLES: Final[dict[str, Table]] = {
    "trade": Table(
        "trades",
        (
            ("market_id", "integer"),
            ("time", MICROS),
            ("trade_id", "bigint"),
            ("first_id", "bigint"),
            *_numeric("price", "quantity"),
            ("side", "text"),
            ("received_at", MICROS),
        ),
        ("market_id", "time", "trade_id"),
        _trade,
        words=(b"buy", b"sell"),
        late_after="30 minutes",  # refresh_candles() stores what is an hour old
    ),
    "orderbook_snapshot": Table(
        "orderbook_snapshots",
        (
            ("market_id", "integer"),
            ("time", MICROS),
            ("update_id", "bigint"),
            ("sync_id", "bigint"),
            ("event_time", MICROS),
            ("received_at", MICROS),
            ("trusted_depth", "integer"),
            ("bid_prices", "numeric[]"),
            ("bid_sizes", "numeric[]"),
            ("ask_prices", "numeric[]"),
            ("ask_sizes", "numeric[]"),
        ),
        ("market_id", "time"),
        _snapshot,
        alphabet=_ARRAYS,
    ),
    "kline": Table(
        "klines",
        (
            ("market_id", "integer"),
            ("interval", "text"),
            ("time", MICROS),
            ("close_time", MICROS),
            *_numeric("open", "high", "low", "close", "volume", "quote_volume"),
            ("trade_count", "bigint"),
            *_numeric("taker_buy_volume", "taker_buy_quote_volume"),
            ("first_trade_id", "bigint"),
            ("last_trade_id", "bigint"),
            ("received_at", MICROS),
        ),
        ("market_id", "interval", "time"),
        _kline,
        words=(b"s", b"m", b"h", b"d", b"w", b"M"),
    ),
    "ticker": Table(
        "tickers",
        (
            ("market_id", "integer"),
            ("kind", "text"),
            ("time", MICROS),
            *_numeric("last_price", "open", "high", "low", "volume", "quote_volume"),
            *_numeric("bid_price", "bid_size", "ask_price", "ask_size"),
            ("trade_count", "bigint"),
            ("received_at", MICROS),
        ),
        ("market_id", "kind", "time"),
        _ticker,
        words=(b"ticker", b"miniTicker"),
    ),
    "gap": Table(
        "gaps",
        (
            ("gap_id", "text"),
            ("market_id", "integer"),
            ("channel", "text"),
            ("from_id", "bigint"),
            ("to_id", "bigint"),
            ("from_time", MICROS),
            ("to_time", MICROS),
            ("cause", "text"),
            ("status", "text"),
            ("tries", "integer"),
            ("revision", "bigint"),
            ("opened_at", MICROS),
            ("closed_at", MICROS),
        ),
        ("gap_id",),
        _gap,
        alphabet=None,
        newest="revision",
    ),
    "book_audit": Table(
        "book_audits",
        (
            ("market_id", "integer"),
            ("time", MICROS),
            ("update_id", "bigint"),
            ("levels_compared", "integer"),
            ("levels_different", "integer"),
        ),
        ("market_id", "time"),
        _audit,
    ),
}
"""By the name of the record kind, and so of the queue."""
