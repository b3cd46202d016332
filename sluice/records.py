"""The records that travel on the Redis lists: one type a table, one list a type.

A record is a compact JSON array, so that `redis-cli LRANGE` stays readable. Fields are only ever
appended, with defaults: a new flusher reads old records, and an old flusher that meets a longer
record says so (`TooNewError`) and leaves it where it is.

Prices and sizes are the exchange's own decimal text. Times are integer microseconds since the
epoch: `ts_event` by the exchange's clock, `ts_recv` by ours. Ids are 64-bit integers.

Decoding checks shape, ranges and lengths. The alphabet of the texts is checked where a batch is
written, in one pass over all of it; a pattern a field would cost more than the whole decoding.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec

MAX_ID: Final = 2**63 - 1
"""The largest id a record may carry: what a PostgreSQL bigint holds."""

MAX_DECIMAL: Final = 50
"""The most characters of a price or a size; no venue sends half as many."""

DecimalText = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_DECIMAL)]
"""A plain decimal, digits and at most one point."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Id = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
OptionalId = Annotated[int, msgspec.Meta(ge=-1, le=MAX_ID)]
"""An id, or -1 where there is none."""

Micros = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
"""Microseconds since the epoch, up to the year 2255: SQL makes times of them in doubles."""

Side = Literal["buy", "sell"]
Level = tuple[DecimalText, DecimalText]
"""Price and size of one level of a book."""


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What every record begins with: which market it belongs to."""

    exchange: Name
    symbol: Name


class Trade(Record, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One trade, or one aggregate of the raw trades `first_id` to `trade_id`.

    `side` is the aggressor's. `ts_event` is the exchange's trade time in the one unit that its
    socket and its REST service share: it is part of the key. `ts_recv` is when we read it.
    """

    trade_id: Id
    first_id: Id
    price: DecimalText
    quantity: DecimalText
    side: Side
    ts_event: Micros
    ts_recv: Micros


