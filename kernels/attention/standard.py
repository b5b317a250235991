"""Standard attention: matrix product, softmax, matrix product, with the S x S matrix in memory.

The baseline of the comparisons (FlashAttention-2 paper, section 2.2): products in the input dtype, softmax in fp32, as
a careful implementation without fused kernels does it. Memory and traffic grow with S squared.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention.reference import relative_position, repeat_heads, visibility


def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention with the arguments and meaning of :func:`kernels.flash_attn_func`, on any device and dtype.

    Args:
        q: (B, Sq, H, D); k, v: (B, Sk, Hk, D), Hk divides H.

    Returns:
        (B, Sq, H, D) in the dtype of q; differentiable any number of times.
    """
    seqlen_q, num_heads, head_dim = q.shape[1:]
    seqlen_k = k.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    q = q.transpose(1, 2)  # (B, H, Sq, D)
    k = repeat_heads(k, num_heads).transpose(1, 2)  # (B, H, Sk, D)
    v = repeat_heads(v, num_heads).transpose(1, 2)  # (B, H, Sk, D)
    scores = torch.matmul(q * scale, k.transpose(-1, -2)).float()  # (B, H, Sq, Sk)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(q.shape[0], num_heads)[:, :, None, None]  # (B, H, 1, 1)
        scores = scores - slopes * relative_position(seqlen_q, seqlen_k, q.device).abs()
    left, right = int(window_size[0]), 0 if causal else int(window_size[1])
    if left < 0 and right < 0:
        probs = torch.softmax(scores, dim=-1)
    else:
        mask = visibility(seqlen_q, seqlen_k, left, right, q.device)
        empty = ~mask.any(dim=-1, keepdim=True)  # rows that see no key would be NaN: they get 0
        probs = torch.softmax(scores.masked_fill(~mask & ~empty, float("-inf")), dim=-1).masked_fill(empty, 0.0)
    probs = torch.nn.functional.dropout(probs.to(v.dtype), dropout_p, training=dropout_p > 0)
    return torch.matmul(probs, v).transpose(1, 2)  # (B, Sq, H, D)
