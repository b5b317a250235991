"""Whole runs whose steps the device decides of: every step's own numbers, and no checkpoint of an unseen problem.

The kernel that steps is interpreted; the model's other kernels are off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs.conftest import losses, rows
from tests.runs.faults import Driver, output
from tests.runs.test_faults import Faults, newest
from tests.runs.test_resume import assert_equal_runs

LATE = (
    "engine.zero_stage=0",
    "optim.fused_step=on",
    "model.fused=off",
    "model.fused_norms=off",
    "model.attention=standard",
)
STEPS = ("train.steps=10", "optim.schedule=constant", "train.save_every=3", "train.eval_every=4")


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    driver = Driver(TRITON_INTERPRET="1")
    faults = Faults(driver, tmp_path_factory.mktemp("late"))
    faults.settings += [*LATE, *STEPS]
    faults.start(faults.folder / "corpus-maker", "train.steps=1", codes=[0])
    yield faults
    driver.close()


def bare(run: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says of each step, without times and memory."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/") and k != "time"} for row in rows(run)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", [(), ("engine.zero_stage=1", "engine.precision=bf16")], ids=str)
def test_rows_are_of_their_steps(late: Faults, tmp_path: Path, engine: tuple[str, ...], ranks: int) -> None:
    """With a save after every step, which reads each result at once, rows are the same as without, and so are the
    weights; with the host's decision they are the same up to rounding."""
    folders = [tmp_path / name for name in ("late", "at_once", "host")]
    ways = [(), ("train.save_every=1",), ("optim.fused_step=off",)]
    for folder, way in zip(folders, ways, strict=True):
        late.start(folder, *engine, *way, ranks=ranks, codes=[0] * ranks)
    found = bare(folders[0])
    assert [row["step"] for row in found] == list(range(1, 11))
    assert [row["data/tokens_seen"] for row in found] == [128 * step for step in range(1, 11)]
    assert [("val/loss" in row) for row in found] == [step in (4, 8, 10) for step in range(1, 11)]
    assert bare(folders[1]) == found
    assert_equal_runs(*folders[:2])
    for ours, theirs in zip(found, bare(folders[2]), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=5e-3)
        assert ours["optim/lr"] == theirs["optim/lr"]
    counted = [row for row in rows(folders[0]) if "perf/step_time_s" in row]
    assert [row["step"] for row in counted] == list(range(3, 11))  # two warm up; each row has its own step's time


def test_rows_of_several_steps(late: Faults, tmp_path: Path) -> None:
    """A row has the loss and the position of its last step, and the time of all since the row before."""
    every, third = tmp_path / "every", tmp_path / "third"
    late.start(every, codes=[0])
    late.start(third, "train.log_every=3", "train.eval_every=0", codes=[0])
    assert [row["step"] for row in rows(third)] == [1, 3, 6, 9]
    known = {row["step"]: row for row in bare(every)}
    for row in bare(third):
        assert all(known[row["step"]][key] == value for key, value in row.items())
    assert ["perf/step_time_s" in row for row in rows(third)] == [False, True, True, True]


def test_a_profile_leaves_the_rows_before_it_whole(late: Faults, tmp_path: Path) -> None:
    """Step 10's row is due when step 11 starts the profiler, which reads the meter."""
    steps = ("train.steps=15", "train.profile_steps=2", "train.log_every=5", "train.eval_every=0")
    late.start(tmp_path, *steps, codes=[0])
    assert [(row["step"], "perf/step_time_s" in row) for row in rows(tmp_path)][1:3] == [(5, True), (10, True)]
    assert (tmp_path / "waterfall.json").exists()


def test_killed_and_gone_on(late: Faults, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    late.start(whole, codes=[0])
    late.start(killed, fault="die", at_step=8, codes=[-9])
    assert newest(killed) in (3, 6)
    assert [row["step"] for row in rows(killed)] == list(range(1, 8))  # of step 8 nothing was known
    late.start(killed, codes=[0])
    assert_equal_runs(whole, killed)


def test_a_crash_leaves_the_row_of_the_step_before(late: Faults, tmp_path: Path) -> None:
    late.start(tmp_path, fault="fail", at_step=7, codes=[1])
    assert "the card has fallen off" in output(tmp_path) + (tmp_path / "run.log").read_text()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 7))


@pytest.mark.parametrize(("step", "profiled"), [(7, False), (13, True)])
def test_a_crash_waits_for_no_update(late: Faults, tmp_path: Path, step: int, profiled: bool) -> None:
    """The row of the step before is written in a crash: without the step's time, for which the device would have to be
    done with its update, and of several ranks with gathering weights."""
    steps = ("train.steps=15", f"train.profile_steps={2 * profiled}", "train.eval_every=0", "train.save_every=0")
    outcome = late.start(tmp_path, *steps, fault="fail on a stuck device", at_step=step, codes=[1])
    assert outcome.seconds < 60
    assert "the card has fallen off" in output(tmp_path) + (tmp_path / "run.log").read_text()
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(1, step))
    assert all("train/loss" in row for row in found)
    assert ("perf/step_time_s" in found[5], "perf/step_time_s" in found[-1]) == (profiled, False)


@pytest.mark.parametrize("step", [5, 6, 10])
def test_a_step_that_is_not_finite_stops_the_run(late: Faults, tmp_path: Path, step: int) -> None:
    """While the next step is queued, before a save that is due after it, and at the end of the run."""
    late.start(tmp_path, fault="nan", at_step=step, codes=[2])
    said = " ".join(output(tmp_path).split())
    assert f"Step {step} has a non-finite loss or gradient" in said
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, step))
    before = (step - 1) // 3 * 3
    assert newest(tmp_path) == before
    assert f"step_{before:08d}. resume=auto goes on from it." in said


@pytest.mark.parametrize("step", [5, 6, 10])
def test_a_step_that_is_not_finite_is_skipped(late: Faults, tmp_path: Path, step: int) -> None:
    """It counts from its own row on, in the checkpoint that comes after it, and is said with its number. A run that
    goes on from that checkpoint is the same bit for bit."""
    skip = "train.nonfinite=skip"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    late.start(whole, skip, fault="nan", at_step=step, codes=[0])
    assert [row["optim/skipped_steps"] for row in rows(whole)] == [int(n >= step) for n in range(1, 11)]
    assert f"step {step} is skipped" in " ".join(output(whole).split())
    manifest = json.loads((whole / "checkpoints" / "step_00000010" / "manifest.json").read_text())["manifest"]
    assert (manifest["updates"], manifest["state"]["skipped_steps"]) == (9, 1)
    late.start(parts, skip, f"train.steps={step}", fault="nan", at_step=step, codes=[0])
    late.start(parts, skip, codes=[0])
    assert losses(parts).keys() == losses(whole).keys()
    assert_equal_runs(whole, parts)
