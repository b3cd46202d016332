"""What a keeper makes of its book: rows, latest tops, windows and wishes, and nothing untrue."""

import socket
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from orderbook.images import ImageQueue
from orderbook.keeper import BookKeeper, Outlets
from orderbook.latest import LatestBooks
from sluice.budget import Budget, Priority
from sluice.coverage import Coverage, Return
from sluice.exchanges import EXCHANGES
from sluice.exchanges.base import Depth, DepthImage
from sluice.publisher import Publisher
from sluice.records import BookAudit, OrderbookSnapshot, Record
from sluice.rest import RestClient
from sluice.settings import Market, Settings

VENUE = EXCHANGES["simulator"]
MARKET = Market("simulator", "BTCUSDT")
SECOND = 1_000_000
START = 1_790_000_000 * SECOND


class NotedImages(ImageQueue):
    """Notes what is wanted; nothing is fetched."""

    wanted: list[Priority]

    def want(self, symbol: str, priority: Priority) -> None:
        assert symbol == "BTCUSDT"
        self.wanted.append(priority)

    def forget(self, symbol: str) -> None:
        assert symbol == "BTCUSDT"
        self.wanted.clear()

    def want_newer(self, symbol: str, priority: Priority) -> None:
        self.want(symbol, priority)


class NotedLatest(LatestBooks):
    """Notes which syncs are taken back."""

    lost_syncs: list[int]

    def lost(self, market: Market, sync_id: int) -> None:
        assert market == MARKET
        self.lost_syncs.append(sync_id)


class NotedCoverage(Coverage):
    """Notes when the book was live again."""

    returns: list[Return]

    def returned(self, back: Return) -> None:
        self.returns.append(back)


class NotedPublisher(Publisher):
    """Notes the records; nothing is pushed."""

    records: list[Record]

    def put(self, record: Record) -> None:
        self.records.append(record)


class Rig:
    """A keeper whose outlets are noted."""

    def __init__(self, redis: Redis) -> None:
        settings = Settings.model_validate({"snapshot_depth": 2})
        self.publisher = NotedPublisher(redis, settings)
        self.publisher.records = []
        self.client = RestClient(VENUE, settings, Budget(redis, VENUE))
        self.images = NotedImages(
            VENUE, self.client, 100, deliver=lambda _: None, activity=lambda _: 0
        )
        self.images.wanted = []
        self.latest = NotedLatest(redis, lambda _: self.keeper.latest(), is_published=False)
        self.latest.lost_syncs = []
        self.coverage = NotedCoverage(redis)
        self.coverage.returns = []
        outlets = Outlets(self.publisher, self.latest, self.coverage, self.images)
        self.keeper = BookKeeper(MARKET, "contiguous", settings, outlets)

    @property
    def rows(self) -> list[OrderbookSnapshot]:
        return [
            record for record in self.publisher.records if isinstance(record, OrderbookSnapshot)
        ]

    @property
    def audits(self) -> list[BookAudit]:
        return [record for record in self.publisher.records if isinstance(record, BookAudit)]

    def change(self, first: int, last: int, ms: int, bid: str = "1", ask: str = "1") -> None:
        """A change `ms` after the start that sets the sizes of the best bid and ask."""
        ts = START + ms * 1000
        self.keeper.on_depth(
            Depth("BTCUSDT", first, last, None, ts, ts + 5000, [("100", bid)], [("101", ask)])
        )

    def image(self, update_id: int, bids: int = 3) -> None:
        levels = [(str(100 - below), "7") for below in range(bids)]
        self.keeper.on_image(DepthImage("BTCUSDT", update_id, levels, [("101", "7")], None, 100))


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    # Nothing is asked of Redis here; the port refuses, should it be.
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        redis = Redis(port=holder.getsockname()[1])
        rig = Rig(redis)
        yield rig
        await rig.client.close()
        await redis.aclose()


def test_the_first_change_asks_for_an_image(rig: Rig) -> None:
    rig.change(1, 5, 0)
    assert rig.images.wanted == [Priority.IMAGE]
    assert not rig.keeper.is_live
    assert rig.keeper.latest() is None
    assert "waiting_for_image" in rig.keeper.summary()


