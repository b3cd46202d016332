"""Where each kind of record goes: its table, its columns, its key and its conflict rule.

A new kind is one entry of TABLES. Lines of numbers are written by the JSON encoder, whose marks
become tabs in one pass over the bytes of a batch; another pass shows before that there is nothing
to escape or to misread.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Final

import msgspec

from sluice.records import Row

MICROS: Final = "micros"
"""A column staged as integer microseconds and stored as timestamptz."""
_NUMBERS: Final = b'0123456789.-"'
_ARRAYS: Final = _NUMBERS + b"{};"
_NULL: Final = b"null"
_NO_ARRAY: Final = "?"
"""Stands where levels are no decimals; no alphabet has it."""
_MARKS: Final = b'[]"'
_TO_COPY: Final = bytes.maketrans(b",;", b"\t,")

_encode_lines: Final = msgspec.json.Encoder().encode_lines
_after_the_name: Final = itemgetter(slice(2, None))


@dataclass(frozen=True)
class Table:
    """One table and the way into it.

    `columns` gives name and type of what follows the market's id, in the order of the record's
    fields; where they are no column each, `values` spreads them. `key` orders every insert, so that
    two writers never wait for each other in a circle. `alphabet` is what fields are made of, but
    for `words`; without one they are escaped and need no look. `newest` names the column by which a
    later record replaces an earlier one; without it the first one stays. Where candles are made of
    the table, `late_after` is how old (an SQL interval) a row is that they may have been made
    without: where such rows are is written to `late_ranges` with them.
    """

    name: str
    columns: Sequence[tuple[str, str]]
    key: Sequence[str]
    values: Callable[[Row], Row] = _after_the_name
    alphabet: bytes | None = _NUMBERS
    words: Sequence[bytes] = ()
    newest: str | None = None
    late_after: str | None = None

    @property
    def staging(self) -> str:
        """The temporary table that COPY fills."""
        return f"staged_{self.name}"

    @cached_property
    def column_names(self) -> Sequence[str]:
        """The columns in the order of a line."""
        return ("market_id", *(name for name, _ in self.columns))

    @property
    def null(self) -> str:
        """What stands for NULL in a line."""
        return "\\N" if self.alphabet is None else _NULL.decode()

    @cached_property
    def _shape(self) -> bytes:
        """What is left of a line without its fields, before its marks become tabs."""
        return b"[,[" + b"," * (len(self.columns) - 1) + b"]]\n"

    @cached_property
    def create_staging(self) -> str:
        """SQL that makes the temporary table of a connection."""
        columns = ", ".join(
            f"{name} {'bigint' if kind == MICROS else kind}" for name, kind in self.columns
        )
        return (
            f"CREATE TEMP TABLE IF NOT EXISTS {self.staging} (market_id integer, {columns}) "
            "ON COMMIT DELETE ROWS"
        )

    @cached_property
    def insert(self) -> str:
        """SQL that moves the staged rows into the table, in the order of the key."""
        names = ", ".join(self.column_names)
        values = ", ".join(
            f"'epoch'::timestamptz + {name} * interval '1 microsecond'" if kind == MICROS else name
            for name, kind in (("market_id", "integer"), *self.columns)
        )
        key = ", ".join(self.key)
        if self.newest is None:
            distinct, order, action = "", key, "NOTHING"
        else:
            distinct, order = f"DISTINCT ON ({key})", f"{key}, {self.newest} DESC"
            changes = ", ".join(
                f"{name} = EXCLUDED.{name}" for name in self.column_names if name not in self.key
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

    def lines(self, market_ids: Sequence[int], rows: Sequence[Row]) -> bytes | None:
        """Give COPY's text, a line a row, or None where it would read any as something else."""
        numbered = list(zip(market_ids, map(self.values, rows), strict=True))
        if self.alphabet is None:
            return _escaped_lines(numbered)
        text = _encode_lines(numbered)  # [7,[1,"2.5",null]] and a newline
        shape = text.translate(None, self.alphabet)
        for word in self.words:
            # It hides no number: PostgreSQL reads none of such letters, so it refuses the row.
            shape = shape.replace(word, b"")
        is_clean = shape == self._shape * len(rows) and not (
            _NULL in self.words and b'"null"' in text
        )
        return text.translate(_TO_COPY, _MARKS) if is_clean else None


def _escaped_lines(numbered: Iterable[tuple[int, Row]]) -> bytes:
    return "".join(
        "\t".join(map(_escaped, (market_id, *values))) + "\n" for market_id, values in numbered
    ).encode()


def _escaped(value: str | int | None) -> str:
    if value is None:
        return "\\N"
    text = str(value)
    for raw, escaped in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(raw, escaped)
    return text


def _snapshot(row: Row) -> Row:
    _, _, *moments, bids, asks, trusted_depth = row
    return (*moments, *_arrays(bids), *_arrays(asks), trusted_depth)


def _arrays(levels: Sequence[tuple[str, str]]) -> tuple[str, str]:
    if not levels:
        return "{}", "{}"
    prices, sizes = zip(*levels, strict=True)
    return _array(prices), _array(sizes)


def _array(texts: Sequence[str]) -> str:
    joined = ";".join(texts)
    has_only_digits = joined.replace(";", "").replace(".", "").isdigit()
    is_plain = has_only_digits and joined.count(";") == len(texts) - 1
    return f"{{{joined}}}" if is_plain else _NO_ARRAY


def _numeric(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "numeric") for name in names)


TABLES: Final[dict[str, Table]] = {
    "trade": Table(
        "trades",
        (
            ("trade_id", "bigint"),
            ("first_id", "bigint"),
            *_numeric("price", "quantity"),
            ("side", "text"),
            ("time", MICROS),
            ("received_at", MICROS),
        ),
        key=("market_id", "time", "trade_id"),
        words=(b"buy", b"sell"),
        late_after="30 minutes",  # refresh_candles() stores what is an hour old
    ),
    "orderbook_snapshot": Table(
        "orderbook_snapshots",
        (
            ("time", MICROS),
            ("update_id", "bigint"),
            ("sync_id", "bigint"),
            ("event_time", MICROS),
            ("received_at", MICROS),
            ("bid_prices", "numeric[]"),
            ("bid_sizes", "numeric[]"),
            ("ask_prices", "numeric[]"),
            ("ask_sizes", "numeric[]"),
            ("trusted_depth", "integer"),
        ),
        key=("market_id", "time"),
        values=_snapshot,
        alphabet=_ARRAYS,
    ),
    "kline": Table(
        "klines",
        (
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
        key=("market_id", "interval", "time"),
        words=(b"s", b"m", b"h", b"d", b"w", b"M"),
    ),
    "ticker": Table(
        "tickers",
        (
            ("kind", "text"),
            ("time", MICROS),
            *_numeric("last_price", "open", "high", "low", "volume", "quote_volume"),
            *_numeric("bid_price", "bid_size", "ask_price", "ask_size"),
            ("trade_count", "bigint"),
            ("received_at", MICROS),
        ),
        key=("market_id", "kind", "time"),
        words=(b"ticker", b"miniTicker", _NULL),
    ),
    "gap": Table(
        "gaps",
        (
            ("gap_id", "text"),
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
        key=("gap_id",),
        alphabet=None,
        newest="revision",
    ),
    "book_audit": Table(
        "book_audits",
        (
            ("time", MICROS),
            ("update_id", "bigint"),
            ("levels_compared", "integer"),
            ("levels_different", "integer"),
        ),
        key=("market_id", "time"),
    ),
}
"""By the name of the record kind, and so of the queue."""
