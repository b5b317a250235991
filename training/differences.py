"""What differs between the config of a checkpoint and that of the run that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.messages import plain
from configs.schema import RunConfig

ABSENT = "(absent)"
"""Value of a key that one side doesn't have."""

HARMLESS = (
    "name", "run_dir", "resume", "logging.", "hardware.",
    "data.cache_dir", "data.num_workers", "data.shard_tokens", "data.prefetch",
    "train.log_every", "train.eval_every", "train.eval_sequences", "train.sample_tokens", "train.sample_prompt",
    "train.save_every", "train.keep_last", "train.keep_every", "train.async_save", "train.watchdog_minutes",
    "train.profile_steps",
    "train.micro_batch_size", "train.accumulation_steps",
    "model.attention", "model.fused", "model.fused_norms",
    "optim.fused_step",
    "engine.zero_stage", "engine.offload_optimizer", "engine.offload_params", "engine.bucket_size",
    "engine.overlap_comm", "engine.sequence_parallel_size", "engine.recompute", "engine.compile",
    "engine.timeout_minutes", "engine.fuse_weight_gradients", "engine.lean_zero2", "engine.lean_zero3",
    "engine.gather_in_place", "engine.copy_engines",
)  # fmt: skip
"""Keys, and sections with a dot, that leave the trained function as it is: results are equal, or differ by rounding.
(`data.shard_tokens` where it cuts no document, which `training.resume` looks at.)"""

SOURCE = "data.source"


@dataclass(frozen=True)
class Difference:
    """One key that differs."""

    key: str
    """Dotted, as on the command line."""
    saved: Any
    current: Any
    matters: bool
    """True if training goes on differently from how it would have; False if only rounding, speed or output can."""


def compare_configs(saved: RunConfig | Mapping[str, Any], current: RunConfig | Mapping[str, Any]) -> list[Difference]:
    """Keys whose values differ, those that matter first, else in the current config's order.

    A key that didn't exist yet when `saved` was written counts as at its default, which is what was done before.
    Between two mixtures `data.source` says nothing: it was `stdlib` in those of earlier versions.
    """
    before, now, default = flat(plain(saved)), flat(plain(current)), flat(plain(RunConfig()))
    if is_mixture(before) and is_mixture(now):
        before[SOURCE] = now[SOURCE]
    differences = []
    for key in [*now, *(key for key in before if key not in now)]:
        was, value = before.get(key, default.get(key, ABSENT)), now.get(key, ABSENT)
        if was != value:
            differences.append(Difference(key, was, value, matters(key)))
    return sorted(differences, key=lambda difference: not difference.matters)


def is_mixture(values: Mapping[str, Any]) -> bool:
    """Whether a flattened config mixes sources."""
    return any(key.startswith("data.mixture.") for key in values)


def matters(key: str) -> bool:
    """Whether a change of the key changes what is trained, beyond rounding."""
    return not any(key == name or (name.endswith(".") and key.startswith(name)) for name in HARMLESS)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted keys; those of a list whose items have names, by name."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
            value = {item["name"]: item for item in value}
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
