"""ZeRO-3 around compiled blocks, on two ranks: equal to eager, compiled once, and freed as it was gathered."""

from __future__ import annotations

import multiprocessing
import os
import socket
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from configs.schema import Device, Recompute, RunConfig, Toggle
from model import build_model
from tests.training.conftest import make_batch, make_engine, run_config, train
from training import backend, distributed
from training.batch import resolve_batch
from training.distributed import Processes
from training.engine import Engine, build_engine

STEPS = 3
CASES = {Recompute.none: 0, Recompute.block: 50_000}
"""Recomputation → elements gathered ahead: none, or a block's."""


def config_of(compile: Toggle, recompute: Recompute, world_size: int) -> RunConfig:
    config = run_config(3, accumulation=2, micro=4 // world_size, compile=compile, recompute=recompute)
    config.model.num_layers = 4
    return config


def keep_nothing(prefetch: int) -> None:
    """Have ZeRO-3 shard the smallest parameter, free each at once, and gather only `prefetch` elements ahead: such
    small models would stay gathered otherwise."""
    settings = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    backend.gathering = lambda _: settings | {"stage3_prefetch_bucket_size": prefetch}


class Watch:
    """Which weights that blocks computed with are still in memory."""

    def __init__(self, engine: Engine) -> None:
        self.seen: list[StorageWeakRef] = []
        for block in engine.module.blocks:
            self.spy_on(block)

    def spy_on(self, block: nn.Module) -> None:
        plain = block.forward

        def forward(*args: Any) -> Any:
            assert all(parameter.numel() > 0 for parameter in block.parameters())  # gathered
            self.seen += [StorageWeakRef(parameter.untyped_storage()) for parameter in block.parameters()]
            return plain(*args)

        block.forward = forward  # type: ignore[method-assign]

    def alive(self) -> int:
        return sum(not storage.expired() for storage in self.seen)


def engine_from_meta(config: RunConfig, own: Processes) -> Engine:
    """With weights that are sharded as they are drawn, as in a run."""
    with torch.device("meta"):
        model = build_model(config.model)
    torch.manual_seed(config.seed)
    return build_engine(model, config, resolve_batch(config.train, own.world_size), own)


def frames() -> int:
    """Python functions that Dynamo has compiled, recompilations too."""
    return int(torch._dynamo.utils.counters["frames"]["total"])


def compiled_run(recompute: Recompute, own: Processes) -> dict[str, Any]:
    """Losses, norms and compiled frames of some steps; the weights alive between forward and backward."""
    torch._dynamo.reset()
    keep_nothing(CASES[recompute])
    one = engine_from_meta(config_of(Toggle.on, recompute, own.world_size), own)
    begin, results, counts = frames(), [], []
    for step in range(STEPS):
        results += train(one, step, step + 1)
        counts.append(frames() - begin)
    watch = Watch(one)
    sums = one.forward(make_batch(0, one.config, own.rank, own.world_size).micro_batches[0])  # type: ignore[arg-type]
    found = {"steps": [(r.loss, r.grad_norm) for r in results], "frames": counts, "gathered": len(watch.seen)}
    found["alive"] = watch.alive()
    del sums
    one.close()
    return found


def rank_main(rank: int, port: int, answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    own = distributed.init(Device.cpu, timeout_minutes=10)
    found = {recompute.value: compiled_run(recompute, own) for recompute in CASES}
    own.barrier()
    own.close()
    if rank == 0:
        answers.put(found)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=rank_main, args=(rank, port, answers)) for rank in range(2)]
    for one in ranks:
        one.start()
    found: dict[str, dict[str, Any]] = answers.get(timeout=500)
    for one in ranks:
        one.join(timeout=30)
        assert one.exitcode == 0
    return found


@pytest.mark.parametrize("recompute", CASES)
def test_compiled_blocks_train_as_eager_ones(compiled: Any, recompute: Recompute, processes: Processes) -> None:
    eager = make_engine(config_of(Toggle.off, recompute, 1), processes)
    expected = [(r.loss, r.grad_norm) for r in train(eager, 0, STEPS)]
    eager.close()
    for ours, alone in zip(compiled[recompute.value]["steps"], expected, strict=True):
        assert ours == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("recompute", CASES)
def test_nothing_is_compiled_after_the_first_step(compiled: Any, recompute: Recompute) -> None:
    """Nor for a second block: all four share one graph. Compiled with ZeRO's hooks inside, it is 62 frames."""
    first, *later = compiled[recompute.value]["frames"]
    assert first in (1, 2)  # recomputed in the backward pass, a block is traced once more
    assert later == [first] * (STEPS - 1)


def test_gathered_weights_are_freed_before_the_backward_pass(compiled: Any) -> None:
    """A compiled block keeps its weights for the backward pass by name, not their memory: what ZeRO-3 is for."""
    assert compiled["none"]["gathered"] == 4 * 12
    assert compiled["none"]["alive"] == 0


def test_the_next_block_is_gathered_ahead_whatever_its_size() -> None:
    small, large = backend.gathering(1000), backend.gathering(400_000_000)
    assert small["stage3_prefetch_bucket_size"] == 50_000_000
    assert large["stage3_prefetch_bucket_size"] == 400_000_000
    assert large["stage3_max_live_parameters"] == 1_200_000_000
