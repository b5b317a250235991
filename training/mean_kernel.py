"""The mean of a gradient over ranks, added to its sum, as one Triton kernel.

    sum <- sum + (row of rank 0 + row of rank 1 + ...) / W

in fp32, rows rounded up as they are read: 8 + 2·W bytes an element of fp32 sums and bf16 rows. Ranks are added in their
order, whichever rank adds them.

n elements, of any number: offsets are 64 bits.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from kernels.compile_check import CompileCase

BLOCK, NUM_WARPS = 1024, 8
"""Four elements a thread: 16-byte loads of fp32. With eight, Triton has bf16 pass through shared memory."""
CPU_BLOCK = 2**15
"""In Triton's interpreter, where each program takes milliseconds."""


@triton.jit
def _add_mean_kernel(
    total_ptr,  # (n,) fp32
    own_ptr,  # (n,): the row of this rank
    others_ptr,  # (W - 1, n): those of the others, in their order
    size,
    stride,  # elements from a row of `others` to the next
    share,  # 1 / W
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = place < size
    found = tl.zeros((BLOCK,), dtype=tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            row_ptr = own_ptr
        elif rank < RANK:
            row_ptr = others_ptr + tl.full((), rank, tl.int64) * stride
        else:
            row_ptr = others_ptr + tl.full((), rank - 1, tl.int64) * stride
        found += tl.load(row_ptr + place, mask=used, other=0.0).to(tl.float32)
    total = tl.load(total_ptr + place, mask=used)
    tl.store(total_ptr + place, total + found * share, mask=used)


def add_mean_(total: Tensor, own: Tensor, others: Tensor, rank: int) -> None:
    """total (n,) fp32 += the mean of own (n,), which is row number `rank`, and others (W - 1, n), the rest of the rows.

    All on one device, `total` and rows contiguous. On a CPU by PyTorch, but for Triton's interpreter.
    """
    ranks = others.shape[0] + 1
    if total.is_cuda:
        launch(total, own, others, rank, BLOCK)
        return
    rows = torch.cat([others[:rank], own[None], others[rank:]])
    total.add_(rows.sum(0, dtype=total.dtype), alpha=1.0 / ranks)


def launch(total: Tensor, own: Tensor, others: Tensor, rank: int, block: int) -> None:
    """Start the kernel."""
    ranks, size = others.shape[0] + 1, total.numel()
    _add_mean_kernel[(triton.cdiv(size, block),)](
        total_ptr=total,
        own_ptr=own,
        others_ptr=others,
        size=size,
        stride=others.stride(0),
        share=1.0 / ranks,
        RANK=rank,
        RANKS=ranks,
        BLOCK=block,
        num_warps=NUM_WARPS,
    )


def compile_cases() -> list[CompileCase]:
    """The kernel of two and eight ranks, whole rows and such as 16 doesn't divide."""
    from triton.compiler import ASTSource

    from kernels.compile_check import CompileCase

    def source(ranks: int, whole: bool) -> ASTSource:
        signature = {"total_ptr": "*fp32", "own_ptr": "*bf16", "others_ptr": "*bf16"}
        signature |= {"size": "i32", "stride": "i32", "share": "fp32"}
        constants = {"RANK": 1, "RANKS": ranks, "BLOCK": BLOCK}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = range(5 if whole else 1)
        attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
        return ASTSource(_add_mean_kernel, signature, constants, attributes)

    return [
        CompileCase(
            name=f"add_mean[{ranks},{'whole' if whole else 'ragged'}]",
            make_source=lambda kind=(ranks, whole): source(*kind),  # type: ignore[misc]
            num_warps=NUM_WARPS,
            archs=(80, 90),
            quick=ranks == 2,
        )
        for ranks in (2, 8)
        for whole in (True, False)
    ]
