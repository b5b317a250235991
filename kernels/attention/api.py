"""flash-attn 2's public functions on our kernels: same names, argument order, defaults, layouts and meaning.

Common to all functions:

- dtypes float16, bfloat16 (and float32, exact and slow); head dim D from 1 to 256; H % Hk == 0, query head h reads
  key/value head h // (H / Hk).
- With offset = Sk - Sq, query i sees key j iff i + offset - window_size[0] <= j <= i + offset + window_size[1];
  -1 removes a limit; ``causal`` sets the right one to 0 (aligned to the bottom right corner). A query that sees no key
  gets 0 and a log-sum-exp of -inf.
- score = scale * q·k, then softcap * tanh(score / softcap) if softcap > 0, then - slope * |i + offset - j|.
- ``deterministic``: bitwise repeatable gradients. Outputs, dK and dV always are. docs/attention.md tells more.
- ``return_attn_probs``: return (out, softmax_lse, S_dmask). softmax_lse: fp32, natural log, (B, H, Sq) or
  (H, total_q), differentiable. S_dmask: with dropout the softmax probabilities (B, H, Sq, Sk), negative where
  dropped (this one result is quadratic in S, for tests); an empty tensor without dropout.

Source: Dao 2023, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning".
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels.attention import op as _op  # registers the operators

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ops: Any = getattr(torch.ops, _op.NAMESPACE)
_HASHED = frozenset((int, float, bool, type(None)))
"""Types of scalar arguments that a call may be known by: their values stay what they are."""
_OVERLOADS = {name: getattr(_ops, name).default for name in _op.PACKINGS}


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, rank: int) -> None:
    layout = "(batch, seqlen, heads, head_dim)" if rank == 4 else "(total_tokens, heads, head_dim)"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != rank:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(f"q is on {q.device}, {name} on {tensor.device}: one device is needed")
        if tensor.dtype != q.dtype:
            raise TypeError(f"q is {q.dtype}, {name} {tensor.dtype}: one dtype is needed")
    if q.dtype not in DTYPES:
        raise TypeError(f"attention takes float16, bfloat16 or float32, got {q.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if rank == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]}, k and v {k.shape[0]}")
    head_dim, heads, heads_k = q.shape[-1], q.shape[-2], k.shape[-2]
    if head_dim != k.shape[-1]:
        raise ValueError(f"q has head dim {head_dim}, k and v {k.shape[-1]}: they must be equal")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head dim must be 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if heads == 0 or heads_k == 0 or heads % heads_k != 0:
        raise ValueError(f"q has {heads} heads, which is no positive multiple of the {heads_k} of k and v")


def _check_packed(name: str, tensor: Tensor, rank: int, count: int) -> None:
    lead = "batch, seqlen" if rank == 5 else "total_tokens"
    if tensor.ndim != rank or tensor.shape[-3] != count:
        raise ValueError(f"{name} must be ({lead}, {count}, heads, head_dim), got {tuple(tensor.shape)}")


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name} must be (batch + 1,) int32, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{name} is on {cu_seqlens.device}, q on {q.device}: one device is needed")


def _check_alibi(alibi_slopes: Tensor | None, q: Tensor, batch: int) -> None:
    if alibi_slopes is None:
        return
    heads = q.shape[-2]
    if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)) or alibi_slopes.dtype != torch.float32:
        raise ValueError(
            f"alibi_slopes must be ({heads},) or ({batch}, {heads}) float32, "
            f"got {tuple(alibi_slopes.shape)} {alibi_slopes.dtype}"
        )
    if alibi_slopes.device != q.device:
        raise ValueError(f"alibi_slopes are on {alibi_slopes.device}, q on {q.device}: one device is needed")


def _random_state(tensor: Tensor) -> Tensor:
    """(2,) int64: seed and offset of a dropout mask, from torch's own generator: reproducible under manual_seed, new on
    every replay of a CUDA graph."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=tensor.device)


def _check(
    packed: tuple[Tensor, ...],
    cu_seqlens: tuple[Tensor, Tensor] | None,
    dropout_p: float,
    window_size: Sequence[int] | Tensor,
    alibi_slopes: Tensor | None,
) -> tuple[int, int]:
    """Raise what is wrong with the arguments; returns the window."""
    q, k, v = _op.unpack(packed)
    _check_tensors(q, k, v, rank=4 if cu_seqlens is None else 3)
    if cu_seqlens is not None:
        cu_q, cu_k = cu_seqlens
        _check_cu_seqlens("cu_seqlens_q", cu_q, q)
        _check_cu_seqlens("cu_seqlens_k", cu_k, q)
        if cu_q.shape != cu_k.shape:
            raise ValueError(f"cu_seqlens_q has {cu_q.shape[0]} entries, cu_seqlens_k {cu_k.shape[0]}")
    _check_alibi(alibi_slopes, q, q.shape[0] if cu_seqlens is None else cu_seqlens[0].shape[0] - 1)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {window_size}")
    return int(window_size[0]), int(window_size[1])


def _refuse_tangents(tensors: tuple[Tensor | None, ...]) -> None:
    """Forward-mode AD through operators without a formula for it: PyTorch looks only where an input requires a
    gradient, and else drops the tangents."""
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "flash attention has no forward-mode derivative; use standard_attention (model.attention=standard) "
            "where one is needed"
        )


