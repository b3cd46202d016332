"""What every venue must hold to, on the payloads in `frames/<venue>/`.

A new venue is a folder: `<case>.frame` is what its socket sends, `<case>.body` what its REST
service answers to the question that the case is named after, and `<case>.json` what is read in it.
"""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice import records
from sluice.exchanges import EXCHANGES, Exchange
from sluice.exchanges.base import BadFrameError, Message
from sluice.records import KIND_OF, Record

FRAMES = Path(__file__).parent / "frames"
VENUES = sorted(path.name for path in FRAMES.iterdir())
FRAME_FILES = sorted(FRAMES.glob("*/*.frame"))
BODY_FILES = sorted(FRAMES.glob("*/*.body"))
TS_RECV = 1_790_000_000_999_999
SYMBOL = "BTCUSDT"

Reader = Callable[[Exchange, bytes], object]
READERS: dict[str, Reader] = {
    "image": lambda venue, body: venue.read_image(SYMBOL, 100, body),
    "trades": lambda venue, body: venue.read_trades(SYMBOL, body, TS_RECV),
    "aggregates": lambda venue, body: venue.read_aggregates(SYMBOL, body, TS_RECV),
    "klines": lambda venue, body: venue.read_klines(SYMBOL, "1m", body, TS_RECV),
    "instruments": lambda venue, body: venue.read_instruments(body),
    "time": lambda venue, body: venue.read_time(body),
}


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def venue_of(path: Path) -> Exchange:
    return EXCHANGES[path.parent.name]


def shown(value: object) -> object:
    """Give a result with its type and the names of its fields."""
    if isinstance(value, list):
        return [shown(entry) for entry in value]
    if isinstance(value, msgspec.Struct):
        fields = {name: getattr(value, name) for name in value.__struct_fields__}
        return {"type": type(value).__name__, **json.loads(msgspec.json.encode(fields))}
    return value


def expected(path: Path) -> object:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def test_every_venue_has_its_frames() -> None:
    with_frames = {type(EXCHANGES[name]) for name in VENUES}
    assert {type(exchange) for exchange in EXCHANGES.values()} == with_frames


@pytest.mark.parametrize("path", FRAME_FILES, ids=named)
def test_a_frame_reads_as_expected(path: Path) -> None:
    assert shown(venue_of(path).parse(path.read_bytes(), TS_RECV)) == expected(path)


@pytest.mark.parametrize("path", BODY_FILES, ids=named)
def test_an_answer_reads_as_expected(path: Path) -> None:
    assert shown(READERS[path.stem](venue_of(path), path.read_bytes())) == expected(path)


@pytest.mark.parametrize("name", VENUES)
def test_every_question_has_an_answer_to_read(name: str) -> None:
    assert {path.stem for path in BODY_FILES if path.parent.name == name} == set(READERS)


@pytest.mark.parametrize("path", FRAME_FILES, ids=named)
def test_what_is_read_can_travel(path: Path) -> None:
    for message in venue_of(path).parse(path.read_bytes(), TS_RECV):
        if isinstance(message, Record):
            kind = KIND_OF[type(message)]
            assert records.decode(kind, records.encode(message)) == message


def assert_read_or_refused(venue: Exchange, frame: bytes) -> list[Message]:
    """Whatever comes, the adapter gives messages or raises BadFrameError, nothing else."""
    try:
        messages = venue.parse(frame, TS_RECV)
    except BadFrameError:
        return []
    for message in messages:
        if isinstance(message, Record):
            records.decode(KIND_OF[type(message)], records.encode(message))
    return messages


@pytest.mark.parametrize("path", FRAME_FILES, ids=named)
def test_a_frame_that_breaks_off_is_refused(path: Path) -> None:
    frame = path.read_bytes()
    for length in range(len(frame)):
        with pytest.raises(BadFrameError):
            venue_of(path).parse(frame[:length], TS_RECV)


@pytest.mark.parametrize("path", BODY_FILES, ids=named)
def test_an_answer_that_breaks_off_is_refused(path: Path) -> None:
    body = path.read_bytes()
    for length in range(len(body)):
        with pytest.raises(BadFrameError):
            READERS[path.stem](venue_of(path), body[:length])


HOSTILE = [
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 5000,
    b"null",
    b"[]",
    b"{}",
    b'""',
    b'"\xff"',
    b"[" * 200_000,
]


@pytest.mark.parametrize("path", FRAME_FILES, ids=named)
def test_hostile_values_in_any_place_are_read_or_refused(path: Path) -> None:
    frame = path.read_bytes()
    # A value begins after each colon; what follows it stays, well-formed or not.
    for start in (at + 1 for at, byte in enumerate(frame) if byte == ord(":")):
        ends = [end for end in (frame.find(b",", start), frame.find(b"}", start)) if end > 0]
        for value in HOSTILE:
            assert_read_or_refused(venue_of(path), frame[:start] + value + frame[min(ends) :])


@given(st.sampled_from(FRAME_FILES), st.data())
@settings(derandomize=True, deadline=None, max_examples=300)
def test_damaged_frames_are_read_or_refused(path: Path, data: st.DataObject) -> None:
    frame = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    assert_read_or_refused(venue_of(path), bytes(frame))


@given(st.sampled_from(VENUES), st.binary(max_size=200))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_noise_is_read_or_refused(name: str, noise: bytes) -> None:
    assert_read_or_refused(EXCHANGES[name], noise)


@pytest.mark.parametrize("name", EXCHANGES)
def test_no_symbol_can_break_out_of_a_name(name: str) -> None:
    is_symbol = EXCHANGES[name].symbol_pattern.fullmatch
    assert is_symbol(SYMBOL)
    for character in " \t\n\r\0\x1f\x7f'\"\\/:@,":
        assert not is_symbol(f"BTC{character}USDT"), repr(character)
    assert not is_symbol("")
    assert not is_symbol("B" * 65)
    assert not is_symbol(f"{SYMBOL}\n")


@pytest.mark.parametrize("name", EXCHANGES)
def test_its_facts_are_sound(name: str) -> None:
    venue = EXCHANGES[name]
    assert venue.name == name
    assert venue.streams.fullmatch("trade")
    assert list(venue.image_limits) == sorted(venue.image_limits)
    assert min(venue.streams_per_socket, venue.weight_per_minute, venue.history_page) > 0
    assert min(venue.controls_per_second, venue.socket_lifetime, *venue.connects_per_window) > 0
    channels = [venue.channel(SYMBOL, "trade"), venue.depth_channel(SYMBOL)]
    assert venue.socket_path(channels).startswith("/")
    for message in (venue.subscribe(channels, 7), venue.unsubscribe(channels, 8)):
        assert all(channel in message for channel in channels)
        json.loads(message)
    json.loads(venue.list_subscriptions(9))
    for request in (
        *(venue.image_request(SYMBOL, limit) for limit in venue.image_limits),
        venue.newest_request(SYMBOL),
        venue.last_trade_request(SYMBOL),
        venue.history_request(SYMBOL, 1, venue.history_page),
        venue.aggregates_request(SYMBOL, 0, TS_RECV),
        venue.klines_request(SYMBOL, "1m", 0, TS_RECV),
        venue.instruments_request(),
        venue.time_request(),
    ):
        assert request.path.startswith("/")
        assert 0 < request.weight <= venue.weight_per_minute
    # Hundreds of silent markets are asked about every minute, and leave most of it to the others.
    assert 300 * venue.newest_request(SYMBOL).weight < venue.weight_per_minute / 2
