"""The simulator as a process: see `python -m sluice.simulator --help`."""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import uvloop

from sluice.simulator.config import DEFAULT_SYMBOLS, SimulatorConfig
from sluice.simulator.faults import UnknownFaultError
from sluice.simulator.recorder import record
from sluice.simulator.server import Simulator


def main(arguments: list[str]) -> int:
    """Serve, or write a recording; gives the exit code."""
    if arguments[:1] == ["record"]:
        return _record(arguments[1:])
    options = _parser().parse_args(arguments)
    config = SimulatorConfig(
        symbols=_names(options.symbols),
        seed=options.seed,
        rate=options.rate,
        recordings=tuple(options.recording),
        speed=options.speed,
        start_when=_names(options.start_when),
        is_paused=options.paused,
        host=options.host,
        port=options.port,
        state=options.state,
        log=options.log,
        fault_rates=dict(options.fault),
        fault_seed=options.fault_seed,
        are_errors_nested=not options.flat_errors,
        are_unknown_symbols_refused=options.refuse_unknown,
        ping_interval=options.ping_interval,
        pong_timeout=options.pong_timeout,
        lifetime=options.lifetime,
        shutdown_notice=options.shutdown_notice,
        max_connects=options.max_connects,
        max_weight=options.max_weight,
        weight_window=options.weight_window,
    )
    try:
        uvloop.run(_serve(config, options.port_file))
    except UnknownFaultError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command's output
        return 2
    return 0


async def _serve(config: SimulatorConfig, port_file: Path | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Simulator(config) as simulator:
        if port_file is not None:
            part = port_file.with_name(port_file.name + ".part")
            part.write_text(simulator.url.rpartition(":")[2])
            part.replace(port_file)
        print(simulator.url, flush=True)  # noqa: T201 - the address is the command's output
        stopping = asyncio.create_task(stop.wait())
        failing = asyncio.create_task(simulator.failed())
        done, _ = await asyncio.wait({stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
        failing.cancel()
        for task in done:
            task.result()


def _record(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sluice.simulator record",
        description="Write a recording of the synthetic market and the results it must give.",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of exchange time")
    parser.add_argument("--rate", type=float, default=12.0, help="trades a second of all markets")
    parser.add_argument("--symbols", default=",".join(DEFAULT_SYMBOLS))
    options = parser.parse_args(arguments)
    written = record(
        options.out,
        seed=options.seed,
        seconds=options.seconds,
        symbols=_names(options.symbols),
        rate=options.rate,
    )
    for path in written:
        print(path)  # noqa: T201 - a command's output
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sluice.simulator", description=__doc__)
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=0, help="0 takes a free one")
    add("--port-file", type=Path, help="the port is written here")
    add("--symbols", default=",".join(DEFAULT_SYMBOLS))
    add("--seed", type=int, default=1)
    add("--rate", type=float, default=12.0, help="trades a second of all markets, up to 5000")
    add("--recording", type=Path, action="append", default=[], help="play this file; repeatable")
    add("--speed", type=float, default=1.0, help="of a recording; 0 is as fast as it is read")
    add("--start-when", default="", help="streams to wait for, separated by commas")
    add("--paused", action="store_true", help="wait for /control/source")
    add("--state", type=Path, help="keep the ids here, so that a later run continues them")
    add("--log", type=Path, help="write a JSON-lines log here")
    add("--fault", type=_fault, action="append", default=[], metavar="KIND=RATE")
    add("--fault-seed", type=int, default=1)
    add("--flat-errors", action="store_true", help="errors as printed, not as seen")
    add("--refuse-unknown", action="store_true", help="refuse unknown symbols, and close")
    add("--ping-interval", type=float, default=20.0)
    add("--pong-timeout", type=float, default=60.0)
    add("--lifetime", type=float, default=86_400.0, help="of a connection, seconds")
    add("--shutdown-notice", type=float, default=0.0, help="serverShutdown before its end")
    add("--max-connects", type=int, default=300, help="in five minutes")
    add("--max-weight", type=int, default=6_000)
    add("--weight-window", type=float, default=60.0)
    return parser


def _names(printed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in printed.split(",") if name.strip())


def _fault(printed: str) -> tuple[str, float]:
    kind, _, rate = printed.partition("=")
    return kind, float(rate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
