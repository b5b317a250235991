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

Five partitions: ``values``, ``keys`` and ``queries`` of four warps each, the producer (gluon_backward.py's) and the
reducer of one. What the producer copies: K and V once, Q with LSE and dO with delta through rings.

    K, Q, LSE, dO    ==> values                                        dV at the end
                           | P
    V, dO, delta, Q  ==> keys                                          dK at the end
                           | dS
    K                ==> queries == dQ in pieces ==> reducer == add ==> sums

Time running to the right, one line per warpgroup, i numbers query blocks:

    values    S_i   P_i | dV_i  | S_i+1   P_i+1  | dV_i+1
    keys                | dP_i (LOOKAHEAD: issued behind dK_i-1)  dS_i | dK_i
    queries                                            dQ_i-1          | dQ_i, 64 columns at a time

What guards what, beside gluon_backward.py's barriers (rings.py explains full, empty and phases):

    q_empty    two arrivals: values is done with S and LSE, keys with dK
    do_empty   two arrivals: values is done with dV, keys with dP and delta
    p_full/p_empty    P is in shared memory / keys has read it
    ds_full/ds_empty  dS is in shared memory / the last product of dQ has read it
    dq_full/dq_empty  a ring of DQ_STAGES pieces; a piece is empty once the copy engine has read it

A head dim of 192 is two pieces (pieces.py): S and dP sum a product for each, dV and dK have one each, and dQ's slices
are of one piece or the other. Every other one is a single piece.

What has to hold: each of the five partitions makes the same steps in the same order; pieces of dQ are numbered through.
"""

# ruff: noqa: RUF005 - as in gluon_backward.py

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

from kernels.attention.hopper.compat import (
    opaque_zero,
    partition_barrier,
    pass_turn,
    tma_reduce_add,
    tma_store,
    wait_turn,
)
from kernels.attention.hopper.gluon_backward import (
    Barriers,
    Buffers,
    Descriptors,
    Edges,
    Problem,
    backward_producer,
    count_tiles,
    first_keys,
    hide_keys,
    locate_keys,
    unmasked_queries,
    visit,
)
from kernels.attention.hopper.pieces import PIECE, allocate_pieces, matrix, one_of, wait_for
from kernels.attention.hopper.rings import await_full
from kernels.attention.hopper.sums import SUM_COLUMNS, scratch_coordinates
from kernels.attention.hopper.tiles import store_tile

PART = gl.constexpr(64)
"""Columns of dQ that ``queries`` multiplies at a time, which leaves registers to the other two."""


class WideBuffers(NamedTuple):
    """As gluon_backward.Buffers, with P's; Q, K, V and dO are tuples of pieces, K and V with one buffer each."""

    q: Any
    k: Any
    v: Any
    do: Any
    lse: Any
    delta: Any
    ds: Any
    """[BM, BN]: from ``keys`` to ``queries``."""
    dq: Any
    """fp32: DQ_STAGES pieces of DQ_COLUMNS columns, in register order, from ``queries`` to the reducer."""
    p: Any
    """[BN, BM]: from ``values`` to ``keys``."""


class WideBarriers(NamedTuple):
    """Arrays of mbarriers; the module's docstring says what they guard."""

    q_full: Any
    q_empty: Any
    do_full: Any
    do_empty: Any
    kv_full: Any
    dq_full: Any
    dq_empty: Any
    p_full: Any
    p_empty: Any
    ds_full: Any
    ds_empty: Any


class WideConfig(NamedTuple):
    """The kernel's constants; see ``backward_wide_kernel``, and tuning.WideBackwardTile for the switches."""

    BM: Any
    BN: Any
    D: Any
    STAGES: Any
    DO_STAGES: Any
    DQ_COLUMNS: Any
    DQ_STAGES: Any
    VARLEN: Any
    LEFT: Any
    RIGHT: Any
    LOOKAHEAD: Any
    FIRST_STORES: Any
    DETERMINISTIC: Any
    PDL: Any
    NAMED_Q: Any
    NAMED_DO: Any
    """0: mbarriers release Q and dO."""


@gluon.jit
def wide_reducer(descs, bufs, bars, prob, C: gl.constexpr):
    """One warp: adds dQ to the fp32 sums with the copy engine, in pieces of DQ_COLUMNS columns, DQ_STAGES of them in
    flight. A query block's turn is taken before its first piece and passed on after its last."""
    PIECES: gl.constexpr = C.D // C.DQ_COLUMNS
    PIECE_ROWS: gl.constexpr = C.DQ_COLUMNS // 4  # in the sums
    t = gl.program_id(0)
    num_tiles = count_tiles(prob, C.VARLEN)
    if t < num_tiles:
        keys = locate_keys(t, prob, C)
        number = 0
        for g in range(prob.group):
            h = keys.hk * prob.group + g
            row, column = scratch_coordinates(keys.b, h, keys.start_q, prob.num_heads_k * prob.group, C.VARLEN)
            for i in range(keys.lo, keys.hi):
                mb = visit(i, keys.lo, keys.hi, C.FIRST_STORES)
                tile = (row * prob.padded + column + mb * C.BM) // C.BM
                rank = 1
                if C.FIRST_STORES:
                    rank = keys.nb - first_keys(mb * C.BM, keys.Sq, keys.Sk, prob.wl, C.BN, C.LEFT)
                    if rank > 0:
                        wait_turn(prob.turns + tile, rank if C.DETERMINISTIC else 1)
                for piece in range(PIECES):
                    slot = number % C.DQ_STAGES
                    await_full(bars.dq_full, number, C.DQ_STAGES)
                    place = tile * (C.D // 4) + piece * PIECE_ROWS
                    if C.FIRST_STORES and rank == 0:
                        tma_store(descs.dq, [place, 0], bufs.dq.index(slot))
                    else:
                        tma_reduce_add(descs.dq, [place, 0], bufs.dq.index(slot))
                    tma.store_wait(C.DQ_STAGES - 1)
                    number += 1
                    if number >= C.DQ_STAGES:  # the oldest of DQ_STAGES pieces has been read
                        mbarrier.arrive(bars.dq_empty.index(number % C.DQ_STAGES), count=1)
                if C.FIRST_STORES:  # noqa: SIM102 (a constexpr: without it nobody waits)
                    if C.DETERMINISTIC or rank == 0:
                        pass_turn(prob.turns + tile)
        tma.store_wait(0)


@gluon.jit
def scores(left_bufs, right_bufs, stage, C: gl.constexpr):
    """Start Sᵀ = K Qᵀ, or dPᵀ = V dOᵀ, [BN, BM], a product for each piece; ``right_bufs`` are Q's or dO's."""
    TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    s = gl.zeros((C.BN, C.BM), gl.float32, TL)
    for i in gl.static_range(len(left_bufs)):
        right = matrix(right_bufs[i], stage, C.BM)
        # Otherwise the descriptors of K or V stay in registers through the loop: spills, and every product serialised.
        left = matrix(left_bufs[i], opaque_zero(), C.BN)
        s = warpgroup_mma(left, right.permute((1, 0)), s, use_acc=i > 0, is_async=True)
    return s


@gluon.jit
def zero_sum(COLUMNS: gl.constexpr, C: gl.constexpr):
    """fp32 [BN, COLUMNS] for sums of products, which have 128 columns at most."""
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128 if COLUMNS > 128 else COLUMNS, 16])
    return gl.zeros((C.BN, COLUMNS), gl.float32, KL)


