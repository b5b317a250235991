"""Time of saving and loading a training state, beside `torch.save` and `torch.distributed.checkpoint`.

    python -m tests.training.measure_checkpoint [folder]

The state is that of a GPT of about 50 M parameters in fp32: weights and both AdamW moments. Each save ends when its
bytes are on the disk. The time training waits for an asynchronous save is what its loop is held up for: in `save`, and
before the update of the step that runs meanwhile.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from configs.schema import Device
from tests.training.conftest import make_batch, make_engine, run_config
from training import checkpoint, distributed
from training.engine import Engine
from training.saver import Saver
from training.state import TrainState

ROUNDS = 3


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP; one process needs no group
    processes = distributed.init(Device.cpu)
    config = run_config(1, accumulation=1, micro=1)
    config.model.num_layers, config.model.num_heads, config.model.width = 12, 8, 512
    config.model.vocab_size, config.model.sequence_length = 24_000, 64
    engine = make_engine(config, processes)
    step(engine, 0)
    size = sum(3 * fragment.master.nbytes for fragment in engine.partition.fragments())
    threads = f"{torch.get_num_threads()} threads"
    print(f"{size / 12e6:.1f} M parameters, {size / 1e6:.0f} MB; torch {torch.__version__}; {threads}")
    for name, (save, load) in formats(engine, folder).items():
        saved, loaded = median_s(save), median_s(load)
        print(f"{name:36} save {saved:5.2f} s ({size / saved / 1e6:4.0f} MB/s), load {loaded:5.2f} s")
    measure_stall(engine, folder)
    engine.close()
    processes.close()


def formats(engine: Engine, folder: Path) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Name → save, load; each of the same tensors."""
    tensors = checkpoint.snapshot(engine, TrainState(step=1), tokenizer_hash="").tensors
    single = folder / "state.pt"

    def torch_save() -> None:
        with single.open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())

    def torch_load() -> None:
        for name, tensor in torch.load(single, weights_only=True).items():
            tensors[name].copy_(tensor)

    def dcp_save() -> None:
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        dcp.save(tensors, checkpoint_id=folder / "dcp", no_dist=True)

    return {
        "torch.save, fsync": (torch_save, torch_load),
        "torch.distributed.checkpoint": (
            dcp_save,
            lambda: dcp.load(tensors, checkpoint_id=folder / "dcp", no_dist=True),
        ),
        "checkpoint.save (checksums, commit)": (
            lambda: checkpoint.save(engine, TrainState(step=1), folder / "ours", tokenizer_hash=""),
            lambda: checkpoint.load(engine, folder / "ours"),
        ),
    }


def measure_stall(engine: Engine, folder: Path) -> None:
    """How long training waits for a save, asynchronous and not."""
    waits = {}
    for asynchronous in (False, True):
        saver = Saver(engine, folder / "stall", tokenizer_hash="", keep_last=1, asynchronous=asynchronous)
        waits[asynchronous] = [round_of(engine, saver, number) for number in range(ROUNDS)]
        saver.close()
    blocking = statistics.median(wait for wait, _ in waits[False])
    print(f"training waits {blocking:.3f} s for a synchronous save; step {waits[False][0][1]:.2f} s")
    for number, (wait, longer) in enumerate(waits[True], 1):
        share = f"{wait / blocking:.1%} of it"
        print(f"training waits {wait:.4f} s for asynchronous save {number}, {share}; step beside it {longer:.2f} s")


def round_of(engine: Engine, saver: Saver, number: int) -> tuple[float, float]:
    """A save and the step after it: time waited for the save, and time of that step."""
    before = saver.stalled_s
    saver.save(TrainState(step=number + 1))
    begin = time.perf_counter()
    step(engine, number + 1)
    took, waited = time.perf_counter() - begin, saver.stalled_s - before
    saver.wait()  # in a run there are many steps before the next save
    return waited, took


def step(engine: Engine, number: int) -> None:
    batch: Any = make_batch(number, engine.config)
    engine.train_step(batch, 1e-4)


def median_s(action: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as place:
        main(Path(place))
