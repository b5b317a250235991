"""The sizes of a model: every `None` of `ModelConfig` resolved, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import Activation, ModelConfig

SWIGLU_MULTIPLE = 128
"""A gated MLP's default width is rounded up to this, so that its matrix products fill whole tiles."""


@dataclass(frozen=True)
class Dimensions:
    """Sizes in elements. E width, H heads, K key/value heads, D head dim, M MLP width, S sequence, V vocabulary."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    width: int
    mlp_width: int
    sequence_length: int
    vocab_size: int
    """Tokens that exist, V."""
    padded_vocab_size: int
    """Rows of the embedding and the head: V rounded up to `vocab_multiple`."""

    @property
    def query_width(self) -> int:
        """Columns of all query heads, H·D; equals E unless `head_dim` is set."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of all key heads (and as many of all value heads), K·D."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Columns of the fused query, key and value projection, (H + 2K)·D."""
        return self.query_width + 2 * self.kv_width


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def resolve_dimensions(config: ModelConfig) -> Dimensions:
    """Resolve the sizes of a config that `model.gpt.check` finds no fault with and whose `vocab_size` is set."""
    if config.vocab_size is None:
        raise ValueError(
            "model.vocab_size is not set; it comes from the prepared data's tokenizer, "
            "or set model.vocab_size to the number of tokens"
        )
    return Dimensions(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads or config.num_heads,
        head_dim=config.head_dim or config.width // config.num_heads,
        width=config.width,
        mlp_width=config.mlp_width or default_mlp_width(config),
        sequence_length=config.sequence_length,
        vocab_size=config.vocab_size,
        padded_vocab_size=round_up(config.vocab_size, config.vocab_multiple),
    )


def default_mlp_width(config: ModelConfig) -> int:
    """4E; for a gated MLP 8E/3, which makes its three matrices as large as the two of an ungated one."""
    if config.activation is Activation.swiglu:
        return round_up(-(-8 * config.width // 3), SWIGLU_MULTIPLE)
    return 4 * config.width
