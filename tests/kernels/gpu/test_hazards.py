"""What only a GPU can get wrong: races, addresses, sizes beyond 32 bits, graphs, memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels.attention.reference import attention_reference
from tests.kernels.cases import leaves, random

pytestmark = pytest.mark.gpu
F16, BF16 = torch.float16, torch.bfloat16
on_each_path = pytest.mark.usefixtures("path")


def out_and_grads(tensors: tuple[Tensor, ...], dout: Tensor, **options: Any) -> tuple[Tensor, ...]:
    x = leaves(*tensors)
    out, lse, _ = kernels.flash_attn_func(*x, return_attn_probs=True, **options)
    return (out, lse, *torch.autograd.grad(out, x, dout))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "dropout_p": 0.2}, {"window_size": (200, 0), "softcap": 20.0}],
    ids=str,
)
@on_each_path
def test_repeat_bitwise(head_dim: int, options: dict[str, Any]) -> None:
    """Twenty runs, one result: any race shows as a bit that differs."""
    torch.manual_seed(0)
    q, dout = (random(4, 1000, 8, head_dim, dtype=BF16) for _ in range(2))
    k, v = (random(4, 1130, 4, head_dim, dtype=BF16) for _ in range(2))
    first = None
    for _ in range(20):
        torch.manual_seed(1)
        result = out_and_grads((q, k, v), dout, deterministic=True, **options)
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@on_each_path
def test_inputs_at_the_end_of_an_allocation(head_dim: int) -> None:
    """Ragged tails end exactly where the allocation ends, with NaN on the other side: nothing there may matter. (A
    read past a mapped page is an illegal access; compute-sanitizer (test_sanitizer.py) sees the others.)"""
    torch.manual_seed(0)
    shape = (1, 77, 2, head_dim)
    size = torch.Size(shape).numel()
    expected = [random(*shape, dtype=F16) for _ in range(4)]
    at_end = []
    for tensor in expected:
        slab = torch.full((2**21 // 2,), float("nan"), dtype=F16, device="cuda")  # 2 MiB, one page of the allocator
        slab[-size:] = tensor.flatten()
        at_end.append(slab[-size:].view(shape))
    got = out_and_grads(tuple(at_end[:3]), at_end[3], causal=True)
    true = out_and_grads(tuple(expected[:3]), expected[3], causal=True)
    assert all(torch.equal(a, b) for a, b in zip(got, true, strict=True))


@on_each_path
def test_nan_and_inf_in_padding() -> None:
    """Rows around the sequences of a packed tensor hold NaN and inf; out and gradients are finite and equal."""
    torch.manual_seed(0)
    lengths = [100, 33, 190]
    cu = torch.tensor([0, 100, 133, 323], dtype=torch.int32, device="cuda")
    qkv = random(400, 3, 4, 64, dtype=BF16)
    poisoned = qkv.clone()
    poisoned[323::2] = float("nan")
    poisoned[324::2] = float("inf")
    results = []
    for tensor in (qkv, poisoned):
        (x,) = leaves(tensor)
        out = kernels.flash_attn_varlen_qkvpacked_func(x, cu, max(lengths), causal=True)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), x)))
    for got, true in zip(*results, strict=True):
        assert torch.isfinite(got).all()
        assert torch.equal(got, true)


@on_each_path
def test_uninitialised_memory_does_not_leak() -> None:
    """The caching allocator hands out NaN: every element of every result is written."""
    q, k, v, dout = (random(2, 70, 4, 80, dtype=F16) for _ in range(4))
    for _ in range(4):
        del_me = [torch.full((2, 70, 4, 80), float("nan"), dtype=F16, device="cuda") for _ in range(16)]
        stats = [torch.full((2, 4, 70), float("nan"), device="cuda") for _ in range(4)]
        del del_me, stats
        assert all(torch.isfinite(t).all() for t in out_and_grads((q, k, v), dout, causal=True))


def test_more_than_2_31_elements() -> None:
    """9 x 32k x 64 x 128 = 2.4e9 elements in q: the last head of the last batch is right, forward and backward."""
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs 70 GiB")
    batch, seqlen, heads, dim = 9, 32768, 64, 128
    torch.manual_seed(0)
    q = torch.randn(batch, seqlen, heads, dim, dtype=BF16, device="cuda")
    k, v = (torch.randn(batch, seqlen, 1, dim, dtype=BF16, device="cuda") for _ in range(2))
    window = (256, 0)
    last = [t[-1:, -600:, -1:].clone() for t in (q, k, v)]
    q.requires_grad_()
    out = kernels.flash_attn_func(q, k, v, window_size=window)
    (dq,) = torch.autograd.grad(out, q, out.detach())
    exact = leaves(*(t.double() for t in last))
    truth, _ = attention_reference(*exact, window_size=window)
    (true_dq,) = torch.autograd.grad(truth, exact[0], out[-1:, -600:, -1:].double())
    assert (out[-1:, -300:, -1:] - truth[:, -300:]).abs().max() < 2e-2
    assert (dq[-1:, -300:, -1:] - true_dq[:, -300:]).abs().max() < 2e-2


@on_each_path
def test_more_than_65535_heads() -> None:
    """B * H = 70,000 (a grid's y and z axes stop at 65,535)."""
    torch.manual_seed(0)
    q, k, v, dout = (random(17500, 4, 4, 16, dtype=F16) for _ in range(4))
    got = out_and_grads((q, k, v), dout, causal=True)
    for start in (0, 17490):
        part = slice(start, start + 10)
        true = out_and_grads((q[part], k[part], v[part]), dout[part], causal=True)
        assert all(torch.equal(a[part], b) for a, b in zip(got, true, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@on_each_path
def test_cuda_graph(dropout_p: float) -> None:
    """Forward and backward captured; a replay on new inputs is right, and draws a new dropout mask."""
    torch.manual_seed(0)
    q, k, v, dout = (random(2, 130, 4, 64, dtype=F16) for _ in range(4))
    static = leaves(q, k, v)

    def step() -> tuple[Tensor, ...]:
        out = kernels.flash_attn_func(*static, dropout_p=dropout_p, causal=True)
        return (out, *torch.autograd.grad(out, static, dout))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in static:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    first = [t.clone() for t in captured]
    if dropout_p == 0.0:
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))
    else:
        graph.replay()
        assert not torch.equal(first[0], captured[0])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_memory_is_linear(head_dim: int) -> None:
    """Peak memory of forward and backward beyond inputs and gradients: doubles with S, and no S x S in it."""
    peaks = []
    for seqlen in (4096, 8192):
        x = leaves(*(random(1, seqlen, 4, head_dim, dtype=BF16) for _ in range(3)))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = kernels.flash_attn_func(*x, causal=True)
        torch.autograd.grad(out, x, out)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.1 * peaks[0]
    assert peaks[1] < 8192 * 8192  # bytes: less than one byte per score of one head


def test_other_device_is_used() -> None:
    """Tensors on a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q = random(1, 64, 2, 64, dtype=F16)
    other = kernels.flash_attn_func(*[q.to("cuda:1")] * 3, causal=True)
    assert torch.equal(other.to("cuda:0"), kernels.flash_attn_func(q, q, q, causal=True))
