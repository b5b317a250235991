"""The softmax probabilities that flash-attn returns with ``return_attn_probs``, for tests of dropout.

    S_dmask_ij = +- exp(score_ij - LSE_i),  negative where dropped, 0 where masked

The one kernel whose result is quadratic in S. It recomputes scores exactly as the backward does.
"""

import triton
import triton.language as tl

from kernels.attention.portable.common import (
    LOG2_E,
    bias_scores,
    dot,
    dropout_keep,
    head_base,
    load_tile,
    sequence_range,
    visible,
)


@triton.jit(
    do_not_specialize=[
        "seqlen_q",
        "seqlen_k",
        "num_heads",
        "num_blocks_m",
        "num_blocks_n",
        "window_left",
        "window_right",
    ]
)
def attention_probs(
    Q,  # (B, Sq, H, D) or (total_q, H, D)
    K,  # (B, Sk, Hk, D) or (total_k, Hk, D)
    Lse,  # (B, H, Sq) or (H, total_q) fp32
    Probs,  # (B, H, max Sq, max Sk), zeroed
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
    stride_pb,
    stride_ps,
    stride_ph,
    stride_lb,
    stride_lh,
    stride_slope,
    seqlen_q,
    seqlen_k,
    num_heads,
    num_blocks_m,
    num_blocks_n,
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
    """One (BLOCK_M, BLOCK_N) tile of Probs."""
    tile = tl.program_id(0)
    col = (tile % num_blocks_n) * BLOCK_N
    row = (tile // num_blocks_n % num_blocks_m) * BLOCK_M
    head_index = tile // (num_blocks_n * num_blocks_m)
    batch = head_index // num_heads
    head = head_index % num_heads
    start_q, seqlen_q = sequence_range(CuQ, batch, seqlen_q, VARLEN)
    start_k, seqlen_k = sequence_range(CuK, batch, seqlen_k, VARLEN)
    offset = seqlen_k - seqlen_q
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(Slopes + batch * stride_slope + head) * LOG2_E
    q_base = head_base(Q, batch, head, start_q, stride_qb, stride_qs, stride_qh)
    k_base = head_base(K, batch, head // GROUP, start_k, stride_kb, stride_ks, stride_kh)
    q = load_tile(q_base, row, seqlen_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    k = load_tile(k_base, col, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    rows = (row + tl.arange(0, BLOCK_M))[:, None]
    cols = (col + tl.arange(0, BLOCK_N))[None, :]
    scores, _ = bias_scores(dot(q, tl.trans(k)), rows, cols, offset, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
    l_base = head_base(Lse, batch, head, start_q, stride_lb, 1, stride_lh)
    lse = tl.load(l_base + rows, mask=rows < seqlen_q, other=0.0) * LOG2_E
    seen = visible(rows, cols, offset, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, True) & (
        rows < seqlen_q
    )
    p = tl.where(seen, tl.exp2(scores - lse), 0.0)
    if HAS_DROPOUT:
        keep = dropout_keep(Rng, head_index, row, col, dropout_threshold, BLOCK_M, BLOCK_N)
        p = tl.where(keep, p, -p)
    p_base = head_base(Probs, batch, head, row.to(tl.int64), stride_pb, stride_ps, stride_ph)
    local = tl.arange(0, BLOCK_M)[:, None].to(tl.int64) * stride_ps
    tl.store(p_base + local + cols, p.to(Probs.dtype.element_ty), mask=seen)
