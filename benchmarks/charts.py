"""The page that a person looks at: charts and tables of a run of the peers.

    python -m benchmarks.charts                            # the last run
    python -m benchmarks.charts .benchmarks/peers-...json

Writes an HTML page that needs nothing else, and its charts as PNG beside it. Charts need matplotlib, which is in the
dependency group `bench`; without it the page has the tables alone, and says so.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import tables
from benchmarks.peers.suite import CALLERS, last_run
from benchmarks.report import FOLDER, Report, keep, percentile

Results = dict[str, Any]

# Ours stand out, in red; the original is black, what has no database is pale; the others have one colour each.
_OURS = {"elizasql": "#c1121f", "elizasql-resident": "#ff7b00", "elizasql-check": "#e07a80"}
_ORIGINAL = {"elizaos": "#000000", "elizaos-pglite": "#6c757d", "elizaos-check": "#444444"}
_IN_PROCESS = {"numpy": "#adb5bd", "usearch": "#c9ada7"}
_OTHERS = ("#1d4e89", "#2a9d8f", "#7b2cbf", "#588157", "#00a6fb", "#bc6c25", "#9d8189", "#3a86ff", "#8ac926", "#5e548e")
_INK, _GRID = "#222222", "#dddddd"


def _colours(results: Results) -> dict[str, str]:
    known = _OURS | _ORIGINAL | _IN_PROCESS
    others = [name for name in results["peers"] if name not in known]
    return known | {name: _OTHERS[number % len(_OTHERS)] for number, name in enumerate(others)}


def charts(results: Results) -> dict[str, tuple[str, bytes]]:
    """Draw; give by name each chart's caption and its PNG. Nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]

    mpl.use("Agg")
    mpl.rcParams |= {
        "font.size": 10,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "figure.dpi": 110,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": _GRID,
        "axes.axisbelow": True,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
    }
    drawn: dict[str, tuple[str, bytes]] = {}
    ways: dict[str, tuple[str, Callable[[Results], Any]]] = {
        "recall": (
            "Search: what is found, and how long it takes. A ring is the peer as its documentation has it; the line "
            "turns its knob. Up and left is better.",
            _recall,
        ),
        "equal": (
            "Search at our recall, one caller: median, and quartiles of the blocks' medians. A ring does not reach it.",
            _equal,
        ),
        "writes": (
            "Writes into a database that has everything indexed: median, and quartiles (of batches, all). elizasql "
            "leaves the index to the background; the ring is what it would be if the caller waited for that, too.",
            _writes,
        ),
        "concurrency": ("Searches a second with callers at once, client and server on one machine.", _concurrency),
        "growth": ("One agent that remembers more and more.", _growth),
    }
    for name, (caption, draw) in ways.items():
        figure = draw(results)
        if figure is not None:
            target = io.BytesIO()
            figure.savefig(target, format="png", bbox_inches="tight", facecolor="white")
            drawn[name] = (caption, target.getvalue())
    return drawn


def _figure(width: float, height: float, parts: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, parts)


