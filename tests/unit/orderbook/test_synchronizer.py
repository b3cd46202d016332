import msgspec
import pytest

from orderbook.synchronizer import BookSynchronizer, Continuity, Outcome, State
from sluice.exchanges.base import Depth, DepthImage

Levels = list[tuple[str, str]]


def diff(
    first: int,
    last: int,
    *,
    after: int | None = None,
    bids: Levels | None = None,
    asks: Levels | None = None,
) -> Depth:
    return Depth("S", first, last, after, last * 1000, last * 1000 + 5, bids or [], asks or [])


def image(
    update_id: int, bids: Levels | None = None, asks: Levels | None = None, limit: int = 100
) -> DepthImage:
    return DepthImage("S", update_id, bids or [], asks or [], None, limit)


def link(previous: int, last: int, bids: Levels | None = None) -> Depth:
    return diff(last, last, after=previous, bids=bids)


def live(continuity: Continuity = "contiguous", at: int = 100) -> BookSynchronizer:
    sync = BookSynchronizer(continuity)
    assert sync.on_depth(diff(at, at, after=at - 1)) is Outcome.IMAGE_NEEDED
    assert sync.on_image(image(at, [("10", "1")], [("11", "1")])) is Outcome.LIVE
    return sync


def test_the_worked_example_of_the_venue() -> None:
    sync = BookSynchronizer("contiguous")
    assert sync.on_depth(diff(149, 150, bids=[("9", "9")])) is Outcome.IMAGE_NEEDED
    assert sync.on_depth(diff(151, 155)) is Outcome.BUFFERED
    assert sync.on_depth(diff(156, 158, bids=[("10", "2")])) is Outcome.BUFFERED
    assert sync.on_depth(diff(159, 159)) is Outcome.BUFFERED
    assert sync.on_depth(diff(159, 159)) is Outcome.IGNORED
    assert sync.on_image(image(157, [("10", "1")])) is Outcome.LIVE
    assert sync.update_id == 159
    assert sync.book.top(5) == ([("10", "2")], [])
    assert sync.on_depth(diff(161, 165)) is Outcome.GAP
    assert sync.state is State.WAITING_FOR_IMAGE
    assert sync.book.levels == (0, 0)


@pytest.mark.parametrize(
    ("at", "outcome"),
    [(147, Outcome.IMAGE_TOO_OLD), (148, Outcome.LIVE), (149, Outcome.LIVE), (150, Outcome.LIVE)],
)
def test_an_image_has_to_reach_the_first_change(at: int, outcome: Outcome) -> None:
    sync = BookSynchronizer("contiguous")
    sync.on_depth(diff(149, 150))
    assert sync.on_image(image(at)) is outcome
    assert sync.is_live is (outcome is Outcome.LIVE)
    assert sync.state is (State.LIVE if sync.is_live else State.WAITING_FOR_IMAGE)


def test_after_an_image_that_was_too_old_a_newer_one_will_do() -> None:
    sync = BookSynchronizer("contiguous")
    sync.on_depth(diff(149, 150))
    assert sync.on_image(image(100)) is Outcome.IMAGE_TOO_OLD
    assert sync.on_depth(diff(151, 152)) is Outcome.BUFFERED
    assert sync.on_image(image(149)) is Outcome.LIVE
    assert sync.update_id == 152


def test_an_image_newer_than_all_changes_waits_for_those_it_holds() -> None:
    sync = BookSynchronizer("contiguous")
    sync.on_depth(diff(149, 150))
    assert sync.on_image(image(155, [("10", "1")])) is Outcome.LIVE
    assert (sync.update_id, sync.ts_event, sync.ts_recv) == (155, 150_000, 150_005)
    assert sync.on_depth(diff(151, 153, bids=[("10", "9")])) is Outcome.IGNORED
    assert sync.on_depth(diff(154, 157, bids=[("10", "2")])) is Outcome.APPLIED
    assert (sync.update_id, sync.ts_event, sync.ts_recv) == (157, 157_000, 157_005)
    assert sync.book.best_bid == ("10", "2")


def test_an_image_newer_than_all_changes_does_not_hide_a_gap() -> None:
    sync = BookSynchronizer("contiguous")
    sync.on_depth(diff(149, 150))
    sync.on_image(image(155))
    assert sync.on_depth(diff(157, 158)) is Outcome.GAP


