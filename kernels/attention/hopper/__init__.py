"""The Hopper path: warp-specialised Gluon kernels for the combinations that training uses, on sm_90 GPUs
only.

`supports` says which; the portable path does the rest.

| | forward | backward |
|---|---|---|
| dtype | fp16, bf16 | fp16, bf16 |
| head dim, multiples of 8 | 8 to 256 | 8 to 256 |
| causal, any lengths; window; GQA, MQA; varlen | yes | yes |
| deterministic dQ | - | yes |
| soft cap, ALiBi, dropout, scale <= 0 | no | no |
"""

from __future__ import annotations

import functools
import logging
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.attention.dispatch import AttnExtras, AttnParams, Problem

if TYPE_CHECKING:
    from kernels.compile_check import CompileCase

SUPPORTED_TRITON = ("3.6", "3.7", "3.8", "3.9")
"""Versions under which every kernel of this path compiles within its budget (scripts/compile_check.py)."""
MAX_HEAD_DIM = 256

_log = logging.getLogger(__name__)


@functools.cache
def _triton_problem() -> str | None:
    """Why the installed triton cannot be used, said once in the log; None if it can."""
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "triton is not installed"
    if installed.split("+")[0].rsplit(".", 1)[0] in SUPPORTED_TRITON:
        return None
    reason = (
        f"triton {installed} is not one of {', '.join(SUPPORTED_TRITON)}, which the Hopper kernels were checked with"
    )
    _log.warning("%s; attention takes the portable kernels", reason)
    return reason


def supports(problem: Problem) -> str | None:
    """None if this path computes ``problem``, otherwise the reason why not."""
    params = problem.params
    checks = (
        (problem.capability != (9, 0), f"needs a GPU of compute capability 9.0, got {problem.capability}"),
        (problem.dtype not in (torch.float16, torch.bfloat16), f"needs fp16 or bf16, got {problem.dtype}"),
        (
            problem.head_dim > MAX_HEAD_DIM or problem.head_dim % 8 != 0,
            f"needs a head dim that is a multiple of 8 up to {MAX_HEAD_DIM}, got {problem.head_dim}",
        ),
        (not problem.aligned, "needs 16-byte aligned base addresses and strides"),
        (params.softmax_scale <= 0, f"needs softmax_scale > 0, got {params.softmax_scale}"),
        (params.softcap != 0, "has no softcap"),
        (problem.alibi, "has no ALiBi"),
        (params.dropout_p != 0, "has no dropout"),
    )
    return next((reason for failed, reason in checks if failed), None) or _triton_problem()


def forward(
    q: Tensor, k: Tensor, v: Tensor, params: AttnParams, extras: AttnExtras, memo: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """See ``kernels.attention.dispatch``."""
    from kernels.attention.hopper.launch import launch_forward

    lse_shape = (q.shape[1], q.shape[0]) if extras.varlen else (q.shape[0], q.shape[2], q.shape[1])
    if extras.varlen or k.shape[-3] == 0:  # tokens past cu_seqlens[-1] are in no tile; without keys there is no tile
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.full(lse_shape, float("-inf"), dtype=torch.float32, device=q.device)
    else:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    if out.numel() > 0 and k.shape[-3] > 0 and params.max_seqlen_q > 0:
        launch_forward(q, k, v, out, lse, params, extras, memo)
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
    memo: dict[str, Any],
) -> None:
    """See ``kernels.attention.dispatch``."""
    from kernels.attention.hopper.launch import addressable, launch_backward

    if 0 in q.shape or 0 in k.shape or params.max_seqlen_q == 0 or params.max_seqlen_k == 0:
        for grad in (dq, dk, dv):
            if grad is not None:
                grad.zero_()
        return
    targets = [t if t is not None and addressable(t) else torch.zeros_like(like) for t, like in ((dk, k), (dv, v))]
    targets = [t if addressable(t) else torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in targets]
    launch_backward(dout, q, k, v, out, lse, dlse, dq, targets[0], targets[1], params, extras, memo)
    for grad, target in zip((dk, dv), targets, strict=True):
        if grad is not None and grad is not target:
            grad.copy_(target)


def compile_cases() -> list[CompileCase]:
    """Every shipped configuration, for scripts/compile_check.py."""
    from kernels.attention.hopper.cases import compile_cases as cases

    return cases()
