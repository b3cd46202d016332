"""Every stream's payload and every REST row, as the exchange prints them.

https://github.com/binance/binance-spot-api-docs: web-socket-streams.md, rest-api.md.
"""

import re

from sluice.simulator.bars import MINUTE, Bar
from sluice.simulator.fixed import ONE, product, text
from sluice.simulator.tape import AggTrade, Levels, Tape, Trade, top

WINDOWS = {"1h": 60 * MINUTE, "4h": 240 * MINUTE, "1d": 1440 * MINUTE}
_TIMES = re.compile(rb'("(?:[ETOC]|k":\{"t)":)(\d+)')


def in_microseconds(payload: bytes) -> bytes:
    """Turn every time of a stream payload from milliseconds into microseconds."""
    return _TIMES.sub(rb"\1\g<2>000", payload)


def flag(*, value: bool) -> str:
    """Print a JSON boolean."""
    return "true" if value else "false"


def trade(symbol: str, row: Trade, sent: int) -> bytes:
    """`{"e":"trade","E":..,"s":"BTCUSDT","t":..,"p":"..","q":"..","T":..,"m":true,"M":true}`."""
    return (
        f'{{"e":"trade","E":{sent},"s":"{symbol}","t":{row.id},"p":"{text(row.price)}",'
        f'"q":"{text(row.quantity)}","T":{row.time},"m":{flag(value=row.buyer_is_maker)},"M":true}}'
    ).encode()


def agg_trade(symbol: str, row: AggTrade, sent: int) -> bytes:
    """`{"e":"aggTrade",..,"a":..,"p":"..","q":"..","f":..,"l":..,"T":..,"m":true,"M":true}`."""
    return (
        f'{{"e":"aggTrade","E":{sent},"s":"{symbol}","a":{row.id},"p":"{text(row.price)}",'
        f'"q":"{text(row.quantity)}","f":{row.first_id},"l":{row.last_id},"T":{row.time},'
        f'"m":{flag(value=row.buyer_is_maker)},"M":true}}'
    ).encode()


def levels(rows: list[tuple[int, int]]) -> str:
    """`[["91234.10000000","1.20000000"]]`."""
    return "[" + ",".join(f'["{text(price)}","{text(size)}"]' for price, size in rows) + "]"


def depth(
    symbol: str,
    span: tuple[int, int],
    sent: int,
    bids: list[tuple[int, int]],
    asks: list[tuple[int, int]],
) -> bytes:
    """`{"e":"depthUpdate","E":..,"s":"..","U":..,"u":..,"b":[[..]],"a":[[..]]}`."""
    return (
        f'{{"e":"depthUpdate","E":{sent},"s":"{symbol}","U":{span[0]},"u":{span[1]},'
        f'"b":{levels(bids)},"a":{levels(asks)}}}'
    ).encode()


def snapshot(book: Levels, limit: int) -> bytes:
    """`{"lastUpdateId":..,"bids":[[..]],"asks":[[..]]}`: REST depth and partial depth alike."""
    bids = top(book.bids, limit, is_bid=True)
    asks = top(book.asks, limit, is_bid=False)
    return (
        f'{{"lastUpdateId":{book.update_id},"bids":{levels(bids)},"asks":{levels(asks)}}}'
    ).encode()


def book_ticker(tape: Tape) -> bytes:
    """`{"u":..,"s":"BTCUSDT","b":"..","B":"..","a":"..","A":".."}`, with neither `e` nor time."""
    bid, bid_size, ask, ask_size = best_quotes(tape)
    return (
        f'{{"u":{tape.book.update_id},"s":"{tape.symbol}","b":"{text(bid)}",'
        f'"B":"{text(bid_size)}","a":"{text(ask)}","A":"{text(ask_size)}"}}'
    ).encode()


def best_quotes(tape: Tape) -> tuple[int, int, int, int]:
    """Best bid, its size, best ask, its size; zeros for an empty side."""
    bid, ask = tape.book.best
    return (
        bid or 0,
        tape.book.bids[bid] if bid else 0,
        ask or 0,
        tape.book.asks[ask] if ask else 0,
    )


def kline(symbol: str, interval: str, bar: Bar, ends: int, sent: int) -> bytes:
    """`{"e":"kline","E":..,"s":"..","k":{"t":..,"T":..,..,"x":false,..}}`; `ends`: next open."""
    return (
        f'{{"e":"kline","E":{sent},"s":"{symbol}","k":{{"t":{bar.opened},"T":{ends - 1},'
        f'"s":"{symbol}","i":"{interval}","f":{bar.first_id},"L":{bar.last_id},'
        f'"o":"{text(bar.open)}","c":"{text(bar.close)}","h":"{text(bar.high)}",'
        f'"l":"{text(bar.low)}","v":"{text(bar.volume)}","n":{bar.count},'
        f'"x":{flag(value=sent >= ends)},"q":"{text(bar.quote)}","V":"{text(bar.taker_volume)}",'
        f'"Q":"{text(bar.taker_quote)}","B":"0"}}}}'
    ).encode()


