"""One connection to one table: a batch a transaction, and the rows it refuses set apart."""

import asyncio
from collections.abc import Iterable
from typing import Final, Self

import asyncpg

from flusher.errors import Verdict, judge, refused_line
from flusher.markets import MarketName, Markets
from flusher.tables import Table
from sluice import failpoints
from sluice.connections import connect_postgres
from sluice.settings import Settings

MOST_BLAMED: Final = 20
"""How often a batch is cut where COPY stumbled: beyond it most lines are bad, and halves do."""
COMMAND_SECONDS: Final = 30.0
_SESSION: Final = {
    "application_name": "sluice-flusher",
    "statement_timeout": "30s",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "60s",
}
# An acknowledged row must survive a power cut; a stricter value than `on` is left as it is.
_BE_DURABLE: Final = """
SELECT set_config('synchronous_commit', 'on', false)
WHERE current_setting('synchronous_commit') = 'off'
"""


class Writer:
    """Writes lines into a table over a connection of its own, which ends with the first doubt.

    Raises what asyncpg raises. After anything but a refused row the connection is not to be used
    again: close it and open another.
    """

    def __init__(self, connection: asyncpg.Connection, table: Table) -> None:
        self.markets = Markets(connection)
        self._connection = connection
        self._table = table
        self._turn = asyncio.Lock()  # a batch is prepared while another is written

    @classmethod
    async def open(cls, settings: Settings, table: Table) -> Self:
        """Connect, and make the temporary table."""
        connection = await connect_postgres(
            settings, command_timeout=COMMAND_SECONDS, server_settings=_SESSION
        )
        try:
            await connection.execute(_BE_DURABLE)
            await connection.execute(table.create_staging)
        except BaseException:
            connection.terminate()
            raise
        return cls(connection, table)

    def close(self) -> None:
        """Cut the connection without a word: the server may be frozen."""
        self._connection.terminate()

    async def learn(self, names: Iterable[MarketName]) -> None:
        """Make sure that every market has an id."""
        if missing := self.markets.unknown(names):
            async with self._turn:
                await self.markets.learn(missing)

    async def write(self, data: bytes) -> tuple[int, dict[int, str]]:
        """Write the lines; gives how many rows were new, and the reason of each refused line."""
        async with self._turn:
            try:
                return await self._transaction(data), {}
            except Exception as error:
                if judge(error) is not Verdict.REJECTED:
                    raise
            return await self._sift(data.splitlines(keepends=True))

    async def _sift(self, lines: list[bytes]) -> tuple[int, dict[int, str]]:
        """Write what can be written, in parts, until every refused line stands alone."""
        new = 0
        refused: dict[int, str] = {}
        parts = [range(len(lines))]
        blamed = 0
        while parts:
            part = parts.pop()
            try:
                new += await self._transaction(b"".join(lines[part.start : part.stop]))
                continue
            except Exception as error:
                if judge(error) is not Verdict.REJECTED:
                    raise
                if len(part) == 1:
                    refused[part.start] = f"{type(error).__name__}: {error}"[:500]
                    continue
                index = refused_line(error)
            if index is not None and index < len(part) and blamed < MOST_BLAMED:
                blamed += 1
                cuts = (part[:index], part[index : index + 1], part[index + 1 :])
            else:
                middle = len(part) // 2
                cuts = (part[:middle], part[middle:], part[:0])
            parts += [cut for cut in reversed(cuts) if cut]
        return new, refused

    async def _transaction(self, data: bytes) -> int:
        # BEGIN and COMMIT by hand: asyncpg's transaction rolls back when it is cancelled, and
        # waits for a frozen server to answer that.
        connection = self._connection
        await connection.execute("BEGIN")
        await failpoints.reach("flusher.begun")
        try:
            await connection.copy_to_table(
                self._table.staging,
                # A memoryview: asyncpg takes bytes for the name of a file.
                source=memoryview(data),  # type: ignore[arg-type]  # the stubs do not know it
                columns=self._table.column_names,
                null=self._table.null,
            )
            await failpoints.reach("flusher.copied")
            status = await connection.execute(self._table.insert)
            await failpoints.reach("flusher.inserted")
            await connection.execute("COMMIT")
        except Exception as error:
            if judge(error) is Verdict.REJECTED:
                await connection.execute("ROLLBACK")
            raise
        await failpoints.reach("flusher.committed")
        return int(status.rsplit(" ", 1)[1])
