"""Which awaits of the data path have no failpoint beside them, read from the source.

An await that hands over to a coroutine of ours is followed there. One that only waits for time, for
an event or for a task of ours holds nothing that a server, a socket or the disk could lose. Every
other await needs a failpoint of its own as the statement before or after it.
"""

import ast
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
APART: Final = {
    "sluice/cli": "commands of the operator; no data passes through them",
    "sluice/simulator": "the exchange, not ours",
    "sluice/queue.py": "one command of Redis each; every caller names its own await",
    "sluice/connections.py": "as above",
    "sluice/fitness.py": "before there is any data",
    "sluice/lifecycle.py": "runs the service, holds no data",
    "sluice/metrics.py": "pages for a monitor",
    "sluice/failpoints.py": "the places themselves",
    "sluice/presence.py": "what `sluice status` shows, no data",
    "sluice/schema.py": "the operator's migrations",
    "sluice/replay.py": "a recording, which is begun again where it was cut short",
    "collector/replay.py": "as above",
    "orderbook/replay.py": "as above",
    "flusher/checks.py": "before anything is claimed",
    "flusher/service.py": "as above; the drains hold the data",
}
"""Files and directories that are not in the data path, and why."""
WAITS: Final = frozenset(
    {
        "asyncio.sleep",
        "asyncio.wait",
        "asyncio.wait_for",
        "asyncio.gather",
        "asyncio.timeout",
        "asyncio.TaskGroup",
        "AsyncExitStack",
        "aclosing",
    }
)
"""They end with time or with tasks of ours, and the awaits of those are looked at themselves."""
WAITS_OF: Final = frozenset({"wait", "acquire", "aclose", "close"})
"""Methods that wait for an event or a turn, or let go of a client at the end."""
SERVERS: Final = frozenset(
    {"redis", "connection", "pipeline", "socket", "session", "queue", "holes", "asyncio"}
)
"""What is theirs by name, whatever its methods are called."""
TURNS: Final = frozenset({"self._turn", "self._redis.pipeline"})
"""A lock, and a pipeline, which is sent by its `execute`."""


def unnamed_awaits() -> list[str]:
    """Name all awaits of the data path that have no failpoint."""
    return unnamed_in(
        path
        for package in ("collector", "flusher", "orderbook", "sluice")
        for path in sorted((ROOT / package).rglob("*.py"))
        if not path.relative_to(ROOT).as_posix().startswith(tuple(APART))
    )


def unnamed_in(paths: Iterable[Path]) -> list[str]:
    """Name the awaits of some modules that have no failpoint: `file:line: what is awaited`."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    ours = {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.AsyncFunctionDef)
    }
    return [
        f"{path.name}:{line}: {what}"
        for path, tree in trees.items()
        for line, what in sorted(_unnamed(tree, ours))
    ]


def _unnamed(tree: ast.Module, ours: set[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(block, list):
                yield from _unnamed_in_block(block, ours)


def _unnamed_in_block(block: Sequence[ast.stmt], ours: set[str]) -> Iterator[tuple[int, str]]:
    taken: set[ast.stmt] = set()
    for index, statement in enumerate(block):
        foreign = list(_foreign(statement, ours))
        body = getattr(statement, "body", None)
        after = [body[0]] if isinstance(body, list) else []
        beside = [*after, *block[index + 1 : index + 2], *block[max(index - 1, 0) : index]]
        for found in foreign:
            place = next((each for each in beside if _is_place(each) and each not in taken), None)
            if place is None:
                yield found
            else:
                taken.add(place)


def _foreign(statement: ast.stmt, ours: set[str]) -> Iterator[tuple[int, str]]:
    """Find what a statement awaits itself, not in a block within it, of code that is not ours."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        if node is not statement and isinstance(node, ast.stmt | ast.excepthandler):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Await):
            awaited: list[ast.expr] = [node.value]
        elif isinstance(node, ast.AsyncWith):
            awaited = [item.context_expr for item in node.items]
        elif isinstance(node, ast.AsyncFor | ast.comprehension):
            is_async = isinstance(node, ast.AsyncFor) or node.is_async
            awaited = [node.iter] if is_async else []
        else:
            continue
        yield from ((each.lineno, _name(each)) for each in awaited if not _is_looked_at(each, ours))


def _is_place(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Await)
        and _name(statement.value.value) == "failpoints.reach"
    )


def _name(awaited: ast.expr) -> str:
    return ast.unparse(awaited.func if isinstance(awaited, ast.Call) else awaited)


def _is_looked_at(awaited: ast.expr, ours: set[str]) -> bool:
    """Tell whether an await needs no failpoint: it is followed elsewhere, or holds nothing."""
    name = _name(awaited)
    owner, _, last = name.rpartition(".")
    is_task = isinstance(awaited, ast.Name)
    is_theirs = owner.rpartition(".")[2].lstrip("_") in SERVERS
    return (
        is_task
        or name in WAITS | TURNS | {"failpoints.reach"}
        or last in WAITS_OF
        or (last in ours and not is_theirs)
    )
