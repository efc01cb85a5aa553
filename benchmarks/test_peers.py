"""The peers: the same task on the same server by every library that does it, and by the original."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks.conftest import PEERS_KEPT, QUICK, ROWS, Run
from benchmarks.peers import tables
from benchmarks.peers.driver import (
    ASYNCPG,
    BY_HAND,
    CHECKED,
    ELIZAOS_CHECKED,
    IN_PROCESS,
    OURS,
    PEERS,
    PSYCOPG,
    RESIDENT,
    Spec,
)
from benchmarks.peers.suite import Sizes, Suite, find_faults, find_pgbench, last_run
from benchmarks.report import Report


def _specs() -> list[Spec]:
    """Choose the peers: all, those that ELIZASQL_BENCH_PEERS names, or, in a quick run, those that are here anyway."""
    ours = [OURS, RESIDENT]
    if QUICK:
        # Nothing is installed and no Node is asked for: these run in this environment.
        here = [replace(ASYNCPG, packages=()), replace(BY_HAND, packages=())]
        if importlib.util.find_spec("psycopg") and importlib.util.find_spec("psycopg_pool"):
            here.append(replace(PSYCOPG, packages=()))
        return [*ours, *here, IN_PROCESS[0]]
    named = os.environ.get("ELIZASQL_BENCH_PEERS")
    chosen = [spec for spec in PEERS if named is None or spec.name in named.split(",")]
    if named is not None and len(chosen) != len(named.split(",")):
        raise pytest.UsageError(f"ELIZASQL_BENCH_PEERS: choose from {', '.join(spec.name for spec in PEERS)}")
    specs = [*ours, *chosen, CHECKED]
    if any(spec.name == ELIZAOS_CHECKED.like for spec in chosen):
        specs.append(ELIZAOS_CHECKED)
    return [*specs, *IN_PROCESS]


@pytest.fixture(scope="module")
def suite(run: Run, report: Report) -> Iterator[Suite]:
    """Give the run, everything loaded. The report is asked for so that it tells of the machine before this."""
    sizes = Sizes.tiny(ROWS) if QUICK else Sizes.of(ROWS)
    suite = Suite(_specs(), sizes, run, lambda text: print(text, file=sys.stderr, flush=True))
    try:
        suite.open()
        yield suite
    finally:
        suite.close()


@pytest.fixture(autouse=True)
def keep(suite: Suite) -> Iterator[None]:
    """Keep what is known after every test, since a run that is broken off has not been for nothing; then judge it."""
    yield
    if not QUICK:
        suite.save()
    # What is asked in a quick run runs in this environment: when it fails, that is this code's doing.
    assert find_faults(suite.results, all_succeed=QUICK) == []


def test_search(suite: Suite) -> None:
    suite.search_points()
    suite.settle()
    suite.rooms()
    for name, kept in suite.results["peers"].items():
        if name in suite.processes and not name.endswith("-check"):
            assert kept["points"], name
    for kept in (suite.results["peers"][spec.name] for spec in (OURS, RESIDENT)):
        assert kept["points"]
        assert kept["equal"]
        assert kept["room"]


def test_concurrency(suite: Suite) -> None:
    suite.concurrency()


def test_limits(suite: Suite) -> None:
    suite.limits()
    if QUICK and find_pgbench():
        assert isinstance(suite.results["limits"]["pgbench"], dict), suite.results["limits"]["pgbench"]


def test_writes(suite: Suite) -> None:
    suite.writes()
    suite.mixed()


def test_growth(suite: Suite) -> None:
    known = {spec.name: spec for spec in suite.specs if spec.name in suite.processes}
    suite.growth([known[name] for name in (OURS.name, RESIDENT.name, ASYNCPG.name, "elizaos") if name in known])


def test_report(suite: Suite, report: Report) -> None:
    tables.fill(report, suite.results, last_run(suite.results, suite.path))
    if QUICK:
        return
    suite.save()
    suite.path.with_suffix(".md").write_text(tables.readme(suite.results) + "\n", encoding="utf-8")
    # The page is written when everything else has been measured, too.
    report.setup[PEERS_KEPT] = str(suite.path)
