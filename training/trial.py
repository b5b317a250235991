"""Short runs of `train.py` in fresh processes, for tools that compare settings.

A trial is the real thing: the same command line, data, engine and loop as a user's run, without evaluation, samples
and checkpoints. What it measured is read from its metrics.jsonl: a comparison can't differ from what training logs.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs import override
from configs.errors import OUT_OF_MEMORY, OUT_OF_MEMORY_EXIT_CODE, UserError
from training import metrics as m
from training.children import child
from training.logging import read_metrics
from training.run import RunFolder, move_aside

ROOT = Path(__file__).resolve().parents[1]
QUIET = (
    "train.eval_every=0",
    "train.sample_tokens=0",
    "train.save_every=0",
    "train.log_every=1",
    "train.profile_steps=0",
    "logging.plot=false",
    "logging.progress=off",
    "resume=never",
)


@dataclass(frozen=True)
class Trial:
    """What a trial measured, over its steps after the warm-up."""

    tokens_per_s: float
    """Median, all ranks together."""
    step_time_s: float
    """Median."""
    model_tflops: float | None
    """Median per device; None where the log has none."""
    mfu: float | None
    """Median, attention in full (6N + 12·L·E·S)."""
    mfu_causal: float | None
    """Median, attention counted causally."""
    peak_memory_gb: float
    """Largest, rank 0's."""
    loss: float
    """Training loss of the last step, nats per token."""
    num_steps: int
    """Steps that the medians are over."""
    start_s: float | None = None
    """Seconds from the start of its processes to the row of its first step: imports, corpus, weights, compilation.

    Where the device decides of steps, that row is written once step 2 has been queued (`Trainer.advance`), so the time
    includes step 2's forward and backward passes: on a GPU what the host takes to queue them, on a CPU all of it.
    """
    wall_s: float | None = None
    """Seconds from the start of its processes to their end."""


def speed_and_time(trial: Trial) -> str:
    """`12,345 tokens/s (first step after 21 s of 48 s)`: the result, and what it cost."""
    speed = f"{trial.tokens_per_s:,.0f} tokens/s"
    if trial.start_s is None or trial.wall_s is None:
        return speed
    return f"{speed} (first step after {trial.start_s:.0f} s of {trial.wall_s:.0f} s)"


def run_trial(
    overrides: Sequence[str],
    run_dir: Path,
    *,
    steps: int,
    world_size: int = 1,
    on_step: Callable[[int], None] = lambda step: None,
) -> Trial | None:
    """Train `steps` optimizer steps with `overrides` into `run_dir`, on `world_size` processes of this host.

    Returns None if the GPU's memory did not suffice. Raises `UserError` with the end of the run's output if it failed
    otherwise. Whatever ends the call ends all processes of the trial.
    """
    launcher = [sys.executable]
    if world_size > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    command = [
        *launcher,
        str(ROOT / "train.py"),
        *overrides,
        *QUIET,
        f"train.steps={steps}",
        override("run_dir", run_dir),
    ]
    run_dir.mkdir(parents=True, exist_ok=True)
    move_aside(RunFolder(run_dir))  # as the run itself would, but before its metrics are looked at
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (
        open(run_dir / "output.txt", "w") as output,
        child(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        begin, first = time.monotonic(), None
        while process.poll() is None:
            time.sleep(0.2)
            done = len(read_metrics(run_dir / "metrics.jsonl"))
            first = first or (time.monotonic() if done else None)
            on_step(done)
        end = time.monotonic()
    said = (run_dir / "output.txt").read_text()
    # Under torchrun the exit code is torchrun's; an error while the model is built is PyTorch's own.
    if process.returncode == OUT_OF_MEMORY_EXIT_CODE or OUT_OF_MEMORY in said or "OutOfMemoryError" in said:
        return None
    if process.returncode != 0:
        raise UserError(
            f"The trial in {run_dir} failed with exit code {process.returncode}. Its output ends with:\n{end_of(said)}"
        )
    trial = summarise(read_metrics(run_dir / "metrics.jsonl"), steps)
    return replace(trial, start_s=(first or end) - begin, wall_s=end - begin)


def end_of(output: str) -> str:
    """The last lines of a run's output, without the two dozen that torchrun adds when a rank has failed."""
    own = re.split(r"^[WE]\d{4} .*/torch/distributed/elastic/", output, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join((own if own.strip() else output).splitlines()[-15:])


def summarise(rows: Sequence[dict[str, Any]], steps: int) -> Trial:
    """Medians over the steps after the first third. Raises `UserError` if no step was measured."""
    measured = [row for row in rows if row["step"] > steps // 3 and m.TOKENS_PER_S in row]
    if not measured:
        raise UserError(f"No step was measured in {steps} steps: give more.")

    def median(key: str) -> float | None:
        values = [row[key] for row in measured if row.get(key) is not None]
        return statistics.median(values) if values else None

    tokens_per_s, step_time_s = median(m.TOKENS_PER_S), median(m.STEP_TIME)
    assert tokens_per_s is not None
    assert step_time_s is not None
    return Trial(
        tokens_per_s=tokens_per_s,
        step_time_s=step_time_s,
        model_tflops=median(m.MODEL_TFLOPS),
        mfu=median(m.MFU),
        mfu_causal=median(m.MFU_CAUSAL),
        peak_memory_gb=max(row[m.PEAK_MEMORY] for row in rows if m.PEAK_MEMORY in row),
        loss=rows[-1][m.TRAIN_LOSS],
        num_steps=len(measured),
    )
