"""Floating-point operations of training on one token, derived term by term; the numerator of MFU.

A multiplication and an addition are two operations. Only matrix products count: norms, activations, softmax and the
optimizer are about 1 % and no convention includes them. Recomputed activations do not count either: MFU asks how
much of the model's own work was done.

Products with weights. y = x·W with W (in, out) costs 2·in·out a token forward; the backward pass makes dx = dy·W^T
and dW = x^T·dy, the same again twice. So 6 per weight, in:
    qkv   E x (H + 2K)·D    queries of H heads, keys and values of K
    proj  H·D x E
    MLP   E x M and M x E; gated: E x M twice and M x E
    head  E x V             whether tied or not. The V tokens that exist: padding columns are no work of the model.
The embedding is a look-up and costs nothing; biases and norms are not products.

Attention. One query against one key: D multiply-adds for the score and D for the weighted sum of values, in each of
H heads: 4·H·D operations forward. Backward: dV, dP, dQ and dK, four products of the same size: 8·H·D. (That a flash
kernel also computes the scores again is recomputation.) So 12·H·D per layer, query and visible key. Grouped heads
share keys, but every query head still meets every key: K doesn't enter.
    full    every query meets all S keys: 12·L·H·D·S a token
    causal  query i (from 0) meets itself and the i before it, at most `window` of them:
            (1/S)·Σ_i (1 + min(i, window)) keys on average, (S + 1)/2 without a window

The form of Megatron-LM and the FlashAttention-2 paper (Dao 2023, section 4.2), to compare with published numbers:
    6·N + 12·L·E·S, where N is all weights but the position table, the vocabulary's matrix once; attention in full.
With H·D other than E, H·D stands for E, since that is what is multiplied.

E width, H heads, K key/value heads, D head dim, M MLP width, L layers, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from configs.schema import Activation, ModelConfig, Norm, Position
from model.dimensions import Dimensions, resolve_dimensions


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights."""

    total: int
    """All that the model stores, padding rows of the vocabulary too; a tied matrix once."""
    matmul: int
    """Those that every token is multiplied with: linear layers, and the head's V·E, tied or not."""
    embedding: int
    """The token table, V·E without padding; when tied, the same weights as the head's."""
    position: int
    """The table of learned positions, S·E; 0 without it."""
    padding: int
    """Rows of the vocabulary's matrices that stand for no token."""
    tied: bool
    """Whether head and token table are one matrix."""

    @property
    def vectors(self) -> int:
        """Those of norms and biases."""
        tables = (0 if self.tied else self.embedding) + self.padding + self.position
        return self.total - self.matmul - tables

    @property
    def megatron(self) -> int:
        """N of 6·N + 12·L·E·S: all weights but positions and padding, the vocabulary's matrix counted once."""
        return self.total - self.position - self.padding - (0 if self.tied else self.embedding)


@dataclass(frozen=True)
class FlopsPerToken:
    """Operations of the forward and backward pass on one token of a full sequence."""

    matmul: int
    """Products with weights: 6 per weight."""
    attention_causal: float
    """Scores and weighted sums over the keys that a query sees: causal, inside the window."""
    attention_full: float
    """The same over all S keys (with a window: over all `window` + 1), as if nothing were masked."""
    megatron_weights: int
    """6·N, with N as in `ParameterCounts.megatron`."""

    @property
    def causal(self) -> float:
        """Work that has to be done: all products with weights, and attention to visible keys."""
        return self.matmul + self.attention_causal

    @property
    def megatron(self) -> float:
        """6·N + 12·L·E·S, the convention of Megatron-LM and the FlashAttention-2 paper."""
        return self.megatron_weights + self.attention_full


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """The numbers of weights of a config whose `vocab_size` is set."""
    sizes = resolve_dimensions(config)
    linear = sizes.num_layers * _block_matrices(config, sizes)
    embedding = sizes.vocab_size * sizes.width
    position = sizes.sequence_length * sizes.width if config.position is Position.learned else 0
    tables = 1 if config.tied_embeddings else 2  # (padded V, E) matrices that are stored
    padding = tables * (sizes.padded_vocab_size - sizes.vocab_size) * sizes.width
    return ParameterCounts(
        total=linear + _vectors(config, sizes) + tables * embedding + padding + position,
        matmul=linear + embedding,
        embedding=embedding,
        position=position,
        padding=padding,
        tied=config.tied_embeddings,
    )


def flops_per_token(config: ModelConfig) -> FlopsPerToken:
    """Operations per token of training on sequences of `sequence_length` tokens.

    Documents that don't see each other (`data.document_mask`) leave fewer visible keys: `causal_flops_of_documents`.
    """
    sizes = resolve_dimensions(config)
    counts = parameter_counts(config)
    per_key = 12 * sizes.num_layers * sizes.query_width
    length = sizes.sequence_length
    widest = length if config.window is None else min(length, config.window + 1)
    return FlopsPerToken(
        matmul=6 * counts.matmul,
        attention_causal=per_key * mean_visible_keys(length, config.window),
        attention_full=per_key * widest,
        megatron_weights=6 * counts.megatron,
    )


def causal_flops_of_documents(config: ModelConfig, lengths: npt.NDArray[np.int64]) -> float:
    """`FlopsPerToken.causal` of the tokens of documents that don't see each other.

    lengths: (documents,) tokens of each, at least one document.
    """
    sizes = resolve_dimensions(config)
    widest = lengths if config.window is None else np.minimum(lengths, config.window + 1)
    keys = widest * (widest + 1) // 2 + (lengths - widest) * widest  # (documents,) as in `mean_visible_keys`
    per_key = 12 * sizes.num_layers * sizes.query_width
    return 6 * parameter_counts(config).matmul + per_key * int(keys.sum()) / int(lengths.sum())


def mean_visible_keys(length: int, window: int | None) -> float:
    """Keys that a query sees, averaged over the `length` queries of a sequence: itself and at most `window` before.

    The first w + 1 queries see 1, 2, ..., w + 1 keys, a triangle; each of the others sees w + 1.
    """
    widest = length if window is None else min(length, window + 1)
    triangle = widest * (widest + 1) // 2
    return (triangle + (length - widest) * widest) / length


def _block_matrices(config: ModelConfig, sizes: Dimensions) -> int:
    """Weights of one block's matrices."""
    attention = sizes.width * sizes.qkv_width + sizes.query_width * sizes.width
    mlp_matrices = 3 if config.activation is Activation.swiglu else 2
    return attention + mlp_matrices * sizes.width * sizes.mlp_width


def _vectors(config: ModelConfig, sizes: Dimensions) -> int:
    """Weights of all norms and biases."""
    norm = sizes.width * (2 if config.norm is Norm.layernorm and config.bias else 1)
    qk_norms = 2 * sizes.head_dim if config.qk_norm else 0
    mlp_hidden = sizes.mlp_width * (2 if config.activation is Activation.swiglu else 1)
    biases = sizes.qkv_width + sizes.width + mlp_hidden + sizes.width if config.bias else 0
    return sizes.num_layers * (2 * norm + qk_norms + biases) + norm
