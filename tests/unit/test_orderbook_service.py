"""How the orderbook process divides markets and chooses its images."""

from orderbook.service import image_limit, in_shard, resident_bytes
from sluice.exchanges import EXCHANGES
from sluice.settings import Market, Settings


def test_every_market_is_in_exactly_one_shard() -> None:
    markets = [Market("simulator", f"S{number}") for number in range(500)]
    shards = [{m for m in markets if in_shard(m, f"{index}/4")} for index in range(4)]
    assert sum(len(shard) for shard in shards) == 500
    assert set.union(*shards) == set(markets)
    assert min(len(shard) for shard in shards) > 80


def test_the_shard_of_a_market_does_not_depend_on_the_process() -> None:
    assert [in_shard(Market("binance", "BTCUSDT"), f"{index}/4") for index in range(4)] == [
        False,
        False,
        False,
        True,
    ]


def test_an_image_is_as_cheap_as_will_do() -> None:
    limits = {
        (depth, most): image_limit(
            EXCHANGES["binance"],
            Settings.model_validate({"snapshot_depth": depth, "book_depth": most}),
        )
        for depth, most in ((20, 5000), (20, 100), (20, 500), (100, 5000), (5000, 5000))
    }
    assert limits == {
        (20, 5000): 1000,
        (20, 100): 100,
        (20, 500): 500,
        (100, 5000): 5000,
        (5000, 5000): 5000,
    }


def test_memory_is_that_of_this_process() -> None:
    assert 10 * 2**20 < resident_bytes() < 10 * 2**30