@gluon.jit
def zero_sums(bufs, C: gl.constexpr):
    """dV's or dK's pieces before the first query block."""
    sums = ()
    for i in gl.static_range(len(bufs)):
        sums = sums + (zero_sum(bufs[i].shape[len(bufs[i].shape) - 1], C),)  # type: ignore[assignment]
    return sums


@gluon.jit
def add_products(left, right_bufs, stage, sums, C: gl.constexpr):
    """Start dV + Pᵀ dO, or dK + dSᵀ Q, of a query block, a product for each piece."""
    started = ()
    for i in gl.static_range(len(sums)):
        right = matrix(right_bufs[i], stage, C.BM)
        operand = gl.convert_layout(left, gl.DotOperandLayout(0, sums[i].type.layout, 2))
        started = started + (warpgroup_mma(operand, right, sums[i], is_async=True),)  # type: ignore[assignment]
    return started


@gluon.jit
def scaled(sums, scale):
    """The pieces times ``scale``."""
    products = ()
    for i in gl.static_range(len(sums)):
        products = products + (sums[i] * scale,)
    return products


@gluon.jit
def store_sums(sums, descs, bufs, keys, C: gl.constexpr):
    """dV or dK, 16 bit, by way of ``bufs``, which nobody reads any more, to global memory."""
    for i in gl.static_range(len(sums)):
        matrix(bufs[i], 0, C.BN).store(sums[i].to(descs[i].dtype))
    fence_async_shared()
    partition_barrier()
    for i in gl.static_range(len(sums)):
        row = keys.nb * C.BN
        store_tile(descs[i], bufs[i].index(0), keys.b, keys.hk, row, keys.start_k, keys.Sk, C.VARLEN, i * PIECE)
    tma.store_wait(0)


