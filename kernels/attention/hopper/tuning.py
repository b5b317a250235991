"""Tile sizes of the Hopper path: pure functions of the problem, no autotuning.

Each choice is one that compiles without a spill or a serialised product (docs/kernel_log.md has the
runners-up).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import ClassVar


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
    overlap: bool = True
    """Within a warpgroup, softmax runs beside P V of the block before; that P is kept meanwhile, in block_n / 4
    registers a thread."""
    ahead: bool = False
    """The producer works up to two tiles ahead: Q has two buffers, and the consumers are told where a tile lies instead
    of working it out of its number."""
    one_q: bool = False
    """With ``ahead``: Q has one buffer, where two don't fit."""
    trim: bool = False
    """A warpgroup passes over key blocks that only other rows of its tile see."""
    named_kv: bool = False
    """Consumers release K and V through named barriers, where nobody waits for the other warps."""
    ctas: int = 1
    """CTAs per multiprocessor, which share out its registers and its shared memory."""

    def __post_init__(self) -> None:
        stages = (8 - (self.block_m // 64 if self.pingpong else 0)) // 2
        if self.named_kv and self.stages > stages:
            raise ValueError(f"named barriers serve rings of {stages} beside the turns, got {self.stages} stages")
        if self.one_q and not self.ahead:
            raise ValueError("one_q is a variant of ahead")
        consumers = self.block_m // 64
        wanted, there = 128 * (consumers * self.consumer_regs + (24 if consumers == 2 else 32)), 65536 // self.ctas
        if wanted > there:
            raise ValueError(
                f"{consumers} warpgroups with consumer_regs={self.consumer_regs} and the producer want {wanted} "
                f"registers, a CTA of {self.ctas} on a multiprocessor has {there}: the kernel would hang"
            )

    @property
    def q_tiles(self) -> int:
        """Tiles whose Q has a buffer."""
        return 2 if self.ahead and not self.one_q else 1

    def options(self) -> dict[str, int]:
        """Launch options beside the number of warps: at entry all warps of a CTA, a multiple of 4, have as many
        registers; Triton takes all there are for one CTA."""
        if self.ctas == 1:
            return {}
        threads = 128 * (self.block_m // 64 + 1)
        return {"maxnreg": 65536 // (self.ctas * threads) // 8 * 8}


TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
SCRATCH_TILE = 64
"""Queries of one tile of the backward's scratch memory and of one copy of Q or dO."""


@dataclass(frozen=True, slots=True)
class BackwardTile:
    """Launch configuration of the backward kernel up to head dim 128 (64 queries x 128 keys, or 128 x 128)."""

    block_n: ClassVar[int] = 128
    column_warpgroups: ClassVar[int] = 2
    """Warpgroups that share out the columns of dQ: the order of the sums depends on it."""
    num_warps: ClassVar[int] = 8
    """Of the main kernel's first partition."""
    preprocess_warps: ClassVar[int] = 8
    postprocess_warps: ClassVar[int] = 4
    q_stages: int
    """Depth of the Q ring."""
    do_stages: int
    """Depth of the dO ring."""
    first_stores: bool | None = None
    """The first key block that sees a query block stores its dQ, so that the sums need no zeroing: 4 bytes less to
    write per element of Q, and the later key blocks wait for the first. Deterministic calls always do this. None: where
    a query sees up to FIRST_STORES_KEYS keys."""
    pdl: bool = False
    """Programmatic dependent launch: each of the three kernels of a dense call may start before the one before it has
    ended."""

    named: bool = False
    """Consumers release stages and hand dQ over through named barriers, where nobody waits for the other warps."""

    rounds_keys: int = 0
    """Up to so many keys the kernel itself makes dQ of its sums, where it can (launch.py), while they are in L2. H100,
    TFLOP/s with and without, causal: D = 64 at 512, 1k, 2k, 4k 212 308 390 446 and 178 281 385 466; D = 128 at 512, 1k,
    2k, 4k, 8k 219 341 471 557 592 and 214 333 445 542 598."""
    lag_sms: int = 2
    """With ``rounds_keys``: so many tiles for each multiprocessor, and those of a section of heads, lie between a tile
    and the one that rounds as many queries as it has keys."""

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
        if self.pairs and self.q_stages < 2:
            raise ValueError(f"pairs keep two Q blocks, q_stages is {self.q_stages}: the kernel would hang")
        if self.named and max(self.q_stages, self.do_stages) > 3:
            raise ValueError(f"named barriers serve rings of 3, got {self.q_stages} and {self.do_stages} stages")

    def constants(self) -> dict[str, int]:
        """What only this kernel is compiled for."""
        return {
            "NAMED": self.named,
            "PAIRS": self.pairs,
            "KV_REGISTERS": self.kv_registers,
        }

    def sum_rows(self, width: int) -> int:
        """Rows of 256 sums of dQ that the copy engine adds at a time."""
        return self.queries * width // 256

    def stores_first(self, keys: int) -> bool:
        """What ``first_stores`` means where a query sees up to ``keys`` keys."""
        return keys <= FIRST_STORES_KEYS if self.first_stores is None else self.first_stores


@dataclass(frozen=True, slots=True)
class WideBackwardTile:
    """Launch configuration of the backward kernel above head dim 128 (64 queries x 64 keys)."""

    queries: ClassVar[int] = SCRATCH_TILE
    block_n: ClassVar[int] = 64
    column_warpgroups: ClassVar[int] = 1
    num_warps: ClassVar[int] = 4
    preprocess_warps: ClassVar[int] = 16
    postprocess_warps: ClassVar[int] = 8
    q_stages: int
    """Depth of the Q ring."""
    do_stages: int
    """Depth of the dO ring."""
    dq_columns: int
    """dQ leaves in pieces of this many columns, 32 or 64."""
    dq_stages: int
    """Pieces on their way, of 256 * dq_columns bytes each."""
    lookahead: bool = False
    """dP of the next block is issued behind dK of this one."""
    keys_regs: int = 208
    """Registers per thread of the warpgroup that makes dK; 16 more with ``lookahead``, when dS is in flight beside the
    next dP."""
    queries_regs: int = 72
    """Of the one that makes dQ; that which makes dV gets the rest of 488."""
    first_stores: bool = False
    """As in BackwardTile, but where it pays depends on more than the length: off."""
    pdl: bool = False
    """As in BackwardTile."""
    l2_budget_mib: int = 32
    """As in BackwardTile."""

    def __post_init__(self) -> None:
        if self.dq_columns not in (32, 64):
            raise ValueError(f"dq_columns must be 32 or 64, got {self.dq_columns}")
        if self.keys_regs % 8 or self.queries_regs % 8:
            raise ValueError(f"registers come in eights, got keys_regs={self.keys_regs}, {self.queries_regs=}")
        if self.lookahead and self.q_stages < 2:  # dO of the next block is loaded behind its Q
            raise ValueError(f"lookahead keeps two Q blocks, q_stages is {self.q_stages}: the kernel would hang")

    def constants(self) -> dict[str, int]:
        """As in BackwardTile."""
        return {
            "DQ_COLUMNS": self.dq_columns,
            "DQ_STAGES": self.dq_stages,
            "LOOKAHEAD": self.lookahead,
            "KEYS_REGS": self.keys_regs + (16 if self.lookahead else 0),
            "QUERIES_REGS": self.queries_regs,
        }

    def sum_rows(self, width: int) -> int:
        """As in BackwardTile."""
        return self.queries * self.dq_columns // 256

    def stores_first(self, keys: int) -> bool:
        """As in BackwardTile."""
        return bool(self.first_stores)


_AHEAD = ForwardTile(block_m=128, block_n=128, stages=2, consumer_regs=240, own_o=True, pingpong=True, ahead=True)
_TALL = ForwardTile(
    block_m=192, block_n=128, stages=2, consumer_regs=160, own_o=True, pingpong=True, ahead=True, trim=True
)
_TWO_CTAS = ForwardTile(
    block_m=128, block_n=64, stages=4, consumer_regs=104, own_o=True, pingpong=False,
    overlap=False, ahead=True, trim=True, named_kv=True, ctas=2,
)  # fmt: skip
_WIDEST = ForwardTile(block_m=128, block_n=64, stages=2, consumer_regs=240, own_o=False, pingpong=True)

FORWARD: dict[int, ForwardTile] = {
    64: _TWO_CTAS,
    128: replace(_AHEAD, named_kv=True),
    # 192 and 256: K and V blocks of 64, two stages of 128 would need 240 and 320 KB. O lies in Q's buffer.
    192: replace(_AHEAD, block_n=64, own_o=False),
    256: _WIDEST,
}
"""Padded head dim -> forward tile. With two CTAs, one's blocks run beside the start and end of the other's tiles, which
weigh most in short rows: H200, D = 64, 16k tokens, TFLOP/s causal at S = 512, 1k, 2k: 290 362 415, with FORWARD_LONG
213 296 406; with a window of 1,024 at 4k and 16k 395 392, with one CTA of 128 rows 342 350."""

FORWARD_LONG: dict[int, ForwardTile] = {
    64: _TALL,
    128: replace(_AHEAD, own_o=False),
    256: replace(_WIDEST, ahead=True, one_q=True),
}
"""Padded head dim -> forward tile from LONG_KEYS keys on. H200, 16k tokens, TFLOP/s: D = 64 causal at S = 4k and 16k
479 566, with FORWARD 447 480; full at 512, 2k, 16k 396 531 579 and 398 465 490; D = 128 full 516 663 709 and 513 650
693; D = 256 causal at 512, 2k, 8k 331 579 707 and 327 570 702."""
LONG_KEYS: dict[tuple[int, bool], int] = {(64, True): 2049, (64, False): 0, (128, False): 0, (256, True): 0}
"""(padded head dim, whether later keys are hidden) -> keys from which calls take FORWARD_LONG; with a window on the
left none does."""

FORWARD_CANDIDATES: dict[int, dict[str, ForwardTile]] = {
    64: {"two_ctas": _TWO_CTAS, "tall": _TALL, "ahead": replace(_AHEAD, stages=3)},
    128: {"ahead": _AHEAD, "ahead_named": FORWARD[128], "shared": FORWARD_LONG[128]},
    192: {
        "ahead": FORWARD[192],
        "deep": replace(FORWARD[192], ahead=False, stages=3),
        "own_o": replace(FORWARD[192], ahead=False, own_o=True),
    },
    256: {"ahead": FORWARD_LONG[256]},  # windowed varlen under 3.9: 52 bytes of spills
}
"""Padded head dim -> name -> forward tile to hold against those chosen, everywhere: the bench's
``hopper[candidate="NAME"]``. They compile clean and have groups of their own in tests/kernels/gpu/hopper_checks.py."""

PIECES: dict[int, tuple[int, ...]] = {64: (64,), 128: (128,), 192: (128, 64), 256: (256,)}
"""Padded head dim -> columns of the tensors that make it up: powers of two."""

BACKWARD: dict[int, BackwardTile | WideBackwardTile] = {
    # K and V from registers: +10 to 18 % on an H100; under Triton 3.9 they spill.
    64: BackwardTile(2, 2, named=True, rounds_keys=2048, pairs=True, kv_registers=TRITON < (3, 9)),
    128: BackwardTile(2, 2, named=True, rounds_keys=4096),
    # Two pieces. H100, 16k tokens, TFLOP/s at S = 512, 2k, 8k: causal 156 333 438, full 254 406 456; padded to 256
    # columns 130 258 324 and 204 305 336. All three pieces of a block's dQ can be on their way.
    192: WideBackwardTile(q_stages=2, do_stages=2, dq_columns=64, dq_stages=3, keys_regs=200, queries_regs=88),
    # 225 of 227 KB: with one dO stage, 32 KB more would be there for dQ.
    256: WideBackwardTile(q_stages=2, do_stages=2, dq_columns=32, dq_stages=2),
}
"""Padded head dim -> backward tile."""

FIRST_STORES_KEYS = 4096
"""H100, 16k tokens, TFLOP/s with the first key block's dQ stored, and added: D = 128, causal 324 and 299 at 1k, 535 and
525 at 4k, 592 and 590 at 8k; with many more key blocks than CTAs in flight the later ones would wait. A window's
key blocks should wait little, however long the sequence, as each begins with the queries whose dQ it is the first to
store: not measured above 4k."""

FORWARD_L2_BUDGET_BYTES = 32 * 2**20
"""What K and V of one section of heads may take of the 50 MB of L2 (H100)."""


def padded_head_dim(head_dim: int, tiles: Iterable[int]) -> int:
    """The narrowest width of ``tiles``, FORWARD or BACKWARD, that holds ``head_dim``: the copy engine fills the columns
    past it with zeros."""
    return min(width for width in tiles if width >= head_dim)


def keys_in_sight(seqlen_k: int, window_left: int, window_right: int) -> int:
    """The most keys that a query sees (and, of ``seqlen_k`` queries, the most that see a key), for limits as in
    ``AttnParams`` (-1: none)."""
    if window_left < 0 or window_right < 0:
        return seqlen_k
    return min(seqlen_k, window_left + 1 + window_right)


def forward_tile(width: int, seqlen_k: int, left: bool, right: bool) -> ForwardTile:
    """The forward's tile at this padded head dim, for keys of this length and masks on the left and on the right."""
    if not left and seqlen_k >= LONG_KEYS.get((width, right), seqlen_k + 1):
        return FORWARD_LONG[width]
    return FORWARD[width]


def section_heads(
    budget_bytes: int, bytes_per_head: int, num_heads: int, blocks_per_head: int, num_sms: int, multiple: int = 1
) -> int:
    """How many heads to walk through side by side: as many as occupy every SM once, in whole groups of ``multiple``
    (heads that share keys), but no more than have what they re-read within ``budget_bytes`` of L2 together. A section
    wider than the device would come back to a head's tensors after they have left L2: at S = 512 that doubled the
    forward's DRAM traffic (docs/kernel_log.md).
    """
    fit = budget_bytes // max(1, bytes_per_head * multiple)
    fill = -(-num_sms // max(1, blocks_per_head * multiple))
    return min(num_heads, max(1, min(fit, fill)) * multiple)


def window_section_heads(
    budget_bytes: int, row_bytes: int, rows: int, num_heads: int, rows_in_flight: int, multiple: int = 1
) -> int:
    """As `section_heads` for a window, where a block meets up to ``rows`` rows of ``row_bytes`` each, which
    ``multiple`` heads share: as many heads as leave what they re-read in L2, that is the rows beside the blocks in
    flight (``rows_in_flight`` together) and, per head, those that the next blocks come back to; 0 if there are none.

    All tiles of a window are equally long but a head's last ones, so the grid ends with short tiles only if many heads
    end there. Simulated for D = 128, S = 16k, 16 heads, 132 SMs: 2 % less than in sections of 2.
    """
    beside = max(0, budget_bytes * multiple // row_bytes - rows_in_flight)
    return min(num_heads, beside // rows // multiple * multiple)
