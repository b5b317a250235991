"""AdamW's update of a flat group as one Triton kernel: clip, moments, master, rounded weight, emptied gradient sum.

Loshchilov & Hutter 2019, algorithm 2, with β the betas, t the number of this update, λ the decay and c the factor that
clips:

    g = c·sum                   m <- β1·m + (1-β1)·g            v <- β2·v + (1-β2)·g²
    p <- p - η·λ·p              p <- p - (η / (1-β1^t))·m / (sqrt(v) / sqrt(1-β2^t) + ε)
    w <- p rounded to w's dtype                                 sum <- 0

It reads p, sum, m and v and writes all five: 34 bytes an element with fp32 sums and bf16 weights. Apart, the same is a
pass to clip (8), PyTorch's kernel (28), the rounding (6) and the emptying (4).

Arithmetic is fp32, with PyTorch's order of operations, its fused multiply-adds, and roots and quotients rounded to the
nearest. The corrections of the bias are made on the host in fp64 from the betas as fp32 has them, and rounded once,
where PyTorch's kernel takes fp32 powers: an update differs from PyTorch's by a few of fp32's roundings, early ones by
the digits that 1 - β^t cancels there. Numbers that change from step to step are arguments, so nothing is compiled anew.

c is read from the device's memory, where the norm it comes of is: the host can hand over the update before it knows the
norm, or whether there is one. NaN there leaves the update out: only the sum is emptied.

n elements, of any number: offsets are 64 bits.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from kernels.compile_check import CompileCase

BLOCK, NUM_WARPS = 1024, 8
"""Four elements a thread: 16-byte loads, and none of the shared memory by way of which Triton stores bf16 from eight.
On an H100 the update of 2.65 billion weights and clipping's norm before it take 34.5 ms, 2.9 TB/s of their 38 bytes a
weight (docs/mfu_log.md). Neither the kernel alone nor other blocks and warps have been timed."""
CPU_BLOCK = 2**15
"""In Triton's interpreter, where each program takes milliseconds."""


@triton.jit
def _rounded(x, dtype: tl.constexpr, CUTS_OFF: tl.constexpr):
    """x rounded to the nearest, ties to even."""
    if CUTS_OFF and dtype == tl.bfloat16:  # leave nothing to cut off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _update(
    master_ptr,  # (BLOCK,) fp32, and so on: a block of each tensor
    total_ptr,
    first_ptr,
    second_ptr,
    weight_ptr,
    used,  # (BLOCK,) bool, or None: all
    updated,  # (BLOCK,) bool: of these all but the sum
    factor,  # (BLOCK,) fp32, all the same
    beta1,
    beta2,
    decay,
    step_size,
    root_correction,
    eps,
    CUTS_OFF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.arange(0, BLOCK)
    g = tl.load(total_ptr + place, mask=used).to(tl.float32) * factor
    m = tl.load(first_ptr + place, mask=used)
    v = tl.load(second_ptr + place, mask=used)
    p = tl.load(master_ptr + place, mask=used)
    p = tl.fma(p, -decay, p)
    m = tl.fma(m, beta1, tl.fma(g, -beta1, g))
    g *= g
    v = tl.fma(v, beta2, tl.fma(g, -beta2, g))
    p -= tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), root_correction + tl.zeros_like(v)) + eps)
    tl.store(master_ptr + place, p, mask=updated)
    tl.store(first_ptr + place, m, mask=updated)
    tl.store(second_ptr + place, v, mask=updated)
    tl.store(weight_ptr + place, _rounded(p, weight_ptr.dtype.element_ty, CUTS_OFF), mask=updated)
    tl.store(total_ptr + place, tl.zeros((BLOCK,), dtype=total_ptr.dtype.element_ty), mask=used)


