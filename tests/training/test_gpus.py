"""Two GPUs and NCCL: what two ranks train is what one does, at every stage, also where they share samples."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from configs.schema import Device, Precision, Recompute, Toggle
from tests.ranks import on_ranks
from tests.training.conftest import make_batch, make_engine, run_config
from training import distributed
from training.distributed import Processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
STEPS = 3
PRECISIONS = {Precision.fp32: 1e-5, Precision.bf16: 2e-3}
"""Precision → how far losses may be from one rank's: by the order of fp32 sums, and in bf16 by its rounding, 2^-9 of a
value. Gradient norms: ten times as far."""
CASES = [(Precision.bf16, stage, sequence) for stage in (0, 1, 2, 3) for sequence in (1, 2)]
CASES += [(Precision.fp32, 1, 1), (Precision.fp32, 3, 1), (Precision.fp32, 3, 2)]
Steps = list[tuple[float, float]]


def steps(own: Processes, precision: Precision, stage: int, sequence: int) -> Steps:
    """Losses and gradient norms of compiled and recomputed blocks.

    `sequence` ranks share each sample, unless this one is alone.
    """
    share = sequence if own.world_size > 1 else 1
    takers, rank = own.world_size // share, own.rank // share
    config = run_config(stage, accumulation=2, micro=4 // takers, compile=Toggle.on, sequence_parallel_size=share)
    config.engine.precision, config.engine.recompute = precision, Recompute.block
    torch._dynamo.reset()
    one, found = make_engine(config, own), []
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-zero{case[1]}-{case[2]}")
def test_two_ranks_train_as_one(found: dict[int, list[Steps]], case: tuple[Precision, int, int]) -> None:
    tolerance, index = PRECISIONS[case[0]], CASES.index(case)
    for (loss, norm), (expected_loss, expected_norm) in zip(found[2][index], found[1][index], strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=10 * tolerance)
