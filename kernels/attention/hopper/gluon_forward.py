"""Forward attention for Hopper (sm_90a) in Gluon.

    S = Q Kᵀ,  P = exp2(c·log2e·(S - rowmax S)),  O = P V / rowsum P,  LSE = c·rowmax S + log rowsum P

FlashAttention-2's algorithm 1 (arXiv 2307.08691: one pass over key blocks with a running maximum, normalised
once at the end) on FlashAttention-3's schedule (arXiv 2407.08608): a producer warp keeps the copy engine
busy; warpgroups of 64 query rows take turns on the tensor cores, so that one does softmax while another
multiplies; within a warpgroup, S of block j+1 is multiplied while the softmax of block j is computed. CTAs
stay resident and fetch tiles from a counter, longest first.

A tensor of Gluon has powers of two for its sizes. A head dim of 192 is two pieces, 128 and 64 columns, each with a
descriptor, buffers and an accumulator of O: S is the sum of a product for each piece, and P multiplies each piece of V.
Every other head dim is one piece. ``descs`` and ``bufs`` are tuples of such tuples.

Layout: q, o [B, H, Sq, D], k, v [B, Hk, Sk, D] through descriptors with the caller's strides (see tiles.py
for varlen); bf16 or fp16 in and out, fp32 accumulation and statistics. LSE (natural log) [B, H, Sq] or [H,
total]. c > 0.
"""

# Triton has no starred lists (RUF005), and a test of a constant must not be joined to a run-time one (SIM102).
# ruff: noqa: RUF005, SIM102

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.attention.hopper.compat import (
    named_barrier_arrive,
    named_barrier_sync,
    partition_barrier,
    ring_barrier_arrive,
    ring_barrier_sync,
)
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
TURN = gl.constexpr(8)  # first named barrier of ours; warpgroup w waits for its turn at TURN + w
PIECE = gl.constexpr(128)  # columns of the first piece of a head dim that has two
PLACE = gl.constexpr(7)  # words of a slot: tile number, query block, sequence, head, first row, queries, keys


