"""The attention seam: one function, `attend`, and the implementations behind it by name.

    flash      FlashAttention-2 in Triton (`kernels`), nothing of size S x S in memory
    flash1     the first FlashAttention's schedule, for comparisons
    sdpa       PyTorch's `scaled_dot_product_attention`; what its fast kernels don't know becomes a mask of S x S
    cudnn      the same, by cuDNN alone, its fastest kernels on a Hopper GPU
    standard   product, softmax, product: the baseline

All compute softmax(cap(Q K^T / sqrt(D)) + bias) V over the keys that a query may see: itself and what came before
it, within the window, within its document. Heads of a group share keys and values (Ainslie et al. 2023).

B batch, S sequence, H query heads, K key/value heads, D head dim. Layout (B, S, H, D).
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from configs.errors import UserError
from configs.schema import Attention, ModelConfig, Position
from kernels.attention.api import MAX_HEAD_DIM as FLASH_MAX_HEAD_DIM
from kernels.attention.flash1 import MAX_HEAD_DIM as FLASH1_MAX_HEAD_DIM
from model.dimensions import Dimensions
from model.init import Linear, residual_std
from model.layers import document_ids, rotate
from model.sequence import SequenceGroup, heads_on_rank, to_heads, to_tokens

logger = logging.getLogger(__name__)

DOCUMENTS = "model.attention={} has no document mask; use model.attention=flash or sdpa, or data.document_mask=false"
MAX_HEAD_DIM = {Attention.flash: FLASH_MAX_HEAD_DIM, Attention.flash1: FLASH1_MAX_HEAD_DIM, Attention.cudnn: 128}
"""Largest head dim of the kernels."""


class Context(NamedTuple):
    """What all blocks share in one forward pass. A named tuple, since ZeRO-3's hooks look inside tuples."""

    attention: Attention
    """The implementation, resolved."""
    rotary: tuple[Tensor, Tensor] | None = None
    """cos and sin, see `layers.rotary_tables`; None without rotary positions."""
    alibi: Tensor | None = None
    """ALiBi slopes (H,) fp32, in sequence parallel those of this rank's heads (H/P,); None without ALiBi."""
    cu_seqlens: Tensor | None = None
    """Document starts (n+1,) int32 in the flattened B·S tokens; every sample starts one. None: no documents."""
    max_seqlen: int = 0
    """Upper bound of a document's length; 0 without documents."""
    sequence: SequenceGroup | None = None
    """The ranks that share each sample's tokens; None: this one has them all. `rotary` is of its own tokens."""


class Scores(NamedTuple):
    """How scores become weights: the arguments that all implementations share, besides the context's."""

    window: int | None = None
    softcap: float = 0.0
    dropout: float = 0.0


def problems(config: ModelConfig, attention: Attention, documents: bool = False) -> list[str]:
    """Why an implementation can't compute this config's attention, each with its remedy; empty if it can.

    `documents`: whether `data.document_mask` is on.
    """
    found = []
    head_dim = config.head_dim or config.width // config.num_heads
    name = f"model.attention={attention.value}"
    if attention in MAX_HEAD_DIM and head_dim > MAX_HEAD_DIM[attention]:
        found.append(
            f"{name}: head dim {head_dim} is above the kernels' limit of {MAX_HEAD_DIM[attention]}; "
            "use more heads (model.num_heads, model.head_dim) or model.attention=sdpa"
        )
    if attention in (Attention.sdpa, Attention.cudnn) and config.attention_softcap > 0:
        found.append(
            f"{name} has no soft cap (model.attention_softcap={config.attention_softcap:g}); "
            "use model.attention=flash or standard, or model.attention_softcap=0"
        )
    if attention is Attention.cudnn and head_dim % 8:
        found.append(f"{name}: head dim {head_dim} is no multiple of 8; use model.attention=flash or sdpa")
    if attention in (Attention.flash1, Attention.standard) and documents:
        found.append(DOCUMENTS.format(attention.value))
    if attention is Attention.flash1:
        asked = {
            "model.window": config.window is not None,
            "model.attention_softcap": config.attention_softcap > 0,
            "model.position=alibi": config.position is Position.alibi,
            "model.dropout": config.dropout > 0,
            "model.num_kv_heads": config.num_kv_heads not in (None, config.num_heads),
        }
        found += [f"{name} does not do {key}; use model.attention=flash" for key, on in asked.items() if on]
    return found


