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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
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
LOOK_EVERY_S = 0.2
"""Between two looks at how far a trial is."""


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


def speed_and_time(tokens_per_s: float, start_s: float | None, wall_s: float | None) -> str:
    """`12,345 tokens/s (first step after 21 s of 48 s)`: the result, and what it cost."""
    speed = f"{tokens_per_s:,.0f} tokens/s"
    if start_s is None or wall_s is None:
        return speed
    return f"{speed} (first step after {start_s:.0f} s of {wall_s:.0f} s)"


@dataclass
class Running:
    """A trial's processes, from `started` on."""

    process: subprocess.Popen[str]
    run_dir: Path
    begin: float = field(default_factory=time.monotonic)
    """`time.monotonic`, in seconds, as the others."""
    first: float | None = None
    """When the row of the first step was seen."""
    end: float | None = None
    """When the processes were seen to have ended."""

    def look(self) -> int:
        """Steps done, noting when the first was, and the end."""
        ended = self.process.poll() is not None  # before the rows are read: then they are all there
        done = len(read_metrics(self.run_dir / "metrics.jsonl"))
        now = time.monotonic()
        if done and self.first is None:
            self.first = now
        if ended and self.end is None:
            self.end = now
        return done

    def outcome(self, steps: int) -> Trial | None:
        """What was measured, once the processes have ended; returns and raises as `run_trial`."""
        assert self.end is not None
        said = (self.run_dir / "output.txt").read_text()
        code = self.process.returncode
        # Under torchrun the exit code is torchrun's; an error while the model is built is PyTorch's own.
        if code == OUT_OF_MEMORY_EXIT_CODE or OUT_OF_MEMORY in said or "OutOfMemoryError" in said:
            return None
        if code != 0:
            raise UserError(
                f"The trial in {self.run_dir} failed with exit code {code}. Its output ends with:\n{end_of(said)}"
            )
        trial = summarise(read_metrics(self.run_dir / "metrics.jsonl"), steps)
        return replace(trial, start_s=(self.first or self.end) - self.begin, wall_s=self.end - self.begin)


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
    with started(overrides, run_dir, steps, world_size) as trial:
        wait_for_all([trial], on_step)
    return trial.outcome(steps)


def run_on_cards(
    overrides: Sequence[str],
    run_dirs: Mapping[str, Path],
    *,
    steps: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Trial | UserError | None]:
    """The same trial of one process on several GPUs of this host at the same time, each by itself.

    Args:
        overrides: as for `run_trial`.
        run_dirs: a folder for each GPU, which goes by what CUDA_VISIBLE_DEVICES calls it.
        steps: optimizer steps of each.
        on_step: called with the steps that the slowest has done.

    Gives for each GPU what `run_trial` would return or raise: one that fails leaves the others alone. Each process has
    as many threads as torchrun gives to a rank: one, unless OMP_NUM_THREADS says otherwise. Whatever ends the call ends
    the processes of all.
    """
    with ExitStack() as stack:
        trials: dict[str, Running] = {}
        for card, run_dir in run_dirs.items():
            variables = {"CUDA_VISIBLE_DEVICES": card, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            trials[card] = stack.enter_context(started(overrides, run_dir, steps, variables=variables))
        stack.callback(lambda: ask_to_end(trials.values()))
        wait_for_all(list(trials.values()), on_step)
    outcomes: dict[str, Trial | UserError | None] = {}
    for card, trial in trials.items():
        try:
            outcomes[card] = trial.outcome(steps)
        except UserError as error:
            outcomes[card] = error
    return outcomes


@contextmanager
def started(
    overrides: Sequence[str],
    run_dir: Path,
    steps: int,
    world_size: int = 1,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """A trial that is under way, and over when the block is. `variables`: of its environment, beside our own."""
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
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **(variables or {})}
    with (
        open(run_dir / "output.txt", "w") as output,
        child(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        yield Running(process, run_dir)


def wait_for_all(trials: Sequence[Running], on_step: Callable[[int], None]) -> None:
    """Return once all have ended; meanwhile `on_step` hears of the steps that the slowest has done."""
    while any(trial.end is None for trial in trials):
        time.sleep(LOOK_EVERY_S)
        on_step(min(trial.look() for trial in trials))


def ask_to_end(trials: Iterable[Running]) -> None:
    """SIGTERM to what still runs, all at once: `child` ends one after the other, with patience for each."""
    for trial in trials:
        if trial.process.poll() is None:
            trial.process.terminate()


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
