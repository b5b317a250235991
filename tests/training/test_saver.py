"""Checkpoints written beside training: the same files, little waiting, and errors where every rank sees them."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import equal, make_engine, run_config, state_of, train
from training import checkpoint, rng
from training import saver as saver_module
from training.checkpoint import CheckpointError
from training.distributed import Processes
from training.engine import Engine
from training.saver import HostMemory, Saver, available_memory
from training.state import TrainState

Build = Callable[..., Engine]


@pytest.fixture
def build(processes: Processes) -> Iterator[Build]:
    """Makes engines that are closed after the test."""
    made: list[Engine] = []

    def make(stage: int = 1, **engine: Any) -> Engine:
        config = run_config(stage, accumulation=2, micro=2, **engine)
        config.model.dropout = 0.1  # so that random states matter
        rng.seed_all(3)
        made.append(make_engine(config, processes))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Gate:
    """Holds the commit of a checkpoint back until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch, function: str = "write_share") -> None:
        self.open = threading.Event()
        plain = getattr(checkpoint, function)

        def wait(*args: Any) -> Any:
            assert self.open.wait(20)
            return plain(*args)

        patch.setattr(checkpoint, function, wait)


def saver_of(engine: Engine, folder: Path, **keys: Any) -> Saver:
    return Saver(engine, folder, tokenizer_hash="abc", **keys)


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, {}), (1, {}), (2, {}), (3, {}), (1, {"offload_optimizer": True})], ids=str
)
def test_what_is_written_is_the_state_at_the_save(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, offload: dict[str, bool]
) -> None:
    """Two updates are made before the disk has seen anything of it."""
    one = build(stage, **offload)
    train(one, 0, 2)
    saver = saver_of(one, tmp_path)
    gate = Gate(monkeypatch)
    state = TrainState(step=2)
    before = state_of(one)
    saver.save(state)
    state.step = 99
    results = train(one, 2, 4)
    assert not equal(state_of(one), before)
    assert checkpoint.checkpoints(tmp_path) == []
    gate.open.set()
    saver.wait()
    saver.close()
    other = build(stage, **offload)
    loaded = checkpoint.load(other, tmp_path)
    assert loaded is not None
    assert loaded.state == TrainState(step=2)
    assert equal(state_of(other), before)
    assert train(other, 2, 4) == results


