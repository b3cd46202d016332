"""How a recording is shown: a live screen, a line for logs, a summary at the end."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sluice.cli.observer import MarketState, QueueState, Sample
from sluice.presence import Presence


def screen(sample: Sample, title: str, hint: str = "") -> RenderableType:
    """Draw everything: a line a market, a queue and a process, and what was committed."""
    markets = _table("market", "last", "change", "trades/s", "bid", "ask", "bps", "book")
    for state in sample.markets:
        markets.add_row(*_market_cells(state))
    queues = _table("queue", "depth", "oldest", "dead")
    for queue in sample.queues:
        queues.add_row(*_queue_cells(queue))
    foot = Text(
        f"{sample.committed:,} rows committed, {sample.rows_per_second:,.1f} rows/s"
        f"   {_clock(sample.seconds)}   {hint}"
    )
    processes = _table("process", "pid", "up", "state")
    for presence in sample.processes:
        processes.add_row(*_process_cells(presence))
    parts: list[RenderableType] = [Text(title, style="bold"), markets, Text(), queues, Text()]
    if sample.processes:
        parts += [processes, Text()]
    parts.append(foot)
    if sample.problem:
        parts.append(Text(sample.problem, style="bold red"))
    return Group(*parts)


def status_line(sample: Sample) -> str:
    """Say the same in one line, for a log."""
    if sample.problem:
        return f"{_clock(sample.seconds)}  {sample.problem}"
    live = sum(state.book == "live" for state in sample.markets)
    trades = sum(state.trades_per_second for state in sample.markets)
    queued = ", ".join(f"{queue.kind} {queue.depth}" for queue in sample.queues if queue.depth)
    dead = sum(queue.dead for queue in sample.queues)
    return (
        f"{_clock(sample.seconds)}  {sample.committed} rows committed, "
        f"{sample.rows_per_second:.1f} rows/s; {trades:.1f} trades/s; "
        f"{live} of {len(sample.markets)} books live; queued: {queued or 'nothing'}"
        + (f"; dead: {dead}" if dead else "")
    )


def summary(rows: Sequence[Mapping[str, Any]], depths: Mapping[str, int]) -> RenderableType:
    """Draw what the database holds of the run, and what is left in the queues."""
    table = _table("market", "trades", "first", "last", "missing", "snapshots", "klines")
    for row in rows:
        times = (row["first_time"], row["last_time"])
        table.add_row(
            row["market"],
            str(row["trades"]),
            *(f"{time:%H:%M:%S.%f}"[:-3] if time else "" for time in times),
            "" if row["missing"] is None else str(row["missing"]),
            str(row["snapshots"]),
            str(row["klines"]),
        )
    queues = ", ".join(f"{kind} {depth}" for kind, depth in depths.items())
    return Group(table, Text(f"left in the queues: {queues}"))


def _table(*names: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(names):
        is_text = number == 0 or name in {"book", "state"}
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    return table


def _market_cells(state: MarketState) -> tuple[RenderableType, ...]:
    change = Text()
    if state.change is not None:
        style = "green" if state.change > 0 else "red" if state.change < 0 else ""
        change = Text(f"{state.change:+.3%}", style=style)
    return (
        str(state.market),
        _number(state.price),
        change,
        f"{state.trades_per_second:.1f}",
        _number(state.bid),
        _number(state.ask),
        "" if state.spread_bps is None else f"{state.spread_bps:.3f}",
        Text(state.book, style="green" if state.book == "live" else "yellow"),
    )


def _queue_cells(state: QueueState) -> tuple[str, ...]:
    age = "" if state.age is None else f"{state.age:.1f} s"
    return (state.kind, f"{state.depth:,}", age, f"{state.dead:,}")


def _process_cells(presence: Presence) -> tuple[RenderableType, ...]:
    waits_for = "; ".join(presence.waits_for)
    facts = ", ".join(f"{name} {fact}" for name, fact in presence.facts.items())
    return (
        presence.name,
        str(presence.pid),
        _clock(presence.told - presence.started),
        Text(f"waits for {waits_for}", style="yellow") if waits_for else Text(facts),
    )


def _number(value: Decimal | None) -> str:
    return "" if value is None else f"{value.normalize():f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest:02}"
