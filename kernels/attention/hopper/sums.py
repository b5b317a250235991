"""dQ's sums: where and in which order they lie, and how the backward kernel rounds them to dQ (ROUNDS).

Each key block adds its share of a query's dQ to fp32 sums in global memory. Where the kernel is told to round, no
other kernel comes after it: the sums of a head are complete when all its key blocks have added theirs, which ``done``
counts, and then a CTA takes them from L2, where they still are, and writes dQ.

    fetcher    1 warp     sums from global to shared memory (TMA), once they are complete
    consumer   8 warps    from there to dQ, between two of its key blocks, when it would wait for K and V

For that the CTAs are persistent: they take tiles by number, one after the other, and a tile is a key block and as many
queries as tile t - LAG has keys, to be rounded. LAG is long enough that all tiles of that head were taken before t, so
that nobody waits for a later one, and that they have ended, mostly. LAG tiles at the end have no keys. Half of a tile's
queries are rounded while K and V are on their way, the others while dK and dV are.

Only for dense calls with as many queries as keys and no window on the left: each query sees a key, and the CTAs share
out the queries as they do the keys.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.attention.hopper.compat import (
    pack_pairs,
    partition_barrier,
    tma_load,
    wait_count,
    wait_previous_kernel,
)
from kernels.attention.hopper.rings import told_tile
from kernels.attention.hopper.tiles import decode_tile, padded_start

TILE = gl.constexpr(64)
"""Queries of one copy of Q, dO or the statistics, and of one count of turns."""
SUM_COLUMNS = gl.constexpr(256)
"""Columns of the memory that holds dQ's sums: 64 x D of them are D / 4 rows."""


class Rounding(NamedTuple):
    """What becomes of dQ's sums; see ``backward_kernel``. ROUNDS only."""

    sums: Any
    dq: Any
    done: Any
    """int32 [B·H]: at a group's first head, the key blocks that have added their dQ."""
    lag: Any
    scale: Any
    stride_b: Any
    stride_s: Any
    stride_h: Any


@gluon.jit
def scratch_coordinates(b, h, start_q, num_heads, VARLEN: gl.constexpr):
    """(row, first column) of one head of one sequence in the statistics and in the dQ sums."""
    if VARLEN:
        return h, padded_start(start_q, b)
    else:
        return b * num_heads + h, 0


