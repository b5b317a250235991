"""Runs in several processes, killed with SIGKILL and gone on with: equal, bit for bit, to runs left alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.training.driver import Driver, Job, Outcome
from training import checkpoint
from training.checkpoint import KINDS, Parts

KILLED = -9


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    one = Driver()
    yield one
    one.close()


@pytest.fixture(scope="module")
def undisturbed(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], Path]:
    """The folder of a run of the same kind that nothing happened to."""
    done: dict[tuple[int, int, str, int], Path] = {}

    def run(like: Job) -> Path:
        key = (like.world_size, like.stage, like.precision, like.width)
        if key not in done:
            folder = tmp_path_factory.mktemp("undisturbed")
            job = Job(str(folder), like.world_size, like.stage, precision=like.precision, width=like.width)
            assert driver.run(job).codes == [0] * like.world_size, log(folder)
            done[key] = folder
        return done[key]

    return run


def log(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))


def losses(folder: Path, rank: int = 0) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step; a step that was done twice has to have come out the same."""
    found: dict[int, tuple[float, float]] = {}
    for line in (folder / f"losses_{rank}.jsonl").read_text().splitlines():
        entry = json.loads(line)
        values = (float.fromhex(entry["loss"]), float.fromhex(entry["norm"]))
        assert found.setdefault(entry["step"], values) == values
    return found


def content(folder: Path) -> list[dict[str, str]]:
    """Checksums of all tensors of the newest checkpoint, by rank: weights, moments and random states."""
    manifest = checkpoint.read_manifest(checkpoint.find_checkpoint(folder))
    return [{n: t.checksum for n, t in shard.record.tensors.items()} for shard in manifest.shards]


CASES = [
    (1, 0, "fp32", "update", 4),
    (1, 0, "fp32", "shard", 4),
    (1, 0, "fp32", "pointer", 4),
    (1, 2, "bf16", "micro-batch", 5),
    (1, 2, "bf16", "manifest", 4),
    (1, 1, "bf16", "shard", 2),
    (1, 3, "fp32", "update", 5),
    (2, 0, "bf16", "micro-batch", 3),
    (2, 0, "bf16", "shard", 4),
    (2, 2, "fp32", "update", 4),
    (2, 2, "fp32", "shard", 4),
    (2, 2, "fp32", "manifest", 6),
    (2, 1, "bf16", "update", 3),
    (2, 1, "bf16", "publish", 4),
    (2, 3, "fp32", "deletion", 6),
]


@pytest.mark.parametrize(("world_size", "stage", "precision", "fault", "step"), CASES)
def test_killed_run_goes_on_bitwise(
    driver: Driver,
    undisturbed: Callable[[Job], Path],
    tmp_path: Path,
    world_size: int,
    stage: int,
    precision: str,
    fault: str,
    step: int,
) -> None:
    # What one process alone writes is rank 0's; a shard or a step can fail on the last rank.
    rank = world_size - 1 if fault in ("update", "micro-batch", "shard") else 0
    job = Job(str(tmp_path), world_size, stage, precision=precision)
    killed = Job(**{**vars(job), "fault": fault, "fault_step": step, "fault_rank": rank})
    outcome = driver.run(killed)
    assert outcome.codes[rank] == KILLED, log(tmp_path)
    assert outcome.seconds < 40  # the other rank notices
    committed = 6 if fault == "deletion" else step if fault == "pointer" else (step - 1) // 2 * 2
    newest = max((checkpoint.step_of(c) for c in checkpoint.checkpoints(tmp_path / "checkpoints")), default=0)
    assert newest == committed
    assert driver.run(job).codes == [0] * world_size, log(tmp_path)
    calm = undisturbed(job)
    assert losses(tmp_path) == losses(calm)
    assert content(tmp_path) == content(calm)
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_equal_one(undisturbed: Callable[[Job], Path], stage: int) -> None:
    """The same global batches on one rank and on two: losses and gradient norms differ by fp32 rounding alone."""
    one, two = (undisturbed(Job("", world, stage)) for world in (1, 2))
    for step, values in losses(one).items():
        assert losses(two)[step] == pytest.approx(values, rel=2e-5)
    assert losses(two, 0) == losses(two, 1)
    for name, weight in checkpoint.consolidated_weights(checkpoint.find_checkpoint(two)):
        expected = dict(checkpoint.consolidated_weights(checkpoint.find_checkpoint(one)))[name]
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    """Masters and moments, whole, of the newest checkpoint."""
    target = checkpoint.find_checkpoint(folder)
    manifest = checkpoint.read_manifest(target)
    found = {}
    with Parts(target, manifest) as parts:
        for name, shape in manifest.parameters.items():
            for kind in KINDS:
                found[f"{kind}.{name}"] = torch.empty(shape)
                parts.read(kind, name, 0, found[f"{kind}.{name}"].view(-1))
    return found


