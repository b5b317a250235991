"""Products of the blocks' linear layers in 8-bit floating point (`engine.fp8`), at up to twice the rate of bf16.

Of the three products of a layer Y = X·Wᵀ + b two take operands of a byte an element: the forward one and the input's
gradient dX = dY·W. The weight's gradient dYᵀ·X stays in the layer's dtype, in the product that adds it to fp32 sums
(`model.weight_gradient`): PyTorch's fp8 product can't add to its output, and passes that do would cost what it wins.

Eight bits have little range, so a tensor is divided by a scale before it is rounded, and the product multiplied by both
scales. The scale is what brings the largest magnitude, measured on the tensor itself, to the format's largest number:
nothing overflows, and no state goes from step to step or into a checkpoint.

    tensorwise   one scale a tensor: X and W in e4m3 (3 bits of fraction, up to 448), dY in e5m2 (2 bits, up to 57,344)
    rowwise      one for each row of X, W and dY, all in e4m3; for dX, which sums over the rows of W, one for all of W

Micikevicius et al. 2022, "FP8 formats for deep learning"; rowwise as torchao's recipe of two products, but with scales
that aren't rounded to powers of two.

A rounding is off by at most 2^-4 of an element in e4m3 and 2^-3 in e5m2, until the element is 2^-6 / 448 or
2^-14 / 57,344 of the largest one; below, by a constant. In a sum of many such terms the errors mostly cancel: random Y
are 4 % off, random dX 6 % (tensorwise) or 4 %, however long the sum. On a GPU the sums of the forward product are kept
in the tensor cores' own accumulator of some 14 bits (`use_fast_accum`), those of dX in fp32.

A NaN or an infinity makes its scale NaN or infinite, and with it the whole row or tensor of the product, which the
engine then finds in the loss or in the gradient's norm.

T tokens (all leading dims), I in, O out, K what a product sums over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.schema import Fp8, ModelConfig
from model.dimensions import default_mlp_width
from model.weight_gradient import add_linear_gradients

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""The tensor cores' fp8 products want both dims of a weight to be multiples of this."""
SMALLEST_PEAK = 2.0**-100
"""Tensors of zeros are scaled as if this were their largest magnitude; so small that no other tensor is."""


class Scaled(NamedTuple):
    """A matrix in fp8: `values` times `scale`."""

    values: Tensor
    """fp8 (M, K), rows contiguous."""
    scale: Tensor
    """fp32, () or one a row (M, 1)."""


def peak_of(matrix: Tensor, recipe: Fp8) -> Tensor:
    """Largest magnitude of each row (M, 1), or of all (), fp32; NaN where there is one. `matrix`: (M, K)."""
    magnitude = matrix.abs()
    return (magnitude.amax(-1, keepdim=True) if recipe is Fp8.rowwise else magnitude.amax()).float()


def scaled(matrix: Tensor, peak: Tensor, dtype: torch.dtype) -> Scaled:
    """`matrix` (M, K) rounded to fp8, `peak` brought to the format's largest number."""
    largest = torch.finfo(dtype).max
    peak = peak.clamp(min=SMALLEST_PEAK)
    return Scaled((matrix.float() * (largest / peak)).to(dtype).contiguous(), peak / largest)


def product(left: Scaled, right: Scaled, dtype: torch.dtype, bias: Tensor | None = None, *, fast: bool) -> Tensor:
    """left (M, K) · rightᵀ (K, N) + bias (N,), in `dtype` (M, N).

    `right` may have one scale where `left` has one a row, not the other way round.
    fast: accumulate with the bits that the tensor cores have, instead of adding up in fp32 every so often.
    """
    by_row = left.scale.dim() == 2
    scale = right.scale.expand(right.values.shape[0], 1).t().contiguous() if by_row else right.scale  # (1, N) or ()
    if not has_units(left.values.device):
        return emulated(left, right, dtype, bias)
    columns = right.values.t()  # (K, N), each column contiguous
    return torch._scaled_mm(left.values, columns, left.scale, scale, bias=bias, out_dtype=dtype, use_fast_accum=fast)


def has_units(device: torch.device) -> bool:
    """Whether products of fp8 are the device's own: on a GPU, which `training.backend.check_fp8` has looked at."""
    return device.type == "cuda"


