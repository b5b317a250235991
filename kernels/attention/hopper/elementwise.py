"""The small kernels around the Hopper kernels: lists of tiles for varlen, and what precedes and follows the
backward.

Plain Triton. Layouts as in gluon_backward.py: statistics fp32 [rows, padded], dQ sums fp32 [rows, padded, D] in
tiles of 64 queries whose elements lie in register order; dense rows are B·H, varlen rows are H.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PAD = tl.constexpr(128)  # as in tiles.py
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def list_tiles(
    sched,  # int32 [2 + 2 * upper bound of tiles]: 0, number of tiles, then (sequence, block) of each
    cu_seqlens,  # int32 [B + 1]
    num_seqs,
    BLOCK: tl.constexpr,
    DESCENDING: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Tiles of BLOCK rows of every sequence, longest sequences first. One program per sequence finds the
    place of its tiles.
    """
    b = tl.program_id(0)
    length = tl.load(cu_seqlens + b + 1) - tl.load(cu_seqlens + b)
    first = 0
    total = 0
    for i0 in range(0, num_seqs, CHUNK):
        i = i0 + tl.arange(0, CHUNK)
        valid = i < num_seqs
        other = tl.load(cu_seqlens + i + 1, valid, 0) - tl.load(cu_seqlens + i, valid, 0)
        tiles = tl.cdiv(other, BLOCK)
        total += tl.sum(tiles)
        first += tl.sum(tl.where((other > length) | ((other == length) & (i < b)), tiles, 0))
    mine = tl.cdiv(length, BLOCK)
    for t0 in range(0, mine, CHUNK):
        t = t0 + tl.arange(0, CHUNK)
        block = mine - 1 - t if DESCENDING else t
        tl.store(sched + 2 + 2 * (first + t), b, t < mine)
        tl.store(sched + 3 + 2 * (first + t), block, t < mine)
    if b == 0:
        tl.store(sched, 0)
        tl.store(sched + 1, total)


@triton.jit
def _locate(bh, num_heads, cu_q, seqlen_q, VARLEN: tl.constexpr):
    """(sequence, head, first row, rows, scratch row, first scratch column) of a (sequence, head) pair."""
    b = bh // num_heads
    h = bh % num_heads
    if VARLEN:
        start = tl.load(cu_q + b)
        return b, h, start, tl.load(cu_q + b + 1) - start, h, (start + b * PAD) // PAD * PAD
    else:
        return b, h, 0, seqlen_q, bh, 0


