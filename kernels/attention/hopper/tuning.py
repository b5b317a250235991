"""Tile sizes of the Hopper path: pure functions of the problem, no autotuning.

Each choice is one that compiles without a spill or a serialised product (docs/kernel_log.md has the
runners-up).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ForwardTile:
    """Launch configuration of the forward kernel."""

    block_m: int
    """Query rows per tile: 64 per consumer warpgroup, 2 or 3 of them."""
    block_n: int
    """Keys per block."""
    stages: int
    """Depth of the K and V rings."""
    consumer_regs: int
    """Registers per consumer thread; 240 with two warpgroups, 160 with three."""
    own_o: bool
    """O has its own shared memory, so that the next tile's Q can be loaded during the epilogue."""
    pingpong: bool
    """Warpgroups take turns on the tensor cores."""


SCRATCH_TILE = 64
"""Queries of one tile of the backward's scratch memory and of one copy of Q or dO."""


@dataclass(frozen=True, slots=True)
class BackwardTile:
    """Launch configuration of the backward kernel (64 queries x 128 keys, or 128 x 128)."""

    q_stages: int
    """Depth of the Q ring."""
    do_stages: int
    """Depth of the dO ring."""
    lookahead: bool
    """dK of one block is finished behind S of the next; needs registers that only D = 64 leaves."""
    first_stores: bool = False
    """The first key block that sees a query block stores its dQ, so that the sums need no zeroing: 4 bytes less to
    write per element of Q, and the later key blocks wait for the first. Deterministic calls always do this."""
    pdl: bool = False
    """Programmatic dependent launch: each of the three kernels of a dense call may start before the one before it has
    ended."""

    named: bool = False
    """Consumers release stages and hand dQ over through named barriers, where nobody waits for the other warps."""

    ahead: bool = False
    """S of the next block runs while dQ of this one is handed over. D = 64 only, for want of registers."""
    pairs: bool = False
    """128 queries at a time, in two halves that run into each other: the warpgroups meet half as often, and one half's
    products run during the other's softmax. D = 64 only, for want of registers."""
    kv_registers: bool = False
    """With ``pairs``: K and V are left operands from registers in S and dP, which takes reads off shared memory."""
    l2_budget_mib: int = 32
    """What Q, dO and dQ's sums of one section of heads may take of the 50 MB of L2 (H100), in MiB; 0: one KV
    head at a time."""

    @property
    def queries(self) -> int:
        """Queries of one step."""
        return 2 * SCRATCH_TILE if self.pairs else SCRATCH_TILE

    def __post_init__(self) -> None:
        if self.kv_registers and not self.pairs:
            raise ValueError("kv_registers is a variant of pairs")
        if self.pairs + self.lookahead + self.ahead > 1:
            raise ValueError("pairs, lookahead and ahead exclude each other")
        if (self.pairs or self.ahead) and self.q_stages < 2:
            raise ValueError(f"pairs and ahead keep two Q blocks, q_stages is {self.q_stages}: the kernel would hang")
        if self.named and max(self.q_stages, self.do_stages) > 3:
            raise ValueError(f"named barriers serve rings of 3, got {self.q_stages} and {self.do_stages} stages")
        if self.lookahead and self.q_stages < 2:
            raise ValueError(f"lookahead keeps two Q blocks, q_stages is {self.q_stages}: the kernel would hang")


BLOCK_N_BACKWARD = 128

FORWARD: dict[int, ForwardTile] = {
    64: ForwardTile(block_m=128, block_n=128, stages=3, consumer_regs=240, own_o=True, pingpong=True),
    128: ForwardTile(block_m=128, block_n=128, stages=2, consumer_regs=240, own_o=True, pingpong=True),
    # K and V blocks of 64: two stages of 128 would need 320 KB. O lies in Q's buffer, its own would not fit.
    256: ForwardTile(block_m=128, block_n=64, stages=2, consumer_regs=240, own_o=False, pingpong=True),
}
"""Padded head dim -> forward tile."""

BACKWARD: dict[int, BackwardTile] = {
    64: BackwardTile(q_stages=2, do_stages=2, lookahead=False),
    128: BackwardTile(q_stages=2, do_stages=2, lookahead=False),
}
"""Padded head dim -> backward tile."""

FORWARD_L2_BUDGET_BYTES = 32 * 2**20
"""What K and V of one section of heads may take of the 50 MB of L2 (H100)."""


def padded_head_dim(head_dim: int) -> int:
    """Width of a tile: the copy engine fills the columns past ``head_dim`` with zeros."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def section_heads(budget_bytes: int, bytes_per_head: int, num_heads: int, multiple: int = 1) -> int:
    """How many heads to walk through side by side, so that what they re-read stays in L2: a multiple of
    ``multiple``.
    """
    groups = max(1, budget_bytes // max(1, bytes_per_head * multiple))
    return min(num_heads, groups * multiple)
