"""Forward attention for Hopper (sm_90a) in Gluon.

    S = Q Kᵀ,  P = exp2(c·log2e·(S - rowmax S)),  O = P V / rowsum P,  LSE = c·rowmax S + log rowsum P

The algorithm is FlashAttention-2's (arXiv 2307.08691, algorithm 1): one pass over the key blocks of a query tile with
a running maximum m and sum l; whenever a block raises m, what was summed so far is scaled down, and O is divided by l
once at the end. Per block j, in this file's names:

    m' = max(m, rowmax S_j)    alpha = exp2(c·log2e·(m - m'))    P_j = exp2(c·log2e·(S_j - m'))      softmax_step
    l' = alpha·l + rowsum P_j                                                                       softmax_step
    O' = alpha·O + P_j V_j                                              multiply_values, then scale_rows for the next

Key blocks are visited from right to left, so that the masked ones under a causal mask come first.

Who does what. A CTA holds BM query rows, 64 for each of two or three consumer warpgroups, and stays on its
multiprocessor: it fetches tiles from a counter in global memory, longest first, until there are none.

    producer      1 warp     fetches tile numbers; has the copy engine (TMA) bring Q, K, V to shared memory
    consumer w    4 warps    rows [64 w, 64 w + 64) of the tile: S, softmax, O; stores O and LSE

                         Q: one buffer per warpgroup (Q_TILES of them)
    producer  == TMA ==> K: ring of STAGES blocks           ==> consumers == TMA ==> O
                         V: ring of STAGES blocks, a block behind K
              -- slot:   the next tile's number (AHEAD: and where it lies) -->

The schedule is FlashAttention-3's (arXiv 2407.08608). Two overlaps keep the tensor cores busy while exponentials are
computed: between warpgroups (PINGPONG: they take turns), and within one (OVERLAP: softmax of block j runs beside P V of
block j - 1). For two warpgroups, time running to the right:

    tensor cores   S_1 PV_0 of 0 | S_1 PV_0 of 1 | S_2 PV_1 of 0 | S_2 PV_1 of 1 | ...
    warpgroup 0    issue ^       | softmax of S_1               ^ issue          | softmax of S_2
    warpgroup 1    softmax ...   | issue ^       | softmax of S_1               ^ issue

What guards what. rings.py explains full, empty and phases; a warpgroup counts as one arrival.

    q_full/q_empty        a warpgroup's Q of one tile. Empty: its last S is done (OWN_O), or O, which lies in the same
                          buffer, has left it
    k_full/k_empty        K's ring. Empty: S of this block is done in every warpgroup
    v_full/v_empty        V's ring. Empty: P V of this block is done in every warpgroup
    slot_full/slot_empty  the number (AHEAD: the place) of the next tile. Empty: every warpgroup has read it
    barrier TURN + w      warpgroup w may issue its products: passed on by the one before it, once per block
    partition barrier     the four warps of a warpgroup among themselves, before O is copied from shared memory

What has to hold, or the kernel hangs: ``step``, the number of key blocks so far, is the same in every warpgroup and in
the producer at the start of a tile; every warpgroup releases every block, and takes and passes on as many turns as the
others, also for blocks that only other rows of the tile see (TRIM, ``pass_blocks``); a tile has at least one block.

A head dim of 192 is two pieces (pieces.py): S is the sum of a product for each piece, and P multiplies each piece of V.
The members of Descriptors and Buffers are tuples of such pieces.

Layout: q, o [B, H, Sq, D], k, v [B, Hk, Sk, D] through descriptors with the caller's strides (see tiles.py
for varlen); bf16 or fp16 in and out, fp32 accumulation and statistics. LSE (natural log) [B, H, Sq] or [H,
total]. c > 0.
"""

# Triton has no starred lists (RUF005), and a test of a constant must not be joined to a run-time one (SIM102).
# ruff: noqa: RUF005, SIM102

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.attention.hopper.compat import named_barrier_arrive, named_barrier_sync, pack_pairs, partition_barrier
from kernels.attention.hopper.pieces import PIECE, allocate_pieces, matrix, wait_for
from kernels.attention.hopper.rings import await_empty, await_full, make_barrier, release
from kernels.attention.hopper.tiles import (
    crosses_edge,
    decode_tile,
    load_tile,
    sequence,
    store_tile,
    visible,
    visible_keys,
)

LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)
"""Query rows of a warpgroup: the height of a product on Hopper's tensor cores."""
TURN = gl.constexpr(8)
"""First named barrier of ours; warpgroup w waits for its turn at TURN + w."""
TURN_THREADS = gl.constexpr(256)
"""Threads at one of them: the warpgroup that passes its turn on and the one that takes it."""
WARPGROUP = gl.constexpr(128)
WARP = gl.constexpr(32)
"""Threads."""
PLACE_WORDS = gl.constexpr(7)
"""int32 words of a slot that says where a tile lies: its number and a Place. Two slots, used in turn (AHEAD)."""


