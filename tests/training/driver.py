"""Small training runs in processes of their own, some of which are killed.

`python -m tests.training.driver` reads a job (JSON) a line and answers with its exit codes. It has imported all
libraries before it forks a job's ranks, so that a run takes a second and not ten. Faults are put in from here, by
replacing functions in the rank that has them.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema import Device, Precision, Toggle
from tests.ranks import free_port
from tests.training.conftest import make_batch, make_engine, run_config
from training import backend, checkpoint, distributed, rng, shards
from training.distributed import Processes
from training.engine import Engine
from training.state import TrainState
from training.step import Step

DEADLINE_S = 60.0
SAMPLES = 8
"""Global batch, whatever the ranks."""
ROOT = Path(__file__).parents[2]


@dataclass
class Job:
    """One run, from its newest checkpoint on if there is one."""

    folder: str
    world_size: int = 1
    stage: int = 1
    steps: int = 6
    save_every: int = 2
    precision: str = "fp32"
    fuse: str = "auto"
    """`engine.fuse_weight_gradients`."""
    fused_step: str = "auto"
    """`optim.fused_step`; `on` needs Triton's interpreter."""
    sequence: int = 1
    """Ranks that share each sample."""
    width: int = 64
    """Of the model."""
    heads: int = 2
    kv_heads: int = 2
    dropout: float = 0.1
    """In bf16; there is none in fp32."""
    fault: str = ""
    """Where a rank is killed, or has a NaN; see `FAULTS`."""
    fault_step: int = 0
    fault_rank: int = 0
    resave: str = ""
    """Only load, and save into this folder."""


@dataclass
class Outcome:
    """How a job's ranks ended: exit codes, negative for a signal."""

    codes: list[int] = field(default_factory=list)
    seconds: float = 0.0


class Driver:
    """The test's end of the driver process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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


# In the driver process


def main() -> None:
    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        print(json.dumps(asdict(run_job(Job(**json.loads(line))))), flush=True)
    gc.unfreeze()


def warm_up() -> None:
    """Import what a run imports on the way, most of it torch's compiler, so that no rank has to."""
    backend.import_deepspeed(torch.device("cpu"))
    with backend.quiet():
        importlib.import_module("deepspeed.runtime.zero.stage3")
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    gc.freeze()


def run_job(job: Job) -> Outcome:
    """Fork the ranks and wait for them; those still there after the deadline are killed."""
    started = time.monotonic()
    port = free_port()
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    children = [fork(job, rank, port) for rank in range(job.world_size)]
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() - started > DEADLINE_S:
                    os.kill(child, signal.SIGTERM)
        time.sleep(0.01)
    return Outcome([codes[child] for child in children], time.monotonic() - started)


