"""The venues, one module each: what they are and how their messages read."""

from typing import Final

from sluice.exchanges.base import Exchange
from sluice.exchanges.binance_spot import BinanceSpot

EXCHANGES: Final[dict[str, Exchange]] = {
    exchange.name: exchange
    for exchange in (
        BinanceSpot("binance", "binance_spot_ws_url", "binance_spot_rest_url"),
        BinanceSpot("simulator", "simulator_ws_url", "simulator_rest_url"),
    )
}
"""Every venue by its name in `markets.exchange`."""

__all__ = ["EXCHANGES", "Exchange"]
