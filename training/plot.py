"""curves.png: loss and MFU of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from training import metrics as m
from training.logging import STEP, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN, _VALIDATION, _MFU, _MFU_CAUSAL = "#9ec5e8", "#d1495b", "#2a9d8f", "#e9a23b"
_SMOOTH, _AXIS, _GRID = "#1f5f99", "#444444", "#e6e6e6"
_MIN_POINTS_TO_SMOOTH: Final = 30

Series = tuple[list[int], list[float]]
"""Steps and values."""


def plot_curves(metrics: Path, output: Path, title: str = "") -> Path | None:
    """Draw loss (training and validation) above MFU (both conventions) into the PNG `output`.

    Returns `output`, or None if `metrics` has no loss yet; then nothing is written. The file is replaced whole. Raises
    OSError where it can't be written.
    """
    rows = read_metrics(metrics)
    train, validation = series(rows, m.TRAIN_LOSS), series(rows, m.VAL_LOSS)
    if not train[0] and not validation[0]:
        return None
    # A figure of its own with the Agg canvas: no window system, no global state of pyplot, safe in any thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    if title:
        figure.suptitle(title, fontsize=13, color=_AXIS)
    _draw_loss(above, train, validation)
    _draw_mfu(below, series(rows, m.MFU), series(rows, m.MFU_CAUSAL))
    for axes in (above, below):
        _style(axes)
    below.set_xlabel("optimizer step")
    figure.align_ylabels()
    partial = output.with_suffix(".png.tmp")
    figure.savefig(partial, format="png")
    partial.replace(output)
    return output


def series(rows: Sequence[dict[str, Any]], key: str) -> Series:
    """Steps and values of the rows that have a number under `key`."""
    points = [(row[STEP], float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]
    return [step for step, _ in points], [value for _, value in points]


def smoothed(steps: Sequence[int], values: Sequence[float], width: int, num_points: int = 400) -> Series:
    """Median over centred windows of `width` values, at `num_points` places at most.

    The windows shrink on both sides alike towards the ends, so that the curve neither lags nor jumps at a lone spike.
    """
    array = np.asarray(values)
    centres = np.unique(np.linspace(0, len(array) - 1, num_points).round().astype(int))
    reaches = np.minimum(width // 2, np.minimum(centres, len(array) - 1 - centres))
    medians = [float(np.median(array[c - r : c + r + 1])) for c, r in zip(centres, reaches, strict=True)]
    return [steps[c] for c in centres], medians


def _draw_loss(axes: Axes, train: Series, validation: Series) -> None:
    steps, losses = train
    if len(steps) >= _MIN_POINTS_TO_SMOOTH:
        axes.plot(steps, losses, color=_TRAIN, linewidth=1.0, alpha=0.8)
        line = smoothed(steps, losses, width=len(steps) // 40 + 4)
        axes.plot(*line, color=_SMOOTH, linewidth=1.6, label=f"training: {losses[-1]:.3f} (line: running median)")
    elif steps:
        axes.plot(steps, losses, color=_SMOOTH, linewidth=1.6, marker=".", label=f"training: {losses[-1]:.3f}")
    if validation[0]:
        best = min(validation[1])
        label = f"validation: {validation[1][-1]:.3f} (best {best:.3f})"
        axes.plot(*validation, color=_VALIDATION, linewidth=1.6, marker="o", markersize=4, label=label, zorder=3)
    axes.set_ylabel("loss, nats per token")
    _limit_to_the_curve(axes, [*losses, *validation[1]])
    axes.legend(frameon=False, loc="upper right")


def _limit_to_the_curve(axes: Axes, losses: list[float]) -> None:
    """Cut a spike at the top off, so that it doesn't flatten the rest: up to twice the range of nine tenths of it."""
    ordered = sorted(losses)
    low, high = ordered[0], ordered[-1]
    usual = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    first = losses[0]
    top = max(first, min(high, low + 2 * (usual - low)))
    margin = 0.05 * (top - low) or 0.1
    axes.set_ylim(low - margin, top + margin)


def _draw_mfu(axes: Axes, mfu: Series, causal: Series) -> None:
    axes.set_ylabel("MFU, % of peak")
    if not mfu[0] and not causal[0]:
        axes.text(0.5, 0.5, "not measured yet", transform=axes.transAxes, ha="center", va="center", color=_AXIS)
        axes.set_yticks([])
        return
    for (steps, shares), color, name in ((mfu, _MFU, "attention in full"), (causal, _MFU_CAUSAL, "attention causally")):
        if steps:
            percent = [100 * share for share in shares]
            marker = "." if len(steps) < _MIN_POINTS_TO_SMOOTH else None
            axes.plot(steps, percent, color=color, linewidth=1.4, marker=marker, label=f"{name}: {percent[-1]:.1f} %")
    axes.set_ylim(bottom=0, top=1.3 * max(100 * share for share in [*mfu[1], *causal[1]]))
    axes.legend(frameon=False, loc="upper right", ncols=2)


def _style(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(colors=_AXIS)
