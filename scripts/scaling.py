"""Train the same config on 1, 2, 4, 8 ... processes of this host, and say what is left of the speed.

    python scripts/scaling.py experiment=gpt3_2b7_8k scaling.engines=[zero1,zero2,zero3]
    python scripts/scaling.py experiment=quickstart scaling.world_sizes=[1,2] scaling.steps=5

Weak scaling keeps the batch of a rank (the global batch grows with the ranks); `scaling.strong=true` keeps the global
batch. Efficiency is tokens/s per process relative to the first number of processes with the same engine. Each trial
runs in fresh processes. Leaves `scaling.json` and `scaling.png` in the run folder, beside a folder for each trial.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table

from configs import compose, launch
from configs.errors import UserError
from configs.schema import Device, ScalingRunConfig
from training.batch import data_ranks, resolve_batch
from training.report import about, draw_lines, wide_console, write_json
from training.run import run_folder
from training.trial import run_trial


@dataclass(frozen=True)
class Row:
    """One engine on one number of processes; medians after the warm-up, None where the memory did not suffice."""

    engine: str
    world_size: int
    global_batch_size: int
    tokens_per_s: float | None
    """All processes together."""
    step_time_s: float | None
    mfu: float | None
    mfu_causal: float | None
    peak_memory_gb: float | None
    """Rank 0's."""
    efficiency: float | None
    """Tokens/s per process relative to the engine's first row that fits."""


def main(config: ScalingRunConfig) -> int:
    """Run all trials, print the table, write the files."""
    check(config)
    console = wide_console()
    folder = run_folder(config).path
    overrides = [a for a in sys.argv[1:] if not a.startswith(("scaling.", "run_dir=", "engine=", "--"))]
    rows: list[Row] = []
    for engine in config.scaling.engines:
        for world_size in config.scaling.world_sizes:
            rows.append(measure(console, config, overrides, engine, world_size, folder, rows))
    console.print(table_of(rows, config.scaling.strong))
    facts = about(["scripts/scaling.py", *sys.argv[1:]])
    kind = "strong" if config.scaling.strong else "weak"
    write_json(folder / "scaling.json", {**facts, "scaling": kind, "rows": [asdict(row) for row in rows]})
    draw(rows, folder / "scaling.png", f"{kind.capitalize()} scaling of {config.name}, {facts['device']}")
    console.print(f"{folder / 'scaling.json'}\n{folder / 'scaling.png'}", soft_wrap=True)
    return 0


def check(config: ScalingRunConfig) -> None:
    """Raise `UserError` for engines that don't exist and numbers of processes that the host has no devices for."""
    for engine in config.scaling.engines:
        compose([f"engine={engine}"])
    if not config.scaling.world_sizes or min(config.scaling.world_sizes) < 1:
        raise UserError(f"scaling.world_sizes={config.scaling.world_sizes}: give numbers of processes from 1 on.")
    on_gpu = torch.cuda.is_available() and config.hardware.device is not Device.cpu
    if on_gpu and max(config.scaling.world_sizes) > torch.cuda.device_count():
        raise UserError(
            f"scaling.world_sizes={config.scaling.world_sizes}: this host has {torch.cuda.device_count()} GPUs; "
            "give fewer processes."
        )


def measure(
    console: Console,
    config: ScalingRunConfig,
    overrides: list[str],
    engine: str,
    world_size: int,
    folder: Path,
    done: Sequence[Row],
) -> Row:
    """One trial."""
    steps = config.scaling.steps
    batch = global_batch(config, world_size)
    label = f"{engine} on {world_size}"
    sizes = [f"train.global_batch_size={batch}", *micro_batch(config, world_size)]
    with console.status(label) as status:
        trial = run_trial(
            [*overrides, *sizes, f"engine={engine}", f"logging.group=scaling-{config.name}"],
            folder / f"{engine}_{world_size}",
            steps=steps,
            world_size=world_size,
            on_step=partial(show_step, status, label, steps),
        )
    if trial is None:
        console.print(f"{label}: does not fit in memory")
        return Row(engine, world_size, batch, None, None, None, None, None, None)
    console.print(f"{label}: {trial.tokens_per_s:,.0f} tokens/s")
    reference = next((r for r in done if r.engine == engine and r.tokens_per_s), None)
    base = trial.tokens_per_s / world_size
    if reference is not None and reference.tokens_per_s:
        base = reference.tokens_per_s / reference.world_size
    efficiency = trial.tokens_per_s / world_size / base
    return Row(
        engine=engine,
        world_size=world_size,
        global_batch_size=batch,
        tokens_per_s=trial.tokens_per_s,
        step_time_s=trial.step_time_s,
        mfu=trial.mfu,
        mfu_causal=trial.mfu_causal,
        peak_memory_gb=trial.peak_memory_gb,
        efficiency=efficiency,
    )


def show_step(status: Status, label: str, steps: int, done: int) -> None:
    """Progress of a trial on the terminal."""
    status.update(f"{label}: {done} of {steps} steps")


def global_batch(config: ScalingRunConfig, world_size: int) -> int:
    """Sequences a step: what the config says for its first number of processes, times the growth if that is wanted."""
    first = config.scaling.world_sizes[0]
    size = resolve_batch(config.train, data_ranks(config.engine, first)).global_batch_size
    if config.scaling.strong:
        return size
    if size * world_size % first:
        raise UserError(f"{size} sequences on {first} processes can't be scaled to {world_size}: change the batch.")
    return size * world_size // first


def micro_batch(config: ScalingRunConfig, world_size: int) -> list[str]:
    """Keep the micro-batch, so that the matrix products stay the same; accumulation follows from the rest."""
    first = data_ranks(config.engine, config.scaling.world_sizes[0])
    micro = resolve_batch(config.train, first).micro_batch_size
    share = global_batch(config, world_size) // data_ranks(config.engine, world_size)
    while share % micro:  # strong scaling can leave less than a micro-batch to a rank
        micro -= 1
    return [f"train.micro_batch_size={micro}", "train.accumulation_steps=null"]


def table_of(rows: Sequence[Row], strong: bool) -> Table:
    """The rows for a terminal."""
    table = Table(title=f"{'Strong' if strong else 'Weak'} scaling (medians; MFU counts attention in full / causally)")
    for heading in ("engine", "processes", "batch", "tokens/s", "step", "MFU", "memory", "efficiency"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")

    def text(value: float | None, pattern: str) -> str:
        return "-" if value is None else pattern.format(value)

    for row in rows:
        table.add_row(
            row.engine,
            str(row.world_size),
            str(row.global_batch_size),
            text(row.tokens_per_s, "{:,.0f}"),
            text(row.step_time_s and row.step_time_s * 1e3, "{:,.1f} ms"),
            f"{text(row.mfu, '{:.1%}')} / {text(row.mfu_causal, '{:.1%}')}",
            text(row.peak_memory_gb, "{:.2f} GB"),
            text(row.efficiency, "{:.1%}"),
        )
    return table


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Tokens/s over the number of processes, one line an engine, and what perfect scaling of the first would be."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.tokens_per_s:
            lines.setdefault(row.engine, []).append((row.world_size, row.tokens_per_s))
    ideal = next(iter(lines.values()), [])
    sizes: list[Any] = sorted({row.world_size for row in rows})
    if ideal:
        rate = ideal[0][1] / ideal[0][0]
        lines["perfect"] = [(size, size * rate) for size in sizes]
    draw_lines(path, lines, xticks=sizes, xlabel="processes", ylabel="tokens/s", title=title, dashed="perfect")


if __name__ == "__main__":
    launch(main, "scaling")
