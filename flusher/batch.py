"""From the items of a claim to the lines of a COPY and the letters of the dead: no I/O here."""

import base64
from dataclasses import dataclass
from typing import Final

import msgspec

from flusher.markets import MarketName, Markets
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

    @property
    def markets(self) -> set[MarketName]:
        """The markets that the records are of."""
        return {(record.exchange, record.symbol) for record in self.records.values()}


def read(kind: str, claim: Claim) -> Batch:
    """Read the items; a record of a newer version ends the batch before it.

    Raises:
        TooNewError: it is the first one.
    """
    whole = records.decode_many(kind, claim.items)
    batch = _read_singly(kind, claim) if whole is None else Batch(claim, dict(enumerate(whole)), {})
    nameless = {name for name in batch.markets if not (is_name(name[0]) and is_name(name[1]))}
    if nameless:
        for place, record in list(batch.records.items()):
            if (record.exchange, record.symbol) in nameless:
                del batch.records[place]
                batch.refused[place] = "no name of a market"
    return batch


def _read_singly(kind: str, claim: Claim) -> Batch:
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
            return Batch(Claim(claim.head, claim.items[:place]), found, refused)
    return Batch(claim, found, refused)


@dataclass(frozen=True, slots=True)
class Lines:
    """What COPY takes: the text of all rows, and of each row its place in the claim."""

    data: bytes
    places: list[int]
    refused: dict[int, str]


def lines_of(batch: Batch, table: Table, markets: Markets) -> Lines:
    """Write the records as lines, those left out whose text COPY would read as something else."""
    line = table.line
    lines = {
        place: line(record, markets[record.exchange, record.symbol])
        for place, record in batch.records.items()
    }
    data = "".join(lines.values()).encode()
    if table.is_clean(data, len(lines)):
        return Lines(data, list(lines), batch.refused)
    clean = {place: text for place, text in lines.items() if table.is_clean(text.encode(), 1)}
    refused = batch.refused | dict.fromkeys(lines.keys() - clean.keys(), NOT_A_NUMBER)
    return Lines("".join(clean.values()).encode(), list(clean), refused)


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
