"""A trade id that leaps is believed once a second one bears it out.

One well-formed but wrong id, say 2**52, would move the market's head there and open a hole of as
many ids, to be asked for for ever. So an id more than MOST_LEAP above the highest one known waits
for another trade near it. A wrong one is refuted by the next trade of the market, and goes to the
bad frames. Nothing is lost by it: what was rightly there is missed by its id and fetched.
"""

from typing import Final

from sluice.records import Trade
from sluice.settings import Market

MOST_LEAP: Final = 1_000_000
"""What the busiest market trades in some hours; a socket is seldom away for longer."""
MOST_FIRST: Final = 10**11
"""The highest id at which a record may begin: some ten times that of the busiest market."""


class Plausibility:
    """The highest id believed of each market, and the trade that is doubted."""

    def __init__(self) -> None:
        self._highest: dict[Market, int] = {}
        self._doubted: dict[Market, Trade] = {}

    def admit(self, trade: Trade) -> tuple[list[Trade], Trade | None]:
        """Give the trades to believe now, in order, and the one that this trade refutes."""
        market = Market(trade.exchange, trade.symbol)
        doubted = self._doubted.pop(market, None)
        if trade.trade_id <= self._highest.get(market, MOST_FIRST - MOST_LEAP) + MOST_LEAP:
            self._highest[market] = max(trade.trade_id, self._highest.get(market, 0))
            return [trade], doubted
        if doubted is None:
            self._doubted[market] = trade
            return [], None
        if abs(trade.trade_id - doubted.trade_id) > MOST_LEAP:
            self._doubted[market] = trade
            return [], doubted
        self._highest[market] = max(trade.trade_id, doubted.trade_id)
        return [doubted, trade], None