@gluon.jit
def pack16(p, BN: gl.constexpr, DTYPE: gl.constexpr):
    """fp32 [64, BN] -> pairs of 16-bit floats in int32 [64, BN / 2].

    Carried from one iteration to the next this costs BN / 4 registers a thread and no repacking; carried as a
    tensor of 16-bit floats, triton unpacks and packs it again (64 PRMT instructions an iteration).
    """
    even, odd = gl.split(p.reshape((64, BN // 2, 2)))
    IS_BF16: gl.constexpr = DTYPE == gl.bfloat16  # noqa: SIM300
    asm: gl.constexpr = ("cvt.rn.bf16x2.f32" if IS_BF16 else "cvt.rn.f16x2.f32") + " $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack16(w, BN: gl.constexpr, LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """Inverse of pack16, as the left operand of a product. Costs nothing: the packed words are the operand's
    registers.
    """
    even = (w & 0xFFFF).to(gl.int16).to(DTYPE, bitcast=True)
    odd = (w >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.convert_layout(gl.join(even, odd).reshape((64, BN)), LAYOUT)


@gluon.jit
def softmax_step(s, m, total, scale_log2):
    """One block of the online softmax: (P, new maximum, new sum, factor for what was accumulated so far).

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
def release(empty, stage, NWG: gl.constexpr, FIRST: gl.constexpr):
    """A consumer is done with a ring's stage. FIRST > 0: by the named barrier FIRST + stage, where nobody waits; an
    mbarrier's arrival waits for the other warps."""
    if FIRST > 0:
        ring_barrier_arrive(FIRST + stage, NWG * 128 + 32)
    else:
        mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def load_pieces(
    descs, bufs, place, bar, b, h, row, start, length, ROWS: gl.constexpr, D: gl.constexpr, VARLEN: gl.constexpr
):
    """Starts the copy of rows [row, row + ROWS) to buffer ``place``; ``bar`` counts its bytes."""
    mbarrier.expect(bar, ROWS * D * 2)
    for i in gl.static_range(len(descs)):
        load_tile(descs[i], bar, bufs[i].index(place), b, h, row, start, length, VARLEN, i * PIECE)


@gluon.jit
def load_block(
    descs, bufs, full, empty, step, row, b, hk, start, length, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    VARLEN: gl.constexpr, NWG: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """Waits until block ``step`` of a ring has its buffer free (see ``release``), and starts the copy of rows
    [row, ...) to it."""
    stage = step % STAGES
    if FIRST > 0:
        if step >= STAGES:
            ring_barrier_sync(FIRST + stage, NWG * 128 + 32)
    else:
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    load_pieces(descs, bufs, stage, full.index(stage), b, hk, row, start, length, BN, D, VARLEN)


@gluon.jit
def write_place(slot, bars, n, t, mb, b, h, start_q, Sq, Sk, VARLEN: gl.constexpr):
    """Says in slot n % 2 which tile is the n-th of this CTA, and where it lies; t alone if there is none."""
    slot_full, slot_empty = bars[6], bars[7]
    SLOT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    first = n % 2 * PLACE
    mbarrier.wait(slot_empty.index(n % 2), ((n // 2) & 1) ^ 1)
    slot.index(first).store(gl.full((1,), 0, gl.int32, SLOT) + t)
    slot.index(first + 1).store(gl.full((1,), 0, gl.int32, SLOT) + mb)
    slot.index(first + 2).store(gl.full((1,), 0, gl.int32, SLOT) + b)
    slot.index(first + 3).store(gl.full((1,), 0, gl.int32, SLOT) + h)
    if VARLEN:
        slot.index(first + 4).store(gl.full((1,), 0, gl.int32, SLOT) + start_q)
        slot.index(first + 5).store(gl.full((1,), 0, gl.int32, SLOT) + Sq)
        slot.index(first + 6).store(gl.full((1,), 0, gl.int32, SLOT) + Sk)
    mbarrier.arrive(slot_full.index(n % 2), count=1)


@gluon.jit
def read_word(slot, n, WORD: gl.constexpr):
    """One word of the n-th tile's slot."""
    return gl.max(slot.index(n % 2 * PLACE + WORD).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def forward_producer(
    descs, bufs, bars, ptrs, sizes, window,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, NWG: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, AHEAD: gl.constexpr, Q_TILES: gl.constexpr,
    FIRST_K: gl.constexpr, FIRST_V: gl.constexpr,
):  # fmt: skip
    """One warp: fetches tile numbers, and copies Q (per warpgroup), K and V (rings of STAGES blocks) to
    shared memory.

    V follows K one block behind, because the consumers multiply S of the next block before they use V of this
    one. AHEAD: it works up to two tiles ahead, if Q_TILES allows, and tells the consumers where a tile lies.
    """
    q_descs, k_descs, v_descs, _ = descs
    q_bufs, k_bufs, v_bufs, _, slot = bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty, slot_full, slot_empty = bars
    sched, cu_q, cu_k, _ = ptrs
    num_m, num_tiles, section, Sq0, Sk0, num_heads, group, batch_heads, _, _ = sizes
    wl, wr = window
    SLOT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if VARLEN:
        num_tiles = gl.load(sched + 1) * num_heads
    t = gl.program_id(0)
    step_k = 0
    step_v = 0
    n = 0
    while t < num_tiles:
        mb, b, h = decode_tile(t, sched, num_m, num_heads, batch_heads, section, VARLEN, RIGHT)
        start_q, Sq = sequence(b, cu_q, Sq0, VARLEN)
        start_k, Sk = sequence(b, cu_k, Sk0, VARLEN)
        lo, hi = visible_keys(mb * BM, BM, Sq, Sk, wl, wr, BN, LEFT, RIGHT)
        hk = h // group
        if AHEAD:
            write_place(slot, bars, n, t, mb, b, h, start_q, Sq, Sk, VARLEN)
        # K first: its buffer was free a block ago, Q's is not before the last S of the tile before.
        load_block(
            k_descs, k_bufs, k_full, k_empty, step_k, (hi - 1) * BN, b, hk, start_k, Sk, BN, D, STAGES, VARLEN, NWG,
            FIRST_K,
        )  # fmt: skip
        step_k += 1
        for w in gl.static_range(NWG):
            place = n % Q_TILES * NWG + w
            mbarrier.wait(q_empty.index(place), ((n // Q_TILES) & 1) ^ 1)
            load_pieces(q_descs, q_bufs, place, q_full.index(place), b, h, mb * BM + w * 64, start_q, Sq, 64, D, VARLEN)
        for i in range(1, hi - lo):
            load_block(
                k_descs, k_bufs, k_full, k_empty, step_k, (hi - 1 - i) * BN, b, hk, start_k, Sk, BN, D, STAGES, VARLEN,
                NWG, FIRST_K,
            )  # fmt: skip
            load_block(
                v_descs, v_bufs, v_full, v_empty, step_v, (hi - i) * BN, b, hk, start_k, Sk, BN, D, STAGES, VARLEN,
                NWG, FIRST_V,
            )  # fmt: skip
            step_k += 1
            step_v += 1
        fetched = gl.atomic_add(sched, 1)  # it travels while the last V waits for its buffer
        load_block(
            v_descs, v_bufs, v_full, v_empty, step_v, lo * BN, b, hk, start_k, Sk, BN, D, STAGES, VARLEN, NWG, FIRST_V
        )
        step_v += 1
        if not VARLEN:
            # Each CTA fetches until it is told a number past the end, num_tiles fetches in all: the last one
            # leaves the counter as it was found, so that no launch is needed to clear it.
            if fetched == num_tiles - 1:
                gl.store(sched, 0)
        t = gl.num_programs(0) + fetched
        if not AHEAD:
            mbarrier.wait(slot_empty.index(0), (n & 1) ^ 1)
            slot.store(gl.full((1,), 0, gl.int32, SLOT) + t)
            mbarrier.arrive(slot_full.index(0), count=1)
        n += 1
    if AHEAD:
        write_place(slot, bars, n, t, 0, 0, 0, 0, 0, 0, VARLEN)


@gluon.jit
def masked_scores(
    s, row0, col0, Sq, Sk, wl, wr, BN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SL: gl.constexpr
):
    """S with -inf where a query must not see a key; untouched (one branch) where the block needs no mask."""
    if crosses_edge(row0, 64, col0, BN, Sq, Sk, wl, wr, LEFT, RIGHT):
        m = gl.expand_dims(row0 + gl.arange(0, 64, gl.SliceLayout(1, SL)), 1)
        n = gl.expand_dims(col0 + gl.arange(0, BN, gl.SliceLayout(0, SL)), 0)
        s = gl.where(visible(m, n, Sq, Sk, wl, wr, LEFT, RIGHT), s, float("-inf"))
    return s


@gluon.jit
def finish_statistics(m, total, lse_row, row0, Sq, scale_log2, ROWS: gl.constexpr):
    """Stores LSE of 64 rows; returns 1 / rowsum P, 0 for a row that saw no key (its LSE is -inf)."""
    dead = total == 0.0
    lse = gl.where(dead, float("-inf"), (m * scale_log2 + gl.log2(total)) * LN2)
    rows = row0 + gl.arange(0, 64, ROWS)
    gl.store(lse_row + rows, lse, mask=rows < Sq)
    return gl.where(dead, 0.0, 1.0 / total)


@gluon.jit
def make_barriers(NWG: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, Q_TILES: gl.constexpr):
    """(full, empty) pairs for Q, K, V and the tile number. Full: one producer. Empty: every warpgroup that read it."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    TILES: gl.constexpr = 2 if AHEAD else 1
    q_full = gl.allocate_shared_memory(gl.int64, [Q_TILES * NWG, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_TILES * NWG, 1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    slot_full = gl.allocate_shared_memory(gl.int64, [TILES, 1], BAR)
    slot_empty = gl.allocate_shared_memory(gl.int64, [TILES, 1], BAR)
    for i in gl.static_range(Q_TILES * NWG):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=NWG)
        mbarrier.init(v_empty.index(i), count=NWG)
    for i in gl.static_range(TILES):
        mbarrier.init(slot_full.index(i), count=1)
        mbarrier.init(slot_empty.index(i), count=NWG)
    fence_async_shared()
    return q_full, q_empty, k_full, k_empty, v_full, v_empty, slot_full, slot_empty


@gluon.jit
def pass_blocks(
    step, count, bars, STAGES: gl.constexpr, WG: gl.constexpr, NWG: gl.constexpr, PINGPONG: gl.constexpr,
    FIRST_K: gl.constexpr, FIRST_V: gl.constexpr,
):  # fmt: skip
    """Returns ``step`` past ``count`` key blocks that only other warpgroups see: releases them, lets each turn pass."""
    k_full, k_empty, v_full, v_empty = bars[2], bars[3], bars[4], bars[5]
    for _ in range(count):
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        if PINGPONG:
            named_barrier_sync(TURN + WG, 256)
            named_barrier_arrive(TURN + (WG + 1) % NWG, 256)
        release(k_empty, stage, NWG, FIRST_K)
        mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
        release(v_empty, stage, NWG, FIRST_V)
        step += 1
    return step


@gluon.jit
def allocate_pieces(descs, COUNT: gl.constexpr):
    """COUNT buffers for blocks of each descriptor."""
    bufs = ()
    for i in gl.static_range(len(descs)):
        buf = gl.allocate_shared_memory(descs[i].dtype, [COUNT] + descs[i].block_type.shape, descs[i].layout)
        bufs = bufs + (buf,)  # type: ignore[assignment]
    return bufs


@gluon.jit
def matrix(buf, place, ROWS: gl.constexpr):
    """Buffer ``place`` of several as a matrix of ROWS rows."""
    return buf.index(place).reshape((ROWS, buf.shape[len(buf.shape) - 1]))


@gluon.jit
def zero_output(COLS: gl.constexpr):
    """fp32 [64, COLS] for sums of products."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    return gl.zeros((64, COLS), gl.float32, LAYOUT)


@gluon.jit
def zero_outputs(bufs):
    """O's pieces before the first block."""
    o = ()
    for i in gl.static_range(len(bufs)):
        o = o + (zero_output(bufs[i].shape[len(bufs[i].shape) - 1]),)
    return o


@gluon.jit
def multiply_scores(q_bufs, place, k_bufs, stage, zero, BN: gl.constexpr):
    """Starts S = Q Kᵀ, a product for each piece."""
    s = warpgroup_mma(
        matrix(q_bufs[0], place, 64), matrix(k_bufs[0], stage, BN).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    for i in gl.static_range(1, len(q_bufs)):
        q = matrix(q_bufs[i], place, 64)
        s = warpgroup_mma(q, matrix(k_bufs[i], stage, BN).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def multiply_values(w, v_bufs, stage, o, BN: gl.constexpr, DTYPE: gl.constexpr):
    """Starts O + P V of a block, a product for each piece. ``w``: P as pack16 gives it."""
    o_next = ()
    for i in gl.static_range(len(o)):
        p = unpack16(w, BN, gl.DotOperandLayout(0, o[i].type.layout, 2), DTYPE)
        product = warpgroup_mma(p, matrix(v_bufs[i], stage, BN), o[i], is_async=True)
        o_next = o_next + (product,)  # type: ignore[assignment]
    return o_next


@gluon.jit
def all_of(products):
    """Waits for every product under way and returns these."""
    done = warpgroup_mma_wait(0, deps=products)
    if len(products) == 1:
        return (done,)
    else:
        return done


@gluon.jit
def scale_rows(o, factor):
    """O's pieces times a factor for each row."""
    scaled = ()
    for i in gl.static_range(len(o)):
        rows = gl.convert_layout(factor, gl.SliceLayout(1, o[i].type.layout))
        scaled = scaled + (o[i] * gl.expand_dims(rows, 1),)
    return scaled


@gluon.jit
def store_pieces(bufs, place, o, scale, DTYPE: gl.constexpr):
    """O's pieces times ``scale``, which is 0 for a row that saw no key, to shared memory."""
    for i in gl.static_range(len(o)):
        factor = gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, o[i].type.layout)), 1)
        x = gl.where(factor == 0.0, 0.0, o[i] * factor)  # 0 even where V holds inf or NaN
        matrix(bufs[i], place, 64).store(x.to(DTYPE))


@gluon.jit
def forward_consumer(
    descs, bufs, bars, ptrs, sizes, window, scale_log2,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, WG: gl.constexpr, NWG: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, OWN_O: gl.constexpr, PINGPONG: gl.constexpr,
    OVERLAP: gl.constexpr, AHEAD: gl.constexpr, Q_TILES: gl.constexpr, TRIM: gl.constexpr, FIRST_K: gl.constexpr,
    FIRST_V: gl.constexpr,
):  # fmt: skip
    """Warpgroup WG: 64 query rows of each tile, key blocks from right to left. TRIM: without those that only other rows
    of the tile see. OVERLAP: softmax runs beside P V of the block before, for which P has to be kept.
    """
    o_descs = descs[3]
    q_bufs, k_bufs, v_bufs, o_bufs, slot = bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty, slot_full, slot_empty = bars
    sched, cu_q, cu_k, lse_ptr = ptrs
    num_m, num_tiles, section, Sq0, Sk0, num_heads, _, batch_heads, lse_stride_b, lse_stride_h = sizes
    wl, wr = window
    DTYPE: gl.constexpr = o_descs[0].dtype
    PIECES: gl.constexpr = len(o_descs)
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])  # S [64, BN]
    ROW_S: gl.constexpr = gl.SliceLayout(1, SL)
    SLOT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    MINE: gl.constexpr = TURN + WG
    NEXT: gl.constexpr = TURN + (WG + 1) % NWG
    if PINGPONG and WG == NWG - 1:
        named_barrier_arrive(TURN, 256)  # warpgroup 0 goes first
    if VARLEN:
        num_tiles = gl.load(sched + 1) * num_heads
    zero = gl.zeros((64, BN), gl.float32, SL)
    t = gl.program_id(0)
    step = 0
    n = 0
    if AHEAD:
        mbarrier.wait(slot_full.index(0), 0)
        t = read_word(slot, 0, 0)
    while t < num_tiles:
        if AHEAD:
            mb = read_word(slot, n, 1)
            b = read_word(slot, n, 2)
            h = read_word(slot, n, 3)
            if VARLEN:
                start_q = read_word(slot, n, 4)
                Sq = read_word(slot, n, 5)
                Sk = read_word(slot, n, 6)
            else:
                start_q, Sq, Sk = 0, Sq0, Sk0
            mbarrier.arrive(slot_empty.index(n % 2), count=1)
        else:
            mb, b, h = decode_tile(t, sched, num_m, num_heads, batch_heads, section, VARLEN, RIGHT)
            start_q, Sq = sequence(b, cu_q, Sq0, VARLEN)
            _, Sk = sequence(b, cu_k, Sk0, VARLEN)
        lo, hi = visible_keys(mb * BM, BM, Sq, Sk, wl, wr, BN, LEFT, RIGHT)
        row0 = mb * BM + WG * 64
        q_place = n % Q_TILES * NWG + WG
        if OWN_O:
            o_place = WG
        else:
            o_place = q_place
        first = lo
        if TRIM:
            last_block = hi
            lo, hi = visible_keys(row0, 64, Sq, Sk, wl, wr, BN, LEFT, RIGHT)
            lo = gl.minimum(lo, last_block - 1)
            hi = gl.minimum(gl.maximum(hi, lo + 1), last_block)
            if row0 >= Sq:
                hi = lo + 1  # a block, as every tile of a warpgroup has: nobody stores these rows
            step = pass_blocks(step, last_block - hi, bars, STAGES, WG, NWG, PINGPONG, FIRST_K, FIRST_V)
        o = zero_outputs(o_bufs)
        m = gl.full((64,), float("-inf"), gl.float32, ROW_S)
        total = gl.zeros((64,), gl.float32, ROW_S)
        # First block: S alone.
        mbarrier.wait(q_full.index(q_place), (n // Q_TILES) & 1)
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        if PINGPONG:
            named_barrier_sync(MINE, 256)
        s = multiply_scores(q_bufs, q_place, k_bufs, stage, zero, BN)
        if PINGPONG:
            named_barrier_arrive(NEXT, 256)
        s = warpgroup_mma_wait(0, deps=(s,))
        release(k_empty, stage, NWG, FIRST_K)
        s = masked_scores(s, row0, (hi - 1) * BN, Sq, Sk, wl, wr, BN, LEFT, RIGHT, SL)
        p, m, total, alpha = softmax_step(s, m, total, scale_log2)
        w = pack16(p, BN, DTYPE)
        for j in range(1, hi - lo):
            # S of this block and P V of the last one are in flight together; softmax overlaps the latter.
            last = step % STAGES
            last_phase = (step // STAGES) & 1
            if not OVERLAP:
                mbarrier.wait(v_full.index(last), last_phase)
                o = all_of(multiply_values(w, v_bufs, last, o, BN, DTYPE))
                release(v_empty, last, NWG, FIRST_V)
            step += 1
            stage = step % STAGES
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
            if PINGPONG:
                named_barrier_sync(MINE, 256)
            s = multiply_scores(q_bufs, q_place, k_bufs, stage, zero, BN)
            if OVERLAP:
                mbarrier.wait(v_full.index(last), last_phase)
                o_next = multiply_values(w, v_bufs, last, o, BN, DTYPE)
            if PINGPONG:
                named_barrier_arrive(NEXT, 256)
            if OVERLAP:
                s = warpgroup_mma_wait(PIECES, deps=(s,))
            else:
                s = warpgroup_mma_wait(0, deps=(s,))
            release(k_empty, stage, NWG, FIRST_K)
            s = masked_scores(s, row0, (hi - 1 - j) * BN, Sq, Sk, wl, wr, BN, LEFT, RIGHT, SL)
            p, m, total, alpha = softmax_step(s, m, total, scale_log2)
            if OVERLAP:
                # p waits too: packed any earlier, it would land in registers the product still reads, and ptxas
                # would serialise every product of the loop (C7513).
                done = warpgroup_mma_wait(0, deps=o_next + (p,))
                o = done[:PIECES]
                p = done[PIECES]
                release(v_empty, last, NWG, FIRST_V)
            w = pack16(p, BN, DTYPE)
            o = scale_rows(o, alpha)
        # Last P V, statistics, store.
        last = step % STAGES
        if OWN_O:
            mbarrier.arrive(q_empty.index(q_place), count=1)  # the next tile's Q may come during the epilogue
        mbarrier.wait(v_full.index(last), (step // STAGES) & 1)
        o_next = multiply_values(w, v_bufs, last, o, BN, DTYPE)
        step += 1
        lse_row = lse_ptr + b.to(gl.int64) * lse_stride_b + h.to(gl.int64) * lse_stride_h + start_q
        scale = finish_statistics(m, total, lse_row, row0, Sq, scale_log2, ROW_S)
        o = all_of(o_next)
        release(v_empty, last, NWG, FIRST_V)
        if OWN_O:
            tma.store_wait(0)  # the previous tile's O has left the buffer
            partition_barrier()
        store_pieces(o_bufs, o_place, o, scale, DTYPE)
        fence_async_shared()
        partition_barrier()
        for i in gl.static_range(PIECES):
            store_tile(o_descs[i], o_bufs[i].index(o_place), b, h, row0, start_q, Sq, VARLEN, i * PIECE)
        if not OWN_O:
            tma.store_wait(0)  # O lies in Q's buffer: only now may the producer overwrite it
            mbarrier.arrive(q_empty.index(q_place), count=1)
        if TRIM:
            step = pass_blocks(step, lo - first, bars, STAGES, WG, NWG, PINGPONG, FIRST_K, FIRST_V)
        if AHEAD:
            n += 1
            mbarrier.wait(slot_full.index(n % 2), (n // 2) & 1)
            t = read_word(slot, n, 0)
        else:
            mbarrier.wait(slot_full.index(0), n & 1)
            t = gl.max(slot.load(SLOT), 0)
            mbarrier.arrive(slot_empty.index(0), count=1)
            n += 1
    tma.store_wait(0)
    if PINGPONG and WG == 0:
        named_barrier_sync(TURN, 256)  # take the turn that the last warpgroup passed on


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
    NWG: gl.constexpr = BM // 64
    FIRST_K: gl.constexpr = (8 + NWG if PINGPONG else 8) if NAMED else 0
    FIRST_V: gl.constexpr = FIRST_K + STAGES if NAMED else 0
    one = ((q_desc,), (k_desc,), (v_desc,), (o_desc,))
    descs = one if q_tail is None else ((q_desc, q_tail), (k_desc, k_tail), (v_desc, v_tail), (o_desc, o_tail))
    q_bufs = allocate_pieces(descs[0], Q_TILES * NWG)
    k_bufs = allocate_pieces(descs[1], STAGES)
    v_bufs = allocate_pieces(descs[2], STAGES)
    if OWN_O:
        o_bufs = allocate_pieces(descs[3], NWG)
    else:
        o_bufs = q_bufs
    if AHEAD:
        slot = gl.allocate_shared_memory(gl.int32, [2 * PLACE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    else:
        slot = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = make_barriers(NWG, STAGES, AHEAD, Q_TILES)
    bufs = (q_bufs, k_bufs, v_bufs, o_bufs, slot)
    ptrs = (sched, cu_q, cu_k, lse_ptr)
    sizes = (num_m, num_tiles, section, Sq, Sk, num_heads, group, batch_heads, lse_stride_b, lse_stride_h)
    window = (wl, wr)
    # Written out three times: warp_specialize takes only literal tuples, with each function's constants in
    # them.
    if NWG == 2:
        gl.warp_specialize([
            (forward_consumer, (descs, bufs, bars, ptrs, sizes, window, scale_log2, BM, BN, STAGES, 0, NWG,
                                VARLEN, LEFT, RIGHT, OWN_O, PINGPONG, OVERLAP, AHEAD, Q_TILES, TRIM, FIRST_K, FIRST_V)),
            (forward_consumer, (descs, bufs, bars, ptrs, sizes, window, scale_log2, BM, BN, STAGES, 1, NWG,
                                VARLEN, LEFT, RIGHT, OWN_O, PINGPONG, OVERLAP, AHEAD, Q_TILES, TRIM, FIRST_K, FIRST_V)),
            (forward_producer, (descs, bufs, bars, ptrs, sizes, window, BM, BN, D, STAGES, NWG, VARLEN, LEFT, RIGHT,
                                AHEAD, Q_TILES, FIRST_K, FIRST_V)),
        ], [4, 1], [CONSUMER_REGS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (forward_consumer, (descs, bufs, bars, ptrs, sizes, window, scale_log2, BM, BN, STAGES, 0, NWG,
                                VARLEN, LEFT, RIGHT, OWN_O, PINGPONG, OVERLAP, AHEAD, Q_TILES, TRIM, FIRST_K, FIRST_V)),
            (forward_consumer, (descs, bufs, bars, ptrs, sizes, window, scale_log2, BM, BN, STAGES, 1, NWG,
                                VARLEN, LEFT, RIGHT, OWN_O, PINGPONG, OVERLAP, AHEAD, Q_TILES, TRIM, FIRST_K, FIRST_V)),
            (forward_consumer, (descs, bufs, bars, ptrs, sizes, window, scale_log2, BM, BN, STAGES, 2, NWG,
                                VARLEN, LEFT, RIGHT, OWN_O, PINGPONG, OVERLAP, AHEAD, Q_TILES, TRIM, FIRST_K, FIRST_V)),
            (forward_producer, (descs, bufs, bars, ptrs, sizes, window, BM, BN, D, STAGES, NWG, VARLEN, LEFT, RIGHT,
                                AHEAD, Q_TILES, FIRST_K, FIRST_V)),
        ], [4, 4, 1], [CONSUMER_REGS, CONSUMER_REGS, 32])  # fmt: skip
