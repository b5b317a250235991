"""Whole runs of train.py in forked processes, in which things go wrong.

`python -m tests.runs.faults` reads a job (JSON) a line and answers how its ranks ended. It has imported what a run
imports before it forks the ranks, so that a run takes a second and not ten; a rank then executes train.py with its
command line. The ranks have no launcher over them, as under a plain `srun`: what ends the others when one is gone
is our own doing.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from configs.schema import DataConfig
from data import PreparedData, Progress
from data.preparation import ProgressCallback
from model import GPT, gpt
from tests.ranks import free_port
from tests.runs.conftest import ENVIRONMENT, ROOT
from tests.training.driver import warm_up
from training import checkpoint, trainer, watchdog
from training.checkpoint import Shard, Snapshot
from training.engine import Engine
from training.logging import RunLogger
from training.metrics import ThroughputMeter
from training.profile import StepProfiler
from training.step import Step
from training.trainer import Trainer

DEADLINE_S = 120.0


@dataclass
class Job:
    """One start of train.py."""

    folder: str
    """Of what the ranks print: `output_RANK`, and `errors_RANK` where `errors_apart`."""
    arguments: list[str]
    """Of train.py."""
    ranks: int = 1
    cwd: str = str(ROOT)
    errors_apart: bool = False
    """Standard error in a file of its own."""
    fault: str = ""
    """See `FAULTS`."""
    at_step: int = 0
    fault_rank: int = 0
    kill_after_s: float | None = None
    """Kill rank `fault_rank` with SIGKILL so long after its start."""
    kill_after_rows: int = 0
    """Kill all ranks once the run in `run_dir` has logged so many rows and has a checkpoint. With the fault "wait" it
    cannot be over before."""
    run_dir: str = ""


@dataclass
class Outcome:
    """How the ranks of a job ended."""

    codes: list[int] = field(default_factory=list)
    """Exit codes, negative for a signal."""
    seconds: float = 0.0


class Driver:
    """The test's end of the driver process."""

    def __init__(self, **environment: str) -> None:
        """`environment`: variables of the runs, besides `ENVIRONMENT`'s."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.runs.faults"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT | environment,
        )

    def run(self, job: Job) -> Outcome:
        """Run one job to its end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(job)) + "\n")
        self.process.stdin.flush()
        return Outcome(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=20)


def output(folder: Path, rank: int = 0) -> str:
    """What a rank of the last job printed."""
    return (folder / f"output_{rank}").read_text()


# In the driver process


def main() -> None:
    torch.set_num_threads(1)
    warm_up()
    for name in ("hydra.main", "hydra.core.override_parser.overrides_parser", "matplotlib.pyplot"):
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(asdict(run_job(Job(**json.loads(line))))), flush=True)


def run_job(job: Job) -> Outcome:
    """Fork the ranks and wait for them; those still there after the deadline are killed."""
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    port = free_port()
    children = [fork(job, rank, port) for rank in range(job.ranks)]
    codes: dict[int, int] = {}
    kill_at = started + (DEADLINE_S if job.kill_after_s is None else job.kill_after_s)
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() - started > DEADLINE_S:
                    os.kill(child, signal.SIGKILL)
        if job.kill_after_rows and not codes and has_saved(Path(job.run_dir), job.kill_after_rows):
            for child in children:
                os.kill(child, signal.SIGKILL)
            job.kill_after_rows = 0
        if time.monotonic() > kill_at and children[job.fault_rank] not in codes:
            os.kill(children[job.fault_rank], signal.SIGKILL)
            kill_at = started + DEADLINE_S
        time.sleep(0.005)
    return Outcome([codes[child] for child in children], time.monotonic() - started)


def has_saved(run_dir: Path, num_rows: int) -> bool:
    """Whether a run has logged so many rows and has a checkpoint."""
    metrics = run_dir / "metrics.jsonl"
    logged = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    return logged >= num_rows and (run_dir / "checkpoints" / "latest").exists()


