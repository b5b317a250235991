"""The operators as PyTorch sees them: opcheck, torch.compile, autocast, second derivatives, errors."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import kernels
from kernels.attention.op import NAMESPACE
from tests.kernels.cases import DEVICE, Case, leaves, make_inputs, offsets, random

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
OPS: Any = getattr(torch.ops, NAMESPACE)


def options(max_q: int, max_k: int, *, cu: Tensor | None = None, rng: Tensor | None = None, **changes: Any) -> tuple:
    """Arguments of an operator after its tensors."""
    scalars = {"scale": 0.25, "causal": True, "left": -1, "right": -1, "softcap": 0.0, "dropout": 0.0, "det": False}
    scalars.update(changes)
    return (cu, cu, None, rng, max_q, max_k, *scalars.values())


def cases() -> dict[str, tuple[Any, tuple]]:
    torch.manual_seed(0)
    q, k, v = leaves(*(random(1, n, h, 16, dtype=F32) for n, h in ((12, 2), (18, 1), (18, 1))))
    (kv,) = leaves(random(1, 18, 2, 1, 16, dtype=F32))
    (qkv,) = leaves(random(20, 3, 2, 16, dtype=F32))
    rng = torch.tensor([1, 2], device=DEVICE)
    return {
        "dense": (OPS.attention, (q, k, v, *options(12, 18))),
        "dropout": (OPS.attention, (q, k, v, *options(12, 18, rng=rng, dropout=0.2))),
        "kvpacked": (OPS.attention_kvpacked, (q, kv, *options(12, 18, causal=False))),
        "qkvpacked_varlen": (OPS.attention_qkvpacked, (qkv, *options(12, 12, cu=offsets([8, 12])))),
    }


@pytest.mark.parametrize("name", ["dense", "dropout", "kvpacked", "qkvpacked_varlen"])
def test_opcheck(name: str) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch with static and dynamic shapes."""
    op, args = cases()[name]
    torch.library.opcheck(op.default, args)


