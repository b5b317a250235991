"""Weight gradients summed where the optimizer keeps them, inside the product that makes them.

Over the micro-batches of a step, a linear layer Y = X·Wᵀ + b needs ΣdYᵀ·X in fp32. Left to autograd, each micro-batch's
product is written in the weights' dtype, widened, and added to the optimizer's buffer: with bf16 weights 2 bytes a
weight to write it, 6 to widen it, 12 to add it. A matrix product can add to what its output holds, which here is the
buffer itself: 8 bytes, inside the product and hidden behind its arithmetic. The terms also skip their rounding to bf16,
so the sum is nearer to the exact one. The bias's gradient goes the same way: its sum over tokens is added in place, or
is left to the norm that follows (`model.residual_norm`).

An embedding's gradient has a row a token. Autograd makes a table of it, zero but for these rows, to be widened and
added whole; here the rows alone are added to the buffer.

`bind_sums` gives each of these layers its part of the buffer (a matrix shared by embedding and head to both). Autograd
then gets no gradient for their weights, so that nothing is left to widen or add.

Where ranks read each other's gradients (`training.direct`), a linear layer gets a place in the weights' dtype instead:
each micro-batch's product is written there, rounded as autograd's, and not added.

The buffers are plain tensors on the modules, neither parameters nor registered buffers: checkpoints and `.to()` don't
see them, and `torch.compile` takes them as inputs of a block's graph, so that equal blocks share one compilation.

T tokens (all leading dims), I in, O out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("flashtrain::add_weight_gradient_", mutates_args=("total",))
def add_weight_gradient_(total: Tensor, d_out: Tensor, x: Tensor) -> None:
    """total (O, I) fp32 += d_out^T (O, T) · x (T, I), in one product with fp32 sums."""
    if x.dtype is total.dtype:
        torch.addmm(total, d_out.t(), x, out=total)
    elif x.device.type == "cuda":
        torch.addmm(total, d_out.t(), x, out_dtype=total.dtype, out=total)
    else:  # PyTorch has no products of two dtypes on a CPU
        torch.addmm(total, d_out.t().to(total.dtype), x.to(total.dtype), out=total)


@add_weight_gradient_.register_fake
def _add_weight_gradient_fake(total: Tensor, d_out: Tensor, x: Tensor) -> None:
    return None


@register_flop_formula(torch.ops.flashtrain.add_weight_gradient_)  # type: ignore[untyped-decorator]
def _add_weight_gradient_flops(total: torch.Size, d_out: torch.Size, x: torch.Size, **_: Any) -> int:
    """2·T·O·I: PyTorch's counter doesn't look into operators."""
    return 2 * d_out.numel() * x[-1]


@torch.library.custom_op("flashtrain::write_weight_gradient_", mutates_args=("place",))
def write_weight_gradient_(place: Tensor, d_out: Tensor, x: Tensor) -> None:
    """place (O, I) <- d_out^T (O, T) · x (T, I), all of one dtype."""
    torch.mm(d_out.t(), x, out=place)


@write_weight_gradient_.register_fake
def _write_weight_gradient_fake(place: Tensor, d_out: Tensor, x: Tensor) -> None:
    return None


@register_flop_formula(torch.ops.flashtrain.write_weight_gradient_)  # type: ignore[untyped-decorator]
def _write_weight_gradient_flops(place: torch.Size, d_out: torch.Size, x: torch.Size, **_: Any) -> int:
    return 2 * d_out.numel() * x[-1]


def add_linear_gradients(weight_sum: Tensor, bias_sum: Tensor | None, d_out: Tensor, x: Tensor) -> None:
    """Add a linear layer's gradients to weight_sum (O, I) and bias_sum (O,), fp32; d_out (T, O), x (T, I). A weight_sum
    in half precision is no sum: the gradient takes the place of what it holds."""
    if weight_sum.dtype is torch.float32:
        torch.ops.flashtrain.add_weight_gradient_(weight_sum, d_out, x)
    else:
        torch.ops.flashtrain.write_weight_gradient_(weight_sum, d_out, x)
    if bias_sum is not None:
        bias_sum.add_(d_out.sum(0, dtype=bias_sum.dtype))


class _SummedLinear(torch.autograd.Function):
    """x (..., I), weight (O, I), bias (O,) to (..., O); the gradients of weight and bias go to `weight_sum` (O, I) and
    `bias_sum` (O,), as `add_linear_gradients` does it, and not to autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, weight_sum: Tensor, bias_sum: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight_sum, ctx.bias_sum = weight_sum, bias_sum
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = d_out.flatten(0, -2)  # (T, O)
        add_linear_gradients(ctx.weight_sum, ctx.bias_sum, rows, x.flatten(0, -2))
        d_x = (rows @ weight).view(x.shape)  # (T, I) to (..., I)
        return d_x, None, None, None, None