def fork(job: Job, rank: int, port: int) -> int:
    """A child that is one rank of the job."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for descriptor, name in ((1, "output"), (2, "errors" if job.errors_apart else "")):
            if name:
                log = os.open(Path(job.folder) / f"{name}_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, descriptor)
        code = run_rank(job, rank, port)
    except BaseException:  # noqa: BLE001 - a forked child must not return into its parent's code
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# In a rank


def run_rank(job: Job, rank: int, port: int) -> int:
    """What `python train.py` does; its exit code."""
    if job.ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(job.ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    watchdog.HANG_GRACE_S = watchdog.GRACE_S = 3.0  # type: ignore[misc]
    if job.fault:
        FAULTS[job.fault](job, rank)
    os.chdir(job.cwd)
    sys.argv = [str(ROOT / "train.py"), *job.arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    raise AssertionError("train.py ends with an exit code")


def after_step(action: Callable[[], None]) -> Callable[[Job, int], None]:
    """Do `action` on the fault's rank when its step is done."""

    def arm(job: Job, rank: int) -> None:
        plain = Trainer.advance

        def advance(self: Trainer, batch: Any, step: Step) -> None:
            plain(self, batch, step)
            if self.state.step == job.at_step and rank == job.fault_rank:
                action()

        Trainer.advance = advance  # type: ignore[method-assign]

    return arm


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(2 * DEADLINE_S)


def end() -> None:
    """As `kill` and most schedulers do."""
    os.kill(os.getpid(), signal.SIGTERM)


def ask_for_a_requeue() -> None:
    """As SLURM does before a job's time limit."""
    os.kill(os.getpid(), signal.SIGUSR1)


def fail() -> None:
    raise ValueError("the card has fallen off")


def give_up_in_a_barrier() -> None:
    """As CUDA does once another GPU hasn't come for long."""
    raise RuntimeError("CUDA error: unspecified launch failure")


def kill_children() -> None:
    """wandb's service is the only one there is beside the watchdog's."""
    victims = [one for one in psutil.Process().children(recursive=True) if "backstop.py" not in " ".join(one.cmdline())]
    assert victims, "wandb has no process"
    for victim in victims:
        victim.kill()
    psutil.wait_procs(victims, timeout=10)


def die_while_others_wait(job: Job, rank: int) -> None:
    """The other ranks are where an NCCL collective would hold them: in a call that doesn't return."""
    after_step(die)(job, rank)
    for other in range(job.ranks):
        if other != job.fault_rank:
            after_step(hang)(Job(job.folder, [], at_step=job.at_step, fault_rank=other), rank)


def wait(job: Job, rank: int) -> None:
    """Every rank stands still after a step."""
    after_step(hang)(replace(job, fault_rank=rank), rank)


def in_forward(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Job, int], None]:
    """`change` the sums of the losses at one step of the process."""

    def arm(job: Job, rank: int) -> None:
        plain, calls = Engine.forward, []

        def forward(self: Engine, micro: Any) -> torch.Tensor:
            sums = plain(self, micro)
            if not sums.requires_grad:
                return sums
            calls.append(1)
            return change(sums) if len(calls) == job.at_step else sums

        Engine.forward = forward  # type: ignore[method-assign]

    return arm


def nan_gradient(sums: torch.Tensor) -> torch.Tensor:
    """The loss is finite, its gradient not."""
    sums.register_hook(lambda gradient: gradient * torch.nan)
    return sums


def fail_on_a_stuck_device(sums: torch.Tensor) -> torch.Tensor:
    """From here on the device doesn't come to the end of what it was handed, as in a collective without a peer."""
    ThroughputMeter.report = lambda self: hang()  # type: ignore[method-assign,assignment]
    StepProfiler._synchronize = lambda self: hang()  # type: ignore[method-assign]
    fail()
    return sums


def slow_wandb(job: Job, rank: int) -> None:
    """A step that fails on all ranks, and a server that holds up the end of one for longer than the others' grace."""
    in_forward(nan_gradient)(job, rank)
    plain = RunLogger.finish

    def finish(self: RunLogger, exit_code: int = 0) -> None:
        if rank == job.fault_rank:
            time.sleep(4 * watchdog.GRACE_S)
        plain(self, exit_code)

    RunLogger.finish = finish  # type: ignore[method-assign]


