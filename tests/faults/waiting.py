"""Waiting for an outcome instead of for a time."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable

CEILING = 60.0
"""Seconds after which an outcome will not come: far above what a busy machine needs."""


async def eventually(
    is_so: Callable[[], bool | Awaitable[bool]], *, within: float = CEILING, pause: float = 0.02
) -> None:
    """Wait until the condition holds.

    Raises:
        AssertionError: it does not hold after `within` seconds.
    """
    deadline = asyncio.get_running_loop().time() + within
    while True:
        answer = is_so()
        if await answer if inspect.isawaitable(answer) else answer:
            return
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"not so after {within:g} s: {inspect.getsource(is_so).strip()}")
        await asyncio.sleep(pause)
