"""Recorded changes through the synchronizer, beside results computed apart from it."""

from collections import Counter
from decimal import Decimal

import pytest

from orderbook.synchronizer import BookSynchronizer, Outcome
from sluice.exchanges import EXCHANGES
from sluice.exchanges.base import Depth, DepthImage
from tests.recordings import (
    WHOLE,
    Quote,
    Recording,
    capture,
    captures,
    messages,
    oracle,
    recordings,
)


def params(recordings: list[Recording]) -> list[object]:
    return [
        pytest.param(
            recording,
            id=recording.name,
            marks=pytest.mark.skipif(
                not all(path.exists() for path in recording.files),
                reason="the public recordings are not beside the repository",
            ),
        )
        for recording in recordings
    ]


def plain(level: tuple[str, str] | None) -> tuple[Decimal, Decimal] | None:
    return None if level is None else (Decimal(level[0]), Decimal(level[1]))


@pytest.mark.parametrize("recording", params([*recordings(), *captures()]))
def test_a_recording_ends_in_its_true_book_and_agrees_with_every_quote(
    recording: Recording,
) -> None:
    sync = BookSynchronizer(recording.continuity, max_levels=WHOLE)
    outcomes: Counter[Outcome] = Counter()
    image: DepthImage | None = None
    quotes: dict[int, Quote] = {}
    compared = 0
    for message in messages(recording):
        match message:
            case Quote():
                quotes[message.update_id] = message
            case DepthImage():
                image = message
                outcomes[sync.on_image(message)] += 1
            case Depth():
                outcome = sync.on_depth(message)
                outcomes[outcome] += 1
                if outcome is Outcome.IMAGE_NEEDED and image is not None:
                    # Recorded before the first change, where a live image comes after it.
                    outcomes[sync.on_image(image)] += 1
        # A quote comes before the change of its id, or after it.
        quote = quotes.pop(sync.update_id, None)
        if sync.is_live and quote is not None and sync.book.trusted_depth:
            assert plain(sync.book.best_bid) == plain(quote.bid)
            assert plain(sync.book.best_ask) == plain(quote.ask)
            compared += 1
        if isinstance(message, Depth):
            quotes = {at: quote for at, quote in quotes.items() if at > sync.update_id}
    expected = oracle(recording)
    assert outcomes[Outcome.LIVE] == 1
    assert outcomes[Outcome.GAP] == outcomes[Outcome.CROSSED] == 0
    assert sync.update_id == expected["last_u"]
    assert list(sync.book.levels) == expected["levels"]
    assert sync.book.digest() == expected["sha256"]
    # A capture is half a minute, in which two of the markets hardly moved.
    assert recording.is_capture or compared > 100


@pytest.mark.parametrize(
    "recording", params([market for market in captures() if market.continuity == "contiguous"])
)
def test_a_captured_socket_of_many_markets_reads_to_the_true_book(recording: Recording) -> None:
    venue = EXCHANGES["binance"]
    sync = BookSynchronizer(venue.continuity, max_levels=WHOLE)
    image: DepthImage | None = None
    frames = 0
    for ts_recv, body in capture(recording):
        if body.startswith(b'{"lastUpdateId"'):
            image = venue.read_image(recording.symbol, recording.image_limit, body)
            sync.on_image(image)
            continue
        frames += 1
        for message in venue.parse(body, ts_recv):
            if isinstance(message, Depth) and message.symbol == recording.symbol:
                outcome = sync.on_depth(message)
                assert outcome is not Outcome.GAP
                if outcome is Outcome.IMAGE_NEEDED and image is not None:
                    sync.on_image(image)
    expected = oracle(recording)
    assert frames == 265
    assert sync.update_id == expected["last_u"]
    assert sync.book.digest() == expected["sha256"]
