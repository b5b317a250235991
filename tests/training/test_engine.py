"""The training step against plain PyTorch, in one process: every ZeRO stage, precision and failure."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Precision, Recompute, RunConfig, Toggle
from model import GPT, build_model, init
from model.init import normal_
from tests.training.conftest import (
    Build,
    Micro,
    Reference,
    distance,
    equal,
    make_batch,
    masters,
    run_config,
    state_of,
    train,
)
from training import backend, engine
from training.batch import resolve_batch
from training.distributed import Processes
from training.engine import Engine, build_engine
from training.optimizer import LossScale
from training.step import clip_factor

STAGES = (0, 1, 2, 3)
OFFLOADED: list[tuple[int, dict[str, bool]]] = [
    (1, {"offload_optimizer": True}),
    (2, {"offload_optimizer": True}),
    (3, {"offload_optimizer": True}),
    (3, {"offload_optimizer": True, "offload_params": True}),
]
ALL_LAYOUTS: list[tuple[int, dict[str, bool]]] = [(stage, {}) for stage in STAGES] + OFFLOADED


def parameters(one: Reference) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in one.model.named_parameters()}


@pytest.mark.parametrize(("stage", "offload"), ALL_LAYOUTS)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_steps_equal_plain_pytorch(build: Build, stage: int, offload: dict[str, bool], accumulation: int) -> None:
    config = run_config(stage, accumulation=accumulation, micro=8 // accumulation, **offload)
    one = build(config)
    whole, pieces = Reference(config), Reference(config)
    for step in range(4):
        result = train(one, step, step + 1)[0]
        loss, norm = whole.step(step, config.optim.lr)
        pieces.step(step, config.optim.lr, pieces=4)
        assert result.loss == pytest.approx(loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(norm, rel=1e-6)
        assert result.finite
        assert result.updated
    # PyTorch's own difference between a batch whole and in four pieces is the yardstick of rounding here.
    rounding = distance(parameters(whole), parameters(pieces))
    assert 0 < rounding < 1e-4
    assert distance(masters(one), parameters(whole)) <= 4 * rounding


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_equal_plain_pytorch(build: Build, stage: int) -> None:
    config = run_config(stage, accumulation=4, micro=2)
    config.optim.grad_clip = 0.0
    one, reference = build(config), Reference(config)
    train(one, 0, 1)
    reference.step(0, config.optim.lr)
    state = state_of(one)
    for name, parameter in reference.model.named_parameters():
        assert parameter.grad is not None
        gradient = state[f"exp_avg.{name}"] / (1 - config.optim.beta1)  # the first moment after one step
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)


class MixedReference:
    """bf16 training with fp32 masters by hand: bf16 passes, gradients summed in fp32, AdamW on the masters."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.fp32 = Reference(config)  # its optimizer and groups
        self.low = Reference(config).model.to(torch.bfloat16)
        with torch.no_grad():  # masters start from the rounded weights
            for master, low in zip(self.fp32.model.parameters(), self.low.parameters(), strict=True):
                master.copy_(low)

    def step(self, step: int) -> float:
        batch = make_batch(step, self.config)
        sums = [torch.zeros_like(p) for p in self.fp32.model.parameters()]
        total = 0.0
        for micro in batch.micro_batches:
            self.low.zero_grad()
            loss = self.low(micro.tokens, micro.targets).sum() / batch.valid_tokens
            loss.backward()
            total += loss.item()
            for acc, low in zip(sums, self.low.parameters(), strict=True):
                assert low.grad is not None
                acc.add_(low.grad)
        for master, acc in zip(self.fp32.model.parameters(), sums, strict=True):
            master.grad = acc
        torch.nn.utils.clip_grad_norm_(self.fp32.model.parameters(), self.config.optim.grad_clip)
        self.fp32.adamw.step()
        with torch.no_grad():
            for master, low in zip(self.fp32.model.parameters(), self.low.parameters(), strict=True):
                low.copy_(master)
        return total


