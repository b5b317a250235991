"""Backward attention for Hopper (sm_90a) in Gluon: dK and dV of one key block per CTA, dQ summed into an fp32
buffer.

    P = exp2(c·log2e·S - LSE₂),  dP = dO Vᵀ,  dS = P ∘ (dP - δ),  δ = rowsum(dO ∘ O)
    dV = Pᵀ dO,  dK = c·dSᵀ Q,  dQ = c·dS K

FlashAttention-2's algorithm 2 (arXiv 2307.08691). S and dP are computed transposed, [keys, queries]: then
each thread holds Pᵀ and dSᵀ exactly where the tensor cores want the left operand of dV and dK, and only dS
goes through shared memory, once, for dQ. A producer warp loads Q, dO and the statistics; another hands dQ
tiles to the copy engine, which adds them to global memory. The factor c is applied once: to dK here, to dQ
when its sums are rounded (below, or elementwise.py).

Who does what. A CTA owns one key block (BN = 128 keys of one key head) and walks through the query blocks that see it,
for each query head of the group. K and V stay in shared memory, Q and dO pass through rings:

    producer   1 warp     Q + LSE, dO + delta, K, V to shared memory with the copy engine (TMA)
    consumer   8 warps    two warpgroups of 64 keys: S, P, dP, dS, dV, dK; together dQ of the query block
    reducer    1 warp     dQ from shared memory to its fp32 sums in global memory (TMA, store or add)
    fetcher    1 warp     finished sums back to shared memory; ROUNDS only: sums.py

    producer == K, V (once), Q + LSE (ring), dO + delta (ring) ==> consumer == dQ ==> reducer == add ==> sums
                                                                  consumer == dK, dV, at the end ==> global memory

One query block in ``query_block`` (head dim 128), time running to the right; ``query_pair`` says how PAIRS goes:

    tensor cores   S   dP  | dV                    | dQ   dK                    | S of the next
    registers              P while dP runs | dS while dV runs | dQ handed over while dK runs

What guards what. rings.py explains full, empty and phases; ``step`` counts query blocks over all heads of the group.

    kv_full          [0] K, [1] V have arrived: once
    q_full/q_empty   a stage of Q and LSE. Empty: dK of this block is done
    do_full/do_empty a stage of dO and delta. Empty: dV of this block is done
    dq_full/dq_empty dQ lies in shared memory / the copy engine has read it
    ROUNDS:
    sums_full/sums_empty  finished sums lie in shared memory / have been rounded
    kv_empty         dK and dV have left K's and V's buffers
    slot_full/slot_empty  the number of the next tile / has been read by the three others
    partition barrier  both warpgroups' halves of dS lie in shared memory, before dQ reads them

With NAMED, hardware barriers take the place of q_empty, do_empty and dq_full, from Q_BARRIER, DO_BARRIER and
DQ_BARRIER on. What has to hold, or the kernel hangs: producer, consumer and reducer make the same steps in the same
order (``locate_keys`` and ``visit``, which all of them call), and a step takes and releases each stage once. With
ROUNDS a CTA takes one key block after the other (sums.py), and steps are counted on.

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

# Triton's language has no starred lists.
# ruff: noqa: RUF005

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
    partition_barrier,
    pass_turn,
    ring_barrier_sync,
    tma_load,
    tma_reduce_add,
    tma_store,
    wait_previous_kernel,
    wait_turn,
)
from kernels.attention.hopper.pieces import PIECE, one_of
from kernels.attention.hopper.rings import await_empty, await_full, claim_tile, make_barrier, release, told_tile
from kernels.attention.hopper.sums import (
    SUM_COLUMNS,
    TILE,
    Rounding,
    in_register_order,
    in_register_order_of_pairs,
    round_parts,
    scratch_coordinates,
    sums_fetcher,
)
from kernels.attention.hopper.tiles import (
    decode_tile,
    load_tile,
    sequence,
    store_tile,
    visible_queries,
)

Q_BARRIER = gl.constexpr(8)
DO_BARRIER = gl.constexpr(11)
DQ_BARRIER = gl.constexpr(14)
"""Named barriers: one per stage of the Q and dO rings (3 at most), and "dQ is there"."""
HANDOVER = gl.constexpr(288)
"""Threads at one of them: 8 consumer warps and the producer's or the reducer's."""


class Descriptors(NamedTuple):
    """TMA descriptors; see ``backward_kernel``. Of Q, K, V, dO, and of the wide kernel's dK and dV, tuples of pieces
    (pieces.py)."""

    q: Any
    k: Any
    v: Any
    do: Any
    lse: Any
    delta: Any
    dq: Any
    dk: Any
    dv: Any


class Buffers(NamedTuple):
    """Shared memory. As the producer sees it, Q, K, V and dO are tuples of pieces (pieces.py)."""

    q: Any
    """Ring of STAGES blocks of BM queries, in tiles of 64."""
    k: Any
    """[BN, D], stays; stages dK at the end."""
    v: Any
    """[BN, D], stays; stages dV at the end."""
    do: Any
    """Ring of DO_STAGES blocks, as Q's."""
    lse: Any
    """fp32, beside Q."""
    delta: Any
    """fp32, beside dO."""
    ds: Any
    """[BM, BN]: the consumer's warpgroups meet here for dQ."""
    dq: Any
    """fp32, BM x D in register order: from the consumer to the reducer."""
    sums: Any
    """Like dq: from the sums to the consumer. ROUNDS only."""
    slot: Any
    """int32 [2, 1]: numbers of tiles, used in turn. ROUNDS only."""


