"""The simulator as a process."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Self

import aiohttp

from sluice.simulator.synthetic import RESERVED_IDS

PATIENCE = 60


class Process:
    """`python -m sluice.simulator`, ended with SIGTERM at the latest when the test ends."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self.url = ""

    async def __aenter__(self) -> Self:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "sluice.simulator",
            *self._arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(PATIENCE):
            self.url = (await self.process.stdout.readline()).decode().strip()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            await self.end()

    async def end(self) -> tuple[int, str]:
        """Ask it to end; gives its exit code and what it wrote to stderr."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            _, errors = await self.process.communicate()
        return self.process.returncode, errors.decode()

    async def status(self) -> dict:
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{self.url}/control/status") as answer,
        ):
            return await answer.json()

    async def with_trades(self, symbol: str) -> dict:
        async with asyncio.timeout(PATIENCE):
            while not (status := await self.status())["symbols"][symbol]["ids"]:
                await asyncio.sleep(0.05)
        return status


async def test_it_says_where_it_is_serves_and_ends_on_sigterm(tmp_path: Path) -> None:
    port_file, log = tmp_path / "port", tmp_path / "log"
    arguments = ("--port", "0", "--port-file", str(port_file), "--log", str(log), "--rate", "50")
    async with Process(*arguments, "--symbols", "BTCUSDT,ETHUSDT") as simulator:
        assert simulator.url == f"http://127.0.0.1:{port_file.read_text()}"
        status = await simulator.with_trades("BTCUSDT")
        assert list(status["symbols"]) == ["BTCUSDT", "ETHUSDT"]
        async with aiohttp.ClientSession() as http:
            async with http.ws_connect(f"{simulator.url}/ws/btcusdt@trade") as client:
                assert (await client.receive_json())["s"] == "BTCUSDT"
            async with http.get(f"{simulator.url}/api/v3/ping") as answer:
                assert answer.status == 200
            async with http.ws_connect(f"{simulator.url}/ws/btcusdt@trade"):
                assert await simulator.end() == (0, "")
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert {"connect", "subscribe", "disconnect", "rest"} <= set(events)


async def test_a_second_run_goes_on_counting(tmp_path: Path) -> None:
    arguments = ("--state", str(tmp_path / "ids"), "--symbols", "BTCUSDT", "--rate", "50")
    async with Process(*arguments) as simulator:
        status = await simulator.with_trades("BTCUSDT")
        await simulator.end()
    published = status["symbols"]["BTCUSDT"]["ids"][1]
    last_id, last_update = json.loads((tmp_path / "ids").read_text())["BTCUSDT"]
    assert published <= last_id < published + RESERVED_IDS  # kept at its end: none are skipped
    async with Process(*arguments) as simulator:
        status = await simulator.with_trades("BTCUSDT")
        assert status["symbols"]["BTCUSDT"]["ids"][0] == last_id + 1
        assert status["symbols"]["BTCUSDT"]["update_id"] > last_update
        await simulator.end()


async def test_an_unknown_fault_is_refused() -> None:
    async with Process("--fault", "nonsense=0.5") as simulator:
        async with asyncio.timeout(PATIENCE):
            _, errors = await simulator.process.communicate()
        assert simulator.process.returncode == 2
        assert b"unknown fault 'nonsense'" in errors
