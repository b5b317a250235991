"""FlashAttention-2 forward in Triton.

    O = dropout(softmax(mask(cap(scale * Q Kᵀ) + alibi))) V,    LSE_i = log sum_j exp(score_ij)

One program per (query block, head): it walks the visible key blocks with an unnormalised accumulator and
divides once at the end (Dao 2023, "FlashAttention-2", algorithm 1; the online softmax is Milakov & Gimelshein
2018). Blocks that every query of the tile sees entirely run without masks.

Layout: q, out (B, Sq, H, D), k, v (B, Sk, Hk, D) or packed (total, heads, D); any strides but the last, which
is 1. dtypes: fp16, bf16, fp32; products accumulate in fp32, statistics are fp32, P is rounded to the dtype of
V.
"""

import triton
import triton.language as tl

from kernels.attention.portable.common import (
    LN_2,
    LOG2_E,
    bias_scores,
    decode_tile,
    dot,
    dropout_keep,
    head_base,
    key_blocks,
    load_tile,
    sequence_range,
    store_tile,
    visible,
)


@triton.jit
def _online_softmax(
    products,
    row_max,
    row_sum,
    rows,
    cols,
    edge,
    seqlen_k,
    offset,
    scale,
    softcap,
    slope,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """One step of the online softmax over a (BLOCK_M, BLOCK_N) tile of raw products: (P, alpha, max, sum).
    alpha rescales what was accumulated so far. max is in log2 units. ``edge``: some pair of the tile is hidden."""
    MASKED: tl.constexpr = HAS_LEFT or HAS_RIGHT or BOUNDED
    if HAS_SOFTCAP or HAS_ALIBI:
        products, _ = bias_scores(products, rows, cols, offset, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
        scale = 1.0
    if MASKED:  # noqa: SIM102 (a constexpr, decided before the value is traced)
        if edge:
            mask = visible(rows, cols, offset, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BOUNDED)
            products = tl.where(mask, products, float("-inf"))
    # scale > 0 here, so the maximum may be taken before scaling: one FMA and one exp2 per score
    new_max = tl.maximum(row_max, tl.max(products, 1) * scale)
    # a row that has seen no key yet: -inf - -inf would be NaN
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    p = tl.exp2(products * scale - shift[:, None])
    alpha = tl.exp2(row_max - shift)
    return p, alpha, new_max, row_sum * alpha + tl.sum(p, 1)


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
def attention_forward(
    Q,  # (B, Sq, H, D) or (total_q, H, D)
    K,  # (B, Sk, Hk, D) or (total_k, Hk, D)
    V,  # as K
    Out,  # as Q
    Lse,  # (B, H, Sq) or (H, total_q) fp32
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
    stride_ob,
    stride_os,
    stride_oh,
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
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    VARLEN: tl.constexpr,
    NEGATE: tl.constexpr,
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
    """Out and Lse of one query block of one head. ``scale`` is |softmax_scale| * log2 e, ``softcap`` the cap
    times log2 e, ``keep_scale`` 1 / (1 - dropout_p); NEGATE: softmax_scale < 0."""
    block, head_index = decode_tile(tl.program_id(0), num_blocks, total_heads, section)
    block = num_blocks - 1 - block  # under a causal mask the last query blocks are the longest: start with them
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
    k_base = head_base(K, batch, head // GROUP, start_k, stride_kb, stride_ks, stride_kh)
    v_base = head_base(V, batch, head // GROUP, start_k, stride_vb, stride_vs, stride_vh)
    q = load_tile(q_base, row, seqlen_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    if NEGATE:
        q = -q
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    first, full_first, full_last, last = key_blocks(
        row, seqlen_q, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    rows = (row + tl.arange(0, BLOCK_M))[:, None]
    # One loop, and a branch around the mask: a loop per kind of block would drain and refill the pipeline of loads
    # between them, and keep the addresses of both.
    for key_block in tl.range(first, last):
        col = key_block * BLOCK_N
        cols = (col + tl.arange(0, BLOCK_N))[None, :]
        k = load_tile(k_base, col, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, not EVEN_K)
        products = dot(q, tl.trans(k))  # (BLOCK_M, BLOCK_N)
        p, alpha, row_max, row_sum = _online_softmax(
            products,
            row_max,
            row_sum,
            rows,
            cols,
            (key_block < full_first) | (key_block >= full_last),
            seqlen_k,
            offset,
            scale,
            softcap,
            slope,
            window_left,
            window_right,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_ALIBI,
            not EVEN_K,
        )
        if HAS_DROPOUT:
            keep = dropout_keep(Rng, head_index, row, col, dropout_threshold, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v = load_tile(v_base, col, seqlen_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, not EVEN_K)
        acc = dot(p.to(v.dtype), v, acc * alpha[:, None])

    empty = row_sum == 0.0  # the row saw no key: out 0, lse -inf
    row_sum = tl.where(empty, 1.0, row_sum)
    acc = acc * (keep_scale / row_sum)[:, None]
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    o_base = head_base(Out, batch, head, start_q, stride_ob, stride_os, stride_oh)
    store_tile(o_base, row, seqlen_q, stride_os, acc, BLOCK_M, HEAD_DIM, BLOCK_D)
    rows = row + tl.arange(0, BLOCK_M)
    l_base = head_base(Lse, batch, head, start_q, stride_lb, 1, stride_lh)
    tl.store(l_base + rows, lse, mask=rows < seqlen_q)
