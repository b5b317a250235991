"""Ranks that share the tokens of each sample train as one rank does: losses, gradients, evaluation, resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.driver import Driver, Job
from tests.training.test_resume_engine import content, log, losses
from training import checkpoint

GROUPED: dict[str, Any] = {"heads": 4, "kv_heads": 1}
"""One key head, of which each rank of a group has a copy."""


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    one = Driver()
    yield one
    one.close()


def tensors(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Whole tensors of the newest checkpoint: `master` or a moment, by parameter."""
    path = checkpoint.find_checkpoint(folder)
    manifest = checkpoint.read_manifest(path)
    found = {name: torch.zeros(shape) for name, shape in manifest.parameters.items()}
    with checkpoint.Parts(path, manifest) as parts:
        for name, tensor in found.items():
            parts.read(kind, name, 0, tensor.view(-1))
    return found


def done(driver: Driver, job: Job) -> Path:
    assert driver.run(job).codes == [0] * job.world_size, log(Path(job.folder))
    return Path(job.folder)


@pytest.fixture(scope="module")
def alone(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return done(driver, Job(str(tmp_path_factory.mktemp("alone")), stage=1))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_is_that_of_one_rank(driver: Driver, tmp_path: Path, alone: Path, stage: int) -> None:
    folder = done(driver, Job(str(tmp_path), world_size=2, stage=stage, sequence=2))
    assert losses(folder, 0) == losses(folder, 1)
    for step, (loss, norm) in losses(alone).items():
        assert losses(folder)[step] == pytest.approx((loss, norm), rel=1e-5), step


@pytest.mark.parametrize(("world_size", "stage"), [(2, 0), (2, 1), (2, 3), (4, 1)])
def test_gradients_are_those_of_one_rank(driver: Driver, tmp_path: Path, world_size: int, stage: int) -> None:
    """Through the first moment after one step; on four ranks there are two groups with samples of their own."""
    one = done(driver, Job(str(tmp_path / "one"), stage=1, steps=1))
    many = done(driver, Job(str(tmp_path / "many"), world_size, stage, steps=1, sequence=2))
    expected = tensors(one, "exp_avg")
    for name, gradient in tensors(many, "exp_avg").items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * largest + 1e-9)


def test_bf16_gradients_of_stage_1_are_those_of_stage_2(driver: Driver, tmp_path: Path) -> None:
    """Reduced by us there, by DeepSpeed here: the same fp32 sums, of which each rank has its part."""
    jobs = (Job(str(tmp_path / str(stage)), 2, stage, steps=1, precision="bf16", fuse="off") for stage in (1, 2))
    one, two = (done(driver, job) for job in jobs)
    assert losses(one)[1] == pytest.approx(losses(two)[1], rel=1e-6)
    expected = tensors(two, "exp_avg")
    for name, gradient in tensors(one, "exp_avg").items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("world_size", [2, 4])
def test_fused_sums_in_bf16_are_as_good_as_one_ranks(driver: Driver, tmp_path: Path, world_size: int) -> None:
    """Weight gradients added inside their products (fp32 sums of bf16 terms): their distance from fp32 gradients is one
    rank's own. Tokens are rounded alike on any rank; only the order of sums, and what follows from it, differs."""
    settings: dict[str, Any] = {"stage": 1, "steps": 1, "dropout": 0.0, **GROUPED}
    exact = tensors(done(driver, Job(str(tmp_path / "fp32"), **settings)), "exp_avg")
    settings |= {"precision": "bf16", "fuse": "on"}
    one = done(driver, Job(str(tmp_path / "one"), **settings))
    many = done(driver, Job(str(tmp_path / "many"), world_size, sequence=2, **settings))
    assert losses(many)[1] == pytest.approx(losses(one)[1], rel=1e-4)

    def error(folder: Path) -> float:
        return sum(float((t - exact[name]).square().sum()) for name, t in tensors(folder, "exp_avg").items()) ** 0.5

    assert 0 < error(many) < 1.1 * error(one)


@pytest.mark.parametrize(("stage", "precision", "fuse"), [(1, "bf16", "on"), (3, "fp32", "auto")])
def test_resume_is_exact(driver: Driver, tmp_path: Path, stage: int, precision: str, fuse: str) -> None:
    """With dropout in bf16: random states are each rank's own."""

    def job(name: str, steps: int) -> Job:
        return Job(str(tmp_path / name), 2, stage, steps, precision=precision, fuse=fuse, sequence=2, **GROUPED)

    whole = done(driver, job("whole", 6))
    for steps in (2, 6):
        parts = done(driver, job("parts", steps))
    assert losses(parts) == losses(whole)
    assert losses(parts, 1) == losses(whole, 1)
    assert content(parts) == content(whole)


def test_resume_changes_who_shares(driver: Driver, tmp_path: Path, alone: Path) -> None:
    """Position and weights mean the same for any number of ranks and any way to share samples among them."""
    for steps, world_size, sequence in ((2, 2, 2), (4, 1, 1), (6, 4, 2)):
        done(driver, Job(str(tmp_path), world_size, stage=1, steps=steps, sequence=sequence))
    for step, values in losses(alone).items():
        assert losses(tmp_path)[step] == pytest.approx(values, rel=1e-5), step
