"""What `sluice maintain` plans from what it finds: no server, both editions."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sluice.cli.maintain import Found, LateDay, Step, plan
from sluice.settings import HYPERTABLES, LEAST_TRADE_DAYS, Settings

NOW = datetime(2026, 11, 28, 0, 30, tzinfo=UTC)
TODAY = datetime(2026, 11, 28, tzinfo=UTC)
DAY = timedelta(days=1)
REFRESH = ("policy_refresh_continuous_aggregate", "candles_1m")
RETAIN = ("policy_retention", "trades")
FOUND = Found(
    now=NOW,
    is_community=False,
    late=[],
    kept_until=TODAY - DAY,
    has_trades=True,
    chunk_intervals=dict.fromkeys(HYPERTABLES, DAY),
    chunk_ends={name: [TODAY - days * DAY for days in range(20, -2, -1)] for name in HYPERTABLES},
    policies={},
)
COMMUNITY = replace(
    FOUND,
    is_community=True,
    kept_until=None,
    policies={
        **{("policy_compression", name): (1, 7 * DAY) for name in HYPERTABLES},
        REFRESH: (7, None),
    },
)


def _plan(found: Found, **settings: Any) -> list[Step]:
    return list(plan(found, Settings.model_construct(**settings)))


def _arguments(step: Step) -> list[tuple[Any, ...]]:
    return [arguments for _, arguments in step.statements]


def test_with_nothing_late_and_nothing_set_there_is_nothing_to_do() -> None:
    assert _plan(FOUND) == []
    assert _plan(COMMUNITY) == []


def test_a_day_is_closed_an_hour_after_its_end() -> None:
    assert _plan(replace(FOUND, now=NOW + timedelta(minutes=29))) == []

    (step,) = _plan(replace(FOUND, now=NOW + timedelta(minutes=30)))

    assert (step.what, step.detail) == (
        "candles of closed days",
        "from 2026-11-27 to before 2026-11-28",
    )


def test_late_candles_come_first_and_drops_last() -> None:
    late = [LateDay(TODAY - 9 * DAY, TODAY - 9 * DAY, [1], [4, 5])]
    found = replace(FOUND, late=late, kept_until=None)

    steps = _plan(found, retention_days={"trades": 3}, chunk_interval={"trades": DAY / 2})

    assert [step.what for step in steps] == [
        "candles of late trades",
        "chunk interval",
        "candles of closed days",
        "drop",
    ]
    assert _arguments(steps[0]) == [(late[0].from_time, late[0].to_time, [1]), ([4, 5],)]
    assert steps[-1].detail == "18 chunks, all before 2026-11-25 00:00"
    assert _arguments(steps[-1]) == [("trades", TODAY - 3 * DAY)]


def test_only_chunks_that_are_wholly_too_old_are_dropped() -> None:
    found = replace(FOUND, chunk_ends={"klines": [TODAY - 5 * DAY, TODAY - 4 * DAY + DAY / 2]})

    (step,) = _plan(found, retention_days={"klines": 4})
    assert step.detail.startswith("1 chunks")

    assert _plan(found, retention_days={"klines": 6}) == []


def _refresh_and_drop(steps: list[Step], start: Any, drop: Any) -> tuple[Any, Any]:
    """Follow what the steps make of the two policies of trades."""
    for step in steps:
        for statement, arguments in step.statements:
            if "alter_job" in statement and arguments[1] == "start_offset":
                start = arguments[2]
            elif "alter_job" in statement and arguments[1] == "drop_after":
                drop = arguments[2]
            elif "add_retention_policy" in statement and arguments[0] == "trades":
                drop = arguments[1]
            elif "remove_retention_policy" in statement and arguments[0] == "trades":
                drop = None
    return start, drop


_days = st.none() | st.integers(LEAST_TRADE_DAYS, 40)


@given(start=_days, drop=st.none() | st.integers(1, 40), wanted=_days)
def test_a_refresh_always_starts_after_what_is_dropped(
    start: int | None, drop: int | None, wanted: int | None
) -> None:
    there = (start * DAY if start else None, drop * DAY if drop else None)
    policies = {**COMMUNITY.policies, REFRESH: (7, there[0])}
    if drop:
        policies[RETAIN] = (8, there[1])
    found = replace(COMMUNITY, policies=policies)

    steps = _plan(found, retention_days={"trades": wanted} if wanted else {})

    assert all(step.is_atomic for step in steps if step.what == "retention")
    start_offset, drop_after = _refresh_and_drop(steps, *there)
    assert drop_after == (wanted * DAY if wanted else None)
    assert start_offset == (drop_after - DAY if drop_after else None)
    # All that is about to be dropped has its candles first.
    drops_more = wanted is not None and (drop is None or wanted < drop)
    assert ("candles of all days" in [step.what for step in steps]) == drops_more
    if drops_more:
        assert steps[0].what == "candles of all days"


def test_the_columnstore_follows_its_setting() -> None:
    missing = {key: job for key, job in COMMUNITY.policies.items() if key[1] != "klines"}
    found = replace(COMMUNITY, policies=missing)

    steps = _plan(found, columnstore_after_days=3)

    assert [step.table for step in steps] == list(HYPERTABLES)
    assert [step.detail for step in steps] == [
        "after 3d" if name == "klines" else "after 3d, was 7d" for name in HYPERTABLES
    ]