def summed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_sum: Tensor, bias_sum: Tensor | None
) -> Tensor:
    """`F.linear` whose backward adds to `weight_sum` (O, I) and `bias_sum` (O,), and gives autograd no gradient of
    `weight` and `bias`. x (..., I) with at least two dims; (..., O)."""
    out: Tensor = _SummedLinear.apply(x, weight, bias, weight_sum, bias_sum)  # type: ignore[no-untyped-call]
    return out


class _SummedEmbedding(torch.autograd.Function):
    """tokens (...) int64, weight (V, E) to (..., E); the weight's gradient goes to `weight_sum` (V, E), fp32.

    On a GPU rows of the same token are added in the order they come, unless PyTorch is to be deterministic.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, weight_sum: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight_sum = weight_sum
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        (tokens,) = ctx.saved_tensors
        rows = d_out.reshape(-1, d_out.shape[-1])  # (T, E)
        ctx.weight_sum.index_add_(0, tokens.flatten(), rows.to(ctx.weight_sum.dtype))
        return None, None, None


def summed_embedding(tokens: Tensor, weight: Tensor, weight_sum: Tensor) -> Tensor:
    """`F.embedding` whose backward adds to `weight_sum` (V, E) and gives autograd no gradient. (...) to (..., E)."""
    out: Tensor = _SummedEmbedding.apply(tokens, weight, weight_sum)  # type: ignore[no-untyped-call]
    return out


class SumsGradients:
    """Mixin of the modules that can: `weight_sum` and `bias_sum` are where, None while autograd does it. With a
    `weight_sum` and no `bias_sum` another module sums the bias's gradient. fp32, but for a linear layer's `weight_sum`
    in the weight's dtype, where each micro-batch's gradient takes the place of the last one's."""

    weight: nn.Parameter
    weight_sum: Tensor | None = None
    bias_sum: Tensor | None = None

    def release_sums(self) -> None:
        self.weight_sum = self.bias_sum = None


def bind_sums(model: nn.Module, sums: Mapping[nn.Parameter, Tensor]) -> None:
    """Let each layer of `model` that can add its gradients to `sums`, tensors of the parameters' shapes: all fp32, or a
    linear layer's weight in its own dtype (`SumsGradients`). Layers whose parameters have none leave it to autograd.

    `.data` gives each part a version counter of its own. The parts are views of one flat buffer, whose common counter
    would tell the backward of one layer that another's addition had spoiled a saved tensor.
    """
    for module in model.modules():
        if isinstance(module, SumsGradients):
            bias = getattr(module, "bias", None)
            weight_sum, bias_sum = sums.get(module.weight), None if bias is None else sums.get(bias)
            module.weight_sum = None if weight_sum is None else weight_sum.data
            module.bias_sum = None if bias_sum is None else bias_sum.data


def release_sums(model: nn.Module) -> None:
    """Undo `bind_sums`."""
    for module in model.modules():
        if isinstance(module, SumsGradients):
            module.release_sums()