@gluon.jit
def values_step(step, mb, dv, bufs, bars, edges, scale_log2, C: gl.constexpr):
    """P of a query block, handed to ``keys`` and added to dV, which it returns."""
    DTYPE: gl.constexpr = bufs.k[0].dtype
    TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])  # Sᵀ [BN, BM]
    q_stage = step % C.STAGES
    do_stage = step % C.DO_STAGES
    await_full(bars.q_full, step, C.STAGES)
    s_next = scores(bufs.k, bufs.q, q_stage, C)
    s = warpgroup_mma_wait(0, deps=(s_next,))
    s = hide_keys(s, mb * C.BM, C.BM, edges, C)
    lse = bufs.lse.index(q_stage).reshape((C.BM,)).load(gl.SliceLayout(0, TL))
    p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 0)).to(DTYPE)
    mbarrier.arrive(bars.q_empty.index(q_stage), count=1)
    mbarrier.wait(bars.p_empty.index(0), (step & 1) ^ 1)
    bufs.p.store(p)
    mbarrier.arrive(bars.p_full.index(0), count=1)
    await_full(bars.do_full, step, C.DO_STAGES)
    dv = wait_for(add_products(p, bufs.do, do_stage, dv, C), 0)
    mbarrier.arrive(bars.do_empty.index(do_stage), count=1)
    return dv


@gluon.jit
def next_dp(step, bufs, bars, C: gl.constexpr):
    """Start dPᵀ of query block number ``step``."""
    stage = step % C.DO_STAGES
    await_full(bars.do_full, step, C.DO_STAGES)
    return scores(bufs.v, bufs.do, stage, C)


@gluon.jit
def keys_step(step, dp, dk, bufs, bars, AHEAD: gl.constexpr, C: gl.constexpr):
    """dS of a query block from its finished dPᵀ, handed to ``queries`` and added to dK; returns (dPᵀ, dK). AHEAD: of
    the next block, issued behind dK."""
    DTYPE: gl.constexpr = bufs.k[0].dtype
    TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])  # dPᵀ [BN, BM]
    q_stage = step % C.STAGES
    do_stage = step % C.DO_STAGES
    delta = bufs.delta.index(do_stage).reshape((C.BM,)).load(gl.SliceLayout(0, TL))
    dp = dp - gl.expand_dims(delta, 0)
    mbarrier.arrive(bars.do_empty.index(do_stage), count=1)
    mbarrier.wait(bars.p_full.index(0), step & 1)
    p = bufs.p.load(TL)
    mbarrier.arrive(bars.p_empty.index(0), count=1)
    ds = (p.to(gl.float32) * dp).to(DTYPE)
    mbarrier.wait(bars.ds_empty.index(0), (step & 1) ^ 1)
    bufs.ds.permute((1, 0)).store(ds)
    fence_async_shared()  # dQ's products read it
    mbarrier.arrive(bars.ds_full.index(0), count=1)
    await_full(bars.q_full, step, C.STAGES)
    dk_next = add_products(ds, bufs.q, q_stage, dk, C)
    if AHEAD:
        dp_next = next_dp(step + 1, bufs, bars, C)
        dk = wait_for(dk_next, len(bufs.v))
        mbarrier.arrive(bars.q_empty.index(q_stage), count=1)
        dp = warpgroup_mma_wait(0, deps=(dp_next,))
    else:
        dk = wait_for(dk_next, 0)
        mbarrier.arrive(bars.q_empty.index(q_stage), count=1)
    return dp, dk