class Descriptors(NamedTuple):
    """TMA descriptors; of each tensor a tuple of pieces."""

    q: Any
    k: Any
    v: Any
    o: Any


class Buffers(NamedTuple):
    """Shared memory; of each tensor a tuple of pieces [buffers, 1, 1, rows, columns] (varlen: one 1 more)."""

    q: Any
    """Q_TILES * NWG buffers of 64 rows: warpgroup w of the n-th tile has number n % Q_TILES * NWG + w."""
    k: Any
    """STAGES buffers of BN rows."""
    v: Any
    """Likewise."""
    o: Any
    """NWG buffers of 64 rows, or Q's (without OWN_O)."""
    slot: Any
    """int32: the number of the next tile, or two slots of PLACE_WORDS (AHEAD)."""


class Barriers(NamedTuple):
    """Arrays of mbarriers, one per buffer; the module's docstring says what they guard."""

    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    slot_full: Any
    slot_empty: Any


class Problem(NamedTuple):
    """The kernel's pointers and integers; see ``forward_kernel``."""

    sched: Any
    cu_q: Any
    cu_k: Any
    lse: Any
    num_m: Any
    num_tiles: Any
    section: Any
    Sq: Any
    Sk: Any
    num_heads: Any
    group: Any
    batch_heads: Any
    lse_stride_b: Any
    lse_stride_h: Any
    wl: Any
    wr: Any


class Config(NamedTuple):
    """The kernel's constants; see ``forward_kernel``, and tuning.ForwardTile for the switches."""

    BM: Any
    BN: Any
    D: Any
    STAGES: Any
    NWG: Any
    """Consumer warpgroups: BM / 64."""
    VARLEN: Any
    LEFT: Any
    RIGHT: Any
    OWN_O: Any
    PINGPONG: Any
    OVERLAP: Any
    AHEAD: Any
    Q_TILES: Any
    TRIM: Any
    NAMED_K: Any
    """First named barrier that releases a block of K; 0: mbarriers."""
    NAMED_V: Any
    """First named barrier that releases a block of V; 0: mbarriers."""
    RING_THREADS: Any
    """Threads at such a barrier: the consumers' and the producer's."""


class Place(NamedTuple):
    """Where a tile of queries lies."""

    mb: Any
    """Query block: rows [mb * BM, mb * BM + BM) of the sequence."""
    b: Any
    """Sequence."""
    h: Any
    """Query head."""
    start_q: Any
    """First packed row of the sequence (varlen; otherwise 0)."""
    Sq: Any
    Sk: Any
    """Queries and keys of the sequence."""


class Ring(NamedTuple):
    """K's or V's ring, as the producer fills it."""

    descs: Any
    bufs: Any
    full: Any
    empty: Any


class Rows(NamedTuple):
    """Which rows of K and V a tile reads."""

    b: Any
    """Sequence."""
    h: Any
    """Key head."""
    start: Any
    """First packed row of the sequence (varlen; otherwise 0)."""
    length: Any
    """Keys of the sequence."""


# ----------------------------------------------------------------------------------------------------------------------
# Softmax of one block
# ----------------------------------------------------------------------------------------------------------------------