class Barriers(NamedTuple):
    """Arrays of mbarriers; the module's docstring says what they guard."""

    q_full: Any
    q_empty: Any
    do_full: Any
    do_empty: Any
    kv_full: Any
    dq_full: Any
    dq_empty: Any
    sums_full: Any
    sums_empty: Any
    kv_empty: Any
    slot_full: Any
    slot_empty: Any


class Problem(NamedTuple):
    """The kernel's pointers and integers; see ``backward_kernel``."""

    sched: Any
    cu_q: Any
    cu_k: Any
    turns: Any
    counter: Any
    """int32: tiles that CTAs have taken. ROUNDS only."""
    num_n: Any
    num_tiles: Any
    section: Any
    Sq: Any
    Sk: Any
    padded: Any
    num_heads_k: Any
    group: Any
    batch_heads_k: Any
    wl: Any
    wr: Any


class Config(NamedTuple):
    """The kernel's constants; see ``backward_kernel``, and tuning.BackwardTile for the switches."""

    BM: Any
    BN: Any
    D: Any
    STAGES: Any
    DO_STAGES: Any
    VARLEN: Any
    LEFT: Any
    RIGHT: Any
    FIRST_STORES: Any
    DETERMINISTIC: Any
    PDL: Any
    ROUNDS: Any
    HEAD_DIM: Any
    PAIRS: Any
    KV_REGISTERS: Any
    NAMED_Q: Any
    NAMED_DO: Any
    NAMED_DQ: Any
    """First named barriers that release Q and dO and hand dQ over; 0: mbarriers."""


class KeyBlock(NamedTuple):
    """A CTA's work: one key block of one key head, and the query blocks that see it."""

    nb: Any
    """Key block: rows [nb * BN, nb * BN + BN) of the sequence."""
    b: Any
    """Sequence."""
    hk: Any
    """Key head."""
    start_q: Any
    Sq: Any
    """First packed row (varlen; otherwise 0) and number of the sequence's queries."""
    start_k: Any
    Sk: Any
    """Likewise for its keys."""
    lo: Any
    hi: Any
    """Query blocks [lo, hi) see some of the keys."""


class Edges(NamedTuple):
    """What the mask of a key block depends on."""

    nb: Any
    Sq: Any
    Sk: Any
    begin: Any
    end: Any
    """Queries [begin, end) see every key of the block."""
    wl: Any
    wr: Any


@gluon.jit
def count_tiles(prob, VARLEN: gl.constexpr):
    """Key blocks of all key heads; CTAs past them have nothing to do."""
    num_tiles = prob.num_tiles
    if VARLEN:
        num_tiles = gl.load(prob.sched + 1) * prob.num_heads_k
    return num_tiles


@gluon.jit
def locate_keys(t, prob, C: gl.constexpr):
    """The KeyBlock of CTA ``t``."""
    nb, b, hk = decode_tile(
        t, prob.sched, prob.num_n, prob.num_heads_k, prob.batch_heads_k, prob.section, C.VARLEN, False
    )
    start_q, Sq = sequence(b, prob.cu_q, prob.Sq, C.VARLEN)
    start_k, Sk = sequence(b, prob.cu_k, prob.Sk, C.VARLEN)
    lo, hi = visible_queries(nb * C.BN, C.BN, Sq, Sk, prob.wl, prob.wr, C.BM, C.LEFT, C.RIGHT)
    return KeyBlock(nb=nb, b=b, hk=hk, start_q=start_q, Sq=Sq, start_k=start_k, Sk=Sk, lo=lo, hi=hi)


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


@gluon.jit
def load_pieces(descs, bufs, bar, b, h, row, start, length, VARLEN: gl.constexpr):
    """Starts the copies of a block's pieces to ``bufs``, rows from ``row`` on of one head of one sequence."""
    for i in gl.static_range(len(descs)):
        load_tile(descs[i], bar, bufs[i], b, h, row, start, length, VARLEN, i * PIECE)


@gluon.jit
def load_queries(descs, bufs, statistic_desc, statistic_bufs, bar, stage, h, row, column, mb, keys, C: gl.constexpr):
    """Starts the copies of a query block of Q and LSE, or of dO and delta, in tiles of 64; ``bar`` counts the bytes.
    (row, column): the head's place in the statistics."""
    HALVES: gl.constexpr = C.BM // TILE
    mbarrier.expect(bar, HALVES * (TILE * C.D * 2 + statistic_desc.block_type.nbytes))
    for half in gl.static_range(HALVES):
        m0 = mb * C.BM + half * TILE
        load_pieces(descs, one_of(bufs, stage * HALVES + half), bar, keys.b, h, m0, keys.start_q, keys.Sq, C.VARLEN)
        tma_load(statistic_desc, [row, column + m0], bar, statistic_bufs.index(stage * HALVES + half))


