"""Tables and figures of the attention bench."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from scripts.bench_cells import Cost, Result

LABELS = {
    "hopper": "ours, Hopper",
    "portable": "ours, portable",
    "flash1": "FlashAttention-1's schedule",
    "standard": "standard attention",
    "sdpa": "PyTorch's SDPA",
    "sdpa_flash": "FlashAttention-2 in PyTorch",
    "sdpa_cudnn": "cuDNN in PyTorch",
    "flex": "FlexAttention",
}
"""Names of implementations in figures."""


@dataclasses.dataclass(frozen=True)
class MemoryResult:
    """Memory that one forward and backward take, beyond their inputs."""

    implementation: str
    seqlen: int
    saved_bytes: int
    """Kept from forward to backward, the inputs included."""
    peak_bytes: int | None
    """Highest use during both, inputs not included; None without CUDA."""


def table_of(results: Sequence[Result], unit: str = "TFLOP/s") -> Table:
    """A row per cell, a column per implementation and direction."""
    columns = list(dict.fromkeys((r.direction, r.implementation) for r in results))
    table = Table(title=f"Attention, {unit}, median", title_justify="left")
    table.add_column("cell")
    for direction, name in columns:
        table.add_column(f"{name}\n{direction}", justify="right")
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for r in results:
        cell = str(r.cell)
        rows.setdefault(cell, {})[(r.direction, r.implementation)] = "-" if r.error else f"{r.tflops:.4g}"
    for cell, row in rows.items():
        table.add_row(cell, *(row.get(column, "-") for column in columns))
    return table


def cost_table(costs: Sequence[Cost]) -> Table:
    """A row per cell that has a dense one, a column per implementation and direction: the time ratio over ``blocks``,
    the ratio of the blocks that must be visited."""
    columns = list(dict.fromkeys((c.direction, c.implementation) for c in costs))
    table = Table(title="Cost of a block of scores, the dense cell's = 1", title_justify="left")
    table.add_column("cell")
    table.add_column("beside")
    table.add_column("blocks", justify="right")
    for direction, name in columns:
        table.add_column(f"{name}\n{direction}", justify="right")
    for cell in dict.fromkeys(c.cell for c in costs):
        mine = {(c.direction, c.implementation): c for c in costs if c.cell == cell}
        some = next(iter(mine.values()))
        ratios = (f"{mine[column].cost_ratio:.3f}" if column in mine else "-" for column in columns)
        table.add_row(cell, some.dense_cell, f"{some.block_ratio:.3f}", *ratios)
    return table


def ablation_table(results: Sequence[Result]) -> Table:
    """Speed-ups between neighbouring steps of the ladder standard → flash1 → flash2 (portable) → hopper, per
    cell.

    Standard → flash1 is tiling: no S x S matrix in memory. Flash1 → portable is FlashAttention-2: at S = 512,
    where batch x heads fill the GPU, it is the fewer operations outside the products; towards S = 16k, where
    they do not, it is the split of the sequence over thread blocks. Portable → hopper is asynchrony.
    """
    ladder = [
        name for name in ("standard", "flash1", "portable", "hopper") if any(r.implementation == name for r in results)
    ]
    table = Table(title="Time of the step before / time of this step", title_justify="left")
    table.add_column("cell")
    table.add_column("direction")
    for before, after in itertools.pairwise(ladder):
        table.add_column(f"{before}\n→ {after}", justify="right")
    times: dict[tuple[str, str], dict[str, float]] = {}
    for r in results:
        cell = str(r.cell)
        times.setdefault((cell, r.direction), {})[r.implementation] = r.median_ms
    for (cell, direction), row in times.items():
        ratios = [row[a] / row[b] for a, b in itertools.pairwise(ladder)]
        table.add_row(cell, direction, *("-" if x != x else f"{x:.2f}" for x in ratios))
    return table


def plot_results(results: Sequence[Result], path: Path, title: str) -> None:
    """A panel per direction and (head dim, mask, window, documents or not, a token more than another cell or not)."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cells = {r.cell for r in results}

    def kind(r: Result) -> str:
        text = f"D = {r.head_dim}, {'causal' if r.causal else 'full'}"
        text += f", window {r.window}" if r.window else ""
        text += ", S + 1" if dataclasses.replace(r.cell, seqlen=r.seqlen - 1) in cells else ""
        return text + (", documents" if r.documents else "")

    kinds = list(dict.fromkeys(kind(r) for r in results))
    directions = list(dict.fromkeys(r.direction for r in results))
    size = (4.2 * len(kinds), 3.4 * len(directions))
    figure, axes = plt.subplots(
        len(directions), len(kinds), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for i, direction in enumerate(directions):
        for j, panel in enumerate(kinds):
            ax = axes[i][j]
            for name in dict.fromkeys(r.implementation for r in results):
                line = [
                    (r.seqlen, r.tflops)
                    for r in results
                    if (r.implementation, r.direction, kind(r)) == (name, direction, panel) and not r.error
                ]
                if line:  # cells come in the order of the grid, documents after what they are compared with
                    ax.plot(*zip(*sorted(line), strict=True), marker="o", markersize=3, label=label_of(name))
            label_lengths(ax, sorted({r.seqlen for r in results if kind(r) == panel}))
            ax.set_ylim(bottom=0)
            ax.set_title(f"{direction}, {panel}", fontsize=9)
            ax.set_xlabel("longest document" if panel.endswith("documents") else "sequence length")
            ax.grid(alpha=0.3)
        axes[i][0].set_ylabel("TFLOP/s")
    lines = {line.get_label(): line for ax in axes.flat for line in ax.get_lines()}
    columns = max(1, 2 * len(kinds))
    names = figure.legend(lines.values(), lines, title=title, fontsize=8, ncols=columns, loc="outside upper center")
    names.get_title().set_fontsize(9)
    names.get_frame().set_linewidth(0)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def label_of(name: str) -> str:
    """An implementation in words; options in brackets stay as they were given: ``hopper[pdl=true]``."""
    base, bracket, options = name.partition("[")
    return LABELS.get(base, base) + (f" {bracket}{options}" if bracket else "")


def label_lengths(ax: Any, seqlens: Sequence[int]) -> None:
    """A logarithmic x-axis with the lengths that were measured: 512, 1k, 2k."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(seqlens, [f"{s // 1024}k" if s % 1024 == 0 else str(s) for s in seqlens])
    ax.minorticks_off()


def memory_table(results: Sequence[MemoryResult]) -> Table:
    names = list(dict.fromkeys(r.implementation for r in results))
    table = Table(
        title="Attention forward and backward, MiB: saved for backward, inputs included / peak beyond the inputs",
        title_justify="left",
    )
    table.add_column("S")
    for name in names:
        table.add_column(name, justify="right")
    for seqlen in dict.fromkeys(r.seqlen for r in results):
        cells = []
        for name in names:
            found = [r for r in results if (r.implementation, r.seqlen) == (name, seqlen)]
            peak = "-" if not found or found[0].peak_bytes is None else f"{found[0].peak_bytes / 2**20:.0f}"
            cells.append(f"{found[0].saved_bytes / 2**20:.1f} / {peak}" if found else "-")
        table.add_row(str(seqlen), *cells)
    return table


def plot_memory(results: Sequence[MemoryResult], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(5, 3.6))
    for name in dict.fromkeys(r.implementation for r in results):
        mine = sorted((r for r in results if r.implementation == name), key=lambda r: r.seqlen)
        mib = [(r.saved_bytes if r.peak_bytes is None else r.peak_bytes) / 2**20 for r in mine]
        ax.plot([r.seqlen for r in mine], mib, marker="o", markersize=3, label=label_of(name))
    label_lengths(ax, sorted({r.seqlen for r in results}))
    ax.set_yscale("log", base=2)
    ax.set_xlabel("sequence length, one sequence")
    peak = all(r.peak_bytes is not None for r in results)
    ax.set_ylabel("peak memory, MiB" if peak else "saved for backward, MiB")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    ax.set_title(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
