"""Train the same config with each implementation of attention, and say what each brings.

    python scripts/compare_attention.py experiment=gpt3_1b3_2k
    python scripts/compare_attention.py experiment=quickstart compare.attention=[standard,sdpa] compare.steps=5
    python scripts/compare_attention.py --paper

Each implementation trains in a fresh process with the same data and seed. What doesn't fit in memory gets the largest
micro-batch that does, then activation checkpointing, and the table says so. Leaves `comparison.json` and
`comparison.png` in the run folder, beside a folder for each run. `--paper` runs the settings of table 1 of the
FlashAttention-2 paper (arXiv 2307.08691), 65,536 tokens an optimizer step, beside the paper's figures;
`compare.settings=[gpt3_1b3_2k]` limits it to some, so that each can run on a card of its own.

The JSON grows with each trial. Called again, the tool keeps what was measured under the same conditions
(`training.earlier`), starts nothing that did not fit, and runs what is missing; `resume=never` starts anew.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import compose, end_on_ctrl_c, launch

end_on_ctrl_c(__name__)

import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table

from configs.errors import UserError
from configs.schema import Attention, CompareRunConfig, Device, Recompute, RunConfig
from training.children import Stop
from training.earlier import conditions, row_of, take_up
from training.memory import least_bytes
from training.report import about, draw_bars, wide_console, write_json
from training.run import claim, run_folder
from training.trial import Trial, run_trial, speed_and_time

PAPER_TOKENS_PER_STEP = 65_536
CLEARLY = 1.3
"""A trial that needs more than this times the GPU's memory, by a count of its largest parts, is not started."""
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
    start_s: float | None = None
    """Seconds from the start of the run's process to the row of its first step; see `Trial`."""
    wall_s: float | None = None
    """Seconds from the start of the run's process to its end."""


@dataclass(frozen=True)
class Rung:
    """A way to run an implementation in a setting: with this micro-batch, and with recomputed blocks or without."""

    setting: str
    attention: str
    micro_batch_size: int
    recompute: bool


@dataclass
class Comparison:
    """Rows so far, and the report that they are in."""

    console: Console
    folder: Path
    kinds: Sequence[Attention]
    steps: int
    conditions: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    no_room: list[Rung] = field(default_factory=list)
    """What did not fit in memory when it was started."""

    @property
    def path(self) -> Path:
        """The report's."""
        return self.folder / "comparison.json"

    def add(self, row: Row) -> None:
        """Put a row among the others, in the order that this call asks for, and write the report."""
        self.rows = arranged([*self.rows, row], self.kinds)
        self.write()

    def write(self) -> None:
        """Write the report."""
        found = {"conditions": self.conditions, "did_not_fit": [asdict(rung) for rung in self.no_room]}
        facts = about(["scripts/compare_attention.py", *sys.argv[1:]])
        write_json(self.path, {**facts, **found, "rows": [asdict(row) for row in self.rows]})


def main(config: CompareRunConfig) -> int:
    """Run all trials, print the table, write the files. Returns 0; 130 or 143 if Ctrl-C or SIGTERM ended the trials."""
    check(config)
    with claim(run_folder(config), "auto"):  # two calls at once would overwrite each other's rows
        return compare_all(config, run_folder(config).path)


def compare_all(config: CompareRunConfig, folder: Path) -> int:
    """`main` in a folder that is ours alone."""
    console = wide_console()
    overrides = [a for a in sys.argv[1:] if not a.startswith(("compare.", "run_dir=", "--"))]
    wanted = config.compare
    settings = list(paper_settings(overrides, wanted.settings) if wanted.paper else [(config.name, overrides)])
    facts = about([])
    now = conditions(facts, overrides, steps=wanted.steps, paper=wanted.paper)
    work = Comparison(console, folder, list(dict.fromkeys(wanted.attention)), wanted.steps, now)
    earlier, work.rows = take_up(console, work.path, now, config.resume, partial(row_of, Row))
    work.no_room = [rung for values in earlier.get("did_not_fit", []) if (rung := row_of(Rung, values)) is not None]
    have = {(row.setting, row.attention) for row in work.rows}
    with Stop() as stop:
        stop.trials(partial(compare_settings, work, settings, folder, wanted.paper))
        if stop.signal:
            console.print(f"{stop.signal.name}: the trials end here; the same command goes on.")
        console.print(table_of(work.rows, wanted.paper, have))
        work.write()
        draw(work.rows, folder / "comparison.png", facts)
        console.print(f"{work.path}\n{folder / 'comparison.png'}", soft_wrap=True)
    return stop.exit_code


def check(config: CompareRunConfig) -> None:
    """Raise `UserError` if nothing is to be compared, and for `compare.settings` that aren't there or asked for."""
    if not config.compare.attention:
        raise UserError(
            f"compare.attention=[]: give implementations to train with, of {', '.join(Attention)}, or leave it out."
        )
    unknown = [name for name in config.compare.settings if name not in PAPER_TFLOPS]
    if unknown:
        raise UserError(f"compare.settings: there is no {', '.join(unknown)}; possible are {', '.join(PAPER_TFLOPS)}.")
    if config.compare.settings and not config.compare.paper:
        raise UserError("compare.settings chooses among the paper's settings: give --paper too, or experiment=NAME.")


