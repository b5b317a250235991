"""The chunked loss against PyTorch's cross-entropy, in both of its forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.errors import UserError
from configs.schema import Attention, ModelConfig, Toggle
from kernels.compile_check import load_budget
from model import build_model, loss, loss_kernel
from model.loss import LossOptions, chunks, linear_cross_entropy, plain_chunk_loss_, resolve_fused
from model.norm_kernel import REGISTERS_PER_SM
from tests.model.small import batch, small

V, PADDED, E = 131, 256, 16
OPTIONS = {
    "plain": {"softcap": 0.0, "z_loss": 0.0},
    "z-loss": {"softcap": 0.0, "z_loss": 1e-2},
    "softcap": {"softcap": 1.5, "z_loss": 0.0},
    "both": {"softcap": 1.5, "z_loss": 1e-2},
}


def expected_sums(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, z_loss: float) -> Tensor:
    """From the definition, on the real columns alone, by autograd."""
    logits = hidden @ weight[:V].t()
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    ce = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    z = z_loss * logits.logsumexp(-1).square()[targets != -100].sum()
    return torch.stack((ce, z))


def problem(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(num_tokens, E).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, E).to(dtype).requires_grad_()  # the padding rows hold garbage on purpose
    targets = torch.randint(0, V, (num_tokens,))
    targets[::5] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sums_and_gradients(options: dict[str, float], fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 25 * PADDED)  # 61 tokens in three chunks, the last one short
    monkeypatch.setattr(loss_kernel, "BLOCK", 64)  # a row in three blocks, the last one short, and one of padding
    hidden, weight, targets = problem(61)
    sums = linear_cross_entropy(hidden, weight, targets, LossOptions(V, fused=fused, **options))
    assert sums.dtype is torch.float32
    got = torch.autograd.grad(sums.sum() * 0.25, (hidden, weight))
    expected = expected_sums(hidden, weight, targets, **options)
    wanted = torch.autograd.grad(expected.sum() * 0.25, (hidden, weight))
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(got[1][V:], torch.zeros(PADDED - V, E))
    assert torch.equal(got[0][::5], torch.zeros(13, E))


def test_two_programs_of_the_kernel_fill_a_multiprocessor() -> None:
    """What `NUM_WARPS` is for, by the compiler's budget: 2,048 threads and 65,536 registers on a Hopper GPU."""
    entry = load_budget()["loss[bf16,gradient] sm_90"]
    threads = 2 * 32 * loss_kernel.NUM_WARPS
    assert threads == 2048
    assert -(-entry.registers // 8) * 8 * threads <= REGISTERS_PER_SM  # given out in eights
    assert 2 * (entry.shared_bytes + 1024) <= 228 * 1024
    assert entry.spill_bytes == 0


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "triton"])
def test_half_precision_is_rounded_once(fused: bool) -> None:
    """bf16 weights, fp32 loss: no further from fp64 than PyTorch's own bf16 product and fp32 loss are, half as much
    again allowed; and a small scale (a loss divided by a million tokens) is not rounded to bf16 on its way."""
    hidden, weight, targets = problem(200, torch.bfloat16)
    scale = 1.0037e-6  # bf16 would make 1.0058e-6 of it, 0.2 % more
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = expected_sums(exact[0], exact[1], targets, 0.0, 1e-3)
    wanted = torch.autograd.grad(expected.sum() * scale, exact)
    logits = (hidden @ weight[:V].t()).float()
    z_loss = 1e-3 * logits.logsumexp(-1)[targets >= 0].square().sum()
    theirs = F.cross_entropy(logits, targets, reduction="sum") + z_loss
    reference = torch.autograd.grad(theirs * scale, (hidden, weight))

    sums = linear_cross_entropy(hidden, weight, targets, LossOptions(V, 0.0, 1e-3, fused))
    torch.testing.assert_close(sums.double(), expected, rtol=2e-3, atol=0)
    unscaled = torch.autograd.grad(sums.sum(), (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad(sums.sum() * scale, (hidden, weight))
    for got, whole, torchs, true in zip(scaled, unscaled, reference, wanted, strict=True):
        assert got.dtype is torch.bfloat16
        assert (got.double() - true).norm() <= 1.5 * (torchs.double() - true).norm()
        factor = (got.double() * whole.double()).sum() / whole.double().square().sum()
        assert factor.item() == pytest.approx(scale, rel=5e-4)


def test_gradients_accumulate_over_micro_batches() -> None:
    hidden, weight, targets = problem(100)
    options = LossOptions(V, 0.0, 1e-2, False)
    for part in (slice(0, 37), slice(37, 100)):
        (linear_cross_entropy(hidden[part], weight, targets[part], options).sum() / 80).backward()
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, options).sum() / 80, (hidden, weight))
    torch.testing.assert_close((hidden.grad, weight.grad), whole, rtol=1e-5, atol=1e-6)


