"""A report as a table for a terminal and as a picture."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from training.backend import arithmetic
from training.waterfall.names import Category
from training.waterfall.report import Part, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME_WIDTH = 60

_PRODUCTS, _MEMORY, _UPDATE, _NETWORK, _NOTHING = "#1f5f99", "#2a9d8f", "#e9a23b", "#8d5a97", "#d1495b"
COLORS = {
    **dict.fromkeys((Category.matmul, Category.attention_forward, Category.attention_backward), _PRODUCTS),
    **dict.fromkeys((Category.accumulation, Category.optimizer), _UPDATE),
    Category.communication: _NETWORK,
    **dict.fromkeys((Category.data_wait, Category.host, Category.idle), _NOTHING),
}
_AT_PEAK, _REACHED, _TEXT = "#12395c", "#444444", "#444444"


def table_of(report: Report) -> Table:
    """The parts for a terminal."""
    table = Table(title=headline(report), title_justify="left")
    table.add_column("part")
    for heading in ("time", "step", "rate", "of peak", "MFU lost", "of the gap"):
        table.add_column(heading, justify="right")
    for part in report.parts:
        of_peak = "" if part.tflops is None else f"{part.tflops / report.setting.peak_tflops:.0%}"
        table.add_row(
            part.label,
            duration(part.time_s),
            f"{part.share:.1%}",
            rate(part),
            of_peak,
            f"{100 * part.mfu_lost:.1f}",
            f"{part.gap_share:.1%}",
        )
    table.add_section()
    lost = sum(part.mfu_lost for part in report.parts)
    total = sum(part.time_s for part in report.parts)
    table.add_row("a step", duration(total), "100.0%", "", f"{report.mfu_causal:.1%}", f"{100 * lost:.1f}", "100.0%")
    return table


def headline(report: Report) -> str:
    """What was measured, in a line."""
    setting = report.setting
    return (
        f"{setting.config.name} on {setting.device_name}, {arithmetic(setting.config.engine, setting.precision)}, "
        f"{setting.attention} attention: "
        f"{duration(report.step_time_s)} a step, MFU {report.mfu:.1%} (attention causally {report.mfu_causal:.1%})"
    )


def lines_of(report: Report) -> list[str]:
    """What the table doesn't say: the profiler's cost, hidden communication, unknown names, remedies."""
    lines = [_overhead(report)]
    if report.hidden_share is not None:
        lines.append(
            f"Communication runs {duration(report.communication_s)} a step, {report.hidden_share:.0%} of it hidden "
            "behind computation."
        )
    lines.append("GB/s are those of the least bytes that the part must move (analytic); copies on a GPU as recorded.")
    if report.unknown:
        names = ", ".join(f"{short(name)} ({duration(seconds)})" for name, seconds in list(report.unknown.items())[:5])
        lines.append(f"Unknown, in part 'other': {names}")
    for number, remedy in enumerate(report.remedies, 1):
        share = remedy.saves_s / report.step_time_s
        lines.append(f"Remedy {number}, at most {duration(remedy.saves_s)} a step ({share:.1%}): {remedy.text}")
    return lines


def _overhead(report: Report) -> str:
    if report.unprofiled is None or report.overhead is None:
        return "No steps without the profiler were measured to compare with."
    plain = report.unprofiled
    mfu = "" if plain.mfu is None else f", MFU {plain.mfu:.1%}"
    causal = "" if plain.mfu_causal is None else f" (causally {plain.mfu_causal:.1%})"
    return (
        f"Without the profiler a step takes {duration(plain.step_time_s)} (median of {plain.num_steps}){mfu}{causal}: "
        f"profiling {report.num_steps} steps changed it by {report.overhead:+.1%}."
    )


def rate(part: Part) -> str:
    """TFLOP/s of parts with FLOPs, else GB/s if there is a count of bytes."""
    if part.tflops is not None:
        return f"{digits(part.tflops)} TFLOP/s"
    return "" if part.least_gb_per_s is None else f"{digits(part.least_gb_per_s)} GB/s"


def digits(value: float) -> str:
    """Three digits or more: `0.0437`, `1.40`, `123`, `2,604`."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".removesuffix(".")


def duration(seconds: float) -> str:
    """Three digits or more, in milliseconds below 10 s."""
    if seconds >= 10:
        return f"{seconds:.2f} s"
    return f"{digits(1e3 * seconds)} ms"


def short(name: str) -> str:
    """A kernel's name without its template arguments' tail."""
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 3] + "..."


def draw(report: Report, path: Path) -> None:
    """PNG: each part's time on the left, the way from 100 % down to the MFU on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(report.parts) + 2
    figure = Figure(figsize=(13, 1.8 + 0.36 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(headline(report), fontsize=11, color=_TEXT, x=0.01, ha="left")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.15])
    _draw_times(left, report)
    _draw_fall(right, report)
    labels = ["peak", *(part.label for part in report.parts), "MFU"]
    left.set_yticks(range(rows), labels)
    left.set_ylim(rows - 0.4, -0.6)
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(colors=_TEXT, left=False)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    remedies = [line for line in lines_of(report) if line.startswith("Remedy")]
    text = "\n".join(textwrap.fill(line, 190, subsequent_indent="    ") for line in remedies)
    figure.supxlabel(text, fontsize=8.5, color=_TEXT, x=0.01, ha="left")
    partial = path.with_suffix(".png.tmp")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _draw_times(axes: Axes, report: Report) -> None:
    """Milliseconds a step; dark is what the part's FLOPs would take at the peak."""
    peak = report.setting.peak_tflops
    longest = max(part.time_s for part in report.parts) * 1e3
    for row, part in enumerate(report.parts, 1):
        axes.barh(row, part.time_s * 1e3, color=COLORS.get(part.category, _MEMORY), height=0.72)
        if part.tflops is not None:
            axes.barh(row, part.time_s * 1e3 * part.tflops / peak, color=_AT_PEAK, height=0.72)
        text = "  ".join(filter(None, (duration(part.time_s), f"{part.share:.1%}", rate(part))))
        axes.text(part.time_s * 1e3 + 0.01 * longest, row, text, va="center", fontsize=8, color=_TEXT)
    axes.set_xlim(0, 1.65 * longest)
    axes.set_xlabel("ms a step; dark: the time at the peak")


def _draw_fall(axes: Axes, report: Report) -> None:
    """From 100 % down, each part by what it loses."""
    axes.barh(0, 100, color=_AT_PEAK, height=0.72)
    axes.text(101, 0, f"{report.setting.peak_tflops:,.4g} TFLOP/s", va="center", fontsize=8, color=_TEXT)
    left = 100.0
    for row, part in enumerate(report.parts, 1):
        lost = 100 * part.mfu_lost
        axes.barh(row, -lost, left=left, color=COLORS.get(part.category, _MEMORY), height=0.72)
        axes.plot([left, left], [row - 1.36, row + 0.36], color=_REACHED, linewidth=0.6)
        text = f"{-lost:+.1f}  ({part.gap_share:.0%} of the gap)"
        axes.text(max(left, left - lost) + 1, row, text, va="center", fontsize=8, color=_TEXT)
        left -= lost
    last = len(report.parts) + 1
    axes.barh(last, left, color=_REACHED, height=0.72)
    mfu = f"{left:.1f} % counting attention causally, {100 * report.mfu:.1f} % in full"
    axes.text(max(left, 0) + 1, last, mfu, va="center", fontsize=8, color=_TEXT)
    axes.set_xlim(0, 134)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("MFU, % of the peak")
