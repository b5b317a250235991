"""Train the same config with each implementation of attention, and say what each brings.

    python scripts/compare_attention.py experiment=gpt3_1b3_2k
    python scripts/compare_attention.py experiment=quickstart compare.attention=[standard,sdpa] compare.steps=5
    python scripts/compare_attention.py --paper

Each implementation trains in a fresh process with the same data and seed. What doesn't fit in memory gets the largest
micro-batch that does, then activation checkpointing, and the table says so. Leaves `comparison.json` and
`comparison.png` in the run folder, beside a folder for each run. `--paper` runs the settings of table 1 of the
FlashAttention-2 paper (arXiv 2307.08691), 65,536 tokens an optimizer step, beside the paper's figures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.status import Status
from rich.table import Table

from configs import compose, launch
from configs.errors import UserError
from configs.schema import Attention, CompareRunConfig, Recompute
from training.report import about, draw_bars, wide_console, write_json
from training.run import run_folder
from training.trial import Trial, run_trial

PAPER_TOKENS_PER_STEP = 65_536
PAPER_TFLOPS = {
    "gpt3_1b3_2k": {"standard": 142, "flash1": 189, "flash": 196},
    "gpt3_1b3_8k": {"standard": 72, "flash1": 170, "flash": 220},
    "gpt3_2b7_2k": {"standard": 149, "flash1": 189, "flash": 205},
    "gpt3_2b7_8k": {"standard": 80, "flash1": 175, "flash": 225},
}
"""arXiv 2307.08691, table 1: TFLOP/s per A100 80GB, 8 GPUs; its "standard" is Megatron-LM without FlashAttention."""


@dataclass(frozen=True)
class Row:
    """One implementation in one setting; speeds are medians after the warm-up, over all devices together."""

    setting: str
    attention: str
    micro_batch_size: int
    recompute: bool
    fits: bool
    tokens_per_s: float | None = None
    step_time_s: float | None = None
    model_tflops: float | None = None
    mfu: float | None = None
    mfu_causal: float | None = None
    peak_memory_gb: float | None = None
    loss: float | None = None
    speedup: float | None = None
    paper_tflops: float | None = None


def main(config: CompareRunConfig) -> int:
    """Run all trials, print the table, write the files."""
    console = wide_console()
    folder = run_folder(config).path
    overrides = [a for a in sys.argv[1:] if not a.startswith(("compare.", "run_dir=", "--"))]
    settings = paper_settings(overrides) if config.compare.paper else [(config.name, overrides)]
    rows: list[Row] = []
    for name, setting in settings:
        place = folder / name if config.compare.paper else folder
        rows += compare(console, name, setting, config.compare.attention, config.compare.steps, place)
    console.print(table_of(rows, config.compare.paper))
    facts = about(["scripts/compare_attention.py", *sys.argv[1:]])
    write_json(folder / "comparison.json", {**facts, "rows": [asdict(row) for row in rows]})
    draw(rows, folder / "comparison.png", facts)
    console.print(f"{folder / 'comparison.json'}\n{folder / 'comparison.png'}", soft_wrap=True)
    return 0


def paper_settings(overrides: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The paper's four settings: name and overrides. The corpus is the one that is always there, unless told."""
    kept = [override for override in overrides if not override.startswith("experiment=")]
    data = [] if any(override.startswith("data=") for override in kept) else ["data=stdlib", "model.vocab_size=50257"]
    for name in PAPER_TFLOPS:
        length = compose([f"experiment={name}"]).model.sequence_length
        batch = f"train.global_batch_size={PAPER_TOKENS_PER_STEP // length}"
        yield name, [f"experiment={name}", *data, batch, *kept]


def compare(
    console: Console, name: str, overrides: list[str], kinds: Sequence[Attention], steps: int, folder: Path
) -> list[Row]:
    """Trials of one setting, one an implementation; speed-ups are relative to the first that fits."""
    rows: list[Row] = []
    for kind in kinds:
        row = largest_fit(console, name, overrides, kind, steps, folder)
        reference = next((r.tokens_per_s for r in [*rows, row] if r.tokens_per_s), None)
        speedup = row.tokens_per_s / reference if row.tokens_per_s and reference else None
        rows.append(replace(row, speedup=speedup, paper_tflops=PAPER_TFLOPS.get(name, {}).get(kind.value)))
    return rows


