"""Which socket of a venue carries which symbols, and how that changes while they run."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from loguru import logger

from sluice.settings import Market
from sluice.stream import Stream, split

CARRIED_SECONDS: Final = 30.0
"""How long what is new may take to be subscribed to before what is dropped goes all the same."""
POLL_SECONDS: Final = 0.05
OVERLAP_SECONDS: Final = 1.0
"""How long a symbol that moves is carried by both sockets: the venue confirms within this."""

Channels = Callable[[Sequence[str]], list[str]]
"""Names all channels of some symbols."""


def spread(held: Sequence[Sequence[str]], wanted: Sequence[str], size: int) -> list[list[str]]:
    """Divide symbols over sockets: who has a place keeps it, the others fill what is free.

    Gives the symbols of each socket held, none where it is not needed, then those of new ones.
    """
    waiting = dict.fromkeys(wanted)
    parts = []
    for symbols in held:
        kept = [symbol for symbol in symbols if symbol in waiting][:size]
        parts.append(kept)
        for symbol in kept:
            del waiting[symbol]
    new = list(waiting)
    for part in parts:
        free = size - len(part)
        part.extend(new[:free])
        del new[:free]
    return parts + split(new, size)


class Sockets:
    """The running sockets of a process, each with a stop of its own."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self._running: dict[Stream, tuple[asyncio.Event, asyncio.Task[None]]] = {}

    def open(self, stream: Stream) -> None:
        """Have a stream opened and kept open."""
        stop = asyncio.Event()
        self._running[stream] = (stop, self._tasks.create_task(stream.run(stop)))

    async def close(self, *streams: Stream) -> None:
        """Close streams and wait until what they brought is read."""
        closing = [self._running.pop(stream) for stream in streams]
        for stop, _ in closing:
            stop.set()
        if closing:
            await asyncio.wait([task for _, task in closing])

    async def close_all(self) -> None:
        """Close whatever is open."""
        await self.close(*self._running)

    async def rearrange(
        self,
        held: Mapping[Stream, Sequence[str]],
        wanted: Sequence[str],
        size: int,
        channels: Channels,
        make: Callable[[list[str]], Stream],
    ) -> dict[Stream, list[str]]:
        """Have a venue's sockets, `held`, carry other symbols or other channels of them.

        What is new is subscribed to, on sockets that `make` makes where there is no room, before
        anything is dropped. Gives what each socket carries now.
        """
        parts = spread(list(held.values()), wanted, size)
        streams = [*held, *map(make, parts[len(held) :])]
        added = []
        for stream, part in zip(streams, parts, strict=True):
            both = list(dict.fromkeys([*stream.channels, *channels(part)]))
            if stream not in held:
                self.open(stream)
                added.append(stream)
            elif len(both) > len(stream.channels) and stream.has_room_for(both):
                stream.carry(both)
                added.append(stream)
        is_any_dropped = any(
            set(now) - set(after) for now, after in zip(held.values(), parts, strict=False)
        )
        if added and is_any_dropped:
            await _until_carried(added)
        for stream, part in zip(streams, parts, strict=True):
            if not part:
                await self.close(stream)
            elif set(stream.channels) != set(channels(part)):
                stream.carry(channels(part))
        return {stream: part for stream, part in zip(streams, parts, strict=True) if part}


async def _until_carried(streams: Sequence[Stream]) -> None:
    until = time.monotonic() + CARRIED_SECONDS
    # Looked at again and again: each of them may lose its socket meanwhile.
    while not all(stream.is_carrying for stream in streams):
        if time.monotonic() > until:
            return
        await asyncio.sleep(POLL_SECONDS)
    await asyncio.sleep(OVERLAP_SECONDS)


def tell_markets(process: str, before: set[Market], after: set[Market]) -> None:
    """Log which markets new settings have added and removed."""
    changes = [
        f"{word} {', '.join(map(str, sorted(markets)))}"
        for word, markets in (("added", after - before), ("removed", before - after))
        if markets
    ]
    logger.info("{}: {}; {} markets now", process, "; ".join(changes) or "the same", len(after))