def _plain(axis: Any) -> None:
    """Write numbers and not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator  # type: ignore[import-not-found,unused-ignore]

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(FuncFormatter(lambda _value, _: ""))


def _searched(results: Results) -> dict[str, Any]:
    return {name: kept for name, kept in results["peers"].items() if kept["points"]}


def _recall(results: Results) -> Any:
    searched = _searched(results)
    if not searched:
        return None
    figure, axes = _figure(10, 5.6)
    colours = _colours(results)
    for name, kept in searched.items():
        points = kept["points"]
        # By ef_search; our own setting is 100 and one more point of our line.
        turned = [*points[1:], points[0] | {"label": "ef 100"}] if name == "elizasql" else points[1:] or points
        line = sorted(turned, key=lambda point: [int(part) for part in re.findall(r"\d+", point["label"])])
        style = {
            "color": colours[name],
            "linewidth": 2.6 if name in _OURS else 1.3,
            "zorder": 5 if name in _OURS else 3,
        }
        x = [1 - min(point["recall"], 0.9995) for point in line]
        axes.plot([p["p50"] * 1e3 for p in line], x, marker="o", markersize=4, label=kept["title"], **style)
        first = points[0]
        axes.plot(
            [first["p50"] * 1e3],
            [1 - min(first["recall"], 0.9995)],
            marker="o",
            markersize=10,
            fillstyle="none",
            color=colours[name],
            linestyle="none",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_yaxis()
    ticks = (0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.0005)
    axes.set_yticks(ticks, ["0.1", "0.5", "0.8", "0.9", "0.95", "0.98", "0.99", "0.995", "1"])
    axes.minorticks_off()
    _plain(axes.xaxis)
    axes.set_xlabel("median of a search, ms (log)")
    axes.set_ylabel("recall@10")
    axes.set_title("Latency against recall")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _dots(axes: Any, rows: list[_Row], text: Callable[[float], str], title: str, *, least_on_top: bool) -> None:
    """Draw a line for each, the best on top: a dot, a ring for what is to be set apart, and how far it spreads.

    On a logarithmic axis, which has no zero, so that a bar's length would say nothing.
    """
    # From the bottom to the top, so the best comes last.
    rows = sorted(rows, key=lambda row: row.value, reverse=least_on_top)
    for height, row in enumerate(rows):
        axes.plot(row.spread, [height, height], color=row.colour, linewidth=2.5, alpha=0.5, solid_capstyle="butt")
        fill = "none" if row.ring else "full"
        axes.plot([row.value], [height], marker="o", markersize=8, color=row.colour, fillstyle=fill, markeredgewidth=2)
        axes.annotate(
            text(row.value),
            (max(row.spread), height),
            textcoords="offset points",
            xytext=(9, 0),
            verticalalignment="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.margins(x=0.25, y=0.04)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.title.startswith("elizasql") else "normal")
    axes.set_title(title)


@dataclass(frozen=True)
class _Row:
    """A line of a chart: what it is called, what was measured, and between which values."""

    title: str
    colour: str
    value: float
    spread: tuple[float, float]
    ring: bool = False


def _equal(results: Results) -> Any:
    searched = {name: kept for name, kept in _searched(results).items() if "equal" in kept}
    if "elizasql" not in searched:
        return None
    figure, axes = _figure(9, 0.6 + 0.38 * len(searched))
    ours, colours = searched["elizasql"]["equal"]["p50"], _colours(results)
    rows = []
    for name, kept in searched.items():
        low, high = (each * 1e3 for each in kept["equal"]["spread"])
        ring = not kept["equal"].get("enough", True)
        rows.append(_Row(kept["title"], colours[name], kept["equal"]["p50"] * 1e3, (low, high), ring))
    _dots(
        axes,
        rows,
        lambda value: f"{value:,.2f}  ({value / ours / 1e3:.2g} x)",
        "Search at equal recall, p50 ms (log)",
        least_on_top=True,
    )
    return figure


def _writes(results: Results) -> Any:
    peers, colours = results["peers"], _colours(results)
    single, batch = [], []
    for name, kept in peers.items():
        if times := [each * 1e3 for each in kept.get("insert_one", [])]:
            spread = percentile(times, 0.25), percentile(times, 0.75)
            single.append(_Row(kept["title"], colours[name], statistics.median(times), spread))
        if rates := kept.get("insert_many"):
            batch.append(_Row(kept["title"], colours[name], statistics.median(rates), (min(rates), max(rates))))
    if not single:
        return None
    title, red = "elizasql, with the index", colours["elizasql"]
    both, rate = tables.with_index(peers)
    single += [_Row(title, red, both * 1e3, (both * 1e3, both * 1e3), ring=True)] if both else []
    batch += [_Row(title, red, rate, (rate, rate), ring=True)] if rate else []
    figure, (left, right) = _figure(13, 0.8 + 0.36 * max(len(single), len(batch)), 2)
    _dots(left, single, lambda value: f"{value:,.2f}", "Single insert, p50 ms (log)", least_on_top=True)
    _dots(right, batch, lambda value: f"{value:,.0f}", "Batch, rows a second (log)", least_on_top=False)
    return figure


def _concurrency(results: Results) -> Any:
    measured = {name: kept["concurrency"] for name, kept in results["peers"].items() if "concurrency" in kept}
    if not measured:
        return None
    figure, axes = _figure(10, 5)
    colours = _colours(results)
    for name, by_callers in measured.items():
        rates = {
            callers: max(each["rate"] for each in by_callers.get(str(callers), [{"rate": 0}])) for callers in CALLERS
        }
        drawn = {callers: rate for callers, rate in rates.items() if rate}
        width = 2.6 if name in _OURS else 1.3
        title = results["peers"][name]["title"]
        axes.plot(
            list(drawn),
            list(drawn.values()),
            marker="o",
            markersize=4,
            label=title,
            color=colours[name],
            linewidth=width,
        )
    bench = results["limits"].get("pgbench")
    if isinstance(bench, dict):
        axes.plot(
            [16],
            [statistics.median(bench["rate_16"])],
            marker="*",
            markersize=12,
            color=_INK,
            linestyle="none",
            label="pgbench, our statement",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(CALLERS, map(str, CALLERS))
    _plain(axes.yaxis)
    axes.set_xlabel("callers")
    axes.set_ylabel("searches a second (log)")
    axes.set_title("Concurrency")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _growth(results: Results) -> Any:
    points = results["growth"]
    if len(points) < 2:
        return None
    figure, axes = _figure(9, 4.6)
    colours = _colours(results)
    for name in points[0]["peers"]:
        known = [point for point in points if name in point["peers"]]
        line = [(point["rows"], point["peers"][name]["p50"] * 1e3) for point in known]
        width = 2.6 if name in _OURS else 1.3
        title = results["peers"][name]["title"]
        axes.plot(
            [x for x, _ in line],
            [y for _, y in line],
            marker="o",
            markersize=4,
            label=title,
            color=colours[name],
            linewidth=width,
        )
        recall = known[-1]["peers"][name]["recall"]
        axes.annotate(f"recall {recall:.3f}", line[-1], textcoords="offset points", xytext=(8, -3), fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([point["rows"] for point in points], [f"{point['rows']:,}" for point in points])
    axes.minorticks_off()
    _plain(axes.yaxis)
    axes.margins(x=0.12)
    axes.set_xlabel("memories of the agent")
    axes.set_ylabel("median of a search, ms (log)")
    axes.set_title("Growth")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


# --- the page --------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.lead { font-size: 1.1rem; } .note, figcaption, footer { color: #555; font-size: .9rem; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; }
th, td { text-align: left; padding: .28rem .7rem; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
th { border-bottom: 2px solid #999; } td + td { font-variant-numeric: tabular-nums; }
tr.ours td { background: #fdeeee; font-weight: 600; } .yes { color: #1b7f3b; font-weight: 600; }
.no { color: #b00020; font-weight: 600; }
"""


