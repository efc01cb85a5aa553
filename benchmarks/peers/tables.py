"""What a run of the peers says in words: the tables of the report, the goals, and the short table for the README."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.report import MILLION, Goal, Report, grown, named, percentile, with_spread

from .driver import BY_HAND, PEERS
from .suite import CALLERS

Results = dict[str, Any]
OURS, RESIDENT = "elizasql", "elizasql-resident"
# What with_index gives.
AS_IF = "elizasql, both, as if the caller waited"


def fill(report: Report, results: Results, before: Results | None) -> None:
    """Add everything to the report.

    Args:
        report: Where it goes.
        results: Of this run.
        before: Of the last run of the same size.
    """
    setup, peers = results["setup"], results["peers"]
    report.setup["peers"] = (
        f"{setup['rows']:,} memories of {setup['agents']} agents, {setup['source']}; each peer in its own process, "
        f"environment and database on one server, shared_buffers {setup.get('shared_buffers', 'as given')}"
    )
    report.table("Peers: search, top 10 of one agent", _SEARCH, _search(peers))
    rows = _rooms(peers)
    if rows:
        header = ["peer", "recall", "p50 ms", "p95 ms", "blocks' p50, quartiles", "over ours", "short of rows"]
        report.table(f"Peers: search in a room of {setup['room']:,}, a tenth of its agent's", header, rows)
    report.table("Peers: writes, everything indexed; mixed: 8 callers, 4 searches to 1 insert", _WRITES, _writes(peers))
    title = "Peers: searches a second, callers at once; the better of two turns, and the other"
    report.table(title, ["peer", *map(str, CALLERS)], _concurrency(peers))
    rows = _limits(results)
    if rows:
        report.table("The limit", ["what", "ours", "limit", "ratio", "spread"], rows)
    if results["growth"]:
        header = ["rows", *(f"{peers[name]['title']}: p50 ms (recall)" for name in results["growth"][0]["peers"])]
        report.table("Growth, one agent", header, _growth(results["growth"]))
    rows = [[kept["title"], kept["how"], _versions(kept)] for kept in peers.values()]
    report.table("Peers: how each was set up", ["peer", "how", "versions"], rows)
    rows = [[kept["title"], kept["failed"]] for kept in peers.values() if kept["failed"]]
    if rows:
        report.table("Peers that failed, and took no part from then on", ["peer", "why"], rows)
    if before is not None:
        rows = _change(results, before)
        header = ["peer", "search ms", "last run", "over ours", "last run", "insert ms", "last run"]
        report.table(f"Against the last run, {before['setup']['date']}", header, rows)
        report.before |= {named(goal.what): goal.measured for goal in goals(before) if goal.measured != "not measured"}
    for goal in goals(results):
        report.goal(*goal)


_SEARCH = [
    *("peer", "as documented: recall", "p50 ms", "short of rows"),
    *(
        "at our recall: recall",
        "p50 ms",
        "p95 ms",
        "blocks' p50, quartiles",
        "over ours",
        "setting",
        "client MB",
        "at its peak",
        "database MB",
    ),
]


def _search(peers: dict[str, Any]) -> list[list[str]]:
    ours = _at(peers, OURS)
    rows = []
    for name, kept in peers.items():
        if name.endswith("-check"):
            continue
        if not kept["points"]:
            rows.append([kept["title"], f"not measured: {kept['failed']}", *[""] * (len(_SEARCH) - 2)])
            continue
        first, equal = kept["points"][0], kept.get("equal")
        row = [kept["title"], f"{first['recall']:.3f}", milli(first["p50"])]
        row.append(f"{first['short']} of {first['searches']}")
        if equal:
            row += [
                f"{equal['recall']:.3f}" + ("" if equal["enough"] else " (does not reach it)"),
                milli(equal["p50"]),
                milli(equal["p95"]),
                "-".join(map(milli, equal["spread"])),
                f"{equal['p50'] / ours:.2f}" if ours else "",
                equal["label"],
            ]
        else:
            row += ["not measured", *[""] * 5]
        rows.append([*row, *(_mega(kept.get(name)) for name in ("memory", "peak", "bytes"))])
    return rows


def _rooms(peers: dict[str, Any]) -> list[list[str]]:
    rows = []
    ours = _room(peers, OURS)
    for name, kept in peers.items():
        mine = _room(peers, name)
        if mine:
            room = kept["room"]
            quartiles = [percentile(room["medians"], share) for share in (0.25, 0.75)]
            row = [kept["title"], f"{statistics.mean(room['recalls']):.3f}", milli(mine)]
            row += [milli(percentile(room["seconds"], 0.95)), "-".join(map(milli, quartiles))]
            row.append(f"{mine / ours:.2f}" if ours else "")
            rows.append([*row, f"{room['short']} of {len(room['recalls'])}" if "short" in room else ""])
    return rows


_WRITES = [
    *(
        "peer",
        "loaded rows/s",
        "with index",
        "single insert p50 ms",
        "p95 ms",
        "over ours",
        "batch rows/s",
        "ours over it",
    ),
    *("mixed calls/s", "search p95 ms", "insert p95 ms"),
]


def _writes(peers: dict[str, Any]) -> list[list[str]]:
    rows = []
    single, batch = insert(peers, OURS), _batch(peers, OURS)
    for name, kept in peers.items():
        row = [kept["title"]]
        load = kept.get("load")
        if load and not load.get("by_itself", True):
            row += ["past it", ""]
        else:
            row += [f"{load['rows'] / load['seconds']:,.0f}", f"{load_rate(kept):,.0f}"] if load else ["", ""]
        times = kept.get("insert_one")
        mine = statistics.median(times) if times else None
        p95 = percentile(times, 0.95) if times else None
        row += [milli(mine), milli(p95), f"{mine / single:.1f}" if mine and single else ""]
        rate = _batch(peers, name)
        row += [f"{rate:,.0f}" if rate else "", f"{batch / rate:.1f}" if rate and batch else ""]
        mixed = kept.get("mixed")
        if mixed:
            row += [_better(mixed)]
            row += [milli(statistics.median(each[key] for each in mixed)) for key in ("search_p95", "insert_p95")]
        if any(row[1:]):
            rows.append(row + [""] * (len(_WRITES) - len(row)))
        elif kept["failed"]:
            rows.append([kept["title"], f"not measured: {kept['failed']}", *[""] * (len(_WRITES) - 2)])
    indexing = peers[OURS].get("indexing")
    if indexing:
        # What is left to the background must be said beside what the caller is spared.
        rows.append(["elizasql, into the index afterwards", "", "", "", "", "", f"{indexing:,.0f}", "", "", "", ""])
    both, rate = with_index(peers)
    if single and batch and both and rate:
        row = [AS_IF, "", "", milli(both), "", f"{both / single:.1f}", f"{rate:,.0f}", f"{batch / rate:.1f}"]
        mixed = peers[OURS].get("mixed")
        # One call of five is an insert.
        calls = 1 / (1 / max(each["rate"] for each in mixed) + 0.2 / indexing) if mixed else None
        rows.append([*row, f"{calls:,.0f}" if calls else "", "", ""])
    return rows


def _concurrency(peers: dict[str, Any]) -> list[list[str]]:
    return [
        [
            kept["title"],
            *(
                _better(kept["concurrency"][str(callers)]) if str(callers) in kept["concurrency"] else ""
                for callers in CALLERS
            ),
        ]
        for kept in peers.values()
        if "concurrency" in kept
    ]


def _better(turns: Sequence[dict[str, Any]]) -> str:
    """Write the best rate of some turns, and what the others came to."""
    best, *others = (f"{rate:,.0f}" for rate in sorted((each["rate"] for each in turns), reverse=True))
    return f"{best} ({', '.join(others)})" if others else best


def _limits(results: Results) -> list[list[str]]:
    rows = []
    bench = results["limits"].get("pgbench")
    if isinstance(bench, str):
        rows.append(["the same statement by pgbench", f"not measured: {bench}", "", "", ""])
    elif bench:
        for what, kind, show in (
            ("one caller, p50 ms: elizasql, pgbench", "p50", milli),
            ("16 callers, searches/s: elizasql, pgbench", "rate_16", "{:,.0f}".format),
        ):
            ratios = over_pgbench(results, kind)
            both = [show(statistics.median(bench[key])) for key in (f"ours_{kind}", kind)]
            rows.append([what, *both, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"])
    ours = _at(results["peers"], OURS)
    for name in (BY_HAND.name, "numpy", "usearch"):
        limit = _at(results["peers"], name)
        if limit and ours:
            rows.append(
                [
                    f"one caller, p50 ms: elizasql, {results['peers'][name]['title']}",
                    milli(ours),
                    milli(limit),
                    f"{ours / limit:.2f}",
                    f"recall {results['peers'][name]['equal']['recall']:.3f}",
                ]
            )
    return rows


def _growth(points: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for point in points:
        found = [point["peers"].get(name) for name in points[0]["peers"]]
        rows.append([f"{point['rows']:,}", *(_grown(each) if each else "" for each in found)])
    return rows


def _grown(each: dict[str, Any]) -> str:
    short = f", {each['short']} short of rows" if each.get("short") else ""
    return f"{milli(each['p50'])} ({each['recall']:.3f}{short})"


def _versions(kept: dict[str, Any]) -> str:
    wanted = (
        *("elizasql", "asyncpg", "psycopg", "psycopg2-binary", "pgvector", "sqlalchemy", "langchain-postgres"),
        *("langgraph-checkpoint-postgres", "llama-index-vector-stores-postgres", "mem0ai", "agno", "vecs", "usearch"),
        *("numpy", "@elizaos/plugin-sql", "@electric-sql/pglite", "pg", "drizzle-orm"),
    )
    versions = kept.get("versions", {})
    return ", ".join([kept.get("runtime", "")] + [f"{name} {versions[name]}" for name in wanted if name in versions])


def _change(results: Results, before: Results) -> list[list[str]]:
    rows = []
    now, then = results["peers"], before["peers"]
    for name, kept in now.items():
        row = [kept["title"]]
        pairs = [(_at(peers, name), _at(peers, OURS)) for peers in (now, then)]
        row += [milli(mine) for mine, _ in pairs]
        row += [f"{mine / ours:.2f}" if mine and ours else "" for mine, ours in pairs]
        row += [milli(insert(peers, name)) for peers in (now, then)]
        if any(row[1:]):
            rows.append(row)
    return rows


# --- goals -----------------------------------------------------------------------------------------------------------

# From so many memories on growth is told.
_FROM = 10_000
# What has no database, is ours, or was written for this task alone, is no peer.
_NO_PEER = ("elizasql", "elizaos", "numpy", "usearch", BY_HAND.name)
# Nothing above the driver, one table, no foreign keys.
_DRIVERS = ("asyncpg", "psycopg")


def goals(results: Results) -> list[Goal]:
    """Hold the run to the goals. What could not be measured stands there as such.

    A peer without a figure, since it failed or was not chosen, might have been the fastest: a goal against the fastest
    that is met is not told as such then. One that is missed is missed with whichever others.
    """
    peers, size = results["peers"], results["setup"]["rows"]
    found: list[Goal] = []

    def missing(what: str, goal: str) -> None:
        found.append(Goal(what, "not measured", goal, None))

    def faster(what: str, turns: Turns, ours: str, theirs: str, least: float, without: Sequence[str] = ()) -> None:
        """Hold one of ours to a peer by their medians; the spread is that of the turns in which both had one.

        Args:
            what: The goal.
            turns: What is compared.
            ours, theirs: The names.
            least: How many times as fast ours is to be.
            without: Peers without a figure, of which one may be faster.
        """
        goal = f"≥ {least:g} x"
        (mine, my_turns), (other, other_turns) = (turns(peers, name) for name in (ours, theirs))
        if mine and other:
            parts = [b / a for a, b in zip(my_turns, other_turns, strict=False)]
            measured, met = with_spread(other / mine, parts, 1), other / mine >= least
            if without:
                measured += f", without {', '.join(without)}"
            found.append(Goal(what, measured, goal, None if met and without else met, size))
        else:
            missing(what, goal)

    def fastest(turns: Turns, names: Iterable[str]) -> tuple[str, str, list[str]]:
        """Give the title and the name of the peer that is fastest, none: no name; and who has no figure."""
        taken = {name: turns(peers, name)[0] for name in sorted(names)}
        known = {name: value for name, value in taken.items() if value}
        best = min(known, key=lambda name: known[name]) if known else ""
        return peers[best]["title"] if best else "none", best, [name for name in taken if name not in known]

    python = {name for name in (*peers, *(spec.name for spec in PEERS)) if not name.startswith(_NO_PEER)}
    above = {name for name in python if not name.startswith(_DRIVERS)}
    # Who was measured and does not find as much is no candidate.
    worse = {name for name in python if not peers.get(name, {}).get("equal", {"enough": True})["enough"]}
    floor = BY_HAND.name if peers.get(BY_HAND.name, {}).get("equal", {"enough": False})["enough"] else ""
    title, best, without = fastest(_searches, python - worse)
    title_above, best_above, without_above = fastest(_searches, above - worse)
    for name, least in ((OURS, 45.0), (RESIDENT, 100.0)):
        kept = peers.get(name, {})
        ours, mine = kept.get("title", name), _at(peers, name)
        what, wanted = f"{ours}: recall@10", 0.99 if name == OURS else 0.9999
        if mine:
            recall = kept["equal"]["recall"]
            found.append(Goal(what, f"{recall:.4f}", f"≥ {wanted:.4g}", recall >= wanted, size))
        else:
            missing(what, f"≥ {wanted:.4g}")
        faster(f"search, {ours}, against the original on the same server", _searches, name, "elizaos", least)
        room = f"search in a room of {results['setup'].get('room', 0):,}, {ours}, against the original"
        if name == RESIDENT:
            faster(room, _room_searches, name, "elizaos", 10)
        what = f"search, {ours}, against the fastest Python peer at that recall ({title})"
        faster(what, _searches, name, best, 3, without)
        faster(f"search, {ours}, against the floor written by hand", _searches, name, floor, 3)
        what = f"search, {ours}, against the fastest above a bare driver ({title_above})"
        faster(what, _searches, name, best_above, 3, without_above)
    for what, ratios, goal, least, most in (
        ("search against pgbench running the same statement", over_pgbench(results, "p50"), "≤ 1.15 x", 0.0, 1.15),
        ("16 callers, throughput against pgbench -c 16", over_pgbench(results, "rate_16"), "≥ 0.9 x", 0.9, math.inf),
    ):
        if ratios:
            ratio = statistics.median(ratios)
            found.append(Goal(what, with_spread(ratio, ratios), goal, least <= ratio <= most, size))
        else:
            missing(what, goal)
    title, best, without = fastest(_inserts, python)
    faster("create_memory, unique given, against the original", _inserts, OURS, "elizaos", 3)
    faster(f"create_memory against the fastest peer with HNSW ({title})", _inserts, OURS, best, 5, without)
    faster("create_memory against the floor written by hand", _inserts, OURS, BY_HAND.name, 5)
    title, best, without = fastest(_inserts, above)
    faster(f"create_memory against the fastest above a bare driver ({title})", _inserts, OURS, best, 5, without)
    what = "create_memory with the near-duplicate check, against the original"
    faster(what, _inserts, "elizasql-check", "elizaos-check", 3)
    title, best, without = fastest(_batches, python)
    faster("create_memories against the original", _batches, OURS, "elizaos", 30)
    what = f"create_memories against the fastest peer with HNSW in place ({title})"
    faster(what, _batches, OURS, best, 20, without)
    faster("create_memories against the floor written by hand", _batches, OURS, BY_HAND.name, 20)
    what = f"load_memories of {size:,}, {results['setup']['agents']} agents one after the other, index and all"
    if peers[OURS].get("load"):
        rate = load_rate(peers[OURS])
        found.append(Goal(what, f"{rate:,.0f} rows/s", "≥ 4,000 rows/s", rate >= 4000, size, MILLION))
    else:
        missing(what, "≥ 4,000 rows/s")
    points = results["growth"]
    for name in (OURS, RESIDENT):
        what = f"growth of one agent, {peers.get(name, {}).get('title', name)}"
        known = [point for point in points if name in point["peers"]]
        if len(known) > 1 and known[-1] is points[-1]:
            first = next((point for point in known[:-1] if point["rows"] >= _FROM), known[0])
            small, large = (point["peers"][name] for point in (first, known[-1]))
            ratio = large["p50"] / small["p50"]
            # The two were measured apart: any turn of the one against any of the other.
            parts = [b / a for a in small.get("medians", ()) for b in large.get("medians", ())]
            what += f", {first['rows']:,} to {known[-1]['rows']:,}"
            found.append(grown(what, ratio, parts, (small["recall"], large["recall"]), known[-1]["rows"]))
        else:
            missing(what, "≤ 2.5 x, recall ≥ 0.99 at both ends")
    return found


def readme(results: Results) -> str:
    """Give the short table for the README, as markdown."""
    peers, setup = results["peers"], results["setup"]
    ours = _at(peers, OURS) or 1.0
    lines = [
        f"| {setup['rows']:,} {setup['source'].split(' (')[0]}, {setup['agents']} agents, one server "
        "| search at our recall, p50 | recall as documented | single insert, p50 | batch, rows/s |",
        "|---|---|---|---|---|",
    ]
    for name, kept in peers.items():
        if name.endswith("-check"):
            continue
        if not kept["points"]:
            lines.append(f"| {kept['title']} | not measured: {kept['failed']} | | | |")
            continue
        searched = "not measured"
        if equal := kept.get("equal"):
            reach = "" if equal["enough"] else f", recall {equal['recall']:.2f}"
            searched = f"{milli(equal['p50'])} ms ({equal['p50'] / ours:.1f} x{reach})"
        single, rate = insert(peers, name), _batch(peers, name)
        lines.append(
            f"| {kept['title']} | {searched} "
            f"| {kept['points'][0]['recall']:.3f} | {milli(single) + ' ms' if single else ''} "
            f"| {f'{rate:,.0f}' if rate else ''} |"
        )
    return "\n".join(lines)


# --- small things ----------------------------------------------------------------------------------------------------


def _at(peers: dict[str, Any], name: str) -> float | None:
    """Give a peer's median search at equal recall."""
    equal = peers.get(name, {}).get("equal")
    return equal["p50"] if equal else None


