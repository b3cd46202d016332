"""What a venue is: facts and pure functions, no I/O.

An adapter never waits and never loops. It says how to ask (paths, messages), how to read
(frames and answers into records), and how ids continue. Whoever holds the socket does the rest.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal, Protocol

import msgspec

from sluice.records import Kline, Level, Ticker, Trade

MAX_TRACKED_ID: Final = 2**53 - 1
"""The highest id that a double tells from its neighbours; adapters refuse what is above it."""


class Depth(msgspec.Struct, frozen=True):
    """One change of a book: absolute sizes by price, zero deletes; ids as the venue counts them.

    `previous_update_id` is the last id of the change before, at venues that name it.
    """

    symbol: str
    first_update_id: int
    last_update_id: int
    previous_update_id: int | None
    ts_event: int
    ts_recv: int
    bids: list[Level]
    asks: list[Level]


class DepthImage(msgspec.Struct, frozen=True):
    """A whole book at one update id, or its best `limit` levels a side."""

    symbol: str
    update_id: int
    bids: list[Level]
    asks: list[Level]
    ts_event: int | None
    limit: int


class Reply(msgspec.Struct, frozen=True):
    """The venue's answer to a control message: `error` is None where it agreed."""

    request_id: int | str | None
    result: object = None
    error: str | None = None


class ServerShutdown(msgspec.Struct, frozen=True):
    """The venue is about to close this socket: open another first."""

    ts_event: int


Message = Trade | Kline | Ticker | Depth | Reply | ServerShutdown
"""What a frame can hold."""


class Request(msgspec.Struct, frozen=True):
    """One GET: path, query, and what it costs of the venue's rate budget."""

    path: str
    query: dict[str, str]
    weight: int


class Instrument(msgspec.Struct, frozen=True):
    """One market a venue lists; `is_trading` is false while it is halted."""

    symbol: str
    is_trading: bool


class Refusal(msgspec.Struct, frozen=True):
    """Why the venue did not answer a request, and how long to stay away (seconds)."""

    kind: Literal[
        "rate_limited",
        "banned",
        "forbidden",
        "no_such_symbol",
        "not_found",
        "rejected",
        "unavailable",
    ]
    message: str
    retry_after: float | None = None


class BadFrameError(ValueError):
    """A frame or an answer that is not what the venue documents."""


class Exchange(Protocol):
    """The table of facts and pure functions that each venue's module fills in."""

    name: str
    """As in `markets.exchange`."""
    id_kind: Literal["raw", "agg", "last", "seq", "opaque"]
    continuity: Literal["contiguous", "chained", "streamed"]
    """How its book changes continue one another, see `orderbook.synchronizer`."""
    ws_setting: str
    """The setting that holds the base of its socket addresses."""
    rest_setting: str
    symbol_pattern: re.Pattern[str]
    """What its symbols look like; matched whole."""
    streams: re.Pattern[str]
    """The names that STREAMS accepts for it; matched whole."""
    streams_per_socket: int
    connects_per_window: tuple[int, float]
    """How many sockets may be opened in how many seconds."""
    controls_per_second: float
    """How many messages we may send on one socket a second."""
    socket_lifetime: float
    """After how many seconds the venue cuts a socket."""
    weight_per_minute: int
    """The rate budget of its REST service, all processes of one address together."""
    image_limits: Sequence[int]
    """The depths that a book image can be asked for, ascending."""
    history_page: int
    """The most trades one page of history holds."""
    klines_page: int
    """The most candles one page holds."""

    def channel(self, symbol: str, stream: str) -> str:
        """Name a stream of a market as the venue does: ('BTCUSDT', 'trade') is 'btcusdt@trade'."""

    def depth_channel(self, symbol: str) -> str:
        """Name the stream of a market's book changes."""

    def socket_path(self, channels: Sequence[str]) -> str:
        """Give path and query of a socket that carries these channels from the start."""

    def subscribe(self, channels: Sequence[str], request_id: int) -> str:
        """Write the message that adds channels to an open socket."""

    def unsubscribe(self, channels: Sequence[str], request_id: int) -> str:
        """Write the message that takes channels off an open socket."""

    def list_subscriptions(self, request_id: int) -> str:
        """Write a message that a live peer answers, whatever the markets do."""

    def parse(self, frame: bytes, ts_recv: int) -> list[Message]:
        """Read one frame; an open candle and a message of no interest give an empty list.

        Raises:
            BadFrameError: the frame is not what the venue documents.
        """

    def image_request(self, symbol: str, limit: int) -> Request:
        """Ask for a book image of `limit` levels a side."""

    def read_image(self, symbol: str, limit: int, body: bytes) -> DepthImage:
        """Read a book image; raises BadFrameError."""

    def newest_request(self, symbol: str) -> Request:
        """Ask for the newest aggregate, the cheapest way to the newest id."""

    def last_trade_request(self, symbol: str, limit: int = 1) -> Request:
        """Ask for the newest trade, or the newest `limit` trades."""

    def history_request(self, symbol: str, from_id: int, limit: int) -> Request:
        """Ask for trades from an id on, the id included."""

    def aggregates_request(self, symbol: str, ts_from: int, ts_to: int) -> Request:
        """Ask for aggregate trades of a window (microseconds), for ids no longer served raw."""

    def read_trades(self, symbol: str, body: bytes, ts_recv: int) -> list[Trade]:
        """Read a page of trades, ascending; raises BadFrameError."""

    def read_aggregates(self, symbol: str, body: bytes, ts_recv: int) -> list[Trade]:
        """Read a page of aggregates, `trade_id` the last raw id and `first_id` the first."""

    def klines_request(self, symbol: str, interval: str, ts_from: int, ts_to: int) -> Request:
        """Ask for the candles that open in a window (microseconds)."""

    def read_klines(self, symbol: str, interval: str, body: bytes, ts_recv: int) -> list[Kline]:
        """Read a page of candles, ascending; raises BadFrameError."""

    def instruments_request(self) -> Request:
        """Ask which markets exist, and for the venue's rate limits."""

    def read_instruments(self, body: bytes) -> list[Instrument]:
        """Read the list of markets; raises BadFrameError."""

    def time_request(self) -> Request:
        """Ask for the venue's clock."""

    def read_time(self, body: bytes) -> int:
        """Read the venue's clock, microseconds; raises BadFrameError."""

    def used_weight(self, headers: Mapping[str, str]) -> int | None:
        """Give what this address has used of its budget this minute, where an answer says so."""

    def refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
        """Say what an answer other than 200 means."""