@gluon.jit
def load_keys(keys, descs, bufs, bars, C: gl.constexpr):
    """Starts the copies of a key block of K and of V."""
    n0 = keys.nb * C.BN
    mbarrier.expect(bars.kv_full.index(0), C.BN * C.D * 2)
    load_pieces(descs.k, bufs.k, bars.kv_full.index(0), keys.b, keys.hk, n0, keys.start_k, keys.Sk, C.VARLEN)
    mbarrier.expect(bars.kv_full.index(1), C.BN * C.D * 2)
    load_pieces(descs.v, bufs.v, bars.kv_full.index(1), keys.b, keys.hk, n0, keys.start_k, keys.Sk, C.VARLEN)


@gluon.jit
def load_query_block(step, h, row, column, mb, keys, descs, bufs, bars, C: gl.constexpr):
    """Starts the copies of a query block's Q, LSE, dO and delta, once their stages are free."""
    stage = step % C.STAGES
    await_empty(bars.q_empty, step, C.STAGES, C.NAMED_Q, HANDOVER)
    load_queries(descs.q, bufs.q, descs.lse, bufs.lse, bars.q_full.index(stage), stage, h, row, column, mb, keys, C)
    stage = step % C.DO_STAGES
    await_empty(bars.do_empty, step, C.DO_STAGES, C.NAMED_DO, HANDOVER)
    bar = bars.do_full.index(stage)
    load_queries(descs.do, bufs.do, descs.delta, bufs.delta, bar, stage, h, row, column, mb, keys, C)


@gluon.jit
def load_step(number, step, keys, descs, bufs, bars, prob, C: gl.constexpr):
    """``load_query_block`` for step ``number`` of a tile, ``step`` of all."""
    blocks = keys.hi - keys.lo
    h = keys.hk * prob.group + number // blocks
    mb = visit(keys.lo + number % blocks, keys.lo, keys.hi, C.FIRST_STORES)
    row, column = scratch_coordinates(keys.b, h, keys.start_q, prob.num_heads_k * prob.group, C.VARLEN)
    load_query_block(step, h, row, column, mb, keys, descs, bufs, bars, C)


@gluon.jit
def persistent_producer(descs, bufs, bars, prob, rounding, C: gl.constexpr):
    """One warp: takes tiles; of each, loads the first queries, then K and V once those before are no longer in use, and
    the other queries."""
    if C.PDL:
        wait_previous_kernel()
    n = 0
    step = 0
    t = claim_tile(bufs, bars, prob, 0)
    while t < prob.num_tiles + rounding.lag:
        if t < prob.num_tiles:
            keys = locate_keys(t, prob, C)
            steps = prob.group * (keys.hi - keys.lo)
            if steps > 0:
                load_step(0, step, keys, descs, bufs, bars, prob, C)
            mbarrier.wait(bars.kv_empty.index(0), (n & 1) ^ 1)
            load_keys(keys, descs, bufs, bars, C)
            for number in range(1, steps):
                load_step(number, step + number, keys, descs, bufs, bars, prob, C)
            step += steps
        n += 1
        t = claim_tile(bufs, bars, prob, n)


@gluon.jit
def backward_producer(descs, bufs, bars, prob, C: gl.constexpr):
    """One warp: loads K and V once, then Q with LSE and dO with delta, in tiles of 64 queries, for each query block of
    each head of the group. PDL: the preprocess may still be running; everything it writes is read behind the first LSE.
    """
    t = gl.program_id(0)
    num_tiles = count_tiles(prob, C.VARLEN)
    if t < num_tiles:
        keys = locate_keys(t, prob, C)
        load_keys(keys, descs, bufs, bars, C)
        if C.PDL:
            wait_previous_kernel()
        step = 0
        for g in range(prob.group):
            h = keys.hk * prob.group + g
            row, column = scratch_coordinates(keys.b, h, keys.start_q, prob.num_heads_k * prob.group, C.VARLEN)
            for i in range(keys.lo, keys.hi):
                mb = visit(i, keys.lo, keys.hi, C.FIRST_STORES)
                load_query_block(step, h, row, column, mb, keys, descs, bufs, bars, C)
                step += 1


