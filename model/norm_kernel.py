"""A residual sum and its normalisation as one Triton kernel each way.

    s = x + f,   y = (s - m)·r·w + b,   m = mean(s),   r = 1 / sqrt(var(s) + eps)          RMSNorm: m = 0, no b

and backward, with n = (s - m)·r, g = dy·w, and ds the gradient that reaches s past the norm, along the residual stream:

    dx = df = ds + r·(g - mean(g) - n·mean(g·n)),   dw = Σ dy·n,   db = Σ dy               RMSNorm: no mean(g)

Forward reads x and f and writes s and y, backward reads dy, ds and s and writes dx: 8 elements a token and channel,
the least there is. A program of the forward pass has one row. The backward pass has few programs, each of which goes
through every `num_programs`-th row and keeps its part of dw and db in registers, so that no second pass over dy and s
makes them; their sum over programs is left to the caller, and in the same order each time. s is rounded to its dtype
before it is normalised, as if it had been stored and loaded; arithmetic and statistics are fp32.

N rows, E width, P programs, K = 2 with bias or 1 without.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 16384
"""A row is held whole in a program's registers."""
WARPS_PER_SM = 16
"""Of the backward kernel, whose 128 registers a thread (sm_90, at each width from 768 to 8,192) allow no more."""
CPU_PROGRAMS = 3
"""Programs of the backward pass in Triton's interpreter."""


@triton.jit
def _add_norm_kernel(
    x_ptr,  # (N, E)
    f_ptr,  # (N, E), read with HAS_ADD
    weight_ptr,  # (E,)
    bias_ptr,  # (E,), read with HAS_BIAS
    sum_ptr,  # (N, E), written with HAS_ADD
    y_ptr,  # (N, E)
    stats_ptr,  # (2, N) fp32: r, m; RMSNorm (1, N): r
    num_rows,
    width,
    eps,
    HAS_ADD: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    used = columns < width
    place = row * width + columns
    s = tl.load(x_ptr + place, mask=used, other=0.0)
    if HAS_ADD:
        total = s.to(tl.float32) + tl.load(f_ptr + place, mask=used, other=0.0).to(tl.float32)
        s = total.to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, s, mask=used)
    s = s.to(tl.float32)
    if HAS_MEAN:
        mean = tl.sum(s, axis=0) / width
        tl.store(stats_ptr + num_rows + row, mean)
        s = tl.where(used, s - mean, 0.0)
    r = tl.rsqrt(tl.sum(s * s, axis=0) / width + eps)
    tl.store(stats_ptr + row, r)
    y = s * r * tl.load(weight_ptr + columns, mask=used, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=used, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=used)


