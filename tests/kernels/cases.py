"""Attention cases shared by the CPU and the GPU tests: inputs, truth, and the rule for how wrong a kernel may be.

The rule (that of flash-attn's own suite): with truth in fp64, the error of a kernel is at most twice the error of the
plain PyTorch formula computed in the kernel's dtype, plus the rounding of a number near 0.3 (errors below that are
the storage format's, not the algorithm's). Backward of varlen and dropout: three times, as flash-attn's suite allows.

One case needs a floor of its own: where every query sees one key (or the softmax is one-hot), the plain formula gets
dQ = dK = 0 exactly, while any flash backward subtracts delta = dO·O with O rounded. :func:`delta_floor` bounds that.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.attention.reference import attention_reference, attention_varlen_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One dense call of ``flash_attn_func``."""

    seqlen_q: int
    seqlen_k: int
    head_dim: int
    heads: int = 2
    heads_k: int = 2
    batch: int = 1
    dtype: torch.dtype = torch.float16
    options: dict[str, Any] = field(default_factory=dict)
    alibi: int = 0
    """Rank of the ALiBi slopes: 0 none, 1 (H,), 2 (B, H)."""
    dropout_p: float = 0.0
    magnitude: float = 1.0
    """Standard deviation of q and k."""
    out_factor: float = 2.0
    """How many times PyTorch's own error out may have."""
    grad_factor: float = 2.0
    """How many times PyTorch's own error the gradients may have."""
    seed: int = 0

    @property
    def formula(self) -> dict[str, Any]:
        """The options that change what is computed, not how."""
        return {name: value for name, value in self.options.items() if name != "deterministic"}

    def __str__(self) -> str:
        extras = "-".join(f"{k}={v}" for k, v in self.options.items())
        name = f"{self.seqlen_q}x{self.seqlen_k}-d{self.head_dim}-h{self.heads}/{self.heads_k}-b{self.batch}"
        name += f"-{str(self.dtype).removeprefix('torch.')}"
        return name + "".join(f"-{x}" for x in (extras, self.alibi and "alibi", self.dropout_p) if x)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal values drawn on the CPU in fp32, so that they are the same on every device and dtype."""
    return (torch.randn(*shape) * scale).to(device=DEVICE, dtype=dtype)


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(q, k, v, dout, slopes)."""
    torch.manual_seed(case.seed)
    c = case
    q = random(c.batch, c.seqlen_q, c.heads, c.head_dim, dtype=c.dtype, scale=c.magnitude)
    k = random(c.batch, c.seqlen_k, c.heads_k, c.head_dim, dtype=c.dtype, scale=c.magnitude)
    v = random(c.batch, c.seqlen_k, c.heads_k, c.head_dim, dtype=c.dtype)
    dout = random(c.batch, c.seqlen_q, c.heads, c.head_dim, dtype=c.dtype)
    slopes = None
    if c.alibi:
        shape = (c.heads,) if c.alibi == 1 else (c.batch, c.heads)
        slopes = torch.rand(shape, device=DEVICE) * 0.3
    return q, k, v, dout, slopes


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies that require gradients."""
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def delta_floor(out: Tensor, dout: Tensor, others: Tensor, scale: float, visits: int) -> float:
    """Largest error of dQ (others = k, visits = 1) or dK (others = q, visits = queries per key) that rounding O in
    delta = dO·O can cause when dP - delta cancels entirely."""
    if out.numel() == 0 or others.numel() == 0:
        return 0.0
    delta_error = torch.finfo(out.dtype).eps * (out * dout).double().abs().sum(-1).max().item()
    return abs(scale) * delta_error * others.abs().max().item() * visits


def assert_close(name: str, got: Tensor, plain: Tensor, truth: Tensor, factor: float, floor: float = 0.0) -> None:
    """``got`` is at most ``factor`` times as wrong as ``plain`` (plus the format's rounding near 0.3). ``floor`` counts
    only where the truth is 0."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error = (got.double() - truth).abs().max().item()
    allowed = (plain.double() - truth).abs().max().item()
    rounded = truth.to(got.dtype)
    rounding = ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
    if truth.abs().max().item() < 1e-12:
        rounding = max(rounding, floor / 2)
    assert error <= factor * allowed + 2 * rounding, f"{name}: error {error:.3e}, PyTorch's own {allowed:.3e}"


def assert_lse(got: Tensor, truth: Tensor) -> None:
    """Equal to 1e-3, or to what fp32 can tell apart at scores of 1e5, and -inf in the same places."""
    empty = torch.isneginf(truth)
    assert torch.equal(torch.isneginf(got), empty), "lse: -inf in other rows than the truth"
    assert got.dtype == torch.float32
    if (~empty).any():
        error = (got.double() - truth)[~empty].abs()
        limit = truth[~empty].abs() * 2 * torch.finfo(torch.float32).eps + 1e-3
        assert (error <= limit).all(), f"lse: error {error.max().item():.3e}"


def check_dense(case: Case) -> None:
    """Out, lse, dq, dk, dv of ``flash_attn_func`` against the truth."""
    q, k, v, dout, slopes = make_inputs(case)
    torch.manual_seed(case.seed + 1)  # of the dropout mask
    mine = leaves(q, k, v)
    out, lse, probs = kernels.flash_attn_func(
        *mine, dropout_p=case.dropout_p, alibi_slopes=slopes, return_attn_probs=True, **case.options
    )
    assert out.dtype == case.dtype
    keep = ~torch.signbit(probs) if case.dropout_p else None
    shared = {"alibi_slopes": slopes, "dropout_p": case.dropout_p, "dropout_keep": keep, **case.formula}
    exact = leaves(q.double(), k.double(), v.double())
    truth, truth_lse = attention_reference(*exact, **shared)
    low = leaves(q, k, v)
    plain, _ = attention_reference(*low, **shared, dtype=case.dtype)
    assert_close("out", out, plain, truth, case.out_factor)
    assert_lse(lse, truth_lse)
    grads = torch.autograd.grad(out, mine, dout)
    truths = torch.autograd.grad(truth, exact, dout.double())
    plains = torch.autograd.grad(plain, low, dout)
    scale = case.options.get("softmax_scale", case.head_dim**-0.5)
    visits = case.seqlen_q * case.heads // case.heads_k
    floors = (delta_floor(out, dout, k, scale, 1), delta_floor(out, dout, q, scale, visits), 0.0)
    for name, got, pt, true, floor in zip(("dq", "dk", "dv"), grads, plains, truths, floors, strict=True):
        assert got.dtype == case.dtype
        assert_close(name, got, pt, true, 3 if case.dropout_p else case.grad_factor, floor)


def offsets(lengths: list[int]) -> Tensor:
    """cu_seqlens of these lengths: (len + 1,) int32."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def check_varlen(
    lengths_q: list[int],
    lengths_k: list[int],
    case: Case,
    tail: int = 0,
) -> None:
    """``flash_attn_varlen_func`` against the truth; ``case`` gives all but the lengths. ``tail`` tokens past the last
    offset are NaN and must get out 0, lse -inf and gradient 0."""
    torch.manual_seed(case.seed)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    total_q, total_k = sum(lengths_q) + tail, sum(lengths_k) + tail
    q = random(total_q, case.heads, case.head_dim, dtype=case.dtype, scale=case.magnitude)
    k = random(total_k, case.heads_k, case.head_dim, dtype=case.dtype, scale=case.magnitude)
    v = random(total_k, case.heads_k, case.head_dim, dtype=case.dtype)
    dout = random(total_q, case.heads, case.head_dim, dtype=case.dtype)
    slopes = torch.rand(len(lengths_q), case.heads, device=DEVICE) * 0.3 if case.alibi else None
    clean = [t.clone() for t in (q, k, v, dout)]
    for tensor in (q, dout):
        tensor[sum(lengths_q) :] = float("nan")
    for tensor in (k, v):
        tensor[sum(lengths_k) :] = float("nan")
    torch.manual_seed(case.seed + 1)
    mine = leaves(q, k, v)
    out, lse, probs = kernels.flash_attn_varlen_func(
        *mine,
        cu_q,
        cu_k,
        max(lengths_q, default=0),
        max(lengths_k, default=0),
        dropout_p=case.dropout_p,
        alibi_slopes=slopes,
        return_attn_probs=True,
        **case.options,
    )
    keep = ~torch.signbit(probs) if case.dropout_p else None
    shared = {"alibi_slopes": slopes, "dropout_p": case.dropout_p, "dropout_keep": keep, **case.formula}
    exact = leaves(*(t.double() for t in clean[:3]))
    truth, truth_lse = attention_varlen_reference(*exact, cu_q, cu_k, **shared)
    low = leaves(*clean[:3])
    plain, _ = attention_varlen_reference(*low, cu_q, cu_k, **shared, dtype=case.dtype)
    assert_close("out", out, plain, truth, case.out_factor)
    assert_lse(lse, truth_lse)
    grads = torch.autograd.grad(out, mine, dout)
    truths = torch.autograd.grad(truth, exact, clean[3].double())
    plains = torch.autograd.grad(plain, low, clean[3])
    visits = max(lengths_q, default=0) * case.heads // case.heads_k
    scale = case.head_dim**-0.5
    floors = (delta_floor(out, clean[3], clean[1], scale, 1), delta_floor(out, clean[3], clean[0], scale, visits), 0.0)
    for name, got, pt, true, floor in zip(("dq", "dk", "dv"), grads, plains, truths, floors, strict=True):
        assert_close(name, got, pt, true, 3, floor)
