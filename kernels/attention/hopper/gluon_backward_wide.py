"""Backward attention for Hopper (sm_90a) in Gluon, head dims 129 to 256: the algorithm, the walk, the scratch memory
and the tensors of gluon_backward.py, for tiles of 64 queries x 64 keys.

At this width one warpgroup's accumulator of 64 rows fills half of its registers, so the products are dealt out by what
they sum up. Each of three warpgroups has one sum and what leads to it, and hands the rest on through shared memory:

    values   Sᵀ = K Qᵀ,  P = exp2(c·log2e·S - LSE₂),  dV += Pᵀ dO      P -> keys
    keys     dPᵀ = V dOᵀ,  dS = P ∘ (dP - δ),         dK += dSᵀ Q      dS -> queries
    queries                                           dQ = dS K        dQ in pieces -> reducer

Pᵀ and dSᵀ are where the tensor cores want the left operand of dV and dK, as in the narrower kernel. The warpgroups run
one behind the other: while one computes exponentials or dS, the products of the other two keep the tensor cores busy.
P reaches ``keys`` in 16 bits, rounded as for dV.
"""

# ruff: noqa: RUF005, RUF059 - as in gluon_backward.py

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
    opaque_zero,
    partition_barrier,
    pass_turn,
    tma_reduce_add,
    tma_store,
    wait_turn,
)
from kernels.attention.hopper.gluon_backward import (
    backward_producer,
    first_keys,
    masked_scores,
    scratch_coordinates,
    unmasked_queries,
    visit,
)
from kernels.attention.hopper.tiles import decode_tile, sequence, store_tile, visible_queries