@gluon.jit
def reduce_tile(t, step, descs, bufs, bars, prob, rounding, C: gl.constexpr):
    """Adds the dQ of tile ``t``, the first of which is that of ``step``; returns the next tile's first step."""
    SUM_ROWS: gl.constexpr = C.BM * C.D // SUM_COLUMNS  # of a tile
    keys = locate_keys(t, prob, C)
    for g in range(prob.group):
        h = keys.hk * prob.group + g
        row, column = scratch_coordinates(keys.b, h, keys.start_q, prob.num_heads_k * prob.group, C.VARLEN)
        for i in range(keys.lo, keys.hi):
            mb = visit(i, keys.lo, keys.hi, C.FIRST_STORES)
            tile = (row * prob.padded + column + mb * C.BM) // C.BM
            if C.NAMED_DQ > 0:
                ring_barrier_sync(C.NAMED_DQ, HANDOVER)
            else:
                mbarrier.wait(bars.dq_full.index(0), step & 1)
            if C.FIRST_STORES:
                rank = keys.nb - first_keys(mb * C.BM, keys.Sq, keys.Sk, prob.wl, C.BN, C.LEFT)
                if rank == 0:
                    tma_store(descs.dq, [tile * SUM_ROWS, 0], bufs.dq)
                else:
                    wait_turn(prob.turns + tile * (C.BM // TILE), rank if C.DETERMINISTIC else 1)
                    tma_reduce_add(descs.dq, [tile * SUM_ROWS, 0], bufs.dq)
            else:
                tma_reduce_add(descs.dq, [tile * SUM_ROWS, 0], bufs.dq)
            tma.store_wait(0)
            mbarrier.arrive(bars.dq_empty.index(0), count=1)
            if C.FIRST_STORES:  # noqa: SIM102 (a constexpr: without it there is no rank)
                if C.DETERMINISTIC or rank == 0:
                    pass_turn(prob.turns + tile * (C.BM // TILE))
            step += 1
    if C.ROUNDS:
        pass_turn(rounding.done + (keys.b * prob.num_heads_k + keys.hk) * prob.group)
    return step


@gluon.jit
def backward_reducer(descs, bufs, bars, prob, rounding, C: gl.constexpr):
    """One warp: adds each dQ tile to the fp32 sums with the copy engine, while the consumer computes the
    next. ROUNDS: tells at the end that it has.
    """
    if C.ROUNDS:
        n = 0
        step = 0
        t = told_tile(bufs, bars, 0, 1)
        while t < prob.num_tiles:
            step = reduce_tile(t, step, descs, bufs, bars, prob, rounding, C)
            n += 1
            t = told_tile(bufs, bars, n, 1)
        while t < prob.num_tiles + rounding.lag:
            n += 1
            t = told_tile(bufs, bars, n, 1)
    else:
        t = gl.program_id(0)
        if t < count_tiles(prob, C.VARLEN):
            reduce_tile(t, gl.to_tensor(0), descs, bufs, bars, prob, rounding, C)


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
def hand_over(dq, bufs, bars, step, C: gl.constexpr):
    """Puts the dQ of ``step``, in register order, where the reducer finds it, once the tile before it has been read."""
    mbarrier.wait(bars.dq_empty.index(0), (step & 1) ^ 1)
    if C.PAIRS:
        bufs.dq.store(in_register_order_of_pairs(dq, C.D))
    else:
        bufs.dq.store(in_register_order(dq, C.D))
    fence_async_shared()
    release(bars.dq_full, 0, C.NAMED_DQ, HANDOVER)


@gluon.jit
def scores(step, k_left, bufs, bars, C: gl.constexpr):
    """Sᵀ [BN, 64] of the first half of a pair, unfinished, once Q is there."""
    TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, TILE, 16])
    await_full(bars.q_full, step, C.STAGES)
    q = bufs.q.index(2 * (step % C.STAGES)).reshape((TILE, C.D)).permute((1, 0))
    return warpgroup_mma(k_left, q, gl.zeros((C.BN, TILE), gl.float32, TL), use_acc=False, is_async=True)


@gluon.jit
def hide_keys(s, m0, COUNT: gl.constexpr, edges, C: gl.constexpr):
    """Sᵀ [BN, COUNT] of the queries at ``m0``, masked where the block needs it (one branch)."""
    if (m0 < edges.begin) | (m0 + COUNT > edges.end):
        n0 = edges.nb * C.BN
        delta_n = m0 - n0 + edges.Sk - edges.Sq
        TL: gl.constexpr = s.type.layout
        s = masked_scores(s, delta_n, edges.Sk - n0, edges.wl, edges.wr, COUNT, C.BN, C.LEFT, C.RIGHT, TL)
    return s


@gluon.jit
def probabilities(s, lse, m0, edges, scale_log2, C: gl.constexpr):
    """Pᵀ [BN, 64] of the queries at ``m0`` from Sᵀ and a buffer of LSE."""
    TL: gl.constexpr = s.type.layout
    s = hide_keys(s, m0, TILE, edges, C)
    return gl.exp2(s * scale_log2 - gl.expand_dims(lse.reshape((TILE,)).load(gl.SliceLayout(0, TL)), 0))


@gluon.jit
def score_gradients(p, dp, delta, COUNT: gl.constexpr, DTYPE: gl.constexpr):
    """dSᵀ [BN, COUNT] in 16 bits, from Pᵀ, dPᵀ and a buffer of delta."""
    rows = delta.reshape((COUNT,)).load(gl.SliceLayout(0, p.type.layout))
    return (p * (dp - gl.expand_dims(rows, 0))).to(DTYPE)


@gluon.jit
def query_block(step, mb, dk, dv, bufs, bars, edges, scale_log2, C: gl.constexpr):
    """Adds one query block to dK and dV and hands its dQ over; returns (dK, dV).

    S, dP | P while dP runs | dV issued | dS and its store while dV runs | dQ, dK issued | dQ handed over while dK runs.
    """
    DTYPE: gl.constexpr = bufs.k.dtype
    TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C.BM, 16])  # Sᵀ, dPᵀ [BN, BM]
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C.D, 16])  # dK, dV [BN, D]
    QL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C.D // 2, 16])  # dQ [BM, D], split by columns
    AL: gl.constexpr = gl.DotOperandLayout(0, KL, 2)
    zero_t = gl.zeros((C.BN, C.BM), gl.float32, TL)
    zero_q = gl.zeros((C.BM, C.D), gl.float32, QL)
    k = bufs.k.reshape((C.BN, C.D))
    v = bufs.v.reshape((C.BN, C.D))
    q_stage = step % C.STAGES
    do_stage = step % C.DO_STAGES
    q = bufs.q.index(q_stage).reshape((C.BM, C.D))
    do = bufs.do.index(do_stage).reshape((C.BM, C.D))
    await_full(bars.q_full, step, C.STAGES)
    s = warpgroup_mma(k, q.permute((1, 0)), zero_t, use_acc=False, is_async=True)
    await_full(bars.do_full, step, C.DO_STAGES)
    dp = warpgroup_mma(v, do.permute((1, 0)), zero_t, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    s = hide_keys(s, mb * C.BM, C.BM, edges, C)
    lse = bufs.lse.index(q_stage).reshape((C.BM,)).load(gl.SliceLayout(0, TL))
    p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 0))
    p_left = gl.convert_layout(p.to(DTYPE), AL)
    dv_next = warpgroup_mma(p_left, do, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = score_gradients(p, dp, bufs.delta.index(do_stage), C.BM, DTYPE)
    bufs.ds.permute((1, 0)).store(ds)
    fence_async_shared()
    partition_barrier()  # both warpgroups' halves of dS are there
    dq = warpgroup_mma(bufs.ds, k, zero_q, use_acc=False, is_async=True)
    dk_next = warpgroup_mma(gl.convert_layout(ds, AL), q, dk, is_async=True)
    dv = warpgroup_mma_wait(2, deps=(dv_next,))
    release(bars.do_empty, do_stage, C.NAMED_DO, HANDOVER)
    dq = warpgroup_mma_wait(1, deps=(dq,))
    hand_over(dq, bufs, bars, step, C)
    dk = warpgroup_mma_wait(0, deps=(dk_next,))
    release(bars.q_empty, q_stage, C.NAMED_Q, HANDOVER)
    return dk, dv


@gluon.jit
def store_pair(ds_a, ds_b, bufs, C: gl.constexpr):
    """dSᵀ of both halves, [BN, 64] twice, to shared memory as one [BN, 128]."""
    PL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 2 * TILE, 16])
    ds = gl.join(ds_a, ds_b).permute((0, 2, 1)).reshape((C.BN, 2 * TILE))
    bufs.ds.permute((1, 0)).store(gl.convert_layout(ds, PL, assert_trivial=True))
    fence_async_shared()
    partition_barrier()  # both warpgroups' halves of dS are there


