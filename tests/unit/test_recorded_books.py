"""Recorded changes through the synchronizer, beside results computed apart from it."""

from collections import Counter
from decimal import Decimal

import pytest

from orderbook.synchronizer import BookSynchronizer, Outcome
from sluice.exchanges.base import Depth, DepthImage
from tests.recordings import WHOLE, Quote, Recording, messages, oracle, recordings


def params() -> list[object]:
    return [
        pytest.param(
            recording,
            id=recording.name,
            marks=pytest.mark.skipif(
                not all(path.exists() for path in recording.files),
                reason="the public recordings are not beside the repository",
            ),
        )
        for recording in recordings()
    ]


def plain(level: tuple[str, str] | None) -> tuple[Decimal, Decimal] | None:
    return None if level is None else (Decimal(level[0]), Decimal(level[1]))


@pytest.mark.parametrize("recording", params())
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
    assert compared > 100
