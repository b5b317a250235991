"""Backward attention for Hopper (sm_90a) in Gluon: dK and dV of one key block per CTA, dQ summed into an fp32
buffer.

    P = exp2(c·log2e·S - LSE₂),  dP = dO Vᵀ,  dS = P ∘ (dP - δ),  δ = rowsum(dO ∘ O)
    dV = Pᵀ dO,  dK = c·dSᵀ Q,  dQ = c·dS K

FlashAttention-2's algorithm 2 (arXiv 2307.08691). S and dP are computed transposed, [keys, queries]: then
each thread holds Pᵀ and dSᵀ exactly where the tensor cores want the left operand of dV and dK, and only dS
goes through shared memory, once, for dQ. A producer warp loads Q, dO and the statistics; another hands dQ
tiles to the copy engine, which adds them to global memory. The factor c is applied once: to dK here, to dQ
when its buffer is converted (elementwise.py).

Layout: q, dO [B, H, Sq, D], k, v, dk, dv [B, Hk, Sk, D] through descriptors with the caller's strides (see
tiles.py for varlen); statistics fp32 [rows, padded queries] and dQ sums fp32 [rows, padded queries, D], where
dense rows are B·H and varlen rows are H with every sequence starting on a multiple of PAD. One CTA owns a key
block of a kv head and walks through the queries of all its group's heads, so dK and dV have one writer and
are bitwise repeatable. dQ is not: the order of the additions varies, unless DETERMINISTIC.

FIRST_STORES: the first key block that sees a query block stores its dQ instead of adding it, and nobody zeroes the
sums; the others wait until it has. DETERMINISTIC: all key blocks add in ascending order. ``turns`` counts, per query
block, how many have; the reducer waits for its block's rank and passes the turn on. No deadlock: CTAs start in the
order of their ids, and for one head that order is ascending key blocks, so a CTA waits only for CTAs that started
before it.
Little waiting: query blocks are visited from the last to the first. The blocks that a key block shares with its
predecessor come after those it does not share (a window) or when the predecessor, whose list is as long or longer,
has begun with them (causal, full), and CTAs that start together stay one addition apart.
"""

# Triton's language has no starred lists (RUF005); partitions of one kernel unpack the same tuples (RUF059).
# ruff: noqa: RUF005, RUF059

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
    partition_barrier,
    pass_turn,
    ring_barrier_arrive,
    ring_barrier_sync,
    tma_load,
    tma_reduce_add,
    tma_store,
    wait_previous_kernel,
    wait_turn,
)
from kernels.attention.hopper.tiles import (
    decode_tile,
    load_tile,
    padded_start,
    sequence,
    store_tile,
    visible_queries,
)


@gluon.jit
def scratch_coordinates(b, h, start_q, num_heads, VARLEN: gl.constexpr):
    """(row, first column) of one head of one sequence in the statistics and in the dQ sums."""
    if VARLEN:
        return h, padded_start(start_q, b)
    else:
        return b * num_heads + h, 0


@gluon.jit
def visit(i, lo, hi, DESCENDING: gl.constexpr):
    """Query block number ``i``, lo <= i < hi, of a CTA's walk."""
    if DESCENDING:
        return hi - 1 - (i - lo)
    else:
        return i


@gluon.jit
def first_keys(m0, Sq, Sk, wl, BN: gl.constexpr, LEFT: gl.constexpr):
    """The first key block whose visible_queries hold the query block at ``m0``."""
    if LEFT:
        return gl.maximum(m0 + Sk - Sq - wl, 0) // BN
    else:
        return 0


Q_BARRIER = gl.constexpr(8)
DO_BARRIER = gl.constexpr(11)
DQ_BARRIER = gl.constexpr(14)
"""Named barriers: one per stage of the Q and dO rings (3 at most), and "dQ is there"."""
HANDOVER = gl.constexpr(288)
"""Threads at one of them: 8 consumer warps and the producer's or the reducer's."""


