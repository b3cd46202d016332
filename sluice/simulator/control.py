"""The control port, for tests: `/control/...` on the simulator's own address.

GET `status`, `truth?symbol=`, `trades?symbol=&from=&limit=`, `book?symbol=&update_id=&limit=`,
`requests`, `faults`; POST with JSON bodies `faults`, `rates`, `quiet`, `source`, `rate`,
`hide`, `retire`, `skew`, `pardon`.
"""

import json
from typing import TYPE_CHECKING, Any

from aiohttp import web

from sluice.simulator import payloads
from sluice.simulator.faults import Order, UnknownFaultError
from sluice.simulator.fixed import text
from sluice.simulator.rest import Rest
from sluice.simulator.synthetic import SyntheticSource
from sluice.simulator.truth import ranges

if TYPE_CHECKING:
    from sluice.simulator.server import Simulator


class Control:
    """Answers what happened, and makes things happen."""

    def __init__(self, simulator: "Simulator", rest: Rest) -> None:
        self._simulator = simulator
        self._rest = rest

    def routes(self) -> list[web.RouteDef]:
        """List the endpoints."""
        return [
            web.get("/control/status", self._status),
            web.get("/control/truth", self._truth),
            web.get("/control/trades", self._trades),
            web.get("/control/book", self._book),
            web.get("/control/requests", self._requests),
            web.get("/control/faults", self._faults),
            web.post("/control/faults", self._arm),
            web.post("/control/rates", self._rates),
            web.post("/control/quiet", self._quiet),
            web.post("/control/source", self._source),
            web.post("/control/rate", self._rate),
            web.post("/control/hide", self._hide),
            web.post("/control/retire", self._retire),
            web.post("/control/skew", self._skew),
            web.post("/control/pardon", self._pardon),
        ]

    async def _status(self, _: web.Request) -> web.Response:
        """Everything at a glance: source, symbols, connections, fault counts."""
        simulator, exchange = self._simulator, self._simulator.exchange
        return web.json_response(
            {
                "now": exchange.now(),
                "source": simulator.source.state,
                "rate": exchange.rate,
                "symbols": {
                    symbol: {
                        "trades": simulator.truth.count(symbol),
                        "ids": simulator.truth.ids(symbol),
                        "update_id": simulator.truth.update_id(symbol),
                        "withheld": len(simulator.truth.withheld(symbol)),
                        "hidden": len(simulator.truth.hidden(symbol)),
                    }
                    for symbol in simulator.truth.symbols
                },
                "connections": [
                    {
                        "number": connection.number,
                        "streams": list(connection.streams),
                        "sent": connection.sent,
                        "buffered": connection.buffered,
                    }
                    for connection in simulator.connections.values()
                ],
                "faults": simulator.truth.counts,
            }
        )

    async def _truth(self, request: web.Request) -> web.Response:
        """`{"ids":[first,last],"trades":n,"withheld":[[a,b]],"hidden":[[a,b]],"update_id":..}`."""
        symbol = self._symbol(request)
        truth = self._simulator.truth
        return web.json_response(
            {
                "symbol": symbol,
                "ids": truth.ids(symbol),
                "trades": truth.count(symbol),
                "withheld": ranges(truth.withheld(symbol)),
                "hidden": ranges(truth.hidden(symbol)),
                "retired": ranges(truth.retired(symbol)),
                "update_id": truth.update_id(symbol),
            }
        )

    async def _trades(self, request: web.Request) -> web.Response:
        """`[[id, price, quantity, time, is the buyer the maker?], ..]`, 10,000 at most."""
        limit = min(int(request.query.get("limit", 10_000)), 10_000)
        trades = self._simulator.truth.trades(
            self._symbol(request), int(request.query.get("from", 0)), limit
        )
        return web.json_response(
            [
                [row.id, text(row.price), text(row.quantity), row.time, row.buyer_is_maker]
                for row in trades
            ]
        )

    async def _book(self, request: web.Request) -> web.Response:
        """The book at an update id (default: now), in the shape of a REST snapshot."""
        wanted = request.query.get("update_id")
        book = self._simulator.truth.book(
            self._symbol(request), None if wanted is None else int(wanted)
        )
        if book is None:
            raise web.HTTPNotFound(text="no longer remembered")
        most = max(len(book.bids), len(book.asks), 1)
        body = payloads.snapshot(book, int(request.query.get("limit", most)))
        return web.Response(body=body, content_type="application/json")

    async def _requests(self, _: web.Request) -> web.Response:
        """`[[time, path, status], ..]`: the REST requests that were answered."""
        return web.json_response(self._simulator.truth.requests)

    async def _faults(self, _: web.Request) -> web.Response:
        """What was injected, what is armed, and how often each kind happened."""
        truth, faults = self._simulator.truth, self._simulator.exchange.faults
        return web.json_response(
            {
                "injected": [
                    {"time": time, "kind": kind, **detail} for time, kind, detail in truth.faults
                ],
                "armed": [
                    {"kind": order.kind, "count": order.count, "on": order.on}
                    for order in faults.orders
                ],
                "counts": truth.counts,
            }
        )

    async def _arm(self, request: web.Request) -> web.Response:
        """`{"kind":"drop","count":3,"on":"btcusdt@trade","after":0,"options":{..}}`.

        A connection's fault hits at once: `connection` by number, or all with a matching stream.
        """
        wanted = await request.json()
        number = wanted.pop("connection", None)
        try:
            order = Order(**wanted)
            hit = self._simulator.inject(order, number)
        except (TypeError, UnknownFaultError) as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        return web.json_response({"hit": hit})

    async def _rates(self, request: web.Request) -> web.Response:
        """`{"seed":1,"rates":{"drop":0.001}}`: faults by seed and rate from now on."""
        wanted = await request.json()
        try:
            self._simulator.exchange.faults.draw_at(wanted["rates"], int(wanted.get("seed", 1)))
        except UnknownFaultError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        return web.json_response({})

    async def _quiet(self, _: web.Request) -> web.Response:
        """No more faults; slow sockets are fast again, a ban ends, held messages go out.

        Sockets that were silenced stay silent: noticing it is the client's part.
        """
        self._simulator.quiet()
        self._pardon_all()
        return web.json_response({})

    async def _source(self, request: web.Request) -> web.Response:
        """`{"action":"stop"}` or `{"action":"start"}`."""
        running = self._simulator.exchange.is_running
        action = (await request.json())["action"]
        if action == "start":
            running.set()
        elif action == "stop":
            running.clear()
        else:
            raise web.HTTPBadRequest(text="action is start or stop")
        return web.json_response({})

    async def _rate(self, request: web.Request) -> web.Response:
        """`{"rate":500}`: trades a second of all synthetic markets."""
        source = self._simulator.source
        if not isinstance(source, SyntheticSource):
            raise web.HTTPBadRequest(text="a recording has its own rate")
        source.set_rate(float((await request.json())["rate"]))
        return web.json_response({})

    async def _hide(self, request: web.Request) -> web.Response:
        """`{"symbol":"BTCUSDT","from_id":1,"to_id":9}`: REST serves these ids no more."""
        self._simulator.exchange.hide(*_ids(await request.json()))
        return web.json_response({})

    async def _retire(self, request: web.Request) -> web.Response:
        """`{"symbol":"BTCUSDT","from_id":1,"to_id":9}`: only aggregates hold these ids still."""
        self._simulator.exchange.retire(*_ids(await request.json()))
        return web.json_response({})

    async def _skew(self, request: web.Request) -> web.Response:
        """`{"milliseconds":3600000}`: the exchange's clock is off by this much."""
        self._simulator.exchange.skew_clock(int((await request.json())["milliseconds"]))
        return web.json_response({})

    async def _pardon(self, _: web.Request) -> web.Response:
        """End bans and forget used weight."""
        self._pardon_all()
        return web.json_response({})

    def _pardon_all(self) -> None:
        for limiter in self._rest.limiters.values():
            limiter.pardon()

    def _symbol(self, request: web.Request) -> str:
        symbol = request.query.get("symbol", "")
        if symbol not in self._simulator.truth.symbols:
            raise web.HTTPNotFound(text=json.dumps(self._simulator.truth.symbols))
        return symbol


def _ids(wanted: dict[str, Any]) -> tuple[str, list[int]]:
    return wanted["symbol"], list(range(int(wanted["from_id"]), int(wanted["to_id"]) + 1))
