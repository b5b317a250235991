"""Attention by its definition, in any precision: the truth that kernels are measured against.

    O = dropout(softmax(mask(cap(scale * Q Kᵀ) + alibi))) V,    LSE_i = log sum_j exp(score_ij)

Everything is materialised (S x S) and differentiable by autograd. With ``dtype=torch.float64`` it is the truth; with
the inputs' own dtype it is the plain implementation whose rounding error bounds what a kernel may have.
"""

import torch
from torch import Tensor


def visibility(seqlen_q: int, seqlen_k: int, window_left: int, window_right: int, device: torch.device) -> Tensor:
    """(Sq, Sk) bool: query i sees key j iff -window_right <= i + Sk - Sq - j <= window_left (-1: no limit)."""
    distance = relative_position(seqlen_q, seqlen_k, device)
    mask = torch.ones_like(distance, dtype=torch.bool)
    if window_left >= 0:
        mask &= distance <= window_left
    if window_right >= 0:
        mask &= distance >= -window_right
    return mask


def relative_position(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """(Sq, Sk) int64: i + Sk - Sq - j, how far key j lies before query i."""
    rows = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    return rows - torch.arange(seqlen_k, device=device)[None, :]


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, S, Hk, D) -> (B, S, H, D): query head h reads key/value head h // (H / Hk)."""
    return x.repeat_interleave(num_heads // x.shape[2], dim=2)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_keep: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(out (B, Sq, H, D), lse (B, H, Sq)) in ``dtype``, every step computed in ``dtype``.

    Args:
        q: (B, Sq, H, D); k, v: (B, Sk, Hk, D).
        dropout_keep: (B, H, Sq, Sk) bool, True where the softmax entry is kept; needed when dropout_p > 0.
        The rest as in :func:`kernels.flash_attn_func`.
    """
    seqlen_q, num_heads, head_dim = q.shape[1:]
    seqlen_k = k.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    q, k, v = q.to(dtype), repeat_heads(k.to(dtype), num_heads), repeat_heads(v.to(dtype), num_heads)
    scores = torch.einsum("bihd,bjhd->bhij", q * scale, k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(dtype).expand(q.shape[0], num_heads)[:, :, None, None]
        scores = scores - slopes * relative_position(seqlen_q, seqlen_k, q.device).abs().to(dtype)
    mask = visibility(seqlen_q, seqlen_k, window_size[0], 0 if causal else window_size[1], q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    # Rows that see no key would be NaN, and so would their gradients: give them scores, then remove the result
    empty = ~mask.any(dim=-1, keepdim=True) if seqlen_k > 0 else mask.new_ones(seqlen_q, 1)
    probs = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(~mask, 0.0)
    if dropout_p > 0:
        assert dropout_keep is not None, "dropout_p > 0 needs dropout_keep"
        probs = probs.masked_fill(~dropout_keep, 0.0) / (1.0 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", probs, v), lse


def attention_varlen_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """(out (total_q, H, D), lse (H, total_q)) of packed sequences: :func:`attention_reference` for each in turn.
    alibi_slopes and dropout_keep are indexed by sequence; tokens past the last offset get 0 and -inf."""
    dtype = options.get("dtype", torch.float64)
    slopes, keep = options.pop("alibi_slopes", None), options.pop("dropout_keep", None)
    outs, lses = [], []
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        rows = slice(bounds_q[b], bounds_q[b + 1])
        cols = slice(bounds_k[b], bounds_k[b + 1])
        own: dict[str, object] = dict(options)
        if isinstance(slopes, Tensor):
            own["alibi_slopes"] = slopes if slopes.ndim == 1 else slopes[b]
        if isinstance(keep, Tensor):
            own["dropout_keep"] = keep[b : b + 1, :, : rows.stop - rows.start, : cols.stop - cols.start]
        out, lse = attention_reference(q[None, rows], k[None, cols], v[None, cols], **own)  # type: ignore[arg-type]
        outs.append(out[0])
        lses.append(lse[0])
    tail = q.shape[0] - bounds_q[-1]
    outs.append(q.new_zeros((tail, *q.shape[1:]), dtype=dtype))  # type: ignore[call-overload]
    lses.append(q.new_full((q.shape[1], tail), float("-inf"), dtype=dtype))  # type: ignore[call-overload]
    return torch.cat(outs), torch.cat(lses, dim=1)