@triton.jit(do_not_specialize=["num_turns", "num_counts"])
def backward_preprocess(
    out, dout,  # [B, Sq, H, D] or [total, H, D]
    lse, dlse,  # fp32, natural log, [B, H, Sq] or [H, total], and its gradient or None
    lse_log2, delta, sums,  # scratch: see the module docstring
    turns,  # int32: num_turns, then one a row, num_counts together, then one; or None
    cu_q,  # int32 [B + 1]; varlen only
    stride_ob, stride_os, stride_oh, stride_db, stride_ds, stride_dh, stride_lb, stride_lh, stride_gb, stride_gh,
    seqlen_q, padded, num_heads, num_blocks, num_turns, num_counts,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, VARLEN: tl.constexpr,
    HAS_DLSE: tl.constexpr, FIRST_STORES: tl.constexpr, ROUNDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO ∘ O) - dLSE, LSE in log2 units, and zeroed dQ sums (FIRST_STORES: a zeroed turn, which says
    that there are none yet), for BLOCK queries; also past a sequence's end, as far as its last block of BLOCK_M queries
    reaches. ROUNDS: zeroed counts of the key blocks that have added theirs and of the tiles that were taken. PDL: the
    main kernel may start beside this one.

    The derivative of LSE with respect to S is P, so its gradient enters dS = P ∘ (dP - delta) through delta.
    Rows that saw no key, and padding rows, get LSE = +inf: their P is 0.
    """
    if PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    if ROUNDS:  # noqa: SIM102 (a constexpr)
        if pid == 0:
            tl.store(turns + num_counts, 0)
    bh = pid // num_blocks
    m0 = (pid % num_blocks) * BLOCK
    b, h, start, length, row, column = _locate(bh, num_heads, cu_q, seqlen_q, VARLEN)
    if m0 // BLOCK_M * BLOCK_M < length:
        m = m0 + tl.arange(0, BLOCK)
        valid = m < length
        b64 = b.to(tl.int64)
        h64 = h.to(tl.int64)
        rows = (start + m).to(tl.int64)
        o_rows = out + b64 * stride_ob + h64 * stride_oh + rows[:, None] * stride_os
        do_rows = dout + b64 * stride_db + h64 * stride_dh + rows[:, None] * stride_ds
        PIECE: tl.constexpr = 64 if D == 192 else D  # columns: a tensor has powers of two for its sizes
        COLUMNS: tl.constexpr = 128 if PIECE > 128 else PIECE  # what the registers hold
        total = tl.zeros((BLOCK,), tl.float32)
        for d0 in tl.static_range(0, D, COLUMNS):
            d = d0 + tl.arange(0, COLUMNS)
            mask = valid[:, None] & (d < HEAD_DIM)[None, :]
            o = tl.load(o_rows + d[None, :], mask, 0.0)
            do = tl.load(do_rows + d[None, :], mask, 0.0)
            total += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if HAS_DLSE:
            total -= tl.load(dlse + b64 * stride_gb + h64 * stride_gh + rows, valid, 0.0)
        value = tl.load(lse + b64 * stride_lb + h64 * stride_lh + rows, valid, float("-inf"))
        value = tl.where(value == float("-inf"), float("inf"), value * LOG2E)
        place = row.to(tl.int64) * padded + column + m
        tl.store(lse_log2 + place, value)
        tl.store(delta + place, total)
        first = row.to(tl.int64) * padded + column + m0
        if FIRST_STORES:
            tl.static_assert(BLOCK == 64)
            tl.store(turns + first // BLOCK, 0)
        else:
            for d0 in tl.static_range(0, D, PIECE):
                zero = tl.zeros((BLOCK * PIECE,), tl.float32)
                tl.store(sums + first * D + BLOCK * d0 + tl.arange(0, BLOCK * PIECE), zero)
        if ROUNDS:  # noqa: SIM102 (a constexpr)
            if m0 == 0:
                tl.store(turns + num_turns + row, 0)


@triton.jit
def backward_postprocess(
    sums, turns, dq, cu_q,
    stride_qb, stride_qs, stride_qh,
    seqlen_q, padded, num_heads, num_blocks,
    scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, COLUMN_WARPGROUPS: tl.constexpr,
    VARLEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dQ = scale * sums, out of register order, for 64 queries; 0 where no key block has had its turn.
    COLUMN_WARPGROUPS of the main kernel share out dQ's columns."""
    if PDL:  # launched while the main kernel runs
        gdc_wait()
    pid = tl.program_id(0)
    bh = pid // num_blocks
    m0 = (pid % num_blocks) * 64
    b, h, start, length, row, column = _locate(bh, num_heads, cu_q, seqlen_q, VARLEN)
    if m0 < length:
        first = row.to(tl.int64) * padded + column + m0
        W: tl.constexpr = COLUMN_WARPGROUPS
        COLUMNS: tl.constexpr = 64 if D == 192 else D  # powers of two; one warpgroup's columns lie in their order
        for d0 in tl.static_range(0, D, COLUMNS):
            x = tl.load(sums + first * D + 64 * d0 + tl.arange(0, 64 * COLUMNS)) * scale
            if turns is not None:
                turn = tl.load(turns + first // BLOCK_M * (BLOCK_M // 64))
                x = tl.where(turn > 0, x, 0.0)  # the sums were never written: any bits
            # k, warpgroup, warp, lane row, lane column, r row, r column
            x = tl.reshape(x, (COLUMNS // 8 // W, W, 4, 8, 4, 2, 2))
            x = tl.reshape(tl.permute(x, (2, 5, 3, 1, 0, 4, 6)), (64, COLUMNS))
            m = m0 + tl.arange(0, 64)
            d = d0 + tl.arange(0, COLUMNS)
            rows = (start + m).to(tl.int64)
            place = b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh + rows[:, None] * stride_qs + d[None, :]
            mask = (m < length)[:, None] & (d < HEAD_DIM)[None, :]
            tl.store(dq + place, x.to(dq.dtype.element_ty), mask)
