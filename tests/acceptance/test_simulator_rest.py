"""The simulator's REST, as the sheet prints it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest

from sluice.simulator import Simulator, SimulatorConfig

PATIENCE = 60
CONFIG = SimulatorConfig(symbols=("BTCUSDT", "SOLUSDT"), seed=2, rate=2_000, weight_window=1e12)


class Rest:
    """A simulator with some trades, its source stopped, and a way to ask it."""

    def __init__(self, simulator: Simulator, http: aiohttp.ClientSession) -> None:
        self.simulator = simulator
        self.truth = simulator.truth
        self._http = http

    async def get(self, path: str, **headers: str) -> aiohttp.ClientResponse:
        url = f"{self.simulator.url}/api/v3/{path}"
        async with self._http.get(url, headers=headers) as answer:
            await answer.read()
            return answer

    async def json(self, path: str, **headers: str) -> Any:
        answer = await self.get(path, **headers)
        assert answer.status == 200, await answer.text()
        return await answer.json()


@contextlib.asynccontextmanager
async def stopped(config: SimulatorConfig = CONFIG, trades: int = 100) -> AsyncIterator[Rest]:
    async with (
        Simulator(config) as simulator,
        aiohttp.ClientSession() as http,
        asyncio.timeout(PATIENCE),
    ):
        while any(simulator.truth.count(symbol) < trades for symbol in config.symbols):
            await asyncio.sleep(0.01)
        simulator.exchange.is_running.clear()
        while simulator.source.state != "stopped":
            await asyncio.sleep(0.01)
        yield Rest(simulator, http)


def units(text: str) -> int:
    return int(text.replace(".", ""))


async def test_every_endpoint_has_its_weight() -> None:
    weights = {
        "ping": 1,
        "time": 1,
        "exchangeInfo": 20,
        "depth?symbol=BTCUSDT": 5,
        "depth?symbol=BTCUSDT&limit=101": 25,
        "depth?symbol=BTCUSDT&limit=501": 50,
        "depth?symbol=BTCUSDT&limit=1001": 250,
        "depth?symbol=BTCUSDT&limit=90000": 250,
        "trades?symbol=BTCUSDT": 25,
        "historicalTrades?symbol=BTCUSDT": 25,
        "aggTrades?symbol=BTCUSDT": 4,
        "klines?symbol=BTCUSDT&interval=1m": 2,
        "avgPrice?symbol=BTCUSDT": 2,
        "ticker/24hr?symbol=BTCUSDT": 2,
        "ticker/24hr": 80,
        "ticker/price?symbol=BTCUSDT": 2,
        "ticker/price": 4,
        "ticker/bookTicker?symbol=BTCUSDT": 2,
        "ticker/bookTicker": 4,
    }
    async with stopped(trades=1) as rest:
        used = 0
        for path, weight in weights.items():
            answer = await rest.get(path)
            assert answer.status == 200
            used += weight
            assert answer.headers["x-mbx-used-weight-1m"] == str(used), path


async def test_too_much_weight_is_refused_and_going_on_earns_a_ban() -> None:
    config = replace(CONFIG, max_weight=30, refusals_before_ban=2)
    async with stopped(config, trades=1) as rest:
        statuses = []
        for _ in range(6):
            answer = await rest.get("trades?symbol=BTCUSDT")
            statuses.append(answer.status)
        assert statuses == [200, 429, 429, 418, 418, 418]
        assert int(answer.headers["Retry-After"]) > 0
        body = await answer.json()
        assert body["code"] == -1003
        assert "IP banned until" in body["msg"]


async def test_trades_are_paged_by_id_without_end_or_hole() -> None:
    async with stopped() as rest:
        published = rest.truth.trades("BTCUSDT")
        from_id, paged = published[0].id, []
        while True:
            page = await rest.json(f"historicalTrades?symbol=BTCUSDT&fromId={from_id}&limit=30")
            paged += page
            if len(page) < 30:
                break
            from_id = page[-1]["id"] + 1
        got = [
            (
                row["id"],
                units(row["price"]),
                units(row["qty"]),
                row["time"],
                row["isBuyerMaker"],
            )
            for row in paged
        ]
        assert got == published
        newest = await rest.json("trades?symbol=BTCUSDT&limit=7")
        assert newest == paged[-7:]


async def test_aggregates_cover_every_trade_once() -> None:
    async with stopped() as rest:
        published = {trade.id: trade for trade in rest.truth.trades("BTCUSDT")}
        first = (await rest.json("aggTrades?symbol=BTCUSDT&startTime=0&limit=1"))[0]
        rows = await rest.json(f"aggTrades?symbol=BTCUSDT&fromId={first['a']}&limit=1000")
        covered = []
        for row in rows:
            fills = [published[number] for number in range(row["f"], row["l"] + 1)]
            covered += [fill.id for fill in fills]
            assert units(row["q"]) == sum(fill.quantity for fill in fills)
            assert {units(row["p"])} == {fill.price for fill in fills}
        assert covered == sorted(published)
        assert [row["a"] for row in rows] == list(range(first["a"], first["a"] + len(rows)))
        middle = rows[len(rows) // 2]["T"]
        until = await rest.json(f"aggTrades?symbol=BTCUSDT&endTime={middle}&limit=5")
        assert until[-1]["T"] <= middle
        window = await rest.json(f"aggTrades?symbol=BTCUSDT&startTime={middle}&endTime={middle}")
        assert {row["T"] for row in window} == {middle}


async def test_klines_are_the_trades() -> None:
    async with stopped() as rest:
        trades = rest.truth.trades("BTCUSDT")
        rows = await rest.json("klines?symbol=BTCUSDT&interval=1s&limit=1000")
        assert sum(row[8] for row in rows) == len(trades)
        for row in rows:
            within = [trade for trade in trades if row[0] <= trade.time <= row[6]]
            assert row[8] == len(within)
            assert units(row[5]) == sum(trade.quantity for trade in within)
            taken = sum(trade.quantity for trade in within if not trade.buyer_is_maker)
            assert units(row[9]) == taken
            if within:
                assert (units(row[1]), units(row[4])) == (within[0].price, within[-1].price)
        opened = [row[0] for row in rows]
        assert opened == list(range(opened[0], opened[0] + 1000 * len(rows), 1000))
        bounds = f"startTime={opened[0]}&endTime={opened[-1]}"
        again = await rest.json(f"klines?symbol=BTCUSDT&interval=1s&{bounds}&limit=1000")
        assert again == rows


async def test_depth_is_the_true_book() -> None:
    async with stopped() as rest:
        body = await rest.json("depth?symbol=BTCUSDT&limit=5000")
        book = rest.truth.book("BTCUSDT", body["lastUpdateId"])
        assert {units(price): units(size) for price, size in body["bids"]} == book.bids
        assert {units(price): units(size) for price, size in body["asks"]} == book.asks
        short = await rest.json("depth?symbol=BTCUSDT&limit=3")
        assert short["bids"] == body["bids"][:3]
        assert short["asks"] == body["asks"][:3]


async def test_symbols_state_their_tick_and_step() -> None:
    async with stopped() as rest:
        body = await rest.json("exchangeInfo?symbols=" + quote('["BTCUSDT"]'))
        (facts,) = body["symbols"]
        assert (facts["baseAsset"], facts["quoteAsset"]) == ("BTC", "USDT")
        filters = {item["filterType"]: item for item in facts["filters"]}
        tick, step = filters["PRICE_FILTER"]["tickSize"], filters["LOT_SIZE"]["stepSize"]
        for trade in rest.truth.trades("BTCUSDT"):
            assert trade.price % units(tick) == 0
            assert trade.quantity % units(step) == 0
        assert body["rateLimits"][0]["limit"] == 6000


async def test_tickers_agree_with_the_trades() -> None:
    async with stopped() as rest:
        trades = rest.truth.trades("BTCUSDT")
        row = await rest.json("ticker/24hr?symbol=BTCUSDT")
        assert row["count"] == len(trades)
        assert (row["firstId"], row["lastId"]) == (trades[0].id, trades[-1].id)
        assert units(row["lastPrice"]) == trades[-1].price
        assert units(row["volume"]) == sum(trade.quantity for trade in trades)
        everything = await rest.json("ticker/24hr?type=MINI")
        assert [entry["symbol"] for entry in everything] == list(CONFIG.symbols)
        assert "bidPrice" not in everything[0]
        price = await rest.json("ticker/price?symbol=BTCUSDT")
        assert units(price["price"]) == trades[-1].price


async def test_times_are_microseconds_where_the_header_says_so() -> None:
    async with stopped(trades=1) as rest:
        path = "historicalTrades?symbol=BTCUSDT&limit=1"
        plain = await rest.json(path)
        fine = await rest.json(path, **{"X-MBX-TIME-UNIT": "MICROSECOND"})
        assert fine[0]["time"] == plain[0]["time"] * 1000


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("depth", -1102),
        ("depth?symbol=NOSUCH", -1121),
        ("depth?symbol=btcusdt", -1121),
        ("klines?symbol=BTCUSDT&interval=9m", -1120),
        ("trades?symbol=BTCUSDT&limit=many", -1100),
        ("trades?symbol=BTCUSDT&limit=0", -1130),
        ("aggTrades?symbol=BTCUSDT&fromId=1&startTime=1", -1128),
        ("klines?symbol=BTCUSDT&interval=1d&timeZone=99", -1130),
        ("exchangeInfo?symbols=x", -1100),
    ],
)
async def test_a_bad_request_has_its_code(path: str, code: int) -> None:
    async with stopped(trades=1) as rest:
        answer = await rest.get(path)
        assert answer.status == 400
        assert (await answer.json())["code"] == code


async def test_the_control_port_tells_the_truth_and_takes_orders() -> None:
    async with stopped() as rest:
        base = f"{rest.simulator.url}/control"
        async with aiohttp.ClientSession() as http:

            async def get(path: str) -> Any:
                async with http.get(f"{base}/{path}") as answer:
                    return await answer.json()

            async def post(path: str, **body: object) -> int:
                async with http.post(f"{base}/{path}", json=body) as answer:
                    return answer.status

            trades = rest.truth.trades("BTCUSDT")
            rows = await get(f"trades?symbol=BTCUSDT&from={trades[3].id}&limit=1")
            assert [rows[0][0], units(rows[0][1]), *rows[0][3:]] == [
                trades[3].id,
                trades[3].price,
                trades[3].time,
                trades[3].buyer_is_maker,
            ]
            wanted = rest.truth.update_id("BTCUSDT") - 40
            book = await get(f"book?symbol=BTCUSDT&update_id={wanted}")
            assert book["lastUpdateId"] == wanted
            assert await post("faults", kind="rest_503", count=1, on="time/*") == 200
            assert await post("faults", kind="no_such") == 400
            assert (await get("faults"))["armed"] == [
                {"kind": "rest_503", "count": 1, "on": "time/*"}
            ]
            assert (await rest.get("time")).status == 503
            assert await post("hide", symbol="BTCUSDT", from_id=1, to_id=3) == 200
            assert await post("skew", milliseconds=5) == 200
            assert await post("rates", seed=3, rates={"rest_500": 1.0}) == 200
            assert (await rest.get("time")).status == 500
            assert await post("quiet") == 200
            assert (await rest.get("time")).status == 200
            truth = await get("truth?symbol=BTCUSDT")
            assert truth["hidden"] == [[1, 3]]
            assert truth["ids"] == [trades[0].id, trades[-1].id]
            counts = (await get("status"))["faults"]
            assert counts == {"rest_503": 1, "hide": 1, "skew": 1, "rest_500": 1}
            statuses = [status for _, path, status in await get("requests") if "time" in path]
            assert statuses == [503, 500, 200]
            assert await post("rate", rate=50) == 200
            assert await post("source", action="start") == 200
            while rest.truth.count("BTCUSDT") == len(trades):
                await asyncio.sleep(0.01)
            assert await post("source", action="dance") == 400
