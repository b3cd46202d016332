"""The small parts: decimals, frames, faults, limits, oracle, recorder."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from websockets.frames import Close, Frame
from websockets.streams import StreamReader

from sluice.simulator import frames
from sluice.simulator.config import SimulatorConfig
from sluice.simulator.faults import MESSAGE, Faults, Order, UnknownFaultError
from sluice.simulator.fixed import parse, product, text
from sluice.simulator.limits import ConnectLimiter, WeightLimiter
from sluice.simulator.oracle import results
from sluice.simulator.payloads import in_microseconds
from sluice.simulator.recorder import record
from sluice.simulator.recording import chains, read_lines
from sluice.simulator.server import Simulator
from sluice.simulator.truth import ranges

DATA = Path(__file__).parents[2] / "data"


@pytest.mark.parametrize(
    ("value", "printed"),
    [(0, "0.00000000"), (1, "0.00000001"), (150_000, "0.00150000"), (-25, "-0.00000025")],
)
def test_decimals_are_printed_with_eight_places(value: int, printed: str) -> None:
    assert text(value) == printed
    if value >= 0:
        assert parse(printed) == value


def test_decimals_are_read_exactly_or_not_at_all() -> None:
    assert parse("91234.1") == 9_123_410_000_000
    assert parse("1.1000000000") == 110_000_000
    assert product(parse("0.5"), parse("3")) == parse("1.5")
    for wrong in ("1.123456789", "", "NaN", "1e5"):
        with pytest.raises(ValueError, match=r"decimal|literal"):
            parse(wrong)


@pytest.mark.parametrize("size", [0, 5, 125, 126, 65_535, 65_536])
def test_frames_are_read_by_another_implementation(size: int) -> None:
    payload = b"x" * size
    assert read(frames.frame(payload)) == Frame(1, payload)
    assert read(frames.frame(payload, frames.Opcode.BINARY)) == Frame(2, payload)
    close = read(frames.close(1008, "Pong timeout"))
    assert Close.parse(bytes(close.data)) == Close(1008, "Pong timeout")


def read(data: bytes) -> Frame:
    reader = StreamReader()
    reader.feed_data(data)
    parser = Frame.parse(reader.read_exact, mask=False, max_size=None)
    try:
        next(parser)
    except StopIteration as end:
        return end.value
    raise AssertionError("the frame is not whole")


def faults(rates: dict[str, float] | None = None, seed: int = 1) -> Faults:
    return Faults(seed, rates, now=lambda: 7, log=lambda *_, **__: None)


def test_an_armed_fault_hits_what_it_names_as_often_as_it_says() -> None:
    plan = faults()
    plan.arm(Order("drop", 2, "btc*@trade", after=1))
    names = ["ethusdt@trade", "btcusdt@trade", "btcusdt@trade", "btcusdt@depth", "btcusdt@trade"]
    assert [bool(plan.draw(MESSAGE, name)) for name in names] == [False, False, True, False, True]
    assert plan.draw(MESSAGE, "btcusdt@trade") is None
    assert not plan.is_armed


def test_faults_by_rate_follow_from_the_seed() -> None:
    def drawn(seed: int) -> list[str | None]:
        plan = faults({"drop": 0.2, "duplicate": 0.2}, seed)
        orders = [plan.draw(MESSAGE, "x") for _ in range(100)]
        return [order.kind if order else None for order in orders]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert {"drop", "duplicate", None} == set(drawn(1))


def test_only_known_faults_are_accepted_and_quiet_forgets_them_all() -> None:
    plan = faults({"drop": 1.0})
    with pytest.raises(UnknownFaultError):
        plan.arm(Order("explode"))
    with pytest.raises(UnknownFaultError):
        plan.draw_at({"explode": 0.1}, 1)
    plan.arm(Order("nan"))
    plan.quiet()
    assert plan.draw(MESSAGE, "x") is None
    plan.record("drop", stream="x")
    assert plan.injected == [(7, "drop", {"stream": "x"})]


def test_weight_runs_out_and_ends_in_a_ban_that_can_be_pardoned() -> None:
    config = replace(
        SimulatorConfig(), max_weight=10, weight_window=1e12, refusals_before_ban=1, ban=600
    )
    limiter = WeightLimiter(config)
    assert limiter.take(10) is None
    assert limiter.take(1).status == 429
    banned = limiter.take(1)
    assert banned.status == 418
    assert 590 <= banned.retry_after <= 601
    assert limiter.take(1).status == 418
    limiter.pardon()
    assert limiter.take(1) is None


def test_connections_are_counted_in_a_window() -> None:
    limiter = ConnectLimiter(SimulatorConfig(max_connects=2, connect_window=600))
    assert [limiter.is_over() for _ in range(3)] == [False, False, True]


def test_times_become_microseconds_and_nothing_else_does() -> None:
    trade = b'{"e":"trade","E":1790000000105,"s":"X","t":1790000000105,"p":"1","T":1790000000104}'
    assert in_microseconds(trade) == (
        b'{"e":"trade","E":1790000000105000,"s":"X","t":1790000000105,"p":"1","T":1790000000104000}'
    )
    kline = json.loads(in_microseconds(b'{"e":"kline","E":1,"k":{"t":2,"T":3,"f":4,"L":5}}'))
    assert kline == {"e": "kline", "E": 1000, "k": {"t": 2000, "T": 3000, "f": 4, "L": 5}}


def test_ids_are_printed_as_ranges() -> None:
    assert ranges([1, 2, 3, 7, 9, 10]) == [(1, 3), (7, 7), (9, 10)]
    assert ranges([]) == []


def test_the_committed_recording_gives_the_results_beside_it() -> None:
    files = [(name, DATA / f"simulated_{name.lower()}.gz") for name in ("BTCUSDT", "NEXOUSDT")]
    assert json.loads(json.dumps(results(files))) == json.loads(
        (DATA / "simulated.json").read_text()
    )


def test_a_recording_follows_from_its_seed(tmp_path: Path) -> None:
    written = []
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        (tmp_path / name).mkdir()
        paths = record(tmp_path / name, seed=seed, seconds=5, symbols=("SOLUSDT",), rate=20)
        written.append(gzip.decompress(paths[0].read_bytes()))
    assert written[0] == written[1] != written[2]


def test_files_are_sorted_into_chains_by_what_they_hold(tmp_path: Path) -> None:
    lines = gzip.decompress((DATA / "simulated_btcusdt.gz").read_bytes()).splitlines(keepends=True)
    (tmp_path / "z").write_bytes(b"".join(lines[:100]))
    (tmp_path / "a").write_bytes(b"".join(lines[100:200]))
    (chain,) = chains((tmp_path / "a", tmp_path / "z"))
    assert (chain.symbol, [path.name for path in chain.paths]) == ("BTCUSDT", ["z", "a"])
    assert len(list(chain.lines())) == 200


def test_nanosecond_timestamps_are_told_from_microseconds(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b'1723161254206652067 {"stream":"xy@trade","data":{"e":"trade"}}\n')
    (line,) = read_lines(path)
    assert line == (1723161254206652, "XY", "xy@trade", b'{"e":"trade"}')


async def test_a_source_that_dies_does_not_pass_for_a_quiet_market(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b'1723161254206652 {"stream":"xy@trade","data":{"e":"trade","E":1}}\n')
    with pytest.raises(KeyError):
        async with Simulator(SimulatorConfig(recordings=(path,), speed=0)) as simulator:
            await simulator.failed()