@pytest.mark.parametrize(("stage", "offload"), ALL_LAYOUTS)
def test_bf16_has_fp32_masters_and_sums(build: Build, stage: int, offload: dict[str, bool]) -> None:
    config = run_config(stage, accumulation=4, micro=2, fuse_weight_gradients=Toggle.off, **offload)
    config.engine.precision = Precision.bf16
    one, reference = build(config), MixedReference(config)
    loss = reference.step(0)
    # The same bf16 products on both sides: what remains is fp32 rounding of the clipping and of AdamW.
    assert train(one, 0, 1)[0].loss == pytest.approx(loss, rel=1e-6)
    for name, master in reference.fp32.model.named_parameters():
        torch.testing.assert_close(masters(one)[name], master.detach(), rtol=1e-6, atol=1e-7)
    # From here on a last bit of a master can flip a bf16 weight, so only the course of the loss is compared.
    for step in range(1, 4):
        assert train(one, step, step + 1)[0].loss == pytest.approx(reference.step(step), rel=2e-3)


def test_bf16_sums_lose_what_fp32_sums_keep(build: Build) -> None:
    """Without fp32 accumulation the gradient is measurably off, so the test above can see the difference."""
    config = run_config(1, accumulation=8, micro=1)
    config.engine.precision = Precision.bf16
    exact = train(build(config), 0, 1)[0].grad_norm
    config.engine.fp32_accumulation = False
    rough = train(build(config), 0, 1)[0].grad_norm
    assert 1e-6 < abs(rough / exact - 1) < 1e-2


@pytest.mark.parametrize(("stage", "precision"), list(itertools.product(STAGES, ["fp32", "bf16"])))
def test_no_phantom_step(build: Build, stage: int, precision: str) -> None:
    """A fresh engine has made no update: moments are zero, masters the initial weights, the step count zero."""
    config = run_config(stage)
    config.engine.precision = Precision(precision)
    one = build(config)
    initial = Reference(config).model.to(backend.DTYPES[Precision(precision)])
    state = state_of(one)
    assert one.partition.updates == 0
    for name, parameter in initial.named_parameters():
        assert torch.equal(state[f"master.{name}"], parameter.detach().float())
        assert not state[f"exp_avg.{name}"].any()
        assert not state[f"exp_avg_sq.{name}"].any()
    train(one, 0, 1)
    assert one.partition.updates == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_0_equals_stage_1(build: Build, precision: str) -> None:
    engines = []
    for stage in (0, 1):
        config = run_config(stage, accumulation=2, micro=2)
        config.engine.precision = Precision(precision)
        engines.append(build(config))
    for step in range(3):
        left, right = (train(one, step, step + 1)[0] for one in engines)
        assert left.loss == pytest.approx(right.loss, rel=1e-6)
    assert distance(*(masters(one) for one in engines)) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_only_matrices_decay(build: Build, stage: int) -> None:
    config = run_config(stage)
    config.optim.eps = 1e12  # the gradient's share of the update vanishes
    one = build(config)
    before = masters(one)
    train(one, 0, 1)
    shrink = 1 - config.optim.lr * config.optim.weight_decay
    decaying = 0
    for name, after in masters(one).items():
        decays = before[name].ndim == 2
        decaying += decays
        torch.testing.assert_close(after, before[name] * (shrink if decays else 1.0), rtol=1e-6, atol=1e-12)
    assert 0 < decaying < len(before)


