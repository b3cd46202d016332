"""From the items of a claim to the lines of a COPY and the letters of the dead: no I/O here."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from operator import not_
from typing import Final

import msgspec

from flusher.markets import MarketName
from flusher.tables import Table
from sluice import records
from sluice.queue import Claim
from sluice.records import Record, RejectedRecordError, TooNewError, is_name

NOT_A_NUMBER: Final = "a number with characters that no decimal has"


@dataclass(frozen=True, slots=True)
class Batch:
    """A claim as far as it could be read: records and refusals by their place in it."""

    claim: Claim
    records: dict[int, Record]
    refused: dict[int, str]
    markets: set[MarketName]
    """The markets that the records are of."""


def read(kind: str, claim: Claim) -> Batch:
    """Read the items; a record of a newer version ends the batch before it.

    Raises:
        TooNewError: it is the first one.
    """
    whole = records.decode_many(kind, claim.items)
    if whole is None:
        claim, found, refused = _read_singly(kind, claim)
    else:
        found, refused = dict(enumerate(whole)), {}
    markets = {(record.exchange, record.symbol) for record in found.values()}
    nameless = {name for name in markets if not (is_name(name[0]) and is_name(name[1]))}
    if nameless:
        for place, record in list(found.items()):
            if (record.exchange, record.symbol) in nameless:
                del found[place]
                refused[place] = "no name of a market"
    return Batch(claim, found, refused, markets - nameless)


def _read_singly(kind: str, claim: Claim) -> tuple[Claim, dict[int, Record], dict[int, str]]:
    found: dict[int, Record] = {}
    refused: dict[int, str] = {}
    for place, item in enumerate(claim.items):
        try:
            found[place] = records.decode(kind, item)
        except RejectedRecordError as error:
            refused[place] = f"no {kind}: {error}"
        except TooNewError:
            if place == 0:
                raise
            return Claim(claim.head, claim.items[:place]), found, refused
    return claim, found, refused


@dataclass(frozen=True, slots=True)
class Lines:
    """What COPY takes: the text of all rows, and of each row its place in the claim."""

    data: bytes
    places: list[int]
    refused: dict[int, str]


def lines_of(batch: Batch, table: Table, ids: Mapping[MarketName, int]) -> Lines:
    """Write the records as lines, those left out whose text COPY would read as something else."""
    line = table.line
    lines = [line(record, ids[record.exchange, record.symbol]) for record in batch.records.values()]
    places = list(batch.records)
    data = "".join(lines).encode()
    if table.is_clean(data, len(lines)):
        return Lines(data, places, batch.refused)
    clean = [table.is_clean(text.encode(), 1) for text in lines]
    refused = dict.fromkeys(compress(places, map(not_, clean)), NOT_A_NUMBER)
    return Lines(
        "".join(compress(lines, clean)).encode(),
        list(compress(places, clean)),
        batch.refused | refused,
    )


def letter(queue: str, item: bytes, reason: str, ts_dead: int) -> bytes:
    """Write a dead letter, a JSON object: `queue`, `reason`, `time` (microseconds) and the bytes.

    These are in `raw` where they are text, else in `raw_base64`.
    """
    content = {"queue": queue, "reason": reason, "time": ts_dead}
    try:
        content["raw"] = item.decode()
    except UnicodeDecodeError:
        content["raw_base64"] = base64.b64encode(item).decode()
    return msgspec.json.encode(content)