@gluon.jit
def values_consumer(descs, bufs, bars, prob, scale_log2, C: gl.constexpr):
    """Warpgroup ``values``: S, P and dV."""
    t = gl.program_id(0)
    num_tiles = count_tiles(prob, C.VARLEN)
    if t < num_tiles:
        keys = locate_keys(t, prob, C)
        lo, hi = keys.lo, keys.hi
        n0 = keys.nb * C.BN
        begin, end = unmasked_queries(n0, C.BN, keys.Sq, keys.Sk, prob.wl, prob.wr, C.LEFT, C.RIGHT)
        edges = Edges(nb=keys.nb, Sq=keys.Sq, Sk=keys.Sk, begin=begin, end=end, wl=prob.wl, wr=prob.wr)
        dv = zero_sums(bufs.do, C)
        blocks = hi - lo
        steps = prob.group * blocks
        mbarrier.wait(bars.kv_full.index(0), 0)
        for step in range(steps):
            mb = visit(lo + step % blocks, lo, hi, C.FIRST_STORES)
            dv = values_step(step, mb, dv, bufs, bars, edges, scale_log2, C)
        # Once ``keys`` has read the last P, its products are through with dO, whose buffer stages dV.
        mbarrier.wait(bars.p_empty.index(0), (gl.maximum(steps, 0) & 1) ^ 1)
        store_sums(dv, descs.dv, bufs.do, keys, C)


@gluon.jit
def keys_consumer(descs, bufs, bars, prob, scale, C: gl.constexpr):
    """Warpgroup ``keys``: dP, dS and dK."""
    t = gl.program_id(0)
    num_tiles = count_tiles(prob, C.VARLEN)
    if t < num_tiles:
        keys = locate_keys(t, prob, C)
        dk = zero_sums(bufs.q, C)
        mbarrier.wait(bars.kv_full.index(1), 0)
        steps = prob.group * (keys.hi - keys.lo)
        if C.LOOKAHEAD:
            if steps > 0:
                dp_next = next_dp(0, bufs, bars, C)
                dp = warpgroup_mma_wait(0, deps=(dp_next,))
                for step in range(steps - 1):
                    dp, dk = keys_step(step, dp, dk, bufs, bars, True, C)
                dp, dk = keys_step(steps - 1, dp, dk, bufs, bars, False, C)
        else:
            for step in range(steps):
                dp_next = next_dp(step, bufs, bars, C)
                dp = warpgroup_mma_wait(0, deps=(dp_next,))
                dp, dk = keys_step(step, dp, dk, bufs, bars, False, C)
        # V is dead: its buffer stages dK.
        store_sums(scaled(dk, scale), descs.dk, bufs.v, keys, C)


