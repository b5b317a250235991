"""Which implementation ("path") computes an attention problem: the one seam between the operator and the
kernels.

A *path* is a package that offers three functions on plain tensors (see :class:`Path`); nothing else of a path
is visible outside it:

``supports(problem) -> str | None``
    ``None`` if the path can compute ``problem``, otherwise one sentence that says why not (shown to the user
    when the path was forced). Must not touch a device.
``forward(q, k, v, params, extras, memo) -> (out, lse)``
    Allocates and returns ``out`` (the shape and dtype of ``q``, contiguous) and ``lse`` (fp32, natural log,
    ``(B, H, Sq)`` dense or ``(H, total_q)`` varlen; ``-inf`` for a row that sees no key, whose ``out`` row is
    0).
``backward(dout, q, k, v, out, lse, dlse, dq, dk, dv, params, extras, memo) -> None``
    Fills the given gradients in place. ``dq``, ``dk``, ``dv`` are ``None`` where no gradient is wanted;
    ``dk`` and ``dv`` are wanted or not wanted together. They may be strided slices of one packed tensor (last
    stride 1). ``dlse`` is the gradient of ``lse`` or ``None``. Every element of a sequence must be written,
    also for keys that no query sees (0). Dense gradients arrive uninitialised; varlen ones arrive zeroed, so
    that tokens past ``cu_seqlens[-1]``, which belong to no sequence, keep 0. (``forward`` allocates its own
    results and must see to the same: 0 in ``out`` and -inf in ``lse`` there.)

``memo`` is a dict that comes again with every call of the same geometry (shapes, strides, dtypes, 16-byte alignment,
device, scalars): a path keeps in it what it works out of nothing else, so that a call costs the host little.

All tensors have unit stride in the last dimension (the operator copies the others first), any other strides,
one device, and one dtype (fp16, bf16 or fp32) but for ``lse``, ``dlse`` (fp32) and those in
:class:`AttnExtras`. The statistic ``lse`` means the same in every path, so that the forward of one may be
followed by the backward of another.

Legend: B batch, S sequence, H query heads, Hk key/value heads (H % Hk == 0), D head dim.
Dense layout is (B, S, H, D); varlen layout is (total, H, D) with ``cu_seqlens`` of B + 1 int32 offsets.
"""

import importlib
import os
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

PATH_ENV = "FLASH_ATTN_PATH"
"""Read by every call; a backward that is remembered with its forward (`op.KnownCall`) takes what that one read."""
PATHS: dict[str, str] = {"hopper": "kernels.attention.hopper", "portable": "kernels.attention.portable"}
"""Path name -> the package that implements it."""
AUTO_PATHS: tuple[str, ...] = ("hopper", "portable")
"""What ``auto`` may choose, fastest first."""

Direction = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class AttnParams:
    """The scalars of one attention call, normalised: a path need not check them again."""

    softmax_scale: float
    """Factor on Q Kᵀ; any finite value, negative ones and 0 too."""
    max_seqlen_q: int
    """Dense: Sq. Varlen: upper bound of the query lengths, for the launch grid (a host integer, no sync)."""
    max_seqlen_k: int
    """Dense: Sk. Varlen: upper bound of the key lengths."""
    causal: bool = False
    """Aligned to the bottom right corner; already folded into ``window_right`` (0), kept for tuning and
    scheduling."""
    window_left: int = -1
    """Query i sees keys j >= i + Sk - Sq - window_left; -1: no limit."""
    window_right: int = -1
    """Query i sees keys j <= i + Sk - Sq + window_right; -1: no limit."""
    softcap: float = 0.0
    """Scores become softcap * tanh(score / softcap); 0: off."""
    dropout_p: float = 0.0
    """Probability that an entry of the softmax is dropped, in [0, 1); 0: off."""
    deterministic: bool = False
    """Gradients must be bitwise repeatable. Out, lse, dk and dv always are."""


@dataclass(frozen=True, slots=True)
class AttnExtras:
    """The optional tensors of one attention call."""

    cu_seqlens_q: Tensor | None = None
    """(B + 1,) int32, contiguous, on the device; given together with ``cu_seqlens_k``: varlen layout."""
    cu_seqlens_k: Tensor | None = None
    alibi_slopes: Tensor | None = None
    """(H,) or (B, H) fp32, last stride 1: adds -slope * |i + Sk - Sq - j| to the scores (after the soft
    cap)."""
    rng_state: Tensor | None = None
    """(2,) int64 on the device: seed and offset of the dropout mask; given exactly when dropout_p > 0."""

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None


@dataclass(frozen=True, slots=True)
class Problem:
    """What the choice of a path may depend on: shapes, dtype, features, device. Hashable, holds no tensor."""

    direction: Direction
    dtype: torch.dtype
    batch: int
    seqlen_q: int
    """Dense: Sq. Varlen: max_seqlen_q."""
    seqlen_k: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    params: AttnParams
    varlen: bool = False
    alibi: bool = False
    aligned: bool = True
    """Every base address and every stride but the last is a multiple of 16 bytes (what TMA descriptors
    need)."""
    device_type: str = "cuda"
    capability: tuple[int, int] | None = None
    """CUDA compute capability, e.g. (9, 0); None on a CPU (the Triton interpreter)."""


class Path(Protocol):
    """The interface of a path; the module docstring says what each function must do."""

    def supports(self, problem: Problem) -> str | None: ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttnParams, extras: AttnExtras, memo: dict[str, Any]
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
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
    ) -> None: ...


def get_path(name: str) -> Path:
    """Import the path ``name`` (a key of ``PATHS``) on first use."""
    return cast(Path, importlib.import_module(PATHS[name]))


def choose_path(problem: Problem) -> str:
    """Name of the path that computes ``problem``: the environment's choice if there is one, else the first of
    ``AUTO_PATHS`` that supports it.

    Raises:
        ValueError: ``FLASH_ATTN_PATH`` names no path, or no path in question supports the problem.
    """
    forced = os.environ.get(PATH_ENV, "auto")
    if forced != "auto" and forced not in PATHS:
        raise ValueError(f"{PATH_ENV}={forced!r}: possible values are auto, {', '.join(sorted(PATHS))}")
    candidates = AUTO_PATHS if forced == "auto" else (forced,)
    reasons = []
    for name in candidates:
        reason = get_path(name).supports(problem)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no attention kernel for this call ({PATH_ENV}={forced}). " + "; ".join(reasons))


def describe(tensors: tuple[Tensor, ...], params: AttnParams, extras: AttnExtras, direction: Direction) -> Problem:
    """The :class:`Problem` of a call on ``tensors``: q, k, v and, backward, the others that share their
    layout."""
    q, k = tensors[:2]
    cu = extras.cu_seqlens_q
    return Problem(
        direction=direction,
        dtype=q.dtype,
        batch=q.shape[0] if cu is None else cu.shape[0] - 1,
        seqlen_q=params.max_seqlen_q,
        seqlen_k=params.max_seqlen_k,
        num_heads=q.shape[-2],
        num_heads_k=k.shape[-2],
        head_dim=q.shape[-1],
        params=params,
        varlen=extras.varlen,
        alibi=extras.alibi_slopes is not None,
        aligned=all(_aligned_16(t) for t in tensors),
        device_type=q.device.type,
        capability=torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None,
    )


def _aligned_16(tensor: Tensor) -> bool:
    """Base address and all strides but the last are multiples of 16 bytes."""
    size = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in tensor.stride()[:-1])