def kline_row(bar: Bar, ends: int) -> list[object]:
    """One row of REST klines."""
    return [
        bar.opened,
        text(bar.open),
        text(bar.high),
        text(bar.low),
        text(bar.close),
        text(bar.volume),
        ends - 1,
        text(bar.quote),
        bar.count,
        text(bar.taker_volume),
        text(bar.taker_quote),
        "0",
    ]


def trade_row(row: Trade) -> dict[str, object]:
    """One row of REST trades and historicalTrades."""
    return {
        "id": row.id,
        "price": text(row.price),
        "qty": text(row.quantity),
        "quoteQty": text(product(row.price, row.quantity)),
        "time": row.time,
        "isBuyerMaker": row.buyer_is_maker,
        "isBestMatch": True,
    }


def agg_row(row: AggTrade) -> dict[str, object]:
    """One row of REST aggTrades."""
    return {
        "a": row.id,
        "p": text(row.price),
        "q": text(row.quantity),
        "f": row.first_id,
        "l": row.last_id,
        "T": row.time,
        "m": row.buyer_is_maker,
        "M": True,
    }


class Window:
    """What the tickers say of the minutes since `start`, up to `now` (milliseconds)."""

    def __init__(self, tape: Tape, now: int, length: int = WINDOWS["1d"]) -> None:
        self.tape = tape
        self.closed_at = now
        self.opened_at = (now - length) // MINUTE * MINUTE + MINUTE
        bars = list(tape.minutes.since(self.opened_at))
        before = tape.minutes.last_close_before(self.opened_at)
        self.count = sum(bar.count for bar in bars)
        self.volume = sum(bar.volume for bar in bars)
        self.quote = sum(bar.quote for bar in bars)
        flat = before or 0
        self.open = bars[0].open if bars else flat
        self.before = self.open if before is None else before
        self.high = max((bar.high for bar in bars), default=flat)
        self.low = min((bar.low for bar in bars), default=flat)
        self.close = bars[-1].close if bars else flat
        self.first_id = bars[0].first_id if bars else -1
        self.last_id = bars[-1].last_id if bars else -1

    @property
    def change(self) -> int:
        """Close less open."""
        return self.close - self.open

    @property
    def change_percent(self) -> str:
        """The change in percent of the open, three decimals."""
        thousandths = self.change * 100_000 // self.open if self.open else 0
        sign = "-" if thousandths < 0 else ""
        return f"{sign}{abs(thousandths) // 1000}.{abs(thousandths) % 1000:03d}"

    @property
    def mean_price(self) -> int:
        """The price weighted by volume."""
        return self.quote * ONE // self.volume if self.volume else 0

    def last_quantity(self) -> int:
        """The quantity of the newest trade."""
        trades = self.tape.trades
        return trades.at(len(trades) - 1).quantity if len(trades) else 0


def mini_ticker(window: Window) -> bytes:
    """`{"e":"24hrMiniTicker","E":..,"s":"..","c":"..","o":"..","h":"..","l":"..",..}`."""
    return (
        f'{{"e":"24hrMiniTicker","E":{window.closed_at},"s":"{window.tape.symbol}",'
        f'"c":"{text(window.close)}","o":"{text(window.open)}","h":"{text(window.high)}",'
        f'"l":"{text(window.low)}","v":"{text(window.volume)}","q":"{text(window.quote)}"}}'
    ).encode()


def ticker(window: Window) -> bytes:
    """`{"e":"24hrTicker","E":..,"s":"..","p":"..","P":"..",..,"F":..,"L":..,"n":..}`."""
    bid, bid_size, ask, ask_size = best_quotes(window.tape)
    return (
        f'{{"e":"24hrTicker","E":{window.closed_at},"s":"{window.tape.symbol}",'
        f'"p":"{text(window.change)}","P":"{window.change_percent}",'
        f'"w":"{text(window.mean_price)}","x":"{text(window.before)}","c":"{text(window.close)}",'
        f'"Q":"{text(window.last_quantity())}","b":"{text(bid)}","B":"{text(bid_size)}",'
        f'"a":"{text(ask)}","A":"{text(ask_size)}","o":"{text(window.open)}",'
        f'"h":"{text(window.high)}","l":"{text(window.low)}","v":"{text(window.volume)}",'
        f'"q":"{text(window.quote)}","O":{window.opened_at},"C":{window.closed_at},'
        f'"F":{window.first_id},"L":{window.last_id},"n":{window.count}}}'
    ).encode()


def window_ticker(window: Window, name: str) -> bytes:
    """`{"e":"1hTicker","E":..,"s":"..",..}`: a rolling window, without the book's fields."""
    return (
        f'{{"e":"{name}Ticker","E":{window.closed_at},"s":"{window.tape.symbol}",'
        f'"p":"{text(window.change)}","P":"{window.change_percent}","o":"{text(window.open)}",'
        f'"h":"{text(window.high)}","l":"{text(window.low)}","c":"{text(window.close)}",'
        f'"w":"{text(window.mean_price)}","v":"{text(window.volume)}","q":"{text(window.quote)}",'
        f'"O":{window.opened_at},"C":{window.closed_at},"F":{window.first_id},'
        f'"L":{window.last_id},"n":{window.count}}}'
    ).encode()
