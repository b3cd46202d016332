import random

from sluice.simulator import tape as tapes
from sluice.simulator.market import Change
from sluice.simulator.tape import BookLog, Tape, Trade, top


def test_the_book_at_every_update_id_is_what_it_was(monkeypatch) -> None:  # noqa: ANN001 - pytest
    monkeypatch.setattr(tapes, "CHECKPOINT_CHANGES", 50)
    monkeypatch.setattr(tapes, "MAX_CHANGES", 600)
    draw = random.Random(1)
    log = BookLog()
    log.load(
        100, [Change(is_bid=True, price=9, quantity=1), Change(is_bid=False, price=11, quantity=2)]
    )
    history = {100: (dict(log.bids), dict(log.asks))}
    for update_id in range(101, 1101):
        price = draw.randrange(1, 20)
        log.apply(update_id, [Change(price < 10, price, draw.choice([0, 1, 2, 3]))])
        history[update_id] = (dict(log.bids), dict(log.asks))
        assert log.best == (max(log.bids, default=None), min(log.asks, default=None))
    oldest = log.oldest.update_id
    assert 100 < oldest <= 550
    assert log.at(oldest - 1) is None
    for update_id in range(oldest, 1101):
        assert log.at(update_id) == (update_id, *history[update_id])


def test_a_book_between_two_diffs_is_the_one_of_the_earlier() -> None:
    log = BookLog()
    log.load(10, [])
    log.apply(15, [Change(is_bid=True, price=1, quantity=1)])
    log.apply(20, [Change(is_bid=True, price=1, quantity=2)])
    assert log.at(14) == (10, {}, {})
    assert log.at(19) == (15, {1: 1}, {})
    assert log.at(99) == (20, {1: 2}, {})


def test_the_best_levels_come_first() -> None:
    levels = {price: price * 10 for price in range(1, 100)}
    assert top(levels, 2, is_bid=True) == [(99, 990), (98, 980)]
    assert top(levels, 2, is_bid=False) == [(1, 10), (2, 20)]
    assert len(top(levels, 1000, is_bid=True)) == 99


def trade(trade_id: int, price: int = 5, maker: bool = False) -> Trade:  # noqa: FBT001, FBT002 - a trade's side
    return Trade(trade_id, price, 10, 1_000 + trade_id, maker)


def test_trades_are_found_by_id() -> None:
    tape = Tape("X")
    for trade_id in (3, 4, 7):
        tape.trade(trade(trade_id), order=trade_id)
    assert tape.trades.get(4) == trade(4)
    assert tape.trades.get(5) is None
    assert [row.id for row in tape.trades.since(4)] == [4, 7]
    assert [row.id for row in tape.trades.before(7, 1)] == [4]
    assert [row.id for row in tape.trades.newest(2)] == [4, 7]
    assert (tape.trades.first_id, tape.trades.last_id) == (3, 7)


def test_fills_of_one_order_at_one_price_are_one_aggregate() -> None:
    tape = Tape("X")
    completed = [
        tape.trade(trade(1), order=1),
        tape.trade(trade(2), order=1),
        tape.trade(trade(3, price=6), order=1),
        tape.trade(trade(4, price=6), order=2),
        tape.close_aggregate(),
    ]
    spans = [(row.first_id, row.last_id, row.quantity) for row in completed if row]
    assert spans == [(1, 2, 20), (3, 3, 10), (4, 4, 10)]
    assert [row.id for row in tape.aggs] == list(range(tape.aggs[0].id, tape.aggs[0].id + 3))
    assert tape.close_aggregate() is None


def test_bars_asked_for_late_are_made_from_the_trades() -> None:
    tape = Tape("X")
    for trade_id in range(5):
        tape.trade(trade(trade_id), order=trade_id)
    early = tape.series("1s")
    late = Tape("X")
    late.series("1s")
    for trade_id in range(5):
        late.trade(trade(trade_id), order=trade_id)
    assert list(early.since(0)) == list(late.series("1s").since(0))