@gluon.jit
def pack16(p, BN: gl.constexpr, DTYPE: gl.constexpr):
    """fp32 [64, BN] -> pairs of 16-bit floats in int32 [64, BN / 2].

    Carried from one iteration to the next this costs BN / 4 registers a thread and no repacking; carried as a
    tensor of 16-bit floats, triton unpacks and packs it again (64 PRMT instructions an iteration).
    """
    even, odd = gl.split(p.reshape((ROWS, BN // 2, 2)))
    return pack_pairs(even, odd, DTYPE)


@gluon.jit
def unpack16(w, BN: gl.constexpr, LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """Inverse of pack16, as the left operand of a product. Costs nothing: the packed words are the operand's
    registers.
    """
    even = (w & 0xFFFF).to(gl.int16).to(DTYPE, bitcast=True)
    odd = (w >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.convert_layout(gl.join(even, odd).reshape((ROWS, BN)), LAYOUT)


@gluon.jit
def softmax_step(s, m, total, scale_log2):
    """One block of the online softmax: S [64, BN], m and total [64], all fp32 -> (P, new maximum, new sum, alpha, the
    factor for what was accumulated so far).

    The maximum is kept in units of unscaled scores, so the scale costs nothing: one FFMA and one MUFU per
    element. A row that has seen no key yet keeps the maximum -inf; subtracting 0 instead keeps its P at 0
    rather than NaN.
    """
    m_new = gl.maximum(m, gl.max(s, 1))
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(shift * scale_log2, 1))
    alpha = gl.exp2((m - shift) * scale_log2)
    return p, m_new, total * alpha + gl.sum(p, 1), alpha


@gluon.jit
def masked_scores(s, row0, col0, place, prob, C: gl.constexpr):
    """S [64, BN] of the queries at ``row0`` and the keys at ``col0``, with -inf where a query must not see a key;
    untouched (one branch) where the block needs no mask."""
    SL: gl.constexpr = s.type.layout
    if crosses_edge(row0, ROWS, col0, C.BN, place.Sq, place.Sk, prob.wl, prob.wr, C.LEFT, C.RIGHT):
        m = gl.expand_dims(row0 + gl.arange(0, ROWS, gl.SliceLayout(1, SL)), 1)
        n = gl.expand_dims(col0 + gl.arange(0, C.BN, gl.SliceLayout(0, SL)), 0)
        s = gl.where(visible(m, n, place.Sq, place.Sk, prob.wl, prob.wr, C.LEFT, C.RIGHT), s, float("-inf"))
    return s


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of a head dim: copies and products
# ----------------------------------------------------------------------------------------------------------------------


@gluon.jit
def load_pieces(descs, bufs, number, bar, b, h, row, start, length, HEIGHT: gl.constexpr, C: gl.constexpr):
    """Starts the copy of rows [row, row + HEIGHT) of one head to buffer ``number``; ``bar`` counts its bytes."""
    mbarrier.expect(bar, HEIGHT * C.D * 2)
    for i in gl.static_range(len(descs)):
        load_tile(descs[i], bar, bufs[i].index(number), b, h, row, start, length, C.VARLEN, i * PIECE)


@gluon.jit
def zero_output(COLS: gl.constexpr):
    """fp32 [64, COLS] for sums of products."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    return gl.zeros((ROWS, COLS), gl.float32, LAYOUT)


@gluon.jit
def zero_outputs(bufs):
    """O's pieces before the first block."""
    o = ()
    for i in gl.static_range(len(bufs)):
        o = o + (zero_output(bufs[i].shape[len(bufs[i].shape) - 1]),)
    return o


@gluon.jit
def multiply_scores(q_bufs, q_number, k_bufs, stage, zero, BN: gl.constexpr):
    """Starts S = Q Kᵀ, fp32 [64, BN], a product for each piece."""
    s = warpgroup_mma(
        matrix(q_bufs[0], q_number, ROWS),
        matrix(k_bufs[0], stage, BN).permute((1, 0)),
        zero,
        use_acc=False,
        is_async=True,
    )
    for i in gl.static_range(1, len(q_bufs)):
        q = matrix(q_bufs[i], q_number, ROWS)
        s = warpgroup_mma(q, matrix(k_bufs[i], stage, BN).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def multiply_values(w, v_bufs, stage, o, C: gl.constexpr):
    """Starts O + P V of a block, a product for each piece. ``w``: P as pack16 gives it."""
    o_next = ()
    for i in gl.static_range(len(o)):
        p = unpack16(w, C.BN, gl.DotOperandLayout(0, o[i].type.layout, 2), v_bufs[i].dtype)
        product = warpgroup_mma(p, matrix(v_bufs[i], stage, C.BN), o[i], is_async=True)
        o_next = o_next + (product,)  # type: ignore[assignment]
    return o_next


@gluon.jit
def scale_rows(o, factor):
    """O's pieces times a factor for each row."""
    scaled = ()
    for i in gl.static_range(len(o)):
        rows = gl.convert_layout(factor, gl.SliceLayout(1, o[i].type.layout))
        scaled = scaled + (o[i] * gl.expand_dims(rows, 1),)
    return scaled


@gluon.jit
def store_pieces(bufs, number, o, scale):
    """O's pieces times ``scale`` [64], which is 0 for a row that saw no key, to shared memory."""
    for i in gl.static_range(len(o)):
        factor = gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, o[i].type.layout)), 1)
        x = gl.where(factor == 0.0, 0.0, o[i] * factor)  # 0 even where V holds inf or NaN
        matrix(bufs[i], number, ROWS).store(x.to(bufs[i].dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Which tile comes next: from the producer to the consumers, through ``slot``
# ----------------------------------------------------------------------------------------------------------------------


@gluon.jit
def count_tiles(prob, VARLEN: gl.constexpr):
    """Tiles of the whole launch."""
    num_tiles = prob.num_tiles
    if VARLEN:
        num_tiles = gl.load(prob.sched + 1) * prob.num_heads
    return num_tiles


@gluon.jit
def locate_tile(t, prob, C: gl.constexpr):
    """The Place of tile number ``t``."""
    mb, b, h = decode_tile(t, prob.sched, prob.num_m, prob.num_heads, prob.batch_heads, prob.section, C.VARLEN, C.RIGHT)
    start_q, Sq = sequence(b, prob.cu_q, prob.Sq, C.VARLEN)
    _, Sk = sequence(b, prob.cu_k, prob.Sk, C.VARLEN)
    return Place(mb=mb, b=b, h=h, start_q=start_q, Sq=Sq, Sk=Sk)


@gluon.jit
def write_word(slot, word, x):
    """Producer (one warp): puts ``x`` into one word of shared memory."""
    slot.index(word).store(gl.full((1,), 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + x)


@gluon.jit
def write_place(slot, bars, n, t, place, VARLEN: gl.constexpr):
    """Producer: says in slot n % 2 which tile is the n-th of this CTA, and where it lies; t alone if there is none."""
    first = n % 2 * PLACE_WORDS
    mbarrier.wait(bars.slot_empty.index(n % 2), ((n // 2) & 1) ^ 1)
    write_word(slot, first, t)
    write_word(slot, first + 1, place.mb)
    write_word(slot, first + 2, place.b)
    write_word(slot, first + 3, place.h)
    if VARLEN:
        write_word(slot, first + 4, place.start_q)
        write_word(slot, first + 5, place.Sq)
        write_word(slot, first + 6, place.Sk)
    mbarrier.arrive(bars.slot_full.index(n % 2), count=1)


@gluon.jit
def read_word(slot, n, WORD: gl.constexpr):
    """Consumer (four warps): one word of the n-th tile's slot."""
    return gl.max(slot.index(n % 2 * PLACE_WORDS + WORD).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def read_place(slot, bars, n, prob, VARLEN: gl.constexpr):
    """Consumer: the Place of the n-th tile, whose number it has read."""
    mb = read_word(slot, n, 1)
    b = read_word(slot, n, 2)
    h = read_word(slot, n, 3)
    if VARLEN:
        start_q = read_word(slot, n, 4)
        Sq = read_word(slot, n, 5)
        Sk = read_word(slot, n, 6)
    else:
        start_q, Sq, Sk = 0, prob.Sq, prob.Sk
    mbarrier.arrive(bars.slot_empty.index(n % 2), count=1)
    return Place(mb=mb, b=b, h=h, start_q=start_q, Sq=Sq, Sk=Sk)


@gluon.jit
def first_number(slot, bars, AHEAD: gl.constexpr):
    """Consumer: the number of this CTA's first tile."""
    t = gl.program_id(0)
    if AHEAD:
        mbarrier.wait(bars.slot_full.index(0), 0)
        t = read_word(slot, 0, 0)
    return t


@gluon.jit
def next_number(slot, bars, n, AHEAD: gl.constexpr):
    """Consumer: the number of the tile behind the n-th, once the producer has said it."""
    if AHEAD:
        mbarrier.wait(bars.slot_full.index((n + 1) % 2), ((n + 1) // 2) & 1)
        t = read_word(slot, n + 1, 0)
    else:
        mbarrier.wait(bars.slot_full.index(0), n & 1)
        t = gl.max(slot.load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        mbarrier.arrive(bars.slot_empty.index(0), count=1)
    return t


# ----------------------------------------------------------------------------------------------------------------------
# The producer
# ----------------------------------------------------------------------------------------------------------------------


@gluon.jit
def load_block(ring, step, row, rows, NAMED: gl.constexpr, C: gl.constexpr):
    """Starts the copy of rows [row, row + BN) of K or V to the buffer of ``step``, once that is free."""
    stage = step % C.STAGES
    await_empty(ring.empty, step, C.STAGES, NAMED, C.RING_THREADS)
    load_pieces(
        ring.descs, ring.bufs, stage, ring.full.index(stage), rows.b, rows.h, row, rows.start, rows.length, C.BN, C
    )


@gluon.jit
def load_queries(descs, bufs, bars, n, place, C: gl.constexpr):
    """Starts the copies of the n-th tile's Q, one per warpgroup, once their buffers are free."""
    for w in gl.static_range(C.NWG):
        number = n % C.Q_TILES * C.NWG + w
        mbarrier.wait(bars.q_empty.index(number), ((n // C.Q_TILES) & 1) ^ 1)
        load_pieces(
            descs.q, bufs.q, number, bars.q_full.index(number), place.b, place.h, place.mb * C.BM + w * ROWS,
            place.start_q, place.Sq, ROWS, C,
        )  # fmt: skip


@gluon.jit
def forward_producer(descs, bufs, bars, prob, C: gl.constexpr):
    """One warp: fetches tile numbers, and copies Q (per warpgroup), K and V (rings of STAGES blocks) to
    shared memory.

    V follows K one block behind, because the consumers multiply S of the next block before they use V of this
    one. AHEAD: it works up to two tiles ahead, if Q_TILES allows, and tells the consumers where a tile lies.
    """
    k_ring = Ring(descs=descs.k, bufs=bufs.k, full=bars.k_full, empty=bars.k_empty)
    v_ring = Ring(descs=descs.v, bufs=bufs.v, full=bars.v_full, empty=bars.v_empty)
    num_tiles = count_tiles(prob, C.VARLEN)
    t = gl.program_id(0)
    step_k = 0
    step_v = 0
    n = 0
    while t < num_tiles:
        place = locate_tile(t, prob, C)
        start_k, Sk = sequence(place.b, prob.cu_k, prob.Sk, C.VARLEN)
        lo, hi = visible_keys(place.mb * C.BM, C.BM, place.Sq, Sk, prob.wl, prob.wr, C.BN, C.LEFT, C.RIGHT)
        rows = Rows(b=place.b, h=place.h // prob.group, start=start_k, length=Sk)
        if C.AHEAD:
            write_place(bufs.slot, bars, n, t, place, C.VARLEN)
        # K first: its buffer was free a block ago, Q's is not before the last S of the tile before.
        load_block(k_ring, step_k, (hi - 1) * C.BN, rows, C.NAMED_K, C)
        step_k += 1
        load_queries(descs, bufs, bars, n, place, C)
        for i in range(1, hi - lo):
            load_block(k_ring, step_k, (hi - 1 - i) * C.BN, rows, C.NAMED_K, C)
            load_block(v_ring, step_v, (hi - i) * C.BN, rows, C.NAMED_V, C)
            step_k += 1
            step_v += 1
        # It travels while the last V waits for its buffer. Relaxed: no writes depend on it, and a fence takes long.
        fetched = gl.atomic_add(prob.sched, 1, sem="relaxed")
        load_block(v_ring, step_v, lo * C.BN, rows, C.NAMED_V, C)
        step_v += 1
        if not C.VARLEN:
            # Each CTA fetches until it is told a number past the end, num_tiles fetches in all: the last one
            # leaves the counter as it was found, so that no launch is needed to clear it.
            if fetched == num_tiles - 1:
                gl.store(prob.sched, 0)
        t = gl.num_programs(0) + fetched
        if not C.AHEAD:
            mbarrier.wait(bars.slot_empty.index(0), (n & 1) ^ 1)
            bufs.slot.store(gl.full((1,), 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + t)
            mbarrier.arrive(bars.slot_full.index(0), count=1)
        n += 1
    if C.AHEAD:
        write_place(bufs.slot, bars, n, t, Place(mb=0, b=0, h=0, start_q=0, Sq=0, Sk=0), C.VARLEN)


# ----------------------------------------------------------------------------------------------------------------------
# The consumers
# ----------------------------------------------------------------------------------------------------------------------


@gluon.jit
def take_turn(WG: gl.constexpr, C: gl.constexpr):
    """Waits until warpgroup WG may issue products."""
    if C.PINGPONG:
        named_barrier_sync(TURN + WG, TURN_THREADS)


@gluon.jit
def pass_turn_on(WG: gl.constexpr, C: gl.constexpr):
    """Lets the next warpgroup issue its products."""
    if C.PINGPONG:
        named_barrier_arrive(TURN + (WG + 1) % C.NWG, TURN_THREADS)


@gluon.jit
def pass_blocks(step, count, bars, WG: gl.constexpr, C: gl.constexpr):
    """Returns ``step`` past ``count`` key blocks that only other warpgroups see: releases them, lets each turn pass."""
    for _ in range(count):
        stage = step % C.STAGES
        await_full(bars.k_full, step, C.STAGES)
        take_turn(WG, C)
        pass_turn_on(WG, C)
        release(bars.k_empty, stage, C.NAMED_K, C.RING_THREADS)
        await_full(bars.v_full, step, C.STAGES)
        release(bars.v_empty, stage, C.NAMED_V, C.RING_THREADS)
        step += 1
    return step


@gluon.jit
def own_blocks(row0, lo, hi, place, prob, C: gl.constexpr):
    """Those of the tile's key blocks [lo, hi) that the 64 rows at ``row0`` see; at least one, for the rings' sake."""
    first, end = visible_keys(row0, ROWS, place.Sq, place.Sk, prob.wl, prob.wr, C.BN, C.LEFT, C.RIGHT)
    first = gl.minimum(first, hi - 1)
    end = gl.minimum(gl.maximum(end, first + 1), hi)
    if row0 >= place.Sq:
        end = first + 1  # nobody stores these rows
    return first, end


@gluon.jit
def start_scores(step, q_number, bufs, bars, zero, WG: gl.constexpr, C: gl.constexpr):
    """Starts S of block ``step``, once its K is there and it is this warpgroup's turn."""
    stage = step % C.STAGES
    await_full(bars.k_full, step, C.STAGES)
    take_turn(WG, C)
    return multiply_scores(bufs.q, q_number, bufs.k, stage, zero, C.BN)


@gluon.jit
def first_block(
    step, q_number, row0, hi, place, m, total, bufs, bars, prob, zero, scale_log2, WG: gl.constexpr, C: gl.constexpr
):
    """S and softmax of a tile's first key block: (m, total, packed P)."""
    s = start_scores(step, q_number, bufs, bars, zero, WG, C)
    pass_turn_on(WG, C)
    s = warpgroup_mma_wait(0, deps=(s,))
    release(bars.k_empty, step % C.STAGES, C.NAMED_K, C.RING_THREADS)
    s = masked_scores(s, row0, (hi - 1) * C.BN, place, prob, C)
    p, m, total, _ = softmax_step(s, m, total, scale_log2)
    return m, total, pack16(p, C.BN, bufs.k[0].dtype)


@gluon.jit
def block_beside_values(
    step, q_number, row0, hi, j, place, o, m, total, w, bufs, bars, prob, zero, scale_log2,
    WG: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """OVERLAP: S of the block at (hi - 1 - j) * BN and P V of the block before are in flight together; softmax overlaps
    the latter. ``step`` and ``w`` (packed P) are those of the block before. Returns (O, m, total, w): O without this
    block's P V, but scaled for its maximum."""
    PIECES: gl.constexpr = len(o)
    last = step % C.STAGES
    last_phase = (step // C.STAGES) & 1
    s = start_scores(step + 1, q_number, bufs, bars, zero, WG, C)
    mbarrier.wait(bars.v_full.index(last), last_phase)
    o_next = multiply_values(w, bufs.v, last, o, C)
    pass_turn_on(WG, C)
    s = warpgroup_mma_wait(PIECES, deps=(s,))
    release(bars.k_empty, (step + 1) % C.STAGES, C.NAMED_K, C.RING_THREADS)
    s = masked_scores(s, row0, (hi - 1 - j) * C.BN, place, prob, C)
    p, m, total, alpha = softmax_step(s, m, total, scale_log2)
    # p waits too: packed any earlier, it would land in registers the product still reads, and ptxas
    # would serialise every product of the loop (C7513).
    done = warpgroup_mma_wait(0, deps=o_next + (p,))
    o = done[:PIECES]
    p = done[PIECES]
    release(bars.v_empty, last, C.NAMED_V, C.RING_THREADS)
    w = pack16(p, C.BN, bufs.k[0].dtype)
    return scale_rows(o, alpha), m, total, w


@gluon.jit
def block_after_values(
    step, q_number, row0, hi, j, place, o, m, total, w, bufs, bars, prob, zero, scale_log2,
    WG: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """As ``block_beside_values``, without OVERLAP: P V of the block before ends before S of this one begins, so that P
    and S are never kept at the same time."""
    last = step % C.STAGES
    last_phase = (step // C.STAGES) & 1
    mbarrier.wait(bars.v_full.index(last), last_phase)
    o = wait_for(multiply_values(w, bufs.v, last, o, C), 0)
    release(bars.v_empty, last, C.NAMED_V, C.RING_THREADS)
    s = start_scores(step + 1, q_number, bufs, bars, zero, WG, C)
    pass_turn_on(WG, C)
    s = warpgroup_mma_wait(0, deps=(s,))
    release(bars.k_empty, (step + 1) % C.STAGES, C.NAMED_K, C.RING_THREADS)
    s = masked_scores(s, row0, (hi - 1 - j) * C.BN, place, prob, C)
    p, m, total, alpha = softmax_step(s, m, total, scale_log2)
    w = pack16(p, C.BN, bufs.k[0].dtype)
    return scale_rows(o, alpha), m, total, w


@gluon.jit
def finish_statistics(m, total, lse_row, row0, Sq, scale_log2):
    """Stores LSE of 64 rows; returns 1 / rowsum P, 0 for a row that saw no key (its LSE is -inf)."""
    dead = total == 0.0
    lse = gl.where(dead, float("-inf"), (m * scale_log2 + gl.log2(total)) * LN2)
    rows = row0 + gl.arange(0, ROWS, m.type.layout)
    gl.store(lse_row + rows, lse, mask=rows < Sq)
    return gl.where(dead, 0.0, 1.0 / total)


@gluon.jit
def finish_tile(
    step, q_number, row0, place, o, m, total, w, descs, bufs, bars, prob, scale_log2, WG: gl.constexpr, C: gl.constexpr
):
    """P V of a tile's last block, LSE, and O / rowsum P by way of shared memory; returns ``step`` behind it."""
    if C.OWN_O:
        o_number = WG
    else:
        o_number = q_number
    last = step % C.STAGES
    if C.OWN_O:
        mbarrier.arrive(bars.q_empty.index(q_number), count=1)  # the next tile's Q may come during the epilogue
    await_full(bars.v_full, step, C.STAGES)
    o_next = multiply_values(w, bufs.v, last, o, C)
    step += 1
    b, h = place.b, place.h
    lse_row = prob.lse + b.to(gl.int64) * prob.lse_stride_b + h.to(gl.int64) * prob.lse_stride_h + place.start_q
    scale = finish_statistics(m, total, lse_row, row0, place.Sq, scale_log2)
    o = wait_for(o_next, 0)
    release(bars.v_empty, last, C.NAMED_V, C.RING_THREADS)
    if C.OWN_O:
        tma.store_wait(0)  # the previous tile's O has left the buffer
        partition_barrier()
    store_pieces(bufs.o, o_number, o, scale)
    fence_async_shared()
    partition_barrier()
    for i in gl.static_range(len(o)):
        store_tile(descs.o[i], bufs.o[i].index(o_number), b, h, row0, place.start_q, place.Sq, C.VARLEN, i * PIECE)
    if not C.OWN_O:
        tma.store_wait(0)  # O lies in Q's buffer: only now may the producer overwrite it
        mbarrier.arrive(bars.q_empty.index(q_number), count=1)
    return step


@gluon.jit
def forward_tile(step, n, place, zero, descs, bufs, bars, prob, scale_log2, WG: gl.constexpr, C: gl.constexpr):
    """O and LSE of this warpgroup's 64 rows of the n-th tile, key blocks from right to left; returns ``step`` behind
    the tile. TRIM: without the blocks that only other rows of the tile see."""
    lo, hi = visible_keys(place.mb * C.BM, C.BM, place.Sq, place.Sk, prob.wl, prob.wr, C.BN, C.LEFT, C.RIGHT)
    ROW_S: gl.constexpr = gl.SliceLayout(1, zero.type.layout)
    row0 = place.mb * C.BM + WG * ROWS
    q_number = n % C.Q_TILES * C.NWG + WG
    first = lo
    if C.TRIM:
        tile_end = hi
        lo, hi = own_blocks(row0, lo, hi, place, prob, C)
        step = pass_blocks(step, tile_end - hi, bars, WG, C)
    o = zero_outputs(bufs.o)
    m = gl.full((ROWS,), float("-inf"), gl.float32, ROW_S)
    total = gl.zeros((ROWS,), gl.float32, ROW_S)
    mbarrier.wait(bars.q_full.index(q_number), (n // C.Q_TILES) & 1)
    m, total, w = first_block(step, q_number, row0, hi, place, m, total, bufs, bars, prob, zero, scale_log2, WG, C)
    for j in range(1, hi - lo):
        if C.OVERLAP:
            o, m, total, w = block_beside_values(
                step, q_number, row0, hi, j, place, o, m, total, w, bufs, bars, prob, zero, scale_log2, WG, C
            )
        else:
            o, m, total, w = block_after_values(
                step, q_number, row0, hi, j, place, o, m, total, w, bufs, bars, prob, zero, scale_log2, WG, C
            )
        step += 1
    step = finish_tile(step, q_number, row0, place, o, m, total, w, descs, bufs, bars, prob, scale_log2, WG, C)
    if C.TRIM:
        step = pass_blocks(step, lo - first, bars, WG, C)
    return step


@gluon.jit
def forward_consumer(descs, bufs, bars, prob, scale_log2, C: gl.constexpr, WG: gl.constexpr):
    """Warpgroup WG: 64 query rows of each of the CTA's tiles."""
    if C.PINGPONG and WG == C.NWG - 1:
        named_barrier_arrive(TURN, TURN_THREADS)  # warpgroup 0 goes first
    num_tiles = count_tiles(prob, C.VARLEN)
    zero = zero_output(C.BN)
    t = first_number(bufs.slot, bars, C.AHEAD)
    step = 0
    n = 0
    while t < num_tiles:
        if C.AHEAD:
            place = read_place(bufs.slot, bars, n, prob, C.VARLEN)
        else:
            place = locate_tile(t, prob, C)
        step = forward_tile(step, n, place, zero, descs, bufs, bars, prob, scale_log2, WG, C)
        t = next_number(bufs.slot, bars, n, C.AHEAD)
        n += 1
    tma.store_wait(0)
    if C.PINGPONG and WG == 0:
        named_barrier_sync(TURN, TURN_THREADS)  # take the turn that the last warpgroup passed on


# ----------------------------------------------------------------------------------------------------------------------
# The kernel
# ----------------------------------------------------------------------------------------------------------------------


@gluon.jit(
    do_not_specialize=[
        "wl", "wr", "num_m", "num_tiles", "section", "Sq", "Sk", "num_heads", "group", "batch_heads",
        "lse_stride_b", "lse_stride_h",
    ]
)  # fmt: skip
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc,  # tiles [1, 1, rows, D], varlen [1, 1, 1, rows, D]; 64 or BN rows; D = 192: 128
    q_tail, k_tail, v_tail, o_tail,  # D = 192: as above, tiles of 64 columns; otherwise None
    lse_ptr,  # fp32 [B, H, Sq] or [H, total]
    sched,  # int32: a counter, 0 on entry; varlen also the number of query blocks, their (sequence, block)
    cu_q, cu_k,  # int32 [B + 1]; varlen only
    wl, wr,  # window, used where LEFT, RIGHT
    num_m, num_tiles, section, Sq, Sk, num_heads, group, batch_heads,
    lse_stride_b, lse_stride_h,
    scale_log2,  # softmax scale * log2(e) > 0
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, OWN_O: gl.constexpr, PINGPONG: gl.constexpr,
    OVERLAP: gl.constexpr, AHEAD: gl.constexpr, Q_TILES: gl.constexpr, TRIM: gl.constexpr, NAMED: gl.constexpr,
):  # fmt: skip
    """Launch with num_warps=4 and no more CTAs than are resident at a time. BM = 64 rows per consumer warpgroup (2 or 3
    of them). Q_TILES: tiles whose Q has a buffer. NAMED: K and V are released through named barriers.
    """
    NWG: gl.constexpr = BM // ROWS
    NAMED_K: gl.constexpr = (TURN + NWG if PINGPONG else TURN) if NAMED else 0
    NAMED_V: gl.constexpr = NAMED_K + STAGES if NAMED else 0
    RING_THREADS: gl.constexpr = NWG * WARPGROUP + WARP
    C: gl.constexpr = Config(
        BM=BM, BN=BN, D=D, STAGES=STAGES, NWG=NWG, VARLEN=VARLEN, LEFT=LEFT, RIGHT=RIGHT, OWN_O=OWN_O,
        PINGPONG=PINGPONG, OVERLAP=OVERLAP, AHEAD=AHEAD, Q_TILES=Q_TILES, TRIM=TRIM, NAMED_K=NAMED_K, NAMED_V=NAMED_V,
        RING_THREADS=RING_THREADS,
    )  # fmt: skip
    if q_tail is None:
        descs = Descriptors(q=(q_desc,), k=(k_desc,), v=(v_desc,), o=(o_desc,))
    else:
        descs = Descriptors(q=(q_desc, q_tail), k=(k_desc, k_tail), v=(v_desc, v_tail), o=(o_desc, o_tail))
    q_bufs = allocate_pieces(descs.q, Q_TILES * NWG)
    k_bufs = allocate_pieces(descs.k, STAGES)
    v_bufs = allocate_pieces(descs.v, STAGES)
    if OWN_O:
        o_bufs = allocate_pieces(descs.o, NWG)
    else:
        o_bufs = q_bufs
    if AHEAD:
        slot = gl.allocate_shared_memory(gl.int32, [2 * PLACE_WORDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    else:
        slot = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    SLOTS: gl.constexpr = 2 if AHEAD else 1
    k_empty, v_empty = None, None  # named barriers take their place (make_barrier)
    if not NAMED:
        k_empty = make_barrier(STAGES, NWG)
        v_empty = make_barrier(STAGES, NWG)
    bars = Barriers(
        q_full=make_barrier(Q_TILES * NWG), q_empty=make_barrier(Q_TILES * NWG), k_full=make_barrier(STAGES),
        k_empty=k_empty, v_full=make_barrier(STAGES), v_empty=v_empty, slot_full=make_barrier(SLOTS),
        slot_empty=make_barrier(SLOTS, NWG),
    )  # fmt: skip
    fence_async_shared()
    bufs = Buffers(q=q_bufs, k=k_bufs, v=v_bufs, o=o_bufs, slot=slot)
    prob = Problem(
        sched=sched, cu_q=cu_q, cu_k=cu_k, lse=lse_ptr, num_m=num_m, num_tiles=num_tiles, section=section, Sq=Sq, Sk=Sk,
        num_heads=num_heads, group=group, batch_heads=batch_heads, lse_stride_b=lse_stride_b, lse_stride_h=lse_stride_h,
        wl=wl, wr=wr,
    )  # fmt: skip
    # Written out: warp_specialize takes only literal lists of literal tuples.
    if NWG == 2:
        gl.warp_specialize([
            (forward_consumer, (descs, bufs, bars, prob, scale_log2, C, 0)),
            (forward_consumer, (descs, bufs, bars, prob, scale_log2, C, 1)),
            (forward_producer, (descs, bufs, bars, prob, C)),
        ], [4, 1], [CONSUMER_REGS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (forward_consumer, (descs, bufs, bars, prob, scale_log2, C, 0)),
            (forward_consumer, (descs, bufs, bars, prob, scale_log2, C, 1)),
            (forward_consumer, (descs, bufs, bars, prob, scale_log2, C, 2)),
            (forward_producer, (descs, bufs, bars, prob, C)),
        ], [4, 4, 1], [CONSUMER_REGS, CONSUMER_REGS, 32])  # fmt: skip