def page(results: Results, drawn: Mapping[str, tuple[str, bytes]], before: Results | None) -> str:
    """Write the page, charts and all."""
    report = _told(results, before)
    others = results.get("others", {"goals": [], "tables": []})
    setup = results["setup"]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>elizasql and its peers</title>",
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style>",
        "<h1>elizasql and its peers</h1>",
        f"<p class='lead'>{html.escape(_lead(results))}</p>",
        "<p class='note'>Every peer does the same: remember the same vectors, and find the ten nearest of one agent. "
        "Each runs in a process and an environment of its own, has a database of its own on one server, and is tuned "
        "as its documentation advises. They take turns in blocks, so ratios count and milliseconds depend on the "
        "machine. Recall is held to an exact search.</p>",
    ]
    goals = [list(goal.values()) for goal in (*report.goals, *others["goals"])]
    if goals:
        parts += ["<h2>Goals</h2>", _table(list(report.goals[0]), goals)]
    for caption, picture in drawn.values():
        encoded = base64.b64encode(picture).decode()
        text = html.escape(caption)
        parts.append(
            f"<figure><img alt='{text}' src='data:image/png;base64,{encoded}'><figcaption>{text}</figcaption></figure>"
        )
    if not drawn:
        parts.append("<p class='note'>No charts: matplotlib is not installed (dependency group bench).</p>")
    for table in (*report.tables, *others["tables"]):
        parts += [f"<h2>{html.escape(table['title'])}</h2>", _table(table["header"], table["rows"])]
    facts = "".join(f"<li>{html.escape(name)}: {html.escape(str(value))}</li>" for name, value in setup.items())
    parts.append(f"<h2>The run</h2><ul class='note'>{facts}</ul></html>")
    return "\n".join(parts)


