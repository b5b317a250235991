"""Two GPUs and NCCL: what two ranks train is what one does, at every stage, also where they share samples."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.schema import Device, Precision, Recompute, Toggle
from tests.ranks import on_ranks
from tests.training.conftest import make_batch, make_engine, run_config
from training import distributed, rng
from training.direct import DirectSums
from training.distributed import Processes
from training.lean_zero import Lean
from training.peers import SymmetricPeers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
STEPS = 3
AUTO = Toggle.auto
PRECISIONS = {Precision.fp32: 1e-5, Precision.bf16: 2e-3}
"""Precision → how far losses may be from one rank's: by the order of fp32 sums, and in bf16 by its rounding, 2^-9 of a
value. Gradient norms: ten times as far."""
Case = tuple[Precision, int, int, Toggle, Toggle]
"""Precision, stage, ranks that share each sample, `engine.copy_engines`, `engine.fuse_weight_gradients`."""
CASES: list[Case] = [(Precision.bf16, stage, sequence, AUTO, AUTO) for stage in (0, 1, 2, 3) for sequence in (1, 2)]
CASES += [(Precision.bf16, stage, 1, Toggle.off, AUTO) for stage in (2, 3)]
CASES += [(Precision.bf16, 2, sequence, AUTO, Toggle.on) for sequence in (1, 2)]
CASES += [(Precision.fp32, stage, 1, AUTO, AUTO) for stage in (1, 2, 3)] + [(Precision.fp32, 3, 2, AUTO, AUTO)]
Steps = list[tuple[float, float]]


def steps(own: Processes, precision: Precision, stage: int, sequence: int, copy_engines: Toggle, fuse: Toggle) -> Steps:
    """Losses and gradient norms of compiled and recomputed blocks.

    `sequence` ranks share each sample, unless this one is alone.
    """
    share = sequence if own.world_size > 1 else 1
    takers, rank = own.world_size // share, own.rank // share
    config = run_config(stage, accumulation=2, micro=4 // takers, compile=Toggle.on, sequence_parallel_size=share)
    config.engine.precision, config.engine.recompute = precision, Recompute.block
    config.engine.copy_engines, config.engine.fuse_weight_gradients = copy_engines, fuse
    torch._dynamo.reset()
    one, found = make_engine(config, own), []
    if own.world_size > 1 and stage > 1:  # where they can be: else this tests less than it says
        with_peers = copy_engines is Toggle.auto and precision is Precision.bf16
        assert isinstance(one.partition, Lean)
        assert isinstance(one.partition.peers, SymmetricPeers) is with_peers
        assert isinstance(one.partition.reduction, DirectSums) is (with_peers and stage == 2 and fuse is Toggle.on)
    for step in range(STEPS):
        batch: Any = make_batch(step, config, rank, takers)
        for micro in batch.micro_batches:
            micro.tokens, micro.targets = micro.tokens.to(own.device), micro.targets.to(own.device)
        result = one.train_step(batch, config.optim.lr).result()
        found.append((result.loss, result.grad_norm))
    one.close()
    return found


def all_steps(device: Device) -> list[Steps]:
    """Of each case, on one rank."""
    own = distributed.init(device, timeout_minutes=5)
    torch.set_float32_matmul_precision("highest")
    found = [steps(own, *case) for case in CASES]
    own.close()
    return found


@pytest.fixture(scope="module")
def found() -> dict[int, list[Steps]]:
    """By number of ranks, what rank 0 has of each case. Both at once: most of the time is compilers'."""
    with ThreadPoolExecutor() as pool:
        jobs = {ranks: pool.submit(on_ranks, ranks, all_steps, Device.cuda) for ranks in (1, 2)}
        return {ranks: job.result()[0] for ranks, job in jobs.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-zero{case[1]}-{case[2]}-{case[3]}-{case[4]}")
def test_two_ranks_train_as_one(found: dict[int, list[Steps]], case: Case) -> None:
    tolerance, index = PRECISIONS[case[0]], CASES.index(case)
    for (loss, norm), (expected_loss, expected_norm) in zip(found[2][index], found[1][index], strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=10 * tolerance)


def slow_steps(
    device: Device, stage: int, copy_engines: Toggle, fuse: Toggle, waits: bool
) -> tuple[list[float], list[np.ndarray]]:
    """Losses and masters where matrices are gathered, in several messages, and the device is far behind the host, which
    `waits` for it after each step or never."""
    own = distributed.init(device, timeout_minutes=5)
    rng.make_deterministic()
    config = run_config(stage, accumulation=1, compile=Toggle.off, bucket_size=500_000, copy_engines=copy_engines)
    config.model.width, config.engine.precision = 512, Precision.bf16  # above 100,000 elements, which stay gathered
    config.model.num_layers = 5  # whose gradients take turns in two buckets with `fuse`
    config.engine.fuse_weight_gradients = fuse
    one = make_engine(config, own)
    forward = one.forward

    def slowly(micro: Any) -> Tensor:
        torch.cuda._sleep(40_000_000)
        return forward(micro)

    one.forward = slowly  # type: ignore[method-assign]
    steps = []
    for step in range(8):
        batch: Any = make_batch(step, config, own.rank, own.world_size)
        for micro in batch.micro_batches:
            micro.tokens, micro.targets = micro.tokens.to(own.device), micro.targets.to(own.device)
        steps.append(one.train_step(batch, 1e-2))
        if waits:
            torch.cuda.synchronize()
    losses = [step.result().loss for step in steps]
    masters = [master.detach().cpu().numpy() for master in one.partition.masters()]
    one.close()
    own.close()
    return losses, masters


@pytest.mark.parametrize(
    ("stage", "copy_engines", "fuse"),
    [(stage, way, AUTO) for way in (Toggle.on, Toggle.off) for stage in (2, 3)] + [(2, Toggle.on, Toggle.on)],
)
def test_gathers_wait_for_the_update(stage: int, copy_engines: Toggle, fuse: Toggle) -> None:
    """Parameters are gathered on a stream of their own: never before the update that they are to show. At stage 2 they
    arrive where gradients are reduced, on another one: never before those are read, or after new ones have come. By
    copy engines, from other GPUs: never before these have written, or while they write."""
    late, soon = (on_ranks(2, slow_steps, Device.cuda, stage, copy_engines, fuse, waits) for waits in (False, True))
    for (losses, masters), (expected, expected_masters) in zip(late, soon, strict=True):
        assert losses == expected
        assert all(np.array_equal(a, b) for a, b in zip(masters, expected_masters, strict=True))