def resolve_attention(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Attention:
    """The implementation that `config.attention` means on this device, at this dtype of queries and keys.

    `auto` is flash on CUDA in fp16 and bf16, else sdpa, or standard where sdpa lacks an option; it is said once.
    Raises `UserError` if the implementation asked for can't do what the config asks, or not on this device.
    """
    chosen = config.attention
    if chosen is Attention.auto:
        chosen = _choose(config, device, dtype)
        _say_once(f"model.attention=auto: {chosen.value} on {device.type} in {str(dtype).removeprefix('torch.')}")
    found = problems(config, chosen)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if chosen in (Attention.flash, Attention.flash1) and device.type == "cpu" and not interpreted:
        found.append(f"model.attention={chosen.value} needs a CUDA device; on a CPU use model.attention=sdpa")
    if chosen is Attention.cudnn and (device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16)):
        found.append(
            "model.attention=cudnn needs a CUDA device and 16 bits (engine.precision=bf16 or fp16), given "
            f"{device.type} and {str(dtype).removeprefix('torch.')}; use model.attention=sdpa"
        )
    if found:
        raise UserError("\n".join(found))
    return chosen


def _choose(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Attention:
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and half and not problems(config, Attention.flash):
        return Attention.flash
    return Attention.standard if problems(config, Attention.sdpa) else Attention.sdpa


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


# ---------------------------------------------------------------------------------------------------------------
# PyTorch's attention, and which keys a query sees, where it has to be told
# ---------------------------------------------------------------------------------------------------------------


def visible_keys(q: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    """True where query i of q (B, S, H, D) sees key j; bool (1, 1, S, S), with documents (B, 1, S, S)."""
    batch, length = q.shape[:2]
    index = torch.arange(length, device=q.device)
    distance = index[:, None] - index[None, :]  # (S, S): how far key j lies before query i
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance <= window)
    if cu_seqlens is None:
        return seen[None, None]  # (1, 1, S, S)
    flat = torch.arange(batch * length, device=q.device, dtype=cu_seqlens.dtype)
    document = document_ids(flat, cu_seqlens).view(batch, length)  # (B, S)
    same = document[:, :, None] == document[:, None, :]  # (B, S, S)
    return (seen & same)[:, None]  # (B, 1, S, S)


def alibi_bias(slopes: Tensor, length: int) -> Tensor:
    """slope · (j - i), fp32 (1, H, S, S); only its lower triangle is seen."""
    index = torch.arange(length, device=slopes.device, dtype=torch.float32)
    return slopes[None, :, None, None] * (index[None, :] - index[:, None])


def sdpa(q: Tensor, k: Tensor, v: Tensor, scores: Scores, context: Context) -> Tensor:
    """PyTorch's attention. Plain causal attention takes its fast kernels; all else is passed as a mask."""
    _, length, num_heads, _ = q.shape
    mask = None
    if scores.window is not None or context.cu_seqlens is not None or context.alibi is not None:
        mask = visible_keys(q, scores.window, context.cu_seqlens)
        if context.alibi is not None:
            bias = alibi_bias(context.alibi, length)
            mask = bias.masked_fill(~mask, -torch.inf).to(q.dtype)  # (1 or B, H, S, S)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (B, H, S, D)
        k.transpose(1, 2),  # (B, K, S, D)
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=scores.dropout,
        enable_gqa=num_heads != k.shape[2],
    )
    return out.transpose(1, 2)  # (B, S, H, D)


def cudnn(q: Tensor, k: Tensor, v: Tensor, scores: Scores, context: Context) -> Tensor:
    """PyTorch's attention with cuDNN's kernels and no others."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, scores, context)


# ---------------------------------------------------------------------------------------------------------------
# Implementations of `kernels`
# ---------------------------------------------------------------------------------------------------------------


def _window_size(scores: Scores) -> tuple[int, int]:
    """Keys before and after a query that it sees, -1 for all."""
    return (-1 if scores.window is None else scores.window, 0)


class KernelOptions(TypedDict):
    """The keyword arguments that the kernels share, with flash-attn's meaning."""

    dropout_p: float
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool


def _kernel_options(scores: Scores, context: Context) -> KernelOptions:
    return {
        "dropout_p": scores.dropout,
        "causal": True,
        "window_size": _window_size(scores),
        "softcap": scores.softcap,
        "alibi_slopes": context.alibi,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def flash(q: Tensor, k: Tensor, v: Tensor, scores: Scores, context: Context) -> Tensor:
    """FlashAttention-2 on separate queries, keys and values."""
    options = _kernel_options(scores, context)
    if context.cu_seqlens is None:
        return kernels.flash_attn_func(q, k, v, **options)
    starts, longest = context.cu_seqlens, context.max_seqlen
    q_flat, k_flat, v_flat = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B·S, H or K, D)
    out = kernels.flash_attn_varlen_func(q_flat, k_flat, v_flat, starts, starts, longest, longest, **options)
    return out.view(q.shape)  # (B, S, H, D)