def test_a_row_is_the_book_before_the_change_that_passes_its_instant(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(3)
    rig.change(6, 8, 900, bid="2")
    rig.change(9, 9, 1100, bid="3")
    assert [(row.ts_grid, row.update_id, row.bids) for row in rig.rows] == [
        (START + SECOND, 8, [("100", "2"), ("99", "7")])
    ]
    row = rig.rows[0]
    assert row.ts_event == START + 900_000
    assert row.ts_recv == START + 905_000
    assert row.sync_id == START + 105_000


def test_no_row_is_made_over_a_hole(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(3)
    rig.change(7, 8, 1100)
    rig.keeper.flush_idle(START + 10 * SECOND)
    assert rig.rows == []
    assert rig.keeper.latest() is None
    assert rig.keeper.resyncs == 1


def test_a_hole_is_a_window_from_the_last_change_to_the_first_one_after(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(3)
    held = rig.keeper.latest()
    assert held is not None
    rig.change(7, 8, 300)
    assert rig.latest.lost_syncs == [held.sync_id]
    rig.image(7)
    start, back = rig.coverage.returns
    assert (start.ts_live, start.ts_lost) == (START + 100_000, None)
    assert (back.ts_live, back.ts_lost) == (START + 300_000, START + 100_000)
    assert back.cause == "a change is missing"
    after = rig.keeper.latest()
    assert after is not None
    assert after.sync_id > held.sync_id


def test_an_image_newer_than_all_changes_waits_for_the_next_to_say_when_it_is(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(9)
    assert rig.keeper.is_live
    assert rig.coverage.returns == []
    rig.change(6, 10, 400)
    assert [back.ts_live for back in rig.coverage.returns] == [START + 400_000]


def test_a_disconnect_loses_the_book_once(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(3)
    rig.keeper.on_disconnect("closed 1001")
    rig.keeper.on_disconnect("not connected")
    assert len(rig.latest.lost_syncs) == 1
    rig.change(20, 21, 900)
    rig.image(20)
    assert rig.coverage.returns[-1].ts_lost == START + 100_000
    assert rig.coverage.returns[-1].cause == "disconnected: closed 1001"


def test_an_image_that_is_too_old_is_asked_for_again(rig: Rig) -> None:
    rig.change(10, 15, 100)
    rig.image(3)
    assert not rig.keeper.is_live
    assert rig.images.wanted == [Priority.IMAGE, Priority.IMAGE]


def test_a_crossed_book_is_never_shown(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(3)
    depth = Depth("BTCUSDT", 6, 6, None, START + 200_000, START, [("101", "1")], [])
    rig.keeper.on_depth(depth)
    assert rig.keeper.latest() is None
    rig.keeper.flush_idle(START + 10 * SECOND)
    assert rig.rows == []


def test_a_quiet_book_has_rows_all_the_same(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(3)
    rig.keeper.flush_idle(START + 5 * SECOND)
    assert [row.ts_grid for row in rig.rows] == [START + n * SECOND for n in (1, 2, 3)]


def test_a_shallow_book_is_renewed_and_stays_live(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(3, bids=100)
    rig.keeper.renew_if_shallow(image_limit=100)
    assert rig.images.wanted == [Priority.IMAGE]
    for update, below in enumerate(range(70), start=6):
        depth = Depth(
            "BTCUSDT",
            update,
            update,
            None,
            START + update * 1000,
            START,
            [(str(100 - below), "0")],
            [],
        )
        rig.keeper.on_depth(depth)
    rig.keeper.renew_if_shallow(image_limit=100)
    rig.keeper.renew_if_shallow(image_limit=100)
    assert rig.keeper.is_live
    assert rig.images.wanted == [Priority.IMAGE, Priority.IMAGE]


def test_an_audit_that_agrees_is_counted(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(3)
    rig.keeper.audit()
    rig.change(6, 6, 200, bid="7", ask="7")
    rig.image(6)
    assert (rig.keeper.confirmed, rig.keeper.contradicted) == (1, 0)
    assert rig.keeper.is_live
    # Three bids and one ask.
    assert rig.audits == [BookAudit("simulator", "BTCUSDT", START + 200_000, 6, 4, 0)]


def test_an_audit_that_differs_ends_the_sync(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(3)
    rig.keeper.audit()
    rig.change(6, 6, 200, bid="8")
    rig.image(6)
    assert (rig.keeper.confirmed, rig.keeper.contradicted) == (0, 1)
    assert rig.audits == [BookAudit("simulator", "BTCUSDT", START + 200_000, 6, 4, 2)]
    assert not rig.keeper.is_live
    assert len(rig.latest.lost_syncs) == 1


def test_a_lost_book_goes_before_those_that_begin(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(3)
    rig.change(9, 9, 200)
    assert rig.images.wanted == [Priority.IMAGE, Priority.LIVE_IMAGE]


def test_an_idle_book_keeps_what_is_read_and_is_renewed_at_its_next_change(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(3, bids=50)
    held = rig.keeper.latest()
    assert rig.keeper.levels == 51
    rig.keeper.cut_if_idle(START)
    assert rig.keeper.levels == 51
    rig.images.wanted.clear()
    for _ in range(2):
        rig.keeper.cut_if_idle(START + SECOND)
        rig.keeper.renew_if_shallow(image_limit=100)
        # 20 are published, and one ask is all there is.
        assert (rig.keeper.levels, rig.keeper.is_live) == (21, True)
        assert rig.keeper.latest() == held
    assert rig.images.wanted == []
    rig.change(6, 6, 2000, bid="8")
    rig.keeper.cut_if_idle(START + SECOND)
    rig.keeper.renew_if_shallow(image_limit=100)
    assert rig.images.wanted == [Priority.IMAGE]
    rig.change(7, 7, 2100, bid="7", ask="7")
    rig.image(7, bids=50)
    assert (rig.keeper.levels, rig.keeper.contradicted) == (51, 0)
    assert rig.coverage.returns[1:] == []


def test_a_book_without_memory_is_taken_back_and_its_window_named_when_it_returns(rig: Rig) -> None:
    rig.change(1, 5, 100)
    rig.image(3)
    rig.keeper.drop("no memory")
    assert (rig.keeper.is_live, rig.keeper.held, rig.keeper.latest()) == (False, 0, None)
    assert len(rig.latest.lost_syncs) == 1
    rig.change(6, 8, 900)
    assert (rig.keeper.held, rig.keeper.changes, rig.images.wanted) == (0, 2, [])
    assert "dropped" in rig.keeper.summary()
    rig.keeper.take_up()
    rig.change(9, 9, 1500)
    rig.image(8)
    back = rig.coverage.returns[-1]
    assert (back.ts_lost, back.ts_live) == (START + 100_000, START + 1_500_000)
    assert back.cause == "no memory"