@pytest.mark.parametrize("stage", STAGES)
def test_learning_rate_is_the_one_given(build: Build, stage: int) -> None:
    config = run_config(stage)
    config.optim.weight_decay = 0.0
    one = build(config)
    before = masters(one)
    one.train_step(make_batch(0, config), 0.0)  # type: ignore[arg-type]
    assert equal(masters(one), before)
    moves = []
    for lr in (1e-3, 2e-3):
        one = build(config)
        one.train_step(make_batch(0, config), lr)  # type: ignore[arg-type]
        moves.append({name: after - before[name] for name, after in masters(one).items()})
    # A norm's weight, about 1, is rounded to a multiple of 2^-23: 2^-24 off after each move, of which one is doubled.
    for name, move in moves[0].items():
        torch.testing.assert_close(2 * move, moves[1][name], rtol=1e-3, atol=3 * 2**-24)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_clipping(build: Build, stage: int, precision: str) -> None:
    config = run_config(stage)
    config.engine.precision = Precision(precision)
    config.optim.grad_clip = 0.1
    one = build(config)
    result = train(one, 0, 1)[0]
    moments = [t for name, t in state_of(one).items() if name.startswith("exp_avg.")]
    norm = math.sqrt(sum(t.double().square().sum().item() for t in moments)) / (1 - config.optim.beta1)
    assert result.grad_norm > 1.0  # before clipping
    assert norm == pytest.approx(0.1, rel=1e-4)


def test_clip_factor() -> None:
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(100.0, 0.0) == 1.0


