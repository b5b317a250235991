"""Launchers of the portable kernels: from tensors and scalars to grids and kernel arguments.

Each ``plan_*`` function is pure: it turns a call into a :class:`Plan`, of which :func:`prepare` makes a launch.
Planning works on meta tensors too, so that what is compiled without a GPU (``portable.shipped``) is what ships.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.attention.dispatch import AttnExtras, AttnParams
from kernels.attention.portable.backward import attention_delta, attention_dkdv, attention_dq
from kernels.attention.portable.common import INTERPRET
from kernels.attention.portable.forward import attention_forward
from kernels.attention.portable.probs import attention_probs
from kernels.attention.portable.tuning import Kernel, Tile, choose_tile, padded_head_dim, section_heads
from kernels.attention.relaunch import Launch

TINY_SCALE = 1e-30
"""The forward's stand-in for a softmax scale of 0: every score is still 0, and a masked one still -inf."""


@dataclass(frozen=True, slots=True)
class Call:
    """What every kernel of one attention call needs to know, from the tensors and scalars of the call."""

    q: Tensor
    k: Tensor
    params: AttnParams
    extras: AttnExtras
    capability: tuple[int, int] | None
    """CUDA compute capability to tune for; None: the interpreter."""

    @property
    def batch(self) -> int:
        cu = self.extras.cu_seqlens_q
        return self.q.shape[0] if cu is None else cu.shape[0] - 1

    @property
    def num_heads(self) -> int:
        return self.q.shape[-2]

    @property
    def num_heads_k(self) -> int:
        return self.k.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(H, total_q) varlen, (B, H, Sq) dense."""
        if self.extras.varlen:
            return (self.num_heads, self.q.shape[0])
        return (self.batch, self.num_heads, self.q.shape[1])

    def tile(self, kernel: Kernel) -> Tile:
        """The table's launch configuration."""
        params, extras = self.params, self.extras
        masked = params.window_left >= 0 or params.window_right >= 0 or extras.varlen
        plain = not masked and params.softcap == 0 and extras.alibi_slopes is None
        seen_keys = params.max_seqlen_k if plain else None
        dropout = params.dropout_p > 0
        tile = choose_tile(kernel, self.head_dim, self.q.element_size(), self.capability, dropout, seen_keys)
        # The table's limits are for kernels without a soft cap, whose derivative would spill
        return replace(tile, max_registers=None) if self.params.softcap > 0 else tile

    def strides(self, tensor: Tensor) -> tuple[int, int, int]:
        """(batch, sequence, head) strides of a (B, S, H, D) or (total, H, D) tensor; batch stride 0 for
        varlen."""
        if self.extras.varlen:
            return (0, tensor.stride(0), tensor.stride(1))
        return (tensor.stride(0), tensor.stride(1), tensor.stride(2))

    def lse_strides(self, lse: Tensor) -> tuple[int, int]:
        """(batch, head) strides of the statistics, whose last dimension is contiguous."""
        return (0, lse.stride(0)) if self.extras.varlen else (lse.stride(0), lse.stride(1))


def _strided(call: Call, **tensors: Tensor) -> dict[str, int]:
    """Keyword arguments ``stride_<name>{b,s,h}`` of each tensor."""
    return {
        f"stride_{name}{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip("bsh", call.strides(tensor), strict=True)
    }