@gluon.jit
def in_register_order(dq, COLUMNS: gl.constexpr):
    """dQ [64, COLUMNS] of one warpgroup -> [COLUMNS / 4, 256], each thread's values in runs of four.

    Row = (warp: 4, r: 2, lane: 8), column = (k: COLUMNS / 8, lane: 4, r: 2); r and k number a thread's registers. The
    sums keep this order, k outermost; elementwise.py turns it back.
    """
    bits = dq.reshape((4, 2, 8, COLUMNS // 8, 4, 2))
    return bits.permute((3, 0, 2, 4, 1, 5)).reshape((COLUMNS // 4, SUM_COLUMNS))


@gluon.jit
def hand_over(piece, number, bufs, bars, STAGES: gl.constexpr):
    """Give piece ``number`` of this CTA's dQ to the reducer."""
    slot = number % STAGES
    mbarrier.wait(bars.dq_empty.index(slot), ((number // STAGES) & 1) ^ 1)
    bufs.dq.index(slot).store(piece)
    fence_async_shared()
    mbarrier.arrive(bars.dq_full.index(slot), count=1)


@gluon.jit
def hand_over_columns(dq, number, bufs, bars, C: gl.constexpr):
    """Give PART columns of dQ to the reducer, in pieces from ``number`` on; returns the next one's number."""
    if C.DQ_COLUMNS == PART:
        hand_over(dq, number, bufs, bars, C.DQ_STAGES)
        return number + 1
    else:
        gl.static_assert(C.DQ_COLUMNS == PART // 2)
        left, right = gl.split(dq.reshape((2, PART // 8, SUM_COLUMNS)).permute((1, 2, 0)))
        hand_over(left, number, bufs, bars, C.DQ_STAGES)
        hand_over(right, number + 1, bufs, bars, C.DQ_STAGES)
        return number + 2


@gluon.jit
def queries_consumer(bufs, bars, prob, C: gl.constexpr):
    """Warpgroup ``queries``: dQ, PART columns at a time."""
    QL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])  # dQ [BM, PART]
    t = gl.program_id(0)
    num_tiles = count_tiles(prob, C.VARLEN)
    if t < num_tiles:
        keys = locate_keys(t, prob, C)
        FIRST: gl.constexpr = bufs.k[0].shape[len(bufs.k[0].shape) - 1]  # columns of the first piece
        zero = gl.zeros((C.BM, PART), gl.float32, QL)
        number = 0
        mbarrier.wait(bars.kv_full.index(0), 0)
        for step in range(prob.group * (keys.hi - keys.lo)):
            mbarrier.wait(bars.ds_full.index(0), step & 1)
            for part in gl.static_range(C.D // PART):
                k = matrix(bufs.k[part * PART // FIRST], opaque_zero(), C.BN)
                k_part = k.slice(part * PART % FIRST, PART, dim=1)
                dq_next = warpgroup_mma(bufs.ds, k_part, zero, use_acc=False, is_async=True)
                dq = warpgroup_mma_wait(0, deps=(dq_next,))
                if part == C.D // PART - 1:
                    mbarrier.arrive(bars.ds_empty.index(0), count=1)
                number = hand_over_columns(in_register_order(dq, PART), number, bufs, bars, C)


@gluon.jit(
    do_not_specialize=[
        "wl", "wr", "num_n", "num_tiles", "section", "Sq", "Sk", "padded", "num_heads_k", "group", "batch_heads_k",
    ]
)  # fmt: skip
def backward_wide_kernel(
    q_desc, k_desc, v_desc, do_desc,  # tiles [1, 1, rows, D], varlen [1, 1, 1, rows, D]; BM or BN rows; D = 192: 128
    q_tail, k_tail, v_tail, do_tail,  # D = 192: as above, tiles of 64 columns; otherwise None
    lse_desc, delta_desc,  # fp32 [rows, padded queries], tiles [1, BM]; LSE in log2 units, +inf where a row is dead
    dq_desc,  # fp32 [rows * padded queries * D / 256, 256], tiles [DQ_COLUMNS / 4, 256]; zeroed, or FIRST_STORES
    dk_desc, dv_desc, dk_tail, dv_tail,  # like k
    sched,  # int32: unused, number of key blocks, their (sequence, block); varlen only
    cu_q, cu_k,  # int32 [B + 1]; varlen only
    turns,  # int32 [rows * padded queries / BM], zero on entry; FIRST_STORES only
    wl, wr,  # window, used where LEFT, RIGHT
    num_n, num_tiles, section, Sq, Sk, padded, num_heads_k, group, batch_heads_k,
    scale_log2, scale,  # softmax scale times log2(e), and itself
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    DQ_COLUMNS: gl.constexpr, DQ_STAGES: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LOOKAHEAD: gl.constexpr,
    KEYS_REGS: gl.constexpr, QUERIES_REGS: gl.constexpr,
    FIRST_STORES: gl.constexpr, DETERMINISTIC: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Launch with num_warps=4, one CTA per key block and kv head (varlen: an upper bound of them).
    Registers a thread: ``values`` gets what KEYS_REGS, QUERIES_REGS and the two single warps' 24 leave of 512."""
    gl.static_assert(BM == 64 and BN == 64)
    DTYPE: gl.constexpr = q_desc.dtype
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    PAIR: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN], DTYPE)
    if q_tail is None:
        descs = Descriptors(
            q=(q_desc,), k=(k_desc,), v=(v_desc,), do=(do_desc,), lse=lse_desc, delta=delta_desc, dq=dq_desc,
            dk=(dk_desc,), dv=(dv_desc,),
        )  # fmt: skip
    else:
        descs = Descriptors(
            q=(q_desc, q_tail), k=(k_desc, k_tail), v=(v_desc, v_tail), do=(do_desc, do_tail), lse=lse_desc,
            delta=delta_desc, dq=dq_desc, dk=(dk_desc, dk_tail), dv=(dv_desc, dv_tail),
        )  # fmt: skip
    q_bufs = allocate_pieces(descs.q, STAGES)
    do_bufs = allocate_pieces(descs.do, DO_STAGES)
    k_bufs = allocate_pieces(descs.k, 1)
    v_bufs = allocate_pieces(descs.v, 1)
    lse_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], lse_desc.layout)
    delta_buf = gl.allocate_shared_memory(gl.float32, [DO_STAGES, 1, BM], delta_desc.layout)
    p_buf = gl.allocate_shared_memory(DTYPE, [BN, BM], PAIR)
    ds_buf = gl.allocate_shared_memory(DTYPE, [BM, BN], PAIR)
    dq_buf = gl.allocate_shared_memory(gl.float32, [DQ_STAGES, DQ_COLUMNS // 4, SUM_COLUMNS], dq_desc.layout)
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
    loads = Buffers(
        q=q_bufs, k=one_of(k_bufs, 0), v=one_of(v_bufs, 0), do=do_bufs, lse=lse_buf, delta=delta_buf, ds=ds_buf,
        dq=dq_buf, sums=None, slot=None,
    )  # fmt: skip
    bufs = WideBuffers(
        q=q_bufs, k=k_bufs, v=v_bufs, do=do_bufs, lse=lse_buf, delta=delta_buf, ds=ds_buf, dq=dq_buf, p=p_buf
    )
    load_bars = Barriers(
        q_full=q_full, q_empty=q_empty, do_full=do_full, do_empty=do_empty, kv_full=kv_full, dq_full=dq_full,
        dq_empty=dq_empty, sums_full=None, sums_empty=None, kv_empty=None, slot_full=None, slot_empty=None,
    )  # fmt: skip
    bars = WideBarriers(
        q_full=q_full, q_empty=q_empty, do_full=do_full, do_empty=do_empty, kv_full=kv_full, dq_full=dq_full,
        dq_empty=dq_empty, p_full=p_full, p_empty=p_empty, ds_full=ds_full, ds_empty=ds_empty,
    )  # fmt: skip
    prob = Problem(
        sched=sched, cu_q=cu_q, cu_k=cu_k, turns=turns, counter=None, num_n=num_n, num_tiles=num_tiles, section=section,
        Sq=Sq, Sk=Sk, padded=padded, num_heads_k=num_heads_k, group=group, batch_heads_k=batch_heads_k, wl=wl, wr=wr,
    )  # fmt: skip
    C: gl.constexpr = WideConfig(
        BM=BM, BN=BN, D=D, STAGES=STAGES, DO_STAGES=DO_STAGES, DQ_COLUMNS=DQ_COLUMNS, DQ_STAGES=DQ_STAGES,
        VARLEN=VARLEN, LEFT=LEFT, RIGHT=RIGHT, LOOKAHEAD=LOOKAHEAD,
        FIRST_STORES=FIRST_STORES, DETERMINISTIC=DETERMINISTIC, PDL=PDL, NAMED_Q=0, NAMED_DO=0,
    )  # fmt: skip
    gl.warp_specialize([
        (values_consumer, (descs, bufs, bars, prob, scale_log2, C)),
        (keys_consumer, (descs, bufs, bars, prob, scale, C)),
        (queries_consumer, (bufs, bars, prob, C)),
        (backward_producer, (descs, loads, load_bars, prob, C)),
        (wide_reducer, (descs, loads, load_bars, prob, C)),
    ], [4, 4, 1, 1], [KEYS_REGS, QUERIES_REGS, 24, 24])  # fmt: skip
