"""Steps that the device decides of: the same numbers as when the host decides, learned a step later."""

from __future__ import annotations

import itertools
import json
import math
import random
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import Precision, RunConfig, Toggle
from tests.training.conftest import Build, equal, make_batch, run_config, state_of, train
from tests.training.test_fused_step import CPU_ONLY, KINDS, config_of
from training import checkpoint
from training.engine import Engine
from training.saver import Saver
from training.state import TrainState
from training.step import HostCopy, Step, StepResult, clip_factor, clip_factor_on_device


def rounded(value: float) -> float:
    """As a kernel's argument would be."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def report_of(*values: float, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
@pytest.mark.parametrize("limit", [0.0, 1e-3, 0.1, 1.0, 0.7, 3.0])
def test_factor_is_the_hosts_bit_for_bit(limit: float, device: str) -> None:
    """Squared norms of all sizes, and some around the limit's square."""
    draw = random.Random(0)
    squares = [10 ** draw.uniform(-30, 30) for _ in range(300)] + [0.0, 1.0]
    squares += [limit**2 * draw.uniform(0.999, 1.001) for _ in range(300)]
    clipped = 0
    for square in squares:
        wanted = clip_factor(math.sqrt(square), limit)
        got = clip_factor_on_device(report_of(3.0, 0.5, square, device=device), limit)
        assert (got.dtype, got.shape, got.device.type) == (torch.float32, (1,), device)
        assert got.item() == rounded(wanted), square
        clipped += wanted < 1.0
    assert (clipped > 100) == (limit > 0)


@DEVICES
@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_factor_of_what_is_not_finite_is_no_number(limit: float, wrong: float, device: str) -> None:
    for place in range(3):
        values = [1.0, 2.0, 3.0]
        values[place] = wrong
        assert clip_factor_on_device(report_of(*values, device=device), limit).isnan().all(), place
    assert not clip_factor_on_device(report_of(1e300, -1e300, 1e300, device=device), limit).isnan().any()


def test_a_step_is_read_once() -> None:
    calls = []

    def read(values: list[float]) -> StepResult:
        calls.append(values)
        return StepResult(*values, finite=True, updated=True)

    tensor = report_of(1.0, 2.0, 3.0)
    step = Step(HostCopy(tensor), read)
    tensor.zero_()  # the copy is of before
    assert not step.known
    assert not calls
    assert step.result() is step.result()
    assert step.known
    assert step.is_here
    assert calls == [[1.0, 2.0, 3.0]]


def clipping(stage: int, precision: Precision) -> RunConfig:
    """Some steps clip and some don't."""
    config = config_of(stage, precision)
    config.optim.grad_clip = 1.5
    return config


def spoil(one: Engine, steps: Iterable[int]) -> None:
    """The second micro-batch of these steps of the engine has a NaN loss."""
    plain, calls, wrong = one.forward, itertools.count(), set(steps)

    def forward(micro: Any) -> Tensor:
        sums = plain(micro)
        step, number = divmod(next(calls), 2)
        return sums * torch.nan if number == 1 and step in wrong else sums

    one.forward = forward  # type: ignore[method-assign]


@CPU_ONLY
@pytest.mark.parametrize(("stage", "precision"), KINDS)
@pytest.mark.parametrize("wrong", [(), (0, 2, 3, 7)])
def test_same_numbers_as_the_hosts_decision(
    build: Build, stage: int, precision: Precision, wrong: tuple[int, ...]
) -> None:
    """Bit for bit, in results and state: read as late as can be, read at once, and decided on the host. The first step,
    two in a row and the last one are skipped."""
    found = []
    for way in ("late", "at once", "host"):
        one = build(clipping(stage, precision))
        assert one.decides_on_device
        one.decides_on_device = way != "host"
        spoil(one, wrong)
        if way == "at once":
            results = [train(one, step, step + 1)[0] for step in range(8)]
        else:
            results = train(one, 0, 8)
        assert (one.partition.updates, one.skipped) == (8 - len(wrong), len(wrong))
        found.append(([repr(result) for result in results], state_of(one)))
        assert [not result.updated for result in results] == [step in wrong for step in range(8)]
    for results, state in found[1:]:
        assert results == found[0][0]
        assert equal(state, found[0][1])