@gluon.jit
def query_pair(step, last, mb, s_a, dk, dv, kv, bufs, bars, edges, scale_log2, C: gl.constexpr):
    """As ``query_block`` for 128 queries, in two halves a and b that run into each other, so that the tensor cores work
    during the softmax of either and the warpgroups meet once per 128 queries. Takes S of its first half and returns
    that of the next block; S, dK and dV are finished, for a product in flight from one iteration to the next
    serialises all of them.

    S_b, dP_a issued | P_a | dV_a issued | dS_a | dK_a, dP_b issued | P_b | dV_b issued | dS_b | dK_b, dQ, S_a⁺ issued |
    dQ handed over. The last block issues its own S_a again as the next one's, for nobody: under a branch it would
    serialise the products.
    """
    k_left, v_left = kv
    DTYPE: gl.constexpr = bufs.k.dtype
    TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, TILE, 16])  # halves of Sᵀ, dPᵀ [BN, 64]
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C.D, 16])  # dK, dV [BN, D]; dQ [128, D]
    AL: gl.constexpr = gl.DotOperandLayout(0, KL, 2)
    zero_t = gl.zeros((C.BN, TILE), gl.float32, TL)
    q_stage = step % C.STAGES
    do_stage = step % C.DO_STAGES
    q_a = bufs.q.index(2 * q_stage).reshape((TILE, C.D))
    q_b = bufs.q.index(2 * q_stage + 1).reshape((TILE, C.D))
    do_a = bufs.do.index(2 * do_stage).reshape((TILE, C.D))
    do_b = bufs.do.index(2 * do_stage + 1).reshape((TILE, C.D))

    s_b = warpgroup_mma(k_left, q_b.permute((1, 0)), zero_t, use_acc=False, is_async=True)
    await_full(bars.do_full, step, C.DO_STAGES)
    dp_a = warpgroup_mma(v_left, do_a.permute((1, 0)), zero_t, use_acc=False, is_async=True)
    p_a = probabilities(s_a, bufs.lse.index(2 * q_stage), mb * C.BM, edges, scale_log2, C)
    dv = warpgroup_mma(gl.convert_layout(p_a.to(DTYPE), AL), do_a, dv, is_async=True)
    s_b, dp_a = warpgroup_mma_wait(1, deps=(s_b, dp_a))
    ds_a = score_gradients(p_a, dp_a, bufs.delta.index(2 * do_stage), TILE, DTYPE)
    dk = warpgroup_mma(gl.convert_layout(ds_a, AL), q_a, dk, is_async=True)
    dp_b = warpgroup_mma(v_left, do_b.permute((1, 0)), zero_t, use_acc=False, is_async=True)

    p_b = probabilities(s_b, bufs.lse.index(2 * q_stage + 1), mb * C.BM + TILE, edges, scale_log2, C)
    dv = warpgroup_mma(gl.convert_layout(p_b.to(DTYPE), AL), do_b, dv, is_async=True)
    dp_b = warpgroup_mma_wait(1, deps=(dp_b,))
    ds_b = score_gradients(p_b, dp_b, bufs.delta.index(2 * do_stage + 1), TILE, DTYPE)
    dk = warpgroup_mma(gl.convert_layout(ds_b, AL), q_b, dk, is_async=True)
    store_pair(ds_a, ds_b, bufs, C)

    zero_q = gl.zeros((C.BM, C.D), gl.float32, KL)
    dq = warpgroup_mma(bufs.ds, bufs.k.reshape((C.BN, C.D)), zero_q, use_acc=False, is_async=True)
    s_next = scores(gl.minimum(step + 1, last), k_left, bufs, bars, C)
    dk, dv, dq = warpgroup_mma_wait(1, deps=(dk, dv, dq))
    release(bars.do_empty, do_stage, C.NAMED_DO, HANDOVER)
    release(bars.q_empty, q_stage, C.NAMED_Q, HANDOVER)
    hand_over(dq, bufs, bars, step, C)
    s_next = warpgroup_mma_wait(0, deps=(s_next,))
    return s_next, dk, dv


