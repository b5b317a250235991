"""The softmax of the loss as one Triton kernel: a chunk's logits in, its losses and its logits' gradient out.

Per row x of padded V logits, of which the first V exist, with y = c·tanh(x/c) (y = x without soft cap):

    lse = log Σ exp(y)      loss = lse - y[target]      z = w·lse²
    x_j <- (exp(y_j - lse)·(1 + 2·w·lse) - [j = target])·(1 - (y_j/c)²),   0 in the padding

One program a row, in two sweeps over it: the first keeps a running maximum and sum (Milakov & Gimelshein 2018,
algorithm 3) for every `GROUP` neighbouring columns that a thread loads together, the second writes the gradient over
the logits; a row of 50,304 in bf16 is 100 kB and comes from the L2 cache the second time. What remains is an
instruction each for conversion, scaling and shift, and exp2 per element and sweep: only the last block is masked (a
mask that ends at V takes 16 bits at a time from memory), and the target's column is written again at the end instead
of asked for everywhere. Arithmetic in fp32, logits in the model's dtype. Rows whose target is `ignore` give no loss and
a gradient of 0; a target in the padding gives an infinite loss.
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
    from kernels.compile_check import CompileCase
    from model.loss import LossOptions

BLOCK = 8192
"""Columns a program holds at a time."""
GROUP = 8
"""Neighbouring columns that share a running maximum: 16 bytes of bf16."""
NUM_WARPS = 32
"""Rows in flight must stay in L2 for their second sweep: two programs of 32 warps fill a multiprocessor. H200, 5,248
rows of 50,257, µs with 8, 16 and 32 warps: 401 (4,096 columns), 350 and 319."""
LOG2E = tl.constexpr(1.4426950408889634)


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
def _block(start, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Columns (BLOCK / GROUP, GROUP) of a block: a row of it is what a thread loads at once."""
    return start + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _add_block(y, peak, total):
    """One block y (BLOCK / GROUP, GROUP) of the running maximum `peak` and of the sum `total` of exp(y - peak)."""
    higher = tl.maximum(peak, tl.max(y, axis=1))
    reference = tl.where(higher == -float("inf"), 0.0, higher)  # groups that have seen no column yet
    terms = tl.exp2(y * LOG2E - (reference * LOG2E)[:, None])
    return higher, total * tl.exp2((peak - reference) * LOG2E) + tl.sum(terms, axis=1)


@triton.jit
def _gradient(y, lse, z_factor, softcap, HAS_CAP: tl.constexpr, HAS_Z: tl.constexpr):
    """The gradient of logits whose capped value is y, where they are not the target's."""
    d_x = tl.exp2(y * LOG2E - lse * LOG2E)
    if HAS_Z:
        d_x *= z_factor
    if HAS_CAP:
        d_x *= 1.0 - (y / softcap) * (y / softcap)
    return d_x


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
    HAS_Z: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row)
    dtype = logits_ptr.dtype.element_ty

    if target == ignore:
        tl.store(losses_ptr + row, 0.0)
        tl.store(losses_ptr + num_rows + row, 0.0)
        if HAS_GRADIENT:
            for start in range(0, padded_size, BLOCK):
                columns = _block(start, BLOCK, GROUP)
                tl.store(row_ptr + columns, tl.zeros((BLOCK // GROUP, GROUP), dtype), mask=columns < padded_size)
        return

    whole = vocab_size // BLOCK * BLOCK  # columns of the blocks that need no mask
    peak = tl.full((BLOCK // GROUP,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK // GROUP,), dtype=tl.float32)
    for start in range(0, whole, BLOCK):
        y = _cap(tl.load(row_ptr + _block(start, BLOCK, GROUP)).to(tl.float32), softcap, HAS_CAP)
        peak, total = _add_block(y, peak, total)
    rest = _block(whole, BLOCK, GROUP)
    y = _cap(tl.load(row_ptr + rest, mask=rest < vocab_size, other=0.0).to(tl.float32), softcap, HAS_CAP)
    peak, total = _add_block(tl.where(rest < vocab_size, y, -float("inf")), peak, total)
    exists = (target >= 0) & (target < vocab_size)
    # Before the reductions, whose barriers keep it from a warp that is already writing the gradient there.
    y_target = _cap(tl.load(row_ptr + target, mask=exists, other=0.0).to(tl.float32), softcap, HAS_CAP)
    top = tl.max(peak, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(peak - top), axis=0))

    tl.store(losses_ptr + row, tl.where(exists, lse - y_target, float("inf")))
    tl.store(losses_ptr + num_rows + row, z_weight * lse * lse)

    if HAS_GRADIENT:
        z_factor = 1.0 + 2.0 * z_weight * lse
        for start in range(0, whole, BLOCK):
            place = row_ptr + _block(start, BLOCK, GROUP)
            y = _cap(tl.load(place).to(tl.float32), softcap, HAS_CAP)
            tl.store(place, _gradient(y, lse, z_factor, softcap, HAS_CAP, HAS_Z).to(dtype))
        for start in range(whole, padded_size, BLOCK):
            columns = _block(start, BLOCK, GROUP)
            place, used = row_ptr + columns, columns < vocab_size
            y = _cap(tl.load(place, mask=used, other=0.0).to(tl.float32), softcap, HAS_CAP)
            y = tl.where(used, y, lse)  # nothing overflows there
            d_x = tl.where(used, _gradient(y, lse, z_factor, softcap, HAS_CAP, HAS_Z), 0.0)
            tl.store(place, d_x.to(dtype), mask=columns < padded_size)
        tl.debug_barrier()  # what any thread wrote to the target's column is there before it is written again
        d_target = tl.exp2((y_target - lse) * LOG2E) * z_factor - 1.0
        if HAS_CAP:
            d_target *= 1.0 - (y_target / softcap) * (y_target / softcap)
        tl.store(row_ptr + target, d_target.to(dtype), mask=exists)


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
        HAS_Z=options.z_loss > 0,
        HAS_GRADIENT=want_gradient,
        BLOCK=max(GROUP, min(BLOCK, triton.next_power_of_2(padded_size))),
        GROUP=GROUP,
        num_warps=NUM_WARPS,
    )
    return losses.sum(dim=1)


def compile_cases() -> list[CompileCase]:
    """Losses and gradients of bf16 logits without soft cap and z-loss, of a vocabulary that 16 doesn't divide."""
    from triton.compiler import ASTSource

    from kernels.compile_check import CompileCase
    from model.loss import IGNORE

    def source() -> ASTSource:
        flags = {"HAS_CAP": False, "HAS_Z": False, "HAS_GRADIENT": True}
        constants = {"ignore": IGNORE, **flags, "BLOCK": BLOCK, "GROUP": GROUP}
        types = {"logits_ptr": "*bf16", "targets_ptr": "*i64", "losses_ptr": "*fp32"}
        types |= {"softcap": "fp32", "z_weight": "fp32"}
        names = _cross_entropy_kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        aligned = ("logits_ptr", "targets_ptr", "losses_ptr", "row_stride", "num_rows", "padded_size")
        return ASTSource(
            _cross_entropy_kernel,
            signature,
            constants,
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )

    return [CompileCase("loss[bf16,gradient]", source, NUM_WARPS, archs=(80, 90), quick=True)]
