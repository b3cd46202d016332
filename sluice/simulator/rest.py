"""REST as the exchange answers it: rows, windows of time, weights, refusals, error bodies."""

import asyncio
import json
from bisect import bisect_left, bisect_right
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import islice

from aiohttp import web

from sluice.simulator import payloads
from sluice.simulator.bars import INTERVALS, MINUTE, next_open
from sluice.simulator.exchange import Exchange, Request
from sluice.simulator.faults import REST, Order
from sluice.simulator.fixed import text
from sluice.simulator.limits import TOO_MUCH, WeightLimiter
from sluice.simulator.market import Instrument
from sluice.simulator.tape import AggTrade, Levels, Tape, Trade

DEFAULT_ROWS = 500
MAX_ROWS = 1_000
DEFAULT_LEVELS = 100
MAX_LEVELS = 5_000
_DEPTH_WEIGHTS = ((100, 5), (500, 25), (1_000, 50), (MAX_LEVELS, 250))
_ALL = 1 << 30
_TICKER_WEIGHTS = ((20, 2), (100, 40), (_ALL, 80))
_HTML = "<html><head><title>403 Forbidden</title></head><body>Request blocked.</body></html>"
_TIME_KEYS = frozenset({"time", "T", "serverTime", "openTime", "closeTime"})
_KLINE_FIELDS = 12
_MAX_MILLISECONDS = 10**14
_ANSWERS = {  # faults that are a whole answer: status, content type, body
    "rest_403": (403, "text/html", _HTML),
    "rest_451": (
        451,
        "application/json",
        '{"code":0,"msg":"Service unavailable from a restricted location"}',
    ),
    "rest_500": (
        500,
        "application/json",
        '{"code":-1000,"msg":"An unknown error occurred while processing the request."}',
    ),
    "rest_502": (502, "text/html", "<html><body>502 Bad Gateway</body></html>"),
    "rest_503": (
        503,
        "application/json",
        '{"code":-1008,"msg":"Server is currently overloaded with other requests."}',
    ),
    "rest_504": (
        504,
        "application/json",
        '{"code":-1007,"msg":"Timeout waiting for response from backend server."}',
    ),
    "rest_html": (200, "text/html", _HTML),
    "rest_empty": (200, "application/json", ""),
}