def _refuse_learned_slopes(alibi_slopes: Tensor) -> None:
    """The kernels have no gradient of the slopes, which would stay None, unseen where q, k and v have theirs."""
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "flash attention has no gradient of alibi_slopes: pass alibi_slopes.detach() if they aren't learned, or "
            "use standard_attention, which has it"
        )


def _run(
    name: str,
    packed: tuple[Tensor, ...],
    cu_seqlens: tuple[Tensor, Tensor] | None,
    max_seqlens: tuple[int, int] | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Check the arguments and call operator ``name``, or do at once what it came to for the same geometry before."""
    extras = (*(cu_seqlens or (None, None)), alibi_slopes)
    if forward_ad._current_level >= 0:
        _refuse_tangents((*packed, alibi_slopes))
    if alibi_slopes is not None:
        _refuse_learned_slopes(alibi_slopes)
    key = call = None
    if not torch.compiler.is_dynamo_compiling():
        scalars = (*(max_seqlens or ()), dropout_p, softmax_scale, causal, *window_size, softcap, deterministic)
        if _HASHED.issuperset(map(type, scalars)):
            key = (name, *scalars)
            call = _op.find_call(key, packed, extras)
    if call is not None:
        rng_state = _random_state(packed[0]) if dropout_p > 0.0 else None
        options = (*extras, rng_state, *call.scalars)
        out, lse = _op.run_known(call, packed, options[: _op.NUM_EXTRAS])
    else:
        window = _check(packed, cu_seqlens, dropout_p, window_size, alibi_slopes)
        max_q, max_k = max_seqlens or (packed[0].shape[1], packed[-1].shape[1])
        scale = packed[0].shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        rng_state = _random_state(packed[0]) if dropout_p > 0.0 else None
        options = (*extras, rng_state, max_q, max_k, scale, causal, *window, softcap, dropout_p, deterministic)
        out, lse = _OVERLOADS[name](*packed, *options)
        if key is not None:
            _op.learn_call(key, name, packed, options)
    if not return_attn_probs:
        return out
    if dropout_p == 0.0:
        return out, lse, packed[0].new_empty(0)
    q, k, _ = _op.unpack(packed)
    return out, lse, _ops.attention_probs(q.detach().to(out.dtype), k.detach().to(out.dtype), lse.detach(), *options)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """softmax(scale * q kᵀ) v with masks, without ever storing the S x S matrix.

    Args:
        q: (B, Sq, H, D).
        k, v: (B, Sk, Hk, D), Hk divides H (grouped-query attention; Hk = 1: multi-query).
        dropout_p: probability that a softmax entry is dropped (0 for evaluation).
        softmax_scale: factor on q kᵀ; None: 1 / sqrt(D).
        causal, window_size, softcap, deterministic, return_attn_probs: see the module docstring.
        alibi_slopes: (H,) or (B, H) float32, or None. They get no gradient, and must not require one.

    Returns:
        out (B, Sq, H, D), or (out, softmax_lse (B, H, Sq), S_dmask) with ``return_attn_probs``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names what was given.
        NotImplementedError: slopes that require a gradient, and forward-mode derivatives.
    """
    return _run(
        "attention",
        (q, k, v),
        None,
        None,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` for keys and values in one tensor ``kv`` (B, Sk, 2, Hk, D); its gradient is
    written in place, without a concatenation."""
    _check_packed("kv", kv, rank=5, count=2)
    return _run(
        "attention_kvpacked",
        (q, kv),
        None,
        None,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` for one tensor ``qkv`` (B, S, 3, H, D), e.g. the output of a fused projection;
    its gradient is written in place, without a concatenation."""
    _check_packed("qkv", qkv, rank=5, count=3)
    return _run(
        "attention_qkvpacked",
        (qkv,),
        None,
        None,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention within each of B sequences of different lengths, packed without padding.

    Args:
        q: (total_q, H, D).
        k, v: (total_k, Hk, D).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. Lengths may
            be 0. Tokens past the last offset get out 0, gradient 0.
        max_seqlen_q, max_seqlen_k: at least the longest length (not checked: that would wait for the device).
        block_table: paged keys are an inference feature that these kernels do not have; must be None.
        The rest: see :func:`flash_attn_func`; alibi_slopes (H,) or (B, H).

    Returns:
        out (total_q, H, D), or (out, softmax_lse (H, total_q), S_dmask (B, H, max_seqlen_q, max_seqlen_k)).
    """
    if block_table is not None:
        raise ValueError("block_table (paged keys and values) is not supported: pass None and packed k, v")
    return _run(
        "attention",
        (q, k, v),
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` for keys and values in one tensor ``kv`` (total_k, 2, Hk, D)."""
    _check_packed("kv", kv, rank=4, count=2)
    return _run(
        "attention_kvpacked",
        (q, kv),
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` for one tensor ``qkv`` (total, 3, H, D): self-attention within
    documents."""
    _check_packed("qkv", qkv, rank=4, count=3)
    return _run(
        "attention_qkvpacked",
        (qkv,),
        (cu_seqlens, cu_seqlens),
        (max_seqlen, max_seqlen),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