def paper_settings(overrides: Sequence[str], names: Sequence[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """The paper's settings of these names, else all four: name and overrides.

    The corpus is the one that is always there, unless told.
    """
    kept = [override for override in overrides if not override.startswith("experiment=")]
    data = [] if any(override.startswith("data=") for override in kept) else ["data=stdlib", "model.vocab_size=50257"]
    for name in dict.fromkeys(names or PAPER_TFLOPS):
        length = compose([f"experiment={name}"]).model.sequence_length
        batch = f"train.global_batch_size={PAPER_TOKENS_PER_STEP // length}"
        yield name, [f"experiment={name}", *data, batch, *kept]


def compare_settings(
    work: Comparison, settings: Sequence[tuple[str, list[str]]], folder: Path, in_folders: bool
) -> None:
    """Trials of the settings, (name, overrides), each in a folder of its own or all in this one."""
    for name, overrides in settings:
        compare(work, name, overrides, folder / name if in_folders else folder)


def compare(work: Comparison, name: str, overrides: list[str], folder: Path) -> None:
    """Trials of one setting, one an implementation, of those that have no row yet."""
    for kind in work.kinds:
        old = next((r for r in work.rows if (r.setting, r.attention) == (name, kind.value)), None)
        if old is None:
            work.add(largest_fit(work, name, overrides, kind, folder / kind.value))
        else:
            work.console.print(f"{name} {kind}: {old.tokens_per_s:,.0f} tokens/s, kept from an earlier call")


def arranged(rows: Sequence[Row], kinds: Sequence[Attention]) -> list[Row]:
    """The rows setting by setting, implementations as in `kinds`, others of earlier calls last.

    Speed-ups are relative to standard attention, where that is among them and fits, else to the first that fits.
    """
    order = {kind.value: place for place, kind in enumerate(kinds)}
    settings = list(dict.fromkeys([*PAPER_TFLOPS, *(row.setting for row in rows)]))
    rows = sorted(rows, key=lambda r: (settings.index(r.setting), order.get(r.attention, len(order))))
    base: dict[str, float] = {}
    for row in sorted(rows, key=lambda r: r.attention != Attention.standard):
        if row.tokens_per_s:
            base.setdefault(row.setting, row.tokens_per_s)
    result: list[Row] = []
    for row in rows:
        speedup = row.tokens_per_s / base[row.setting] if row.tokens_per_s else None
        result.append(replace(row, speedup=speedup, paper_tflops=PAPER_TFLOPS.get(row.setting, {}).get(row.attention)))
    return result


def largest_fit(work: Comparison, name: str, overrides: list[str], kind: Attention, folder: Path) -> Row:
    """The first rung of the ladder that fits in memory."""
    ours = [f"name={name}-{kind}", f"model.attention={kind}", "train.accumulation_steps=null"]
    for micro, recompute in ladder(overrides):
        rung = Rung(name, kind.value, micro, recompute)
        what = [f"train.micro_batch_size={micro}", f"engine.recompute={'block' if recompute else 'none'}"]
        label = f"{name} {kind}, micro-batch {micro}{', recompute' if recompute else ''}"
        row = Row(name, kind.value, micro, recompute, fits=False)
        if rung in work.no_room:
            work.console.print(f"{label}: did not fit in memory in an earlier call")
            continue
        if too_large := reason_to_skip(compose([*overrides, *ours, *what]), micro):
            work.console.print(f"{label}: not started, {too_large}")
            continue
        with work.console.status(label) as status:
            trial = run_trial(
                [f"logging.group=compare-{name}", *overrides, *ours, *what],
                folder,
                steps=work.steps,
                on_step=partial(show_step, status, label, work.steps),
            )
        if trial is not None:
            work.console.print(f"{label}: {speed_and_time(trial.tokens_per_s, trial.start_s, trial.wall_s)}")
            return measured(row, trial)
        work.console.print(f"{label}: does not fit in memory")
        work.no_room.append(rung)
        work.write()
    return row


def reason_to_skip(config: RunConfig, micro_batch_size: int) -> str:
    """Why a trial on one GPU can't fit in its memory by far; empty if it may, or there is no GPU."""
    if config.hardware.device is Device.cpu or not torch.cuda.is_available():
        return ""
    has = torch.cuda.get_device_properties(0).total_memory  # what is free would take a context of memory to ask
    least = least_bytes(config, micro_batch_size)
    if least <= CLEARLY * has:
        return ""
    return f"since weights and scores alone take {least / 1e9:.0f} GB and the GPU has {has / 1e9:.0f} GB"


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


def table_of(rows: Sequence[Row], paper: bool, kept: Collection[tuple[str, str]] = ()) -> Table:
    """The comparison for a terminal; `kept` are the (setting, attention) of earlier calls."""
    old = [f"{row.setting} {row.attention}" for row in rows if (row.setting, row.attention) in kept]
    title = "Attention in training (medians; MFU counts attention in full / causally)"
    caption = f"Kept from earlier calls: {', '.join(old)}" if old else None
    table = Table(title=title, caption=caption, caption_justify="left")
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
