"""The portable attention path: FlashAttention-2 in plain Triton, for every GPU that Triton knows (sm_80 and
later) and for the interpreter. ``kernels.attention.dispatch`` says what the functions here must do."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.attention.dispatch import AttnExtras, AttnParams, Problem
from kernels.attention.portable.launch import (
    Call,
    device_capability,
    plan_delta,
    plan_dkdv,
    plan_dq,
    plan_forward,
    plan_probs,
    prepare,
)

if TYPE_CHECKING:
    from kernels.compile_check import CompileCase

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(problem: Problem) -> str | None:
    """Why this path can not compute ``problem``, or None."""
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head dim {problem.head_dim} is above {MAX_HEAD_DIM}"
    if problem.dtype not in DTYPES:
        return f"dtype {problem.dtype} is not one of float16, bfloat16, float32"
    if problem.capability is not None and problem.capability < (8, 0):
        return f"compute capability {problem.capability} is below (8, 0)"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, params: AttnParams, extras: AttnExtras, memo: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(out, lse); see :mod:`kernels.attention.dispatch`."""
    call = None if memo else Call(q, k, params, extras, device_capability(q))
    if call is not None:
        memo["lse_shape"] = call.lse_shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(memo["lse_shape"], dtype=torch.float32, device=q.device)
    if extras.varlen:  # tokens past cu_seqlens[-1] belong to no program
        out.zero_()
        lse.fill_(float("-inf"))
    if call is not None:
        memo["forward"] = prepare(plan_forward(call, v, out, lse))
    memo["forward"](q, k, v, out, lse, *_optional(extras))
    return out, lse


def _optional(extras: AttnExtras) -> tuple[Tensor | None, ...]:
    """The optional tensors in the order in which the kernels' arguments list them."""
    return extras.cu_seqlens_q, extras.cu_seqlens_k, extras.alibi_slopes, extras.rng_state


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    params: AttnParams,
    extras: AttnExtras,
    memo: dict[str, Any],
) -> None:
    """Fill the gradients that are given; see :mod:`kernels.attention.dispatch`. Always deterministic."""
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    if not memo:
        call = Call(q, k, params, extras, device_capability(q))
        memo["delta"] = prepare(plan_delta(call, dout, out, lse, dlse, lse2, delta))
        if dq is not None:
            memo["dq"] = prepare(plan_dq(call, v, dout, lse2, delta, dq))
        if dk is not None and dv is not None:
            memo["dkdv"] = prepare(plan_dkdv(call, v, dout, lse2, delta, dk, dv))
    memo["delta"](dout, out, lse, dlse, lse2, delta, extras.cu_seqlens_q)
    if dq is not None:
        memo["dq"](q, k, v, dout, lse2, delta, dq, *_optional(extras))
    if dk is not None and dv is not None:
        memo["dkdv"](q, k, v, dout, lse2, delta, dk, dv, *_optional(extras))


def probabilities(q: Tensor, k: Tensor, lse: Tensor, params: AttnParams, extras: AttnExtras) -> Tensor:
    """(B, H, max_seqlen_q, max_seqlen_k) softmax probabilities in the dtype of q, negative where dropped."""
    call = Call(q, k, params, extras, device_capability(q))
    shape = (call.batch, call.num_heads, params.max_seqlen_q, params.max_seqlen_k)
    probs = torch.zeros(shape, dtype=q.dtype, device=q.device)
    prepare(plan_probs(call, lse, probs))(q, k, lse, probs, *_optional(extras))
    return probs


def compile_cases() -> "list[CompileCase]":
    """Every configuration of these kernels that ships, compilable without a GPU (see :mod:`.shipped`)."""
    from kernels.attention.portable.shipped import compile_cases as shipped_cases

    return shipped_cases()


__all__ = ["backward", "compile_cases", "forward", "probabilities", "supports"]
