"""The ids of markets: assigned once, in a short transaction of their own, before any batch."""

from collections.abc import Iterable
from typing import Final

import asyncpg

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
    """Ids by name; what is cached was read back after COMMIT."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._ids: dict[MarketName, int] = {}

    @property
    def ids(self) -> dict[MarketName, int]:
        """The ids known so far."""
        return self._ids

    def forget(self) -> None:
        """Drop the cache: the server may be another one, or restored from a copy."""
        self._ids = {}

    async def learn(self, names: Iterable[MarketName]) -> None:
        """Make sure that every name has an id; raises what asyncpg raises."""
        # Sorted, so that two flushers never wait for each other in a circle.
        missing = sorted(set(names) - self._ids.keys())
        if not missing:
            return
        exchanges = [exchange for exchange, _ in missing]
        symbols = [symbol for _, symbol in missing]
        kinds = [
            EXCHANGES[exchange].id_kind if exchange in EXCHANGES else "opaque"
            for exchange in exchanges
        ]
        async with self._pool.acquire(timeout=10) as connection:
            known = await connection.fetch(_READ, exchanges, symbols)
            if len(known) < len(missing):
                # An insert that conflicts takes a number from the sequence all the same.
                await connection.execute(_ASSIGN, exchanges, symbols, kinds)
                known = await connection.fetch(_READ, exchanges, symbols)
        self._ids |= {(row["exchange"], row["symbol"]): row["market_id"] for row in known}
