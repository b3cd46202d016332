"""From items to lines: what COPY would misread is left out, and nothing else."""

import msgspec
import pytest

from flusher.batch import letter, lines_of, read
from flusher.tables import TABLES
from sluice import records
from sluice.queue import Claim
from sluice.records import OrderbookSnapshot, TooNewError, Trade

NOW = 1_790_000_000_000_000


MARKETS = {("binance", f"M{number}"): number for number in range(10)}


def trade(trade_id: int, price: str = "1.5", symbol: str = "M7") -> bytes:
    return records.encode(Trade("binance", symbol, trade_id, 1, price, "2", "buy", NOW, NOW))


def snapshot(bids: list[tuple[str, str]], asks: list[tuple[str, str]]) -> bytes:
    return records.encode(OrderbookSnapshot("binance", "M1", NOW, 1, 1, NOW, NOW, bids, asks, 5))


def lines(kind: str, *items: bytes) -> tuple[list[bytes], list[int], set[int]]:
    """Give the lines, their places, and the places refused."""
    found = lines_of(read(kind, Claim(0, list(items))), TABLES[kind], MARKETS)
    return found.data.splitlines(), list(found.places), set(found.refused)


def test_a_good_batch_becomes_a_line_a_record() -> None:
    assert lines("trade", trade(1), trade(2, "0.10", "M8")) == (
        [
            b"7\t1\t1\t1.5\t2\tbuy\t%d\t%d" % (NOW, NOW),
            b"8\t2\t1\t0.10\t2\tbuy\t%d\t%d" % (NOW, NOW),
        ],
        [0, 1],
        set(),
    )


@pytest.mark.parametrize(
    "price",
    [
        *("1e5", "1E5", "1e", "NaN", "Infinity", "inf", "1_0", "0x1", "+1", " 1", "1,5", "{1}"),
        *("[1]", "1]", "[1", '1"', '"', "1;5", "null"),
        *("sel", "eell", "1\t2", "1\n2", "1\r", "1\x00", "\\N", "\\.", "\u0661", "\ud7ff"),
    ],
)
def test_a_price_with_a_foreign_character_is_refused_alone(price: str) -> None:
    found, places, refused = lines("trade", trade(1), trade(2, price), trade(3))
    assert len(found) == 2
    assert places == [0, 2]
    assert refused == {1}


def test_places_are_right_where_items_are_refused_for_different_reasons() -> None:
    items = [b"{", trade(1), trade(2, symbol="a b"), trade(3, "1e5"), trade(4), b"[]"]
    _, places, refused = lines("trade", *items)
    assert places == [1, 4]
    assert refused == {0, 2, 3, 5}


@pytest.mark.parametrize(
    "level",
    [
        ("1,2", "3,4"),
        ("{1}", "{2}"),
        ("1}", "2"),
        ("NaN", "1"),
        ("1e5", "1"),
        ("", "1"),
        ("1", "-1"),
    ],
)
def test_a_level_that_is_no_decimal_is_refused_with_its_snapshot(level: tuple[str, str]) -> None:
    good = snapshot([("1.10", "2")], [("1.20", "2")])
    found, places, refused = lines("orderbook_snapshot", good, snapshot([level], []), good)
    assert len(found) == 2
    assert places == [0, 2]
    assert refused == {1}


def test_a_snapshot_may_lack_a_side() -> None:
    (line,), _, _ = lines("orderbook_snapshot", snapshot([("1.10", "2"), ("1.0", "3")], []))
    assert line.endswith(b"\t{1.10,1.0}\t{2,3}\t{}\t{}\t5")


def test_a_newer_record_ends_the_batch_before_it_or_is_told() -> None:
    newer = trade(2)[:-1] + b",1]"
    batch = read("trade", Claim(7, [trade(1), newer, trade(3)]))
    assert batch.claim == Claim(7, [trade(1)])
    assert list(batch.places) == [0]
    with pytest.raises(TooNewError):
        read("trade", Claim(7, [newer, trade(3)]))


@pytest.mark.parametrize(
    ("item", "content"),
    [
        (b'["a",1]', {"raw": '["a",1]'}),
        (b'a\x00"\n', {"raw": 'a\x00"\n'}),
        (b"\xff\x00", {"raw_base64": "/wA="}),
        (b"", {"raw": ""}),
    ],
)
def test_a_letter_keeps_the_bytes_whatever_they_are(item: bytes, content: dict[str, str]) -> None:
    assert msgspec.json.decode(letter("crypto:queue:trade", item, "why", NOW)) == {
        "queue": "crypto:queue:trade",
        "reason": "why",
        "time": NOW,
        **content,
    }


@pytest.mark.parametrize("kind", TABLES)
def test_each_kind_of_record_has_a_table_and_sql_of_the_same_columns(kind: str) -> None:
    table = TABLES[kind]
    names = ", ".join(table.column_names)
    assert f"INSERT INTO {table.name} ({names}) SELECT" in table.insert
    assert f"ORDER BY {', '.join(table.key)}" in table.insert
    assert set(table.key) <= set(table.column_names)


def test_every_kind_of_record_has_a_table() -> None:
    assert TABLES.keys() == records.KINDS.keys()
