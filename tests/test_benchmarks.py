"""What the benchmarks tell of the peers: nothing is told that was not measured."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import charts, data
from benchmarks.peers import driver, tables
from benchmarks.peers.base import Place
from benchmarks.peers.suite import Sizes, Suite, find_faults, last_run
from benchmarks.report import Comparison, Report, measured_before


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


def test_fewer_rows_than_match_of_one_of_ours_fail_the_benchmark_and_of_a_peer_are_told() -> None:
    given = results(100_000)
    room = {"seconds": [0.001], "medians": [0.001], "recalls": [0.9, 0.9], "short": 0}
    point = {"p50": 0.001, "p95": 0.001, "recall": 0.9, "short": 0}
    given["setup"]["room"] = 1000
    for kept in given["peers"].values():
        kept["room"] = dict(room)
    given["growth"] = [{"rows": 1000, "peers": {name: dict(point) for name in given["peers"]}}]
    assert find_faults(given) == []
    for searched in (given["peers"]["peer"]["points"][0], given["peers"]["peer"]["room"]):
        searched["short"] = 1
    given["growth"][0]["peers"]["peer"]["short"] = 1
    assert find_faults(given) == []
    report = Report()
    tables.fill(report, given, None)
    rows = {table["title"].partition(",")[0]: table["rows"] for table in report.tables}
    assert [row[-1] for row in rows["Peers: search in a room of 1"]] == ["0 of 2", "1 of 2"]
    assert rows["Growth"] == [["1,000", "1.00 (0.900)", "1.00 (0.900, 1 short of rows)"]]
    ours = given["peers"]["elizasql"]
    for searched in (ours["points"][0], ours["equal"], ours["room"], given["growth"][0]["peers"]["elizasql"]):
        searched["short"] = 2
    assert find_faults(given) == [
        "elizasql, as documented: 2 short",
        "elizasql, at equal recall: 2 short",
        "elizasql, in a room: 2 short",
        "elizasql, growth to 1,000: 2 short",
    ]


def test_a_search_of_ours_that_comes_back_short_is_an_error() -> None:
    exact = data.Exact(np.eye(12, dtype=np.float32))
    query = np.arange(12, dtype=np.float32)
    assert exact.recall_in_full(query, range(2, 12)) == 1.0
    assert exact.recall_in_full(query, range(10)) == 0.8
    for found in (range(3, 12), [*range(3, 12), 3], [*range(2, 12), 2]):
        with pytest.raises(AssertionError, match="fewer rows than match"):
            exact.recall_in_full(query, found)
    assert data.Exact(np.eye(2, dtype=np.float32)).recall_in_full(query[:2], [0, 1]) == 1.0


@pytest.mark.parametrize("name", ["elizasql", "elizasql-resident", "elizasql-check", "growth-elizasql-resident"])
def test_a_peer_may_fail_but_none_of_ours(name: str) -> None:
    suite = Suite([], Sizes.tiny(10), run=lambda _: None, say=lambda _: None)
    suite.close()

    def fail() -> None:
        raise driver.PeerError("it broke")

    suite.results["peers"] = {"peer": {"failed": None}, name.removeprefix("growth-"): {"failed": None}}
    peer = driver.Spec("peer", "A peer", "")
    assert suite._guard(peer, fail) is None
    with pytest.raises(driver.PeerError):
        suite._guard(driver.Spec(name, "One of ours", ""), fail)
    assert all(kept["failed"] for kept in suite.results["peers"].values())


def test_where_nothing_is_installed_no_peer_may_fail() -> None:
    assert find_faults(results(100_000)) == []
    assert find_faults(results(100_000), all_succeed=True) == ["peer: search: it broke"]


def test_the_page_judges_no_small_run() -> None:
    judged, small = (charts.page(results(rows), {}, None) for rows in (100_000, 5_000))
    assert "class='yes'" in judged
    assert "class='yes'" not in small
    assert "not judged" in small


def test_a_goal_is_judged_only_where_as_many_memories_were_measured_as_it_speaks_of() -> None:
    report = Report(size=100_000)
    report.goal("search", "1.2 x", "≤ 3 x", True)
    report.goal("growth to a million", "2.1 x", "≤ 2.5 x", True, of=1_000_000)
    report.goal("3,072 dimensions", "0.97", "≥ 0.98", False, size=10_000)
    report.goal("while others write", "9.0 x", "≤ 3 x", False, size=10_000, of=10_000)
    report.goal("pgbench", "not measured", "≤ 1.15 x", None, size=10_000)
    verdicts = ["yes", "not judged: 100,000 of 1,000,000", "not judged: 10,000 of 100,000", "NO", "not measured"]
    assert [goal["met"] for goal in report.goals] == verdicts
    assert [goal["measured"] for goal in report.goals] == ["1.2 x", "2.1 x", "0.97", "9.0 x", "not measured"]
    quick = Report(size=2_000, judged=False)
    quick.goal("to the first answer", "1 s", "≤ 5 s", True, of=0)
    assert quick.goals[0]["met"] == "not judged: a quick run"


def test_of_several_states_the_one_that_finds_least_is_judged() -> None:
    report = Report()
    report.recall("after deletes", {"whole": 0.995, "half deleted": 0.989, "vacuumed": 0.999})
    report.recall("3,072 dimensions", {"3072": 0.985}, 0.98)
    assert [[*goal.values()] for goal in report.goals] == [
        ["after deletes: recall@10, the worst (half deleted)", "0.9890", "", "≥ 0.99", "NO"],
        ["3,072 dimensions: recall@10", "0.9850", "", "≥ 0.98", "yes"],
    ]


def test_the_growth_of_the_peers_begins_at_ten_thousand() -> None:
    given = results(100_000)
    given["growth"] = [
        {"rows": rows, "peers": {"elizasql": {"p50": p50, "recall": 1.0}}}
        for rows, p50 in ((1_000, 0.001), (10_000, 0.002), (100_000, 0.003), (1_000_000, 0.004))
    ]

    def growth() -> tuple[str, bool | None, str]:
        (goal,) = [each for each in tables.goals(given) if each.what.startswith("growth of one agent, elizasql,")]
        report = Report()
        report.goal(*goal)
        return goal.what, goal.met, report.goals[0]["met"]

    assert growth() == ("growth of one agent, elizasql, 10,000 to 1,000,000", True, "yes")
    # What has become no slower because it finds less is missed.
    ends = [given["growth"][place]["peers"]["elizasql"] for place in (1, -1)]
    for end in ends:
        end["recall"] = 0.9899
        assert growth()[1:] == (False, "NO")
        end["recall"] = 0.99
    assert growth()[1:] == (True, "yes")
    del given["growth"][-1]
    assert growth() == ("growth of one agent, elizasql, 10,000 to 100,000", True, "not judged: 100,000 of 1,000,000")


def test_a_row_that_comes_twice_is_found_once(tmp_path: Path) -> None:
    task = driver.make_task(tmp_path, 40, 2, 2, 5)
    mine = task.members[0]
    best = mine[np.argsort(-(task.vectors[mine] @ task.queries[0]), kind="stable")]
    assert task.recall(0, 0, [int(row) for row in best[:10]]) == 1.0
    assert task.recall(0, 0, [int(best[0])] * 10) == 0.1


def test_what_could_not_be_measured_stands_among_the_goals_as_such() -> None:
    """Without the original, without pgbench, and with a resident tier that failed, no goal goes missing."""
    given = results(100_000)
    given["limits"] = {"pgbench": "there is no pgbench"}
    report = Report()
    tables.fill(report, given, None)
    verdicts = {goal["what"]: goal["met"] for goal in report.goals}
    assert verdicts["elizasql: recall@10"] == "yes"
    for what in (
        "search, elizasql, against the original on the same server",
        "elizasql-resident: recall@10",
        "search against pgbench running the same statement",
        "16 callers, throughput against pgbench -c 16",
        "create_memory, unique given, against the original",
        "create_memories against the original",
        "load_memories of 100,000, 10 agents one after the other, index and all",
        "growth of one agent, elizasql",
    ):
        assert verdicts[what] == "not measured", what
    assert "<td class='no'>not measured</td>" in charts.page(given, {}, None)


def test_what_is_faster_than_the_fastest_that_was_measured_may_not_be_faster_than_all() -> None:
    given = results(100_000)
    peers = given["peers"]
    peer = peers.pop("peer")
    for spec in driver.PEERS:
        peers[spec.name] = {**peer, "title": spec.title, "failed": None, "equal": point("x", 0.99, 0.01, enough=True)}
        peers[spec.name] |= {"insert_one": [0.01], "insert_many": [30.0]}
    peers["elizasql"] |= {"insert_one": [0.001], "insert_many": [900.0]}
    goal = "search, elizasql, against the fastest Python peer at that recall"
    above = "search, elizasql, against the fastest above a bare driver"
    single, batch = "create_memory against the fastest peer with HNSW", "create_memories against the fastest peer"

    def judged() -> dict[str, tuple[str, bool | None]]:
        found = {each.what.partition(" (")[0]: (each.measured, each.met) for each in tables.goals(given)}
        return {each: found[each] for each in (goal, above, single, f"{batch} with HNSW in place")}

    assert [*judged().values()] == [("5.0 x", True), ("5.0 x", True), ("10.0 x", True), ("30.0 x", True)]
    peers["mem0"]["equal"]["enough"] = False  # is no candidate, and takes nothing away
    assert judged()[goal] == ("5.0 x", True)
    # One failed, which the others do not mind as long as it has figures; one was not chosen.
    del peers["psycopg"]["equal"], peers["psycopg"]["insert_many"], peers["vecs"]
    peers["psycopg"]["failed"] = "it broke"
    assert [*judged().values()] == [
        ("5.0 x, without psycopg, vecs", None),
        ("5.0 x, without vecs", None),
        ("10.0 x, without vecs", None),
        ("30.0 x, without psycopg, vecs", None),
    ]
    # What is missed would be missed with these, too.
    peers["langgraph"]["equal"]["p50"] = 0.003
    assert judged()[goal] == ("1.5 x, without psycopg, vecs", False)
    report = Report()
    tables.fill(report, results(100_000), given)
    assert report.before[goal] == "1.5 x, without psycopg, vecs"


def test_the_floor_is_no_peer_and_has_goals_of_its_own() -> None:
    """What was written for this task alone is faster than any peer: the goals are held to it apart, and told."""
    given = results(100_000)
    peers = given["peers"]
    peer = peers.pop("peer")
    for spec in driver.PEERS:
        peers[spec.name] = {**peer, "title": spec.title, "failed": None, "equal": point("x", 0.99, 0.01, enough=True)}
        peers[spec.name] |= {"insert_one": [0.01], "insert_many": [30.0]}
    peers["by-hand"] |= {"equal": point("x", 0.99, 0.002, enough=True), "insert_one": [0.003], "insert_many": [300.0]}
    peers["elizasql"] |= {"insert_one": [0.001], "insert_many": [900.0]}

    def judged(*names: str) -> list[tuple[str, bool | None]]:
        found = {each.what.partition(" (")[0]: (each.measured, each.met) for each in tables.goals(given)}
        return [found[name] for name in names]

    floor = "search, elizasql, against the floor written by hand"
    search = "search, elizasql, against the fastest Python peer at that recall"
    writes = [f"{what} against the floor written by hand" for what in ("create_memory", "create_memories")]
    assert judged(search, floor, *writes) == [("5.0 x", True), ("1.0 x", False), ("3.0 x", False), ("3.0 x", False)]
    # Nothing is told of the times of what finds less.
    peers["by-hand"]["equal"]["enough"] = False
    assert judged(floor) == [("not measured", None)]
    del peers["by-hand"]
    assert judged(search, floor) == [("5.0 x", True), ("not measured", None)]


def test_the_goals_of_the_other_benchmarks_stand_on_the_page_once(tmp_path: Path) -> None:
    path = tmp_path / "peers-202601010000-100000.json"
    path.write_text(json.dumps(results(100_000)), encoding="utf-8")
    whole = Report()
    tables.fill(whole, results(100_000), None)
    whole.table("Search in every room", ["rows"], [["37-69"]])
    whole.goal("recall of every room", "0.97", "≥ 0.99", False)
    charts.write(path, whole)
    charts.write(path)  # as the command line does, from the JSON alone
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    assert page.count("<h2>Search in every room</h2>") == 1
    assert "<td>recall of every room</td><td>0.97</td><td></td><td>≥ 0.99</td><td class='no'>NO</td>" in page
    assert page.count("<td>elizasql: recall@10</td>") == 1


def test_a_run_is_held_to_the_last_one_that_measured_the_same(tmp_path: Path) -> None:
    def kept(stamp: str, **setup: Any) -> None:
        run = results(100_000)
        run["setup"] |= {"date": stamp, **setup}
        if setup.get("source") == "broken off":
            run["setup"]["source"] = "some"
            del run["peers"]["elizasql"]["equal"]
        (tmp_path / f"peers-{stamp}-100000.json").write_text(json.dumps(run), encoding="utf-8")

    now = tmp_path / "peers-202601060000-100000.json"
    assert last_run(results(100_000), now) is None
    kept("202601010000")
    kept("202601020000")
    kept("202601030000", source="others")
    kept("202601040000", source="broken off")
    kept("202601060000")  # itself
    kept("202601070000")
    before = last_run(results(100_000), now)
    assert before is not None
    assert before["setup"]["date"] == "202601020000"


def test_what_the_background_does_later_is_added_to_what_the_caller_waits_for() -> None:
    given = results(100_000)
    given["peers"]["elizasql"] |= {"insert_one": [0.001], "insert_many": [1000.0], "indexing": 500.0}
    report = Report()
    tables.fill(report, given, None)
    (writes,) = [table for table in report.tables if table["title"].startswith("Peers: writes")]
    row = dict(zip(writes["header"], writes["rows"][-1], strict=True))
    assert row["single insert p50 ms"] == "3.00"
    assert row["over ours"] == "3.0"
    assert row["batch rows/s"] == "333"
    assert row["ours over it"] == "3.0"


@pytest.mark.slow
def test_the_charts_can_be_drawn_of_a_run_that_was_broken_off() -> None:
    pytest.importorskip("matplotlib")
    given = results(100_000)
    assert {"recall", "equal"} == set(charts.charts(given))
    given["peers"]["elizasql"] |= {"insert_one": [0.001, 0.002], "insert_many": [1000.0], "indexing": 500.0}
    given["peers"]["peer"] |= {"insert_one": [0.003], "concurrency": {"1": [{"rate": 10.0}]}}
    assert {"recall", "equal", "writes", "concurrency"} == set(charts.charts(given))
    del given["peers"]["elizasql"]["equal"]
    assert "equal" not in charts.charts(given)


def test_a_room_is_compared_with_what_is_in_it(tmp_path: Path) -> None:
    task = driver.make_task(tmp_path, 400, 20, 2, 5)
    mine = task.roommates[1]
    assert len(mine) == 20
    assert set(mine) < set(task.members[1])
    assert [int(each) for each in np.fromfile(tmp_path / "rooms.i32", np.int32)[[*mine, 400, 419]]] == [1] * 20 + [0, 0]
    elsewhere = [int(row) for row in task.members[1] if row not in mine]
    best = mine[np.argsort(-(task.vectors[mine] @ task.queries[0]), kind="stable")]
    assert task.recall(0, 1, [int(row) for row in best[:9]] + elsewhere[:1], room=True) == pytest.approx(0.9)


def test_a_room_is_held_to_the_original() -> None:
    given = results(100_000)
    given["setup"]["room"] = 1000
    room = {"seconds": [0.001], "medians": [0.001], "recalls": [1.0]}
    given["peers"]["elizasql-resident"] = given["peers"]["elizasql"] | {"title": "resident", "room": room}
    given["peers"]["elizaos"] = given["peers"]["peer"] | {"room": room | {"seconds": [0.0105]}}
    goals = {each.what: (each.measured, each.met) for each in tables.goals(given)}
    assert goals["search in a room of 1,000, resident, against the original"] == ("10.5 x", True)
    report = Report()
    tables.fill(report, given, None)
    (rooms,) = [table for table in report.tables if "in a room of 1,000" in table["title"]]
    assert [row[:3] for row in rooms["rows"]] == [["A peer", "1.000", "10.50"], ["resident", "1.000", "1.00"]][::-1]


def test_every_goal_is_held_to_the_last_run_that_measured_it(tmp_path: Path) -> None:
    def keep(name: str, memories: str, measured: str, vectors: str = "real ones") -> None:
        goals = [{"what": "search (of 12)", "measured": measured, "goal": "≤ 3 x", "met": "yes"}]
        run = {"setup": {"memories": memories, "vectors": vectors}, "tables": [], "goals": goals}
        (tmp_path / f"summary-{name}.json").write_text(json.dumps(run), encoding="utf-8")

    keep("1", "100,000", "1.2 x")
    keep("2", "100,000", "1.3 x")
    keep("3", "5,000", "9 x")
    keep("4", "100,000", "not measured")
    keep("5", "100,000", "8 x", "generated ones")
    report = Report(before=measured_before({"memories": "100,000", "vectors": "real ones"}, tmp_path))
    report.goal("search (of 13)", "1.4 x", "≤ 3 x", True)
    report.goal("insert", "2 x", "≤ 3 x", True)
    assert [goal["last run"] for goal in report.goals] == ["1.3 x", ""]


def test_the_goals_of_the_peers_are_held_to_their_last_run() -> None:
    before = results(100_000)
    before["peers"]["elizasql"]["equal"]["recall"] = 0.985
    report = Report()
    tables.fill(report, results(100_000), before)
    (recall,) = [goal for goal in report.goals if goal["what"] == "elizasql: recall@10"]
    assert (recall["measured"], recall["last run"]) == ("0.9900", "0.9850")


def test_goals_are_told_with_the_spread_of_their_turns() -> None:
    given = results(100_000)
    ours, other = given["peers"]["elizasql"], given["peers"]["peer"]
    given["peers"]["elizaos"] = other
    ours["equal"]["medians"] = [0.002, 0.001]
    other["equal"] = point("as documented", 0.99, 0.1, medians=[0.08, 0.06], enough=True)
    ours |= {"insert_one": [0.001], "insert_one_medians": [0.001, 0.002]}
    other |= {"insert_one": [0.004], "insert_one_medians": [0.005, 0.004]}
    ours |= {"insert_many": [900.0], "insert_many_medians": [800.0, 1000.0]}
    other |= {"insert_many": [30.0], "insert_many_medians": [20.0, 40.0]}
    given["growth"] = [
        {"rows": rows, "peers": {"elizasql": {"p50": p50, "recall": 1.0, "medians": [p50, 2 * p50]}}}
        for rows, p50 in ((10_000, 0.001), (100_000, 0.002))
    ]
    measured = {each.what: each.measured for each in tables.goals(given)}
    assert measured["search, elizasql, against the original on the same server"] == "50.0 x (40.0-60.0)"
    assert measured["create_memory, unique given, against the original"] == "4.0 x (2.0-5.0)"
    assert measured["create_memories against the original"] == "30.0 x (25.0-40.0)"
    assert (
        measured["growth of one agent, elizasql, 10,000 to 100,000"] == "2.00 x (1.00-4.00), recall 1.0000 and 1.0000"
    )


def test_a_ratio_is_told_with_its_spread_over_the_stretches_of_the_run() -> None:
    slow = [3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 4.0, 4.0, 2.0, 2.0]
    comparison = Comparison({"first": [1.0] * 10, "slow": slow, "slower": [4.0] * 10})
    assert comparison.times("slow") == "2.00 x (2.00-4.00)"
    assert comparison.times("slower", "slow") == "2.00 x (1.00-2.00)"
    assert comparison.more_by_stretch("slow") == [2.0, 1.0, 1.0, 3.0, 1.0]
    assert Comparison({"first": [1.0], "slow": [2.0]}).times("slow") == "2.00 x"


def test_of_two_turns_both_rates_are_told() -> None:
    given = results(100_000)
    given["peers"]["peer"] |= {"concurrency": {"1": [{"rate": 1000.0}, {"rate": 1200.0}]}}
    report = Report()
    tables.fill(report, given, None)
    (rates,) = [table for table in report.tables if table["header"][:2] == ["peer", "1"]]
    assert rates["rows"] == [["A peer", "1,200 (1,000)", "", "", ""]]


def test_a_peer_that_cannot_be_installed_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was forgotten is a warning, and an error in whatever benchmark comes next."""
    monkeypatch.setenv("PATH", "")
    spec = driver.Spec("elsewhere", "A peer", "on_elizaos.mjs", ("nothing",))
    with pytest.raises(driver.PeerError, match="needs node and npm"):
        driver.Process(spec, tmp_path / "logs")
    gc.collect()
    assert not (tmp_path / "logs").exists()


