"""Forward attention for Hopper (sm_90a) in Gluon.

    S = Q Kᵀ,  P = exp2(c·log2e·(S - rowmax S)),  O = P V / rowsum P,  LSE = c·rowmax S + log rowsum P

FlashAttention-2's algorithm 1 (arXiv 2307.08691: one pass over key blocks with a running maximum, normalised
once at the end) on FlashAttention-3's schedule (arXiv 2407.08608): a producer warp keeps the copy engine
busy; warpgroups of 64 query rows take turns on the tensor cores, so that one does softmax while another
multiplies; within a warpgroup, S of block j+1 is multiplied while the softmax of block j is computed. CTAs
stay resident and fetch tiles from a counter, longest first.

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
def load_block(
    desc, buf, full, empty, step, row, b, hk, start, length, STAGES: gl.constexpr, VARLEN: gl.constexpr,
    NWG: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """Waits until block ``step`` of a ring has its buffer free (see ``release``), and starts the copy of rows
    [row, ...) to it."""
    stage = step % STAGES
    if FIRST > 0:
        if step >= STAGES:
            ring_barrier_sync(FIRST + stage, NWG * 128 + 32)
    else:
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    load_tile(desc, full.index(stage), buf.index(stage), b, hk, row, start, length, VARLEN)


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
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, NWG: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, AHEAD: gl.constexpr,
    FIRST_K: gl.constexpr, FIRST_V: gl.constexpr,
):  # fmt: skip
    """One warp: fetches tile numbers, and copies Q (per warpgroup), K and V (rings of STAGES blocks) to
    shared memory.

    V follows K one block behind, because the consumers multiply S of the next block before they use V of this
    one. AHEAD: it works up to two tiles ahead, with two buffers for Q, and tells the consumers where a tile lies.
    """
    q_desc, k_desc, v_desc, _ = descs
    q_buf, k_buf, v_buf, _, slot = bufs
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
            k_desc, k_buf, k_full, k_empty, step_k, (hi - 1) * BN, b, hk, start_k, Sk, STAGES, VARLEN, NWG, FIRST_K
        )
        step_k += 1
        for w in gl.static_range(NWG):
            if AHEAD:
                place = n % 2 * NWG + w
                mbarrier.wait(q_empty.index(place), ((n // 2) & 1) ^ 1)
            else:
                place = w
                mbarrier.wait(q_empty.index(w), (n & 1) ^ 1)
            mbarrier.expect(q_full.index(place), q_desc.block_type.nbytes)
            load_tile(q_desc, q_full.index(place), q_buf.index(place), b, h, mb * BM + w * 64, start_q, Sq, VARLEN)
        for i in range(1, hi - lo):
            load_block(
                k_desc,
                k_buf,
                k_full,
                k_empty,
                step_k,
                (hi - 1 - i) * BN,
                b,
                hk,
                start_k,
                Sk,
                STAGES,
                VARLEN,
                NWG,
                FIRST_K,
            )
            load_block(
                v_desc, v_buf, v_full, v_empty, step_v, (hi - i) * BN, b, hk, start_k, Sk, STAGES, VARLEN, NWG, FIRST_V
            )
            step_k += 1
            step_v += 1
        fetched = gl.atomic_add(sched, 1)  # it travels while the last V waits for its buffer
        load_block(v_desc, v_buf, v_full, v_empty, step_v, lo * BN, b, hk, start_k, Sk, STAGES, VARLEN, NWG, FIRST_V)
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
def make_barriers(NWG: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr):
    """(full, empty) pairs for Q, K, V and the tile number. Full: one producer. Empty: every warpgroup that read it."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    TILES: gl.constexpr = 2 if AHEAD else 1
    q_full = gl.allocate_shared_memory(gl.int64, [TILES * NWG, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [TILES * NWG, 1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    slot_full = gl.allocate_shared_memory(gl.int64, [TILES, 1], BAR)
    slot_empty = gl.allocate_shared_memory(gl.int64, [TILES, 1], BAR)
    for i in gl.static_range(TILES * NWG):
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
def forward_consumer(
    descs, bufs, bars, ptrs, sizes, window, scale_log2,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, WG: gl.constexpr, NWG: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, OWN_O: gl.constexpr, PINGPONG: gl.constexpr,
    OVERLAP: gl.constexpr, AHEAD: gl.constexpr, TRIM: gl.constexpr, FIRST_K: gl.constexpr, FIRST_V: gl.constexpr,
):  # fmt: skip
    """Warpgroup WG: 64 query rows of each tile, key blocks from right to left. TRIM: without those that only other rows
    of the tile see. OVERLAP: softmax runs beside P V of the block before, for which P has to be kept.
    """
    o_desc = descs[3]
    q_buf, k_buf, v_buf, o_buf, slot = bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty, slot_full, slot_empty = bars
    sched, cu_q, cu_k, lse_ptr = ptrs
    num_m, num_tiles, section, Sq0, Sk0, num_heads, _, batch_heads, lse_stride_b, lse_stride_h = sizes
    wl, wr = window
    DTYPE: gl.constexpr = o_desc.dtype
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])  # S [64, BN]
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # O [64, D]
    PL: gl.constexpr = gl.DotOperandLayout(0, OL, 2)
    ROW_S: gl.constexpr = gl.SliceLayout(1, SL)
    ROW_O: gl.constexpr = gl.SliceLayout(1, OL)
    SLOT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    MINE: gl.constexpr = TURN + WG
    NEXT: gl.constexpr = TURN + (WG + 1) % NWG
    if PINGPONG and WG == NWG - 1:
        named_barrier_arrive(TURN, 256)  # warpgroup 0 goes first
    if VARLEN:
        num_tiles = gl.load(sched + 1) * num_heads
    zero = gl.zeros((64, BN), gl.float32, SL)
    q = q_buf.index(WG).reshape((64, D))
    o_tile = o_buf.index(WG)
    q_place = WG
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
            q_place = n % 2 * NWG + WG
            q = q_buf.index(q_place).reshape((64, D))
            if not OWN_O:
                o_tile = o_buf.index(q_place)
        else:
            mb, b, h = decode_tile(t, sched, num_m, num_heads, batch_heads, section, VARLEN, RIGHT)
            start_q, Sq = sequence(b, cu_q, Sq0, VARLEN)
            _, Sk = sequence(b, cu_k, Sk0, VARLEN)
        lo, hi = visible_keys(mb * BM, BM, Sq, Sk, wl, wr, BN, LEFT, RIGHT)
        row0 = mb * BM + WG * 64
        first = lo
        if TRIM:
            last_block = hi
            lo, hi = visible_keys(row0, 64, Sq, Sk, wl, wr, BN, LEFT, RIGHT)
            lo = gl.minimum(lo, last_block - 1)
            hi = gl.minimum(gl.maximum(hi, lo + 1), last_block)
            if row0 >= Sq:
                hi = lo + 1  # a block, as every tile of a warpgroup has: nobody stores these rows
            step = pass_blocks(step, last_block - hi, bars, STAGES, WG, NWG, PINGPONG, FIRST_K, FIRST_V)
        o = gl.zeros((64, D), gl.float32, OL)
        m = gl.full((64,), float("-inf"), gl.float32, ROW_S)
        total = gl.zeros((64,), gl.float32, ROW_S)
        # First block: S alone.
        if AHEAD:
            mbarrier.wait(q_full.index(q_place), (n // 2) & 1)
        else:
            mbarrier.wait(q_full.index(WG), n & 1)
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        if PINGPONG:
            named_barrier_sync(MINE, 256)
        k = k_buf.index(stage).reshape((BN, D)).permute((1, 0))
        s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
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
                v = v_buf.index(last).reshape((BN, D))
                o = warpgroup_mma_wait(0, deps=(warpgroup_mma(unpack16(w, BN, PL, DTYPE), v, o, is_async=True),))
                release(v_empty, last, NWG, FIRST_V)
            step += 1
            stage = step % STAGES
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
            if PINGPONG:
                named_barrier_sync(MINE, 256)
            k = k_buf.index(stage).reshape((BN, D)).permute((1, 0))
            s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
            if OVERLAP:
                mbarrier.wait(v_full.index(last), last_phase)
                v = v_buf.index(last).reshape((BN, D))
                o_next = warpgroup_mma(unpack16(w, BN, PL, DTYPE), v, o, is_async=True)
            if PINGPONG:
                named_barrier_arrive(NEXT, 256)
            if OVERLAP:
                s = warpgroup_mma_wait(1, deps=(s,))
            else:
                s = warpgroup_mma_wait(0, deps=(s,))
            release(k_empty, stage, NWG, FIRST_K)
            s = masked_scores(s, row0, (hi - 1 - j) * BN, Sq, Sk, wl, wr, BN, LEFT, RIGHT, SL)
            p, m, total, alpha = softmax_step(s, m, total, scale_log2)
            if OVERLAP:
                # p waits too: packed any earlier, it would land in registers the product still reads, and ptxas
                # would serialise every product of the loop (C7513).
                o, p = warpgroup_mma_wait(0, deps=(o_next, p))
                release(v_empty, last, NWG, FIRST_V)
            w = pack16(p, BN, DTYPE)
            o = o * gl.expand_dims(gl.convert_layout(alpha, ROW_O), 1)
        # Last P V, statistics, store.
        last = step % STAGES
        if OWN_O:
            mbarrier.arrive(q_empty.index(q_place), count=1)  # the next tile's Q may come during the epilogue
        mbarrier.wait(v_full.index(last), (step // STAGES) & 1)
        v = v_buf.index(last).reshape((BN, D))
        o_next = warpgroup_mma(unpack16(w, BN, PL, DTYPE), v, o, is_async=True)
        step += 1
        lse_row = lse_ptr + b.to(gl.int64) * lse_stride_b + h.to(gl.int64) * lse_stride_h + start_q
        scale = gl.convert_layout(finish_statistics(m, total, lse_row, row0, Sq, scale_log2, ROW_S), ROW_O)
        o = warpgroup_mma_wait(0, deps=(o_next,))
        release(v_empty, last, NWG, FIRST_V)
        scale = gl.expand_dims(scale, 1)
        o = gl.where(scale == 0.0, 0.0, o * scale)  # 0 even where V holds inf or NaN
        if OWN_O:
            tma.store_wait(0)  # the previous tile's O has left the buffer
            partition_barrier()
        o_tile.reshape((64, D)).store(o.to(DTYPE))
        fence_async_shared()
        partition_barrier()
        store_tile(o_desc, o_tile, b, h, row0, start_q, Sq, VARLEN)
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
    q_desc, k_desc, v_desc, o_desc,  # tiles [1, 1, rows, D], varlen [1, 1, 1, rows, D]; 64 or BN rows
    lse_ptr,  # fp32 [B, H, Sq] or [H, total]
    sched,  # int32: a counter, 0 on entry; varlen also the number of query blocks, their (sequence, block)
    cu_q, cu_k,  # int32 [B + 1]; varlen only
    wl, wr,  # window, used where LEFT, RIGHT
    num_m, num_tiles, section, Sq, Sk, num_heads, group, batch_heads,
    lse_stride_b, lse_stride_h,
    scale_log2,  # softmax scale * log2(e) > 0
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, OWN_O: gl.constexpr, PINGPONG: gl.constexpr,
    OVERLAP: gl.constexpr, AHEAD: gl.constexpr, TRIM: gl.constexpr, NAMED: gl.constexpr,
):  # fmt: skip
    """Launch with num_warps=4 and no more CTAs than are resident at a time. BM = 64 rows per consumer warpgroup (2 or 3
    of them). NAMED: K and V are released through named barriers.
    """
    NWG: gl.constexpr = BM // 64
    DTYPE: gl.constexpr = q_desc.dtype
    ONE: gl.constexpr = [1, 1, 1] if VARLEN else [1, 1]
    TILES: gl.constexpr = 2 if AHEAD else 1
    FIRST_K: gl.constexpr = (8 + NWG if PINGPONG else 8) if NAMED else 0
    FIRST_V: gl.constexpr = FIRST_K + STAGES if NAMED else 0
    q_buf = gl.allocate_shared_memory(DTYPE, [TILES * NWG] + ONE + [64, D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(DTYPE, [STAGES] + ONE + [BN, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(DTYPE, [STAGES] + ONE + [BN, D], v_desc.layout)
    if OWN_O:
        o_buf = gl.allocate_shared_memory(DTYPE, [NWG] + ONE + [64, D], o_desc.layout)
    else:
        o_buf = q_buf
    if AHEAD:
        slot = gl.allocate_shared_memory(gl.int32, [2 * PLACE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    else:
        slot = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = make_barriers(NWG, STAGES, AHEAD)
    descs = (q_desc, k_desc, v_desc, o_desc)
    bufs = (q_buf, k_buf, v_buf, o_buf, slot)
    ptrs = (sched, cu_q, cu_k, lse_ptr)
    sizes = (num_m, num_tiles, section, Sq, Sk, num_heads, group, batch_heads, lse_stride_b, lse_stride_h)
    window = (wl, wr)
    # Written out three times: warp_specialize takes only literal tuples, with each function's constants in
    # them.
    if NWG == 2:
        gl.warp_specialize([
            (forward_consumer, (descs, bufs, bars, ptrs, sizes, window, scale_log2, BM, BN, D, STAGES, 0, NWG,
                                VARLEN, LEFT, RIGHT, OWN_O, PINGPONG, OVERLAP, AHEAD, TRIM, FIRST_K, FIRST_V)),
            (forward_consumer, (descs, bufs, bars, ptrs, sizes, window, scale_log2, BM, BN, D, STAGES, 1, NWG,
                                VARLEN, LEFT, RIGHT, OWN_O, PINGPONG, OVERLAP, AHEAD, TRIM, FIRST_K, FIRST_V)),
            (forward_producer, (descs, bufs, bars, ptrs, sizes, window, BM, BN, STAGES, NWG, VARLEN, LEFT, RIGHT, AHEAD,
                                FIRST_K, FIRST_V)),
        ], [4, 1], [CONSUMER_REGS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (forward_consumer, (descs, bufs, bars, ptrs, sizes, window, scale_log2, BM, BN, D, STAGES, 0, NWG,
                                VARLEN, LEFT, RIGHT, OWN_O, PINGPONG, OVERLAP, AHEAD, TRIM, FIRST_K, FIRST_V)),
            (forward_consumer, (descs, bufs, bars, ptrs, sizes, window, scale_log2, BM, BN, D, STAGES, 1, NWG,
                                VARLEN, LEFT, RIGHT, OWN_O, PINGPONG, OVERLAP, AHEAD, TRIM, FIRST_K, FIRST_V)),
            (forward_consumer, (descs, bufs, bars, ptrs, sizes, window, scale_log2, BM, BN, D, STAGES, 2, NWG,
                                VARLEN, LEFT, RIGHT, OWN_O, PINGPONG, OVERLAP, AHEAD, TRIM, FIRST_K, FIRST_V)),
            (forward_producer, (descs, bufs, bars, ptrs, sizes, window, BM, BN, STAGES, NWG, VARLEN, LEFT, RIGHT, AHEAD,
                                FIRST_K, FIRST_V)),
        ], [4, 4, 1], [CONSUMER_REGS, CONSUMER_REGS, 32])  # fmt: skip
