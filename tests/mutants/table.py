"""Every mutant: what it breaks, by replacing text that stands in the code once, and who must tell.

An edit whose old text is not there, or there twice, is an error: the table is mended with the code.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True)
class Edit:
    """One replacement in one file."""

    path: str
    old: str
    new: str

    def apply(self, tree: Path) -> None:
        """Make the replacement in a tree.

        Raises:
            ValueError: the old text does not stand there exactly once.
        """
        file = tree / self.path
        text = file.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.path}: stands there {count} times: {self.old!r}")
        file.write_text(text.replace(self.old, self.new), encoding="utf-8")


@dataclass(frozen=True)
class Mutant:
    """A defect; `tests` and `keyword` are what pytest is asked to run, all of which it breaks."""

    name: str
    edits: tuple[Edit, ...]
    tests: str
    keyword: str


_QUEUE: Final = "sluice/queue.py"
_FLUSHER_FAULTS: Final = "tests/integration/test_flusher_faults.py"

MUTANTS: Final = (
    Mutant(
        "items popped before the insert",
        (
            Edit(
                _QUEUE,
                "  if #part < step then break end\nend\nreturn {position, items}",
                "  if #part < step then break end\nend\n"
                "redis.call('LTRIM', queue, #items, -1)\nreturn {position, items}",
            ),
            Edit(
                _QUEUE,
                "\n  or redis.call('LINDEX', queue, 0) ~= ARGV[3]\n"
                "  or redis.call('LINDEX', queue, count - 1) ~= ARGV[4] then",
                " then",
            ),
            Edit(_QUEUE, "redis.call('LTRIM', queue, count, -1)\n", ""),
        ),
        _FLUSHER_FAULTS,
        "crashes_is_waited_for",
    ),
    Mutant(
        "ack before COMMIT",
        (
            Edit(
                "flusher/drain.py",
                "        inserted, refused = 0, lines.refused\n",
                "        inserted, refused = 0, lines.refused\n"
                "        dead_max = self._process.settings.dead_max\n"
                "        await self.queue.ack(prepared.claim, dead_max=dead_max)\n",
            ),
            Edit(
                "flusher/drain.py",
                "        depth = await self.queue.ack(claim, letters,"
                " dead_max=self._process.settings.dead_max)\n",
                "        depth = 0\n",
            ),
        ),
        _FLUSHER_FAULTS,
        "crashes_is_waited_for",
    ),
    Mutant(
        "trim without the fence",
        (
            Edit(
                _QUEUE,
                "if redis.call('GET', head) ~= ARGV[1]\n"
                "  or redis.call('LINDEX', queue, 0) ~= ARGV[3]\n"
                "  or redis.call('LINDEX', queue, count - 1) ~= ARGV[4] then",
                "if false then",
            ),
        ),
        "tests/integration/test_queue.py",
        "of_two_acks_of_one_batch",
    ),
    Mutant(
        "fence by the counter alone",
        (
            Edit(
                _QUEUE,
                "\n  or redis.call('LINDEX', queue, 0) ~= ARGV[3]\n"
                "  or redis.call('LINDEX', queue, count - 1) ~= ARGV[4] then",
                " then",
            ),
        ),
        "tests/integration/test_queue.py",
        "is_another_one_since_the_claim",
    ),
    Mutant(
        "redis-py's own retries",
        (Edit("sluice/connections.py", "Retry(NoBackoff(), 0)", "Retry(NoBackoff(), 3)"),),
        "tests/integration/test_connections.py",
        "sent_once",
    ),
    Mutant(
        "narrow except at the batch boundary",
        (
            Edit(
                "flusher/drain.py",
                "except Exception as error:  # noqa: BLE001  # no class of error may end the drain",
                "except OSError as error:",
            ),
        ),
        _FLUSHER_FAULTS,
        "nobody_foresaw",
    ),
    Mutant(
        "no ON CONFLICT",
        (Edit("flusher/tables.py", " ON CONFLICT ({key}) DO {action}", ""),),
        "tests/integration/test_flusher.py",
        "what_comes_again_is_stored_once",
    ),
    Mutant(
        "INSERT without ORDER BY",
        (Edit("flusher/tables.py", " ORDER BY {order} ON CONFLICT", " ON CONFLICT"),),
        "tests/integration/test_writer.py",
        "never_wait_for_each_other_in_a_circle",
    ),
    Mutant(
        "a collector that does not fill from the stored head",
        (Edit("collector/anchors.py", "        await ledger.reopen(holes)\n", ""),),
        "tests/integration/test_collector.py",
        "what_the_table_lacks_below",
    ),
    Mutant(
        "head written apart from the push",
        (
            Edit(
                _QUEUE,
                "        arguments: list[str | bytes | int] = [len(segments)]\n",
                "        for segment in segments:\n"
                "            await self._redis.hset(HEADS, segment.field, str(segment.last))\n"
                "        arguments: list[str | bytes | int] = [len(segments)]\n",
            ),
        ),
        "tests/integration/test_queue.py",
        "ids_that_leave_a_hole",
    ),
    Mutant(
        "no comparison of heads after a restore of Redis",
        (Edit("sluice/publisher.py", "            await self._compare_heads()\n", ""),),
        "tests/integration/test_publisher.py",
        "comes_back_older",
    ),
    Mutant(
        "the book's sequence check off",
        (
            Edit(
                "orderbook/synchronizer.py",
                "        if not fits(depth, self.update_id):\n",
                "        if not fits(depth, self.update_id) and False:\n",
            ),
        ),
        "tests/unit/orderbook/test_faults.py",
        "no_book_in_sync_is_ever_wrong",
    ),
    Mutant(
        "dead letter swallowed",
        (
            Edit(
                "flusher/drain.py",
                "self.queue.ack(claim, letters, dead_max",
                "self.queue.ack(claim, [], dead_max",
            ),
        ),
        "tests/integration/test_flusher.py",
        "499_are_stored_and_one_is_dead",
    ),
    Mutant(
        "float prices",
        (
            Edit(
                "sluice/exchanges/binance_spot.py",
                "            first_id,\n            price,\n",
                "            first_id,\n            str(float(price)),\n",
            ),
        ),
        "tests/unit/exchanges/test_conformance.py",
        "a_frame_reads_as_expected and trade",
    ),
    Mutant(
        "float prices in the book",
        (Edit("orderbook/book.py", "self._sign * int(digits)", "self._sign * int(float(digits))"),),
        "tests/unit/orderbook/test_book.py",
        "prices_that_one_float_cannot_tell_apart",
    ),
    Mutant(
        "ids of markets kept beyond the connection",
        (
            Edit(
                "flusher/markets.py",
                "        self._ids: dict[MarketName, int] = {}\n",
                "        self._ids = _IDS\n",
            ),
            Edit("flusher/markets.py", "\nclass Markets:", "\n_IDS = {}\n\n\nclass Markets:"),
        ),
        _FLUSHER_FAULTS,
        "ids_of_markets_are_not_kept",
    ),
    Mutant(
        "a spool without sync",
        (Edit("sluice/spool.py", "PRAGMA synchronous=FULL", "PRAGMA synchronous=OFF"),),
        "tests/unit/test_spool.py",
        "synced_before_append_returns",
    ),
    Mutant(
        "what Redis refuses is dropped",
        (
            Edit(
                "sluice/publisher.py",
                "            await asyncio.to_thread(self._spool.append, batch)\n",
                "",
            ),
        ),
        "tests/integration/test_publisher.py",
        "what_redis_refuses_waits_on_the_disk",
    ),
    Mutant(
        "a short page taken for proof",
        (
            Edit(
                "collector/backfill.py",
                "    return Page(within, missing, is_last",
                "    if expected <= hole.last:\n"
                "        missing.append((expected, hole.last))\n"
                "    return Page(within, missing, is_last",
            ),
        ),
        "tests/unit/collector/test_backfill.py",
        "a_short_page_proves_nothing",
    ),
    Mutant(
        "a silent socket taken for a quiet market",
        (
            Edit(
                "sluice/stream.py",
                "        if time.monotonic() - session.last < session.silence:\n",
                "        if session.last:\n",
            ),
        ),
        "tests/integration/test_stream.py",
        "a_silent_socket_that_does_not_answer",
    ),
    Mutant(
        "a refresh of candles that starts before what is dropped",
        (
            Edit(
                "sluice/cli/maintain.py",
                "        wanted_start = wanted - DAY if wanted else None\n",
                "        wanted_start = wanted + DAY if wanted else None\n",
            ),
        ),
        "tests/unit/test_maintain.py",
        "starts_after_what_is_dropped",
    ),
    Mutant(
        "trades that are dropped before their candles are stored",
        (
            Edit(
                "sluice/cli/maintain.py",
                "    if found.has_trades and (found.kept_until is None or",
                "    if not found.has_trades and (found.kept_until is None or",
            ),
            Edit(
                "sluice/cli/maintain.py",
                "older_than => least($2::timestamptz, until)",
                "older_than => $2::timestamptz",
            ),
        ),
        "tests/integration/test_maintain.py",
        "kept_when_their_trades_are_dropped",
    ),
    Mutant(
        "late trades that nobody names",
        (
            Edit(
                "flusher/tables.py",
                'late_after="30 minutes",',
                "late_after=None,",
            ),
        ),
        "tests/integration/test_maintain.py",
        "names_where_trades_came_in_late",
    ),
)