class OrderbookSnapshot(Record, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The top of a book at one instant of the exchange-time grid.

    `ts_grid` is the instant, `ts_event` the time of the last event in the book, `ts_recv` when that
    event was read. `trusted_depth` is how many levels of each side are known to be complete.
    Levels run from the best to the worst.
    """

    ts_grid: Micros
    update_id: Id
    sync_id: Id
    ts_event: Micros
    ts_recv: Micros
    bids: list[Level]
    asks: list[Level]
    trusted_depth: Count = 0


class Kline(Record, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One closed candle as the exchange computed it; ids are -1 where it had no trade."""

    interval: Name
    ts_open: Micros
    ts_close: Micros
    open: DecimalText
    high: DecimalText
    low: DecimalText
    close: DecimalText
    volume: DecimalText
    quote_volume: DecimalText
    trade_count: Count
    taker_buy_volume: DecimalText
    taker_buy_quote_volume: DecimalText
    first_trade_id: OptionalId
    last_trade_id: OptionalId
    ts_recv: Micros


class Ticker(Record, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The 24-hour statistics of a market; a mini ticker has no quotes and no count."""

    kind: Literal["ticker", "miniTicker"]
    ts_event: Micros
    last_price: DecimalText
    open: DecimalText
    high: DecimalText
    low: DecimalText
    volume: DecimalText
    quote_volume: DecimalText
    bid_price: DecimalText | None
    bid_size: DecimalText | None
    ask_price: DecimalText | None
    ask_size: DecimalText | None
    trade_count: Count | None
    ts_recv: Micros


class Gap(Record, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is missing and why: a range of ids, or a window of time where a stream has none.

    A later record of the same `gap_id` with a higher `revision` replaces the earlier one.
    """

    gap_id: Text
    channel: Name
    from_id: Id | None
    to_id: Id | None
    ts_from: Micros | None
    ts_to: Micros | None
    cause: Text
    status: Literal["open", "filled", "absent", "lost"]
    tries: Count
    revision: Count
    ts_opened: Micros
    ts_closed: Micros | None


class BookAudit(Record, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A book compared with a newer image of the exchange's, level by level.

    `ts_event` is the time of the last event in both, `update_id` its id.
    """

    ts_event: Micros
    update_id: Id
    levels_compared: Count
    levels_different: Count


KINDS: Final[dict[str, type[Record]]] = {
    "trade": Trade,
    "orderbook_snapshot": OrderbookSnapshot,
    "kline": Kline,
    "ticker": Ticker,
    "gap": Gap,
    "book_audit": BookAudit,
}
"""Every record type under the name of its queue."""

Row = tuple[Any, ...]
"""A record as the tuple of its fields, in their order: a third cheaper to read than a Struct."""

KIND_OF: Final[dict[type[Record], str]] = {record: kind for kind, record in KINDS.items()}


class RejectedRecordError(ValueError):
    """The bytes are no valid record of their type, and never will be."""


class TooNewError(ValueError):
    """The record has more fields than this version knows: upgrade this process first."""


_encode = msgspec.json.Encoder().encode
_any = msgspec.json.Decoder(list)
_one = {kind: msgspec.json.Decoder(record) for kind, record in KINDS.items()}
_rows = {
    kind: msgspec.json.Decoder(
        list[tuple[tuple(field.type for field in msgspec.structs.fields(record))] | bool]  # type: ignore[misc]  # a type made at run time
    )
    for kind, record in KINDS.items()
}
_is_name = re.compile(r"""[^\s\x00-\x1f\x7f-\x9f'"\\]{1,64}""").fullmatch


def is_positive(text: str) -> bool:
    """Tell whether the text is a plain decimal above zero within the bounds of a record."""
    return is_decimal(text) and text.strip("0.") != ""


def is_decimal(text: str) -> bool:
    """Tell whether the text is a plain decimal of zero or more within the bounds of a record."""
    # Called for every price: three times as fast as a pattern.
    return text.replace(".", "", 1).isdigit() and text.isascii() and len(text) <= MAX_DECIMAL


def is_name(text: str) -> bool:
    """Tell whether a market may be called this: no white space, control, quote or backslash."""
    return _is_name(text) is not None


def encode(record: Record) -> bytes:
    """Give the record as a compact JSON array."""
    return _encode(record)


def decode(kind: str, item: bytes) -> Record:
    """Read one record of a kind.

    Raises:
        TooNewError: it has more fields than this version knows.
        RejectedRecordError: it is no record of this kind.
    """
    try:
        return _one[kind].decode(item)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if _is_longer(kind, item):
            known = len(KINDS[kind].__struct_fields__)
            raise TooNewError(f"a {kind} record has more than {known} fields") from error
        raise RejectedRecordError(str(error)) from error


def decode_row(kind: str, item: bytes) -> Row:
    """Read one record of a kind as a row. Raises as `decode` does."""
    return msgspec.structs.astuple(decode(kind, item))


def decode_rows(kind: str, items: Sequence[bytes]) -> list[Row] | None:
    """Read a batch in one pass, or give None where any of it has to be looked at singly."""
    # No field is a boolean and no text has a newline, so no record can reach over the fence
    # between two items: halves do not become one that makes up for two in another item.
    try:
        fenced = _rows[kind].decode(b"[" + b",\nfalse,".join(items) + b"]")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    rows: list[Row] = fenced[::2]
    is_fenced = len(fenced) == 2 * len(items) - 1 and set(map(type, rows)) == {tuple}
    return rows if is_fenced else None


def _is_longer(kind: str, item: bytes) -> bool:
    """Tell whether the item is a record of this kind with more after it, not merely a long list."""
    known = len(KINDS[kind].__struct_fields__)
    try:
        fields = _any.decode(item)
        msgspec.convert(fields[:known], KINDS[kind])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return len(fields) > known