def _lead(results: Results) -> str:
    peers = results["peers"]
    ours = peers["elizasql"].get("equal") or next(iter(peers["elizasql"]["points"]), None)
    text = f"{results['setup']['rows']:,} memories of {results['setup']['agents']} agents"
    if ours is None:
        return f"{text}: elizasql was not measured."
    text += f": elizasql finds {ours['recall']:.1%} of the ten nearest in {ours['p50'] * 1e3:.2f} ms"
    original = peers.get("elizaos", {}).get("equal")
    if original:
        longer = original["p50"] / ours["p50"]
        text += f", the original on the same server takes {original['p50'] * 1e3:.1f} ms, {longer:.0f} times as long"
    return text + "."


def _table(header: list[str], rows: list[list[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    body = []
    for row in rows:
        kind = " class='ours'" if str(row[0]).startswith("elizasql") and header[0] == "peer" else ""
        cells = []
        for cell in row:
            text = html.escape(str(cell))
            verdict = {"yes": " class='yes'", "NO": " class='no'", "not measured": " class='no'"}.get(str(cell), "")
            cells.append(f"<td{verdict}>{text}</td>")
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(body)}</table></div>"


def _told(results: Results, before: Results | None) -> Report:
    """Give what the peers' results say."""
    report = Report(size=results["setup"]["rows"])
    tables.fill(report, results, before)
    return report


def write(path: Path, whole: Report | None = None) -> Path:
    """Write the page of a run, and its charts as PNG, beside its JSON.

    Args:
        path: Of the JSON.
        whole: What all benchmarks of the run have told. What the others than the peers did is kept in the JSON.
    """
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    before = last_run(results, path)
    if whole is not None:
        told = _told(results, before)
        titles, goals = {table["title"] for table in told.tables}, {goal["what"] for goal in told.goals}
        results["others"] = {
            "goals": [goal for goal in whole.goals if goal["what"] not in goals],
            "tables": [table for table in whole.tables if table["title"] not in titles],
        }
        keep(path, results)
    drawn = charts(results)
    for name, (_, picture) in drawn.items():
        path.with_name(f"{path.stem}-{name}.png").write_bytes(picture)
    target = path.with_suffix(".html")
    target.write_text(page(results, drawn, before), encoding="utf-8")
    (path.parent / "report.html").write_text(target.read_text(encoding="utf-8"), encoding="utf-8")
    return target


def main() -> None:
    """Write the page of the run that is named, or of the last one."""
    found = sorted(FOLDER.glob("peers-*.json"), key=lambda path: path.stat().st_mtime)
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
    elif found:
        path = found[-1]
    else:
        sys.exit(f"there is no run in {FOLDER}")
    print(write(path))


if __name__ == "__main__":
    main()
