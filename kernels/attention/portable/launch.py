"""Launchers of the portable kernels: from tensors and scalars to grids and kernel arguments."""

import contextlib
import math
from dataclasses import dataclass
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

MAX_GRID = 2**31 - 1
"""Programs of one launch (grid.x); the other grid axes stop at 65,535 and are not used."""


@dataclass(frozen=True, slots=True)
class Call:
    """What every kernel of one attention call needs to know, from the tensors and scalars of the call."""

    q: Tensor
    k: Tensor
    params: AttnParams
    extras: AttnExtras

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
        capability = torch.cuda.get_device_capability(self.q.device) if self.q.is_cuda else None
        return choose_tile(kernel, self.head_dim, self.q.element_size(), capability, dropout=self.params.dropout_p > 0)

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
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _grid(num_blocks: int, total_heads: int) -> tuple[int]:
    programs = num_blocks * total_heads
    if programs > MAX_GRID:
        raise ValueError(f"attention needs {programs:,} programs, a launch holds {MAX_GRID:,}; split the batch")
    return (programs,)


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _check_device(tensor: Tensor) -> None:
    if not tensor.is_cuda and not INTERPRET.value:
        raise ValueError(
            f"the attention kernels run on CUDA tensors, got {tensor.device}; on a CPU set TRITON_INTERPRET=1 before "
            "triton is imported (slow, for tests) or use standard_attention"
        )


def launch_forward(call: Call, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Fill ``out`` (as q) and ``lse`` (fp32)."""
    _check_device(call.q)
    tile = call.tile("forward")
    num_blocks = triton.cdiv(call.params.max_seqlen_q, tile.block_m)
    total_heads = call.batch * call.num_heads
    if num_blocks * total_heads == 0:
        return
    scale = call.params.softmax_scale
    with _on_device(call.q):
        attention_forward[_grid(num_blocks, total_heads)](
            Q=call.q,
            K=call.k,
            V=v,
            Out=out,
            Lse=lse,
            num_heads=call.num_heads,
            num_blocks=num_blocks,
            total_heads=total_heads,
            section=_section(call, call.params.max_seqlen_k, total_heads, call.num_heads // call.num_heads_k),
            scale=abs(scale) * math.log2(math.e),
            NEGATE=scale < 0,
            **_strided(call, q=call.q, k=call.k, v=v, o=out),
            **_common(call, tile, lse),
        )


def _section(call: Call, streamed_rows: int, total_heads: int, sharing: int) -> int:
    """Heads per section when each program streams two tiles of ``streamed_rows`` rows that ``sharing`` heads
    share."""
    row_bytes = call.head_dim * call.q.element_size()
    return section_heads(2 * streamed_rows * row_bytes // sharing, total_heads)


def launch_delta(call: Call, dout: Tensor, out: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
    """Fill ``delta`` (as lse) = rowsum(dO * O) - dLSE."""
    tile = call.tile("delta")
    num_blocks = triton.cdiv(call.params.max_seqlen_q, tile.block_m)
    if num_blocks * call.batch * call.num_heads == 0:
        return
    stride_lb, stride_lh = call.lse_strides(delta)
    with _on_device(call.q):
        attention_delta[_grid(num_blocks, call.batch * call.num_heads)](
            DOut=dout,
            Out=out,
            DLse=dlse,
            Delta=delta,
            CuQ=call.extras.cu_seqlens_q,
            stride_lb=stride_lb,
            stride_lh=stride_lh,
            seqlen_q=call.params.max_seqlen_q,
            num_heads=call.num_heads,
            num_blocks=num_blocks,
            HEAD_DIM=call.head_dim,
            BLOCK_D=padded_head_dim(call.head_dim),
            VARLEN=call.extras.varlen,
            HAS_DLSE=dlse is not None,
            BLOCK_M=tile.block_m,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **_strided(call, do=dout, o=out),
        )


def launch_dq(call: Call, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor) -> None:
    """Fill ``dq`` (as q)."""
    tile = call.tile("dq")
    num_blocks = triton.cdiv(call.params.max_seqlen_q, tile.block_m)
    total_heads = call.batch * call.num_heads
    if num_blocks * total_heads == 0:
        return
    scale = call.params.softmax_scale
    with _on_device(call.q):
        attention_dq[_grid(num_blocks, total_heads)](
            Q=call.q,
            K=call.k,
            V=v,
            DOut=dout,
            Lse=lse,
            Delta=delta,
            DQ=dq,
            num_heads=call.num_heads,
            num_blocks=num_blocks,
            total_heads=total_heads,
            section=_section(call, call.params.max_seqlen_k, total_heads, call.num_heads // call.num_heads_k),
            scale=scale * math.log2(math.e),
            softmax_scale=scale,
            **_strided(call, q=call.q, k=call.k, v=v, do=dout, dq=dq),
            **_common(call, tile, lse),
        )


def launch_dkdv(call: Call, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Fill ``dk`` and ``dv`` (as k)."""
    tile = call.tile("dkdv")
    num_blocks = triton.cdiv(call.params.max_seqlen_k, tile.block_n)
    total_heads_k = call.batch * call.num_heads_k
    if num_blocks * total_heads_k == 0:
        return
    scale = call.params.softmax_scale
    group = call.num_heads // call.num_heads_k
    with _on_device(call.q):
        attention_dkdv[_grid(num_blocks, total_heads_k)](
            Q=call.q,
            K=call.k,
            V=v,
            DOut=dout,
            Lse=lse,
            Delta=delta,
            DK=dk,
            DV=dv,
            num_heads_k=call.num_heads_k,
            num_blocks=num_blocks,
            total_heads_k=total_heads_k,
            section=_section(call, call.params.max_seqlen_q * group, total_heads_k, 1),
            scale=scale * math.log2(math.e),
            softmax_scale=scale,
            **_strided(call, q=call.q, k=call.k, v=v, do=dout, dk=dk, dv=dv),
            **_common(call, tile, lse),
        )


def launch_probs(call: Call, lse: Tensor, probs: Tensor) -> None:
    """Fill ``probs`` (B, H, max_seqlen_q, max_seqlen_k), which must be zeroed, with signed probabilities."""
    tile = call.tile("probs")
    blocks_m = triton.cdiv(call.params.max_seqlen_q, tile.block_m)
    blocks_n = triton.cdiv(call.params.max_seqlen_k, tile.block_n)
    total_heads = call.batch * call.num_heads
    if blocks_m * blocks_n * total_heads == 0:
        return
    with _on_device(call.q):
        attention_probs[_grid(blocks_m * blocks_n, total_heads)](
            Q=call.q,
            K=call.k,
            Lse=lse,
            Probs=probs,
            num_heads=call.num_heads,
            num_blocks_m=blocks_m,
            num_blocks_n=blocks_n,
            scale=call.params.softmax_scale * math.log2(math.e),
            stride_pb=probs.stride(0),
            stride_ph=probs.stride(1),
            stride_ps=probs.stride(2),
            **_strided(call, q=call.q, k=call.k),
            **_common(call, tile, lse),
        )
