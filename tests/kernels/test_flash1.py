"""The FlashAttention-1 baseline computes the same attention."""

import pytest
import torch

from kernels import flash1_attn_func
from kernels.attention.reference import attention_reference
from tests.kernels.cases import Case, assert_close, delta_floor, leaves, make_inputs, random


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen", "head_dim"), [(50, 16), (33, 40), (64, 64), (1, 16)])
def test_against_truth(seqlen: int, head_dim: int, causal: bool, dtype: torch.dtype) -> None:
    q, k, v, dout, _ = make_inputs(Case(seqlen, seqlen, head_dim, dtype=dtype))
    mine, exact, low = leaves(q, k, v), leaves(q.double(), k.double(), v.double()), leaves(q, k, v)
    out = flash1_attn_func(*mine, causal=causal)
    truth, _ = attention_reference(*exact, causal=causal)
    plain, _ = attention_reference(*low, causal=causal, dtype=dtype)
    assert_close("out", out, plain, truth, 2)
    grads = torch.autograd.grad(out, mine, dout)
    truths = torch.autograd.grad(truth, exact, dout.double())
    plains = torch.autograd.grad(plain, low, dout)
    floors = [delta_floor(out, dout, x, head_dim**-0.5, seqlen) for x in (k, q)] + [0.0]
    for name, *values, floor in zip(("dq", "dk", "dv"), grads, plains, truths, floors, strict=True):
        assert_close(name, *values, 2, floor)


def test_strides_and_scale() -> None:
    """Slices of one packed tensor, and a scale of one's own."""
    torch.manual_seed(0)
    qkv = random(2, 40, 3, 2, 16, dtype=torch.float16)
    q, k, v = qkv.unbind(2)
    out = flash1_attn_func(q, k, v, softmax_scale=0.7, causal=True)
    truth, _ = attention_reference(q, k, v, softmax_scale=0.7, causal=True)
    assert (out - truth).abs().max() < 2e-3


def test_errors() -> None:
    x = random(1, 8, 2, 16, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"one shape .* got \(1, 8, 2, 16\), \(1, 4, 2, 16\)"):
        flash1_attn_func(x, x[:, :4], x[:, :4])