class InfiniteBackward(torch.autograd.Function):
    """Identity whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * torch.inf


def spoil(one: Engine, monkeypatch: pytest.MonkeyPatch, fault: str, at: int) -> None:
    """Make micro-batch number `at` of each step have a NaN loss or an infinite gradient."""
    plain = one.forward
    calls = itertools.count()

    def forward(micro: Micro) -> Tensor:
        sums = plain(micro)  # type: ignore[arg-type]
        if next(calls) % one.config.train.accumulation_steps != at:  # type: ignore[operator]
            return sums
        spoiled: Tensor = sums * torch.nan if fault == "loss" else InfiniteBackward.apply(sums)  # type: ignore[no-untyped-call]
        return spoiled

    monkeypatch.setattr(one, "forward", forward)


@pytest.mark.parametrize(("stage", "offload"), ALL_LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nonfinite_step_leaves_no_trace(
    build: Build, monkeypatch: pytest.MonkeyPatch, stage: int, offload: dict[str, bool], precision: str
) -> None:
    """Weights, moments and step count stay, and later steps are those of a run that never saw the bad batches."""
    config = run_config(stage, accumulation=2, micro=2, **offload)
    config.engine.precision = Precision(precision)
    one, clean = build(config), build(config)
    for each in (one, clean):
        train(each, 0, 2)
    for number, (fault, at) in enumerate(itertools.product(("loss", "gradient"), (0, 1))):
        before = state_of(one)
        with monkeypatch.context() as patch:
            spoil(one, patch, fault, at)
            for step in (7, 8):
                result = train(one, step, step + 1)[0]
                assert not result.finite
                assert not result.updated
                assert math.isfinite(result.loss) == (fault == "gradient")
                assert not math.isfinite(result.grad_norm)
        assert one.skipped == 2 * number + 2
        assert equal(state_of(one), before)
        assert train(one, number + 2, number + 3) == train(clean, number + 2, number + 3)
    assert one.partition.updates == 6
    assert equal(state_of(one), state_of(clean))


@pytest.fixture
def fp16_cpu(monkeypatch: pytest.MonkeyPatch, processes: Processes) -> None:
    """Let DeepSpeed run fp16 on this CPU: PyTorch can, slowly."""
    accelerator = pytest.importorskip("deepspeed.accelerator").get_accelerator()
    monkeypatch.setattr(type(accelerator), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(engine, "check_engine", lambda *_: None)


@pytest.mark.usefixtures("fp16_cpu")
@pytest.mark.parametrize(("stage", "offload"), ALL_LAYOUTS)
def test_fp16_scales_its_loss(build: Build, stage: int, offload: dict[str, bool]) -> None:
    config = run_config(stage, accumulation=2, micro=2, **offload)
    exact = train(build(config), 0, 3)
    config.engine.precision = Precision.fp16
    one = build(config)
    assert one.loss_scale.scale == 2.0**16
    for left, right in zip(train(one, 0, 3), exact, strict=True):
        assert left.loss == pytest.approx(right.loss, rel=1e-3)
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-2)


@pytest.mark.usefixtures("fp16_cpu")
@pytest.mark.parametrize("stage", STAGES)
def test_fp16_overflow_halves_the_scale(build: Build, stage: int) -> None:
    config = run_config(stage, accumulation=2, micro=2)
    config.engine.precision = Precision.fp16
    one = build(config)
    one.loss_scale.scale = 2.0**24
    before = state_of(one)
    result = train(one, 0, 1)[0]
    assert result.finite  # no failure of the run
    assert not result.updated
    assert one.loss_scale.scale == 2.0**23
    assert one.skipped == 0
    assert equal(state_of(one), before)
    one.loss_scale.scale = 2.0**12
    assert train(one, 0, 1)[0].updated


def test_loss_scale_grows_when_calm() -> None:
    scale = LossScale(4.0, dynamic=True, window=3)
    for _ in range(3):
        scale.succeeded()
    assert scale.scale == 8.0
    assert scale.overflowed()
    assert (scale.scale, scale.calm_steps) == (4.0, 0)
    fixed = LossScale(4.0)
    assert not fixed.overflowed()
    assert not LossScale(1.0, dynamic=True).overflowed()  # no smaller scale to try


@pytest.mark.parametrize("stage", STAGES)
def test_recomputing_blocks_changes_nothing(build: Build, stage: int) -> None:
    config = run_config(stage, accumulation=2, micro=2)
    config.model.dropout = 0.1
    runs = []
    for recompute in Recompute:
        config.engine.recompute = recompute
        one = build(config)
        torch.manual_seed(5)
        runs.append((train(one, 0, 2), state_of(one)))
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation(build: Build, stage: int) -> None:
    config = run_config(stage, accumulation=2, micro=4)
    config.model.dropout, config.model.z_loss = 0.5, 0.1
    one, reference = build(config), Reference(config)
    batch = make_batch(3, config)
    reference.model.eval()
    with torch.no_grad():
        expected = sum(reference.model(m.tokens, m.targets)[0].item() for m in batch.micro_batches)
    loss, tokens = one.evaluate(batch.micro_batches)  # type: ignore[arg-type]
    assert loss == pytest.approx(expected, rel=1e-6)
    assert tokens == batch.valid_tokens
    assert one.module.training
    before = state_of(one)
    assert train(one, 0, 1)[0].updated  # training goes on after it
    assert not equal(state_of(one), before)


def test_z_loss_is_reported_apart_and_trained_on(build: Build) -> None:
    config = run_config(1)
    plain = train(build(config), 0, 1)[0]
    config.model.z_loss = 0.1
    one, reference = build(config), Reference(config)
    result = train(one, 0, 1)[0]
    total, norm = reference.step(0, config.optim.lr)
    assert plain.z_loss == 0
    assert result.z_loss > 0
    assert result.loss == pytest.approx(plain.loss, rel=1e-6)
    assert result.loss + result.z_loss == pytest.approx(total, rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("precision", "offload"), [("fp32", {}), ("bf16", {}), ("bf16", OFFLOADED[3][1])])
def test_weights_sharded_while_drawn_are_those_of_a_whole_model(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, precision: str, offload: dict[str, bool], tied: bool
) -> None:
    """Bit for bit, and so is what is trained from them; at no time is more than a module's weights whole."""
    config = run_config(3, **offload)
    config.engine.precision, config.model.tied_embeddings = Precision(precision), tied
    monkeypatch.setattr(backend, "gathering", lambda _: {"stage3_param_persistence_threshold": 0})
    plan = resolve_batch(config.train, 1)
    whole: list[int] = []
    plain = GPT.materialise

    def materialise(
        model: GPT, device: str, each: Callable[[nn.Module], None], dtype: torch.dtype, *, draw: bool
    ) -> GPT:
        def counted(module: nn.Module) -> None:
            whole.append(sum(p.numel() for p in model.parameters() if not p.is_meta))
            each(module)

        return plain(model, device, counted, dtype, draw=draw)

    monkeypatch.setattr(GPT, "materialise", materialise)
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(config.seed)
        with torch.device(device):
            model = build_model(config.model)
        one = build_engine(model, config, plan, processes)
        initial = state_of(one)
        found.append((initial, train(one, 0, 2), state_of(one), torch.get_rng_state()))
        one.close()
    (initial, steps, trained, generator), (initial_parts, steps_parts, trained_parts, generator_parts) = found
    assert equal(initial, initial_parts)
    assert steps == steps_parts
    assert equal(trained, trained_parts)
    assert torch.equal(generator, generator_parts)
    assert max(whole) == 4 * 64 * 64 + 4 * 64  # the weight and bias of an MLP's first matrix


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_drawn_with_the_share_of_cpus(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str
) -> None:
    """At every stage, in the run's precision, with the values of a model built whole; PyTorch's threads are as before
    afterwards."""
    config = run_config(stage)
    config.engine.precision = Precision(precision)
    plan = resolve_batch(config.train, 1)
    torch.manual_seed(config.seed)
    one = build_engine(build_model(config.model), config, plan, processes)
    expected = state_of(one)
    one.close()
    seen: set[tuple[int, torch.dtype]] = set()

    def draw(weight: torch.Tensor, std: float) -> None:
        if not weight.is_meta:
            seen.add((torch.get_num_threads(), weight.dtype))
        normal_(weight, std)

    monkeypatch.setattr(init, "normal_", draw)
    monkeypatch.setattr(type(processes), "cpu_share", lambda _: 3)
    before = torch.get_num_threads()
    with torch.device("meta"):
        model = build_model(config.model)
    torch.manual_seed(config.seed)
    one = build_engine(model, config, plan, processes)
    assert seen == {(3, backend.DTYPES[config.engine.precision])}
    assert torch.get_num_threads() == before
    assert equal(state_of(one), expected)
    one.close()


