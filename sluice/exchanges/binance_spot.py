r"""Binance spot, public market data.

Documents: the venue's "WebSocket Streams" and "Market Data endpoints" pages for spot.

Its facts: stream names are lower case, symbols in payloads upper case. Trade ids rise by one a
symbol; so do update ids, and a depth event continues the one before when `U == u + 1`. Times are
milliseconds on sockets and in answers alike (never ask for `timeUnit`: it is part of the key).
`m` says that the buyer rested, so that the aggressor sold.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Final, Literal, TypeVar

import msgspec

from sluice.exchanges.base import (
    MAX_TRACKED_ID,
    BadFrameError,
    Depth,
    DepthImage,
    Instrument,
    Message,
    Refusal,
    Reply,
    Request,
    ServerShutdown,
)
from sluice.records import Kline, Level, Ticker, Trade, is_decimal, is_positive

MICROS_PER_MS: Final = 1000
_MAX_MS: Final = (2**53 - 1) // 1000
# fmt: off
INTERVALS: Final = ("1s", "1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "6h", "8h", "12h",
                    "1d", "3d", "1w", "1M")
# fmt: on
# Letters beyond ASCII occur in symbols; what separates names in a URL or a key does not.
_SYMBOL: Final = re.compile(r"[^\W_a-z]{1,64}")


class _Wire(msgspec.Struct, gc=False):
    """What the venue sends; fields that are not named here are skipped."""


class _Trade(_Wire, tag_field="e", tag="trade"):
    """`{"e":"trade","E":1790000000105,"s":"BTCUSDT","t":6100000001,"p":"91234.10000000",
    "q":"0.00150000","T":1790000000104,"m":true,"M":true}`
    """  # noqa: D205, D415  # a payload

    s: str
    t: int
    p: str
    q: str
    T: int
    m: bool


class _Candle(_Wire):
    t: int
    T: int
    i: str
    f: int
    L: int
    o: str
    c: str
    h: str
    l: str  # noqa: E741  # the venue's name
    v: str
    n: int
    x: bool
    q: str
    V: str
    Q: str


class _Kline(_Wire, tag_field="e", tag="kline"):
    """`{"e":"kline","E":1790000002003,"s":"BTCUSDT","k":{"t":1789999980000,"T":1790000039999,
    "s":"BTCUSDT","i":"1m","f":6100000001,"L":6100000090,"o":"91230.00000000",
    "c":"91234.10000000","h":"91240.00000000","l":"91229.50000000","v":"3.20000000","n":90,
    "x":false,"q":"291940.12000000","V":"1.10000000","Q":"100355.10000000","B":"0"}}`
    """  # noqa: D205, D415  # a payload

    s: str
    k: _Candle


class _Ticker(_Wire, tag_field="e", tag="24hrTicker"):
    """`{"e":"24hrTicker","E":1790000000999,"s":"BTCUSDT","c":"91234.10000000",
    "b":"91234.10000000","B":"1.20000000","a":"91234.11000000","A":"0.80000000",
    "o":"91354.60000000","h":"92000.00000000","l":"90500.00000000","v":"15000.10000000",
    "q":"1369500000.00000000","n":10000002}` and more
    """  # noqa: D205, D415  # a payload

    E: int
    s: str
    c: str
    o: str
    h: str
    l: str  # noqa: E741  # the venue's name
    v: str
    q: str
    b: str
    B: str
    a: str
    A: str
    n: int


class _MiniTicker(_Wire, tag_field="e", tag="24hrMiniTicker"):
    """`{"e":"24hrMiniTicker","E":1790000000999,"s":"BTCUSDT","c":"91234.10000000",
    "o":"91354.60000000","h":"92000.00000000","l":"90500.00000000","v":"15000.10000000",
    "q":"1369500000.00000000"}`
    """  # noqa: D205, D415  # a payload

    E: int
    s: str
    c: str
    o: str
    h: str
    l: str  # noqa: E741  # the venue's name
    v: str
    q: str


class _Depth(_Wire, tag_field="e", tag="depthUpdate"):
    """`{"e":"depthUpdate","E":1790000000200,"s":"BTCUSDT","U":78000000101,"u":78000000123,
    "b":[["91234.10000000","1.20000000"],["91233.00000000","0.00000000"]],"a":[]}`
    """  # noqa: D205, D415  # a payload

    E: int
    s: str
    U: int
    u: int
    b: list[Level]
    a: list[Level]


class _Shutdown(_Wire, tag_field="e", tag="serverShutdown"):
    """`{"e":"serverShutdown","E":1790000000123}`"""  # noqa: D415  # a payload

    E: int


_Event = _Trade | _Kline | _Ticker | _MiniTicker | _Depth | _Shutdown


class _Wrapped(_Wire):
    """`{"stream":"btcusdt@trade","data":{}}`"""  # noqa: D415  # a payload

    stream: str
    data: msgspec.Raw


class _Error(_Wire):
    code: int = 0
    msg: str = ""


class _Bare(_Wire):
    """Anything unwrapped: an event, a reply, or an error as printed (flat) or as seen (nested).

    With `stream` it is wrapped after all, only not in the order that the venue keeps to.
    """

    stream: str | None = None
    e: str | None = None
    id: int | str | None = None
    result: object = msgspec.UNSET
    error: _Error | None = None
    code: int | None = None
    msg: str | None = None


class _RestTrade(_Wire):
    """`{"id":6100000001,"price":"91234.10000000","qty":"0.00150000","quoteQty":"136.85115000",
    "time":1790000000104,"isBuyerMaker":true,"isBestMatch":true}`
    """  # noqa: D205, D415  # a payload

    id: int
    price: str
    qty: str
    time: int
    isBuyerMaker: bool  # noqa: N815  # the venue's name


class _RestAggregate(_Wire):
    """`{"a":3900000001,"p":"91234.10000000","q":"0.00450000","f":6100000001,"l":6100000003,
    "T":1790000000104,"m":true,"M":true}`
    """  # noqa: D205, D415  # a payload

    p: str
    q: str
    f: int
    l: int  # noqa: E741  # the venue's name
    T: int
    m: bool


class _RestKline(_Wire, array_like=True):
    """`[1789999980000,"91230.00000000","91240.00000000","91229.50000000","91234.10000000",
    "3.20000000",1790000039999,"291940.12000000",90,"1.10000000","100355.10000000","0"]`
    """  # noqa: D205, D415  # a payload

    open_time: int
    open: str
    high: str
    low: str
    close: str
    volume: str
    close_time: int
    quote_volume: str
    count: int
    taker_base: str
    taker_quote: str


class _RestDepth(_Wire):
    """`{"lastUpdateId":78000000110,"bids":[["91234.10000000","1.20000000"]],"asks":[]}`"""  # noqa: D415  # a payload

    lastUpdateId: int  # noqa: N815  # the venue's name
    bids: list[Level]
    asks: list[Level]


class _RestInstrument(_Wire):
    symbol: str
    status: str


class _RestInstruments(_Wire):
    symbols: list[_RestInstrument]


class _RestTime(_Wire):
    serverTime: int  # noqa: N815  # the venue's name


_MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_wrapped = msgspec.json.Decoder(_Wrapped)
_event = msgspec.json.Decoder(_Event)
_bare = msgspec.json.Decoder(_Bare)
_KNOWN: Final = frozenset(
    ("trade", "kline", "24hrTicker", "24hrMiniTicker", "depthUpdate", "serverShutdown")
)


class BinanceSpot:
    """The adapter; `name` and the two settings let the simulator be a venue of its own."""

    id_kind: Literal["raw", "agg", "last", "seq", "opaque"] = "raw"
    continuity: Literal["contiguous", "chained", "streamed"] = "contiguous"
    symbol_pattern = _SYMBOL
    streams = re.compile(rf"trade|ticker|miniTicker|kline_(?:{'|'.join(INTERVALS)})")
    streams_per_socket = 1024
    connects_per_window = (300, 300.0)
    controls_per_second = 4.0  # of 5: each pong counts too
    socket_lifetime = 86_400.0
    weight_per_minute = 6000
    image_limits: Sequence[int] = (100, 500, 1000, 5000)
    history_page = 1000
    klines_page = 1000

    def __init__(self, name: str, ws_setting: str, rest_setting: str) -> None:
        self.name = name
        self.ws_setting = ws_setting
        self.rest_setting = rest_setting

    def channel(self, symbol: str, stream: str) -> str:
        """Name a stream of a market: lower-case symbol, `@`, stream."""
        return f"{symbol.lower()}@{stream}"

    def depth_channel(self, symbol: str) -> str:
        """Name the changes of a book, every 100 ms."""
        return f"{symbol.lower()}@depth@100ms"

    def socket_path(self, channels: Sequence[str]) -> str:
        """Give the path of a combined socket."""
        return f"/stream?streams={'/'.join(channels)}"

    def subscribe(self, channels: Sequence[str], request_id: int) -> str:
        """Write a SUBSCRIBE message."""
        return _control("SUBSCRIBE", request_id, channels)

    def unsubscribe(self, channels: Sequence[str], request_id: int) -> str:
        """Write an UNSUBSCRIBE message."""
        return _control("UNSUBSCRIBE", request_id, channels)

    def list_subscriptions(self, request_id: int) -> str:
        """Write a LIST_SUBSCRIPTIONS message."""
        return _control("LIST_SUBSCRIPTIONS", request_id)

    def parse(self, frame: bytes, ts_recv: int) -> list[Message]:
        """Read one frame, wrapped or bare; raises BadFrameError."""
        try:
            if frame.startswith(b'{"stream":'):
                return self._read_event(_wrapped.decode(frame).data, ts_recv)
            return self._read_event(frame, ts_recv)
        except _MALFORMED as error:
            raise BadFrameError(str(error)) from error

    def _read_event(self, data: bytes | msgspec.Raw, ts_recv: int) -> list[Message]:
        try:
            event = _event.decode(data)
        except msgspec.ValidationError:
            return self._read_other(data, ts_recv)
        return self._convert(event, ts_recv)

    def _convert(self, event: _Event, ts_recv: int) -> list[Message]:
        match event:
            case _Trade():
                return [
                    self._trade(
                        event.s, event.t, event.t, event.p, event.q, event.T, event.m, ts_recv
                    )
                ]
            case _Depth():
                return [self._depth(event, ts_recv)]
            case _Kline():
                return [self._kline(event, ts_recv)] if event.k.x else []
            case _Ticker() | _MiniTicker():
                return [self._ticker(event, ts_recv)]
            case _:
                return [ServerShutdown(_micros(event.E))]

    def _read_other(self, data: bytes | msgspec.Raw, ts_recv: int) -> list[Message]:
        """Read a reply, or tell an event of no interest from a malformed one."""
        if not bytes(data).lstrip().startswith(b"{"):
            raise BadFrameError("no JSON object")
        bare = _bare.decode(data)
        if bare.stream is not None and isinstance(data, bytes):
            return self._read_event(_wrapped.decode(data).data, ts_recv)
        if bare.e in _KNOWN:
            raise BadFrameError(f"a malformed {bare.e} event")
        if bare.error is not None:
            return [Reply(bare.id, error=f"{bare.error.code} {bare.error.msg}")]
        if bare.code is not None:
            return [Reply(bare.id, error=f"{bare.code} {bare.msg}")]
        if bare.result is not msgspec.UNSET:
            return [Reply(bare.id, result=bare.result)]
        return []

    def _trade(  # noqa: PLR0917  # one call a trade, on the hot path
        self,
        symbol: str,
        trade_id: int,
        first_id: int,
        price: str,
        quantity: str,
        time_ms: int,
        is_buyer_maker: bool,  # noqa: FBT001  # the venue's flag, passed on
        ts_recv: int,
    ) -> Trade:
        if not (is_positive(price) and is_positive(quantity)):
            raise BadFrameError(f"trade {trade_id}: price {price!r:.60}, quantity {quantity!r:.60}")
        if not 0 <= first_id <= trade_id <= MAX_TRACKED_ID:
            raise BadFrameError(f"trade id {trade_id}")
        return Trade(
            self.name,
            _symbol(symbol),
            trade_id,
            first_id,
            price,
            quantity,
            "sell" if is_buyer_maker else "buy",
            _micros(time_ms),
            ts_recv,
        )

    def _depth(self, event: _Depth, ts_recv: int) -> Depth:
        if not 0 <= event.U <= event.u <= MAX_TRACKED_ID:
            raise BadFrameError(f"update ids {event.U} to {event.u}")
        _check_levels(event.b)
        _check_levels(event.a)
        return Depth(
            _symbol(event.s),
            event.U,
            event.u,
            None,
            _micros(event.E),
            ts_recv,
            event.b,
            event.a,
        )

    def _kline(self, event: _Kline, ts_recv: int) -> Kline:
        candle = event.k
        return self._candle(
            event.s,
            candle.i,
            _RestKline(
                candle.t,
                candle.o,
                candle.h,
                candle.l,
                candle.c,
                candle.v,
                candle.T,
                candle.q,
                candle.n,
                candle.V,
                candle.Q,
            ),
            (candle.f, candle.L),
            ts_recv,
        )

    def _candle(
        self, symbol: str, interval: str, row: _RestKline, ids: tuple[int, int], ts_recv: int
    ) -> Kline:
        prices = (row.open, row.high, row.low, row.close)
        volumes = (row.volume, row.quote_volume, row.taker_base, row.taker_quote)
        if not (all(map(is_positive, prices)) and all(map(is_decimal, volumes))):
            raise BadFrameError(f"kline {interval} of {row.open_time}: {prices} {volumes}")
        if interval not in INTERVALS or row.count < 0 or min(ids) < -1 or max(ids) > MAX_TRACKED_ID:
            raise BadFrameError(f"kline {interval} of {row.open_time}: {row.count} trades, {ids}")
        return Kline(
            self.name,
            _symbol(symbol),
            interval,
            _micros(row.open_time),
            _micros(row.close_time),
            *prices,
            row.volume,
            row.quote_volume,
            row.count,
            row.taker_base,
            row.taker_quote,
            *ids,
            ts_recv,
        )

    def _ticker(self, event: _Ticker | _MiniTicker, ts_recv: int) -> Ticker:
        quotes: tuple[str, ...] = ()
        count = None
        if isinstance(event, _Ticker):
            quotes, count = (event.b, event.B, event.a, event.A), event.n
        texts = (event.c, event.o, event.h, event.l, event.v, event.q, *quotes)
        if not all(map(is_decimal, texts)) or not 0 <= (count or 0) <= MAX_TRACKED_ID:
            raise BadFrameError(f"ticker of {event.s!r:.60}: {texts}, {count} trades")
        bid_price, bid_size, ask_price, ask_size = quotes or (None, None, None, None)
        return Ticker(
            exchange=self.name,
            symbol=_symbol(event.s),
            kind="ticker" if quotes else "miniTicker",
            ts_event=_micros(event.E),
            last_price=event.c,
            open=event.o,
            high=event.h,
            low=event.l,
            volume=event.v,
            quote_volume=event.q,
            bid_price=bid_price,
            bid_size=bid_size,
            ask_price=ask_price,
            ask_size=ask_size,
            trade_count=count,
            ts_recv=ts_recv,
        )

    def image_request(self, symbol: str, limit: int) -> Request:
        """Ask for depth; the weight rises in steps with the limit."""
        weight = next((w for most, w in ((100, 5), (500, 25), (1000, 50)) if limit <= most), 250)
        return Request("/api/v3/depth", {"symbol": symbol, "limit": str(limit)}, weight)

    def read_image(self, symbol: str, limit: int, body: bytes) -> DepthImage:
        """Read an answer of depth; raises BadFrameError."""
        image = _read(body, _RestDepth)
        if not 0 <= image.lastUpdateId <= MAX_TRACKED_ID:
            raise BadFrameError(f"update id {image.lastUpdateId}")
        _check_levels(image.bids)
        _check_levels(image.asks)
        return DepthImage(symbol, image.lastUpdateId, image.bids, image.asks, None, limit)

    def newest_request(self, symbol: str) -> Request:
        """Ask for the newest of aggTrades, at a sixth of what the newest of trades costs."""
        return Request("/api/v3/aggTrades", {"symbol": symbol, "limit": "1"}, 4)

    def last_trade_request(self, symbol: str, limit: int = 1) -> Request:
        """Ask for the newest trades, at most 1000."""
        return Request("/api/v3/trades", {"symbol": symbol, "limit": str(limit)}, 25)

    def history_request(self, symbol: str, from_id: int, limit: int) -> Request:
        """Ask for historicalTrades, `from_id` included."""
        query = {"symbol": symbol, "fromId": str(from_id), "limit": str(limit)}
        return Request("/api/v3/historicalTrades", query, 25)

    def aggregates_request(self, symbol: str, ts_from: int, ts_to: int) -> Request:
        """Ask for aggTrades of a window, both ends included."""
        query = {
            "symbol": symbol,
            "startTime": str(ts_from // MICROS_PER_MS),
            "endTime": str(ts_to // MICROS_PER_MS),
            "limit": "1000",
        }
        return Request("/api/v3/aggTrades", query, 4)

    def read_trades(self, symbol: str, body: bytes, ts_recv: int) -> list[Trade]:
        """Read an answer of trades or historicalTrades; raises BadFrameError."""
        return [
            self._trade(
                symbol, row.id, row.id, row.price, row.qty, row.time, row.isBuyerMaker, ts_recv
            )
            for row in _read(body, list[_RestTrade])
        ]

    def read_aggregates(self, symbol: str, body: bytes, ts_recv: int) -> list[Trade]:
        """Read an answer of aggTrades; raises BadFrameError."""
        return [
            self._trade(symbol, row.l, row.f, row.p, row.q, row.T, row.m, ts_recv)
            for row in _read(body, list[_RestAggregate])
        ]

    def klines_request(self, symbol: str, interval: str, ts_from: int, ts_to: int) -> Request:
        """Ask for klines that open in a window, both ends included."""
        query = {
            "symbol": symbol,
            "interval": interval,
            "startTime": str(ts_from // MICROS_PER_MS),
            "endTime": str(ts_to // MICROS_PER_MS),
            "limit": "1000",
        }
        return Request("/api/v3/klines", query, 2)

    def read_klines(self, symbol: str, interval: str, body: bytes, ts_recv: int) -> list[Kline]:
        """Read an answer of klines; it has no trade ids. Raises BadFrameError."""
        return [
            self._candle(symbol, interval, row, (-1, -1), ts_recv)
            for row in _read(body, list[_RestKline])
        ]

    def instruments_request(self) -> Request:
        """Ask for exchangeInfo."""
        return Request("/api/v3/exchangeInfo", {}, 20)

    def read_instruments(self, body: bytes) -> list[Instrument]:
        """Read an answer of exchangeInfo; raises BadFrameError."""
        answer = _read(body, _RestInstruments)
        return [Instrument(row.symbol, row.status == "TRADING") for row in answer.symbols]

    def time_request(self) -> Request:
        """Ask for the venue's clock."""
        return Request("/api/v3/time", {}, 1)

    def read_time(self, body: bytes) -> int:
        """Read the venue's clock, microseconds; raises BadFrameError."""
        return _micros(_read(body, _RestTime).serverTime)

    def used_weight(self, headers: Mapping[str, str]) -> int | None:
        """Read `X-MBX-USED-WEIGHT-1M`."""
        value = headers.get("X-MBX-USED-WEIGHT-1M", "")
        return int(value) if value.isascii() and value.isdigit() else None

    def refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
        """Tell what a status and its `{"code":-1121,"msg":"Invalid symbol."}` mean."""
        try:
            answer = msgspec.json.decode(body, type=_Error)
        except _MALFORMED:
            answer = _Error(0, bytes(body[:120]).decode("ascii", "replace"))
        message = f"{answer.code} {answer.msg}".strip()
        kind = _REFUSALS.get(status) or ("unavailable" if status >= _SERVER_ERROR else "rejected")
        if answer.code == _INVALID_SYMBOL:
            kind = "no_such_symbol"
        elif kind == "rejected" and answer.code in _PASSING:
            kind = "unavailable"
        return Refusal(kind, message, _retry_after(headers, answer.msg))


