"""Named places where a test can make a process die, fail or hang.

`SLUICE_FAILPOINT=flusher.committed:3:kill` acts the third time that place is reached: `kill` (the
default) sends SIGKILL to the process, `raise` raises, `hang` waits for ever. It is refused unless
SLUICE_TESTING=1. Without it a place costs one comparison.
"""

import asyncio
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast

POINTS: Final = frozenset(
    {
        "publisher.taken",
        "publisher.pushed",
        "publisher.spooled",
        "publisher.returned",
        "backfill.page_read",
        "backfill.page_pushed",
        "candles.page_read",
        "candles.page_pushed",
        "ledger.gap_pushed",
        "flusher.claimed",
        "flusher.markets_known",
        "flusher.begun",
        "flusher.copied",
        "flusher.inserted",
        "flusher.committed",
        "flusher.acking",
        "flusher.acked",
    }
)
"""Every place there is; a test fails on one that no test reaches."""


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
    if _armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if _armed.action == "raise":
        raise FailpointError(name)
    await asyncio.Event().wait()
