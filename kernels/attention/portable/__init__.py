"""The portable attention path: FlashAttention-2 in plain Triton, for every GPU that Triton knows (sm_80 and
later) and for the interpreter. ``kernels.attention.dispatch`` says what the functions here must do."""

from typing import TYPE_CHECKING

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
    run,
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


def forward(q: Tensor, k: Tensor, v: Tensor, params: AttnParams, extras: AttnExtras) -> tuple[Tensor, Tensor]:
    """(out, lse); see :mod:`kernels.attention.dispatch`."""
    call = Call(q, k, params, extras, device_capability(q))
    if extras.varlen:  # tokens past cu_seqlens[-1] belong to no program
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.full(call.lse_shape, float("-inf"), dtype=torch.float32, device=q.device)
    else:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(call.lse_shape, dtype=torch.float32, device=q.device)
    run(plan_forward(call, v, out, lse), q.device)
    return out, lse


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
) -> None:
    """Fill the gradients that are given; see :mod:`kernels.attention.dispatch`. Always deterministic."""
    call = Call(q, k, params, extras, device_capability(q))
    delta = torch.empty_like(lse)
    run(plan_delta(call, dout, out, dlse, delta), q.device)
    if dq is not None:
        run(plan_dq(call, v, dout, lse, delta, dq), q.device)
    if dk is not None and dv is not None:
        run(plan_dkdv(call, v, dout, lse, delta, dk, dv), q.device)


def probabilities(q: Tensor, k: Tensor, lse: Tensor, params: AttnParams, extras: AttnExtras) -> Tensor:
    """(B, H, max_seqlen_q, max_seqlen_k) softmax probabilities in the dtype of q, negative where dropped."""
    call = Call(q, k, params, extras, device_capability(q))
    shape = (call.batch, call.num_heads, params.max_seqlen_q, params.max_seqlen_k)
    probs = torch.zeros(shape, dtype=q.dtype, device=q.device)
    run(plan_probs(call, lse, probs), q.device)
    return probs


def compile_cases() -> "list[CompileCase]":
    """Every configuration of these kernels that ships, compilable without a GPU (see :mod:`.shipped`)."""
    from kernels.attention.portable.shipped import compile_cases as shipped_cases

    return shipped_cases()


__all__ = ["backward", "compile_cases", "forward", "probabilities", "supports"]