def _common(call: Call, tile: Tile, stats: Tensor) -> dict[str, Any]:
    """Arguments that the forward, dQ and dK/dV kernels share."""
    params, extras = call.params, call.extras
    slopes = extras.alibi_slopes
    stride_lb, stride_lh = call.lse_strides(stats)
    return {
        "CuQ": extras.cu_seqlens_q,
        "CuK": extras.cu_seqlens_k,
        "Slopes": slopes,
        "Rng": extras.rng_state,
        "stride_lb": stride_lb,
        "stride_lh": stride_lh,
        "stride_slope": slopes.stride(0) if slopes is not None and slopes.ndim == 2 else 0,
        "seqlen_q": params.max_seqlen_q,
        "seqlen_k": params.max_seqlen_k,
        "window_left": params.window_left,
        "window_right": params.window_right,
        "dropout_threshold": round(params.dropout_p * 2**24),
        "softcap": params.softcap * math.log2(math.e),
        "keep_scale": 1.0 / (1.0 - params.dropout_p),
        "HEAD_DIM": call.head_dim,
        "BLOCK_D": padded_head_dim(call.head_dim),
        "GROUP": call.num_heads // call.num_heads_k,
        "VARLEN": extras.varlen,
        "HAS_LEFT": params.window_left >= 0,
        "HAS_RIGHT": params.window_right >= 0,
        "HAS_SOFTCAP": params.softcap > 0,
        "HAS_ALIBI": slopes is not None,
        "HAS_DROPOUT": params.dropout_p > 0,
        "EVEN_Q": not extras.varlen and params.max_seqlen_q % tile.block_m == 0,
        "EVEN_K": not extras.varlen and params.max_seqlen_k % tile.block_n == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }


def device_capability(tensor: Tensor) -> tuple[int, int] | None:
    """Compute capability of the tensor's GPU, or None for a CPU tensor that the interpreter will compute.

    Raises:
        ValueError: a tensor that no kernel can reach.
    """
    if tensor.is_cuda:
        return torch.cuda.get_device_capability(tensor.device)
    if not INTERPRET.value:
        raise ValueError(
            f"the attention kernels run on CUDA tensors, got {tensor.device}; on a CPU set TRITON_INTERPRET=1 before "
            "triton is imported (slow, for tests) or use standard_attention"
        )
    return None


@dataclass(frozen=True, slots=True)
class Plan:
    """One kernel launch, ready to prepare or to compile."""

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    tile: Tile


def prepare(plan: Plan) -> Launch:
    """The launch, free of the tensors it was planned with. Calls give theirs in the order of ``plan.arguments``."""
    return Launch(plan.kernel, plan.num_programs, plan.arguments, **plan.tile.options())