@gluon.jit
def release(empty, stage, FIRST_BARRIER: gl.constexpr, NAMED: gl.constexpr):
    """A consumer is done with a ring's stage. NAMED: nobody waits; an mbarrier's arrival waits for the other warps."""
    if NAMED:
        ring_barrier_arrive(FIRST_BARRIER + stage, HANDOVER)
    else:
        mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def await_release(empty, step, STAGES: gl.constexpr, FIRST_BARRIER: gl.constexpr, NAMED: gl.constexpr):
    """The producer's side of ``release``: the stage of ``step`` is free."""
    if NAMED:
        if step >= STAGES:
            ring_barrier_sync(FIRST_BARRIER + step % STAGES, HANDOVER)
    else:
        mbarrier.wait(empty.index(step % STAGES), ((step // STAGES) & 1) ^ 1)


@gluon.jit
def backward_producer(
    descs, bufs, bars, ptrs, sizes, window,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, FIRST_STORES: gl.constexpr,
    PDL: gl.constexpr, NAMED: gl.constexpr,
):  # fmt: skip
    """One warp: loads K and V once, then Q with LSE and dO with delta, in tiles of 64 queries, for each query block of
    each head of the group. PDL: the preprocess may still be running; everything it writes is read behind the first LSE.
    """
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, _, _, _ = descs
    q_buf, k_buf, v_buf, do_buf, lse_buf, delta_buf, _, _ = bufs
    q_full, q_empty, do_full, do_empty, kv_full, _, _ = bars
    sched, cu_q, cu_k, turns = ptrs
    num_n, num_tiles, section, Sq0, Sk0, padded, num_heads_k, group, batch_heads_k = sizes
    wl, wr = window
    HALVES: gl.constexpr = BM // 64
    t = gl.program_id(0)
    if VARLEN:
        num_tiles = gl.load(sched + 1) * num_heads_k
    if t < num_tiles:
        nb, b, hk = decode_tile(t, sched, num_n, num_heads_k, batch_heads_k, section, VARLEN, False)
        start_q, Sq = sequence(b, cu_q, Sq0, VARLEN)
        start_k, Sk = sequence(b, cu_k, Sk0, VARLEN)
        lo, hi = visible_queries(nb * BN, BN, Sq, Sk, wl, wr, BM, LEFT, RIGHT)
        mbarrier.expect(kv_full.index(0), k_desc.block_type.nbytes)
        load_tile(k_desc, kv_full.index(0), k_buf, b, hk, nb * BN, start_k, Sk, VARLEN)
        mbarrier.expect(kv_full.index(1), v_desc.block_type.nbytes)
        load_tile(v_desc, kv_full.index(1), v_buf, b, hk, nb * BN, start_k, Sk, VARLEN)
        if PDL:
            wait_previous_kernel()
        step = 0
        for g in range(group):
            h = hk * group + g
            row, column = scratch_coordinates(b, h, start_q, num_heads_k * group, VARLEN)
            for i in range(lo, hi):
                mb = visit(i, lo, hi, FIRST_STORES)
                stage = step % STAGES
                await_release(q_empty, step, STAGES, Q_BARRIER, NAMED)
                bar = q_full.index(stage)
                mbarrier.expect(bar, HALVES * (q_desc.block_type.nbytes + lse_desc.block_type.nbytes))
                for half in gl.static_range(HALVES):
                    m0 = mb * BM + half * 64
                    load_tile(q_desc, bar, q_buf.index(stage * HALVES + half), b, h, m0, start_q, Sq, VARLEN)
                    tma_load(lse_desc, [row, column + m0], bar, lse_buf.index(stage * HALVES + half))
                stage = step % DO_STAGES
                await_release(do_empty, step, DO_STAGES, DO_BARRIER, NAMED)
                bar = do_full.index(stage)
                mbarrier.expect(bar, HALVES * (do_desc.block_type.nbytes + delta_desc.block_type.nbytes))
                for half in gl.static_range(HALVES):
                    m0 = mb * BM + half * 64
                    load_tile(do_desc, bar, do_buf.index(stage * HALVES + half), b, h, m0, start_q, Sq, VARLEN)
                    tma_load(delta_desc, [row, column + m0], bar, delta_buf.index(stage * HALVES + half))
                step += 1


@gluon.jit
def backward_reducer(
    descs, bufs, bars, ptrs, sizes, window,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    FIRST_STORES: gl.constexpr, DETERMINISTIC: gl.constexpr, NAMED: gl.constexpr,
):  # fmt: skip
    """One warp: adds each dQ tile to the fp32 sums with the copy engine, while the consumer computes the
    next.
    """
    dq_desc = descs[6]
    dq_buf = bufs[7]
    dq_full = bars[5]
    dq_empty = bars[6]
    sched, cu_q, cu_k, turns = ptrs
    num_n, num_tiles, section, Sq0, Sk0, padded, num_heads_k, group, batch_heads_k = sizes
    wl, wr = window
    t = gl.program_id(0)
    if VARLEN:
        num_tiles = gl.load(sched + 1) * num_heads_k
    if t < num_tiles:
        nb, b, hk = decode_tile(t, sched, num_n, num_heads_k, batch_heads_k, section, VARLEN, False)
        start_q, Sq = sequence(b, cu_q, Sq0, VARLEN)
        _, Sk = sequence(b, cu_k, Sk0, VARLEN)
        lo, hi = visible_queries(nb * BN, BN, Sq, Sk, wl, wr, BM, LEFT, RIGHT)
        step = 0
        for g in range(group):
            row, column = scratch_coordinates(b, hk * group + g, start_q, num_heads_k * group, VARLEN)
            for i in range(lo, hi):
                mb = visit(i, lo, hi, FIRST_STORES)
                tile = (row * padded + column + mb * BM) // BM
                if NAMED:
                    ring_barrier_sync(DQ_BARRIER, HANDOVER)
                else:
                    mbarrier.wait(dq_full.index(0), step & 1)
                if FIRST_STORES:
                    rank = nb - first_keys(mb * BM, Sq, Sk, wl, BN, LEFT)
                    if rank == 0:
                        tma_store(dq_desc, [tile * (BM * D // 256), 0], dq_buf)
                    else:
                        wait_turn(turns + tile * (BM // 64), rank if DETERMINISTIC else 1)
                        tma_reduce_add(dq_desc, [tile * (BM * D // 256), 0], dq_buf)
                else:
                    tma_reduce_add(dq_desc, [tile * (BM * D // 256), 0], dq_buf)
                tma.store_wait(0)
                mbarrier.arrive(dq_empty.index(0), count=1)
                if FIRST_STORES:  # noqa: SIM102 (a constexpr: without it there is no rank)
                    if DETERMINISTIC or rank == 0:
                        pass_turn(turns + tile * (BM // 64))
                step += 1


@gluon.jit
def unmasked_queries(n0, BN: gl.constexpr, Sq, Sk, wl, wr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Queries [begin, end) that see every key of block [n0, n0 + BN); none if the block runs past the last
    key.
    """
    off = Sk - Sq
    begin = 0
    end = 2147483647
    if RIGHT:
        begin = n0 + BN - 1 - off - wr
    if LEFT:
        end = n0 - off + wl + 1
    if n0 + BN > Sk:
        end = -1
    return begin, end


@gluon.jit
def masked_scores(
    s,
    delta_n,
    keys,
    wl,
    wr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    TL: gl.constexpr,
):
    """Sᵀ [BN, BM] with -inf where query i of the block must not see key j: j - i > delta_n + wr, j - i <
    delta_n - wl, j >= keys.

    A thread's columns are i = 8 a + 2 lane + e. What depends on the row and the lane is one number per row
    and thread, what depends on the register (a, e) is a constant in the comparison, so that the mask takes no
    registers of its own.
    """
    s4 = s.reshape((BN, BM // 8, 4, 2))
    L4: gl.constexpr = s4.type.layout
    j = gl.arange(0, BN, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L4))))[:, None, None, None]
    a = gl.arange(0, BM // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L4))))[None, :, None, None]
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L4))))[None, None, :, None]
    e = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L4))))[None, None, None, :]
    first = gl.where(j < keys, 0, BM) + 0 * lane
    if RIGHT:
        first = gl.where(j < keys, j - (delta_n + wr) - 2 * lane, BM)
    keep = first <= 8 * a + e
    if LEFT:
        keep = keep & (j - (delta_n - wl) - 2 * lane >= 8 * a + e)
    masked = gl.where(keep, s4, float("-inf")).reshape((BN, BM))
    return gl.convert_layout(masked, TL, assert_trivial=True)


@gluon.jit
def in_register_order(dq, D: gl.constexpr):
    """dQ [64, D] -> [D / 4, 256], each thread's values in runs of four: no bank conflict, and one address per
    thread.

    Row = (warp: 4, r: 2, lane: 8), column = (warpgroup: 2, k: D / 16, lane: 4, r: 2); r and k number a
    thread's registers. The sums keep this order; elementwise.py turns it back.
    """
    bits = dq.reshape((4, 2, 8, 2, D // 16, 4, 2))
    return bits.permute((4, 3, 0, 2, 5, 1, 6)).reshape((D // 4, 256))


@gluon.jit
def hand_over(dq, dq_buf, dq_full, dq_empty, step, D: gl.constexpr, NAMED: gl.constexpr):
    """Puts the dQ of ``step`` where the reducer finds it, once the tile before it has been read."""
    mbarrier.wait(dq_empty.index(0), (step & 1) ^ 1)
    dq_buf.store(in_register_order(dq, D))
    fence_async_shared()
    release(dq_full, 0, DQ_BARRIER, NAMED)


@gluon.jit
def scores(step, k_left, q_buf, q_full, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Sᵀ [BN, 64] of the first half of a pair, unfinished, once Q is there."""
    TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16])
    mbarrier.wait(q_full.index(step % STAGES), (step // STAGES) & 1)
    q = q_buf.index(2 * (step % STAGES)).reshape((64, D)).permute((1, 0))
    return warpgroup_mma(k_left, q, gl.zeros((BN, 64), gl.float32, TL), use_acc=False, is_async=True)


@gluon.jit
def probabilities(
    s, lse, m0, place, scale_log2, BN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, TL: gl.constexpr
):
    """Pᵀ [BN, 64] of the queries at ``m0`` from Sᵀ and a buffer of LSE."""
    nb, Sq, Sk, begin, end, wl, wr = place
    if (m0 < begin) | (m0 + 64 > end):
        s = masked_scores(s, m0 - nb * BN + Sk - Sq, Sk - nb * BN, wl, wr, 64, BN, LEFT, RIGHT, TL)
    return gl.exp2(s * scale_log2 - gl.expand_dims(lse.reshape((64,)).load(gl.SliceLayout(0, TL)), 0))


@gluon.jit
def query_block(
    step, mb, dk, dv, bufs, bars, place, scale_log2,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, NAMED: gl.constexpr,
):  # fmt: skip
    """Adds one query block to dK and dV and hands its dQ over; returns (dK, dV).

    S, dP | P while dP runs | dV issued | dS and its store while dV runs | dQ, dK issued | dQ handed over while dK runs.
    """
    q_buf, k_buf, v_buf, do_buf, lse_buf, delta_buf, ds_buf, dq_buf = bufs
    q_full, q_empty, do_full, do_empty, _, dq_full, dq_empty = bars
    nb, Sq, Sk, begin, end, wl, wr = place
    DTYPE: gl.constexpr = k_buf.dtype
    TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BM, 16])  # Sᵀ, dPᵀ [BN, BM]
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])  # dK, dV [BN, D]
    QL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])  # dQ [BM, D], split by columns
    AL: gl.constexpr = gl.DotOperandLayout(0, KL, 2)
    COL: gl.constexpr = gl.SliceLayout(0, TL)
    zero_t = gl.zeros((BN, BM), gl.float32, TL)
    zero_q = gl.zeros((BM, D), gl.float32, QL)
    k = k_buf.reshape((BN, D))
    v = v_buf.reshape((BN, D))
    q_stage = step % STAGES
    do_stage = step % DO_STAGES
    q = q_buf.index(q_stage).reshape((BM, D))
    do = do_buf.index(do_stage).reshape((BM, D))
    mbarrier.wait(q_full.index(q_stage), (step // STAGES) & 1)
    s = warpgroup_mma(k, q.permute((1, 0)), zero_t, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(do_stage), (step // DO_STAGES) & 1)
    dp = warpgroup_mma(v, do.permute((1, 0)), zero_t, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    if (mb * BM < begin) | (mb * BM + BM > end):
        delta_n = mb * BM - nb * BN + Sk - Sq
        s = masked_scores(s, delta_n, Sk - nb * BN, wl, wr, BM, BN, LEFT, RIGHT, TL)
    lse = lse_buf.index(q_stage).reshape((BM,)).load(COL)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 0))
    p_left = gl.convert_layout(p.to(DTYPE), AL)
    dv_next = warpgroup_mma(p_left, do, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    delta = delta_buf.index(do_stage).reshape((BM,)).load(COL)
    ds = (p * (dp - gl.expand_dims(delta, 0))).to(DTYPE)
    ds_buf.permute((1, 0)).store(ds)
    fence_async_shared()
    partition_barrier()  # both warpgroups' halves of dS are there
    dq = warpgroup_mma(ds_buf, k, zero_q, use_acc=False, is_async=True)
    dk_next = warpgroup_mma(gl.convert_layout(ds, AL), q, dk, is_async=True)
    dv = warpgroup_mma_wait(2, deps=(dv_next,))
    release(do_empty, do_stage, DO_BARRIER, NAMED)
    dq = warpgroup_mma_wait(1, deps=(dq,))
    hand_over(dq, dq_buf, dq_full, dq_empty, step, D, NAMED)
    dk = warpgroup_mma_wait(0, deps=(dk_next,))
    release(q_empty, q_stage, Q_BARRIER, NAMED)
    return dk, dv


@gluon.jit
def query_pair(
    step, last, mb, s_a, dk, dv, kv, bufs, bars, place, scale_log2,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, NAMED: gl.constexpr,
):  # fmt: skip
    """As ``query_block`` for 128 queries, in two halves a and b that run into each other, so that the tensor cores work
    during the softmax of either and the warpgroups meet once per 128 queries. Takes S of its first half and returns
    that of the next block; S, dK and dV are finished, for a product in flight from one iteration to the next
    serialises all of them.

    S_b, dP_a issued | P_a | dV_a issued | dS_a | dK_a, dP_b issued | P_b | dV_b issued | dS_b | dK_b, dQ, S_a⁺ issued |
    dQ handed over. The last block issues its own S_a again as the next one's, for nobody: under a branch it would
    serialise the products.
    """
    q_buf, k_buf, v_buf, do_buf, lse_buf, delta_buf, ds_buf, dq_buf = bufs
    q_full, q_empty, do_full, do_empty, _, dq_full, dq_empty = bars
    k_left, v_left = kv
    DTYPE: gl.constexpr = k_buf.dtype
    TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16])  # halves of Sᵀ, dPᵀ [BN, 64]
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])  # dK, dV [BN, D]; dQ [128, D]
    AL: gl.constexpr = gl.DotOperandLayout(0, KL, 2)
    COL: gl.constexpr = gl.SliceLayout(0, TL)
    zero_t = gl.zeros((BN, 64), gl.float32, TL)
    q_stage = step % STAGES
    do_stage = step % DO_STAGES
    q_a = q_buf.index(2 * q_stage).reshape((64, D))
    q_b = q_buf.index(2 * q_stage + 1).reshape((64, D))
    do_a = do_buf.index(2 * do_stage).reshape((64, D))
    do_b = do_buf.index(2 * do_stage + 1).reshape((64, D))

    s_b = warpgroup_mma(k_left, q_b.permute((1, 0)), zero_t, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(do_stage), (step // DO_STAGES) & 1)
    dp_a = warpgroup_mma(v_left, do_a.permute((1, 0)), zero_t, use_acc=False, is_async=True)
    p_a = probabilities(s_a, lse_buf.index(2 * q_stage), mb * 128, place, scale_log2, BN, LEFT, RIGHT, TL)
    dv = warpgroup_mma(gl.convert_layout(p_a.to(DTYPE), AL), do_a, dv, is_async=True)
    s_b, dp_a = warpgroup_mma_wait(1, deps=(s_b, dp_a))
    delta = delta_buf.index(2 * do_stage).reshape((64,)).load(COL)
    ds_a = (p_a * (dp_a - gl.expand_dims(delta, 0))).to(DTYPE)
    dk = warpgroup_mma(gl.convert_layout(ds_a, AL), q_a, dk, is_async=True)
    dp_b = warpgroup_mma(v_left, do_b.permute((1, 0)), zero_t, use_acc=False, is_async=True)

    p_b = probabilities(s_b, lse_buf.index(2 * q_stage + 1), mb * 128 + 64, place, scale_log2, BN, LEFT, RIGHT, TL)
    dv = warpgroup_mma(gl.convert_layout(p_b.to(DTYPE), AL), do_b, dv, is_async=True)
    dp_b = warpgroup_mma_wait(1, deps=(dp_b,))
    delta = delta_buf.index(2 * do_stage + 1).reshape((64,)).load(COL)
    ds_b = (p_b * (dp_b - gl.expand_dims(delta, 0))).to(DTYPE)
    dk = warpgroup_mma(gl.convert_layout(ds_b, AL), q_b, dk, is_async=True)
    ds = gl.join(ds_a, ds_b).permute((0, 2, 1)).reshape((BN, 128))  # [BN, 64] twice -> [BN, 128]
    PL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16])
    ds_buf.permute((1, 0)).store(gl.convert_layout(ds, PL, assert_trivial=True))
    fence_async_shared()
    partition_barrier()  # both warpgroups' halves of dS are there

    zero_q = gl.zeros((128, D), gl.float32, KL)
    dq = warpgroup_mma(ds_buf, k_buf.reshape((BN, D)), zero_q, use_acc=False, is_async=True)
    s_next = scores(gl.minimum(step + 1, last), k_left, q_buf, q_full, BN, D, STAGES)
    dk, dv, dq = warpgroup_mma_wait(1, deps=(dk, dv, dq))
    release(do_empty, do_stage, DO_BARRIER, NAMED)
    release(q_empty, q_stage, Q_BARRIER, NAMED)
    mbarrier.wait(dq_empty.index(0), (step & 1) ^ 1)
    bits = dq.reshape((2, 4, 2, 8, 2, D // 16, 4, 2))  # as in in_register_order, but a warpgroup has all columns
    dq_buf.store(bits.permute((0, 5, 4, 1, 3, 6, 2, 7)).reshape((D // 2, 256)))
    fence_async_shared()
    release(dq_full, 0, DQ_BARRIER, NAMED)
    s_next = warpgroup_mma_wait(0, deps=(s_next,))
    return s_next, dk, dv


@gluon.jit
def query_pairs(
    dk, dv, lo, hi, steps, bufs, bars, place, scale_log2,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, FIRST_STORES: gl.constexpr, NAMED: gl.constexpr,
    KV_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK and dV of ``steps`` > 0 blocks of 128 queries."""
    q_buf, k_buf, v_buf, do_buf, _, _, ds_buf, dq_buf = bufs
    q_full = bars[0]
    k_left = k_buf.reshape((BN, D))
    v_left = v_buf.reshape((BN, D))
    if KV_REGISTERS:
        LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16]), 2)
        k_left = k_left.load(LEFT_OPERAND)
        v_left = v_left.load(LEFT_OPERAND)
    kv = (k_left, v_left)
    blocks = hi - lo
    s = warpgroup_mma_wait(0, deps=(scores(0, k_left, q_buf, q_full, BN, D, STAGES),))
    for step in range(steps):
        mb = visit(lo + step % blocks, lo, hi, FIRST_STORES)
        s, dk, dv = query_pair(
            step, steps - 1, mb, s, dk, dv, kv, bufs, bars, place, scale_log2, BN, D, STAGES, DO_STAGES, LEFT, RIGHT,
            NAMED,
        )  # fmt: skip
    return dk, dv


@gluon.jit
def backward_consumer(
    descs, bufs, bars, ptrs, sizes, window, scale_log2, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    FIRST_STORES: gl.constexpr, NAMED: gl.constexpr, PAIRS: gl.constexpr,
    KV_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Eight warps, BN = 128: each warpgroup owns 64 keys for S, dP, dK and dV, and half the columns of dQ."""
    dk_desc = descs[7]
    dv_desc = descs[8]
    k_buf = bufs[1]
    v_buf = bufs[2]
    kv_full = bars[4]
    sched, cu_q, cu_k, turns = ptrs
    num_n, num_tiles, section, Sq0, Sk0, padded, num_heads_k, group, batch_heads_k = sizes
    wl, wr = window
    DTYPE: gl.constexpr = dk_desc.dtype
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])  # dK, dV [BN, D]
    t = gl.program_id(0)
    if VARLEN:
        num_tiles = gl.load(sched + 1) * num_heads_k
    if t < num_tiles:
        nb, b, hk = decode_tile(t, sched, num_n, num_heads_k, batch_heads_k, section, VARLEN, False)
        start_q, Sq = sequence(b, cu_q, Sq0, VARLEN)
        start_k, Sk = sequence(b, cu_k, Sk0, VARLEN)
        lo, hi = visible_queries(nb * BN, BN, Sq, Sk, wl, wr, BM, LEFT, RIGHT)
        begin, end = unmasked_queries(nb * BN, BN, Sq, Sk, wl, wr, LEFT, RIGHT)
        k = k_buf.reshape((BN, D))
        v = v_buf.reshape((BN, D))
        dk = gl.zeros((BN, D), gl.float32, KL)
        dv = gl.zeros((BN, D), gl.float32, KL)
        mbarrier.wait(kv_full.index(0), 0)
        mbarrier.wait(kv_full.index(1), 0)
        place = (nb, Sq, Sk, begin, end, wl, wr)
        blocks = hi - lo
        steps = group * blocks
        if PAIRS:
            if steps > 0:
                dk, dv = query_pairs(
                    dk, dv, lo, hi, steps, bufs, bars, place, scale_log2, BN, D, STAGES, DO_STAGES, LEFT, RIGHT,
                    FIRST_STORES, NAMED, KV_REGISTERS,
                )  # fmt: skip
        else:
            for step in range(steps):
                mb = visit(lo + step % blocks, lo, hi, FIRST_STORES)
                dk, dv = query_block(
                    step, mb, dk, dv, bufs, bars, place, scale_log2, BM, BN, D, STAGES, DO_STAGES, LEFT, RIGHT, NAMED,
                )  # fmt: skip
        # K and V are dead, once both warpgroups' products are done: their buffers stage dK and dV.
        partition_barrier()
        v.store(dv.to(DTYPE))
        k.store((dk * scale).to(DTYPE))
        fence_async_shared()
        partition_barrier()
        store_tile(dv_desc, v_buf, b, hk, nb * BN, start_k, Sk, VARLEN)
        store_tile(dk_desc, k_buf, b, hk, nb * BN, start_k, Sk, VARLEN)
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "wl", "wr", "num_n", "num_tiles", "section", "Sq", "Sk", "padded", "num_heads_k", "group", "batch_heads_k",
    ]
)  # fmt: skip
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc,  # tiles of 64 (q, do) or BN (k, v) rows, [1, 1, rows, D] or [1, 1, 1, rows, D]
    lse_desc, delta_desc,  # fp32 [rows, padded queries], tiles [1, 64]; LSE in log2 units, +inf where a row is dead
    dq_desc,  # fp32 [rows * padded queries * D / 256, 256], tiles [BM * D / 256, 256]; zeroed, or FIRST_STORES
    dk_desc, dv_desc,  # like k
    sched,  # int32: unused, number of key blocks, their (sequence, block); varlen only
    cu_q, cu_k,  # int32 [B + 1]; varlen only
    turns,  # int32 [rows * padded queries / 64], zero on entry; FIRST_STORES only
    wl, wr,  # window, used where LEFT, RIGHT
    num_n, num_tiles, section, Sq, Sk, padded, num_heads_k, group, batch_heads_k,
    scale_log2, scale,  # softmax scale times log2(e), and itself
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    FIRST_STORES: gl.constexpr, DETERMINISTIC: gl.constexpr, PDL: gl.constexpr, NAMED: gl.constexpr,
    PAIRS: gl.constexpr, KV_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Launch with num_warps=8, one CTA per key block and kv head (varlen: an upper bound of them)."""
    DTYPE: gl.constexpr = q_desc.dtype
    ONE: gl.constexpr = [1, 1, 1] if VARLEN else [1, 1]
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    HALVES: gl.constexpr = BM // 64  # copies and buffers of Q, dO and the statistics are of 64 queries
    q_buf = gl.allocate_shared_memory(DTYPE, [STAGES * HALVES] + ONE + [64, D], q_desc.layout)
    do_buf = gl.allocate_shared_memory(DTYPE, [DO_STAGES * HALVES] + ONE + [64, D], do_desc.layout)
    k_buf = gl.allocate_shared_memory(DTYPE, ONE + [BN, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(DTYPE, ONE + [BN, D], v_desc.layout)
    lse_buf = gl.allocate_shared_memory(gl.float32, [STAGES * HALVES, 1, 64], lse_desc.layout)
    delta_buf = gl.allocate_shared_memory(gl.float32, [DO_STAGES * HALVES, 1, 64], delta_desc.layout)
    ds_buf = gl.allocate_shared_memory(DTYPE, [BM, BN], gl.NVMMASharedLayout.get_default_for([BM, BN], DTYPE))
    dq_buf = gl.allocate_shared_memory(gl.float32, [BM * D // 256, 256], dq_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    do_full = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], BAR)
    do_empty = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], BAR)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    dq_full = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    dq_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(DO_STAGES):
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
    mbarrier.init(dq_full.index(0), count=1)
    mbarrier.init(dq_empty.index(0), count=1)
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dq_desc, dk_desc, dv_desc)
    bufs = (q_buf, k_buf, v_buf, do_buf, lse_buf, delta_buf, ds_buf, dq_buf)
    bars = (q_full, q_empty, do_full, do_empty, kv_full, dq_full, dq_empty)
    ptrs = (sched, cu_q, cu_k, turns)
    sizes = (num_n, num_tiles, section, Sq, Sk, padded, num_heads_k, group, batch_heads_k)
    window = (wl, wr)
    gl.warp_specialize([
        (backward_consumer, (descs, bufs, bars, ptrs, sizes, window, scale_log2, scale, BM, BN, D, STAGES, DO_STAGES,
                             VARLEN, LEFT, RIGHT, FIRST_STORES, NAMED, PAIRS, KV_REGISTERS)),
        (backward_producer, (descs, bufs, bars, ptrs, sizes, window, BM, BN, STAGES, DO_STAGES, VARLEN, LEFT, RIGHT,
                             FIRST_STORES, PDL, NAMED)),
        (backward_reducer, (descs, bufs, bars, ptrs, sizes, window, BM, BN, D, VARLEN, LEFT, RIGHT, FIRST_STORES,
                            DETERMINISTIC, NAMED)),
    ], [1, 1], [24, 24])  # fmt: skip
