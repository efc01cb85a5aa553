"""What the benchmarks tell of the peers: nothing is told that was not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import charts
from benchmarks.peers import driver, tables
from benchmarks.report import Report


def point(label: str, recall: float, p50: float, **more: Any) -> dict[str, Any]:
    return {
        "label": label,
        "recall": recall,
        "short": 0,
        "searches": 1,
        "p50": p50,
        "p95": p50,
        "spread": [p50, p50],
        "seconds": [p50],
        **more,
    }


def results(rows: int) -> dict[str, Any]:
    """A run of elizasql, and of a peer that failed after its first searches."""
    ours = {
        "title": "elizasql",
        "how": "",
        "failed": None,
        "points": [point("as documented", 0.99, 0.002)],
        "equal": point("as documented", 0.99, 0.002, enough=True),
    }
    peer = {
        "title": "A peer",
        "how": "",
        "failed": "search: it broke",
        "points": [point("as documented", 0.3, 0.001)],
        "load": {"seconds": 1.0, "index_seconds": 1.0, "rows": rows, "by_itself": False},
    }
    setup = {"rows": rows, "agents": 10, "source": "some", "date": "today"}
    return {"setup": setup, "peers": {"elizasql": ours, "peer": peer}, "limits": {}, "growth": []}


def test_a_peer_that_fails_on_the_way_is_told_and_given_no_figure_at_our_recall() -> None:
    report = Report()
    tables.fill(report, results(100_000), None)
    by_title = {table["title"]: table for table in report.tables}
    assert by_title["Peers that failed, and took no part from then on"]["rows"] == [["A peer", "search: it broke"]]
    search = by_title["Peers: search, top 10 of one agent"]
    row = dict(zip(search["header"], search["rows"][1], strict=True))
    assert row["as documented: recall"] == "0.300"
    assert row["at our recall: recall"] == "not measured"
    assert row["over ours"] == ""
    assert "| A peer | not measured | 0.300 |" in tables.readme(results(100_000))


def test_a_peer_that_fails_while_it_grows_has_empty_cells() -> None:
    given = results(100_000)
    each = {"p50": 0.001, "p95": 0.001, "recall": 1.0}
    given["growth"] = [
        {"rows": 1000, "peers": {"peer": each, "elizasql": each}},
        {"rows": 100_000, "peers": {"elizasql": each}},
    ]
    report = Report()
    tables.fill(report, given, None)
    (growth,) = [table for table in report.tables if table["title"] == "Growth, one agent"]
    assert growth["rows"] == [["1,000", "1.00 (1.000)", "1.00 (1.000)"], ["100,000", "", "1.00 (1.000)"]]


def test_the_page_judges_no_small_run() -> None:
    judged, small = (charts.page(results(rows), {}, None) for rows in (100_000, 5_000))
    assert "class='yes'" in judged
    assert "class='yes'" not in small
    assert "not judged" in small


def test_a_row_that_comes_twice_is_found_once(tmp_path: Path) -> None:
    task = driver.make_task(tmp_path, 40, 2, 2, 5)
    mine = task.members[0]
    best = mine[np.argsort(-(task.vectors[mine] @ task.queries[0]), kind="stable")]
    assert task.recall(0, 0, [int(row) for row in best[:10]]) == 1.0
    assert task.recall(0, 0, [int(best[0])] * 10) == 0.1
