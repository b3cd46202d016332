"""Named places where a test can make a process die, fail or hang.

There is one beside every await in which data waits for a server, a socket or the disk.

`SLUICE_FAILPOINT=flusher.committed:3:kill` acts the third time that place is reached: `kill` (the
default) sends SIGKILL to the process, `raise` raises, `hang` waits for ever. It says so on standard
error first. It is refused unless SLUICE_TESTING=1. Without it a place costs one comparison.
"""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast

POINTS: Final = frozenset(
    {
        "publisher.taken",
        "publisher.pushed",
        "publisher.spool_opened",
        "publisher.spooled",
        "publisher.spool_closed",
        "publisher.spool_read",
        "publisher.returned",
        "publisher.spool_removed",
        "publisher.spools_adopted",
        "publisher.redis_asked",
        "publisher.heads_read",
        "publisher.holes_pushed",
        "publisher.frames_kept",
        "publisher.frames_trimmed",
        "stream.pinged",
        "stream.connected",
        "stream.subscribed",
        "stream.frame_read",
        "stream.asked",
        "stream.closed",
        "rest.answered",
        "rest.part_read",
        "budget.reported",
        "budget.asked",
        "anchors.firsts_read",
        "anchors.connected",
        "anchors.gaps_known",
        "anchors.gaps_stored",
        "anchors.orphan_read",
        "anchors.explained_read",
        "anchors.missing_read",
        "anchors.table_asked",
        "anchors.anchored",
        "backfill.leasing",
        "backfill.released",
        "backfill.work_counted",
        "backfill.page_read",
        "backfill.held_told",
        "backfill.page_pushed",
        "candles.windows_read",
        "candles.leased",
        "candles.filled_read",
        "candles.gap_pushed",
        "candles.gap_kept",
        "candles.absence_pushed",
        "candles.filled_noted",
        "candles.end_pushed",
        "candles.gap_closed",
        "candles.filled_forgotten",
        "publisher.queues_measured",
        "anchors.windows_known",
        "anchors.windows_clear",
        "anchors.windows_stored",
        "anchors.window_adopted",
        "leases.shared",
        "leases.released",
        "leases.holders_read",
        "leases.dead_forgotten",
        "publisher.queues_found",
        "publisher.shed_noted",
        "candles.page_read",
        "candles.page_pushed",
        "ledger.holes_asked",
        "ledger.gaps_read",
        "ledger.time_read",
        "ledger.gap_explained",
        "ledger.holes_explained",
        "ledger.holes_reopened",
        "ledger.gap_adopted",
        "ledger.gap_kept",
        "ledger.gap_closed",
        "ledger.gap_pushed",
        "backfill.lease_extended",
        "aggregates.ends_connected",
        "aggregates.market_read",
        "aggregates.ends_read",
        "aggregates.middle_read",
        "aggregates.rows_connected",
        "aggregates.rows_read",
        "polling.head_read",
        "liveness.head_read",
        "liveness.hole_pushed",
        "flusher.counted",
        "flusher.claimed",
        "flusher.markets_known",
        "flusher.acking",
        "flusher.acked",
        "writer.connected",
        "writer.made_durable",
        "writer.staged",
        "flusher.begun",
        "flusher.copied",
        "flusher.inserted",
        "writer.identified",
        "writer.watch_connected",
        "writer.watch_answered",
        "writer.rolled_back",
        "flusher.committed",
        "markets.read",
        "markets.assigned",
        "markets.read_again",
        "latest.deleted",
        "latest.written",
        "coverage.noted",
        "coverage.windows_kept",
        "coverage.windows_pushed",
        "coverage.read",
    }
)
"""Every place there is; tests fail on an await without one, and on one that no process dies at."""


class FailpointError(Exception):
    """What `raise` raises: no part of the product knows it, like a bug."""


@dataclass(slots=True)
class _Armed:
    name: str
    left: int
    action: Literal["kill", "raise", "hang"]


def _arm(environment: Mapping[str, str]) -> _Armed | None:
    text = environment.get("SLUICE_FAILPOINT", "")
    if not text:
        return None
    found = re.fullmatch(r"([a-z_.]+):([1-9][0-9]*)(?::(kill|raise|hang))?", text)
    if environment.get("SLUICE_TESTING") != "1":
        raise ValueError("SLUICE_FAILPOINT: refused, because SLUICE_TESTING is not 1")
    if found is None or found[1] not in POINTS:
        raise ValueError(
            f"SLUICE_FAILPOINT: {text!r} is not name:nth[:kill|raise|hang] with a name of "
            + ", ".join(sorted(POINTS))
        )
    action = cast("Literal['kill', 'raise', 'hang']", found[3] or "kill")
    return _Armed(found[1], int(found[2]), action)


_armed: _Armed | None = None


def arm(environment: Mapping[str, str] = os.environ) -> None:
    """Read the variable; raises ValueError where it is refused."""
    global _armed  # noqa: PLW0603  # one a process, set once at its start
    _armed = _arm(environment)


async def reach(name: str) -> None:
    """Come by a place."""
    if _armed is None or _armed.name != name:
        return
    _armed.left -= 1
    if _armed.left != 0:
        return
    sys.stderr.write(f"failpoint {name}: {_armed.action}\n")
    sys.stderr.flush()
    if _armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if _armed.action == "raise":
        raise FailpointError(name)
    await asyncio.Event().wait()