def flash_packed(qkv: Tensor, scores: Scores, context: Context) -> Tensor:
    """FlashAttention-2 on the projection's output itself, (B, S, 3, H, D): no copy to split it, none to join its
    gradient."""
    options = _kernel_options(scores, context)
    if context.cu_seqlens is None:
        return kernels.flash_attn_qkvpacked_func(qkv, **options)
    out = kernels.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), context.cu_seqlens, context.max_seqlen, **options)
    return out.view(*qkv.shape[:2], *qkv.shape[3:])  # (B, S, H, D)


def standard(q: Tensor, k: Tensor, v: Tensor, scores: Scores, context: Context) -> Tensor:
    """Product, softmax in fp32, product; keeps B·H·S·S scores and weights for the backward pass."""
    _refuse_documents(context)
    return kernels.standard_attention(
        q,
        k,
        v,
        dropout_p=scores.dropout,
        causal=True,
        window_size=_window_size(scores),
        softcap=scores.softcap,
        alibi_slopes=context.alibi,
    )


def flash1(q: Tensor, k: Tensor, v: Tensor, scores: Scores, context: Context) -> Tensor:
    """FlashAttention-1's schedule; plain causal attention only, as many key as query heads."""
    _refuse_documents(context)
    return kernels.flash1_attn_func(q, k, v, causal=True)


def _refuse_documents(context: Context) -> None:
    if context.cu_seqlens is not None:
        raise UserError(DOCUMENTS.format(context.attention.value))


IMPLEMENTATIONS: dict[Attention, Callable[[Tensor, Tensor, Tensor, Scores, Context], Tensor]] = {
    Attention.flash: flash,
    Attention.flash1: flash1,
    Attention.sdpa: sdpa,
    Attention.cudnn: cudnn,
    Attention.standard: standard,
}


def attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores, context: Context) -> Tensor:
    """Causal attention of q (B, S, H, D) over k and v (B, S, K, D), by `context.attention`; (B, S, H, D).

    In sequence parallel S/P tokens of a sample come in and go out, and all S are attended to.
    """
    implementation, group = IMPLEMENTATIONS[context.attention], context.sequence
    if group is None:
        return implementation(q, k, v, scores, context)
    sizes = [heads_on_rank(t.shape[2], group.size) for t in (q, k, v)]
    q, k, v = to_heads((q, k, v), group).split(sizes, dim=2)  # (B, S, H/P or K/P, D)
    return to_tokens(implementation(q, k, v, scores, context), group)  # (B, S/P, H, D)


def attend_packed(qkv: Tensor, scores: Scores, context: Context) -> Tensor:
    """`attend` with `flash_packed`: (B, S, 3, H, D) to (B, S, H, D)."""
    group = context.sequence
    if group is None:
        return flash_packed(qkv, scores, context)
    packed = to_heads(qkv.unbind(2), group).unflatten(2, (3, -1))  # (B, S, 3, H/P, D)
    return to_tokens(flash_packed(packed, scores, context), group)  # (B, S/P, H, D)


class SelfAttention(nn.Module):
    """(B, S, E) to (B, S, E): one projection makes queries, keys and values, in this order, heads side by side."""

    def __init__(self, config: ModelConfig, sizes: Dimensions) -> None:
        super().__init__()
        self.sizes = sizes
        self.window = config.window
        self.softcap = config.attention_softcap
        self.dropout = config.dropout
        out_std = residual_std(config.init_std, sizes.num_layers)
        self.qkv = Linear(sizes.width, sizes.qkv_width, bias=config.bias, std=config.init_std)
        self.proj = Linear(sizes.query_width, sizes.width, bias=config.bias, std=out_std)
        self.q_norm = nn.RMSNorm(sizes.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(sizes.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        qkv = self.qkv(x)  # (B, S, (H+2K)·D)
        scores = Scores(self.window, self.softcap, self.dropout if self.training else 0.0)
        if self.packs(context):
            out = attend_packed(qkv.unflatten(-1, (3, self.sizes.num_heads, -1)), scores, context)  # (B, S, H, D)
        else:
            out = attend(*self.split(qkv, context), scores, context)  # (B, S, H, D)
        projected: Tensor = self.proj(out.flatten(2))  # (B, S, H·D) to (B, S, E)
        return projected

    def packs(self, context: Context) -> bool:
        """Whether the projection's output goes to the kernel as it is: nothing to do to the queries and keys,
        and as many of each."""
        untouched = context.rotary is None and self.q_norm is None
        return untouched and context.attention is Attention.flash and self.sizes.num_heads == self.sizes.num_kv_heads

    def split(self, qkv: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, S, H, D), keys and values (B, S, K, D); queries and keys normalised and rotated as asked."""
        num_heads, num_kv_heads = self.sizes.num_heads, self.sizes.num_kv_heads
        heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))  # (B, S, H+2K, D)
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotary is not None:
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        return q, k, v