def fork(job: Job, rank: int, port: int) -> int:
    """A child that is one rank of the job, its output in the job's folder."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(Path(job.folder) / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run_rank(job, rank, port)
        code = 0
    except BaseException:  # noqa: BLE001 - a forked child must not return into its parent's code
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# In a rank


def run_rank(job: Job, rank: int, port: int) -> None:
    """Train, log, save, as a run does."""
    if job.world_size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(job.world_size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = distributed.init(Device.cpu, timeout_minutes=0.5)
    takers = job.world_size // job.sequence
    micro = max(4 // takers, 1)
    config = run_config(
        job.stage, accumulation=SAMPLES // takers // micro, micro=micro, sequence_parallel_size=job.sequence
    )
    config.model.width, config.model.num_heads, config.model.num_kv_heads = job.width, job.heads, job.kv_heads
    config.engine.precision = Precision(job.precision)
    config.engine.fuse_weight_gradients = Toggle(job.fuse)
    config.optim.fused_step = Toggle(job.fused_step)
    config.model.dropout = job.dropout if job.precision == "bf16" else 0.0
    engine = make_engine(config, own)
    rng.seed_rank(config.seed, rank)
    folder = Path(job.folder) / "checkpoints"
    loaded = checkpoint.load(engine, folder)
    state = loaded.state if loaded else TrainState()
    if job.resave:
        checkpoint.save(engine, state, Path(job.resave) / "checkpoints", tokenizer_hash="")
    elif rank == job.fault_rank and job.fault:
        FAULTS[job.fault](job, engine)
    train_on(job, engine, own, state, folder)
    own.close()


def train_on(job: Job, engine: Engine, own: Processes, state: TrainState, folder: Path) -> None:
    unwritten: list[tuple[int, Step]] = []
    while state.step < job.steps and not job.resave:
        share = job.sequence
        batch: Any = make_batch(state.step, engine.config, own.rank // share, own.world_size // share)
        step = engine.train_step(batch, 1e-2)
        state.step += 1
        saves = state.step % job.save_every == 0 or state.step == job.steps
        unwritten.append((state.step, step))
        while len(unwritten) > (0 if saves or step.known else 1):
            write_losses(job, own, *unwritten.pop(0))
        if saves:
            checkpoint.save(engine, state, folder, tokenizer_hash="", keep_last=2)


def write_losses(job: Job, own: Processes, number: int, step: Step) -> None:
    """Add the step's line to this rank's losses."""
    result = step.result()
    entry = {"step": number, "loss": result.loss.hex(), "norm": result.grad_norm.hex(), "finite": result.finite}
    with (Path(job.folder) / f"losses_{own.rank}.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_update(job: Job, engine: Engine) -> None:
    """After the backward pass of a step, before its update."""
    plain, calls = engine.update, []

    def update(lr: float, clip: float | Tensor) -> None:
        calls.append(1)
        if len(calls) == job.fault_step:
            die()
        plain(lr, clip)

    engine.update = update  # type: ignore[method-assign]


def kill_between_micro_batches(job: Job, engine: Engine) -> None:
    plain, calls = engine.forward, []

    def forward(micro: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2 * job.fault_step:
            die()
        return plain(micro)

    engine.forward = forward  # type: ignore[method-assign]


def nan_loss(job: Job, engine: Engine) -> None:
    plain, calls = engine.forward, []

    def forward(micro: Any) -> Tensor:
        calls.append(1)
        return plain(micro) * (torch.nan if len(calls) == 2 * job.fault_step else 1.0)

    engine.forward = forward  # type: ignore[method-assign]


def in_save(fault: Callable[[], None]) -> Callable[[Job, Engine], None]:
    """Apply `fault` once the save of the fault's step begins."""

    def arm(job: Job, engine: Engine) -> None:
        plain = checkpoint.commit

        def commit(taken: Any, *args: Any, **keys: Any) -> Path:
            if taken.manifest.step == job.fault_step:
                fault()
            return plain(taken, *args, **keys)

        checkpoint.commit = commit

    return arm


def kill_in_shard() -> None:
    """With half the tensors written."""
    plain, calls = shards.raw_bytes, []

    def raw_bytes(tensor: Tensor) -> memoryview:
        calls.append(1)
        if len(calls) == 20:
            die()
        return plain(tensor)

    shards.raw_bytes = raw_bytes


def kill_in_small_file(name: str) -> Callable[[], None]:
    """With half of a small file written."""

    def arm() -> None:
        plain = checkpoint.write_synced

        def write_synced(path: Path, text: str) -> None:
            if path.name.startswith(name):
                plain(path, text[: len(text) // 2])
                die()
            plain(path, text)

        checkpoint.write_synced = write_synced

    return arm


def kill_before_pointer() -> None:
    """Between the rename of a checkpoint's folder and that of the pointer."""
    plain = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.name == checkpoint.POINTER:
            die()
        return plain(self, target)

    Path.replace = replace  # type: ignore[assignment, method-assign]


def kill_before(function: str) -> Callable[[], None]:
    """Instead of a function of `training.checkpoint`."""

    def arm() -> None:
        setattr(checkpoint, function, lambda *_: die())

    return arm


FAULTS: dict[str, Callable[[Job, Engine], None]] = {
    "update": kill_before_update,
    "micro-batch": kill_between_micro_batches,
    "shard": in_save(kill_in_shard),
    "manifest": in_save(kill_in_small_file("manifest")),
    "publish": in_save(kill_before("publish")),
    "pointer": in_save(kill_before_pointer),
    "deletion": in_save(kill_before("rotate")),
    "nan": nan_loss,
}

if __name__ == "__main__":
    main()