def _room(peers: dict[str, Any], name: str) -> float | None:
    """Give a peer's median search in a room."""
    room = peers.get(name, {}).get("room")
    return statistics.median(room["seconds"]) if room else None


def insert(peers: dict[str, Any], name: str) -> float | None:
    """Give a peer's median single insert."""
    times = peers.get(name, {}).get("insert_one")
    return statistics.median(times) if times else None


def _batch(peers: dict[str, Any], name: str) -> float | None:
    """Give a peer's rows a second in batches."""
    rates = peers.get(name, {}).get("insert_many")
    return statistics.median(rates) if rates else None


# A median, None where it was not measured, and those of the turns, in their order.
Turns = Callable[[dict[str, Any], str], "tuple[float | None, list[float]]"]


def _searches(peers: dict[str, Any], name: str) -> tuple[float | None, list[float]]:
    return _at(peers, name), peers.get(name, {}).get("equal", {}).get("medians", [])


def _room_searches(peers: dict[str, Any], name: str) -> tuple[float | None, list[float]]:
    return _room(peers, name), peers.get(name, {}).get("room", {}).get("medians", [])


def _inserts(peers: dict[str, Any], name: str) -> tuple[float | None, list[float]]:
    return insert(peers, name), peers.get(name, {}).get("insert_one_medians", [])


