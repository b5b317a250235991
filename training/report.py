"""What every measurement says of itself, and the files that the tools leave: JSON and bar charts."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data.cpus import available_cpus
from training.hardware import device_name

PACKAGES = ("torch", "triton", "deepspeed", "transformers")


def wide_console() -> Console:
    """The terminal; where there is none, such as in a file, lines long enough for a table."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def about(command: Sequence[str]) -> dict[str, Any]:
    """Command, device, date and versions, so that a figure can be repeated."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "command": shlex.join(["python", *command]),
        "device": device_name(device),
        "device_count": torch.cuda.device_count() if device.type == "cuda" else available_cpus(),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := installed(name)) is not None},
        "cuda": torch.version.cuda,
    }


def installed(package: str) -> str | None:
    """Version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_json(path: Path, value: object) -> None:
    """Write `value` whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".tmp")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def draw_bars(
    path: Path,
    values: Mapping[str, Mapping[str, float]],
    labels: Mapping[tuple[str, str], str],
    *,
    ylabel: str,
    title: str,
) -> None:
    """Grouped bars: `values[group][series]`, each with the text `labels[group, series]` on it."""
    from matplotlib.figure import Figure

    series = list(dict.fromkeys(name for group in values.values() for name in group))
    width = 0.8 / max(len(series), 1)
    figure = Figure(figsize=(max(6.0, 0.6 * len(series) * len(values) + 2), 4.2), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(series):
        present = [(g, group) for g, group in enumerate(values) if name in values[group]]
        places = [g + (i - (len(series) - 1) / 2) * width for g, _ in present]
        bars = axes.bar(places, [values[group][name] for _, group in present], width * 0.92, label=name)
        axes.bar_label(bars, [labels.get((group, name), "") for _, group in present], padding=2, fontsize=8)
    axes.set_xticks(range(len(values)), list(values))
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    if series:
        axes.legend(frameon=False, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    figure.savefig(path, dpi=150)


def draw_lines(
    path: Path,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xticks: Sequence[float],
    xlabel: str,
    ylabel: str,
    title: str,
    dashed: Sequence[str] = (),
) -> None:
    """A line of (x, y) points a name; those of `dashed` are references, the first in dashes, others in dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        style: dict[str, Any] = {"marker": "o"}
        if name in dashed:
            style = {"linestyle": "--" if name == dashed[0] else ":", "color": "#888888"}
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, **style)
    axes.set_xticks(list(xticks))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if lines:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
