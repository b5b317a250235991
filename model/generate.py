"""Sampling text from a model in training."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.errors import UserError
from model.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue tokens (1, T) int64 by `max_new_tokens`; returns (1, T + max_new_tokens).

    temperature 0 takes the likeliest token; top_k draws only from that many likeliest (None: all). The draws come
    from `generator` (None: the device's global one) and from nothing else: the same generator state gives the same
    tokens. Dropout is off meanwhile, and the training mode is restored.

    There is no cache of keys and values: each new token is a forward pass over the last `sequence_length` tokens,
    so n tokens cost about n passes (n² growth until the context is full). That suits the few hundred tokens that
    training samples, and works wherever the model's forward does; blocks run uncompiled, since each length would
    be compiled anew. Under ZeRO-3 all ranks must call it alike, with as many new tokens.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise UserError(f"temperature={temperature} must be at least 0, and top_k={top_k} at least 1 or None")
    if tokens.ndim != 2 or tokens.shape[0] != 1 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must be (1, T) with T at least 1, got {tuple(tokens.shape)}")
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            for _ in range(max_new_tokens):
                logits = model(tokens[:, -model.config.sequence_length :], last_only=True)[:, -1]  # (1, V)
                tokens = torch.cat((tokens, sample(logits, temperature, top_k, generator)), dim=1)  # (1, T + 1)
    finally:
        model.train(was_training)
    return tokens


def sample(
    logits: Tensor, temperature: float, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """One token for each row of logits (B, V): int64 (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1): the smallest that stays
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)
