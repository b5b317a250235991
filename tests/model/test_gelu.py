"""GPT-2's GELU as a sigmoid: the same function as PyTorch's, and what compiled code takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

from model.layers import _SigmoidGELU, gelu_tanh


def both(x: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Value and slope at x, of ours and of PyTorch's, in fp64."""
    found = []
    for function in (_SigmoidGELU.apply, lambda t: F.gelu(t, approximate="tanh")):
        leaf = x.detach().clone().to(dtype).requires_grad_()
        out = function(leaf)
        out.backward(torch.ones_like(out))
        assert leaf.grad is not None
        assert out.dtype is leaf.grad.dtype is dtype
        found.append([out.detach().double(), leaf.grad.double()])
    return found[0], found[1]


def test_is_the_same_function() -> None:
    ours, theirs = both(torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.float64)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    leaf = torch.linspace(-6, 6, 41, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_SigmoidGELU.apply, (leaf,))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 2.5), (torch.bfloat16, 1.01), (torch.float16, 1.01)])
def test_rounds_no_worse(dtype: torch.dtype, factor: float) -> None:
    """In half precision the result's own rounding is all that counts; in fp32 it is a few roundings more."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64).to(dtype)
    exact, _ = both(x.double(), torch.float64)
    ours, theirs = both(x, dtype)
    for value, other, truth in zip(ours, theirs, exact, strict=True):
        assert (value - truth).norm() <= factor * (other - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_has_its_gradient(dtype: torch.dtype) -> None:
    """Torch 2.11 made zeros of it in fp32, where the last cast is to the dtype that the value has."""
    x = torch.randn(8, 16, dtype=dtype, requires_grad=True)
    torch._dynamo.reset()
    out = torch.compile(gelu_tanh, backend="aot_eager", fullgraph=True)(x)
    (found,), (expected,) = (torch.autograd.grad(y.sum(), x) for y in (out, gelu_tanh(x)))
    torch.testing.assert_close(found, expected)


def test_compiled_code_takes_it_and_keeps_its_input_only() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    x = torch.randn(8, 16, requires_grad=True)
    torch._dynamo.reset()
    out = torch.compile(gelu_tanh, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(x)
    torch.testing.assert_close(out, F.gelu(x, approximate="tanh"))
    nodes = list(graphs[0].graph.nodes)
    assert torch.ops.aten.sigmoid.default in [node.target for node in nodes]
    kept = nodes[-1].args[0][1:]  # beside the value
    assert [node.op for node in kept] == ["placeholder"]
    assert torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))  # eager code has PyTorch's own
