"""The softmax of the loss as one Triton kernel: a chunk's logits in, its losses and its logits' gradient out.

Per row x of padded V logits, of which the first V exist, with y = c·tanh(x/c) (y = x without soft cap):

    lse = log Σ exp(y)      loss = lse - y[target]      z = w·lse²
    x_j <- (exp(y_j - lse)·(1 + 2·w·lse) - [j = target])·(1 - (y_j/c)²),   0 in the padding

One program a row, in two sweeps over it: the first keeps a running maximum and sum (Milakov & Gimelshein 2018,
algorithm 3), the second writes the gradient over the logits; a row of 50,304 in bf16 is 100 kB and comes from the
L2 cache the second time. Arithmetic in fp32, logits in the model's dtype. Rows whose target is `ignore` give no loss
and a gradient of 0; a target in the padding gives an infinite loss.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from model.loss import LossOptions

BLOCK = 4096
"""Columns a program holds at a time."""
NUM_WARPS = 8


@triton.jit
def _cap(x, softcap, HAS_CAP: tl.constexpr):
    """c·tanh(x/c); Triton's core language has no tanh, and this form does not overflow."""
    if HAS_CAP:
        scaled = x / softcap
        shrink = tl.exp(-2.0 * tl.abs(scaled))  # in (0, 1]
        size = (1.0 - shrink) / (1.0 + shrink)
        x = softcap * tl.where(scaled < 0, -size, size)
    return x


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (n, padded V), unit last stride
    targets_ptr,  # (n,) int64
    losses_ptr,  # (2, n) fp32: cross-entropy, z-loss
    row_stride,
    num_rows,
    vocab_size,
    padded_size,
    softcap,
    z_weight,
    ignore: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)

    if target == ignore:
        tl.store(losses_ptr + row, 0.0)
        tl.store(losses_ptr + num_rows + row, 0.0)
        if HAS_GRADIENT:
            for start in range(0, padded_size, BLOCK):
                zeros = tl.zeros((BLOCK,), dtype=logits_ptr.dtype.element_ty)
                tl.store(row_ptr + start + columns, zeros, mask=start + columns < padded_size)
        return

    peak = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)  # running maximum of each lane
    total = tl.zeros((BLOCK,), dtype=tl.float32)  # sum of exp(y - peak) of each lane
    for start in range(0, vocab_size, BLOCK):
        used = start + columns < vocab_size
        y = _cap(tl.load(row_ptr + start + columns, mask=used, other=0.0).to(tl.float32), softcap, HAS_CAP)
        y = tl.where(used, y, -float("inf"))
        higher = tl.maximum(peak, y)
        reference = tl.where(higher == -float("inf"), 0.0, higher)  # lanes that have seen no column yet
        total = total * tl.exp(peak - reference) + tl.exp(y - reference)
        peak = higher
    top = tl.max(peak, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(peak - top), axis=0))

    exists = (target >= 0) & (target < vocab_size)
    x_target = tl.load(row_ptr + target, mask=exists, other=0.0).to(tl.float32)
    loss = lse - _cap(x_target, softcap, HAS_CAP)
    tl.store(losses_ptr + row, tl.where(exists, loss, float("inf")))
    tl.store(losses_ptr + num_rows + row, z_weight * lse * lse)

    if HAS_GRADIENT:
        z_factor = 1.0 + 2.0 * z_weight * lse
        for start in range(0, padded_size, BLOCK):
            place = row_ptr + start + columns
            stored, used = start + columns < padded_size, start + columns < vocab_size
            y = _cap(tl.load(place, mask=stored, other=0.0).to(tl.float32), softcap, HAS_CAP)
            y = tl.where(used, y, lse)  # whatever the padding holds: no overflow below
            d_x = tl.exp(y - lse) * z_factor - tl.where(start + columns == target, 1.0, 0.0)
            if HAS_CAP:
                d_x *= 1.0 - (y / softcap) * (y / softcap)
            tl.store(place, tl.where(used, d_x, 0.0).to(logits_ptr.dtype.element_ty), mask=stored)


def runs_on(device: torch.device) -> bool:
    """Whether the kernel can run on this device: CUDA, or any in Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def cross_entropy_(logits: Tensor, targets: Tensor, options: LossOptions, want_gradient: bool) -> Tensor:
    """Sums over the rows, fp32 (2,): cross-entropy and weighted z-loss. See `model.loss.chunk_loss_`.

    logits (n, padded V) in fp16, bf16 or fp32 with unit last stride, overwritten by their gradient with
    `want_gradient`; targets (n,) int64.
    """
    from model.loss import IGNORE

    num_rows, padded_size = logits.shape
    losses = torch.empty((2, num_rows), dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(num_rows,)](
        logits_ptr=logits,
        targets_ptr=targets.contiguous(),
        losses_ptr=losses,
        row_stride=logits.stride(0),
        num_rows=num_rows,
        vocab_size=options.vocab_size,
        padded_size=padded_size,
        softcap=options.softcap,
        z_weight=options.z_loss,
        ignore=IGNORE,
        HAS_CAP=options.softcap > 0,
        HAS_GRADIENT=want_gradient,
        BLOCK=min(BLOCK, triton.next_power_of_2(padded_size)),
        num_warps=NUM_WARPS,
    )
    return losses.sum(dim=1)
