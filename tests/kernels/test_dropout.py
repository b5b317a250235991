"""Dropout: the mask is a pure function of (seed, offset, batch, head, row, column)."""

import pytest
import torch

import kernels
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
