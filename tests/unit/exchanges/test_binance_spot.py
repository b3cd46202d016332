"""Binance spot: what is refused, and what its refusals mean."""

import json

import pytest

from sluice.exchanges import EXCHANGES
from sluice.exchanges.base import BadFrameError
from sluice.records import Trade

VENUE = EXCHANGES["binance"]
TRADE = {
    "e": "trade",
    "E": 1790000000105,
    "s": "BTCUSDT",
    "t": 6100000001,
    "p": "91234.10000000",
    "q": "0.00150000",
    "T": 1790000000104,
    "m": True,
    "M": True,
}
DEPTH = {
    "e": "depthUpdate",
    "E": 1790000000200,
    "s": "BTCUSDT",
    "U": 101,
    "u": 123,
    "b": [["91234.10000000", "1.20000000"]],
    "a": [],
}


def test_the_largest_numbers_are_read() -> None:
    frame = json.dumps({**TRADE, "t": 2**53 - 1, "p": "9" * 50}).encode()
    (trade,) = VENUE.parse(frame, 1)
    assert isinstance(trade, Trade)
    assert (trade.trade_id, trade.price) == (2**53 - 1, "9" * 50)


@pytest.mark.parametrize(
    "change",
    [
        {"p": "0"},
        {"p": "0.00000000"},
        {"p": "-1"},
        {"p": "NaN"},
        {"p": "Infinity"},
        {"p": "1e5"},
        {"p": "1_000"},
        {"p": "٣"},
        {"p": " 1"},
        {"p": ""},
        {"p": "."},
        {"p": "9" * 51},
        {"p": 1.5},
        {"q": "0.0"},
        {"q": None},
        {"t": -1},
        {"t": 2**53},
        {"t": 2**63},
        {"t": "6100000001"},
        {"t": 1.5},
        {"T": -1},
        {"T": 1790000000104000 * 1000},
        {"s": "BTC USDT"},
        {"s": "btcusdt"},
        {"s": ""},
        {"s": "B" * 65},
        {"m": 1},
        {"m": None},
    ],
    ids=str,
)
def test_a_trade_with_a_bad_value_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadFrameError):
        VENUE.parse(json.dumps({**TRADE, **change}).encode(), 1)


@pytest.mark.parametrize(
    "change",
    [
        {"U": 124},
        {"u": 2**53},
        {"U": None},
        {"b": [["NaN", "Infinity"]]},
        {"b": [["1"]]},
        {"b": [["1", "1", "1"]]},
        {"b": [["0", "1"]]},
        {"a": [["1", "-1"]]},
        {"a": {}},
    ],
    ids=str,
)
def test_a_change_of_a_book_with_a_bad_value_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadFrameError):
        VENUE.parse(json.dumps({**DEPTH, **change}).encode(), 1)


@pytest.mark.parametrize("field", [name for name in TRADE if name not in {"e", "E", "M"}])
def test_a_trade_without_a_field_is_refused(field: str) -> None:
    frame = {name: value for name, value in TRADE.items() if name != field}
    with pytest.raises(BadFrameError, match="malformed trade"):
        VENUE.parse(json.dumps(frame).encode(), 1)


@pytest.mark.parametrize(
    ("status", "headers", "body", "kind", "retry_after"),
    [
        (429, {"Retry-After": "7"}, b'{"code":-1003,"msg":"Too much"}', "rate_limited", 7.0),
        (418, {"Retry-After": "120"}, b'{"code":-1003,"msg":"Way too much"}', "banned", 120.0),
        (418, {}, b"", "banned", None),
        (401, {}, b'{"code":-2015,"msg":"Invalid API-key"}', "forbidden", None),
        (400, {}, b'{"code":-1008,"msg":"Server is overloaded"}', "unavailable", None),
        (408, {}, b'{"code":-1007,"msg":"Timeout waiting"}', "unavailable", None),
        (403, {}, b"<html>no</html>", "unavailable", None),
        (451, {}, b"", "unavailable", None),
        (400, {}, b'{"code":-1121,"msg":"Invalid symbol."}', "no_such_symbol", None),
        (400, {}, b'{"code":-1100,"msg":"Illegal characters"}', "rejected", None),
        (500, {}, b"", "unavailable", None),
        (503, {"Retry-After": "soon"}, b"\xff", "unavailable", None),
    ],
)
def test_a_refusal_says_what_to_do(
    status: int, headers: dict[str, str], body: bytes, kind: str, retry_after: float | None
) -> None:
    refusal = VENUE.refusal(status, headers, body)
    assert (refusal.kind, refusal.retry_after) == (kind, retry_after)


def test_the_end_of_a_ban_is_read_from_its_words_where_no_header_says_it() -> None:
    body = (
        b'{"code":-1003,"msg":"Way too much request weight used; IP banned until 1790000123456."}'
    )
    headers = {"Date": "Mon, 21 Sep 2026 14:13:20 GMT"}  # 1790000000
    refusal = VENUE.refusal(418, headers, body)
    assert refusal.retry_after == pytest.approx(123.456)


@pytest.mark.parametrize(
    ("headers", "used"),
    [
        ({"X-MBX-USED-WEIGHT-1M": "37"}, 37),
        ({"X-MBX-USED-WEIGHT-1M": "-1"}, None),
        ({"X-MBX-USED-WEIGHT-1M": "٣"}, None),
        ({}, None),
    ],
)
def test_the_used_weight_is_read(headers: dict[str, str], used: int | None) -> None:
    assert VENUE.used_weight(headers) == used


@pytest.mark.parametrize(
    ("limit", "weight"), [(100, 5), (500, 25), (1000, 50), (5000, 250), (101, 25), (1001, 250)]
)
def test_an_image_costs_what_the_venue_says(limit: int, weight: int) -> None:
    request = VENUE.image_request("BTCUSDT", limit)
    assert request.weight == weight
    assert request.query == {"symbol": "BTCUSDT", "limit": str(limit)}


def test_names_are_those_of_the_venue() -> None:
    channels = [VENUE.channel("BTCUSDT", "trade"), VENUE.depth_channel("ETHUSDT")]
    assert channels == ["btcusdt@trade", "ethusdt@depth@100ms"]
    assert VENUE.socket_path(channels) == "/stream?streams=btcusdt@trade/ethusdt@depth@100ms"
    assert json.loads(VENUE.subscribe(channels, 7)) == {
        "method": "SUBSCRIBE",
        "params": channels,
        "id": 7,
    }
    assert json.loads(VENUE.list_subscriptions(8)) == {"method": "LIST_SUBSCRIPTIONS", "id": 8}


@pytest.mark.parametrize(
    "stream", ["depth", "depth@100ms", "kline_7m", "kline_", "aggTrade", "Trade", "trade\n"]
)
def test_streams_that_are_not_recorded_are_not_accepted(stream: str) -> None:
    assert not VENUE.streams.fullmatch(stream)


def test_a_window_is_asked_for_in_milliseconds() -> None:
    query = VENUE.aggregates_request("BTCUSDT", 1_790_000_000_000_123, 1_790_000_001_000_000).query
    assert (query["startTime"], query["endTime"]) == ("1790000000000", "1790000001000")