def emulated(left: Scaled, right: Scaled, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """`product` of the same values in fp32: exact but for the order of sums, and slow."""
    exact = (left.values.float() @ right.values.float().t()) * (left.scale * right.scale.t())
    return (exact if bias is None else exact + bias.float()).to(dtype)


def forward_operands(x: Tensor, weight: Tensor, peak: Tensor, recipe: Fp8) -> tuple[Scaled, Scaled]:
    """What Y is the product of: X (T, I) and W (O, I), whose peak is known."""
    return scaled(x, peak_of(x, recipe), E4M3), scaled(weight, peak, E4M3)


def backward_operands(d_out: Tensor, weight: Tensor, peak: Tensor, recipe: Fp8) -> tuple[Scaled, Scaled]:
    """What dX is the product of: dY (T, O) and Wᵀ (I, O), of which another copy is needed, since the units want what
    they sum over to be contiguous. W (O, I) and its peak as in the forward pass."""
    whole = scaled(weight, peak.amax(), E4M3)
    rows = scaled(d_out, peak_of(d_out, recipe), E4M3 if recipe is Fp8.rowwise else E5M2)
    return rows, Scaled(whole.values.t().contiguous(), whole.scale)


class _Fp8Linear(torch.autograd.Function):
    """`F.linear` by fp8 products. Gradients of weight and bias go to `weight_sum` and `bias_sum` where these are given,
    else to autograd. Operands that the backward pass needs in fp8 are made there, from what is kept anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_sum: Tensor | None,
        bias_sum: Tensor | None,
        recipe: Fp8,
    ) -> Tensor:
        peak = peak_of(weight, recipe)  # (O, 1) or ()
        ctx.save_for_backward(x, weight, peak)
        ctx.weight_sum, ctx.bias_sum, ctx.recipe, ctx.has_bias = weight_sum, bias_sum, recipe, bias is not None
        left, right = forward_operands(x.flatten(0, -2), weight, peak, recipe)
        out = product(left, right, x.dtype, bias, fast=True)
        return out.view(*x.shape[:-1], -1)  # (T, O) to (..., O)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, peak = ctx.saved_tensors
        rows, given = d_out.flatten(0, -2), x.flatten(0, -2)  # (T, O), (T, I)
        d_weight = d_bias = None
        if ctx.weight_sum is not None:
            add_linear_gradients(ctx.weight_sum, ctx.bias_sum, rows, given)
        else:
            d_weight = rows.t() @ given  # (O, I)
            d_bias = rows.sum(0) if ctx.has_bias else None
        left, right = backward_operands(rows, weight, peak, ctx.recipe)
        d_x = product(left, right, x.dtype, fast=False).view(x.shape)  # (T, I) to (..., I)
        return d_x, d_weight, d_bias, None, None, None


def fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_sum: Tensor | None, bias_sum: Tensor | None, recipe: Fp8
) -> Tensor:
    """`F.linear` in fp8, forward and for the gradient of `x`.

    x (..., I) with at least two dims, weight (O, I), bias (O,), all of one dtype, on a GPU bf16; (..., O). With sums,
    fp32 (O, I) and (O,), backward adds to them and gives autograd no gradient of `weight` and `bias`.
    """
    out: Tensor = _Fp8Linear.apply(x, weight, bias, weight_sum, bias_sum, recipe)  # type: ignore[no-untyped-call]
    return out


def problems(config: ModelConfig) -> list[str]:
    """Why the linear layers of this config can't multiply in fp8, each with its remedy; empty if they can."""
    head_dim = config.head_dim or config.width // config.num_heads
    heads = config.num_heads + 2 * (config.num_kv_heads or config.num_heads)
    sizes = {
        "model.width": config.width,
        "model.num_heads × head dim": config.num_heads * head_dim,
        "(model.num_heads + 2 × model.num_kv_heads) × head dim": heads * head_dim,
        "model.mlp_width": config.mlp_width or default_mlp_width(config),
    }
    return [
        f"engine.fp8 multiplies matrices whose dims are multiples of {MULTIPLE}, and {name} is {size}; "
        "change it, or use engine.fp8=none"
        for name, size in sizes.items()
        if size % MULTIPLE
    ]
