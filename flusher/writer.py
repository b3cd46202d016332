"""One connection to one table: a batch a transaction, and the rows it refuses set apart."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final, Self

import asyncpg
from loguru import logger

from flusher.errors import Verdict, judge, refused_line
from flusher.markets import MarketName, Markets
from flusher.tables import Table
from sluice import failpoints
from sluice.connections import connect_postgres
from sluice.settings import Settings

MOST_BLAMED: Final = 20
"""How often a batch is cut where COPY stumbled: beyond it most lines are bad, and halves do."""
COMMAND_SECONDS: Final = 30.0
SILENCE_SECONDS: Final = 2.0
"""How long a statement may take before the server is asked whether it is still at work."""
_SESSION: Final = {
    "application_name": "sluice-flusher",
    "statement_timeout": "30s",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "60s",
}
_IS_AT_WORK: Final = """
SELECT EXISTS (
    SELECT FROM pg_stat_activity WHERE pid = $1 AND (
        coalesce(state, '') NOT LIKE 'idle%'
        OR state_change > clock_timestamp() - $2 * interval '1 second'
    )
)
"""
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

    def __init__(
        self, connection: asyncpg.Connection, pid: int, settings: Settings, table: Table
    ) -> None:
        self.markets = Markets(connection)
        self._connection = connection
        self._pid = pid
        self._settings = settings
        self._table = table
        self._turn = asyncio.Lock()  # a batch is prepared while another is written

    @classmethod
    async def open(cls, settings: Settings, table: Table) -> Self:
        """Connect, and make the temporary table."""
        connection = await connect_postgres(
            settings, command_timeout=COMMAND_SECONDS, server_settings=_SESSION
        )
        await failpoints.reach("writer.connected")
        try:
            await connection.execute(_BE_DURABLE)
            await failpoints.reach("writer.made_durable")
            await connection.execute(table.create_staging)
            await failpoints.reach("writer.staged")
            # As the server calls it: what the handshake tells may be a pooler's.
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            await failpoints.reach("writer.identified")
        except BaseException:
            connection.terminate()
            raise
        return cls(connection, pid, settings, table)

    def close(self) -> None:
        """Cut the connection without a word: the server may be frozen."""
        self._connection.terminate()

    async def learn(self, names: Iterable[MarketName]) -> None:
        """Make sure that every market has an id."""
        if missing := self.markets.unknown(names):
            async with self._turn, self._watched():
                await self.markets.learn(missing)

    async def write(self, data: bytes) -> tuple[int, dict[int, str]]:
        """Write the lines; gives how many rows were new, and the reason of each refused line."""
        async with self._turn, self._watched():
            try:
                return await self._transaction(data), {}
            except Exception as error:
                if judge(error) is not Verdict.REJECTED:
                    raise
            return await self._sift(data.splitlines(keepends=True))

    @asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        """Cut the connection when an answer was lost: what waits for it fails at once.

        A statement may be slow, so no time tells; the server is asked.
        """
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        while await self._is_at_work():
            pass
        logger.warning("{}: an answer of PostgreSQL was lost on its way", self._table.name)
        self._connection.terminate()

    async def _is_at_work(self) -> bool:
        """Tell, after a while, whether the server still does what it was asked, so far as known."""
        await asyncio.sleep(SILENCE_SECONDS)
        try:
            connection = await connect_postgres(
                self._settings, command_timeout=COMMAND_SECONDS, server_settings=_SESSION
            )
            await failpoints.reach("writer.watch_connected")
            try:
                answer: bool = await connection.fetchval(
                    _IS_AT_WORK, self._pid, SILENCE_SECONDS / 2
                )
                await failpoints.reach("writer.watch_answered")
            finally:
                connection.terminate()
        except Exception:  # noqa: BLE001  # whoever can not be asked; a statement has its time limit
            return True
        return answer

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
            await failpoints.reach("flusher.committed")
        except Exception as error:
            if judge(error) is Verdict.REJECTED:
                await connection.execute("ROLLBACK")
                await failpoints.reach("writer.rolled_back")
            raise
        return int(status.rsplit(" ", 1)[1])