def _batches(peers: dict[str, Any], name: str) -> tuple[float | None, list[float]]:
    """Give the seconds a row."""
    rate = _batch(peers, name)
    return 1 / rate if rate else None, [1 / each for each in peers.get(name, {}).get("insert_many_medians", [])]


def with_index(peers: dict[str, Any]) -> tuple[float | None, float | None]:
    """Give our single insert and our batches as if the caller waited for what the background does: seconds, rows/s."""
    single, batch, rate = insert(peers, OURS), _batch(peers, OURS), peers[OURS].get("indexing")
    if not rate:
        return None, None
    return single and single + 1 / rate, batch and 1 / (1 / batch + 1 / rate)


def over_pgbench(results: Results, kind: str) -> list[float]:
    """Give ours over pgbench's, turn by turn; none where it was not measured."""
    bench = results["limits"].get("pgbench")
    if not isinstance(bench, dict):
        return []
    return [ours / limit for ours, limit in zip(bench[f"ours_{kind}"], bench[kind], strict=True)]


def load_rate(kept: dict[str, Any]) -> float:
    """Give the rows a second of the first load, index included."""
    load = kept["load"]
    rate: float = load["rows"] / (load["seconds"] + load["index_seconds"])
    return rate


def milli(seconds: float | None) -> str:
    """Write seconds as milliseconds."""
    return "" if seconds is None else f"{seconds * 1e3:,.2f}"


def _mega(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.0f}"
