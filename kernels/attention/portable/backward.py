"""FlashAttention-2 backward in Triton, without atomics: bitwise repeatable.

With P recomputed from the saved log-sum-exp, and per row delta = sum_d dO * O - dLSE:

    dV = P^T dO        dP = dO V^T        dS = P * (dP - delta)        dQ = scale dS K        dK = scale dS^T Q

(Dao 2023, algorithm 2; with dropout P is masked and scaled in dV, dP likewise in dS.) Three kernels:
``delta``; dQ with one program per query block; dK and dV with one program per key block, which also sums over
the query heads of a group. Two more products per tile pair than a fused kernel (7 instead of 5) buy one
writer per output: no fp32 dQ buffer, no zeroing, no order of additions that varies.

Layout and dtypes as in ``forward``; dS and P are rounded to the input dtype for their products.
"""

import triton
import triton.language as tl

from kernels.attention.portable.common import (
    LOG2_E,
    bias_scores,
    decode_tile,
    dot,
    dropout_keep,
    head_base,
    key_blocks,
    load_tile,
    query_blocks,
    sequence_range,
    store_tile,
    visible,
)


@triton.jit(do_not_specialize=["seqlen_q", "num_heads", "num_blocks"])
def attention_delta(
    DOut,  # (B, Sq, H, D) or (total_q, H, D)
    Out,  # as DOut
    Lse,  # (B, H, Sq) or (H, total_q) fp32, natural log
    DLse,  # as Lse, HAS_DLSE only
    Lse2,  # as Lse
    Delta,  # as Lse
    CuQ,  # (B + 1,) int32, VARLEN only
    stride_dob,
    stride_dos,
    stride_doh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lb,
    stride_lh,
    seqlen_q,
    num_heads,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Delta_i = sum_d dO_id O_id - dLSE_i. (d LSE_i / d S_ij = P_ij, so dLSE enters dS with the sign of
    dP.) Lse2: LSE in log2 units, +inf for rows that saw no key, so that the other kernels get P = 0 without a test."""
    row = (tl.program_id(0) % num_blocks) * BLOCK_M
    head_index = tl.program_id(0) // num_blocks
    batch = head_index // num_heads
    head = head_index % num_heads
    start, seqlen_q = sequence_range(CuQ, batch, seqlen_q, VARLEN)
    if VARLEN:  # noqa: SIM102
        if row >= seqlen_q:
            return
    do_base = head_base(DOut, batch, head, start, stride_dob, stride_dos, stride_doh)
    o_base = head_base(Out, batch, head, start, stride_ob, stride_os, stride_oh)
    do = load_tile(do_base, row, seqlen_q, stride_dos, BLOCK_M, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    o = load_tile(o_base, row, seqlen_q, stride_os, BLOCK_M, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    delta = tl.sum(do * o, 1)
    rows = row + tl.arange(0, BLOCK_M)
    exists = rows < seqlen_q
    if HAS_DLSE:
        dl_base = head_base(DLse, batch, head, start, stride_lb, 1, stride_lh)
        delta -= tl.load(dl_base + rows, mask=exists, other=0.0)
    lse = tl.load(head_base(Lse, batch, head, start, stride_lb, 1, stride_lh) + rows, mask=exists, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    tl.store(head_base(Lse2, batch, head, start, stride_lb, 1, stride_lh) + rows, lse, mask=exists)
    tl.store(head_base(Delta, batch, head, start, stride_lb, 1, stride_lh) + rows, delta, mask=exists)


@triton.jit
def _load_lse(base, row, seqlen_q, BLOCK_M: tl.constexpr, BOUNDED: tl.constexpr):
    """Lse2 of a query block. Rows that do not exist (BOUNDED) get +inf, so that P = 0."""
    rows = row + tl.arange(0, BLOCK_M)
    if BOUNDED:
        lse = tl.load(base + rows, mask=rows < seqlen_q, other=float("inf"))
    else:
        lse = tl.load(base + rows)
    return lse


@triton.jit
def _load_delta(base, row, seqlen_q, BLOCK_M: tl.constexpr, BOUNDED: tl.constexpr):
    """Delta of a query block, 0 for rows that do not exist."""
    rows = row + tl.arange(0, BLOCK_M)
    if BOUNDED:
        delta = tl.load(base + rows, mask=rows < seqlen_q, other=0.0)
    else:
        delta = tl.load(base + rows)
    return delta


@triton.jit(
    do_not_specialize=[
        "seqlen_q",
        "seqlen_k",
        "num_heads_k",
        "num_blocks",
        "total_heads_k",
        "section",
        "window_left",
        "window_right",
        "dropout_threshold",
    ]
)
def attention_dkdv(
    Q,  # (B, Sq, H, D) or (total_q, H, D)
    K,  # (B, Sk, Hk, D) or (total_k, Hk, D)
    V,  # as K
    DOut,  # as Q
    Lse2,  # (B, H, Sq) or (H, total_q) fp32, from attention_delta
    Delta,  # as Lse2
    DK,  # as K
    DV,  # as K
    CuQ,  # (B + 1,) int32, VARLEN only
    CuK,  # (B + 1,) int32, VARLEN only
    Slopes,  # (H,) or (B, H) fp32, HAS_ALIBI only
    Rng,  # (2,) int64, HAS_DROPOUT only
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_dob,
    stride_dos,
    stride_doh,
    stride_dkb,
    stride_dks,
    stride_dkh,
    stride_dvb,
    stride_dvs,
    stride_dvh,
    stride_lb,
    stride_lh,
    stride_slope,
    seqlen_q,
    seqlen_k,
    num_heads_k,
    num_blocks,
    total_heads_k,
    section,
    window_left,
    window_right,
    dropout_threshold,
    scale,
    softcap,
    softmax_scale,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK and dV of one key block of one key/value head, summed over the GROUP query heads that share it.
    Blocks ascend: under a causal mask the first key blocks are the longest. ``scale`` is softmax_scale * log2
    e."""
    block, head_index = decode_tile(tl.program_id(0), num_blocks, total_heads_k, section)
    batch = head_index // num_heads_k
    head_k = head_index % num_heads_k
    start_q, seqlen_q = sequence_range(CuQ, batch, seqlen_q, VARLEN)
    start_k, seqlen_k = sequence_range(CuK, batch, seqlen_k, VARLEN)
    col = block * BLOCK_N
    if VARLEN:  # noqa: SIM102 (a constexpr, decided before the value is traced); the grid fits the longest sequence
        if col >= seqlen_k:
            return
    offset = seqlen_k - seqlen_q
    k_base = head_base(K, batch, head_k, start_k, stride_kb, stride_ks, stride_kh)
    v_base = head_base(V, batch, head_k, start_k, stride_vb, stride_vs, stride_vh)
    k = load_tile(k_base, col, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_base, col, seqlen_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    cols = (col + tl.arange(0, BLOCK_N))[:, None]
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    first, full_first, full_last, last = query_blocks(
        col, seqlen_q, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    if HAS_DROPOUT:  # noqa: SIM102 (a constexpr)
        # Else LLVM may set the sums to zero between the test of an empty loop and the wait behind it, which serialises
        # wgmma (C7515): where values that the mask generator uses are wanted after the loop too
        if first >= last:
            dk_base = head_base(DK, batch, head_k, start_k, stride_dkb, stride_dks, stride_dkh)
            dv_base = head_base(DV, batch, head_k, start_k, stride_dvb, stride_dvs, stride_dvh)
            store_tile(dk_base, col, seqlen_k, stride_dks, dk, BLOCK_N, HEAD_DIM, BLOCK_D)
            store_tile(dv_base, col, seqlen_k, stride_dvs, dv, BLOCK_N, HEAD_DIM, BLOCK_D)
            return
    for member in tl.range(0, GROUP):
        head = head_k * GROUP + member
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(Slopes + batch * stride_slope + head) * LOG2_E
        q_base = head_base(Q, batch, head, start_q, stride_qb, stride_qs, stride_qh)
        do_base = head_base(DOut, batch, head, start_q, stride_dob, stride_dos, stride_doh)
        l_base = head_base(Lse2, batch, head, start_q, stride_lb, 1, stride_lh)
        d_base = head_base(Delta, batch, head, start_q, stride_lb, 1, stride_lh)
        flat_head = batch * (num_heads_k * GROUP) + head
        # One loop, and a branch around the mask, as in the forward. Everything is transposed (keys are rows), so that
        # P^T and dS^T are left operands straight from registers.
        for query_block in tl.range(first, last):
            row = query_block * BLOCK_M
            rows = (row + tl.arange(0, BLOCK_M))[None, :]
            q = load_tile(q_base, row, seqlen_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, not EVEN_Q)
            lse = _load_lse(l_base, row, seqlen_q, BLOCK_M, not EVEN_Q)
            products = dot(k, tl.trans(q))  # (BLOCK_N, BLOCK_M)
            scores, cap_slope = bias_scores(products, rows, cols, offset, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
            p = tl.exp2(scores - lse[None, :])
            if HAS_LEFT or HAS_RIGHT:  # noqa: SIM102 (a constexpr)
                # At width 256 the warps share out a tile's columns too, and a branch there serialises wgmma
                if BLOCK_D > 128 or (query_block < full_first) | (query_block >= full_last):
                    # keys past the end need no mask: their rows of dk and dv are never stored
                    mask = visible(rows, cols, offset, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, False)
                    p = tl.where(mask, p, 0.0)
            do = load_tile(do_base, row, seqlen_q, stride_dos, BLOCK_M, HEAD_DIM, BLOCK_D, not EVEN_Q)
            dp = dot(v, tl.trans(do))  # (BLOCK_N, BLOCK_M)
            p_kept = p
            if HAS_DROPOUT:
                keep = tl.trans(dropout_keep(Rng, flat_head, row, col, dropout_threshold, BLOCK_M, BLOCK_N))
                p_kept = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dv = dot(p_kept.to(do.dtype), do, dv)
            # loaded here, not with lse: a value per column costs many registers while it lives
            delta = _load_delta(d_base, row, seqlen_q, BLOCK_M, not EVEN_Q)
            ds = p * (dp - delta[None, :]) * cap_slope if HAS_SOFTCAP else p * (dp - delta[None, :])
            dk = dot(ds.to(q.dtype), q, dk)

    dk_base = head_base(DK, batch, head_k, start_k, stride_dkb, stride_dks, stride_dkh)
    dv_base = head_base(DV, batch, head_k, start_k, stride_dvb, stride_dvs, stride_dvh)
    store_tile(dk_base, col, seqlen_k, stride_dks, dk * softmax_scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(dv_base, col, seqlen_k, stride_dvs, dv * keep_scale, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "seqlen_q",
        "seqlen_k",
        "num_heads",
        "num_blocks",
        "total_heads",
        "section",
        "window_left",
        "window_right",
        "dropout_threshold",
    ]
)
def attention_dq(
    Q,  # (B, Sq, H, D) or (total_q, H, D)
    K,  # (B, Sk, Hk, D) or (total_k, Hk, D)
    V,  # as K
    DOut,  # as Q
    Lse2,  # (B, H, Sq) or (H, total_q) fp32, from attention_delta
    Delta,  # as Lse2
    DQ,  # as Q
    CuQ,  # (B + 1,) int32, VARLEN only
    CuK,  # (B + 1,) int32, VARLEN only
    Slopes,  # (H,) or (B, H) fp32, HAS_ALIBI only
    Rng,  # (2,) int64, HAS_DROPOUT only
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_dob,
    stride_dos,
    stride_doh,
    stride_dqb,
    stride_dqs,
    stride_dqh,
    stride_lb,
    stride_lh,
    stride_slope,
    seqlen_q,
    seqlen_k,
    num_heads,
    num_blocks,
    total_heads,
    section,
    window_left,
    window_right,
    dropout_threshold,
    scale,
    softcap,
    softmax_scale,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dQ of one query block of one head, scheduled like the forward. ``scale`` is softmax_scale * log2 e."""
    block, head_index = decode_tile(tl.program_id(0), num_blocks, total_heads, section)
    block = num_blocks - 1 - block
    batch = head_index // num_heads
    head = head_index % num_heads
    start_q, seqlen_q = sequence_range(CuQ, batch, seqlen_q, VARLEN)
    start_k, seqlen_k = sequence_range(CuK, batch, seqlen_k, VARLEN)
    row = block * BLOCK_M
    if VARLEN:  # noqa: SIM102 (a constexpr, decided before the value is traced); the grid fits the longest sequence
        if row >= seqlen_q:
            return
    offset = seqlen_k - seqlen_q
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(Slopes + batch * stride_slope + head) * LOG2_E
    q_base = head_base(Q, batch, head, start_q, stride_qb, stride_qs, stride_qh)
    do_base = head_base(DOut, batch, head, start_q, stride_dob, stride_dos, stride_doh)
    k_base = head_base(K, batch, head // GROUP, start_k, stride_kb, stride_ks, stride_kh)
    v_base = head_base(V, batch, head // GROUP, start_k, stride_vb, stride_vs, stride_vh)
    l_base = head_base(Lse2, batch, head, start_q, stride_lb, 1, stride_lh)
    d_base = head_base(Delta, batch, head, start_q, stride_lb, 1, stride_lh)
    q = load_tile(q_base, row, seqlen_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    do = load_tile(do_base, row, seqlen_q, stride_dos, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    lse = _load_lse(l_base, row, seqlen_q, BLOCK_M, True)
    delta = _load_delta(d_base, row, seqlen_q, BLOCK_M, True)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    first, full_first, full_last, last = key_blocks(
        row, seqlen_q, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    if HAS_DROPOUT:  # noqa: SIM102 (a constexpr)
        if first >= last:  # as in dK and dV
            dq_base = head_base(DQ, batch, head, start_q, stride_dqb, stride_dqs, stride_dqh)
            store_tile(dq_base, row, seqlen_q, stride_dqs, dq, BLOCK_M, HEAD_DIM, BLOCK_D)
            return
    rows = (row + tl.arange(0, BLOCK_M))[:, None]
    for key_block in tl.range(first, last):  # one loop, and a branch around the mask, as in the forward
        col = key_block * BLOCK_N
        cols = (col + tl.arange(0, BLOCK_N))[None, :]
        k = load_tile(k_base, col, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, not EVEN_K)
        v = load_tile(v_base, col, seqlen_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, not EVEN_K)
        products = dot(q, tl.trans(k))  # (BLOCK_M, BLOCK_N)
        scores, cap_slope = bias_scores(products, rows, cols, offset, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
        p = tl.exp2(scores - lse[:, None])
        if HAS_LEFT or HAS_RIGHT or not EVEN_K:  # noqa: SIM102 (a constexpr)
            if (key_block < full_first) | (key_block >= full_last):
                mask = visible(rows, cols, offset, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, not EVEN_K)
                p = tl.where(mask, p, 0.0)
        dp = dot(do, tl.trans(v))  # (BLOCK_M, BLOCK_N)
        if HAS_DROPOUT:
            keep = dropout_keep(Rng, head_index, row, col, dropout_threshold, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None]) * cap_slope if HAS_SOFTCAP else p * (dp - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq)
    dq_base = head_base(DQ, batch, head, start_q, stride_dqb, stride_dqs, stride_dqh)
    store_tile(dq_base, row, seqlen_q, stride_dqs, dq * softmax_scale, BLOCK_M, HEAD_DIM, BLOCK_D)
