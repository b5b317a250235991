"""What can be wrong with a model's config, found before anything is built."""

from __future__ import annotations

from configs.schema import Attention, ModelConfig, Position
from model import attention


def check(config: ModelConfig, documents: bool = False) -> list[str]:
    """All problems of a model config, each naming its keys and the remedy; empty if there are none.

    `vocab_size` may still be None: it is known once the data is prepared. `documents`: `data.document_mask`.
    """
    found = _check_ranges(config)
    if found:
        return found  # the rest divides by these numbers
    found += _check_heads(config)
    if config.attention is not Attention.auto and not found:
        found += attention.problems(config, config.attention, documents)
    return found


def _check_ranges(config: ModelConfig) -> list[str]:
    at_least_one = {
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "width": config.width,
        "head_dim": config.head_dim,
        "mlp_width": config.mlp_width,
        "sequence_length": config.sequence_length,
        "vocab_size": config.vocab_size,
        "vocab_multiple": config.vocab_multiple,
    }
    not_negative = {
        "window": config.window,
        "attention_softcap": config.attention_softcap,
        "logit_softcap": config.logit_softcap,
        "z_loss": config.z_loss,
    }
    above_zero = {"rope_theta": config.rope_theta, "norm_eps": config.norm_eps, "init_std": config.init_std}
    found = [f"model.{k}={v} must be at least 1" for k, v in at_least_one.items() if v is not None and v < 1]
    found += [
        f"model.{k}={v:g} must not be negative; {'null' if k == 'window' else 0} turns it off"
        for k, v in not_negative.items()
        if v is not None and not v >= 0
    ]
    found += [f"model.{k}={v:g} must be above 0" for k, v in above_zero.items() if not v > 0]
    if not 0 <= config.dropout < 1:
        found.append(f"model.dropout={config.dropout:g} must be at least 0 and below 1; 0 turns it off")
    return found


def _check_heads(config: ModelConfig) -> list[str]:
    found = []
    if config.head_dim is None and config.width % config.num_heads:
        found.append(
            f"model.width={config.width} is not a multiple of model.num_heads={config.num_heads}; "
            "change one of them or set model.head_dim"
        )
        return found
    if config.num_kv_heads is not None and config.num_heads % config.num_kv_heads:
        divisors = [str(n) for n in range(1, config.num_heads + 1) if config.num_heads % n == 0]
        found.append(
            f"model.num_kv_heads={config.num_kv_heads} does not divide model.num_heads={config.num_heads}; "
            f"use one of {', '.join(divisors)}"
        )
    head_dim = config.head_dim or config.width // config.num_heads
    if config.position is Position.rope and head_dim % 2:
        found.append(
            f"model.position=rope rotates pairs, and the head dim is odd ({head_dim}); "
            "change model.head_dim or model.num_heads"
        )
    return found
