"""ZeRO-3 around compiled blocks, on two ranks: equal to eager, compiled once, and freed as it was gathered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from configs.schema import Device, Position, Precision, Recompute, RunConfig, Toggle
from model import build_model
from tests.ranks import on_ranks
from tests.training.conftest import make_batch, make_engine, run_config, train
from training import backend, checkpoint, distributed
from training.batch import data_ranks, resolve_batch
from training.distributed import Processes
from training.engine import PLAIN_LINEAR, Engine, build_engine
from training.state import TrainState
from training.step import StepResult

STEPS = 3


@dataclass(frozen=True)
class Case:
    """How the blocks run."""

    recompute: Recompute = Recompute.none
    prefetch: int = 0
    """Elements gathered ahead: none, or a block's."""
    sequence: int = 1
    """Ranks that share each sample, with one key head, of which each has a copy."""
    layers: int = 4
    in_place: bool = False
    """`engine.gather_in_place`."""


CASES = {
    "plain": Case(),
    "recomputed": Case(Recompute.block, prefetch=50_000),
    "shared": Case(Recompute.block, prefetch=50_000, sequence=2),
    "in place": Case(prefetch=50_000, in_place=True),
    "deep": Case(layers=10),  # more than Dynamo compiles one function for
}


def config_of(case: Case, compile: Toggle, world_size: int) -> RunConfig:
    shared = case.sequence if world_size > 1 else 1
    micro = 4 * shared // world_size
    config = run_config(3, accumulation=2, micro=micro, compile=compile, sequence_parallel_size=shared)
    config.engine.recompute, config.engine.gather_in_place = case.recompute, case.in_place
    config.model.num_layers = case.layers
    if case.sequence > 1:
        config.model.num_kv_heads = 1
        config.model.position = Position.rope
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
    return build_engine(model, config, resolve_batch(config.train, data_ranks(config.engine, own.world_size)), own)


def frames() -> int:
    """Python functions that Dynamo has compiled, recompilations too."""
    return int(torch._dynamo.utils.counters["frames"]["total"])


def compiled_run(case: Case, own: Processes, folder: Path) -> dict[str, Any]:
    """Losses, norms and compiled frames of some steps; the weights alive between forward and backward; the last step
    once more, by an engine that goes on from a checkpoint."""
    torch._dynamo.reset()
    keep_nothing(case.prefetch)
    config = config_of(case, Toggle.on, own.world_size)
    one = engine_from_meta(config, own)
    assert torch.nn.functional.linear is PLAIN_LINEAR
    assert one.deepspeed._config.zero_config.allgather_sequential is case.in_place
    begin, results, counts = frames(), [], []
    for step in range(STEPS):
        if step == STEPS - 1:
            checkpoint.save(one, TrainState(step=step), folder, tokenizer_hash="")
        results += train(one, step, step + 1)
        counts.append(frames() - begin)
    watch, takers = Watch(one), own.world_size // case.sequence
    batch: Any = make_batch(0, config, own.rank // case.sequence, takers)
    sums = one.forward(batch.micro_batches[0])
    found: dict[str, Any] = {"frames": counts, "gathered": len(watch.seen), "alive": watch.alive()}
    del sums
    one.close()
    other = engine_from_meta(config, own)
    assert checkpoint.load(other, folder) is not None
    again = train(other, STEPS - 1, STEPS)
    other.close()
    return found | {"steps": measured(results), "again": measured(again)}


def measured(results: list[StepResult]) -> list[tuple[float, float]]:
    """Losses and gradient norms."""
    return [(r.loss, r.grad_norm) for r in results]


def compiled_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Of one of two ranks."""
    own = distributed.init(Device.cpu, timeout_minutes=10)
    found = {name: compiled_run(case, own, folder / name) for name, case in CASES.items()}
    own.barrier()
    own.close()
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = on_ranks(2, compiled_runs, tmp_path_factory.mktemp("checkpoints"))[0]
    return found


@pytest.mark.parametrize("name", CASES)
def test_compiled_blocks_train_as_eager_ones(compiled: Any, name: str, processes: Processes) -> None:
    eager = make_engine(config_of(CASES[name], Toggle.off, 1), processes)
    expected = measured(train(eager, 0, STEPS))
    eager.close()
    for ours, alone in zip(compiled[name]["steps"], expected, strict=True):
        assert ours == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_resume_is_exact(compiled: Any, name: str) -> None:
    assert compiled[name]["again"] == compiled[name]["steps"][-1:]


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_compiled_after_the_first_step(compiled: Any, name: str) -> None:
    """Nor for a second block: all share one graph. Compiled with ZeRO's hooks inside, it is 62 frames."""
    first, *later = compiled[name]["frames"]
    assert first in (1, 2)  # recomputed in the backward pass, a block is traced once more
    assert later == [first] * (STEPS - 1)


def test_gathered_weights_are_freed_before_the_backward_pass(compiled: Any) -> None:
    """A compiled block keeps its weights for the backward pass by name, not their memory: what ZeRO-3 is for."""
    assert compiled["plain"]["gathered"] == 4 * 12
    assert compiled["plain"]["alive"] == 0


def test_the_next_two_blocks_are_gathered_ahead_whatever_their_size() -> None:
    small, large = backend.gathering(1000), backend.gathering(400_000_000)
    assert small["stage3_prefetch_bucket_size"] == 50_000_000
    assert large["stage3_prefetch_bucket_size"] == 800_000_000
    assert large["stage3_max_live_parameters"] == 1_600_000_000


def one_rank(device: Device, lean: Toggle) -> tuple[list[int], list[float]]:
    """Frames compiled after each step of a deep model in bf16 on one rank, and the losses."""
    own = distributed.init(device, timeout_minutes=5)
    config = run_config(3, accumulation=2, micro=2, compile=Toggle.on, lean_zero3=lean)
    config.model.num_layers, config.engine.precision = 10, Precision.bf16
    one, counts, found = make_engine(config, own), [], []
    for step in range(STEPS):
        batch: Any = make_batch(step, config)
        for micro in batch.micro_batches:
            micro.tokens, micro.targets = micro.tokens.to(own.device), micro.targets.to(own.device)
        found.append(one.train_step(batch, config.optim.lr).result().loss)
        counts.append(frames())
    one.close()
    own.close()
    return counts, found


def check_one_rank(device: Device) -> None:
    (counts, losses), (plain_counts, plain_losses) = (
        on_ranks(1, one_rank, device, lean)[0] for lean in (Toggle.on, Toggle.off)
    )
    assert counts == plain_counts == [1] * STEPS
    assert losses == pytest.approx(plain_losses, rel=3e-3)


def test_one_rank_compiles_once() -> None:
    check_one_rank(Device.cpu)


@pytest.mark.gpu
def test_one_gpu_compiles_once() -> None:
    """torch 2.11's Dynamo compiles ten blocks with DeepSpeed's `linear` eight times, and leaves two as they are."""
    check_one_rank(Device.cuda)