def test_first_sum_carries_the_whole_gradient() -> None:
    hidden, weight, targets = problem(50)
    sums = linear_cross_entropy(hidden, weight, targets, LossOptions(V, 0.0, 1e-2, False))
    (first,) = torch.autograd.grad(sums[0], hidden, retain_graph=True)
    (both,) = torch.autograd.grad(sums.sum(), hidden, retain_graph=True)
    (again,) = torch.autograd.grad(sums.sum(), hidden)
    assert torch.equal(first, both)
    assert torch.equal(both, again)  # the kept gradients are not scaled in place


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_gradients_only_where_wanted(frozen: str) -> None:
    hidden, weight, targets = problem(50)
    options = LossOptions(V, 0.0, 0.0, False)
    plain = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, options)[0], (hidden, weight))
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    sums = linear_cross_entropy(hidden, weight, targets, options)
    if frozen == "both":
        assert not sums.requires_grad
        return
    sums.sum().backward()
    kept, index = (weight, 1) if frozen == "hidden" else (hidden, 0)
    torch.testing.assert_close(kept.grad, plain[index])


def test_losing_every_target_is_a_loss_of_zero() -> None:
    hidden, weight, targets = problem(10)
    sums = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), LossOptions(V, 0.0, 1e-2, False))
    assert sums.tolist() == [0.0, 0.0]
    assert torch.equal(torch.autograd.grad(sums.sum(), hidden)[0], torch.zeros(10, E))


def test_never_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def spy(logits: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(logits.shape))
        return plain_chunk_loss_(logits, *rest)

    monkeypatch.setattr(loss, "plain_chunk_loss_", spy)
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 200 * PADDED)
    hidden, weight, targets = problem(1000)
    linear_cross_entropy(hidden, weight, targets, LossOptions(V, 0.0, 0.0, False))
    assert seen == [(200, PADDED)] * 5 or max(n for n, _ in seen) <= 200
    assert sum(n for n, _ in seen) == 1000


@pytest.mark.parametrize("num_tokens", [0, 1, 127, 128, 1000, 4096, 5000])
def test_chunks_cover_every_token_once(num_tokens: int) -> None:
    parts = chunks(num_tokens, 50304, torch.device("cpu"))
    assert [i for part in parts for i in range(num_tokens)[part]] == list(range(num_tokens))
    assert all(part.stop - part.start <= 2**22 // 50304 for part in parts)


def test_large_logits_stay_finite() -> None:
    for fused in (False, True):
        for softcap in (0.0, 30.0):
            logits = torch.tensor([[1e4, -1e4, 9e3, 0.0], [-8e3, -8e3, -8e3, 0.0]])
            options = LossOptions(3, softcap, 0.0, fused)
            sums = loss.chunk_loss_(logits, torch.tensor([2, 1]), options, want_gradient=True)
            assert torch.isfinite(sums).all()
            assert torch.isfinite(logits).all()
            if softcap == 0:
                torch.testing.assert_close(sums[0].item(), 1000 + float(torch.tensor(3.0).log()))


def test_a_target_in_the_padding_is_no_silent_loss() -> None:
    hidden, weight, targets = problem(10)
    targets[3] = V
    assert linear_cross_entropy(hidden, weight, targets, LossOptions(V, 0.0, 0.0, True))[0].isinf()
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(hidden, weight, targets, LossOptions(V, 0.0, 0.0, False))


def test_padding_is_never_predicted_and_does_not_change_the_loss() -> None:
    """The same weights with and without padding rows, the padding filled with what would win every softmax."""
    config = small(vocab_multiple=1, tied_embeddings=False)
    plain = build_model(config)
    padded = build_model(small(vocab_multiple=128, tied_embeddings=False))
    state = plain.state_dict()
    for name in ("embedding.weight", "head.weight"):
        state[name] = torch.cat((state[name], torch.full((PADDED - V, 32), 9.0)))
    padded.load_state_dict(state)
    tokens, targets = batch(config)
    torch.testing.assert_close(padded(tokens), plain(tokens))
    assert padded(tokens).shape[-1] == V
    torch.testing.assert_close(padded(tokens, targets), plain(tokens, targets))


def test_model_and_logits_agree_on_the_loss() -> None:
    config = small(logit_softcap=1.5, z_loss=1e-2, init_std=0.5)
    model = build_model(config)
    tokens, targets = batch(config)
    logits = model(tokens).flatten(0, 1)
    assert logits.abs().max() <= 1.5
    ce = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    z = 1e-2 * logits.logsumexp(-1).square()[targets.flatten() != -100].sum()
    torch.testing.assert_close(model(tokens, targets), torch.stack((ce, z)))


def test_autocast_runs_the_products_in_its_dtype() -> None:
    config = small(attention=Attention.standard)
    model = build_model(config)
    tokens, targets = batch(config)
    with torch.autocast("cpu", torch.bfloat16):
        sums = model(tokens, targets)
    sums.sum().backward()
    torch.testing.assert_close(sums, model(tokens, targets), rtol=1e-2, atol=0)
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


def test_fused_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not resolve_fused(Toggle.auto, cpu)
    assert resolve_fused(Toggle.auto, cuda)
    assert not resolve_fused(Toggle.off, cuda)
    assert resolve_fused(Toggle.on, cpu)  # in the interpreter
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match=r"model\.fused=on needs a CUDA device"):
        resolve_fused(Toggle.on, cpu)


def test_fused_model_equals_plain_model() -> None:
    results = []
    for fused in (Toggle.off, Toggle.on):
        torch.manual_seed(0)
        config: ModelConfig = small(fused=fused, z_loss=1e-3)
        model = build_model(config)
        sums = model(*batch(config))
        sums.sum().backward()
        results.append([sums, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