def test_no_update_before_the_copy_is_made(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = build(2)
    train(one, 0, 1)
    saver = saver_of(one, tmp_path)
    plain, slow = HostMemory.copy, 0.3

    def copy(*args: Any) -> Any:
        time.sleep(slow)
        return plain(*args)

    monkeypatch.setattr(HostMemory, "copy", copy)
    before = state_of(one)
    saver.save(TrainState(step=1))
    assert saver.stalled_s < slow / 2  # the save itself waits for nothing
    train(one, 1, 2)
    assert slow / 2 < saver.stalled_s < 2 * slow
    saver.wait()
    checkpoint.load(one, tmp_path)
    assert equal(state_of(one), before)
    saver.close()
    stalled = saver.stalled_s
    train(one, 2, 3)
    assert saver.stalled_s == stalled


def test_same_files_as_a_synchronous_save(build: Build, tmp_path: Path) -> None:
    one = build(1)
    train(one, 0, 2)
    shards = []
    for name, asynchronous in (("later", True), ("now", False)):
        saver = saver_of(one, tmp_path / name, asynchronous=asynchronous)
        saver.save(TrainState(step=2))
        assert asynchronous or (tmp_path / name / "latest").exists()
        saver.wait()
        saver.close()
        shards.append((tmp_path / name / "step_00000002" / "rank_00000.safetensors").read_bytes())
    assert shards[0] == shards[1]


def test_saves_come_one_after_the_other(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second save into the same memory waits for the first, and both are whole."""
    one = build(1)
    saver = saver_of(one, tmp_path, keep_last=2)
    gate = Gate(monkeypatch)
    states = {}
    timer = threading.Timer(0.2, gate.open.set)
    for step in (1, 2, 3):
        train(one, step - 1, step)
        states[step] = state_of(one)
        if step == 2:
            timer.start()
        saver.save(TrainState(step=step))
    saver.wait()
    saver.close()
    assert [checkpoint.step_of(c) for c in checkpoint.checkpoints(tmp_path)] == [3, 2]
    for step in (2, 3):
        checkpoint.load(one, tmp_path / f"step_{step:08d}")
        assert equal(state_of(one), states[step])


def fail(*_: Any) -> None:
    raise OSError(28, "No space left on device", "shard")


def repeat(action: Callable[[], None]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        action()
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["poll", "save", "wait"])
def test_failure_is_raised_at_the_next_place_and_once(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    one = build(1)
    saver = saver_of(one, tmp_path)
    saver.save(TrainState(step=1))
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_shard", fail)
        saver.save(TrainState(step=2))
        place = {"poll": saver.poll, "wait": saver.wait, "save": lambda: saver.save(TrainState(step=3))}[how]
        with pytest.raises(CheckpointError, match=r"step_00000002 was not written, earlier .* No space left"):
            repeat(place)
    saver.poll()
    saver.wait()
    assert [c.name for c in tmp_path.glob("step*")] == ["step_00000001"]
    saver.save(TrainState(step=3))
    saver.wait()
    saver.close()
    assert checkpoint.find_checkpoint(tmp_path).name == "step_00000003"


def test_poll_leaves_a_save_alone(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saver_of(build(1), tmp_path)
    gate = Gate(monkeypatch)
    saver.save(TrainState(step=1))
    begin = time.monotonic()
    saver.poll()
    assert time.monotonic() - begin < 5
    assert checkpoint.checkpoints(tmp_path) == []
    gate.open.set()
    saver.wait()
    saver.close()


def test_settle_only_warns(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = saver_of(build(1), tmp_path)
    monkeypatch.setattr(checkpoint, "write_shard", fail)
    saver.save(TrainState(step=1))
    saver.settle()
    assert "No space left" in caplog.text
    saver.close()


def test_too_little_memory_is_an_error_of_the_save(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build(1)
    saver = saver_of(one, tmp_path)

    def copy(*_: Any) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(HostMemory, "copy", copy)
    saver.save(TrainState(step=1))
    train(one, 0, 1)  # not held back by a copy that won't come
    with pytest.raises(CheckpointError, match=r"no CPU memory .*train\.async_save=false"):
        saver.wait()
    saver.close()


def test_a_machine_without_the_memory_saves_at_once(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = build(1)
    needed = 12 * sum(math.prod(shape) for shape in one.shapes.values())
    for factor, asynchronous in ((1.26, True), (1.24, False)):
        monkeypatch.setattr(saver_module, "available_memory", lambda factor=factor: factor * needed)
        saver = saver_of(one, tmp_path)
        assert saver.asynchronous == asynchronous
        assert ("train.async_save needs" in caplog.text) != asynchronous
        saver.close()
    saver.save(TrainState(step=1))
    assert checkpoint.find_checkpoint(tmp_path).name == "step_00000001"


def test_available_memory_is_that_of_this_machine() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < available_memory() <= total


def test_progress_is_told_by_tensor(build: Build, tmp_path: Path) -> None:
    calls: list[int] = []
    one = build(1)
    saver = saver_of(one, tmp_path, progress=lambda: calls.append(1))
    saver.save(TrainState(step=1))
    saver.wait()
    saver.close()
    assert len(calls) == 3 * len(one.shapes) + 1  # and the random state


@pytest.mark.gpu
def test_copies_from_a_gpu_are_of_the_moment() -> None:
    """Page-locked memory; what the GPU still has to do before the save is waited for."""
    device = torch.device("cuda", torch.cuda.current_device())
    memory = HostMemory(device)
    tensors = {"a": torch.zeros(2**26, device=device), "b": torch.randn(1000, 3, device=device), "c": torch.randn(5)}
    factor = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        factor = (factor @ factor).clamp(-1, 1)
    tensors["a"].add_(1)
    copies = memory.copy(tensors, torch.cuda.current_stream().record_event())
    assert memory.pinned
    assert copies["a"].is_pinned()
    assert equal(copies, {name: tensor.cpu() for name, tensor in tensors.items()})
    memory.unpin()
    assert not memory.pinned


def test_host_memory_is_used_again() -> None:
    memory = HostMemory(torch.device("cpu"))
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.uint8), "c": torch.randn(100)[::2]}
    first = memory.copy(tensors, None)
    place = memory.buffer.data_ptr()
    assert equal(first, tensors)
    tensors["a"].zero_()
    assert first["a"].any()
    assert equal(memory.copy(tensors, None), tensors)
    assert memory.buffer.data_ptr() == place
    bigger = {"a": torch.randn(1000)}
    assert equal(memory.copy(bigger, None), bigger)