def test_an_empty_change_moves_the_id_on() -> None:
    sync = live()
    assert sync.on_depth(diff(101, 103)) is Outcome.APPLIED
    assert sync.on_depth(diff(104, 104)) is Outcome.APPLIED
    assert sync.update_id == 104


def test_deleting_a_level_that_is_not_held_is_normal() -> None:
    sync = live()
    assert sync.on_depth(diff(101, 101, bids=[("1", "0.000")])) is Outcome.APPLIED
    assert sync.book.levels == (1, 1)


@pytest.mark.parametrize("at", [99, 100])
def test_a_change_that_is_known_is_ignored(at: int) -> None:
    sync = live()
    assert sync.on_depth(diff(99, at, bids=[("10", "7")])) is Outcome.IGNORED
    assert sync.book.best_bid == ("10", "1")


def test_changes_out_of_order_are_a_gap_and_then_nothing_new() -> None:
    sync = live()
    assert sync.on_depth(diff(102, 102)) is Outcome.GAP
    assert sync.on_depth(diff(101, 101)) is Outcome.IGNORED
    assert sync.on_depth(diff(103, 103)) is Outcome.BUFFERED
    assert sync.on_image(image(102, [("10", "3")])) is Outcome.LIVE
    assert sync.update_id == 103


def test_a_gap_among_changes_that_wait_needs_an_image_from_after_it() -> None:
    sync = BookSynchronizer("contiguous")
    sync.on_depth(diff(10, 10))
    assert sync.on_depth(diff(12, 12)) is Outcome.BUFFERED
    assert sync.on_image(image(10)) is Outcome.IMAGE_TOO_OLD
    assert sync.on_image(image(11)) is Outcome.LIVE


def test_a_book_that_crosses_is_emptied_and_asks_for_an_image() -> None:
    sync = live()
    assert sync.on_depth(diff(101, 101, bids=[("11", "1")])) is Outcome.CROSSED
    assert sync.book.top(5) == ([], [])
    assert sync.on_image(image(101, [("10", "1")], [("12", "1")])) is Outcome.LIVE


def test_an_image_that_is_crossed_is_not_used() -> None:
    sync = BookSynchronizer("contiguous")
    sync.on_depth(diff(10, 10))
    assert sync.on_image(image(10, [("11", "1")], [("11", "1")])) is Outcome.CROSSED
    assert not sync.is_live
    assert sync.book.levels == (0, 0)
    assert sync.on_image(image(10, [("10", "1")], [("11", "1")])) is Outcome.LIVE


def test_changes_that_cross_an_image_stay_for_the_next_one() -> None:
    sync = BookSynchronizer("contiguous")
    sync.on_depth(diff(10, 10))
    sync.on_depth(diff(11, 11, bids=[("11", "1")]))
    sync.on_depth(diff(12, 12))
    assert sync.on_image(image(10, [], [("11", "1")])) is Outcome.CROSSED
    assert sync.on_image(image(10, [], [("12", "1")])) is Outcome.LIVE
    assert sync.update_id == 12


def test_a_lost_connection_empties_the_book_and_an_image_asked_for_before_is_not_used() -> None:
    sync = live()
    sync.on_disconnect()
    assert sync.state is State.WAITING_FOR_DIFF
    assert sync.book.levels == (0, 0)
    assert sync.on_image(image(101)) is Outcome.IGNORED
    assert sync.on_depth(diff(101, 101)) is Outcome.IMAGE_NEEDED


def test_an_image_that_nobody_asked_for_is_ignored() -> None:
    sync = live()
    assert sync.on_image(image(100, [("1", "1")])) is Outcome.IGNORED
    assert sync.book.best_bid == ("10", "1")


def test_each_sync_has_a_higher_id_which_is_a_time() -> None:
    sync = BookSynchronizer("contiguous")
    sync.on_depth(diff(10, 10))
    first = sync.sync_id
    assert first == 10_005
    sync.on_image(image(10))
    assert sync.on_depth(diff(11, 11)) is Outcome.APPLIED
    assert sync.sync_id == first
    sync.on_depth(diff(20, 20))
    second = sync.sync_id
    assert second == 20_005
    sync.on_disconnect()
    # The clock has gone back.
    sync.on_depth(diff(15, 15))
    assert sync.sync_id == second + 1