def test_the_page_of_a_run_that_was_broken_off_before_any_search() -> None:
    given = results(100_000)
    for kept in given["peers"].values():
        kept["points"] = []
    del given["peers"]["elizasql"]["equal"]
    assert charts.charts(given) == {}
    assert "100,000 memories of 10 agents: elizasql was not measured." in charts.page(given, {}, None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_the_memory_of_a_peer_is_that_of_its_peak(tmp_path: Path) -> None:
    for name, kind in (("vectors.f32", "f4"), ("queries.f32", "f4"), ("agents.i32", "i4"), ("rooms.i32", "i4")):
        np.zeros(8, kind).tofile(tmp_path / name)
    process = driver.Process(driver.Spec("elsewhere", "A peer", "in_process:Numpy"), tmp_path / "logs")
    try:
        place = driver.as_request(Place("", 0, "", "", ""), tmp_path)
        process.ask("open", place=place, folder=str(tmp_path), width=4)
        assert process.memory is not None
        assert process.peak >= process.memory > 0
    finally:
        process.end()
    given = results(100_000)
    given["peers"]["elizasql"] |= {"memory": 50_000_000, "peak": 80_000_000, "bytes": 10_000_000}
    report = Report()
    tables.fill(report, given, None)
    search = report.tables[0]
    row = dict(zip(search["header"], search["rows"][0], strict=True))
    assert (row["client MB"], row["at its peak"], row["database MB"]) == ("50", "80", "10")
