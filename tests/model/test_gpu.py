"""What only a GPU shows: the compiled loss kernel, flash attention in the model, and that no forward waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.schema import Attention, Position
from model import GPT, build_model
from model.loss import LossOptions, linear_cross_entropy
from tests.model.small import LLAMA, small

pytestmark = pytest.mark.gpu
SIZES: dict[str, Any] = {"width": 256, "num_heads": 4, "sequence_length": 256, "vocab_size": 5000}


def on_gpu(**options: Any) -> tuple[GPT, Tensor, Tensor]:
    torch.manual_seed(0)
    model = build_model(small(**(SIZES | options))).cuda().bfloat16()
    tokens, targets = torch.randint(0, 5000, (2, 2, 256), device="cuda")
    return model, tokens, targets


@pytest.mark.parametrize("vocab_size", [5000, 50257])
@pytest.mark.parametrize(("softcap", "z_loss"), [(0.0, 0.0), (0.0, 1e-3), (20.0, 1e-3)])
def test_loss_kernel_against_fp64(vocab_size: int, softcap: float, z_loss: float) -> None:
    """bf16 gradients no further from fp64 than 1.5 times those of PyTorch's bf16 product and fp32 loss."""
    padded = -(-vocab_size // 128) * 128
    hidden = torch.randn(6000, 256, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(padded, 256, device="cuda") * 0.1).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab_size, (6000,), device="cuda")
    targets[::7] = -100

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
        logits = (h @ w[:vocab_size].t()).to(torch.promote_types(dtype, torch.float32))
        y = softcap * torch.tanh(logits / softcap) if softcap else logits
        loss = F.cross_entropy(y, targets, reduction="sum") + z_loss * y.logsumexp(-1)[targets >= 0].square().sum()
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    sums = linear_cross_entropy(hidden, weight, targets, LossOptions(vocab_size, softcap, z_loss, True))
    got = torch.autograd.grad(sums.sum(), (hidden, weight))
    truth, torchs = plain(torch.float64), plain(torch.bfloat16)
    torch.testing.assert_close(sums.sum().double(), truth[0], rtol=1e-3, atol=0)
    for ours, theirs, exact in zip(got, torchs[1:], truth[1:], strict=True):
        assert (ours.double() - exact).norm() <= 1.5 * (theirs.double() - exact).norm()


MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama-grouped": LLAMA | {"num_kv_heads": 2, "qk_norm": True},
    "alibi-window": {"position": Position.alibi, "window": 50},
}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_flash_model_agrees_with_sdpa(options: dict[str, Any], documents: bool) -> None:
    starts = torch.tensor([0, 10, 256, 300, 512], dtype=torch.int32, device="cuda")
    where = {"cu_seqlens": starts, "max_seqlen": 246} if documents else {}
    results = []
    for attention in (Attention.flash, Attention.sdpa):
        model, tokens, targets = on_gpu(attention=attention, **options)
        sums = model(tokens, targets, **where)
        sums.sum().backward()
        results.append((sums, [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-3, atol=1e-2)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert (ours.float() - theirs.float()).norm() <= 0.05 * theirs.float().norm() + 1e-3


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_forward_and_backward_never_wait_for_the_device(options: dict[str, Any]) -> None:
    model, tokens, targets = on_gpu(attention=Attention.auto, z_loss=1e-4, **options)
    for _ in range(2):  # kernels are compiled, and the library handles made, the first time
        model(tokens, targets).sum().backward()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        model(tokens, targets).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_compiled_blocks_with_flash_are_one_graph(options: dict[str, Any]) -> None:
    model, tokens, targets = on_gpu(attention=Attention.flash, **options)
    eager = model(tokens, targets)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_blocks()
    sums = model(tokens, targets)
    sums.sum().backward()
    torch.testing.assert_close(sums, eager, rtol=2e-3, atol=1e-2)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