def test_what_waits_is_bounded_and_the_newest_stays() -> None:
    sync = BookSynchronizer("contiguous", max_buffered=10)
    for at in range(1, 101):
        sync.on_depth(diff(at, at, bids=[("1", "1")]))
    # Of changes with one level each, five are kept: the book can do with an image from 95 on.
    assert sync.on_image(image(94)) is Outcome.IMAGE_TOO_OLD
    assert sync.on_image(image(95)) is Outcome.LIVE
    assert sync.update_id == 100
    sync.on_disconnect()
    sync.on_depth(diff(101, 101, bids=[("1", "1")] * 99))
    assert sync.on_image(image(100)) is Outcome.LIVE


def test_what_waits_is_no_older_than_half_a_minute() -> None:
    sync = BookSynchronizer("contiguous")
    for at in range(1, 101):
        sync.on_depth(msgspec.structs.replace(diff(at, at), ts_recv=at * 1_000_000))
    assert sync.buffered == 31
    assert sync.on_image(image(68)) is Outcome.IMAGE_TOO_OLD
    assert sync.on_image(image(69)) is Outcome.LIVE


def test_each_change_is_announced_while_the_book_still_stands_before_it() -> None:
    seen: list[tuple[int, int, bool]] = []
    sync = BookSynchronizer(
        "contiguous",
        before_event=lambda depth: seen.append(
            (depth.last_update_id, sync.update_id, sync.is_live)
        ),
    )
    sync.on_depth(diff(1, 1))
    sync.on_depth(diff(2, 2))
    sync.on_depth(diff(3, 3))
    sync.on_image(image(1))
    sync.on_depth(diff(3, 3))
    sync.on_depth(diff(4, 4))
    sync.on_depth(diff(6, 6))
    assert seen == [(2, 1, True), (3, 2, True), (4, 3, True)]


def test_the_worked_example_of_a_chain_with_holes() -> None:
    sync = BookSynchronizer("chained")
    assert sync.on_depth(diff(93, 101, after=90)) is Outcome.IMAGE_NEEDED
    assert sync.on_depth(diff(107, 120, after=101, bids=[("10", "9")])) is Outcome.BUFFERED
    assert sync.on_image(image(120, [("10", "1")])) is Outcome.LIVE
    assert sync.update_id == 120
    assert sync.book.best_bid == ("10", "1")
    assert sync.on_depth(diff(131, 140, after=120)) is Outcome.APPLIED
    assert sync.on_depth(diff(155, 160, after=140)) is Outcome.APPLIED
    assert sync.on_depth(diff(170, 171, after=160)) is Outcome.APPLIED
    assert sync.on_depth(diff(170, 171, after=160)) is Outcome.IGNORED
    assert sync.on_depth(diff(190, 199, after=185)) is Outcome.GAP


def test_an_image_between_two_changes_of_a_chain_joins_the_second() -> None:
    sync = BookSynchronizer("chained")
    sync.on_depth(diff(107, 120, after=101))
    sync.on_depth(diff(131, 140, after=120))
    assert sync.on_image(image(125)) is Outcome.LIVE
    assert sync.update_id == 140


def test_an_image_between_two_changes_of_a_chain_joins_the_one_to_come() -> None:
    sync = BookSynchronizer("chained")
    sync.on_depth(diff(107, 120, after=101))
    assert sync.on_image(image(125)) is Outcome.LIVE
    assert sync.on_depth(diff(131, 140, after=120)) is Outcome.APPLIED
    # Once joined, only equality continues the chain.
    assert sync.on_depth(diff(150, 160, after=139)) is Outcome.GAP


def test_an_image_from_before_the_first_change_of_a_chain_is_too_old() -> None:
    sync = BookSynchronizer("chained")
    sync.on_depth(diff(107, 120, after=101))
    assert sync.on_image(image(100)) is Outcome.IMAGE_TOO_OLD
    assert sync.on_image(image(101)) is Outcome.LIVE


def test_a_change_of_a_chain_that_does_not_name_its_predecessor_is_a_gap() -> None:
    sync = live("chained")
    assert sync.on_depth(diff(101, 101)) is Outcome.GAP


