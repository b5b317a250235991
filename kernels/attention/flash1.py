"""FlashAttention-1 in Triton: the baseline of the FlashAttention-2 paper's comparison.

    O = softmax(mask(scale * Q Kᵀ)) V

What FlashAttention-2 changed is kept as it was here (Dao et al. 2022, "FlashAttention", algorithms 1 and 4; the
differences are listed in Dao 2023, section 3):

- one program per (batch, head) walks all blocks: B * H programs, however long the sequence;
- forward: the outer loop goes over key blocks, the inner one over query blocks, whose O, m and l live in memory and
  are read, renormalised (O stays a proper average after every block) and written back at every visit;
- two statistics per row are saved, m and l, instead of one log-sum-exp;
- backward: the same two loops; dQ is accumulated in memory in fp32 by the one program that owns it (no atomics).

Layout (B, S, H, D) with H == Hk, any strides but the last; fp16, bf16, fp32; full or causal with Sq == Sk; no other
features: it exists to be measured.
"""

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.portable.common import dot, head_base, load_tile, store_tile
from kernels.attention.portable.launch import device_capability
from kernels.attention.portable.tuning import padded_head_dim

MAX_HEAD_DIM = 128


@triton.jit
def _scores(q, k, row, col, seqlen, scale, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) masked scores in log2 units. FlashAttention-1 tests every block it visits."""
    rows = (row + tl.arange(0, BLOCK_M))[:, None]
    cols = (col + tl.arange(0, BLOCK_N))[None, :]
    mask = cols < seqlen
    if CAUSAL:
        mask = mask & (cols <= rows)
    return tl.where(mask, dot(q, tl.trans(k)) * scale, float("-inf"))


@triton.jit(do_not_specialize=["seqlen", "num_heads"])
def flash1_forward(
    Q,  # (B, S, H, D)
    K,  # (B, S, H, D)
    V,  # (B, S, H, D)
    Out,  # (B, S, H, D) fp32, zeroed
    RowMax,  # (B, H, S) fp32, -inf; in log2 units
    RowSum,  # (B, H, S) fp32, zeroed
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
    seqlen,
    num_heads,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """All of one head (algorithm 1): key blocks outside, query blocks inside, O renormalised at every visit."""
    batch = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    zero = tl.zeros((), tl.int64)
    q_base = head_base(Q, batch, head, zero, stride_qb, stride_qs, stride_qh)
    k_base = head_base(K, batch, head, zero, stride_kb, stride_ks, stride_kh)
    v_base = head_base(V, batch, head, zero, stride_vb, stride_vs, stride_vh)
    o_base = head_base(Out, batch, head, zero, stride_ob, stride_os, stride_oh)
    stats = tl.program_id(0).to(tl.int64) * seqlen
    start = tl.zeros((), tl.int32)
    for block_n in tl.range(start, tl.cdiv(seqlen, BLOCK_N)):
        col = block_n * BLOCK_N
        k = load_tile(k_base, col, seqlen, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        v = load_tile(v_base, col, seqlen, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        for block_m in tl.range(col // BLOCK_M if CAUSAL else start, tl.cdiv(seqlen, BLOCK_M), num_stages=1):
            row = block_m * BLOCK_M
            rows = row + tl.arange(0, BLOCK_M)
            exists = rows < seqlen
            q = load_tile(q_base, row, seqlen, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            old_max = tl.load(RowMax + stats + rows, mask=exists, other=0.0)
            old_sum = tl.load(RowSum + stats + rows, mask=exists, other=0.0)
            out = load_tile(o_base, row, seqlen, stride_os, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            scores = _scores(q, k, row, col, seqlen, scale, CAUSAL, BLOCK_M, BLOCK_N)
            new_max = tl.maximum(old_max, tl.max(scores, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(scores - shift[:, None])
            kept = old_sum * tl.exp2(old_max - shift)
            new_sum = kept + tl.sum(p, 1)
            safe_sum = tl.where(new_sum == 0.0, 1.0, new_sum)
            out = (out * kept[:, None] + dot(p.to(v.dtype), v)) / safe_sum[:, None]
            store_tile(o_base, row, seqlen, stride_os, out, BLOCK_M, HEAD_DIM, BLOCK_D)
            tl.store(RowMax + stats + rows, new_max, mask=exists)
            tl.store(RowSum + stats + rows, new_sum, mask=exists)
            tl.debug_barrier()  # the next key block reads what this one wrote, maybe by other threads


@triton.jit(do_not_specialize=["seqlen", "num_heads"])
def flash1_backward(
    Q,  # (B, S, H, D)
    K,  # (B, S, H, D)
    V,  # (B, S, H, D)
    DOut,  # (B, S, H, D)
    RowMax,  # (B, H, S) fp32, in log2 units
    RowSum,  # (B, H, S) fp32
    Delta,  # (B, H, S) fp32
    DQ,  # (B, S, H, D) fp32, zeroed
    DK,  # (B, S, H, D)
    DV,  # (B, S, H, D)
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
    stride_gb,
    stride_gs,
    stride_gh,
    seqlen,
    num_heads,
    scale,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """All of one head (algorithm 4). DQ, DK and DV share the strides of a contiguous (B, S, H, D) tensor."""
    batch = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    zero = tl.zeros((), tl.int64)
    q_base = head_base(Q, batch, head, zero, stride_qb, stride_qs, stride_qh)
    k_base = head_base(K, batch, head, zero, stride_kb, stride_ks, stride_kh)
    v_base = head_base(V, batch, head, zero, stride_vb, stride_vs, stride_vh)
    do_base = head_base(DOut, batch, head, zero, stride_dob, stride_dos, stride_doh)
    dq_base = head_base(DQ, batch, head, zero, stride_gb, stride_gs, stride_gh)
    dk_base = head_base(DK, batch, head, zero, stride_gb, stride_gs, stride_gh)
    dv_base = head_base(DV, batch, head, zero, stride_gb, stride_gs, stride_gh)
    stats = tl.program_id(0).to(tl.int64) * seqlen
    start = tl.zeros((), tl.int32)
    for block_n in tl.range(start, tl.cdiv(seqlen, BLOCK_N)):
        col = block_n * BLOCK_N
        k = load_tile(k_base, col, seqlen, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        v = load_tile(v_base, col, seqlen, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for block_m in tl.range(col // BLOCK_M if CAUSAL else start, tl.cdiv(seqlen, BLOCK_M), num_stages=1):
            row = block_m * BLOCK_M
            rows = row + tl.arange(0, BLOCK_M)
            exists = rows < seqlen
            q = load_tile(q_base, row, seqlen, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            do = load_tile(do_base, row, seqlen, stride_dos, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            row_max = tl.load(RowMax + stats + rows, mask=exists, other=0.0)
            row_sum = tl.load(RowSum + stats + rows, mask=exists, other=1.0)
            delta = tl.load(Delta + stats + rows, mask=exists, other=0.0)
            scores = _scores(q, k, row, col, seqlen, scale, CAUSAL, BLOCK_M, BLOCK_N)
            p = tl.where(exists[:, None], tl.exp2(scores - row_max[:, None]) / row_sum[:, None], 0.0)
            dv = dot(tl.trans(p.to(do.dtype)), do, dv)
            ds = (p * (dot(do, tl.trans(v)) - delta[:, None])).to(q.dtype)
            dk = dot(tl.trans(ds), q, dk)
            dq = load_tile(dq_base, row, seqlen, stride_gs, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            dq += dot(ds, k) * softmax_scale
            store_tile(dq_base, row, seqlen, stride_gs, dq, BLOCK_M, HEAD_DIM, BLOCK_D)
            tl.debug_barrier()  # the next key block reads what this one wrote, maybe by other threads
        store_tile(dk_base, col, seqlen, stride_gs, dk * softmax_scale, BLOCK_N, HEAD_DIM, BLOCK_D)
        store_tile(dv_base, col, seqlen, stride_gs, dv, BLOCK_N, HEAD_DIM, BLOCK_D)


def _blocks(capability: tuple[int, int] | None, head_dim: int) -> dict[str, int]:
    """Tiles as the paper sizes them, by what fits: smaller for the interpreter, so that tests meet several blocks."""
    if capability is None:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 1, "num_stages": 1}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4 if head_dim <= 64 else 8, "num_stages": 1}


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"stride_{n}{a}": t.stride(i) for n, t in tensors.items() for i, a in enumerate("bsh")}


class _Flash1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
        batch, seqlen, num_heads, head_dim = q.shape
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        row_max = torch.full((batch, num_heads, seqlen), float("-inf"), dtype=torch.float32, device=q.device)
        row_sum = torch.zeros_like(row_max)
        ctx.sizes = {
            "seqlen": seqlen,
            "num_heads": num_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_D": padded_head_dim(head_dim),
            "CAUSAL": causal,
            "scale": softmax_scale * math.log2(math.e),
            **_blocks(device_capability(q), head_dim),
        }
        ctx.softmax_scale = softmax_scale
        if out.numel() > 0:
            with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
                flash1_forward[(batch * num_heads,)](
                    q, k, v, out, row_max, row_sum, **_strides(q=q, k=k, v=v, o=out), **ctx.sizes
                )
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, row_max, row_sum)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, row_max, row_sum = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        delta = (dout.float() * out.float()).sum(-1).transpose(1, 2).contiguous()  # (B, S, H) -> (B, H, S)
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        if dq.numel() > 0:
            with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
                flash1_backward[(q.shape[0] * q.shape[2],)](
                    q, k, v, dout, row_max, row_sum, delta, dq, dk, dv,
                    **_strides(q=q, k=k, v=v, do=dout, g=dq), softmax_scale=ctx.softmax_scale, **ctx.sizes,
                )  # fmt: skip
        return dq.to(q.dtype), dk, dv, None, None


def flash1_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """Attention by the FlashAttention-1 schedule, forward and backward, to compare with.

    Args:
        q, k, v: (B, S, H, D), one shape, D <= 128.
        softmax_scale: factor on q kᵀ; None: 1 / sqrt(D).

    Returns:
        (B, S, H, D) in the dtype of q.

    Raises:
        ValueError: shapes that this baseline does not cover.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape or not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"flash1 takes q, k, v of one shape (B, S, H, D), D <= {MAX_HEAD_DIM}; got {shapes}")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return _Flash1.apply(q, k, v, scale, causal)