@gluon.jit
def in_register_order(dq, D: gl.constexpr):
    """dQ [64, D] -> [D / 4, 256], each thread's values in runs of four: no bank conflict, and one address per
    thread.

    Row = (warp: 4, r: 2, lane: 8), column = (warpgroup: 2, k: D / 16, lane: 4, r: 2); r and k number a
    thread's registers. The sums keep this order; ``round_part`` or elementwise.py turns it back.
    """
    bits = dq.reshape((4, 2, 8, 2, D // 16, 4, 2))
    return bits.permute((4, 3, 0, 2, 5, 1, 6)).reshape((D // 4, SUM_COLUMNS))


@gluon.jit
def in_register_order_of_pairs(dq, D: gl.constexpr):
    """dQ [128, D] -> [D / 2, 256]: likewise where each warpgroup has 64 of the rows and all columns."""
    bits = dq.reshape((2, 4, 2, 8, 2, D // 16, 4, 2))
    return bits.permute((0, 5, 4, 1, 3, 6, 2, 7)).reshape((D // 2, SUM_COLUMNS))


@gluon.jit
def split_runs(x):
    """Sums [ROWS, 256] in register order -> their even and their odd columns, each [ROWS, run: 64, row: 2]."""
    return gl.split(x.reshape((x.shape[0], SUM_COLUMNS // 4, 2, 2)))


@gluon.jit
def round_part(dq, rows, bufs, rounding, C: gl.constexpr):
    """Eight warps: dQ of BM queries, ``rows`` of which exist, from the sums in shared memory: ``dq`` points to the
    first."""
    ROWS: gl.constexpr = 16  # of sums at a time, 16 sums in a thread
    TL: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 2], [1, 0])
    even, _ = split_runs(gl.zeros((ROWS, SUM_COLUMNS), gl.float32, TL))
    RL: gl.constexpr = even.type.layout
    sums = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, RL)))[:, None, None]
    run = gl.arange(0, SUM_COLUMNS // 4, gl.SliceLayout(0, gl.SliceLayout(2, RL)))[None, :, None]
    r = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, RL)))[None, None, :]
    # sums = (64 queries, k: D / 16, half of the columns: 2, warp: 2), run = (warp: 2, lane: 8, lane: 4)
    row = 32 * (sums & 1) + 16 * (run >> 5) + ((run >> 2) & 7) + 8 * r
    words = dq.to(gl.pointer_type(gl.int32), bitcast=True) + (row * (rounding.stride_s // 2) + (run & 3))
    for half in gl.static_range(C.BM // TILE):
        for first in gl.static_range(0, C.D // 4, ROWS):
            even, odd = split_runs(bufs.sums.slice(half * (C.D // 4) + first, ROWS, 0).load(TL) * rounding.scale)
            at = first + sums
            column = ((at >> 1) & 1) * (C.D // 2) + (at >> 2) * 8
            keep = row < rows - half * TILE
            if C.HEAD_DIM < C.D:
                keep = keep & (column + 2 * (run & 3) < C.HEAD_DIM)
            gl.store(words + column // 2, pack_pairs(even, odd, bufs.k.dtype), keep)
        words += TILE * (rounding.stride_s // 2)


@gluon.jit
def locate_sums(t, part, prob, C: gl.constexpr):
    """(sequence, head, first query, whether there is one) of a part of what tile ``t`` has to round: as many queries of
    each head of the group as it has keys, in parts of BM."""
    PARTS: gl.constexpr = C.BN // C.BM
    nb, b, hk = decode_tile(
        t, prob.sched, prob.num_n, prob.num_heads_k, prob.batch_heads_k, prob.section, C.VARLEN, False
    )
    m0 = nb * C.BN + part % PARTS * C.BM
    return b, hk * prob.group + part // PARTS, m0, m0 < prob.Sq


@gluon.jit
def round_parts(t, first, end, number, bufs, bars, prob, rounding, C: gl.constexpr):
    """Consumer: dQ of parts [first, end) of what tile ``t`` has to round. ``number``: of the first one's sums among
    those that the CTA fetches; returns the next number."""
    for part in range(first, end):
        b, h, m0, there = locate_sums(t, part, prob, C)
        if there:
            mbarrier.wait(bars.sums_full.index(0), number & 1)
            place = b.to(gl.int64) * rounding.stride_b + m0.to(gl.int64) * rounding.stride_s
            dq = rounding.dq + place + h.to(gl.int64) * rounding.stride_h
            round_part(dq, prob.Sq - m0, bufs, rounding, C)
            partition_barrier()
            mbarrier.arrive(bars.sums_empty.index(0), count=1)
            number += 1
    return number


@gluon.jit
def sums_fetcher(descs, bufs, bars, prob, rounding, C: gl.constexpr):
    """One warp: the sums that a CTA's tiles have to round to shared memory, once they are complete, one part after the
    other."""
    if C.PDL:
        wait_previous_kernel()
    num_heads = prob.num_heads_k * prob.group
    bar = bars.sums_full.index(0)
    n = 0
    number = 0
    t = told_tile(bufs, bars, 0, 1)
    while t < prob.num_tiles + rounding.lag:
        if t >= rounding.lag:
            for part in range(prob.group * (C.BN // C.BM)):
                b, h, m0, there = locate_sums(t - rounding.lag, part, prob, C)
                if there:
                    if part == 0:
                        wait_count(rounding.done + b * num_heads + h, prob.num_n)
                    mbarrier.wait(bars.sums_empty.index(0), (number & 1) ^ 1)
                    mbarrier.expect(bar, descs.dq.block_type.nbytes)
                    tile = ((b * num_heads + h) * prob.padded + m0) // C.BM
                    tma_load(descs.dq, [tile * (C.BM * C.D // SUM_COLUMNS), 0], bar, bufs.sums)
                    number += 1
        n += 1
        t = told_tile(bufs, bars, n, 1)