def largest_fit(console: Console, name: str, overrides: list[str], kind: Attention, steps: int, folder: Path) -> Row:
    """The first rung of the ladder that fits in memory."""
    ours = [f"name={name}-{kind}", f"model.attention={kind}", "train.accumulation_steps=null"]
    for micro, recompute in ladder(overrides):
        what = [f"train.micro_batch_size={micro}", f"engine.recompute={'block' if recompute else 'none'}"]
        label = f"{name} {kind}, micro-batch {micro}{', recompute' if recompute else ''}"
        row = Row(name, kind.value, micro, recompute, fits=False)
        with console.status(label) as status:
            trial = run_trial(
                [f"logging.group=compare-{name}", *overrides, *ours, *what],
                folder / kind.value,
                steps=steps,
                on_step=partial(show_step, status, label, steps),
            )
        if trial is not None:
            console.print(f"{label}: {trial.tokens_per_s:,.0f} tokens/s")
            return measured(row, trial)
        console.print(f"{label}: does not fit in memory")
    return row


def show_step(status: Status, label: str, steps: int, done: int) -> None:
    """Progress of a trial on the terminal."""
    status.update(f"{label}: {done} of {steps} steps")


def ladder(overrides: list[str]) -> Iterator[tuple[int, bool]]:
    """Micro-batches to try and whether to recompute: the config's own, its halves, then the same with recompute."""
    config = compose(overrides)
    first = config.train.micro_batch_size or config.train.global_batch_size
    if first is None:
        raise UserError("train.micro_batch_size is not set: say with which micro-batch to begin.")
    sizes = [first >> k for k in range(first.bit_length()) if first % (1 << k) == 0]
    already = config.engine.recompute is Recompute.block
    for recompute in (True,) if already else (False, True):
        for size in sizes:
            yield size, recompute


def measured(row: Row, trial: Trial) -> Row:
    """The row with what the trial measured."""
    values = {key: value for key, value in asdict(trial).items() if key != "num_steps"}
    return replace(row, fits=True, **values)


def table_of(rows: Sequence[Row], paper: bool) -> Table:
    """The comparison for a terminal."""
    table = Table(title="Attention in training (medians; MFU counts attention in full / causally)")
    for heading in ("setting", "attention", "micro-batch", "tokens/s", "TFLOP/s", "MFU", "memory", "loss", "speed-up"):
        table.add_column(heading, justify="left" if heading in ("setting", "attention") else "right")
    if paper:
        table.add_column("paper, A100", justify="right")
    for row in rows:
        table.add_row(*cells(row), *([f"{row.paper_tflops:.0f}" if row.paper_tflops else "-"] if paper else []))
    return table


def cells(row: Row) -> list[str]:
    """The texts of a row; "-" where there is nothing."""

    def text(value: float | None, pattern: str) -> str:
        return "-" if value is None else pattern.format(value)

    micro = f"{row.micro_batch_size}{' + recompute' if row.recompute else ''}" if row.fits else "does not fit"
    mfu = f"{text(row.mfu, '{:.1%}')} / {text(row.mfu_causal, '{:.1%}')}"
    return [
        row.setting,
        row.attention,
        micro,
        text(row.tokens_per_s, "{:,.0f}"),
        text(row.model_tflops, "{:.3g}"),
        mfu,
        text(row.peak_memory_gb, "{:.2f} GB"),
        text(row.loss, "{:.4f}"),
        text(row.speedup, "{:.2f}x"),
    ]


def draw(rows: Sequence[Row], path: Path, facts: dict[str, Any]) -> None:
    """Bars of tokens/s by setting and implementation, with speed-ups on them."""
    values = {
        row.setting: {r.attention: r.tokens_per_s or 0.0 for r in rows if r.setting == row.setting} for row in rows
    }
    labels = {(r.setting, r.attention): f"{r.speedup:.2f}×" if r.speedup else "does not fit" for r in rows}
    draw_bars(path, values, labels, ylabel="tokens/s", title=f"Attention in training, {facts['device']}")


if __name__ == "__main__":
    sys.argv[1:] = ["compare.paper=true" if argument == "--paper" else argument for argument in sys.argv[1:]]
    launch(main, "compare")
