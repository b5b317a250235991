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
import importlib
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
    return _launchers().launch_forward(q, k, v, params, extras, memo)


@functools.cache
def _launchers() -> Any:
    """The part that imports Gluon: not every triton has what it needs."""
    return importlib.import_module("kernels.attention.hopper.launch")


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
    plan = memo.get("backward")
    if plan is not None and plan.start_again(dout, q, k, v, out, lse, dlse, dq, dk, dv):
        return
    if "empty" not in memo:
        memo["empty"] = 0 in q.shape or 0 in k.shape or params.max_seqlen_q == 0 or params.max_seqlen_k == 0
    if not memo["empty"]:
        _launchers().launch_backward(dout, q, k, v, out, lse, dlse, dq, dk, dv, params, extras, memo)
        return
    for grad in (dq, dk, dv):
        if grad is not None:
            grad.zero_()


def compile_cases() -> list[CompileCase]:
    """Every shipped configuration, for scripts/compile_check.py."""
    from kernels.attention.hopper.cases import compile_cases as cases

    return cases()
