"""A short form of `make chaos`, and what its plans promise."""

from pathlib import Path

import pytest

from sluice.cli.servers import PostgresServer, RedisServer
from tests.chaos.faults import FAULTS
from tests.chaos.plan import plan
from tests.chaos.run import Servers, run_seed
from tests.servers import Database

SECONDS = 8.0
NAMES = {lane: list(faults) for lane, faults in FAULTS.items()}


@pytest.mark.timeout(900)  # every wait within has a ceiling of its own
async def test_a_seeded_run_of_faults_violates_nothing(
    tmp_path: Path,
    private_redis: RedisServer,
    private_postgres: PostgresServer,
    private_database: Database,
) -> None:
    servers = Servers(private_redis, private_postgres, private_database)
    result = await run_seed(servers, 2, SECONDS, tmp_path)
    print(result)
    result.verdict.require()


def test_a_seed_gives_the_same_plan_again_and_another_seed_another() -> None:
    assert plan(7, 30, NAMES) == plan(7, 30, NAMES)
    assert plan(7, 30, NAMES).lanes != plan(8, 30, NAMES).lanes


def test_every_fault_comes_within_fifty_seeds_and_none_outlasts_its_run() -> None:
    plans = [plan(seed, 30, NAMES) for seed in range(1, 51)]
    for lane, names in NAMES.items():
        assert {step.fault for each in plans for step in each.lanes[lane]} == set(names)
        for each in plans:
            assert sum(step.pause + step.seconds for step in each.lanes[lane]) <= 30
    assert {count for each in plans for count in each.copies.values()} == {1, 2}
