"""Dropout: the mask is a pure function of (seed, offset, batch, head, row, column)."""

import pytest
import torch

import kernels
from kernels.attention import portable
from kernels.attention.dispatch import AttnExtras, AttnParams
from kernels.attention.portable import launch
from kernels.attention.portable.tuning import Tile
from tests.kernels.cases import leaves, random


def keep_mask(q: torch.Tensor, k: torch.Tensor, p: float, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    probs = kernels.flash_attn_func(q, k, k, dropout_p=p, return_attn_probs=True)[2]
    return ~torch.signbit(probs)


@pytest.fixture
def qk() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return random(2, 64, 2, 16, dtype=torch.float16), random(2, 96, 2, 16, dtype=torch.float16)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_fraction(qk: tuple[torch.Tensor, torch.Tensor], p: float) -> None:
    """Kept with probability 1 - p, overall (5 sigma) and in every column residue mod 4 (the lanes of Philox)."""
    keep = keep_mask(*qk, p)
    for part in (keep, *(keep[..., lane::4] for lane in range(4))):
        sigma = (p * (1 - p) / part.numel()) ** 0.5
        assert abs(part.float().mean().item() - (1 - p)) < 5 * sigma


def test_heads_batches_and_seeds_differ(qk: tuple[torch.Tensor, torch.Tensor]) -> None:
    """No two (batch, head, seed) share a mask: they agree on about half of the entries."""
    first, second = keep_mask(*qk, 0.5, 0), keep_mask(*qk, 0.5, 1)
    masks = [mask[b, h] for mask in (first, second) for b in (0, 1) for h in (0, 1)]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert abs((first == second).float().mean().item() - 0.5) < 5 * 0.5 / first.numel() ** 0.5


def test_seed_decides(qk: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k = qk[0][:1], qk[1][:1]
    assert torch.equal(keep_mask(q, k, 0.5, 0), keep_mask(q, k, 0.5, 0))


def test_mask_does_not_depend_on_block_sizes(
    qk: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward agree on the mask although their tiles differ: any tiles give the same results."""
    q, k = qk
    dout = torch.randn_like(q)
    results = []
    for tile in (Tile(16, 16, 1, 1), Tile(32, 64, 1, 1)):
        monkeypatch.setattr(launch, "choose_tile", lambda *a, _tile=tile, **kw: _tile)
        torch.manual_seed(5)
        x = leaves(q, k, k)
        out = kernels.flash_attn_func(*x, dropout_p=0.4, causal=True)
        results.append((out, *torch.autograd.grad(out, x, dout)))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="calls the portable path on CPU tensors")
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "left"), [(70, 33, -1), (33, 70, 5)])
def test_rows_and_keys_without_a_partner_get_zero(seqlen_q: int, seqlen_k: int, left: int) -> None:
    """Whole blocks of queries that see no key, and of keys that no query sees, leave their kernels early."""
    torch.manual_seed(0)
    q, k = torch.randn(1, seqlen_q, 2, 16).half(), torch.randn(1, seqlen_k, 1, 16).half()
    params = AttnParams(0.25, seqlen_q, seqlen_k, window_left=left, window_right=0, dropout_p=0.3)
    extras = AttnExtras(rng_state=torch.tensor([7, 3]))
    out, lse = portable.forward(q, k, k, params, extras, {})
    dq, dk, dv = (torch.full_like(t, float("nan")) for t in (q, k, k))
    portable.backward(torch.randn_like(q), q, k, k, out, lse, None, dq, dk, dv, params, extras, {})
    last = torch.arange(seqlen_q) + seqlen_k - seqlen_q  # the last key of each query
    blind = last < 0
    unseen = torch.arange(seqlen_k) < (last[0] - left if left >= 0 else 0)
    assert blind.sum() >= 32 or unseen.sum() >= 32
    assert bool((dq[:, blind] == 0).all())
    assert bool((dk[:, unseen] == 0).all())
    assert bool((dv[:, unseen] == 0).all())
    for gradient, empty in ((dq, blind), (dk, unseen), (dv, unseen)):
        assert bool((gradient[:, ~empty] != 0).any((-1, -2)).sum() > 0.9 * (~empty).sum())
        assert bool(gradient.isfinite().all())


def test_expectation_is_attention() -> None:
    """Kept entries are scaled by 1 / (1 - p): the mean over masks tends to the result without dropout."""
    torch.manual_seed(0)
    q = random(1, 16, 1, 16, dtype=torch.float32)
    v = random(1, 16, 1, 16, dtype=torch.float32)
    torch.manual_seed(1)
    many = torch.cat(
        [kernels.flash_attn_func(q.expand(64, -1, -1, -1), *[x.expand(64, -1, -1, -1) for x in (q, v)], dropout_p=0.3)]
    )
    error = (many.mean(0) - kernels.flash_attn_func(q, q, v)[0]).abs()
    assert (error < 6 * many.std(0) / 8 + 1e-6).all()
