"""What differs between the config of a checkpoint and that of the run that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

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
    "engine.timeout_minutes", "engine.fuse_weight_gradients",
)  # fmt: skip
"""Keys, and sections with a dot, that leave the trained function as it is: results are equal, or differ by rounding."""


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
    """Keys whose values differ, those that matter first, else in the current config's order."""
    before, now = flat(plain(saved)), flat(plain(current))
    keys = [*now, *(key for key in before if key not in now)]
    differences = [
        Difference(key, before.get(key, ABSENT), now.get(key, ABSENT), matters(key))
        for key in keys
        if before.get(key, ABSENT) != now.get(key, ABSENT)
    ]
    return sorted(differences, key=lambda difference: not difference.matters)


def matters(key: str) -> bool:
    """Whether a change of the key changes what is trained, beyond rounding."""
    return not any(key == name or (name.endswith(".") and key.startswith(name)) for name in HARMLESS)


def plain(config: RunConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The config as nested JSON values: what a checkpoint keeps."""
    values = config if isinstance(config, Mapping) else asdict(config)
    return {key: plain(value) if isinstance(value, Mapping) else json_value(value) for key, value in values.items()}


def json_value(value: Any) -> Any:
    """A leaf as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple | list) else value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted keys; those of a list whose items have names, by name."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
            value = {item["name"]: item for item in value}
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