class BadRequestError(Exception):
    """A request that the exchange answers with HTTP 400 and a code of its own."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Rest:
    """The endpoints under `/api/v3`."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.limiters: dict[str, WeightLimiter] = {}

    def routes(self) -> list[web.RouteDef]:
        """List the endpoints."""
        endpoints: dict[str, Callable[[web.Request], tuple[int, object]]] = {
            "ping": lambda _: (1, {}),
            "time": lambda _: (1, {"serverTime": self._exchange.now()}),
            "exchangeInfo": self._exchange_info,
            "depth": self._depth,
            "trades": self._trades,
            "historicalTrades": self._historical_trades,
            "aggTrades": self._agg_trades,
            "klines": self._klines,
            "uiKlines": self._klines,
            "avgPrice": self._avg_price,
            "ticker/24hr": self._ticker,
            "ticker/price": self._price,
            "ticker/bookTicker": self._book_ticker,
        }
        return [
            web.get(f"/api/v3/{name}", self._handler(name, answer))
            for name, answer in endpoints.items()
        ]

    def _handler(
        self, name: str, answer: Callable[[web.Request], tuple[int, object]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            response = await self._respond(name, answer, request)
            self._exchange.requests.append(
                Request(self._exchange.now(), request.path_qs, response.status)
            )
            self._exchange.log(
                "rest",
                path=request.path_qs,
                status=response.status,
                weight=response.headers.get("X-MBX-USED-WEIGHT-1M"),
            )
            return response

        return handle

    async def _respond(
        self,
        name: str,
        answer: Callable[[web.Request], tuple[int, object]],
        request: web.Request,
    ) -> web.StreamResponse:
        limiter = self.limiters.setdefault(
            request.remote or "", WeightLimiter(self._exchange.config)
        )
        target = f"{name}/{request.query.get('symbol', '')}"
        fitting = self._fitting(name, request.query.get("symbol", ""))
        order = self._exchange.faults.draw(fitting, target)
        if order and (response := await self._injure(order, target, limiter, request)):
            return response
        weight, status, body = 1, 200, None
        try:
            weight, body = answer(request)
        except BadRequestError as error:
            status, body = 400, {"code": error.code, "msg": str(error)}
        if refusal := limiter.take(weight):
            return self._print(
                limiter,
                {"code": -1003, "msg": refusal.message},
                refusal.status,
                {"Retry-After": str(refusal.retry_after)},
            )
        if order and status == 200:  # noqa: PLR2004 - HTTP OK
            body = self._falsify(order, target, body, request)
        if name == "depth" and status == 200:  # noqa: PLR2004 - HTTP OK
            self._exchange.snapshot_asked[request.query["symbol"]].set()
        if request.headers.get("X-MBX-TIME-UNIT", "").upper() == "MICROSECOND":
            body = _in_microseconds(body)
        return self._print(limiter, body, status)

    @staticmethod
    def _print(
        limiter: WeightLimiter,
        body: object,
        status: int = 200,
        headers: dict[str, str] | None = None,
    ) -> web.Response:
        return web.Response(
            body=_encode(body),
            status=status,
            content_type="application/json",
            headers={"X-MBX-USED-WEIGHT-1M": str(limiter.used), **(headers or {})},
        )

    # -- faults

    async def _injure(
        self, order: Order, target: str, limiter: WeightLimiter, request: web.Request
    ) -> web.StreamResponse | None:
        """Answer with the fault; None where the fault is in the body of a good answer."""
        record = self._exchange.faults.record
        match order.kind:
            case "rest_429" | "rest_418":
                return self._refuse(order, target, limiter)
            case "rest_cut":
                record(order.kind, target=target)
                if request.transport is not None:
                    request.transport.abort()
                return web.Response()
            case "rest_stall":
                seconds = order.number("seconds", 10.0)
                record(order.kind, target=target, seconds=seconds)
                await asyncio.sleep(seconds)
            case kind if kind in _ANSWERS:
                record(kind, target=target)
                status, content_type, body = _ANSWERS[kind]
                return web.Response(text=body, status=status, content_type=content_type)
        return None

    def _refuse(self, order: Order, target: str, limiter: WeightLimiter) -> web.Response:
        seconds = int(order.number("seconds", 2))
        self._exchange.faults.record(order.kind, target=target, retry_after=seconds)
        status, message = 429, TOO_MUCH.format(limit=self._exchange.config.max_weight)
        if order.kind == "rest_418":
            status, message = 418, limiter.ban(seconds).message
        body = {"code": -1003, "msg": message}
        return self._print(limiter, body, status, {"Retry-After": str(seconds)})

    def _fitting(self, name: str, symbol: str) -> frozenset[str]:
        """List the faults that this request can have."""
        kinds = set(REST)
        if name != "historicalTrades":
            kinds -= {"endless_page"}
        if name not in {"trades", "historicalTrades", "aggTrades", "klines"}:
            kinds -= {"empty_page"}
        feed = self._exchange.feeds.get(symbol)
        if (
            name != "depth"
            or feed is None
            or not feed.is_older_than_heard(feed.tape.book.oldest.update_id)
        ):
            kinds -= {"stale_snapshot"}
        return frozenset(kinds)

    def _falsify(self, order: Order, target: str, body: object, request: web.Request) -> object:
        """Put the fault into a good answer's body."""
        symbol = target.partition("/")[2]
        match order.kind:
            case "rest_truncated":
                whole = _encode(body)
                body = whole[: len(whole) // 2]
            case "empty_page":
                body = []
            case "endless_page":  # always rows, and never a step further
                from_id = _number(request, "fromId", 0)
                known = self._exchange.tapes[symbol].trades.before(from_id, _limit(request))
                body = [payloads.trade_row(trade) for trade in known]
            case "stale_snapshot":
                body = payloads.snapshot(self._exchange.tapes[symbol].book.oldest, MAX_LEVELS)
            case _:
                return body  # a stall: late, and right
        self._exchange.faults.record(order.kind, target=target)
        return body

    # -- endpoints: each gives its weight and its body

    def _exchange_info(self, request: web.Request) -> tuple[int, object]:
        exchange = self._exchange
        chosen = self._chosen(request)
        return 20, {
            "timezone": "UTC",
            "serverTime": exchange.now(),
            "rateLimits": [
                {
                    "rateLimitType": "REQUEST_WEIGHT",
                    "interval": "MINUTE",
                    "intervalNum": 1,
                    "limit": exchange.config.max_weight,
                },
                {
                    "rateLimitType": "RAW_REQUESTS",
                    "interval": "MINUTE",
                    "intervalNum": 5,
                    "limit": 300_000,
                },
            ],
            "exchangeFilters": [],
            "symbols": [_symbol_info(exchange.instruments[symbol]) for symbol in chosen],
        }

    def _depth(self, request: web.Request) -> tuple[int, object]:
        tape = self._tape(request)
        limit = min(_number(request, "limit", DEFAULT_LEVELS), MAX_LEVELS)
        weight = next(weight for most, weight in _DEPTH_WEIGHTS if limit <= most)
        book = tape.book
        return weight, payloads.snapshot(Levels(book.update_id, book.bids, book.asks), limit)

    def _trades(self, request: web.Request) -> tuple[int, object]:
        tape = self._tape(request)
        return 25, self._newest(tape, _limit(request))

    def _historical_trades(self, request: web.Request) -> tuple[int, object]:
        tape = self._tape(request)
        limit = _limit(request)
        from_id = _number(request, "fromId", -1)
        if from_id < 0:
            return 25, self._newest(tape, limit)
        retired = self._exchange.retired.get(tape.symbol, ())
        served = self._shown(tape, tape.trades.since(from_id))
        shown = islice((trade for trade in served if trade.id not in retired), limit)
        return 25, [payloads.trade_row(trade) for trade in shown]

    def _newest(self, tape: Tape, limit: int) -> list[dict[str, object]]:
        return [payloads.trade_row(row) for row in self._shown(tape, tape.trades.newest(limit))]

    def _shown(self, tape: Tape, trades: Iterable[Trade]) -> Iterator[Trade]:
        hidden = self._exchange.hidden.get(tape.symbol, ())
        return (trade for trade in trades if trade.id not in hidden)

    def _agg_trades(self, request: web.Request) -> tuple[int, object]:
        tape = self._tape(request)
        limit = _limit(request)
        from_id = _number(request, "fromId", -1)
        start, end = _window(request)
        if from_id >= 0 and (start is not None or end is not None):
            raise BadRequestError(-1128, "Combination of optional parameters invalid.")
        rows = tape.aggs
        if from_id >= 0:
            first = bisect_left(rows, from_id, key=lambda row: row.id)
            picked = rows[first : first + limit]
        elif start is not None:
            first = bisect_left(rows, start, key=lambda row: row.time)
            picked = [row for row in rows[first : first + limit] if end is None or row.time <= end]
        else:
            last = len(rows) if end is None else bisect_right(rows, end, key=lambda row: row.time)
            picked = rows[max(0, last - limit) : last]
        hidden: set[int] = self._exchange.hidden.get(tape.symbol, set())
        return 4, _agg_rows(
            row for row in picked if hidden.isdisjoint(range(row.first_id, row.last_id + 1))
        )

    def _klines(self, request: web.Request) -> tuple[int, object]:
        tape = self._tape(request)
        interval = request.query.get("interval", "")
        if interval not in INTERVALS:
            raise BadRequestError(-1120, "Invalid interval.")
        offset = _zone(request.query.get("timeZone", "0"))
        start, end = _window(request)
        series = tape.series(interval, offset)
        bars = series.between(start, end, _limit(request), self._exchange.now())
        return 2, [payloads.kline_row(bar, next_open(interval, bar.opened, offset)) for bar in bars]

    def _avg_price(self, request: web.Request) -> tuple[int, object]:
        window = payloads.Window(self._tape(request), self._exchange.now(), 5 * MINUTE)
        price = window.mean_price or window.close
        return 2, {"mins": 5, "price": text(price), "closeTime": window.closed_at}

    def _ticker(self, request: web.Request) -> tuple[int, object]:
        chosen = self._chosen(request)
        now = self._exchange.now()
        is_mini = request.query.get("type", "FULL") == "MINI"
        rows = [
            _ticker_row(payloads.Window(self._exchange.tapes[symbol], now), is_mini=is_mini)
            for symbol in chosen
        ]
        asked = len(chosen) if {"symbol", "symbols"} & set(request.query) else _ALL
        weight = next(weight for most, weight in _TICKER_WEIGHTS if asked <= most)
        return weight, rows[0] if "symbol" in request.query else rows

    def _price(self, request: web.Request) -> tuple[int, object]:
        rows = []
        for symbol in self._chosen(request):
            trades = self._exchange.tapes[symbol].trades
            last = trades.at(len(trades) - 1).price if len(trades) else 0
            rows.append({"symbol": symbol, "price": text(last)})
        is_one = "symbol" in request.query
        return 2 if is_one else 4, rows[0] if is_one else rows

    def _book_ticker(self, request: web.Request) -> tuple[int, object]:
        rows = []
        for symbol in self._chosen(request):
            bid, bid_size, ask, ask_size = payloads.best_quotes(self._exchange.tapes[symbol])
            rows.append(
                {
                    "symbol": symbol,
                    "bidPrice": text(bid),
                    "bidQty": text(bid_size),
                    "askPrice": text(ask),
                    "askQty": text(ask_size),
                }
            )
        is_one = "symbol" in request.query
        return 2 if is_one else 4, rows[0] if is_one else rows

    # -- parameters

    def _tape(self, request: web.Request) -> Tape:
        symbol = request.query.get("symbol")
        if not symbol:
            raise BadRequestError(
                -1102, "Mandatory parameter 'symbol' was not sent, was empty/null, or malformed."
            )
        return self._known(symbol)

    def _known(self, symbol: str) -> Tape:
        if symbol not in self._exchange.tapes:
            raise BadRequestError(-1121, "Invalid symbol.")
        return self._exchange.tapes[symbol]

    def _chosen(self, request: web.Request) -> list[str]:
        if "symbol" in request.query:
            return [self._tape(request).symbol]
        if "symbols" in request.query:
            try:
                symbols = json.loads(request.query["symbols"])
                return [self._known(str(symbol)).symbol for symbol in symbols]
            except (ValueError, TypeError) as error:
                raise BadRequestError(
                    -1100, "Illegal characters found in parameter 'symbols'."
                ) from error
        return list(self._exchange.tapes)


def _encode(body: object) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()


def _number(request: web.Request, name: str, default: int) -> int:
    printed = request.query.get(name)
    if printed is None:
        return default
    try:
        value = int(printed)
    except ValueError as error:
        raise BadRequestError(
            -1100,
            f"Illegal characters found in parameter '{name}'; legal range is '^[0-9]{{1,20}}$'.",
        ) from error
    if value < 0 or (name == "limit" and value == 0):
        raise BadRequestError(-1130, f"Data sent for parameter '{name}' is not valid.")
    return value


def _limit(request: web.Request) -> int:
    return min(_number(request, "limit", DEFAULT_ROWS), MAX_ROWS)


def _window(request: web.Request) -> tuple[int | None, int | None]:
    """Read startTime and endTime, sent in milliseconds or microseconds."""
    bounds = []
    for name in ("startTime", "endTime"):
        value = _number(request, name, -1)
        bounds.append(None if value < 0 else value // 1000 if value > _MAX_MILLISECONDS else value)
    return bounds[0], bounds[1]


def _zone(printed: str) -> int:
    """Read a time zone such as `8`, `-1:00` or `05:45` as milliseconds east of UTC."""
    hours, _, minutes = printed.partition(":")
    try:
        offset = abs(int(hours)) * 60 + int(minutes or 0)
    except ValueError as error:
        raise BadRequestError(-1130, "Data sent for parameter 'timeZone' is not valid.") from error
    signed = -offset if printed.startswith("-") else offset
    if not -12 * 60 <= signed <= 14 * 60:
        raise BadRequestError(-1130, "Data sent for parameter 'timeZone' is not valid.")
    return signed * MINUTE


def _agg_rows(rows: Iterable[AggTrade]) -> list[dict[str, object]]:
    return [payloads.agg_row(row) for row in rows]


def _ticker_row(window: payloads.Window, *, is_mini: bool) -> dict[str, object]:
    bid, bid_size, ask, ask_size = payloads.best_quotes(window.tape)
    full = {
        "priceChange": text(window.change),
        "priceChangePercent": window.change_percent,
        "weightedAvgPrice": text(window.mean_price),
        "prevClosePrice": text(window.before),
        "lastQty": text(window.last_quantity()),
        "bidPrice": text(bid),
        "bidQty": text(bid_size),
        "askPrice": text(ask),
        "askQty": text(ask_size),
    }
    return {
        "symbol": window.tape.symbol,
        **({} if is_mini else full),
        "openPrice": text(window.open),
        "highPrice": text(window.high),
        "lowPrice": text(window.low),
        "lastPrice": text(window.close),
        "volume": text(window.volume),
        "quoteVolume": text(window.quote),
        "openTime": window.opened_at,
        "closeTime": window.closed_at,
        "firstId": window.first_id,
        "lastId": window.last_id,
        "count": window.count,
    }


def _symbol_info(facts: Instrument) -> dict[str, object]:
    return {
        "symbol": facts.symbol,
        "status": "TRADING",
        "baseAsset": facts.base,
        "baseAssetPrecision": 8,
        "quoteAsset": facts.quote,
        "quotePrecision": 8,
        "quoteAssetPrecision": 8,
        "orderTypes": ["LIMIT", "LIMIT_MAKER", "MARKET"],
        "isSpotTradingAllowed": True,
        "isMarginTradingAllowed": False,
        "filters": [
            {
                "filterType": "PRICE_FILTER",
                "minPrice": text(facts.tick),
                "maxPrice": "1000000.00000000",
                "tickSize": text(facts.tick),
            },
            {
                "filterType": "LOT_SIZE",
                "minQty": text(facts.step),
                "maxQty": "9000.00000000",
                "stepSize": text(facts.step),
            },
            {
                "filterType": "NOTIONAL",
                "minNotional": "5.00000000",
                "applyMinToMarket": True,
                "maxNotional": "9000000.00000000",
                "applyMaxToMarket": False,
                "avgPriceMins": 5,
            },
        ],
        "permissions": [],
        "permissionSets": [["SPOT"]],
    }


def _in_microseconds(body: object) -> object:
    """Turn the times of an answer from milliseconds into microseconds."""
    if isinstance(body, dict):
        return {
            key: value * 1000 if key in _TIME_KEYS else _in_microseconds(value)
            for key, value in body.items()
        }
    if isinstance(body, list):
        if len(body) == _KLINE_FIELDS and isinstance(body[0], int):
            return [body[0] * 1000, *body[1:6], body[6] * 1000 + 999, *body[7:]]
        return [_in_microseconds(item) for item in body]
    return body