def test_compile(build: Build) -> None:
    """Compiled per block where asked for, lazily; nothing is compiled by default on a CPU."""
    for stage in STAGES:
        for toggle, compiled in [(Toggle.on, True), (Toggle.auto, False), (Toggle.off, False)]:
            one = build(run_config(stage, compile=toggle))
            assert all(("forward" in vars(block)) == compiled for block in one.module.blocks)
            assert backend.should_compile(one.config.engine, torch.device("cuda")) == (toggle is not Toggle.off)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stage": 4}, r"engine\.zero_stage=4: possible are 0, 1, 2 and 3"),
        (
            {"stage": 0, "offload_optimizer": True},
            r"engine\.offload_optimizer=true: needs engine\.zero_stage=1, 2 or 3",
        ),
        ({"stage": 2, "offload_params": True}, r"engine\.offload_params=true: needs engine\.zero_stage=3, given 2"),
    ],
)
def test_impossible_engines(build: Build, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(run_config(**keys))


def test_timeout_holds_for_gradients(build: Build, processes: Processes) -> None:
    """`engine.timeout_minutes` reaches the group that DeepSpeed reduces gradients over, which is its own."""
    group = build(run_config(1)).deepspeed.seq_data_parallel_group
    assert group is not torch.distributed.group.WORLD
    assert group._get_backend(torch.device("cpu")).options._timeout == processes.timeout


def test_deepspeed_prints_nothing() -> None:
    """Not while it is imported, set up, or stepping: what it has to say goes to `logging`."""
    script = (
        "from tests.training.conftest import *\n"
        "own = distributed.init(Device.cpu)\n"
        "for stage in (0, 1, 2, 3):\n"
        "    one = make_engine(run_config(stage), own)\n"
        "    train(one, 0, 2)\n"
        "own.close()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