@gluon.jit
def wide_reducer(
    descs, bufs, bars, ptrs, sizes, window,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DQ_COLUMNS: gl.constexpr, DQ_STAGES: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, FIRST_STORES: gl.constexpr,
    DETERMINISTIC: gl.constexpr,
):  # fmt: skip
    """One warp: adds dQ to the fp32 sums with the copy engine, in pieces of DQ_COLUMNS columns, DQ_STAGES of them in
    flight. A query block's turn is taken before its first piece and passed on after its last."""
    dq_desc = descs[6]
    dq_buf = bufs[7]
    dq_full = bars[5]
    dq_empty = bars[6]
    PIECES: gl.constexpr = D // DQ_COLUMNS
    ROWS: gl.constexpr = DQ_COLUMNS // 4  # of a piece in the sums
    sched, cu_q, cu_k, turns = ptrs
    num_n, num_tiles, section, Sq0, Sk0, padded, num_heads_k, group, batch_heads_k = sizes
    wl, wr = window
    t = gl.program_id(0)
    if VARLEN:
        num_tiles = gl.load(sched + 1) * num_heads_k
    if t < num_tiles:
        nb, b, hk = decode_tile(t, sched, num_n, num_heads_k, batch_heads_k, section, VARLEN, False)
        start_q, Sq = sequence(b, cu_q, Sq0, VARLEN)
        start_k, Sk = sequence(b, cu_k, Sk0, VARLEN)
        lo, hi = visible_queries(nb * BN, BN, Sq, Sk, wl, wr, BM, LEFT, RIGHT)
        number = 0
        for g in range(group):
            row, column = scratch_coordinates(b, hk * group + g, start_q, num_heads_k * group, VARLEN)
            for i in range(lo, hi):
                mb = visit(i, lo, hi, FIRST_STORES)
                tile = (row * padded + column + mb * BM) // BM
                rank = 1
                if FIRST_STORES:
                    rank = nb - first_keys(mb * BM, Sq, Sk, wl, BN, LEFT)
                    if rank > 0:
                        wait_turn(turns + tile, rank if DETERMINISTIC else 1)
                for piece in range(PIECES):
                    slot = number % DQ_STAGES
                    mbarrier.wait(dq_full.index(slot), (number // DQ_STAGES) & 1)
                    place = tile * (D // 4) + piece * ROWS
                    if FIRST_STORES and rank == 0:
                        tma_store(dq_desc, [place, 0], dq_buf.index(slot))
                    else:
                        tma_reduce_add(dq_desc, [place, 0], dq_buf.index(slot))
                    tma.store_wait(DQ_STAGES - 1)
                    number += 1
                    if number >= DQ_STAGES:  # the oldest of DQ_STAGES pieces has been read
                        mbarrier.arrive(dq_empty.index(number % DQ_STAGES), count=1)
                if FIRST_STORES:  # noqa: SIM102 (a constexpr: without it nobody waits)
                    if DETERMINISTIC or rank == 0:
                        pass_turn(turns + tile)
        tma.store_wait(0)


@gluon.jit
def scores(left_buf, right, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr):
    """Start Sᵀ = K Qᵀ, or dPᵀ = V dOᵀ, [BN, BM]; ``right`` is Q or dO."""
    TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    # Otherwise 16 descriptors of K or V stay in registers through the loop: spills, and every product serialised.
    left = left_buf.index(opaque_zero()).reshape((BN, D))
    zero = gl.zeros((BN, BM), gl.float32, TL)
    return warpgroup_mma(left, right.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def values_step(
    step, mb, dv, bufs, bars, place, scale_log2,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """P of a query block, handed to ``keys`` and added to dV, which it returns."""
    q_buf, k_buf, v_buf, do_buf, lse_buf, delta_buf, _, _, p_buf = bufs
    q_full, q_empty, do_full, do_empty, _, _, _, p_full, p_empty, _, _ = bars
    nb, Sq, Sk, begin, end, wl, wr = place
    DTYPE: gl.constexpr = k_buf.dtype
    TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])  # Sᵀ [BN, BM]
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])  # dV [BN, D]
    AL: gl.constexpr = gl.DotOperandLayout(0, KL, 2)
    COL: gl.constexpr = gl.SliceLayout(0, TL)
    q_stage = step % STAGES
    do_stage = step % DO_STAGES
    mbarrier.wait(q_full.index(q_stage), (step // STAGES) & 1)
    s_next = scores(k_buf, q_buf.index(q_stage).reshape((BM, D)), BM, BN, D)
    s = warpgroup_mma_wait(0, deps=(s_next,))
    if (mb * BM < begin) | (mb * BM + BM > end):
        delta_n = mb * BM - nb * BN + Sk - Sq
        s = masked_scores(s, delta_n, Sk - nb * BN, wl, wr, BM, BN, LEFT, RIGHT, TL)
    lse = lse_buf.index(q_stage).reshape((BM,)).load(COL)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 0)).to(DTYPE)
    mbarrier.arrive(q_empty.index(q_stage), count=1)
    mbarrier.wait(p_empty.index(0), (step & 1) ^ 1)
    p_buf.store(p)
    mbarrier.arrive(p_full.index(0), count=1)
    mbarrier.wait(do_full.index(do_stage), (step // DO_STAGES) & 1)
    do = do_buf.index(do_stage).reshape((BM, D))
    dv_next = warpgroup_mma(gl.convert_layout(p, AL), do, dv, is_async=True)
    dv = warpgroup_mma_wait(0, deps=(dv_next,))
    mbarrier.arrive(do_empty.index(do_stage), count=1)
    return dv


@gluon.jit
def next_dp(step, bufs, bars, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DO_STAGES: gl.constexpr):
    """Start dPᵀ of query block number ``step``."""
    v_buf = bufs[2]
    do_buf = bufs[3]
    do_full = bars[2]
    stage = step % DO_STAGES
    mbarrier.wait(do_full.index(stage), (step // DO_STAGES) & 1)
    return scores(v_buf, do_buf.index(stage).reshape((BM, D)), BM, BN, D)


@gluon.jit
def keys_step(
    step, dp, dk, bufs, bars,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """dS of a query block from its finished dPᵀ, handed to ``queries`` and added to dK; returns (dPᵀ, dK). AHEAD: of
    the next block, issued behind dK."""
    q_buf, k_buf, v_buf, do_buf, lse_buf, delta_buf, ds_buf, _, p_buf = bufs
    q_full, q_empty, do_full, do_empty, _, _, _, p_full, p_empty, ds_full, ds_empty = bars
    DTYPE: gl.constexpr = k_buf.dtype
    TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])  # dPᵀ [BN, BM]
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])  # dK [BN, D]
    AL: gl.constexpr = gl.DotOperandLayout(0, KL, 2)
    COL: gl.constexpr = gl.SliceLayout(0, TL)
    q_stage = step % STAGES
    do_stage = step % DO_STAGES
    delta = delta_buf.index(do_stage).reshape((BM,)).load(COL)
    dp = dp - gl.expand_dims(delta, 0)
    mbarrier.arrive(do_empty.index(do_stage), count=1)
    mbarrier.wait(p_full.index(0), step & 1)
    p = p_buf.load(TL)
    mbarrier.arrive(p_empty.index(0), count=1)
    ds = (p.to(gl.float32) * dp).to(DTYPE)
    mbarrier.wait(ds_empty.index(0), (step & 1) ^ 1)
    ds_buf.permute((1, 0)).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(0), count=1)
    mbarrier.wait(q_full.index(q_stage), (step // STAGES) & 1)
    q = q_buf.index(q_stage).reshape((BM, D))
    dk_next = warpgroup_mma(gl.convert_layout(ds, AL), q, dk, is_async=True)
    if AHEAD:
        dp_next = next_dp(step + 1, bufs, bars, BM, BN, D, DO_STAGES)
        dk = warpgroup_mma_wait(1, deps=(dk_next,))
        mbarrier.arrive(q_empty.index(q_stage), count=1)
        dp = warpgroup_mma_wait(0, deps=(dp_next,))
    else:
        dk = warpgroup_mma_wait(0, deps=(dk_next,))
        mbarrier.arrive(q_empty.index(q_stage), count=1)
    return dp, dk


@gluon.jit
def values_consumer(
    descs, bufs, bars, ptrs, sizes, window, scale_log2,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, FIRST_STORES: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``values``: S, P and dV."""
    dv_desc = descs[8]
    q_buf, k_buf, v_buf, do_buf, lse_buf, delta_buf, ds_buf, dq_buf, p_buf = bufs
    q_full, q_empty, do_full, do_empty, kv_full, dq_full, dq_empty, p_full, p_empty, ds_full, ds_empty = bars
    sched, cu_q, cu_k, turns = ptrs
    num_n, num_tiles, section, Sq0, Sk0, padded, num_heads_k, group, batch_heads_k = sizes
    wl, wr = window
    DTYPE: gl.constexpr = dv_desc.dtype
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])  # dV [BN, D]
    t = gl.program_id(0)
    if VARLEN:
        num_tiles = gl.load(sched + 1) * num_heads_k
    if t < num_tiles:
        nb, b, hk = decode_tile(t, sched, num_n, num_heads_k, batch_heads_k, section, VARLEN, False)
        start_q, Sq = sequence(b, cu_q, Sq0, VARLEN)
        start_k, Sk = sequence(b, cu_k, Sk0, VARLEN)
        lo, hi = visible_queries(nb * BN, BN, Sq, Sk, wl, wr, BM, LEFT, RIGHT)
        begin, end = unmasked_queries(nb * BN, BN, Sq, Sk, wl, wr, LEFT, RIGHT)
        place = (nb, Sq, Sk, begin, end, wl, wr)
        dv = gl.zeros((BN, D), gl.float32, KL)
        blocks = hi - lo
        steps = group * blocks
        mbarrier.wait(kv_full.index(0), 0)
        for step in range(steps):
            mb = visit(lo + step % blocks, lo, hi, FIRST_STORES)
            dv = values_step(step, mb, dv, bufs, bars, place, scale_log2, BM, BN, D, STAGES, DO_STAGES, LEFT, RIGHT)
        # Once ``keys`` has read the last P, its products are through with dO, whose buffer stages dV.
        mbarrier.wait(p_empty.index(0), (gl.maximum(steps, 0) & 1) ^ 1)
        do_buf.index(0).reshape((BN, D)).store(dv.to(DTYPE))
        fence_async_shared()
        partition_barrier()
        store_tile(dv_desc, do_buf.index(0), b, hk, nb * BN, start_k, Sk, VARLEN)
        tma.store_wait(0)


@gluon.jit
def keys_consumer(
    descs, bufs, bars, ptrs, sizes, window, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LOOKAHEAD: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``keys``: dP, dS and dK."""
    dk_desc = descs[7]
    q_buf, k_buf, v_buf, do_buf, lse_buf, delta_buf, ds_buf, dq_buf, p_buf = bufs
    q_full, q_empty, do_full, do_empty, kv_full, dq_full, dq_empty, p_full, p_empty, ds_full, ds_empty = bars
    sched, cu_q, cu_k, turns = ptrs
    num_n, num_tiles, section, Sq0, Sk0, padded, num_heads_k, group, batch_heads_k = sizes
    wl, wr = window
    DTYPE: gl.constexpr = dk_desc.dtype
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])  # dK [BN, D]
    t = gl.program_id(0)
    if VARLEN:
        num_tiles = gl.load(sched + 1) * num_heads_k
    if t < num_tiles:
        nb, b, hk = decode_tile(t, sched, num_n, num_heads_k, batch_heads_k, section, VARLEN, False)
        start_q, Sq = sequence(b, cu_q, Sq0, VARLEN)
        start_k, Sk = sequence(b, cu_k, Sk0, VARLEN)
        lo, hi = visible_queries(nb * BN, BN, Sq, Sk, wl, wr, BM, LEFT, RIGHT)
        dk = gl.zeros((BN, D), gl.float32, KL)
        mbarrier.wait(kv_full.index(1), 0)
        steps = group * (hi - lo)
        if LOOKAHEAD:
            if steps > 0:
                dp_next = next_dp(0, bufs, bars, BM, BN, D, DO_STAGES)
                dp = warpgroup_mma_wait(0, deps=(dp_next,))
                for step in range(steps - 1):
                    dp, dk = keys_step(step, dp, dk, bufs, bars, BM, BN, D, STAGES, DO_STAGES, True)
                dp, dk = keys_step(steps - 1, dp, dk, bufs, bars, BM, BN, D, STAGES, DO_STAGES, False)
        else:
            for step in range(steps):
                dp_next = next_dp(step, bufs, bars, BM, BN, D, DO_STAGES)
                dp = warpgroup_mma_wait(0, deps=(dp_next,))
                dp, dk = keys_step(step, dp, dk, bufs, bars, BM, BN, D, STAGES, DO_STAGES, False)
        # V is dead: its buffer stages dK.
        v_buf.index(0).reshape((BN, D)).store((dk * scale).to(DTYPE))
        fence_async_shared()
        partition_barrier()
        store_tile(dk_desc, v_buf.index(0), b, hk, nb * BN, start_k, Sk, VARLEN)
        tma.store_wait(0)


@gluon.jit
def in_register_order(dq, COLUMNS: gl.constexpr):
    """dQ [64, COLUMNS] of one warpgroup -> [COLUMNS / 4, 256], each thread's values in runs of four.

    Row = (warp: 4, r: 2, lane: 8), column = (k: COLUMNS / 8, lane: 4, r: 2); r and k number a thread's registers. The
    sums keep this order, k outermost; elementwise.py turns it back.
    """
    bits = dq.reshape((4, 2, 8, COLUMNS // 8, 4, 2))
    return bits.permute((3, 0, 2, 4, 1, 5)).reshape((COLUMNS // 4, 256))


@gluon.jit
def hand_over(piece, number, dq_buf, dq_full, dq_empty, DQ_STAGES: gl.constexpr):
    """Give piece ``number`` of this CTA's dQ to the reducer."""
    slot = number % DQ_STAGES
    mbarrier.wait(dq_empty.index(slot), ((number // DQ_STAGES) & 1) ^ 1)
    dq_buf.index(slot).store(piece)
    fence_async_shared()
    mbarrier.arrive(dq_full.index(slot), count=1)


@gluon.jit
def queries_consumer(
    bufs, bars, ptrs, sizes, window,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DQ_COLUMNS: gl.constexpr, DQ_STAGES: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``queries``: dQ, PART columns at a time, which leaves registers to the other two."""
    k_buf = bufs[1]
    ds_buf = bufs[6]
    dq_buf = bufs[7]
    q_full, q_empty, do_full, do_empty, kv_full, dq_full, dq_empty, p_full, p_empty, ds_full, ds_empty = bars
    sched, cu_q, cu_k, turns = ptrs
    num_n, num_tiles, section, Sq0, Sk0, padded, num_heads_k, group, batch_heads_k = sizes
    wl, wr = window
    PART: gl.constexpr = 64
    QL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])  # dQ [BM, PART]
    t = gl.program_id(0)
    if VARLEN:
        num_tiles = gl.load(sched + 1) * num_heads_k
    if t < num_tiles:
        nb, b, hk = decode_tile(t, sched, num_n, num_heads_k, batch_heads_k, section, VARLEN, False)
        start_q, Sq = sequence(b, cu_q, Sq0, VARLEN)
        start_k, Sk = sequence(b, cu_k, Sk0, VARLEN)
        lo, hi = visible_queries(nb * BN, BN, Sq, Sk, wl, wr, BM, LEFT, RIGHT)
        zero = gl.zeros((BM, PART), gl.float32, QL)
        number = 0
        mbarrier.wait(kv_full.index(0), 0)
        for step in range(group * (hi - lo)):
            mbarrier.wait(ds_full.index(0), step & 1)
            for part in gl.static_range(D // PART):
                k = k_buf.index(opaque_zero()).reshape((BN, D))
                k_part = k.slice(part * PART, PART, dim=1)
                dq_next = warpgroup_mma(ds_buf, k_part, zero, use_acc=False, is_async=True)
                dq = warpgroup_mma_wait(0, deps=(dq_next,))
                if part == D // PART - 1:
                    mbarrier.arrive(ds_empty.index(0), count=1)
                dq = in_register_order(dq, PART)
                if DQ_COLUMNS == PART:
                    hand_over(dq, number, dq_buf, dq_full, dq_empty, DQ_STAGES)
                    number += 1
                else:
                    gl.static_assert(DQ_COLUMNS == PART // 2)
                    left, right = gl.split(dq.reshape((2, PART // 8, 256)).permute((1, 2, 0)))
                    hand_over(left, number, dq_buf, dq_full, dq_empty, DQ_STAGES)
                    hand_over(right, number + 1, dq_buf, dq_full, dq_empty, DQ_STAGES)
                    number += 2


@gluon.jit(
    do_not_specialize=[
        "wl", "wr", "num_n", "num_tiles", "section", "Sq", "Sk", "padded", "num_heads_k", "group", "batch_heads_k",
    ]
)  # fmt: skip
def backward_wide_kernel(
    q_desc, k_desc, v_desc, do_desc,  # tiles of BM (q, do) or BN (k, v) rows, [1, 1, rows, D] or [1, 1, 1, rows, D]
    lse_desc, delta_desc,  # fp32 [rows, padded queries], tiles [1, BM]; LSE in log2 units, +inf where a row is dead
    dq_desc,  # fp32 [rows * padded queries * D / 256, 256], tiles [DQ_COLUMNS / 4, 256]; zeroed, or FIRST_STORES
    dk_desc, dv_desc,  # like k
    sched,  # int32: unused, number of key blocks, their (sequence, block); varlen only
    cu_q, cu_k,  # int32 [B + 1]; varlen only
    turns,  # int32 [rows * padded queries / BM], zero on entry; FIRST_STORES only
    wl, wr,  # window, used where LEFT, RIGHT
    num_n, num_tiles, section, Sq, Sk, padded, num_heads_k, group, batch_heads_k,
    scale_log2, scale,  # softmax scale times log2(e), and itself
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    DQ_COLUMNS: gl.constexpr, DQ_STAGES: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LOOKAHEAD: gl.constexpr,
    FIRST_STORES: gl.constexpr, DETERMINISTIC: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Launch with num_warps=4, one CTA per key block and kv head (varlen: an upper bound of them)."""
    gl.static_assert(BM == 64 and BN == 64)
    DTYPE: gl.constexpr = q_desc.dtype
    ONE: gl.constexpr = [1, 1, 1] if VARLEN else [1, 1]
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    PAIR: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN], DTYPE)
    q_buf = gl.allocate_shared_memory(DTYPE, [STAGES] + ONE + [BM, D], q_desc.layout)
    do_buf = gl.allocate_shared_memory(DTYPE, [DO_STAGES] + ONE + [BM, D], do_desc.layout)
    k_buf = gl.allocate_shared_memory(DTYPE, [1] + ONE + [BN, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(DTYPE, [1] + ONE + [BN, D], v_desc.layout)
    lse_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], lse_desc.layout)
    delta_buf = gl.allocate_shared_memory(gl.float32, [DO_STAGES, 1, BM], delta_desc.layout)
    p_buf = gl.allocate_shared_memory(DTYPE, [BN, BM], PAIR)
    ds_buf = gl.allocate_shared_memory(DTYPE, [BM, BN], PAIR)
    dq_buf = gl.allocate_shared_memory(gl.float32, [DQ_STAGES, DQ_COLUMNS // 4, 256], dq_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    do_full = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], BAR)
    do_empty = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], BAR)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    dq_full = gl.allocate_shared_memory(gl.int64, [DQ_STAGES, 1], BAR)
    dq_empty = gl.allocate_shared_memory(gl.int64, [DQ_STAGES, 1], BAR)
    p_full = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    p_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    ds_full = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    ds_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)  # S and dK read Q
    for i in gl.static_range(DO_STAGES):
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_empty.index(i), count=2)  # dV and dP read dO
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
    for i in gl.static_range(DQ_STAGES):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_empty.index(i), count=1)
    mbarrier.init(p_full.index(0), count=1)
    mbarrier.init(p_empty.index(0), count=1)
    mbarrier.init(ds_full.index(0), count=1)
    mbarrier.init(ds_empty.index(0), count=1)
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dq_desc, dk_desc, dv_desc)
    loads = (q_buf, k_buf.index(0), v_buf.index(0), do_buf, lse_buf, delta_buf, ds_buf, dq_buf)
    bufs = (q_buf, k_buf, v_buf, do_buf, lse_buf, delta_buf, ds_buf, dq_buf, p_buf)
    load_bars = (q_full, q_empty, do_full, do_empty, kv_full, dq_full, dq_empty)
    bars = load_bars + (p_full, p_empty, ds_full, ds_empty)
    ptrs = (sched, cu_q, cu_k, turns)
    sizes = (num_n, num_tiles, section, Sq, Sk, padded, num_heads_k, group, batch_heads_k)
    window = (wl, wr)
    # Registers: dS in flight beside the next dP takes more of them. ``values`` gets the rest of 512: 208 or 192.
    KEYS_REGS: gl.constexpr = 224 if LOOKAHEAD else 208
    gl.warp_specialize([
        (values_consumer, (descs, bufs, bars, ptrs, sizes, window, scale_log2, BM, BN, D, STAGES, DO_STAGES,
                           VARLEN, LEFT, RIGHT, FIRST_STORES)),
        (keys_consumer, (descs, bufs, bars, ptrs, sizes, window, scale, BM, BN, D, STAGES, DO_STAGES,
                         VARLEN, LEFT, RIGHT, LOOKAHEAD)),
        (queries_consumer, (bufs, bars, ptrs, sizes, window, BM, BN, D, DQ_COLUMNS, DQ_STAGES, VARLEN, LEFT, RIGHT)),
        (backward_producer, (descs, loads, load_bars, ptrs, sizes, window, BM, BN, STAGES, DO_STAGES, VARLEN, LEFT,
                             RIGHT, FIRST_STORES, PDL, False)),
        (wide_reducer, (descs, loads, load_bars, ptrs, sizes, window, BM, BN, D, DQ_COLUMNS, DQ_STAGES, VARLEN, LEFT,
                        RIGHT, FIRST_STORES, DETERMINISTIC)),
    ], [4, 4, 1, 1], [KEYS_REGS, 72, 24, 24])  # fmt: skip
