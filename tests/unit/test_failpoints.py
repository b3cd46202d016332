"""Places where a test makes a process die: never by accident, never unknown, free when unset."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice import failpoints
from sluice.failpoints import POINTS, FailpointError, arm, reach
from tests.acceptance.hasty import PATIENCE
from tests.acceptance.places import PLACES, UNREACHED
from tests.awaits import unnamed_awaits, unnamed_in

ROOT = Path(__file__).parents[2]
POINT, OTHER = sorted(POINTS)[:2]


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm({})


def environment(text: str, testing: str = "1") -> dict[str, str]:
    return {"SLUICE_FAILPOINT": text, "SLUICE_TESTING": testing}


async def test_nothing_happens_where_nothing_is_armed() -> None:
    arm({})
    for point in POINTS:
        await reach(point)


async def test_it_raises_at_the_nth_time_and_only_then() -> None:
    arm(environment(f"{POINT}:2:raise"))
    await reach(POINT)
    await reach(OTHER)
    with pytest.raises(FailpointError, match=POINT):
        await reach(POINT)
    await reach(POINT)


async def test_it_hangs_until_it_is_cancelled() -> None:
    arm(environment(f"{POINT}:1:hang"))
    hanging = asyncio.create_task(reach(POINT))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not hanging.done()
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


@pytest.mark.parametrize("text", [f"{POINT}:1", f"{POINT}:1:kill"])
def test_it_kills_the_process(text: str) -> None:
    program = (
        "import asyncio; from sluice.failpoints import arm, reach; arm();"
        f"asyncio.run(reach({POINT!r})); print('lives')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment(text)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b""


@pytest.mark.parametrize(
    ("text", "testing", "reason"),
    [
        (f"{POINT}:1", "", "SLUICE_TESTING"),
        (f"{POINT}:1", "yes", "SLUICE_TESTING"),
        ("no.such.place:1", "1", POINT),
        (POINT, "1", "name:nth"),
        (f"{POINT}:0", "1", "name:nth"),
        (f"{POINT}:1:explode", "1", "name:nth"),
    ],
)
def test_what_is_not_allowed_or_not_known_is_refused(text: str, testing: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        arm(environment(text, testing))


@pytest.mark.parametrize("service", ["collector", "orderbook", "flusher"])
def test_a_process_refuses_it_outside_tests_with_exit_code_2(service: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", service],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "SYMBOLS": "binance:BTCUSDT",
            **environment(f"{POINT}:1", testing=""),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("SLUICE_FAILPOINT: refused")


def test_every_place_is_in_the_code_once_and_every_place_in_the_code_is_known() -> None:
    found = [
        name
        for package in ("collector", "flusher", "orderbook", "sluice")
        for path in (ROOT / package).rglob("*.py")
        for name in re.findall(r'reach\(\s*"([a-z_.]+)"', path.read_text(encoding="utf-8"))
    ]
    assert sorted(found) == sorted(failpoints.POINTS)


def test_every_await_of_the_data_path_has_a_place_beside_it() -> None:
    assert unnamed_awaits() == []


def test_an_await_without_a_place_is_found(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "async def f(redis, stop):\n"
        "    await redis.get('a')\n"
        "    await failpoints.reach('a.read')\n"
        "    await redis.get('b')\n"
        "    await g(redis)\n"
        "    await asyncio.wait_for(stop.wait(), 1)\n"
        "async def g(redis):\n"
        "    if await redis.get('c'):\n"
        "        await failpoints.reach('c.read')\n"
        "    return [await redis.get('d') for _ in range(3)]\n"
    )
    assert unnamed_in([module]) == ["module.py:4: redis.get", "module.py:10: redis.get"]


def test_what_a_hasty_process_changes_is_there() -> None:
    assert [name for module, name, _ in PATIENCE if not hasattr(module, name)] == []


def test_every_place_is_one_where_some_test_lets_a_process_die() -> None:
    assert PLACES.keys() | UNREACHED.keys() == POINTS
