"""The ids of markets: assigned once, in a short transaction of their own, before any batch."""

from collections.abc import Iterable, Mapping
from typing import Final

import asyncpg

from sluice import failpoints
from sluice.exchanges import EXCHANGES

MarketName = tuple[str, str]
"""Exchange and symbol."""

_ASSIGN: Final = """
INSERT INTO markets (exchange, symbol, id_kind)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[]) ON CONFLICT (exchange, symbol) DO NOTHING
"""
_READ: Final = """
SELECT exchange, symbol, market_id FROM markets
JOIN unnest($1::text[], $2::text[]) AS wanted (exchange, symbol) USING (exchange, symbol)
"""


class Markets:
    """Ids by name, read back after COMMIT, for as long as one connection lives.

    They are not kept beyond it: the next one may lead to a server restored from a copy, where the
    same ids stand for other markets.
    """

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._ids: dict[MarketName, int] = {}

    @property
    def ids(self) -> Mapping[MarketName, int]:
        """The ids that are known."""
        return self._ids

    def unknown(self, names: Iterable[MarketName]) -> list[MarketName]:
        """Give the names that have no id yet, sorted."""
        return sorted(set(names) - self._ids.keys())

    async def learn(self, names: Iterable[MarketName]) -> None:
        """Make sure that every name has an id; raises what asyncpg raises."""
        # Sorted, so that two flushers never wait for each other in a circle.
        missing = self.unknown(names)
        if not missing:
            return
        exchanges = [exchange for exchange, _ in missing]
        symbols = [symbol for _, symbol in missing]
        kinds = [
            EXCHANGES[exchange].id_kind if exchange in EXCHANGES else "opaque"
            for exchange in exchanges
        ]
        known = await self._connection.fetch(_READ, exchanges, symbols)
        await failpoints.reach("markets.read")
        if len(known) < len(missing):
            # An insert that conflicts takes a number from the sequence all the same.
            await self._connection.execute(_ASSIGN, exchanges, symbols, kinds)
            await failpoints.reach("markets.assigned")
            known = await self._connection.fetch(_READ, exchanges, symbols)
            await failpoints.reach("markets.read_again")
        self._ids |= {(row["exchange"], row["symbol"]): row["market_id"] for row in known}
