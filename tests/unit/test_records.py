"""Records as they lie on the lists: newer ones, old ones, and what is none."""

import msgspec
import pytest

from sluice.records import (
    OrderbookSnapshot,
    RejectedRecordError,
    TooNewError,
    Trade,
    decode,
    decode_row,
    decode_rows,
    encode,
    is_decimal,
    is_name,
    is_positive,
)

TRADE = Trade("binance", "BTCUSDT", 7, 7, "1.50", "2", "buy", 1_790_000_000_000_000, 1)


def test_a_record_comes_back_as_it_was_put() -> None:
    assert decode("trade", encode(TRADE)) == TRADE
    row = msgspec.structs.astuple(TRADE)
    assert decode_row("trade", encode(TRADE)) == row
    assert decode_rows("trade", [encode(TRADE)] * 3) == [row] * 3
    assert encode(TRADE).startswith(b'["binance","BTCUSDT",7,7,"1.50"')


def test_a_record_with_more_fields_is_newer_and_a_long_list_of_anything_is_not() -> None:
    newer = encode(TRADE)[:-1] + b',"a field of tomorrow"]'
    with pytest.raises(TooNewError, match="more than 9 fields"):
        decode("trade", newer)
    with pytest.raises(RejectedRecordError):
        decode("trade", b"[0,0,0,0,0,0,0,0,0,0]")


def test_a_record_of_yesterday_is_read_with_the_defaults_of_today() -> None:
    snapshot = OrderbookSnapshot("binance", "BTCUSDT", 1, 2, 3, 4, 5, [("1", "2")], [], 6)
    assert decode("orderbook_snapshot", encode(snapshot)) == snapshot
    older = encode(snapshot)[:-3] + b"]"
    read = decode("orderbook_snapshot", older)
    assert isinstance(read, OrderbookSnapshot)
    assert read.trusted_depth == 0


def test_two_records_in_one_item_are_looked_at_singly() -> None:
    assert decode_rows("trade", [encode(TRADE) + b"," + encode(TRADE)]) is None


def test_halves_of_a_record_do_not_make_up_for_two_in_one_item() -> None:
    item = encode(TRADE)
    for mark in (b"7", b"7,", b'"1.', b'"1.50"'):
        head, rest = item[: item.index(mark)], item[item.index(mark) :]
        halves = [head.rstrip(b","), rest]
        for joint in (b",", b",false,"):
            assert decode_rows("trade", [item + joint + item, *halves]) is None
    two_levels = [("1", "2"), ("3", "4")]
    book = encode(OrderbookSnapshot("binance", "BTCUSDT", 1, 2, 3, 4, 5, two_levels, [], 6))
    head, rest = book.split(b'],["3"')
    assert decode_rows("orderbook_snapshot", [book + b"," + book, head + b"]", b'["3"' + rest]) is (
        None
    )


@pytest.mark.parametrize("item", [b"false", b"true", b"null", b"", b" ", b"7"])
def test_what_is_no_record_is_looked_at_singly(item: bytes) -> None:
    for items in ([item], [item, encode(TRADE)], [encode(TRADE), item]):
        assert decode_rows("trade", items) is None


@pytest.mark.parametrize("text", ["", ".", "-1", "1e5", "NaN", "1.2.3", "\u0661", "1 ", "9" * 51])
def test_what_is_no_plain_decimal(text: str) -> None:
    assert not is_decimal(text)


@pytest.mark.parametrize(("text", "is_above_zero"), [("0", False), ("0.00", False), ("0.01", True)])
def test_zero_is_a_decimal_and_not_positive(text: str, *, is_above_zero: bool) -> None:
    assert is_decimal(text)
    assert is_positive(text) is is_above_zero


@pytest.mark.parametrize("name", ["", "a b", "a\tb", "a'b", 'a"b', "a\\b", "a\x00", "x" * 65])
def test_what_is_no_name_of_a_market(name: str) -> None:
    assert not is_name(name)
