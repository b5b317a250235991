"""Batch arithmetic: global batch = ranks × accumulation steps × micro-batch.

Ranks that share each sample (`engine.sequence_parallel_size`) count as one here.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import UserError
from configs.schema import EngineConfig, TrainConfig


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of one optimizer step, in sequences: global batch = ranks × accumulation steps × micro-batch."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int


def data_ranks(engine: EngineConfig, world_size: int) -> int:
    """Ranks, or groups of ranks, that take different samples: the `world_size` of this file's other functions.

    Raises `UserError` if the ranks can't be divided into such groups.
    """
    size = engine.sequence_parallel_size
    if world_size % size:
        possible = either([d for d in range(1, world_size + 1) if world_size % d == 0])
        raise UserError(f"engine.sequence_parallel_size={size} does not divide {ranks(world_size)}; use {possible}")
    return world_size // size


def resolve_batch(train: TrainConfig, world_size: int) -> BatchPlan:
    """Find the batch key that isn't given from the two that are; check all three if they are.

    Where only the global or only the micro-batch is given, there is no accumulation.

    Raises `UserError` that names the `train.*` keys: too few given, one below 1, or sizes that don't divide.
    """
    given = {
        "global_batch_size": train.global_batch_size,
        "micro_batch_size": train.micro_batch_size,
        "accumulation_steps": train.accumulation_steps,
    }
    for key, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"train.{key}={value}: must be at least 1")
    total, micro, accumulation = given.values()
    if accumulation is None and (total is None) != (micro is None):
        accumulation = 1  # one size alone: no accumulation
    if sum(value is not None for value in (total, micro, accumulation)) < 2:
        raise UserError(
            f"{describe(given)}: give train.global_batch_size or train.micro_batch_size, or two of these and "
            "train.accumulation_steps; they decide the third"
        )
    if total is None:
        assert micro is not None
        assert accumulation is not None
        return BatchPlan(world_size * accumulation * micro, micro, accumulation)
    if micro is None:
        assert accumulation is not None
        micro = divide(total, world_size, accumulation, "accumulation_steps")
        return BatchPlan(total, micro, accumulation)
    if accumulation is None:
        return BatchPlan(total, micro, divide(total, world_size, micro, "micro_batch_size"))
    if total != world_size * accumulation * micro:
        raise UserError(
            f"{describe(given)}: {ranks(world_size)} × {accumulation} × {micro} = {world_size * accumulation * micro} "
            f"sequences, not {total}; leave one of the three keys out"
        )
    return BatchPlan(total, micro, accumulation)


def divide(total: int, world_size: int, factor: int, factor_key: str) -> int:
    """`total / (world_size · factor)`. Raises `UserError` with the nearest values that divide."""
    quotient, rest = divmod(total, world_size * factor)
    if rest == 0:
        return quotient
    nearest_total = [n * world_size * factor for n in (quotient, quotient + 1) if n > 0]
    message = (
        f"train.global_batch_size={total} is not a multiple of {ranks(world_size)} × train.{factor_key}={factor}"
        f"; nearest train.global_batch_size: {either(nearest_total)}"
    )
    if total % world_size == 0:
        divisors = [d for d in range(1, total // world_size + 1) if total // world_size % d == 0]
        near = [max(d for d in divisors if d < factor), *(d for d in divisors if d > factor)][:2]
        message += f"; nearest train.{factor_key}: {either(near)}"
    raise UserError(message)


def describe(given: dict[str, int | None]) -> str:
    """`train.a=1, train.b=null` for a message."""
    return ", ".join(f"train.{key}={'null' if value is None else value}" for key, value in given.items())


def ranks(world_size: int) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{world_size} rank{'s' if world_size > 1 else ''}"


def either(values: list[int]) -> str:
    """`a or b`."""
    return " or ".join(str(value) for value in values)