def signal_in_evaluation(job: Job, rank: int) -> None:
    plain = trainer.evaluation_batches

    def batches(*args: Any, **keys: Any) -> Any:
        for number, batch in enumerate(plain(*args, **keys)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    trainer.evaluation_batches = batches  # type: ignore[assignment]


def signal_in_last_evaluation(job: Job, rank: int) -> None:
    plain = Trainer.finish

    def finish(self: Trainer) -> None:
        if rank == job.fault_rank:
            signal_in_evaluation(job, rank)
        plain(self)

    Trainer.finish = finish  # type: ignore[method-assign]


def signal_in_save(job: Job, rank: int) -> None:
    plain = checkpoint.write_share

    def write_share(taken: Snapshot, *args: Any) -> Shard:
        if taken.manifest.step == job.at_step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return plain(taken, *args)

    checkpoint.write_share = write_share


def signal_in_preparation(number: signal.Signals) -> Callable[[Job, int], None]:
    """While the corpus is tokenised."""

    def arm(job: Job, rank: int) -> None:
        plain = trainer.prepare

        def prepare(config: DataConfig, report: ProgressCallback) -> PreparedData:
            def update(progress: Progress) -> None:
                if progress.stage == "tokenize":
                    os.kill(os.getpid(), number)
                report(progress)

            return plain(config, update)

        trainer.prepare = prepare  # type: ignore[assignment]

    return arm


def slow_save(job: Job, rank: int) -> None:
    """Each rank takes another time to write, so that saves and steps overlap in all ways."""
    plain = checkpoint.write_share

    def write_share(taken: Snapshot, *args: Any) -> Shard:
        time.sleep(0.05 * (rank + taken.manifest.step % 4))
        return plain(taken, *args)

    checkpoint.write_share = write_share


def full_disk(job: Job, rank: int) -> None:
    """One rank's disk has no room for one checkpoint."""
    plain = checkpoint.write_shard

    def write_shard(path: Path, *args: Any) -> Any:
        if rank == job.fault_rank and f"_{job.at_step:08d}" in path.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(path, *args)

    checkpoint.write_shard = write_shard


def defect_in_save(job: Job, rank: int) -> None:
    """One rank's write fails in a way that has nothing to do with the disk."""
    plain = checkpoint.write_shard

    def write_shard(path: Path, *args: Any) -> Any:
        if rank == job.fault_rank and f"_{job.at_step:08d}" in path.parent.name:
            raise TypeError("no such tensor")
        return plain(path, *args)

    checkpoint.write_shard = write_shard


def nothing_to_draw(job: Job, rank: int) -> None:
    """New weights are NaN, and there are no initial ones."""
    plain = GPT.to_empty

    def to_empty(self: nn.Module, **keys: Any) -> nn.Module:
        made = plain(self, **keys)
        with torch.no_grad():
            for parameter in made.parameters(recurse=False):
                parameter.fill_(torch.nan)
        return made

    def initialise(module: nn.Module) -> None:
        raise AssertionError("weights are drawn")

    nn.Module.to_empty = to_empty  # type: ignore[method-assign,assignment]
    gpt.initialise = initialise


FAULTS: dict[str, Callable[[Job, int], None]] = {
    "die": after_step(die),
    "hang": after_step(hang),
    "fail": after_step(fail),
    "barrier": after_step(give_up_in_a_barrier),
    "requeue": after_step(ask_for_a_requeue),
    "SIGTERM": after_step(end),
    "wandb": after_step(kill_children),
    "wait": wait,
    "die while others wait": die_while_others_wait,
    "nan": in_forward(nan_gradient),
    "spike": in_forward(lambda sums: sums * 1e4),
    "fail on a stuck device": in_forward(fail_on_a_stuck_device),
    "slow wandb": slow_wandb,
    "signal in evaluation": signal_in_evaluation,
    "signal in last evaluation": signal_in_last_evaluation,
    "signal in save": signal_in_save,
    "SIGTERM in preparation": signal_in_preparation(signal.SIGTERM),
    "SIGUSR1 in preparation": signal_in_preparation(signal.SIGUSR1),
    "slow save": slow_save,
    "full disk": full_disk,
    "defect in save": defect_in_save,
    "nothing to draw": nothing_to_draw,
}

if __name__ == "__main__":
    main()