@triton.jit
def _adamw_kernel(
    master_ptr,  # (n,) fp32: p
    total_ptr,  # (n,): sum
    first_ptr,  # (n,) fp32: m
    second_ptr,  # (n,) fp32: v
    weight_ptr,  # (n,): w
    factor_ptr,  # (1,) fp32: c
    size,
    beta1,
    beta2,
    decay,
    step_size,
    root_correction,
    eps,
    CUTS_OFF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    master_ptr += begin
    total_ptr += begin
    first_ptr += begin
    second_ptr += begin
    weight_ptr += begin
    left = size - begin
    factor = tl.load(factor_ptr) + tl.zeros((BLOCK,), dtype=tl.float32)  # for the interpreter, which can't spread bools
    is_number = factor == factor
    if left >= BLOCK:
        _update(
            master_ptr, total_ptr, first_ptr, second_ptr, weight_ptr, None, is_number,
            factor, beta1, beta2, decay, step_size, root_correction, eps, CUTS_OFF, BLOCK,
        )  # fmt: skip
    else:
        used = tl.arange(0, BLOCK) < left
        _update(
            master_ptr, total_ptr, first_ptr, second_ptr, weight_ptr, used, used & is_number,
            factor, beta1, beta2, decay, step_size, root_correction, eps, CUTS_OFF, BLOCK,
        )  # fmt: skip


@dataclass(frozen=True)
class Scalars:
    """What the kernel is told of an update; rounded to fp32 at the launch."""

    beta1: float
    beta2: float
    decay: float
    """η·λ."""
    step_size: float
    """η / (1 - β1^t)."""
    root_correction: float
    """sqrt(1 - β2^t)."""
    eps: float


def scalars_of(*, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> Scalars:
    """Of update number `step`, from 1. The moments decay by the betas as fp32 has them, so these correct the bias."""
    beta1, beta2 = (float(np.float32(beta)) for beta in betas)
    return Scalars(
        beta1=beta1,
        beta2=beta2,
        decay=lr * weight_decay,
        step_size=lr / (1.0 - beta1**step),
        root_correction=math.sqrt(1.0 - beta2**step),
        eps=eps,
    )


@torch.library.custom_op("flashtrain::adamw_step_", mutates_args=("master", "total", "first", "second", "weight"))
def adamw_step_(
    master: Tensor,
    total: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    factor: Tensor,
    beta1: float,
    beta2: float,
    decay: float,
    step_size: float,
    root_correction: float,
    eps: float,
) -> None:
    """One update; see `update`."""
    size = master.numel()
    block = BLOCK if master.is_cuda else CPU_BLOCK
    if size == 0:
        return
    _adamw_kernel[(triton.cdiv(size, block),)](
        master_ptr=master,
        total_ptr=total,
        first_ptr=first,
        second_ptr=second,
        weight_ptr=weight,
        factor_ptr=factor,
        size=size,
        beta1=beta1,
        beta2=beta2,
        decay=decay,
        step_size=step_size,
        root_correction=root_correction,
        eps=eps,
        CUTS_OFF=not master.is_cuda,
        BLOCK=block,
        num_warps=NUM_WARPS,
    )


@adamw_step_.register_fake
def _adamw_step_fake(
    master: Tensor,
    total: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    factor: Tensor,
    beta1: float,
    beta2: float,
    decay: float,
    step_size: float,
    root_correction: float,
    eps: float,
) -> None:
    return None


def update(
    master: Tensor, total: Tensor, first: Tensor, second: Tensor, weight: Tensor, factor: Tensor, scalars: Scalars
) -> None:
    """One update of n elements in place, after which `total` is zero.

    master p, first m and second v: fp32 (n,). total: the summed gradients, (n,) in a floating-point dtype. weight w:
    (n,) in the model's dtype; becomes p rounded to the nearest. factor c: fp32 (1,); NaN: there is no update, and only
    `total` changes. All contiguous, on one device. Waits for nothing.
    """
    tensors = {"master": master, "total": total, "first": first, "second": second, "weight": weight, "factor": factor}
    for name, tensor in tensors.items():
        size = 1 if name == "factor" else master.numel()
        if tensor.shape != (size,) or not tensor.is_contiguous() or tensor.device != master.device:
            raise ValueError(
                f"{name}: needs a contiguous tensor of shape ({size},) on {master.device}, as master is, "
                f"given {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            )
        if name in ("master", "first", "second", "factor") and tensor.dtype is not torch.float32:
            raise ValueError(f"{name}: needs torch.float32, given {tensor.dtype}")
    adamw_step_(
        master,
        total,
        first,
        second,
        weight,
        factor,
        scalars.beta1,
        scalars.beta2,
        scalars.decay,
        scalars.step_size,
        scalars.root_correction,
        scalars.eps,
    )


def compile_cases() -> list[CompileCase]:
    """The kernel of bf16 and fp32 weights, with offsets of 32 and of 64 bits, and of a size that 16 doesn't divide."""
    from triton.compiler import ASTSource

    from kernels.compile_check import CompileCase

    def source(weight: str, size: str, whole: bool) -> ASTSource:
        pointers = dict.fromkeys(("master_ptr", "total_ptr", "first_ptr", "second_ptr"), "*fp32")
        numbers = ("beta1", "beta2", "decay", "step_size", "root_correction", "eps")
        signature = pointers | {"weight_ptr": f"*{weight}", "factor_ptr": "*fp32", "size": size}
        signature |= dict.fromkeys(numbers, "fp32")
        aligned = range(7 if whole else 6)
        constants = {"CUTS_OFF": False, "BLOCK": BLOCK}
        signature |= dict.fromkeys(constants, "constexpr")
        attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
        return ASTSource(_adamw_kernel, signature, constants, attributes)

    kinds = [("bf16", "i64", True), ("bf16", "i32", True), ("bf16", "i32", False), ("fp32", "i64", True)]
    return [
        CompileCase(
            name=f"adamw[{weight},{size},{'whole' if whole else 'ragged'}]",
            make_source=lambda kind=(weight, size, whole): source(*kind),  # type: ignore[misc]
            num_warps=NUM_WARPS,
            archs=(80, 90),
            quick=weight == "bf16",
        )
        for weight, size, whole in kinds
    ]
