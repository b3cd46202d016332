"""From the items of a claim to the lines of a COPY and the letters of the dead: no I/O here."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import itemgetter, not_
from typing import Final

import msgspec

from flusher.markets import MarketName
from flusher.tables import Table
from sluice import records
from sluice.queue import Claim
from sluice.records import RejectedRecordError, Row, TooNewError, is_name

NOT_A_NUMBER: Final = "a number with characters that no decimal has"
_name = itemgetter(slice(2))
"""Exchange and symbol, with which every row begins."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A claim as far as it could be read: rows with their places in it, and refusals by place."""

    claim: Claim
    rows: list[Row]
    places: Sequence[int]
    names: list[MarketName]
    """The market of each row."""
    refused: dict[int, str]


def read(kind: str, claim: Claim) -> Batch:
    """Read the items; a record of a newer version ends the batch before it.

    Raises:
        TooNewError: it is the first one.
    """
    rows = records.decode_rows(kind, claim.items)
    batch = (
        _read_singly(kind, claim)
        if rows is None
        else Batch(claim, rows, range(len(rows)), list(map(_name, rows)), {})
    )
    nameless = {name for name in set(batch.names) if not all(map(is_name, name))}
    if not nameless:
        return batch
    fits = [name not in nameless for name in batch.names]
    refused = dict.fromkeys(compress(batch.places, map(not_, fits)), "no name of a market")
    return Batch(
        batch.claim,
        list(compress(batch.rows, fits)),
        list(compress(batch.places, fits)),
        list(compress(batch.names, fits)),
        batch.refused | refused,
    )


def _read_singly(kind: str, claim: Claim) -> Batch:
    found: dict[int, Row] = {}
    refused: dict[int, str] = {}
    for place, item in enumerate(claim.items):
        try:
            found[place] = records.decode_row(kind, item)
        except RejectedRecordError as error:
            refused[place] = f"no {kind}: {error}"
        except TooNewError:
            if place == 0:
                raise
            claim = Claim(claim.head, claim.items[:place])
            break
    return Batch(
        claim, list(found.values()), list(found), list(map(_name, found.values())), refused
    )


@dataclass(frozen=True, slots=True)
class Lines:
    """What COPY takes: the text of all rows, and of each row its place in the claim."""

    data: bytes
    places: Sequence[int]
    refused: dict[int, str]


def lines_of(batch: Batch, table: Table, ids: Mapping[MarketName, int]) -> Lines:
    """Write the rows as lines, those left out whose text COPY would read as something else."""
    market_ids = list(map(ids.__getitem__, batch.names))
    data = table.lines(market_ids, batch.rows)
    if data is not None:
        return Lines(data, batch.places, batch.refused)
    found: list[bytes] = []
    places: list[int] = []
    refused = dict(batch.refused)
    for market_id, row, place in zip(market_ids, batch.rows, batch.places, strict=True):
        line = table.lines([market_id], [row])
        if line is None:
            refused[place] = NOT_A_NUMBER
        else:
            found.append(line)
            places.append(place)
    return Lines(b"".join(found), places, refused)


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
