"""The end of a run in a few lines: what came out, where things are, what to run next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from configs import override
from configs.schema import RunConfig
from training import metrics as m
from training.checkpoint import candidates
from training.console import RunSummary, short_path
from training.hardware import Peak
from training.logging import read_metrics
from training.metrics import Throughput
from training.progress import format_duration
from training.run import RunFolder
from training.state import TrainState


def summarise(
    config: RunConfig,
    folder: RunFolder,
    state: TrainState,
    *,
    steps_done: int,
    seconds: float,
    stopped_by: str,
    evaluated: bool,
    unevaluated: bool,
    throughput: Throughput | None,
    peak: Peak,
    world_size: int,
    wandb_note: str,
) -> RunSummary:
    """What `training.console.print_summary` shows; losses are the last logged ones, as in metrics.jsonl.

    stopped_by: the signal that came, if one did; steps may be done all the same. evaluated: whether this start has
    evaluated after the last step. unevaluated: whether the evaluation after the last of all steps is still to come.
    """
    rows = read_metrics(folder.metrics)

    def last(key: str) -> float | None:
        return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)

    saved = candidates(folder.path)
    stopped = stopped_by if state.step < config.train.steps else ""
    if stopped:
        title = f"Stopped by {stopped} after step {state.step:,} of {config.train.steps:,}"
    else:
        title = headline(config, steps_done, seconds, evaluated, stopped_by if unevaluated else "")
    return RunSummary(
        headline=title,
        folder=folder,
        train_loss=last(m.TRAIN_LOSS),
        val_loss=last(m.VAL_LOSS),
        val_perplexity=last(m.VAL_PERPLEXITY),
        val_bits_per_byte=last(m.VAL_BITS_PER_BYTE),
        throughput=throughput,
        peak=peak,
        world_size=world_size,
        checkpoint=saved[0] if saved else None,
        wandb_note=wandb_note,
        next_steps=next_steps(config, folder, bool(stopped), unevaluated, bool(saved)),
    )


def headline(config: RunConfig, steps_done: int, seconds: float, evaluated: bool, cut_off_by: str) -> str:
    """One line about a run whose steps are all done; `cut_off_by`: the signal that came before the last evaluation."""
    if cut_off_by:
        return f"All {config.train.steps:,} steps are done; {cut_off_by} came before the last evaluation"
    if steps_done == 0 and evaluated:
        return f"All {config.train.steps:,} steps of this run were done; now the last evaluation is too"
    if steps_done == 0:
        return f"Nothing to do: all {config.train.steps:,} steps of this run are done"
    return f"{steps_done:,} steps in {format_duration(seconds)}"


def next_steps(
    config: RunConfig, folder: RunFolder, stopped: bool, unevaluated: bool, saved: bool
) -> Sequence[tuple[str, str]]:
    """(what it does, command) pairs."""
    if stopped and not saved:  # train.save_every=0
        return []
    again = "the same command again"
    place = short_path(folder.path)
    this = (
        "python train.py"
        if place == "runs/quickstart"
        else f"python train.py {shlex.quote(override('run_dir', place))}"
    )
    if stopped:
        return [("go on", again)]
    return [
        *([("evaluate", again)] if unevaluated and saved else []),
        ("train longer", f"{this} train.steps={config.train.steps * 2}"),
        ("start anew", f"{this} resume=never"),
        ("let it write", f"python scripts/sample.py {shlex.quote(place)}"),
        ("compare attention", "python scripts/compare_attention.py compare.steps=20"),
        ("your own text", "python train.py name=mine data=text data.path='FOLDER/*.txt'"),
        ("a real model", "torchrun --nproc_per_node 8 train.py experiment=gpt2_124m"),
    ]