def test_any_layout_into_any_other(driver: Driver, undisturbed: Callable[[Job], Path], tmp_path: Path) -> None:
    """A chain of layouts, each loaded from the one before: the state stays the same, bit for bit."""
    first = Job(str(tmp_path / "first"), world_size=2, stage=3, steps=4)
    assert driver.run(first).codes == [0, 0], log(tmp_path / "first")
    state = whole_state(tmp_path / "first")
    source = tmp_path / "first"
    for world, stage in [(1, 1), (2, 2), (1, 3), (2, 0), (1, 2), (2, 1), (1, 0), (2, 3)]:
        target = tmp_path / f"{world}x{stage}"
        outcome = driver.run(Job(str(source), world, stage, resave=str(target)))
        assert outcome.codes == [0] * world, log(source)
        resaved = whole_state(target)
        assert resaved.keys() == state.keys()
        assert all(torch.equal(resaved[name], state[name]) for name in state)
        assert checkpoint.read_manifest(checkpoint.find_checkpoint(target)).updates == 4
        source = target


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 2), (1, 2)), ((1, 1), (2, 1)), ((2, 3), (1, 1)), ((1, 0), (2, 3)), ((2, 1), (2, 2)), ((1, 2), (1, 3))],
)
def test_training_goes_on_in_another_layout(
    driver: Driver,
    undisturbed: Callable[[Job], Path],
    tmp_path: Path,
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    assert driver.run(Job(str(tmp_path), *before, steps=4)).codes == [0] * before[0], log(tmp_path)
    assert driver.run(Job(str(tmp_path), *after, steps=6)).codes == [0] * after[0], log(tmp_path)
    for step, values in losses(undisturbed(Job("", *before))).items():
        assert losses(tmp_path)[step] == pytest.approx(values, rel=2e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_eight_ranks_go_on_as_two_and_two_as_eight(
    driver: Driver, undisturbed: Callable[[Job], Path], tmp_path: Path, stage: int
) -> None:
    """The losses of two ranks left alone, for the same global batches, but for fp32 rounding. At this width no vector
    of the model can be cut into eight equal parts: some are padded, and the last rank has less than the others."""
    width = 36
    calm = losses(undisturbed(Job("", 2, stage, width=width)))
    for before, after in ((8, 2), (2, 8)):
        folder = tmp_path / f"from_{before}"
        for ranks, steps in ((before, 2), (after, 6)):
            job = Job(str(folder), ranks, stage, steps=steps, save_every=6, width=width)
            assert driver.run(job).codes == [0] * ranks, log(folder)
            path = checkpoint.find_checkpoint(folder)
            assert checkpoint.step_of(path) == steps
            assert len(checkpoint.read_manifest(path).shards) == ranks
        found = losses(folder)
        assert found.keys() == calm.keys()
        for step, values in calm.items():
            assert found[step] == pytest.approx(values, rel=1e-5), step


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nan_on_one_rank_is_dropped_on_all(driver: Driver, tmp_path: Path, stage: int) -> None:
    contents = []
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        outcome: Outcome = driver.run(Job(str(folder), 2, stage, fault="nan", fault_step=3, fault_rank=rank))
        assert outcome.codes == [0, 0], log(folder)
        for own in (0, 1):
            lines = [json.loads(line) for line in (folder / f"losses_{own}.jsonl").read_text().splitlines()]
            assert [line["finite"] for line in lines] == [True, True, False, True, True, True]
        contents.append(content(folder))
        assert checkpoint.read_manifest(checkpoint.find_checkpoint(folder)).updates == 5
    assert contents[0] == contents[1]
