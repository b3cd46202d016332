"""One batch, one transaction; a row that the database refuses is found and set apart."""

import asyncpg

from flusher.errors import Verdict, judge, refused_line
from flusher.tables import TABLES, Table
from sluice import failpoints

MOST_BLAMED = 20
"""How often a batch is cut where COPY stumbled: beyond it most lines are bad, and halves do."""


async def prepare(connection: asyncpg.Connection) -> None:
    """Make a connection's temporary tables; the pool calls it for each new one."""
    for table in TABLES.values():
        await connection.execute(table.create_staging)


class Writer:
    """Writes lines into tables; raises what asyncpg raises unless a row is to blame."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def write(self, table: Table, data: bytes) -> tuple[int, dict[int, str]]:
        """Write the lines; gives how many rows were new, and the reason of each refused line."""
        try:
            return await self._transaction(table, data), {}
        except Exception as error:
            if judge(error) is not Verdict.REJECTED:
                raise
        return await self._sift(table, data.splitlines(keepends=True))

    async def _sift(self, table: Table, lines: list[bytes]) -> tuple[int, dict[int, str]]:
        """Write what can be written, in parts, until every refused line stands alone."""
        new = 0
        refused: dict[int, str] = {}
        parts = [range(len(lines))]
        blamed = 0
        while parts:
            part = parts.pop()
            try:
                new += await self._transaction(table, b"".join(lines[part.start : part.stop]))
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

    async def _transaction(self, table: Table, data: bytes) -> int:
        async with self._pool.acquire(timeout=10) as connection:
            await failpoints.reach("flusher.begun")
            async with connection.transaction():
                # A memoryview: asyncpg takes bytes for the name of a file.
                await connection.copy_to_table(
                    table.staging,
                    source=memoryview(data),  # type: ignore[arg-type]  # the stubs do not know it
                    columns=[name for name, _ in table.columns],
                    null="",
                )
                await failpoints.reach("flusher.copied")
                status = await connection.execute(table.insert)
                await failpoints.reach("flusher.inserted")
        return int(status.rsplit(" ", 1)[1])
