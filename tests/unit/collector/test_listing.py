"""What is said of a market that the venue does not list, or has halted."""

import pytest

from collector.listing import remark
from sluice.exchanges.base import Instrument
from sluice.settings import Market

LISTED = {
    name: Instrument(name, is_trading) for name, is_trading in (("BTCUSDT", True), ("OLD", False))
}


@pytest.mark.parametrize(
    ("symbol", "level", "said"),
    [
        ("BTCUSTD", "ERROR", "binance:BTCUSTD: binance lists no such market (did you mean BTCUSDT"),
        ("WHATEVER", "ERROR", "no such market; nothing is recorded of it"),
        ("OLD", "WARNING", "binance:OLD: binance has halted it"),
    ],
)
def test_a_market_that_will_be_silent_is_named(symbol: str, level: str, said: str) -> None:
    told = remark(Market("binance", symbol), LISTED)
    assert told is not None
    assert told[0] == level
    assert said in told[1]


def test_a_market_that_trades_is_not_spoken_of() -> None:
    assert remark(Market("binance", "BTCUSDT"), LISTED) is None
