"""GELU inside the products: the operators, the MLP of them, and both with sums and under torch.compile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from configs.errors import UserError
from configs.schema import Activation, ModelConfig, Toggle
from model import build_model, checks, cublaslt
from model.dimensions import resolve_dimensions
from model.gelu_products import linear_gelu, linear_gelu_backward, runs_fused
from model.layers import MLP
from model.weight_gradient import bind_sums
from tests.model.small import LLAMA, batch, small

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def mlp(fused: Toggle, dtype: torch.dtype = torch.float32) -> MLP:
    """Of width 32 and 128, with weights and biases that matter, the same at each call."""
    config = small(fused_gelu=fused)
    torch.manual_seed(0)
    module = MLP(config, resolve_dimensions(config)).to(DEVICE)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.5 if "bias" in name else 0.2)
    return module.to(dtype)


def run(module: MLP, x: Tensor, d_out: Tensor) -> dict[str, Tensor]:
    """Output and gradients, fp64."""
    dtype = module.up.weight.dtype
    leaf = x.detach().to(dtype, copy=True).requires_grad_()
    out = module(leaf)
    out.backward(d_out.to(dtype))
    assert leaf.grad is not None
    found = {"out": out.detach(), "x": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}
    assert all(t is not None and t.dtype is dtype for t in found.values())
    return {name: t.double() for name, t in found.items() if t is not None}


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_fp64(dtype: torch.dtype) -> None:
    """At most PyTorch's error in the same dtype, and a little: there is one rounding less each way."""
    x, d_out = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    exact_module = mlp(Toggle.off, dtype).double()
    truth, theirs = run(exact_module, x, d_out), run(mlp(Toggle.off, dtype), x, d_out)
    for name, value in run(mlp(Toggle.on, dtype), x, d_out).items():
        error, theirs_error = (value - truth[name]).norm(), (theirs[name] - truth[name]).norm()
        assert error <= 1.1 * theirs_error + 1e-6 * truth[name].norm(), name


def assert_rounded(got: Tensor, exact: Tensor) -> None:
    """In half precision no error but the result's rounding, half a unit at most; in fp32 that of its sums too."""
    units = 4 if got.dtype is torch.float32 else 0.5
    assert (got - exact).norm() <= units * torch.finfo(got.dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(24, 32), torch.randn(128, 32), torch.randn(128)
    x, weight, bias = (t.to(DEVICE, dtype) for t in (x, weight, bias))
    torch.library.opcheck(linear_gelu, (x, weight, bias))
    out, argument = linear_gelu(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_rounded(argument, exact)
    assert_rounded(out, F.gelu(exact, approximate="tanh"))

    down, d_out = torch.randn(32, 128).to(DEVICE, dtype), torch.randn(24, 32).to(DEVICE, dtype)
    torch.library.opcheck(linear_gelu_backward, (d_out, down, argument))
    d_argument = linear_gelu_backward(d_out, down, argument)
    leaf = argument.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(leaf, approximate="tanh"), leaf, d_out.double() @ down.double())
    assert_rounded(d_argument, expected)


def test_sums_get_the_gradients() -> None:
    """Twice the gradient after two backward passes, and nothing for autograd."""
    x, d_out = torch.randn(2, 3, 24, 32).to(DEVICE)
    expected = run(mlp(Toggle.on), x, d_out)
    module = mlp(Toggle.on)
    sums = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in module.parameters()}
    bind_sums(module, sums)
    for _ in range(2):
        module(x.requires_grad_()).backward(d_out)
    for name, parameter in module.named_parameters():
        assert parameter.grad is None
        torch.testing.assert_close(sums[parameter].double(), 2 * expected[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bound", [False, True])
def test_model_and_its_compilation(bound: bool) -> None:
    """A model with fused products has the loss and gradients of one without, and its blocks share one graph."""
    config = small(fused=Toggle.off)
    tokens, targets = (t.to(DEVICE) for t in batch(config))
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for fused, compiled in ((Toggle.off, False), (Toggle.on, False), (Toggle.on, True)):
        config.fused_gelu = fused
        torch.manual_seed(0)
        model = build_model(config).to(DEVICE)
        sums = {p: torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()}
        if bound:
            bind_sums(model, sums)
        counter = CompileCounterWithBackend("aot_eager")
        if compiled:
            torch._dynamo.reset()
            for block in model.blocks:
                block.compile(backend=counter, fullgraph=True)
        loss = model(tokens, targets)[0]
        loss.backward()
        assert counter.frame_count == compiled
        gradients = {n: sums[p] if p.grad is None else p.grad + sums[p] for n, p in model.named_parameters()}
        found.append((loss.detach(), gradients))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=0)
        for name, gradient in gradients.items():
            expected = found[0][1][name]
            assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name


@pytest.mark.parametrize("options", [LLAMA, {"activation": Activation.gelu}, {"bias": False}])
def test_what_it_needs(options: dict[str, Any]) -> None:
    config: ModelConfig = small(**options, fused_gelu=Toggle.on)
    assert any("model.fused_gelu=on needs" in problem for problem in checks.check(config))
    config.fused_gelu = Toggle.auto
    assert not checks.check(config)
    assert MLP(config, resolve_dimensions(config)).fused is Toggle.off


def test_on_says_why_it_cannot_be_and_auto_goes_without() -> None:
    x: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    wide: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    assert runs_fused(Toggle.on, None, x)
    assert runs_fused(Toggle.auto, None, x)
    for reason, given, said in (("too old", x, "too old"), (None, wide, "float32")):
        assert not runs_fused(Toggle.auto, reason, given)
        with pytest.raises(UserError, match=said):
            runs_fused(Toggle.on, reason, given)


def test_algorithm_is_the_measured_one_or_the_first_that_does_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates in the order of the heuristic on an H200: (id, tile, splits, reduction, cluster)."""
    monkeypatch.setattr(cublaslt, "config", lambda numbers, key: numbers[(0, 1, 2, 3, 8).index(key)])
    split, other, fastest = (39, 20, -1, 2, 14), (39, 20, 1, 0, 11), (39, 20, 1, 0, 9)
    for found, expected in (([split, other, fastest], fastest), ([split, other], other), ([split], split)):
        candidates: Any = found
        assert cublaslt.preferred(cublaslt.Epilogue.dgelu, candidates) == expected
