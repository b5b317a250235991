"""Dense attention against fp64 truth, every feature forward and backward, on small shapes (interpreter on a CPU)."""

from typing import Any

import pytest
import torch

import kernels
from kernels.attention.reference import attention_reference
from tests.kernels.cases import DEVICE, Case, assert_close, check_dense, leaves, make_inputs, random

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dtypes(dtype: torch.dtype, causal: bool) -> None:
    check_dense(Case(50, 50, 32, dtype=dtype, options={"causal": causal}))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (3, 3), (33, 17), (1, 70), (70, 1), (20, 65), (65, 20)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    """Ragged tails, one row, one key, and (causal, Sq > Sk) rows that see no key."""
    check_dense(Case(seqlen_q, seqlen_k, 16, options={"causal": causal}))


@pytest.mark.parametrize("head_dim", [1, 8, 40, 59, 80, 96, 111, 128, 160, 192, 224, 256])
def test_head_dims(head_dim: int) -> None:
    check_dense(Case(20, 35, head_dim, heads=1, heads_k=1, options={"causal": True}))


@pytest.mark.parametrize(("heads", "heads_k"), [(4, 1), (4, 2), (3, 3), (6, 2)])
def test_grouped_heads(heads: int, heads_k: int) -> None:
    check_dense(Case(20, 37, 16, heads, heads_k, batch=2, options={"causal": True}))


WINDOWS = [(0, 0), (1, 0), (15, -1), (16, 3), (-1, 17), (-1, 0), (40, 40)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(50, 50), (33, 70), (70, 33)])
def test_windows(window: tuple[int, int], seqlen_q: int, seqlen_k: int) -> None:
    check_dense(Case(seqlen_q, seqlen_k, 16, heads=1, heads_k=1, options={"window_size": window}))


def test_window_with_causal_keeps_the_left_limit() -> None:
    check_dense(Case(50, 50, 16, options={"window_size": (7, 30), "causal": True}))


@pytest.mark.parametrize("causal", [False, True])
def test_softcap(causal: bool) -> None:
    check_dense(Case(40, 50, 16, magnitude=3.0, options={"softcap": 4.0, "causal": causal}))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_alibi(rank: int, causal: bool) -> None:
    check_dense(Case(33, 50, 16, heads=3, heads_k=3, batch=2, alibi=rank, options={"causal": causal}))


@pytest.mark.parametrize("scale", [0.7, -0.4, 0.0])
def test_softmax_scale(scale: float) -> None:
    check_dense(Case(30, 40, 16, options={"softmax_scale": scale, "causal": True}))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dropout(dtype: torch.dtype, causal: bool) -> None:
    check_dense(Case(40, 50, 16, heads=2, heads_k=1, dtype=dtype, dropout_p=0.17, options={"causal": causal}))


def test_all_features_together() -> None:
    options = {"window_size": (20, 5), "softcap": 8.0, "softmax_scale": 0.4}
    check_dense(Case(45, 52, 24, heads=4, heads_k=2, batch=2, alibi=2, dropout_p=0.2, options=options))


def test_large_scores() -> None:
    """Scores of thousands: without the running maximum exp would overflow, without -inf guards 0 * inf appears.
    Most softmax rows are one-hot here, so dP - delta cancels; flash-attn's suite allows factor 5 for this."""
    check_dense(Case(40, 50, 16, dtype=BF16, magnitude=30.0, grad_factor=5, options={"causal": True}))


def test_equal_keys_share_the_weight() -> None:
    """With equal keys the softmax is uniform and out the running mean of v, whatever the scores."""
    torch.manual_seed(0)
    v = random(1, 40, 1, 16, dtype=F32)
    q = random(1, 40, 1, 16, dtype=F32)
    out = kernels.flash_attn_func(q, torch.ones_like(v), v, causal=True)
    mean = v.cumsum(1) / torch.arange(1, 41, device=DEVICE)[None, :, None, None]
    torch.testing.assert_close(out, mean, rtol=1e-5, atol=1e-6)