@triton.jit
def _add_norm_backward_kernel(
    d_y_ptr,  # (N, E)
    d_sum_ptr,  # (N, E), read with HAS_STREAM
    sum_ptr,  # (N, E)
    weight_ptr,  # (E,)
    stats_ptr,  # (2, N) or (1, N) fp32
    d_x_ptr,  # (N, E)
    parts_ptr,  # (K, P, E) fp32: dw, then db
    num_rows,
    width,
    HAS_STREAM: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    used = columns < width
    weight = tl.load(weight_ptr + columns, mask=used, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program, num_rows, num_programs):
        place = tl.cast(row, tl.int64) * width + columns
        d_y = tl.load(d_y_ptr + place, mask=used, other=0.0).to(tl.float32)
        n = tl.load(sum_ptr + place, mask=used, other=0.0).to(tl.float32)
        r = tl.load(stats_ptr + row)
        if HAS_MEAN:
            n = tl.where(used, n - tl.load(stats_ptr + num_rows + row), 0.0)
        n *= r
        d_weight += d_y * n
        if HAS_BIAS:
            d_bias += d_y
        g = d_y * weight
        d_x = g - n * (tl.sum(g * n, axis=0) / width)
        if HAS_MEAN:
            d_x -= tl.sum(g, axis=0) / width
        d_x *= r
        if HAS_STREAM:
            d_x += tl.load(d_sum_ptr + place, mask=used, other=0.0).to(tl.float32)
        tl.store(d_x_ptr + place, d_x.to(d_x_ptr.dtype.element_ty), mask=used)
    part = parts_ptr + program * width + columns
    tl.store(part, d_weight, mask=used)
    if HAS_BIAS:
        tl.store(part + num_programs * width, d_bias, mask=used)


def warps_of(block: int) -> int:
    """Warps of a program whose row takes `block` lanes: 16 elements a thread, so that the sums stay in registers."""
    return min(max(block // 512, 1), 16)


def programs_of(num_rows: int, width: int, device: torch.device) -> int:
    """P: programs of the backward pass, as many as run at once."""
    if device.type != "cuda":
        return min(num_rows, CPU_PROGRAMS)
    per_sm = WARPS_PER_SM // warps_of(triton.next_power_of_2(width))
    return min(num_rows, per_sm * torch.cuda.get_device_properties(device).multi_processor_count)


@torch.library.custom_op("flashtrain::add_norm", mutates_args=())
def add_norm(
    x: Tensor, f: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """s (N, E) (without `f` empty: it is x), y (N, E), and r and with `mean` m, fp32 (2 or 1, N)."""
    x = x.contiguous()
    rows, width = x.shape
    total = torch.empty_like(x) if f is not None else x.new_empty(0)
    y, stats = torch.empty_like(x), x.new_empty((2 if mean else 1, rows), dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _add_norm_kernel[(rows,)](
        x_ptr=x,
        f_ptr=x if f is None else f.contiguous(),
        weight_ptr=weight,
        bias_ptr=weight if bias is None else bias,
        sum_ptr=total,
        y_ptr=y,
        stats_ptr=stats,
        num_rows=rows,
        width=width,
        eps=eps,
        HAS_ADD=f is not None,
        HAS_MEAN=mean,
        HAS_BIAS=bias is not None,
        BLOCK=block,
        num_warps=warps_of(block),
    )
    return total, y, stats


@add_norm.register_fake
def _add_norm_fake(
    x: Tensor, f: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape) if f is not None else x.new_empty(0)
    return total, x.new_empty(x.shape), x.new_empty((2 if mean else 1, x.shape[0]), dtype=torch.float32)


@torch.library.custom_op("flashtrain::add_norm_backward", mutates_args=())
def add_norm_backward(
    d_y: Tensor, d_sum: Tensor | None, total: Tensor, weight: Tensor, stats: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx (N, E), and each program's part of dw and with `has_bias` db, fp32 (K, P, E). `d_sum`: ds, None for zero."""
    rows, width = total.shape
    programs = programs_of(rows, width, total.device)
    d_x = torch.empty_like(total)
    parts = total.new_empty((2 if has_bias else 1, programs, width), dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _add_norm_backward_kernel[(programs,)](
        d_y_ptr=d_y.contiguous(),
        d_sum_ptr=total if d_sum is None else d_sum.contiguous(),
        sum_ptr=total,
        weight_ptr=weight,
        stats_ptr=stats,
        d_x_ptr=d_x,
        parts_ptr=parts,
        num_rows=rows,
        width=width,
        HAS_STREAM=d_sum is not None,
        HAS_MEAN=stats.shape[0] == 2,
        HAS_BIAS=has_bias,
        BLOCK=block,
        num_warps=warps_of(block),
    )
    return d_x, parts


@add_norm_backward.register_fake
def _add_norm_backward_fake(
    d_y: Tensor, d_sum: Tensor | None, total: Tensor, weight: Tensor, stats: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    rows, width = total.shape
    parts = (2 if has_bias else 1, programs_of(rows, width, total.device), width)
    return total.new_empty(total.shape), total.new_empty(parts, dtype=torch.float32)
