"""Small models and batches that the tests of this package share."""

from __future__ import annotations

from typing import Any

import torch

from configs.schema import Activation, Attention, ModelConfig, Norm, Position

LLAMA: dict[str, Any] = {
    "position": Position.rope,
    "norm": Norm.rmsnorm,
    "activation": Activation.swiglu,
    "bias": False,
}
"""The options that make a Llama of a config."""


def small(**options: Any) -> ModelConfig:
    """Two layers of width 32 with four heads of 8, S = 16, 131 tokens padded to 256; sdpa unless told otherwise."""
    sizes = {"num_layers": 2, "num_heads": 4, "width": 32, "sequence_length": 16, "vocab_size": 131}
    return ModelConfig(**(sizes | {"attention": Attention.sdpa} | options))


def batch(config: ModelConfig, size: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and targets (size, S); a tenth of the targets doesn't count."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, config.sequence_length)
    assert config.vocab_size is not None
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator)
    targets = torch.randint(0, config.vocab_size, shape, generator=generator)
    return tokens, targets.masked_fill(torch.rand(shape, generator=generator) < 0.1, -100)
