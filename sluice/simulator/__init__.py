"""A faithful Binance spot exchange that misbehaves on command.

As a process (its address is printed in one line; SIGTERM ends it with exit 0)::

    python -m sluice.simulator --port 0 --port-file FILE --seed 1 --rate 50 \
        --symbols BTCUSDT,ETHUSDT
    python -m sluice.simulator --recording A.gz --recording B.gz --speed 0 \
        --start-when btcusdt@trade,btcusdt@depth@100ms
    python -m sluice.simulator record --seed 7 --seconds 60 --out DIRECTORY

In a test::

    async with Simulator(SimulatorConfig(seed=1, rate=50)) as simulator:
        ...  # simulator.url, simulator.ws_url, simulator.truth
        simulator.inject(Order("drop", count=3, on="btcusdt@trade"))

`/control/...` on the same address does the same from outside: see `control`.
A client's bases are `BINANCE_SPOT_WS_URL=ws://127.0.0.1:PORT` and
`BINANCE_SPOT_REST_URL=http://127.0.0.1:PORT`.
"""

from sluice.simulator.config import DEFAULT_SYMBOLS, SimulatorConfig
from sluice.simulator.faults import Injection, Order, UnknownFaultError
from sluice.simulator.server import Simulator
from sluice.simulator.tape import Levels, Trade
from sluice.simulator.truth import Truth

__all__ = [
    "DEFAULT_SYMBOLS",
    "Injection",
    "Levels",
    "Order",
    "Simulator",
    "SimulatorConfig",
    "Trade",
    "Truth",
    "UnknownFaultError",
]
