from collections import Counter

import pytest

from sluice.simulator.market import Change, Market, MatchingBook, instrument

SECONDS = 1_000_000


def play(symbol: str, rate: float, seconds: int = 20, seed: int = 1) -> tuple[Market, list]:
    market = Market(instrument(symbol), seed, rate)
    market.start(0)
    return market, list(market.advance(seconds * SECONDS))


def test_the_best_price_is_taken_first_and_the_older_order_before_the_younger() -> None:
    book = MatchingBook()
    for order_id, price in ((1, 101), (2, 100), (3, 100)):
        book.rest(order_id, is_bid=False, price=price, lots=5)
    assert book.take(9, is_buy=True, lots=7) == ([(100, 5), (100, 2)], [2])
    assert book.asks.totals == {100: 3, 101: 5}
    assert book.take(10, is_buy=True, lots=100) == ([(100, 3), (101, 5)], [3, 1])
    assert not book.asks.totals
    assert len(book) == 0


def test_a_limit_is_respected_and_the_rest_of_the_order_rests_at_it() -> None:
    book = MatchingBook()
    book.rest(1, is_bid=True, price=99, lots=4)
    book.rest(2, is_bid=True, price=98, lots=4)
    assert book.take(3, is_buy=False, lots=10, limit=99) == ([(99, 4)], [1])
    assert book.bids.totals == {98: 4}
    assert book.asks.totals == {99: 6}
    assert 3 in book


def test_a_cancelled_order_leaves_no_trace() -> None:
    book = MatchingBook()
    book.rest(1, is_bid=True, price=99, lots=4)
    book.rest(2, is_bid=True, price=99, lots=5)
    assert book.cancel(1) == (True, 99)
    assert book.bids.totals == {99: 5}
    assert book.nth(0) == 2
    assert book.cancel(2) == (True, 99)
    assert book.bids.best() is None


def test_the_same_seed_gives_the_same_market_and_another_seed_another() -> None:
    assert play("BTCUSDT", 20)[1] == play("BTCUSDT", 20)[1]
    assert play("BTCUSDT", 20, seed=2)[1] != play("BTCUSDT", 20)[1]


@pytest.mark.parametrize("symbol", ["BTCUSDT", "NEXOUSDT", "ANYTHINGBTC"])
def test_the_book_is_never_crossed_and_its_changes_lead_to_it(symbol: str) -> None:
    market = Market(instrument(symbol), 3, 50)
    market.start(0)
    sides: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for is_bid, price, quantity in market.levels():
        sides[is_bid][price] = quantity
    for step in market.advance(20 * SECONDS):
        for is_bid, price, quantity in step.changes:
            sides[is_bid][price] = quantity
            if not quantity:
                del sides[is_bid][price]
            assert max(sides[True]) < min(sides[False])
    assert {change.price: change.quantity for change in market.levels() if change.is_bid} == sides[
        True
    ]


def test_what_is_filled_is_what_leaves_the_book() -> None:
    market = Market(instrument("ETHUSDT"), 5, 200)
    market.start(0)
    totals = {(is_bid, price): size for is_bid, price, size in market.levels()}
    filled = 0
    for step in market.advance(10 * SECONDS):
        taken: Counter[int] = Counter()
        for fill in step.fills:
            taken[fill.price] += fill.quantity
        for change in step.changes:
            before = totals.get((change.is_bid, change.price), 0)
            if change.price in taken and change.is_bid is step.buyer_is_maker:
                assert before - change.quantity == taken[change.price]
                filled += 1
            totals[change.is_bid, change.price] = change.quantity
    assert filled > 100


@pytest.mark.parametrize("rate", [5.0, 1000.0])
def test_trades_come_at_about_the_rate_asked_for(rate: float) -> None:
    seconds = 200 if rate < 10 else 5
    _, steps = play("BTCUSDT", rate, seconds)
    trades = sum(len(step.fills) for step in steps)
    assert 0.8 * rate * seconds < trades < 1.2 * rate * seconds
    times = [step.time_us for step in steps]
    assert times == sorted(times)


def test_prices_and_sizes_stand_on_the_grid() -> None:
    facts = instrument("SOLUSDT")
    _, steps = play("SOLUSDT", 20)
    for step in steps:
        for price, quantity in [*step.fills, *(change[1:] for change in step.changes)]:
            assert price % facts.tick == 0
            assert quantity % facts.step == 0


def test_any_symbol_can_be_traded_and_is_the_same_each_time() -> None:
    facts = instrument("WHATEVERUSDC")
    assert facts == instrument("WHATEVERUSDC")
    assert (facts.base, facts.quote) == ("WHATEVER", "USDC")
    assert facts.price % facts.tick == 0
    assert isinstance(next(Market(facts, 1, 1).levels()), Change)