def test_opcheck_backward_and_probs() -> None:
    q, k, v, dout, _ = make_inputs(Case(12, 18, 16, heads=2, heads_k=1, dtype=F32))
    rng = torch.tensor([1, 2], device=DEVICE)
    rest = options(12, 18, rng=rng, dropout=0.2)
    out, lse = OPS.attention(q, k, v, *rest)
    checks = ("test_schema", "test_faketensor")
    for need in ((True, True), (True, False), (False, True)):
        args = (dout, None, out, lse, q, k, v, *need, *rest)
        torch.library.opcheck(OPS.attention_backward.default, args, test_utils=checks)
    torch.library.opcheck(OPS.attention_probs.default, (q, k, lse, *rest), test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    """No graph break, forward and backward; with dynamic lengths one compilation serves all."""

    def layer(x: Tensor, w: Tensor) -> Tensor:
        qkv = (x @ w).unflatten(-1, (3, 2, 16))  # (B, S, 3, H, D)
        return kernels.flash_attn_qkvpacked_func(qkv, causal=True).flatten(-2) + x

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    w = random(32, 96, dtype=F32)
    for length in (20, 33) if dynamic else (20,):
        x = random(1, length, 32, dtype=F32)
        results = []
        for function in (layer, compiled):
            a, b = leaves(x, w)
            with torch._dynamo.config.patch(error_on_recompile=True):
                out = function(a, b)
            results.append((out, *torch.autograd.grad(out.square().sum(), (a, b))))
        for got, true in zip(*results, strict=True):
            torch.testing.assert_close(got, true)


def test_compile_with_dropout_draws_new_masks() -> None:
    torch._dynamo.reset()
    q = random(1, 20, 1, 16, dtype=F32)
    compiled = torch.compile(
        lambda x: kernels.flash_attn_func(x, x, x, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(0)
    first, second = compiled(q), compiled(q)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(dtype: torch.dtype, compiled: bool) -> None:
    """fp32 inputs are computed in the autocast dtype and get fp32 gradients; slopes stay fp32."""
    torch._dynamo.reset()
    q, k, v, dout, slopes = make_inputs(Case(20, 20, 16, dtype=F32, alibi=1))
    function = kernels.flash_attn_func
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = leaves(q, k, v)
    with torch.autocast(DEVICE, dtype=dtype):
        out = function(*x, alibi_slopes=slopes)
    assert out.dtype == dtype
    low = leaves(*(t.to(dtype) for t in (q, k, v)))
    expected = kernels.flash_attn_func(*low, alibi_slopes=slopes)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out, x, dout.to(dtype))
    for got, true in zip(grads, torch.autograd.grad(expected, low, dout.to(dtype)), strict=True):
        assert got.dtype == F32
        assert torch.equal(got, true.float())


def test_second_derivative_is_refused() -> None:
    q, k, v = leaves(*(random(1, 8, 1, 16, dtype=F32) for _ in range(3)))
    (dq,) = torch.autograd.grad(kernels.flash_attn_func(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*standard_attention"):
        dq.sum().backward()


def test_forward_mode_derivative_is_refused() -> None:
    """Whether or not the call is known already, and through torch.func; where nothing has a tangent, all is as ever."""
    q, k, v, tangent = (random(1, 8, 1, 16, dtype=F32) for _ in range(4))
    plain = kernels.flash_attn_func(q, k, v)
    refused = pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*standard_attention")
    with forward_ad.dual_level():
        assert torch.equal(kernels.flash_attn_func(q, k, v), plain)
        with refused:
            kernels.flash_attn_func(forward_ad.make_dual(q, tangent), k, v)
        with refused:
            kernels.flash_attn_kvpacked_func(q, forward_ad.make_dual(torch.stack([k, v], 2), torch.stack([k, v], 2)))
        with refused:
            slopes = torch.ones(1, device=DEVICE)
            kernels.flash_attn_func(q, k, v, alibi_slopes=forward_ad.make_dual(slopes, slopes))
    with refused:
        torch.func.jvp(lambda x: kernels.flash_attn_func(x, k, v), (q,), (tangent,))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_of_slopes_is_refused(frozen: bool) -> None:
    """Whether or not q, k and v have one, and the call is known already; where nobody wants it, all is as ever."""
    q, k, v = leaves(*(random(1, 8, 2, 16, dtype=F32) for _ in range(3)))
    if frozen:
        q, k, v = q.detach(), k.detach(), v.detach()
    slopes = torch.tensor([0.5, 0.25], device=DEVICE)
    plain = kernels.flash_attn_func(q, k, v, alibi_slopes=slopes)
    learned = torch.nn.Parameter(slopes)
    for _ in range(2):  # a call of a fresh geometry, then one that could be known by it
        with torch.no_grad():
            assert torch.equal(kernels.flash_attn_func(q, k, v, alibi_slopes=learned), plain)
        assert torch.equal(kernels.flash_attn_func(q, k, v, alibi_slopes=learned.detach()), plain)
        for function in (kernels.flash_attn_func, torch.compile(kernels.flash_attn_func, backend="eager")):
            with pytest.raises(NotImplementedError, match=r"no gradient of alibi_slopes.*detach.*standard_attention"):
                function(q, k, v, alibi_slopes=learned)
    kernels.standard_attention(q, k, v, alibi_slopes=learned).sum().backward()
    assert learned.grad is not None


def test_probabilities_without_dropout_are_empty() -> None:
    q = random(1, 8, 1, 16, dtype=F16)
    out, lse, probs = kernels.flash_attn_func(q, q, q, return_attn_probs=True)
    assert (out.shape, lse.shape, probs.numel()) == (q.shape, (1, 1, 8), 0)


def x(*shape: int, dtype: torch.dtype = F16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


func, varlen_func = kernels.flash_attn_func, kernels.flash_attn_varlen_func
D8, D16, FOUR = x(1, 4, 2, 8), x(1, 4, 2, 16), x(4, 2, 8)
WHOLE, HALVES = offsets([4]), offsets([2, 2])
BAD: list[tuple[str, type[Exception], str, Any]] = [
    ("rank", ValueError, r"q must be \(batch, seqlen", lambda: func(FOUR, FOUR, FOUR)),
    ("dtypes", TypeError, "float16.*float32", lambda: func(D8, D8.float(), D8)),
    ("dtype", TypeError, "float64", lambda: func(*[D8.double()] * 3)),
    ("k_v", ValueError, r"\(1, 4, 2, 8\) and \(1, 5, 2, 8\)", lambda: func(D8, D8, x(1, 5, 2, 8))),
    ("batch", ValueError, "batch 1, k and v 2", lambda: func(D8, *[x(2, 4, 2, 8)] * 2)),
    ("head_dims", ValueError, "head dim 8, k and v 16", lambda: func(D8, D16, D16)),
    ("head_dim", ValueError, "1 to 256, got 257", lambda: func(*[x(1, 4, 2, 257)] * 3)),
    ("heads", ValueError, "3 heads.*of the 2", lambda: func(x(1, 4, 3, 8), D8, D8)),
    ("no heads", ValueError, "0 heads", lambda: func(x(1, 4, 0, 8), D8, D8)),
    ("dropout", ValueError, r"\[0, 1\), got 1.0", lambda: func(D8, D8, D8, dropout_p=1.0)),
    ("window", ValueError, "window_size", lambda: func(D8, D8, D8, window_size=(1,))),
    ("alibi", ValueError, r"\(3,\) torch.float32", lambda: func(D8, D8, D8, alibi_slopes=x(3, dtype=F32))),
    ("cu", ValueError, "cu_seqlens_q must be .*int64", lambda: varlen_func(*[FOUR] * 3, WHOLE.long(), WHOLE, 4, 4)),
    ("cu_sizes", ValueError, "2 entries, .*_k 3", lambda: varlen_func(*[FOUR] * 3, WHOLE, HALVES, 4, 4)),
    ("paged", ValueError, "block_table", lambda: varlen_func(*[FOUR] * 3, WHOLE, WHOLE, 4, 4, block_table=WHOLE)),
    ("qkv", ValueError, r"\(batch, seqlen, 3", lambda: kernels.flash_attn_qkvpacked_func(x(1, 4, 2, 2, 8))),
    ("kv", ValueError, r"\(batch, seqlen, 2", lambda: kernels.flash_attn_kvpacked_func(D8, x(1, 4, 3, 2, 8))),
]


@pytest.mark.parametrize(("error", "message", "call"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_errors_name_what_was_given(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()


def test_unknown_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_PATH", "fast")
    with pytest.raises(ValueError, match=r"FLASH_ATTN_PATH='fast'.*auto, hopper, portable"):
        kernels.flash_attn_func(*[x(1, 4, 2, 8)] * 3)


def test_cpu_tensors_without_the_interpreter() -> None:
    """Importing needs no GPU; calling on a CPU says what to do. (A process of its own: triton decides at import.)"""
    program = (
        "import torch, kernels\n"
        "q = torch.zeros(1, 4, 2, 8)\n"
        "try: kernels.flash_attn_func(q, q, q)\n"
        "except ValueError as error: print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert "run on CUDA tensors, got cpu" in run.stdout
    assert "TRITON_INTERPRET=1" in run.stdout