def _section(call: Call, streamed_rows: int, total_heads: int, num_blocks: int, sharing: int) -> int:
    """Heads per section when each of a head's ``num_blocks`` programs streams two tensors of ``streamed_rows`` rows,
    shared by ``sharing`` heads."""
    row_bytes = call.head_dim * call.q.element_size()
    return section_heads(2 * streamed_rows * row_bytes // sharing, total_heads, num_blocks)


def plan_forward(call: Call, v: Tensor, out: Tensor, lse: Tensor) -> Plan:
    """Fills ``out`` (as q) and ``lse`` (fp32)."""
    tile = call.tile("forward")
    num_blocks = triton.cdiv(call.params.max_seqlen_q, tile.block_m)
    total_heads = call.batch * call.num_heads
    scale = call.params.softmax_scale
    arguments = {
        "Q": call.q,
        "K": call.k,
        "V": v,
        "Out": out,
        "Lse": lse,
        "num_heads": call.num_heads,
        "num_blocks": num_blocks,
        "total_heads": total_heads,
        "section": _section(
            call, call.params.max_seqlen_k, total_heads, num_blocks, call.num_heads // call.num_heads_k
        ),
        "scale": max(abs(scale), TINY_SCALE) * math.log2(math.e),
        "NEGATE": scale < 0,
        **_strided(call, q=call.q, k=call.k, v=v, o=out),
        **_common(call, tile, lse),
    }
    return Plan(attention_forward, num_blocks * total_heads, arguments, tile)


def plan_delta(
    call: Call, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, lse2: Tensor, delta: Tensor
) -> Plan:
    """Fills ``delta`` (as lse) = rowsum(dO * O) - dLSE, and ``lse2``, the LSE in the backward's form."""
    tile = call.tile("delta")
    num_blocks = triton.cdiv(call.params.max_seqlen_q, tile.block_m)
    stride_lb, stride_lh = call.lse_strides(delta)
    arguments = {
        "DOut": dout,
        "Out": out,
        "Lse": lse,
        "DLse": dlse,
        "Lse2": lse2,
        "Delta": delta,
        "CuQ": call.extras.cu_seqlens_q,
        "stride_lb": stride_lb,
        "stride_lh": stride_lh,
        "seqlen_q": call.params.max_seqlen_q,
        "num_heads": call.num_heads,
        "num_blocks": num_blocks,
        "HEAD_DIM": call.head_dim,
        "BLOCK_D": padded_head_dim(call.head_dim),
        "VARLEN": call.extras.varlen,
        "HAS_DLSE": dlse is not None,
        "BLOCK_M": tile.block_m,
        **_strided(call, do=dout, o=out),
    }
    return Plan(attention_delta, num_blocks * call.batch * call.num_heads, arguments, tile)


def plan_dq(call: Call, v: Tensor, dout: Tensor, lse2: Tensor, delta: Tensor, dq: Tensor) -> Plan:
    """Fills ``dq`` (as q)."""
    tile = call.tile("dq")
    num_blocks = triton.cdiv(call.params.max_seqlen_q, tile.block_m)
    total_heads = call.batch * call.num_heads
    arguments = {
        "Q": call.q,
        "K": call.k,
        "V": v,
        "DOut": dout,
        "Lse2": lse2,
        "Delta": delta,
        "DQ": dq,
        "num_heads": call.num_heads,
        "num_blocks": num_blocks,
        "total_heads": total_heads,
        "section": _section(
            call, call.params.max_seqlen_k, total_heads, num_blocks, call.num_heads // call.num_heads_k
        ),
        "scale": call.params.softmax_scale * math.log2(math.e),
        "softmax_scale": call.params.softmax_scale,
        **_strided(call, q=call.q, k=call.k, v=v, do=dout, dq=dq),
        **_common(call, tile, lse2),
    }
    return Plan(attention_dq, num_blocks * total_heads, arguments, tile)


def plan_dkdv(call: Call, v: Tensor, dout: Tensor, lse2: Tensor, delta: Tensor, dk: Tensor, dv: Tensor) -> Plan:
    """Fills ``dk`` and ``dv`` (as k)."""
    tile = call.tile("dkdv")
    num_blocks = triton.cdiv(call.params.max_seqlen_k, tile.block_n)
    total_heads_k = call.batch * call.num_heads_k
    streamed_rows = call.params.max_seqlen_q * (call.num_heads // call.num_heads_k)
    arguments = {
        "Q": call.q,
        "K": call.k,
        "V": v,
        "DOut": dout,
        "Lse2": lse2,
        "Delta": delta,
        "DK": dk,
        "DV": dv,
        "num_heads_k": call.num_heads_k,
        "num_blocks": num_blocks,
        "total_heads_k": total_heads_k,
        "section": _section(call, streamed_rows, total_heads_k, num_blocks, 1),
        "scale": call.params.softmax_scale * math.log2(math.e),
        "softmax_scale": call.params.softmax_scale,
        **_strided(call, q=call.q, k=call.k, v=v, do=dout, dk=dk, dv=dv),
        **_common(call, tile, lse2),
    }
    return Plan(attention_dkdv, num_blocks * total_heads_k, arguments, tile)


def plan_probs(call: Call, lse: Tensor, probs: Tensor) -> Plan:
    """Fills ``probs`` (B, H, max_seqlen_q, max_seqlen_k), which must be zeroed, with signed probabilities."""
    tile = call.tile("probs")
    blocks_m = triton.cdiv(call.params.max_seqlen_q, tile.block_m)
    blocks_n = triton.cdiv(call.params.max_seqlen_k, tile.block_n)
    arguments = {
        "Q": call.q,
        "K": call.k,
        "Lse": lse,
        "Probs": probs,
        "num_heads": call.num_heads,
        "num_blocks_m": blocks_m,
        "num_blocks_n": blocks_n,
        "scale": call.params.softmax_scale * math.log2(math.e),
        "stride_pb": probs.stride(0),
        "stride_ph": probs.stride(1),
        "stride_ps": probs.stride(2),
        **_strided(call, q=call.q, k=call.k),
        **_common(call, tile, lse),
    }
    return Plan(attention_probs, blocks_m * blocks_n * call.batch * call.num_heads, arguments, tile)