@CPU_ONLY
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_when_results_are_read(build: Build, stage: int, precision: Precision) -> None:
    """Each is read after the next step's backward pass and before its update, and no earlier."""
    one = build(config_of(stage, precision))
    events: list[str] = []
    plain_update, plain_learn, plain_accumulate = one.update, one.learn, one.accumulate

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return call

    one.update = noted("update", plain_update)  # type: ignore[method-assign]
    one.learn = noted("learn", plain_learn)  # type: ignore[method-assign]
    one.accumulate = noted("accumulate", plain_accumulate)  # type: ignore[method-assign]
    first, second = (one.train_step(make_batch(step, one.config), 1e-2) for step in range(2))  # type: ignore[arg-type]
    assert events == ["accumulate", "update", "accumulate", "learn", "update"]
    assert (first.known, second.known) == (True, False)
    one.settle()
    assert second.known
    one.settle()
    assert events.count("learn") == 2


def test_where_the_host_decides(build: Build) -> None:
    """Without the kernel, and in fp16, whose loss scale the next step's backward pass needs."""
    config = config_of(0, Precision.fp32, Toggle.off)
    one = build(config)
    assert not one.decides_on_device
    assert one.train_step(make_batch(0, config), 1e-2).known  # type: ignore[arg-type]
    assert not build(run_config(2)).decides_on_device
    half = build(config_of(0, Precision.fp16))
    assert not half.decides_on_device
    half.loss_scale.scale = 2.0**10
    assert all(result.updated for result in train(half, 0, 2))
    assert half.partition.updates == 2


@CPU_ONLY
@pytest.mark.parametrize(("stage", "precision"), KINDS)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_reads_what_is_unread(
    build: Build, tmp_path: Path, stage: int, precision: Precision, asynchronous: bool
) -> None:
    """The last step before the save was none: the checkpoint has the right number of updates, the state before that
    step, and goes on bit for bit."""
    one = build(clipping(stage, precision))
    spoil(one, (2,))
    train(one, 0, 2)
    before = state_of(one)
    saver = Saver(one, tmp_path, tokenizer_hash="", asynchronous=asynchronous)
    skipped = one.train_step(make_batch(2, one.config), one.config.optim.lr)  # type: ignore[arg-type]
    assert not skipped.known
    saver.save(TrainState(step=3))
    assert skipped.known
    results = train(one, 3, 6)
    saver.wait()
    saver.close()
    other = build(clipping(stage, precision))
    loaded = checkpoint.load(other, tmp_path)
    assert loaded is not None
    assert (loaded.manifest.updates, other.partition.updates) == (2, 2)
    assert equal(state_of(other), before)
    assert train(other, 3, 6) == results
    assert equal(state_of(other), state_of(one))


@CPU_ONLY
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_a_load_forgets_what_is_unread(build: Build, tmp_path: Path, stage: int, precision: Precision) -> None:
    one = build(config_of(stage, precision))
    train(one, 0, 2)
    checkpoint.save(one, TrainState(step=2), tmp_path, tokenizer_hash="")
    spoil(one, (0,))
    one.train_step(make_batch(2, one.config), 1e-2)  # type: ignore[arg-type]
    checkpoint.load(one, tmp_path)
    one.settle()
    assert one.partition.updates == 2


@CPU_ONLY
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_an_update_waits_for_a_save_that_copies(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, precision: Precision
) -> None:
    """The kernel's step calls the hook by which the saver holds updates back, as AdamW's own does."""
    one = build(config_of(stage, precision))
    train(one, 0, 1)
    saver = Saver(one, tmp_path, tokenizer_hash="")
    held = []
    monkeypatch.setattr(Saver, "_before_update", lambda self, *_: held.append(one.partition.updates))
    saver.close()
    saver = Saver(one, tmp_path, tokenizer_hash="")
    train(one, 1, 3)
    saver.close()
    assert held == [1, 2]