def test_a_streamed_image_needs_no_change_before_it() -> None:
    sync = BookSynchronizer("streamed")
    assert sync.on_image(image(100, [("10", "1")])) is Outcome.LIVE
    # Legal at OKX: a heartbeat, and a chain whose ids fall.
    for previous, last in ((100, 107), (107, 107), (107, 112), (112, 31), (31, 35), (35, 35)):
        assert sync.on_depth(link(previous, last)) is Outcome.APPLIED
    assert sync.on_depth(link(31, 35, [("10", "9")])) is Outcome.IGNORED
    assert sync.on_depth(link(38, 40)) is Outcome.GAP
    assert sync.book.levels == (0, 0)


def test_a_streamed_image_replaces_everything_and_what_came_before_it() -> None:
    sync = BookSynchronizer("streamed")
    sync.on_image(image(500, [("10", "1")]))
    first = sync.sync_id
    sync.on_depth(link(533, 540))
    sync.on_depth(link(540, 544, [("9", "9")]))
    assert sync.on_image(image(539, [("8", "1")])) is Outcome.LIVE
    assert sync.sync_id > first
    assert sync.book.top(5) == ([("8", "1")], [])
    assert sync.on_depth(link(539, 551)) is Outcome.APPLIED
    second = sync.sync_id
    assert sync.on_image(image(20, [("7", "1")])) is Outcome.LIVE
    assert sync.sync_id > second
    assert sync.on_depth(link(20, 21)) is Outcome.APPLIED
    assert sync.book.best_bid == ("7", "1")


def test_a_renewal_makes_a_shallow_book_deep_again_while_it_stays_live() -> None:
    sync = BookSynchronizer("contiguous")
    sync.on_depth(diff(1, 1))
    sync.on_image(image(1, [("10", "1"), ("9", "1")], [("11", "1"), ("12", "1")], limit=2))
    sync.on_depth(diff(2, 2, bids=[("10", "0")]))
    assert sync.book.trusted_depth == 1
    sync_id = sync.sync_id
    sync.renew()
    assert sync.is_renewing
    assert sync.on_depth(diff(3, 3, bids=[("9.5", "2")])) is Outcome.APPLIED
    assert sync.on_image(image(1, [("9", "1")], [("11", "1")], limit=2)) is Outcome.IMAGE_TOO_OLD
    assert sync.on_depth(diff(4, 4, asks=[("11", "2")])) is Outcome.APPLIED
    deeper = image(3, [("9.5", "2"), ("9", "1"), ("8", "1")], [("11", "1"), ("12", "1")], limit=3)
    assert sync.on_image(deeper) is Outcome.RENEWED
    assert sync.is_live
    assert not sync.is_renewing
    assert (sync.update_id, sync.sync_id) == (4, sync_id)
    assert sync.book.trusted_depth == 3
    assert sync.book.top(5) == (
        [("9.5", "2"), ("9", "1"), ("8", "1")],
        [("11", "2"), ("12", "1")],
    )


def test_a_renewal_waits_for_the_changes_that_its_image_is_ahead_of() -> None:
    sync = live()
    sync.renew()
    ahead = image(102, [("10", "2"), ("9", "1")], [("11", "1")])
    assert sync.on_image(ahead) is Outcome.BUFFERED
    assert sync.on_depth(diff(101, 101, bids=[("10", "2")])) is Outcome.APPLIED
    assert sync.on_depth(diff(102, 103, bids=[("9", "1"), ("10", "3")])) is Outcome.RENEWED
    assert sync.book.top(5) == ([("10", "3"), ("9", "1")], [("11", "1")])


def test_a_renewal_is_not_done_with_an_image_from_before_it() -> None:
    sync = live()
    sync.on_depth(diff(101, 101, bids=[("10", "2")]))
    sync.renew()
    old = image(100, [("10", "1")], [("11", "1")])
    assert sync.on_image(old) is Outcome.IMAGE_TOO_OLD
    assert sync.is_live
    assert sync.book.best_bid == ("10", "2")


def test_a_renewal_that_shows_another_book_ends_the_sync() -> None:
    sync = live()
    sync.renew()
    sync.on_depth(diff(101, 101))
    assert sync.on_image(image(101, [("10", "5")], [("11", "1")])) is Outcome.DIFFERED
    assert not sync.is_live
    assert sync.book.levels == (0, 0)
    assert sync.on_image(image(101, [("10", "5")], [("11", "1")])) is Outcome.LIVE


def test_a_gap_ends_a_renewal_too() -> None:
    sync = live()
    sync.renew()
    assert sync.on_depth(diff(103, 103)) is Outcome.GAP
    assert not sync.is_renewing