@gluon.jit
def query_pairs(dk, dv, lo, hi, base, steps, bufs, bars, edges, scale_log2, C: gl.constexpr):
    """dK and dV of ``steps`` > 0 blocks of 128 queries, from step ``base`` on."""
    k_left = bufs.k.reshape((C.BN, C.D))
    v_left = bufs.v.reshape((C.BN, C.D))
    if C.KV_REGISTERS:
        TL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, TILE, 16])
        LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, TL, 2)
        k_left = k_left.load(LEFT_OPERAND)
        v_left = v_left.load(LEFT_OPERAND)
    kv = (k_left, v_left)
    blocks = hi - lo
    s = warpgroup_mma_wait(0, deps=(scores(base, k_left, bufs, bars, C),))
    last = base + steps - 1
    for step in range(steps):
        mb = visit(lo + step % blocks, lo, hi, C.FIRST_STORES)
        s, dk, dv = query_pair(base + step, last, mb, s, dk, dv, kv, bufs, bars, edges, scale_log2, C)
    return dk, dv


@gluon.jit
def sum_products(keys, n, base, bufs, bars, prob, scale_log2, C: gl.constexpr):
    """(dK, dV) of a key block, the CTA's n-th, whose query blocks are steps ``base`` and on; dK without its scale."""
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C.D, 16])  # dK, dV [BN, D]
    lo, hi = keys.lo, keys.hi
    begin, end = unmasked_queries(keys.nb * C.BN, C.BN, keys.Sq, keys.Sk, prob.wl, prob.wr, C.LEFT, C.RIGHT)
    edges = Edges(nb=keys.nb, Sq=keys.Sq, Sk=keys.Sk, begin=begin, end=end, wl=prob.wl, wr=prob.wr)
    dk = gl.zeros((C.BN, C.D), gl.float32, KL)
    dv = gl.zeros((C.BN, C.D), gl.float32, KL)
    mbarrier.wait(bars.kv_full.index(0), n & 1)
    mbarrier.wait(bars.kv_full.index(1), n & 1)
    blocks = hi - lo
    steps = prob.group * blocks
    if C.PAIRS:
        if steps > 0:
            dk, dv = query_pairs(dk, dv, lo, hi, base, steps, bufs, bars, edges, scale_log2, C)
    else:
        for step in range(steps):
            mb = visit(lo + step % blocks, lo, hi, C.FIRST_STORES)
            dk, dv = query_block(base + step, mb, dk, dv, bufs, bars, edges, scale_log2, C)
    return dk, dv


