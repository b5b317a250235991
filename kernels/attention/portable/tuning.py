"""Block sizes, warps and pipeline stages of the portable kernels: one pure function, no autotuning.

Autotuning at run time picks different kernels on different ranks and breaks bitwise repeatability between
runs, so the choice is a table, made from what compilation shows (registers, spills, shared memory, serialized
wgmma).
"""

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["forward", "dq", "dkdv", "delta", "probs"]


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch configuration of one kernel."""

    block_m: int
    """Query rows per tile."""
    block_n: int
    """Key rows per tile."""
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """Per thread; None: the compiler's choice. 128 lets two programs of 8 warps share a multiprocessor."""

    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


def padded_head_dim(head_dim: int) -> int:
    """Width of a tile: ``tl.dot`` needs powers of two and at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose_tile(
    kernel: Kernel,
    head_dim: int,
    element_size: int,
    capability: tuple[int, int] | None,
    dropout: bool,
    seen_keys: int | None = None,
) -> Tile:
    """Launch configuration of ``kernel``.

    Args:
        head_dim: D, 1 to 256.
        element_size: bytes per element of q, k, v (2 or 4).
        capability: CUDA compute capability, or None for the interpreter.
        dropout: whether the mask generator runs in the loop (it needs registers and shared memory).
        seen_keys: of each query, where all see the same number and no bias or soft cap takes registers; else None.
    """
    width = padded_head_dim(head_dim)
    if kernel == "delta":
        return Tile(block_m=64 if width > 128 else 128, block_n=0, num_warps=4, num_stages=1)
    if kernel == "probs":
        return Tile(block_m=32, block_n=32, num_warps=4, num_stages=1)
    if capability is None:
        # Small and unequal, so that small tests meet many blocks and no two kernels share a tiling
        return {"forward": Tile(32, 16, 1, 1), "dq": Tile(16, 32, 1, 1), "dkdv": Tile(16, 32, 1, 1)}[kernel]
    if element_size == 4:  # products without tensor cores: correct, not fast
        if kernel == "dkdv":  # two accumulators: half the rows
            return Tile(16, 32, 4, 1) if width <= 64 else Tile(16, 16, 4, 1)
        return Tile(32, 32, 4, 1) if width <= 128 else Tile(16, 16, 4, 1)
    table = HOPPER if capability[0] in (9, 10) else AMPERE
    if dropout:
        table = DROPOUT
    elif kernel == "forward" and capability[0] == 9 and seen_keys is not None and seen_keys <= SHORT_KEYS:
        table = HOPPER_SHORT if head_dim == width else HOPPER  # columns that aren't there spill with 4 warps
    column = 0 if width <= 32 else {64: 1, 128: 2, 256: 3}[width]
    return table[kernel][column]


# Columns: tile width (padded head dim) up to 32, 64, 128, 256. All entries stay below 99 KB of shared memory but for
# sm_90 and sm_100 (227 KB). Chosen by compiling (`compile_cases` in shipped.py; triton 3.6 and 3.9, sm_80 and sm_90):
# no wgmma is serialized, and what spills is reloaded outside the loops unless a comment says otherwise.
HOPPER: dict[Kernel, tuple[Tile, ...]] = {
    # Three stages everywhere: Triton issues a block's loads at the end of an iteration and waits for them at the start
    # of another, so that two stages leave nothing to hide the latency behind. A 128-row tile on 8 warps gives each
    # warpgroup the 64 rows that wgmma needs. At width 64 two programs fit on a multiprocessor, one's exponentials
    # beside the other's products. At width 128 they do not, and the wide key block costs 525 instructions per 128 x 128
    # scores where two blocks of 64 cost 692 (the accumulator is rescaled half as often).
    "forward": (Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128), Tile(128, 128, 8, 3), Tile(128, 32, 8, 3)),
    "dq": (Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
    # Keys are the rows here. dK and dV alone take 128 registers per thread at width 128: groups of heads and varlen
    # reload addresses in the loop (up to 264 bytes under triton 3.6), causal and window calls nothing.
    "dkdv": (Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(32, 64, 8, 3)),
}
# Rows of few keys without a mask. At width 64 a program of 4 warps takes a fifth fewer instructions than one of 8, as
# each warp's products are twice as long. Measured at 512 and 1,024 keys, where it is 2 and 3 % faster (H100).
HOPPER_SHORT: dict[Kernel, tuple[Tile, ...]] = {
    "forward": (HOPPER["forward"][0], Tile(128, 64, 4, 3), HOPPER["forward"][2], HOPPER["forward"][3]),
}
SHORT_KEYS = 1024
AMPERE: dict[Kernel, tuple[Tile, ...]] = {
    "forward": (Tile(128, 64, 4, 3), Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
    "dq": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 1)),
    "dkdv": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(32, 32, 4, 1)),
}
# The mask generator needs registers (four Philox lanes per four entries) and shared memory (its layout is not that of
# a product), so tiles are smaller.
DROPOUT: dict[Kernel, tuple[Tile, ...]] = {
    "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 1)),
    "dq": (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 1), Tile(64, 32, 8, 1)),
    "dkdv": (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(32, 32, 4, 1)),
}

L2_BUDGET_BYTES = 16 * 2**20
"""L2 bytes that the operands of a section of heads may take; the smallest L2 of a training GPU we schedule
for is 40 MB (A100), half of which a streaming read can count on."""


PROGRAMS_IN_FLIGHT = 264
"""Two for each of a Hopper GPU's 132 multiprocessors, about as many as other training GPUs hold."""


def section_heads(streamed_bytes_per_head: int, total_heads: int, blocks_per_head: int) -> int:
    """Heads that are walked together: as many as the programs in flight belong to, but no more than have what they
    stream in L2 together; at least 1. More would only bring a head's operands back after they have left L2."""
    fit = L2_BUDGET_BYTES // max(1, streamed_bytes_per_head)
    fill = -(-PROGRAMS_IN_FLIGHT // max(1, blocks_per_head))
    return max(1, min(fit, fill, total_heads))
