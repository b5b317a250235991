"""Residual sums with their norms: the kernels (interpreted on a CPU) against fp64 and against PyTorch's own error."""

from __future__ import annotations

import dataclasses
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from configs.errors import UserError
from configs.schema import ModelConfig, Norm, Toggle
from kernels.compile_check import load_budget
from model import build_model, norm_kernel
from model.norm_kernel import (
    CPU_PROGRAMS,
    BackwardSchedule,
    ForwardSchedule,
    add_norm,
    add_norm_backward,
    backward_candidates,
    backward_schedule,
    forward_candidates,
    forward_schedule,
    programs_of,
    run_backward,
    run_forward,
    tiles_of,
)
from model.residual_norm import ResidualNorm, norms_run_fused
from model.weight_gradient import release_sums
from tests.model.small import LLAMA, batch, small

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = (8, 48, 200)  # below, between and above powers of two
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if DEVICE == "cuda" else ()))
"""Triton's interpreter cuts bf16 off where the GPU rounds to the nearest."""
CASES = [(norm, bias) for norm in Norm for bias in (True, False)]


def make(norm: Norm, bias: bool, width: int, fused: Toggle = Toggle.on) -> ResidualNorm:
    """A norm whose weight and bias are not ones and zeros."""
    config = ModelConfig(norm=norm, bias=bias, width=width, norm_eps=1e-3, fused_norms=fused)
    module = ResidualNorm(config, width).to(DEVICE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def run(module: ResidualNorm, given: list[Tensor], add: bool) -> dict[str, Tensor]:
    """Outputs of the module for x, f and the gradients of its outputs, and the gradients of all inputs."""
    dtype = module.weight.dtype
    x, f, d_total, d_y = (t.to(dtype).detach() for t in given)
    x.requires_grad_()
    f.requires_grad_()
    total, y = module(x, f if add else None)
    torch.autograd.backward((total, y), (d_total, d_y))
    found = {"total": total, "y": y, "d_x": x.grad, "d_weight": module.weight.grad}
    if add:
        found["d_f"] = f.grad
    if module.bias is not None:
        found["d_bias"] = module.bias.grad
    assert all(t is not None and t.dtype is dtype for t in found.values())
    return {name: t.detach().double() for name, t in found.items()}


@pytest.mark.parametrize(("norm", "bias"), CASES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_fp64(norm: Norm, bias: bool, width: int, add: bool, dtype: torch.dtype) -> None:
    """At most one and a half times PyTorch's error in the same dtype, or fp32's rounding; a mean far from zero."""
    torch.manual_seed(width)
    given = [(torch.randn(2, 7, width, device=DEVICE) + 3 * (i < 2)).to(dtype) for i in range(4)]
    module = make(norm, bias, width).to(dtype)
    plain, exact = (make(norm, bias, width, Toggle.off) for _ in range(2))
    for other in (plain, exact):
        other.load_state_dict(module.state_dict())
    ours, theirs = run(module, given, add), run(plain.to(dtype), given, add)
    if add and dtype is not torch.float32:  # the exact norm is that of the rounded sum
        rounded = (given[0] + given[1]).double()
        given = [rounded, torch.zeros_like(rounded), *given[2:]]
    truth = run(exact.double(), given, add)
    for name, value in ours.items():
        error, theirs_error = (value - truth[name]).norm(), (theirs[name] - truth[name]).norm()
        assert error <= 1.5 * theirs_error + 2e-6 * truth[name].norm(), name


@pytest.mark.parametrize("rows", [1, CPU_PROGRAMS, 10])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_operators(rows: int, stream: bool, shift: bool) -> None:
    """Declarations hold for any number of rows, and each row's part reaches the parameters' gradients once."""
    x, f, d_y, d_sum = torch.randn(4, rows, 24, device=DEVICE)
    weight, bias = torch.randn(2, 24, device=DEVICE)
    per_sm = backward_schedule(24, shift).per_sm
    torch.library.opcheck(add_norm, (x, f if stream else None, weight, bias, 1e-5, True))
    total, _, stats = add_norm(x, f, weight, bias, 1e-5, True)
    arguments = (d_y, d_sum if stream else None, total, weight, stats, True, shift)
    torch.library.opcheck(add_norm_backward, arguments)
    d_x, parts = add_norm_backward(*arguments)
    assert parts.shape == (3 if shift else 2, programs_of(rows, per_sm, x.device), 24)
    leaf = total.double().requires_grad_()
    w, b = weight.double().requires_grad_(), bias.double().requires_grad_()
    F.layer_norm(leaf, (24,), w, b).backward(d_y.double())
    assert leaf.grad is not None
    d_s = leaf.grad + (d_sum if stream else 0.0)
    torch.testing.assert_close(d_x.double(), d_s, rtol=1e-4, atol=1e-5)
    for part, gradient in zip(parts, (w.grad, b.grad, d_s.sum(0))[: len(parts)], strict=True):
        torch.testing.assert_close(part.double().sum(0), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [24, 44, 64], ids=["two-tiles", "two-tiles-not-full", "one-tile"])
@pytest.mark.parametrize("rows", [1, CPU_PROGRAMS + 1, 11])
@pytest.mark.parametrize(
    ("mean", "bias", "add", "shift"),
    [(True, True, True, True), (True, True, True, False), (True, False, False, False), (False, False, True, True)],
)
def test_schedules(width: int, rows: int, mean: bool, bias: bool, add: bool, shift: bool) -> None:
    """Every candidate against fp64, with a mean far from zero; sums are those of the schedule's programs."""
    torch.manual_seed(rows)
    x, f, d_y, d_sum = torch.randn(4, rows, width, device=DEVICE) + torch.tensor([3.0, 0, 0, 0])[:, None, None].to(
        DEVICE
    )
    weight, shift_y = torch.randn(2, width, device=DEVICE)
    given = (x, f if add else None, weight, shift_y if bias else None, 1e-3, mean)
    leaf = (x + f if add else x).double().requires_grad_()
    w, b = weight.double().requires_grad_(), shift_y.double().requires_grad_()
    centred = leaf - leaf.mean(1, keepdim=True) if mean else leaf
    r = (centred.square().mean(1, keepdim=True) + 1e-3).rsqrt()
    exact = centred * r * w + (b if bias else 0.0)
    exact.backward(d_y.double())
    assert leaf.grad is not None
    for name, forward in forward_candidates(width).items():
        total, y, stats = run_forward(*given, forward)
        torch.testing.assert_close(total if add else x, x + f if add else x, rtol=0, atol=0)
        torch.testing.assert_close(y.double(), exact.detach(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(stats[0].double(), r.detach().flatten(), rtol=1e-5, atol=0)
    for name, backward in backward_candidates(width).items():
        d_stream = d_sum if add else None
        d_x, parts = run_backward(d_y, d_stream, leaf.detach().float(), weight, stats, bias, shift, backward)
        expected = leaf.grad + (d_sum if add else 0.0)
        torch.testing.assert_close(d_x.double(), expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        gradients = [w.grad] + bias * [b.grad] + shift * [expected.sum(0)]
        assert parts.shape == (len(gradients), programs_of(rows, backward.per_sm, x.device), width)
        for part, gradient in zip(parts, gradients, strict=True):
            assert gradient is not None
            torch.testing.assert_close(part.double().sum(0), gradient, rtol=1e-4, atol=1e-5)


def test_candidates() -> None:
    """What is shipped for a width is among them, `plain` where nothing else is; no two are the same."""
    assert 4096 not in norm_kernel.FORWARD.keys() | norm_kernel.BACKWARD.keys()
    assert forward_schedule(4096) == forward_candidates(4096)["plain"]
    assert backward_schedule(4096, False) == backward_candidates(4096)["plain"]
    for width in {4096, *norm_kernel.FORWARD, *norm_kernel.BACKWARD}:
        forward, backward = forward_candidates(width), backward_candidates(width)
        assert forward_schedule(width) in forward.values()
        assert backward_schedule(width, False) in backward.values()
        assert len(set(forward.values())) == len(forward)
        assert len(set(backward.values())) == len(backward)
        for schedule in (*forward.values(), *backward.values()):
            assert 32 * schedule.warps * schedule.per_sm <= 2048  # threads of an SM
            assert not schedule.split or tiles_of(width, True)[1]


def test_programs_of_candidates_run_at_once() -> None:
    """Registers, by the compiler's budget, and shared memory allow `per_sm` programs on an SM of a Hopper GPU."""
    budget = load_budget()
    for width in (768, 2048, 2560):
        for direction, candidates in (("forward", forward_candidates), ("backward", backward_candidates)):
            for name, schedule in candidates(width).items():
                entry = budget[f"norm.{direction}[{width},{name}] sm_90"]
                registers = -(-entry.registers // 8) * 8  # given out in eights
                assert 32 * schedule.warps * schedule.per_sm * registers <= norm_kernel.REGISTERS_PER_SM, name
                assert schedule.per_sm * (entry.shared_bytes + 1024) <= 228 * 1024, name
                assert entry.spill_bytes == 0, name
    for width in norm_kernel.SHIFT_WIDTHS:
        schedule, entry = backward_schedule(width, True), budget[f"norm.backward[{width},shift] sm_90"]
        threads, registers = 32 * schedule.warps * schedule.per_sm, -(-entry.registers // 8) * 8
        assert threads * registers <= norm_kernel.REGISTERS_PER_SM, width
        assert schedule.per_sm * (entry.shared_bytes + 1024) <= 228 * 1024, width
        assert entry.spill_bytes == 0, width


def test_tiles() -> None:
    assert tiles_of(2560, True) == (2048, 512)
    assert tiles_of(2560, False) == (4096, 0)
    assert tiles_of(1600, True) == (1024, 1024)
    assert tiles_of(4096, True) == (4096, 0)


def test_schedules_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="per_sm must be set"):
        ForwardSchedule(8, stages=3)
    with pytest.raises(ValueError, match="per_sm must be set"):
        BackwardSchedule(8)


def test_schedule_by_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators run by the tables, and their declarations follow."""
    split = BackwardSchedule(1, True, 1, stages=3, joint=True, early=True)
    monkeypatch.setitem(norm_kernel.BACKWARD, 24, split)
    monkeypatch.setitem(norm_kernel.FORWARD, 24, ForwardSchedule(1, True, 1, stages=3, early=True))
    test_operators(10, True, False)
    assert backward_schedule(24, False) is split
    assert backward_schedule(48, False) == backward_schedule(48, True) == BackwardSchedule(1, per_sm=16)
    monkeypatch.setitem(norm_kernel.BACKWARD, 24, dataclasses.replace(split, per_sm=2))
    monkeypatch.setitem(norm_kernel.PER_SM_WITH_SHIFT, 24, 1)
    test_operators(10, True, True)
    assert backward_schedule(24, True) == split
    assert backward_schedule(24, False).per_sm == 2


@pytest.mark.parametrize("options", [{}, LLAMA, {"bias": False}], ids=["gpt2", "llama", "no-bias"])
def test_model(options: dict[str, Any]) -> None:
    """A model with the kernels has the loss and the gradients of one without; so have compiled blocks."""
    config = small(**options, fused=Toggle.off)
    tokens, targets = (t.to(DEVICE) for t in batch(config))
    found = []
    for fused, compiled in ((Toggle.off, False), (Toggle.on, False), (Toggle.on, True)):
        config.fused_norms = fused
        torch.manual_seed(0)
        model = build_model(config).to(DEVICE)
        if compiled:
            torch._dynamo.reset()
            for block in model.blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        loss = model(tokens, targets)[0]
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=0)
        for name, gradient in gradients.items():
            expected = found[0][1][name]
            assert gradient is not None
            assert expected is not None
            assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name


class TokenSums(TorchDispatchMode):
    """Counts sums over all tokens, by their width."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens, self.widths = num_tokens, Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.sum and args[0].ndim == 2 and len(args[0]) == self.num_tokens:
            self.widths[args[0].shape[1]] += 1
        return func(*args, **(kwargs or {}))


def summed(
    config: ModelConfig, fused: Toggle, compiled: bool = False, recompute: bool = False
) -> tuple[dict[str, Tensor], Counter[int]]:
    """Gradients of two micro-batches, added in place, by parameter name; the widths of the sums over tokens."""
    config = dataclasses.replace(config, fused_norms=fused)
    torch.manual_seed(0)
    model = build_model(config).to(DEVICE)
    sums = {parameter: torch.zeros_like(parameter, requires_grad=False) for parameter in model.parameters()}
    model.bind_sums(sums)
    model.set_recompute(recompute)
    for block in model.blocks if compiled else ():
        block.compile(backend="aot_eager", fullgraph=True)
    tokens, targets = (t.to(DEVICE) for t in batch(config, size=4))
    with TokenSums(2 * config.sequence_length) if not compiled else nullcontext() as counted:
        for half in (slice(0, 2), slice(2, 4)):
            torch.manual_seed(half.start)  # dropout's
            model(tokens[half], targets[half])[0].backward()
    for parameter, total in sums.items():  # of what is left to autograd
        total += 0 if parameter.grad is None else parameter.grad
    found = {name: sums[parameter] for name, parameter in model.named_parameters()}
    return found, Counter() if counted is None else counted.widths


@pytest.mark.parametrize(
    "options", [{}, {"norm": Norm.rmsnorm}, {"dropout": 0.2}, LLAMA], ids=["gpt2", "rmsnorm", "dropout", "llama"]
)
def test_biases_are_summed_by_the_norm_that_follows(options: dict[str, Any]) -> None:
    """Each gradient is autograd's; no bias of E columns is summed apart, but where dropout stands between."""
    config = small(**options, num_layers=3)
    expected, apart = summed(config, Toggle.off)
    found, left = summed(config, Toggle.on)
    for name, total in found.items():
        assert (total - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name
    layers = 2 * config.num_layers  # calls of a layer in two micro-batches
    wide = {3 * config.width: layers, 4 * config.width: layers}
    assert apart == ({} if options is LLAMA else {config.width: 2 * layers, **wide})
    assert left == ({} if options is LLAMA else apart if config.dropout else wide)


def test_recomputed_blocks_sum_biases_once() -> None:
    config = small()
    expected, apart = summed(config, Toggle.on)
    found, left = summed(config, Toggle.on, recompute=True)
    assert all(torch.equal(total, expected[name]) for name, total in found.items())
    assert left == apart


def test_summed_biases_in_compiled_blocks() -> None:
    """One graph for all blocks, the first and the last among them, with the sums of eager ones."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = small(num_layers=3)
    expected, _ = summed(config, Toggle.on)
    found, _ = summed(config, Toggle.on, compiled=True)
    for name, total in found.items():
        torch.testing.assert_close(total, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_where_biases_are_summed() -> None:
    """By their layers where the norms don't run as our kernel, and again after another binding; closed, by nobody."""
    model = build_model(small(fused_norms=Toggle.on)).to(DEVICE)
    sums = {parameter: torch.zeros_like(parameter, requires_grad=False) for parameter in model.parameters()}
    first, last = model.blocks

    def summers() -> list[bool]:
        layers = [layer.bias_sum for block in model.blocks for layer in (block.attention.proj, block.mlp.down)]
        norms = [first.mlp_norm, last.attention_norm, last.mlp_norm, model.norm]
        return [total is not None for total in (*layers, *(norm.shift_sum for norm in norms))]

    model.bind_sums(sums)
    assert summers() == 4 * [False] + 4 * [True]
    assert first.mlp_norm.shift_sum.data_ptr() == sums[first.attention.proj.bias].data_ptr()
    assert model.norm.shift_sum.data_ptr() == sums[last.mlp.down.bias].data_ptr()
    release_sums(model)
    assert summers() == 8 * [False]
    model.config.fused_norms = Toggle.off
    model.bind_sums(sums)
    assert summers() == 4 * [True] + 4 * [False]


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert norms_run_fused(Toggle.auto, torch.device("cuda"), 2560)
    assert not norms_run_fused(Toggle.auto, torch.device("cuda"), 20000)
    assert not norms_run_fused(Toggle.auto, cpu, 2560)
    assert not norms_run_fused(Toggle.off, torch.device("cuda"), 2560)
    with pytest.raises(UserError, match=r"model\.fused_norms=on: needs .* use model\.fused_norms=off"):
        norms_run_fused(Toggle.on, cpu, 2560)
    with pytest.raises(UserError, match="width of at most 16384, given cuda and 20000"):
        norms_run_fused(Toggle.on, torch.device("cuda"), 20000)
