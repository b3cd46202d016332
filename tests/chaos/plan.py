"""What happens when, drawn from a seed: the same seed and seconds give the same plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

SERVICES: Final = ("collector", "orderbook", "flusher")
MESSAGE_RATES: Final = {
    "drop": 0.01,
    "duplicate": 0.01,
    "reorder": 0.01,
    "truncate": 0.003,
    "bad_utf8": 0.003,
    "wrong_type": 0.003,
    "nan": 0.003,
    "huge": 0.001,
    "deep": 0.001,
    "binary": 0.003,
    "unknown_event": 0.003,
    "extra_fields": 0.003,
    "empty_frame": 0.003,
    "cut": 0.02,
    "rest_500": 0.05,
    "rest_html": 0.03,
    "rest_truncated": 0.03,
    "empty_page": 0.03,
    "endless_page": 0.03,
    "stale_snapshot": 0.1,
}
"""The most of each: of a message, a request, or a connection and second."""


@dataclass(frozen=True)
class Step:
    """One fault: after `pause` seconds, for `seconds`; `draw` (0 to 1) picks what it hits."""

    fault: str
    pause: float
    seconds: float
    draw: float


@dataclass(frozen=True)
class Plan:
    """A seed's whole schedule: lanes run at once, the steps of one lane one after another."""

    seed: int
    copies: Mapping[str, int]
    rates: Mapping[str, float]
    lanes: Mapping[str, Sequence[Step]]


def plan(seed: int, seconds: float, faults: Mapping[str, Sequence[str]]) -> Plan:
    """Draw the plan of a seed; `faults` are the names of each lane."""
    random = Random(seed)
    return Plan(
        seed,
        {service: random.choice((1, 1, 2)) for service in SERVICES},
        {
            kind: round(most * random.random(), 5)
            for kind, most in MESSAGE_RATES.items()
            if random.random() < 0.7
        },
        {
            # A generator each, so that a lane stays as it is when another one gets a new fault.
            lane: list(_steps(Random(f"{seed}:{lane}"), seconds, names))
            for lane, names in faults.items()
        },
    )


def _steps(random: Random, seconds: float, names: Sequence[str]) -> Iterator[Step]:
    """Draw steps until the time is full; every fault comes once before one comes again."""
    waiting: list[str] = []
    taken = 0.0
    while True:
        waiting = waiting or random.sample(names, len(names))
        step = Step(
            waiting.pop(),
            round(random.uniform(0.2, 2.0), 2),
            round(random.choice((0.2, 1.0, 1.0, 3.0)) * random.uniform(0.5, 1.5), 2),
            random.random(),
        )
        taken += step.pause + step.seconds
        if taken > seconds:
            return
        yield step