@CPU_ONLY
@pytest.mark.parametrize(("stage", "precision"), [kind for kind in KINDS if kind[0] < 3])
def test_one_rank_averages_nothing_and_loops_over_nothing(
    build: Build, monkeypatch: pytest.MonkeyPatch, stage: int, precision: Precision
) -> None:
    """DeepSpeed would copy the sums for a collective of one, and look at every parameter for a gradient to empty."""
    one, plain = build(config_of(stage, precision)), build(config_of(stage, precision))
    vars(plain.deepspeed).pop("buffered_allreduce_fallback", None)  # ours, at stages 0 and 1
    expected = train(plain, 0, 3)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(one.deepspeed, "allreduce_bucket", fail)
    update = one.update

    def watched(*args: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(one.module, "named_parameters", fail)
            patch.setattr(one.module, "parameters", fail)
            update(*args)
        assert all(parameter.grad is None for parameter in one.module.parameters())

    one.update = watched  # type: ignore[method-assign]
    assert train(one, 0, 3) == expected
    assert equal(state_of(one), state_of(plain))


GPU_RUN = """
import json, sys, torch
from configs.schema import Device, Precision, Toggle
from tests.training.conftest import equal, make_batch, make_engine, run_config, state_of
from tests.training.test_late_results import spoil
from training import distributed, rng

stage, wrong = int(sys.argv[1]), (0, 4, 5, 9)
rng.make_deterministic()
own = distributed.init(Device.cuda)

def batch_of(step, config):
    batch = make_batch(step, config)
    for micro in batch.micro_batches:
        micro.tokens, micro.targets = micro.tokens.cuda(), micro.targets.cuda()
    return batch

found, states = [], []
for on_device in (True, False):
    config = run_config(stage, accumulation=2, micro=2, compile=Toggle.off)
    config.engine.precision, config.optim.fused_step, config.optim.grad_clip = Precision.bf16, Toggle.on, 1.5
    one = make_engine(config, own)
    assert one.decides_on_device
    one.decides_on_device = on_device
    spoil(one, wrong)
    batches = [batch_of(step, config) for step in range(10)]
    steps = [one.train_step(batch, 1e-2) for batch in batches]
    found.append([repr(step.result()) for step in steps])
    states.append(state_of(one))
    counts = [one.partition.updates, one.skipped]
    if on_device:
        torch.use_deterministic_algorithms(False)
        torch.cuda.set_sync_debug_mode("error")  # it lets events be waited for
        for batch in batches[:3]:
            one.train_step(batch, 1e-2)
        torch.cuda.set_sync_debug_mode("default")
        one.settle()
        plain = one.forward
        def slowly(micro):
            torch.cuda._sleep(400_000_000)
            return plain(micro)
        one.forward = slowly
        torch.cuda.synchronize()
        first = one.train_step(batches[0], 1e-2)
        early = [first.is_here]
        second = one.train_step(batches[1], 1e-2)
        early += [first.known, second.is_here]
        torch.cuda.synchronize()
        late = second.is_here  # and the host was back long before the device
        torch.use_deterministic_algorithms(True)
    one.close()
print(json.dumps({"same": found[0] == found[1], "equal": equal(*states), "counts": counts, "early": early,
                  "late": late, "wrong": [text.count("updated=False") for text in found[0]]}))
own.close()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_on_a_gpu(stage: int) -> None:
    """The device's decisions are the host's, bit for bit; nothing on the way waits for the device but the read of the
    step before, and that while this one's work is queued."""
    command = [sys.executable, "-c", GPU_RUN, str(stage)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["same"]
    assert found["equal"]
    assert found["counts"] == [6, 4]
    assert [step for step, wrong in enumerate(found["wrong"]) if wrong] == [0, 4, 5, 9]
    assert found["early"] == [False, True, False]
    assert found["late"]
