"""Sampling."""

from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from model import build_model
from model.generate import generate, sample
from tests.model.small import LLAMA, small

PROMPT = torch.tensor([[5, 77, 3]])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_the_same_generator_gives_the_same_tokens() -> None:
    model = build_model(small(init_std=0.3))
    first = generate(model, PROMPT, 20, generator=generator())
    torch.randn(3)  # the global generator has no say
    assert torch.equal(first, generate(model, PROMPT, 20, generator=generator()))
    assert first.shape == (1, 23)  # beyond the 16 tokens of context
    assert torch.equal(first[:, :3], PROMPT)
    assert not torch.equal(first, generate(model, PROMPT, 20, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("options", [{}, LLAMA])
def test_greedy_tokens_are_the_likeliest(options: dict[str, object]) -> None:
    model = build_model(small(init_std=0.3, **options))
    tokens = generate(model, PROMPT, 10, temperature=0)
    assert torch.equal(tokens[:, 3:], model(tokens)[:, 2:-1].argmax(dim=-1))
    assert torch.equal(tokens, generate(model, PROMPT, 10, temperature=1e-4, generator=generator()))
    assert torch.equal(tokens, generate(model, PROMPT, 10, top_k=1, generator=generator()))


def test_top_k_and_temperature_shape_the_draws() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(4000, 4)
    draws = sample(logits, 1.0, top_k=2, generator=generator()).flatten()
    assert set(draws.tolist()) == {2, 3}
    assert (draws == 3).float().mean().item() == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.03)
    cold = sample(logits, 0.5, generator=generator()).flatten()
    expected = (logits[0] / 0.5).softmax(0)
    torch.testing.assert_close(cold.bincount(minlength=4) / 4000, expected, rtol=0, atol=0.03)


def test_padding_is_never_sampled() -> None:
    model = build_model(small())
    tokens = generate(model, PROMPT, 200, temperature=50.0, generator=generator())
    assert tokens.max() < 131


def test_training_mode_is_restored_and_dropout_is_off_meanwhile() -> None:
    model = build_model(small(dropout=0.5, init_std=0.3)).train()
    tokens = generate(model, PROMPT, 8, temperature=0)
    assert model.training
    assert torch.equal(tokens, generate(model.eval(), PROMPT, 8, temperature=0))
    assert not model.training


def test_wrong_arguments_are_refused() -> None:
    model = build_model(small())
    with pytest.raises(UserError, match="temperature"):
        generate(model, PROMPT, 1, temperature=-1.0)
    with pytest.raises(UserError, match="top_k"):
        generate(model, PROMPT, 1, top_k=0)
    with pytest.raises(ValueError, match=r"\(1, T\)"):
        generate(model, torch.zeros(2, 3, dtype=torch.int64), 1)
