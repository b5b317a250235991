"""One step on every rank: when each computed and when it communicated.

Two lanes a rank. On a GPU they are kernels, told apart by name. On a CPU the training thread's operators compute, and
gloo's own threads communicate. What both lanes show at the same instant is hidden communication. Ranks begin a step at
their own moment, which is 0 in each lane; collectives then keep them in step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from training.waterfall.names import Category, classify_kernel, classify_operator
from training.waterfall.trace import DATA_WAIT, MEMORY, Trace, TraceError

Stretch = tuple[int, int]
"""Begin and end, nanoseconds."""
KINDS = {
    "gather": re.compile(r"all_?gather", re.IGNORECASE),
    "reduce-scatter": re.compile(r"reduce_?scatter", re.IGNORECASE),
    "all-reduce": re.compile(r"all_?reduce", re.IGNORECASE),
    "exchange": re.compile(r"all_?to_?all|sendrecv", re.IGNORECASE),
    "peer copy": re.compile(r"Memcpy PtoP", re.IGNORECASE),
    "barrier": re.compile(r"barrier", re.IGNORECASE),
}
"""Kind of a collective → names of NCCL's kernels and of gloo's work; others are `other`. What copy engines bring from
another GPU (`training.peers`) is a kind of its own: weights or gradients."""
COLORS = {
    "compute": "#4477aa",
    "gather": "#ee8866",
    "reduce-scatter": "#cc3311",
    "all-reduce": "#aa3377",
    "exchange": "#ddcc77",
    "peer copy": "#ee8866",
    "barrier": "#bbbbbb",
    "other": "#999999",
}
FINEST = 2000
"""Gaps below this share of a step (1/2000: less than a pixel) aren't drawn."""


@dataclass(frozen=True)
class Lanes:
    """A step on one rank; stretches are disjoint, in order, and count from the step's begin."""

    rank: int
    step_ns: int
    compute: list[Stretch]
    communication: dict[str, list[Stretch]]
    """By kind. Those of different kinds may overlap."""

    @property
    def communication_ns(self) -> int:
        """Time in which communication ran, hidden or not."""
        return length(self._all())

    @property
    def hidden_ns(self) -> int:
        """Time in which both ran."""
        return self.communication_ns + length(self.compute) - length(union([*self._all(), *self.compute]))

    def to_json(self) -> dict[str, Any]:
        """Seconds, for `waterfall.json`."""
        total = self.communication_ns
        return {
            "rank": self.rank,
            "step_time_s": self.step_ns / 1e9,
            "compute_s": length(self.compute) / 1e9,
            "communication_s": total / 1e9,
            "hidden_s": self.hidden_ns / 1e9,
            "hidden_share": self.hidden_ns / total if total else None,
        }

    def _all(self) -> list[Stretch]:
        return union(stretch for kind in self.communication.values() for stretch in kind)


def lanes_of(trace: Trace, rank: int, *, on_device: bool) -> Lanes:
    """The first profiled step of a rank's trace. Raises `TraceError` if the trace has no begin of a step."""
    begins = [event.start_ns for event in trace.training.named(DATA_WAIT)]
    if not begins:
        raise TraceError(f"The trace has no step's begin ({DATA_WAIT}).")
    ends = [*begins[1:], trace.window.end_ns]
    begin, end = begins[0], ends[0]
    compute, collectives = _on_device(trace) if on_device else _on_host(trace)
    kinds: dict[str, list[Stretch]] = {}
    for name, stretch in collectives:
        kinds.setdefault(kind_of(name), []).append(stretch)
    return Lanes(
        rank,
        end - begin,
        union(inside(compute, begin, end)),
        {kind: union(inside(found, begin, end)) for kind, found in sorted(kinds.items())},
    )


def _on_device(trace: Trace) -> tuple[list[Stretch], list[tuple[str, Stretch]]]:
    compute, collectives = [], []
    for event in trace.device:
        stretch = (event.start_ns, event.end_ns)
        if classify_kernel(event.name, event.kind, event.stack) is Category.communication:
            collectives.append((event.name, stretch))
        elif event.kind != MEMORY:
            compute.append(stretch)
    return compute, collectives


def _on_host(trace: Trace) -> tuple[list[Stretch], list[tuple[str, Stretch]]]:
    idle = (Category.host, Category.communication, Category.data_wait)
    thread = trace.training
    compute = [(a, b) for a, b, index in thread.own_times() if classify_operator(thread.stack(index)) not in idle]
    return compute, [(event.name, (event.start_ns, event.end_ns)) for event in trace.collectives]


def kind_of(name: str) -> str:
    """The kind of a collective by its name."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "other")


def union(stretches: Iterable[Stretch]) -> list[Stretch]:
    """The same instants in disjoint stretches, in order."""
    result: list[Stretch] = []
    for start, end in sorted(stretches):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        elif end > start:
            result.append((start, end))
    return result


def inside(stretches: Iterable[Stretch], begin: int, end: int) -> list[Stretch]:
    """What lies between `begin` and `end`, counted from `begin`."""
    return [(max(a, begin) - begin, min(b, end) - begin) for a, b in stretches if a < end and b > begin]


def length(disjoint: Sequence[Stretch]) -> int:
    """Nanoseconds of disjoint stretches."""
    return sum(end - start for start, end in disjoint)


def coarse(stretches: Sequence[Stretch], gap: int) -> list[Stretch]:
    """Stretches without the gaps up to `gap` between them: thousands of kernels would make a picture of megabytes."""
    if not stretches:
        return []
    cuts = [index for index, (one, after) in enumerate(pairwise(stretches), 1) if after[0] - one[1] > gap]
    return [
        (stretches[first][0], stretches[last - 1][1])
        for first, last in zip([0, *cuts], [*cuts, len(stretches)], strict=True)
    ]


def draw_lanes(ranks: Sequence[Lanes], path: Path, title: str) -> None:
    """PNG: two lanes a rank over the milliseconds of a step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 1.6 + 0.75 * len(ranks)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    gap = max(lanes.step_ns for lanes in ranks) // FINEST
    for row, lanes in enumerate(ranks):
        rows = {"compute": lanes.compute, **lanes.communication}
        for kind, stretches in rows.items():
            bars = [(start / 1e6, (end - start) / 1e6) for start, end in coarse(stretches, gap)]
            axes.broken_barh(bars, (row if kind == "compute" else row + 0.4, 0.36), color=COLORS[kind])
        share = lanes.to_json()["hidden_share"]
        text = f" {lanes.step_ns / 1e6:,.1f} ms" + ("" if share is None else f"\n {share:.0%} hidden")
        axes.text(lanes.step_ns / 1e6, row + 0.38, text, va="center", fontsize=8)
    axes.set_yticks([row + 0.38 for row in range(len(ranks))], [f"rank {lanes.rank}" for lanes in ranks])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * max(lanes.step_ns for lanes in ranks) / 1e6)
    axes.set_xlabel("ms of a profiled step; above: computation, below: communication")
    shown = ["compute", *sorted({kind for lanes in ranks for kind in lanes.communication})]
    axes.legend(handles=[Patch(color=COLORS[kind], label=kind) for kind in shown], ncols=len(shown), frameon=False,
                loc="lower right", bbox_to_anchor=(1, 1), fontsize=8)  # fmt: skip
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    partial = path.with_suffix(".png.tmp")
    figure.savefig(partial, format="png")
    partial.replace(path)
