import pytest

from orderbook.synchronizer import Continuity
from tests.unit.orderbook.faults import run


@pytest.mark.parametrize("continuity", ["contiguous", "chained"])
def test_no_book_in_sync_is_ever_wrong(continuity: Continuity) -> None:
    tallies = [run(seed, continuity, changes=400, fault_rate=0.05) for seed in range(50)]
    for seed, tally in enumerate(tallies):
        assert tally.wrong == 0, f"seed {seed}"
        assert tally.late == 0, f"seed {seed}: a break was not found at once"
        assert tally.differed == tally.crossed == 0, f"seed {seed}: a true book was given up"
        assert tally.is_live, f"seed {seed}: not in sync again"
    assert sum(tally.gaps for tally in tallies) > 100
    assert sum(tally.renewed for tally in tallies) > 0
    assert sum(tally.compared for tally in tallies) > 10_000
