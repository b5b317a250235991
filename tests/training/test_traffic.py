"""The bytes that `training.forecast` says ranks send are those that they send."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from configs.schema import Device, Precision, RunConfig, Toggle
from tests.peers import FilePeers, Watched
from tests.ranks import on_ranks
from tests.training.conftest import make_batch, make_model, run_config
from training import backend, distributed, engine
from training.batch import data_ranks, resolve_batch
from training.distributed import Processes
from training.engine import build_engine
from training.forecast import Job, traffic

WAYS = [(stage, Toggle.auto) for stage in (0, 1, 2, 3)] + [(2, Toggle.off)]
"""Stages, and `engine.lean_zero2`."""
GRADIENTS, WEIGHTS, HEADS = "gradients", "weights", "heads"
KINDS = {
    "all_reduce": (GRADIENTS, 2.0),
    "reduce_scatter_tensor": (GRADIENTS, 1.0),
    "reduce": (GRADIENTS, 1.0),
    "all_gather_into_tensor": (WEIGHTS, 1.0),
    "all_gather": (WEIGHTS, 1.0),
    "all_to_all_single": (HEADS, 1.0),
}
"""Collective → what it moves, and how often around a ring."""


def count_bytes(sent: Counter[str]) -> None:
    """Have each collective add the bytes that it sends to `sent`."""

    def counted(name: str) -> Any:
        plain, signature = getattr(dist, name), inspect.signature(inspect.unwrap(getattr(dist, name)))
        kind, rounds = KINDS[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            size = dist.get_world_size(given.get("group"))
            whole = max((v.numel() * v.element_size() for v in given.values() if isinstance(v, Tensor)), default=0)
            sent[kind] += int(whole * rounds * (size - 1) / size)
            return plain(*args, **kwargs)

        return call

    for name in KINDS:
        setattr(dist, name, counted(name))


def config_of(stage: int, lean: Toggle) -> RunConfig:
    config = run_config(stage, accumulation=3, micro=1, sequence_parallel_size=2, lean_zero2=lean)
    config.engine.precision = Precision.bf16
    return config


def bytes_of_a_step(config: RunConfig, own: Processes, sent: Counter[str]) -> dict[str, int]:
    one = build_engine(make_model(config), config, resolve_batch(config.train, data_ranks(config.engine, 2)), own)
    for step in range(3):  # ZeRO-3 traces the first ones
        sent.clear()
        one.train_step(make_batch(step, config), 1e-2)  # type: ignore[arg-type]
    one.close()
    return dict(sent)


def bytes_of_steps() -> dict[tuple[int, Toggle], dict[str, int]]:
    """What one of two ranks sends, each way."""
    sent: Counter[str] = Counter()
    count_bytes(sent)  # before DeepSpeed looks the collectives up
    own = distributed.init(Device.cpu)
    nothing = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    backend.gathering = lambda _: nothing | {"stage3_prefetch_bucket_size": 0}  # small weights travel as large ones
    found = {way: bytes_of_a_step(config_of(*way), own, sent) for way in WAYS}
    own.barrier()
    own.close()
    return found


def bytes_read() -> dict[int, tuple[int, dict[str, int]]]:
    """By stage, what one of two ranks reads from the other's memory in a step, and what it sends meanwhile."""
    sent: Counter[str] = Counter()
    count_bytes(sent)
    own = distributed.init(Device.cpu)
    nothing = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    backend.gathering = lambda _: nothing | {"stage3_prefetch_bucket_size": 0}
    engine.find_peers = lambda *_: FilePeers(own)
    found = {}
    for stage in (2, 3):
        config, before = config_of(stage, Toggle.auto), Watched.read
        sending = bytes_of_a_step(config, own, sent)
        found[stage] = ((Watched.read - before) // 3, sending)  # three steps; each gathers alike
    own.barrier()
    own.close()
    return found


def test_ranks_read_what_was_predicted() -> None:
    """From each other's memory: gradients in bf16, and at stage 3 weights. At stage 2 weights are sent."""
    for stage, (read, sending) in on_ranks(2, bytes_read)[0].items():
        config = config_of(stage, Toggle.auto)
        expected = traffic(Job(config.model, config.engine, 2, 1, 3, world_size=2, overlapped=False, copied=True))
        by_messages = expected.weights if stage == 2 else 0
        assert read == expected.gradients + expected.weights - by_messages
        assert sending.get(WEIGHTS, 0) == by_messages
        assert sending[HEADS] == expected.heads
        assert sending[GRADIENTS] <= 64


@pytest.fixture(scope="module")
def sent() -> dict[tuple[int, Toggle], dict[str, int]]:
    found: dict[tuple[int, Toggle], dict[str, int]] = on_ranks(2, bytes_of_steps)[0]
    return found


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"zero{way[0]}-{way[1]}")
def test_a_step_sends_what_was_predicted(
    sent: dict[tuple[int, Toggle], dict[str, int]], way: tuple[int, Toggle]
) -> None:
    """But for what isn't proportional to the model: the loss, the norm, whether to step. At most 64 bytes."""
    config = config_of(*way)
    expected = traffic(Job(config.model, config.engine, 2, 1, 3, world_size=2, overlapped=False))
    assert sent[way].get(WEIGHTS, 0) == expected.weights
    assert sent[way][HEADS] == expected.heads
    assert 0 <= sent[way][GRADIENTS] - expected.gradients <= 64
