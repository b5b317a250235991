"""Packed sequences of different lengths (``cu_seqlens``), and inputs packed into one tensor."""

from typing import Any

import pytest
import torch

import kernels
from tests.kernels.cases import DEVICE, Case, check_varlen, leaves, offsets, random

F16, BF16 = torch.float16, torch.bfloat16
LENGTHS = [([20, 1, 33], [20, 1, 33]), ([0, 17, 0, 5], [9, 0, 3, 40]), ([5], [50]), ([40, 3], [10, 30])]


@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(lengths_q: list[int], lengths_k: list[int], causal: bool) -> None:
    """Empty sequences on either side, and lengths of q and k that differ either way."""
    check_varlen(lengths_q, lengths_k, Case(0, 0, 16, options={"causal": causal}))


def test_bf16_grouped_heads() -> None:
    check_varlen([20, 35], [31, 35], Case(0, 0, 40, heads=4, heads_k=2, dtype=BF16, options={"causal": True}))


def test_all_features_together() -> None:
    options = {"window_size": (12, 4), "softcap": 6.0}
    check_varlen([20, 35, 7], [31, 18, 7], Case(0, 0, 16, alibi=2, dropout_p=0.15, options=options))


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_past_the_last_offset(causal: bool) -> None:
    """NaN there: out 0, gradient 0, and nothing of it reaches a sequence."""
    check_varlen([20, 13], [20, 13], Case(0, 0, 16, options={"causal": causal}), tail=9)


def test_equals_dense() -> None:
    """Equal lengths: the bits of the dense call, forward and backward."""
    torch.manual_seed(0)
    q, dout = (random(2, 30, 4, 16, dtype=F16) for _ in range(2))
    k, v = (random(2, 41, 2, 16, dtype=F16) for _ in range(2))
    dense = leaves(q, k, v)
    out = kernels.flash_attn_func(*dense, causal=True)
    expected = (out, *torch.autograd.grad(out, dense, dout))
    packed = leaves(*(t.flatten(0, 1) for t in (q, k, v)))
    out = kernels.flash_attn_varlen_func(*packed, offsets([30, 30]), offsets([41, 41]), 30, 41, causal=True)
    got = (out, *torch.autograd.grad(out, packed, dout.flatten(0, 1)))
    for mine, true in zip(got, expected, strict=True):
        assert torch.equal(mine, true.flatten(0, 1))


def test_documents_do_not_see_each_other() -> None:
    """Changing one document changes nothing in the others, not a bit."""
    torch.manual_seed(0)
    qkv = random(60, 3, 2, 16, dtype=F16)
    cu = offsets([25, 20, 15])
    before = kernels.flash_attn_varlen_qkvpacked_func(qkv, cu, 25, causal=True)
    qkv[25:45] = random(20, 3, 2, 16, dtype=F16)
    after = kernels.flash_attn_varlen_qkvpacked_func(qkv, cu, 25, causal=True)
    same = (before == after).flatten(1).all(1)
    assert same[:25].all()
    assert same[45:].all()
    assert not same[25:45].any()


OPTIONS: list[dict[str, Any]] = [{"causal": True}, {"window_size": (9, 2), "softcap": 4.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("varlen", [False, True])
def test_packed_inputs(options: dict[str, Any], varlen: bool) -> None:
    """qkv- and kv-packed calls give the bits of the separate call, gradients in the packed layout."""
    torch.manual_seed(0)
    lead = (45,) if varlen else (2, 30)
    qkv, dout = random(*lead, 3, 2, 16, dtype=F16), random(*lead, 2, 16, dtype=F16)
    cu = offsets([20, 25])
    lengths = (cu, cu, 25, 25) if varlen else ()
    prefix = "flash_attn_varlen_" if varlen else "flash_attn_"
    q, k, v = leaves(*qkv.unbind(-3))
    out = getattr(kernels, f"{prefix}func")(q, k, v, *lengths, **options)
    grads = torch.autograd.grad(out, (q, k, v), dout)

    q, kv = leaves(qkv.select(-3, 0), qkv[..., 1:, :, :])
    half = getattr(kernels, f"{prefix}kvpacked_func")(q, kv, *lengths, **options)
    assert torch.equal(half, out)
    dq, dkv = torch.autograd.grad(half, (q, kv), dout)
    assert torch.equal(dq, grads[0])
    assert torch.equal(dkv, torch.stack(grads[1:], -3))

    (whole,) = leaves(qkv)
    lengths = (cu, 25) if varlen else ()
    full = getattr(kernels, f"{prefix}qkvpacked_func")(whole, *lengths, **options)
    assert torch.equal(full, out)
    (dqkv,) = torch.autograd.grad(full, whole, dout)
    assert torch.equal(dqkv, torch.stack(grads, -3))


def test_packed_gradient_is_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels get three slices of one tensor, and that tensor is the gradient: no concatenation."""
    from kernels.attention import portable

    seen: dict[str, torch.Tensor] = {}
    backward = portable.backward

    def spy(
        dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, dq: Any, dk: Any, dv: Any, *rest: Any
    ) -> None:
        seen.update(dq=dq, dk=dk, dv=dv)
        backward(dout, q, k, v, out, lse, dlse, dq, dk, dv, *rest)

    monkeypatch.setattr(portable, "backward", spy)
    (qkv,) = leaves(random(1, 20, 3, 2, 16, dtype=F16))
    (grad,) = torch.autograd.grad(kernels.flash_attn_qkvpacked_func(qkv).sum(), qkv)
    storages = {t.untyped_storage().data_ptr() for t in seen.values()}
    assert storages == {grad.untyped_storage().data_ptr()}


def test_max_seqlen_may_be_larger() -> None:
    """An upper bound is enough: the extra programs do nothing."""
    torch.manual_seed(0)
    q = random(30, 2, 16, dtype=F16)
    cu = offsets([12, 18])
    tight = kernels.flash_attn_varlen_func(q, q, q, cu, cu, 18, 18, causal=True)
    loose = kernels.flash_attn_varlen_func(q, q, q, cu, cu, 100, 100, causal=True)
    assert torch.equal(tight, loose)
    assert tight.device.type == DEVICE