@gluon.jit
def store_sums(dk, dv, keys, descs, bufs, scale, C: gl.constexpr):
    """Starts the copies of dK and dV. K and V are dead, once both warpgroups' products are done: their buffers stage
    dK and dV."""
    DTYPE: gl.constexpr = descs.dk.dtype
    n0 = keys.nb * C.BN
    partition_barrier()
    bufs.v.reshape((C.BN, C.D)).store(dv.to(DTYPE))
    bufs.k.reshape((C.BN, C.D)).store((dk * scale).to(DTYPE))
    fence_async_shared()
    partition_barrier()
    store_tile(descs.dv, bufs.v, keys.b, keys.hk, n0, keys.start_k, keys.Sk, C.VARLEN)
    store_tile(descs.dk, bufs.k, keys.b, keys.hk, n0, keys.start_k, keys.Sk, C.VARLEN)


@gluon.jit
def backward_consumer(descs, bufs, bars, prob, rounding, scale_log2, scale, C: gl.constexpr):
    """Eight warps, BN = 128: each warpgroup owns 64 keys for S, dP, dK and dV, and half the columns of dQ (PAIRS: half
    its rows). ROUNDS: dQ of another tile's queries, half of them while K and V are on their way, the others while dK
    and dV are."""
    if C.ROUNDS:
        parts = prob.group * (C.BN // C.BM)
        early = (parts + 1) // 2
        n = 0
        step = 0
        number = 0
        t = told_tile(bufs, bars, 0, 8)
        while t < prob.num_tiles:
            if t >= rounding.lag:
                number = round_parts(t - rounding.lag, 0, early, number, bufs, bars, prob, rounding, C)
            keys = locate_keys(t, prob, C)
            dk, dv = sum_products(keys, n, step, bufs, bars, prob, scale_log2, C)
            step += prob.group * (keys.hi - keys.lo)
            store_sums(dk, dv, keys, descs, bufs, scale, C)
            if t >= rounding.lag:
                number = round_parts(t - rounding.lag, early, parts, number, bufs, bars, prob, rounding, C)
            tma.store_wait(0)
            partition_barrier()
            mbarrier.arrive(bars.kv_empty.index(0), count=1)
            n += 1
            t = told_tile(bufs, bars, n, 8)
        while t < prob.num_tiles + rounding.lag:
            number = round_parts(t - rounding.lag, 0, parts, number, bufs, bars, prob, rounding, C)
            n += 1
            t = told_tile(bufs, bars, n, 8)
    else:
        t = gl.program_id(0)
        if t < count_tiles(prob, C.VARLEN):
            keys = locate_keys(t, prob, C)
            dk, dv = sum_products(keys, 0, 0, bufs, bars, prob, scale_log2, C)
            store_sums(dk, dv, keys, descs, bufs, scale, C)
            tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "wl", "wr", "num_n", "num_tiles", "section", "Sq", "Sk", "padded", "num_heads_k", "group", "batch_heads_k",
        "num_turns", "num_counts", "lag",
    ]
)  # fmt: skip
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc,  # tiles of 64 (q, do) or BN (k, v) rows, [1, 1, rows, D] or [1, 1, 1, rows, D]
    lse_desc, delta_desc,  # fp32 [rows, padded queries], tiles [1, 64]; LSE in log2 units, +inf where a row is dead
    dq_desc,  # fp32 [rows * padded queries * D / 256, 256], tiles [BM * D / 256, 256]; zeroed, or FIRST_STORES
    dk_desc, dv_desc,  # like k
    sched,  # int32: unused, number of key blocks, their (sequence, block); varlen only
    cu_q, cu_k,  # int32 [B + 1]; varlen only
    turns,  # int32, zero on entry: [num_turns = rows * padded queries / 64], FIRST_STORES; with ROUNDS [rows] ``done``
    # behind them, num_counts together, and then one, ``counter``
    sums, dq,  # the memory of dq_desc, and dQ, [B, Sq, H, D]; ROUNDS only
    wl, wr,  # window, used where LEFT, RIGHT
    num_n, num_tiles, section, Sq, Sk, padded, num_heads_k, group, batch_heads_k,
    stride_qb, stride_qs, stride_qh,  # of dq
    num_turns, num_counts, lag,  # ROUNDS only
    scale_log2, scale,  # softmax scale times log2(e), and itself
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    VARLEN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    FIRST_STORES: gl.constexpr, DETERMINISTIC: gl.constexpr, PDL: gl.constexpr, NAMED: gl.constexpr,
    ROUNDS: gl.constexpr, HEAD_DIM: gl.constexpr,
    PAIRS: gl.constexpr, KV_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Launch with num_warps=8, one CTA per key block and kv head (varlen: an upper bound of them); with ROUNDS, whose
    CTAs take one tile after the other, no more than multiprocessors."""
    DTYPE: gl.constexpr = q_desc.dtype
    ONE: gl.constexpr = [1, 1, 1] if VARLEN else [1, 1]
    HALVES: gl.constexpr = BM // 64  # copies and buffers of Q, dO and the statistics are of 64 queries
    q_buf = gl.allocate_shared_memory(DTYPE, [STAGES * HALVES] + ONE + [64, D], q_desc.layout)
    do_buf = gl.allocate_shared_memory(DTYPE, [DO_STAGES * HALVES] + ONE + [64, D], do_desc.layout)
    k_buf = gl.allocate_shared_memory(DTYPE, ONE + [BN, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(DTYPE, ONE + [BN, D], v_desc.layout)
    lse_buf = gl.allocate_shared_memory(gl.float32, [STAGES * HALVES, 1, 64], lse_desc.layout)
    delta_buf = gl.allocate_shared_memory(gl.float32, [DO_STAGES * HALVES, 1, 64], delta_desc.layout)
    ds_buf = gl.allocate_shared_memory(DTYPE, [BM, BN], gl.NVMMASharedLayout.get_default_for([BM, BN], DTYPE))
    dq_buf = gl.allocate_shared_memory(gl.float32, [BM * D // 256, 256], dq_desc.layout)
    slot, sums_buf, done, counter = None, None, None, None
    if ROUNDS:
        slot = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        sums_buf = gl.allocate_shared_memory(gl.float32, [BM * D // 256, 256], dq_desc.layout)
        done = turns + num_turns
        counter = turns + num_counts
    # None where nobody uses one (make_barrier).
    q_empty, do_empty, dq_full = None, None, None
    if not NAMED:
        q_empty = make_barrier(STAGES)
        do_empty = make_barrier(DO_STAGES)
        dq_full = make_barrier(1)
    sums_full, sums_empty, kv_empty, slot_full, slot_empty = None, None, None, None, None
    if ROUNDS:
        sums_full = make_barrier(1)
        sums_empty = make_barrier(1)
        kv_empty = make_barrier(1)
        slot_full = make_barrier(2)
        slot_empty = make_barrier(2, 3)  # consumer, reducer, fetcher
    bars = Barriers(
        q_full=make_barrier(STAGES), q_empty=q_empty, do_full=make_barrier(DO_STAGES), do_empty=do_empty,
        kv_full=make_barrier(2), dq_full=dq_full, dq_empty=make_barrier(1), sums_full=sums_full, sums_empty=sums_empty,
        kv_empty=kv_empty, slot_full=slot_full, slot_empty=slot_empty,
    )  # fmt: skip
    fence_async_shared()
    descs = Descriptors(
        q=(q_desc,), k=(k_desc,), v=(v_desc,), do=(do_desc,), lse=lse_desc, delta=delta_desc, dq=dq_desc, dk=dk_desc,
        dv=dv_desc,
    )  # fmt: skip
    bufs = Buffers(
        q=q_buf, k=k_buf, v=v_buf, do=do_buf, lse=lse_buf, delta=delta_buf, ds=ds_buf, dq=dq_buf,
        sums=sums_buf, slot=slot,
    )  # fmt: skip
    loads = Buffers(
        q=(q_buf,), k=(k_buf,), v=(v_buf,), do=(do_buf,), lse=lse_buf, delta=delta_buf, ds=ds_buf, dq=dq_buf,
        sums=sums_buf, slot=slot,
    )  # fmt: skip
    prob = Problem(
        sched=sched, cu_q=cu_q, cu_k=cu_k, turns=turns, counter=counter, num_n=num_n, num_tiles=num_tiles,
        section=section, Sq=Sq, Sk=Sk, padded=padded, num_heads_k=num_heads_k, group=group,
        batch_heads_k=batch_heads_k, wl=wl, wr=wr,
    )  # fmt: skip
    C: gl.constexpr = Config(
        BM=BM, BN=BN, D=D, STAGES=STAGES, DO_STAGES=DO_STAGES, VARLEN=VARLEN, LEFT=LEFT, RIGHT=RIGHT,
        FIRST_STORES=FIRST_STORES, DETERMINISTIC=DETERMINISTIC, PDL=PDL, PAIRS=PAIRS, KV_REGISTERS=KV_REGISTERS,
        ROUNDS=ROUNDS, HEAD_DIM=HEAD_DIM,
        NAMED_Q=Q_BARRIER if NAMED else 0, NAMED_DO=DO_BARRIER if NAMED else 0, NAMED_DQ=DQ_BARRIER if NAMED else 0,
    )  # fmt: skip
    rounding = Rounding(
        sums=sums, dq=dq, done=done, lag=lag, scale=scale, stride_b=stride_qb, stride_s=stride_qs, stride_h=stride_qh
    )
    if ROUNDS:
        gl.warp_specialize([
            (backward_consumer, (descs, bufs, bars, prob, rounding, scale_log2, scale, C)),
            (persistent_producer, (descs, loads, bars, prob, rounding, C)),
            (backward_reducer, (descs, bufs, bars, prob, rounding, C)),
            (sums_fetcher, (descs, bufs, bars, prob, rounding, C)),
        ], [1, 1, 1], [24, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (backward_consumer, (descs, bufs, bars, prob, rounding, scale_log2, scale, C)),
            (backward_producer, (descs, loads, bars, prob, C)),
            (backward_reducer, (descs, bufs, bars, prob, rounding, C)),
        ], [1, 1], [24, 24])  # fmt: skip