def test_rows_without_keys() -> None:
    """Sq > Sk under a causal mask: out 0, lse -inf, no gradient from those rows."""
    q, k, v = leaves(*(random(1, n, 1, 16, dtype=F16) for n in (40, 10, 10)))
    out, lse, _ = kernels.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :30] == 0).all()
    assert torch.isneginf(lse[:, :, :30]).all()
    assert torch.isfinite(lse[:, :, 30:]).all()
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert (dq[:, :30] == 0).all()


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 8, 8), (1, 0, 8), (1, 8, 0), (1, 0, 0)])
def test_empty(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    """No queries: dk = dv = 0. No keys: out = 0, lse = -inf, dq = 0."""
    case = Case(seqlen_q, seqlen_k, 16, batch=batch)
    q, k, v, dout, _ = make_inputs(case)
    q, k, v = leaves(q, k, v)
    out, lse, _ = kernels.flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert torch.isneginf(lse).all()
    for tensor, grad in zip((q, k, v), torch.autograd.grad(out, (q, k, v), dout), strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


def test_lse_is_differentiable() -> None:
    """A loss on the log-sum-exp alone, and together with out."""
    case = Case(30, 40, 16, heads=2, heads_k=1, dtype=F32, options={"causal": True})
    q, k, v, dout, _ = make_inputs(case)
    weight = torch.randn(1, 2, 30, device=DEVICE)
    for with_out in (False, True):
        grads = []
        for compute in (_kernel_out_lse, _truth_out_lse):
            x = leaves(q, k, v) if compute is _kernel_out_lse else leaves(q.double(), k.double(), v.double())
            out, lse = compute(*x)
            loss = (lse * weight).sum() + ((out * dout).sum() if with_out else 0.0)
            grads.append(torch.autograd.grad(loss, x, allow_unused=True, materialize_grads=True))
        for got, true in zip(*grads, strict=True):
            torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-5)


def _kernel_out_lse(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, _ = kernels.flash_attn_func(*x, causal=True, return_attn_probs=True)
    return out, lse


def _truth_out_lse(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_reference(*x, causal=True)


LAYOUTS = ["sliced", "transposed", "heads_first", "last_stride", "expanded"]


def _laid_out(layout: str, *shape: int) -> torch.Tensor:
    b, s, h, d = shape
    if layout == "sliced":  # of a wider, NaN-filled tensor: nothing beyond the slice may be read into a result
        wide = torch.full((b, s + 3, h + 1, d + 8), float("nan"), dtype=F16, device=DEVICE)
        wide[:, 1 : s + 1, :h, :d] = random(*shape, dtype=F16)
        return wide[:, 1 : s + 1, :h, :d]
    if layout == "transposed":
        return random(s, b, h, d, dtype=F16).transpose(0, 1)
    if layout == "heads_first":
        return random(b, h, s, d, dtype=F16).transpose(1, 2)
    if layout == "last_stride":
        return random(b, s, d, h, dtype=F16).transpose(2, 3)
    return random(1, s, 1, d, dtype=F16).expand(b, s, h, d)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str) -> None:
    """Any strides give the bits of the contiguous call."""
    torch.manual_seed(0)
    shapes = ((2, 30, 4, 16), (2, 41, 2, 16), (2, 41, 2, 16), (2, 30, 4, 16))
    q, k, v, dout = (_laid_out(layout, *shape) for shape in shapes)
    results = []
    for tensors in ((q, k, v, dout), tuple(t.contiguous() for t in (q, k, v, dout))):
        x = [t.detach().requires_grad_() for t in tensors[:3]]
        out = kernels.flash_attn_func(*x, causal=True)
        results.append((out, *torch.autograd.grad(out, x, tensors[3])))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_only_where_required(needed: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.attention import op, portable

    op.forget()  # a call that is known is not planned again
    launched: list[str] = []
    for name in ("plan_dq", "plan_dkdv"):
        launch = getattr(portable, name)
        monkeypatch.setattr(portable, name, lambda *a, _n=name, _f=launch: (launched.append(_n), _f(*a))[1])
    case = Case(20, 30, 16)
    q, k, v, dout, _ = make_inputs(case)
    every = leaves(q, k, v)
    expected = torch.autograd.grad(kernels.flash_attn_func(*every), every, dout)
    launched.clear()
    some = [t.detach().clone().requires_grad_(need) for t, need in zip((q, k, v), needed, strict=True)]
    kernels.flash_attn_func(*some).backward(dout)
    assert launched == (["plan_dq"] if needed[0] else ["plan_dkdv"])
    for tensor, need, true in zip(some, needed, expected, strict=True):
        assert (tensor.grad is not None) == need
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, true)


def test_deterministic_is_the_same_formula() -> None:
    check_dense(Case(30, 40, 16, options={"causal": True, "deterministic": True}))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.1}], ids=str)
def test_repeatable(options: dict[str, Any]) -> None:
    """Bitwise, without ``deterministic=True`` too."""
    q, k, v, dout, _ = make_inputs(Case(40, 50, 16, heads=4, heads_k=2))
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        x = leaves(q, k, v)
        out = kernels.flash_attn_func(*x, **options)
        runs.append((out, *torch.autograd.grad(out, x, dout)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_standard_attention(dtype: torch.dtype) -> None:
    """The baseline computes the same function."""
    options = {"causal": True, "window_size": (9, -1), "softcap": 5.0, "softmax_scale": 0.3}
    q, k, v, _, slopes = make_inputs(Case(50, 30, 16, heads=4, heads_k=2, batch=2, dtype=dtype, alibi=2))
    truth, _ = attention_reference(q.double(), k.double(), v.double(), alibi_slopes=slopes, **options)
    plain, _ = attention_reference(q, k, v, alibi_slopes=slopes, dtype=dtype, **options)
    assert_close("out", kernels.standard_attention(q, k, v, alibi_slopes=slopes, **options), plain, truth, 2)