_SERVER_ERROR: Final = 500
_INVALID_SYMBOL: Final = -1121
_PASSING: Final = frozenset({-1000, -1001, -1006, -1007, -1008, -1016})
"""Disconnected, timed out, overloaded, shutting down: the venue's trouble, and it passes."""
_Kind = Literal[
    "rate_limited", "banned", "forbidden", "no_such_symbol", "not_found", "rejected", "unavailable"
]
_REFUSALS: Final[dict[int, _Kind]] = {
    429: "rate_limited",
    418: "banned",
    401: "forbidden",
    403: "unavailable",  # the firewall's page, a passing thing
    404: "not_found",  # a host for market data only does not serve every path
    451: "unavailable",
}
_banned_until = re.compile(r"until ([0-9]{13})").search


def _retry_after(headers: Mapping[str, str], message: str) -> float | None:
    value = headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return float(value)
    until, date = _banned_until(message), headers.get("Date")
    if until is None or date is None:
        return None
    try:
        return max(0.0, int(until[1]) / 1000 - parsedate_to_datetime(date).timestamp())
    except ValueError:
        return None


def _control(method: str, request_id: int, params: Sequence[str] | None = None) -> str:
    message: dict[str, object] = {"method": method, "id": request_id}
    if params is not None:
        message["params"] = params
    return msgspec.json.encode(message).decode()


@functools.lru_cache(maxsize=4096)
def _symbol(symbol: str) -> str:
    if not _SYMBOL.fullmatch(symbol):
        raise BadFrameError(f"symbol {symbol!r:.80}")
    return symbol


def _micros(time_ms: int) -> int:
    if not 0 <= time_ms <= _MAX_MS:
        raise BadFrameError(f"time {time_ms}")
    return time_ms * MICROS_PER_MS


# The same prices come again and again, and are most of what a change of a book costs.
_is_price: Final = functools.lru_cache(maxsize=1 << 16)(is_positive)


def _check_levels(levels: list[Level]) -> None:
    for price, size in levels:
        if not (_is_price(price) and is_decimal(size)):
            raise BadFrameError(f"level {price!r:.60} {size!r:.60}")


T = TypeVar("T")


def _read(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except _MALFORMED as error:
        raise BadFrameError(str(error)) from error
