"""Whatever happens to a run, the next start goes on by itself and ends as if nothing had happened, bit for bit.

FAULT_KILLS=50 kills the runs of `test_killed_at_any_moment` that often, instead of a handful of times.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from configs.errors import REQUEUE_EXIT_CODE
from tests.runs.conftest import ENVIRONMENT, ROOT, TINY, losses, rows
from tests.runs.faults import Driver, Job, Outcome, output
from tests.runs.test_resume import assert_equal_runs
from training.checkpoint import checkpoints, find_checkpoint, step_of
from training.watchdog import HANG_EXIT_CODE, LOST_EXIT_CODE

KILLS = int(os.environ.get("FAULT_KILLS", "8"))
KILLED = -9
STEPS = 16
SETTINGS = [*TINY, f"train.steps={STEPS}", "train.save_every=2", "model.dropout=0.1", "engine.timeout_minutes=2"]


class Faults:
    """Starts runs that share a prepared corpus."""

    def __init__(self, driver: Driver, folder: Path) -> None:
        self.driver = driver
        self.settings = [*SETTINGS, f"data.cache_dir={folder / 'corpus'}"]
        self.folder = folder
        self.calm: dict[int, tuple[Path, float]] = {}

    def start(self, folder: Path, *overrides: str, codes: list[int] | None = None, **keys: object) -> Outcome:
        """One start; checks the ranks' exit codes unless there are none to check."""
        job = Job(str(folder), [*self.settings, *overrides, f"run_dir={folder}"], **keys)  # type: ignore[arg-type]
        outcome = self.driver.run(job)
        if codes is not None:
            said = "\n".join(output(folder, rank) for rank in range(job.ranks))
            assert outcome.codes == codes, said + (folder / "run.log").read_text()[-4000:]
        return outcome

    def undisturbed(self, ranks: int = 1) -> tuple[Path, float]:
        """A run that nothing happens to, and how long it takes, seconds."""
        if ranks not in self.calm:
            folder = self.folder / f"calm{ranks}"
            self.start(self.folder / "corpus-maker", "train.steps=1", codes=[0])
            outcome = self.start(folder, ranks=ranks, codes=[0] * ranks)
            self.calm[ranks] = (folder, outcome.seconds)
        return self.calm[ranks]

    def finish(self, folder: Path, ranks: int = 1) -> None:
        """Start once more, without faults, and compare with the run that had none."""
        self.start(folder, ranks=ranks, codes=[0] * ranks)
        assert_equal_runs(self.undisturbed(ranks)[0], folder)
        assert not list((folder / "checkpoints").glob("*.tmp"))


@pytest.fixture(scope="module")
def faults(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(driver, tmp_path_factory.mktemp("faults"))


def newest(folder: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    return max((step_of(c) for c in checkpoints(folder / "checkpoints")), default=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resume_draws_no_initial_weights(faults: Faults, tmp_path: Path, ranks: int) -> None:
    """And no number of a random stream that the run goes on with: dropout is as it would have been."""
    faults.start(tmp_path / "new", ranks=ranks, fault="nothing to draw", codes=[1] * ranks)
    faults.start(tmp_path / "run", ranks=ranks, fault="die", at_step=7)
    assert newest(tmp_path / "run") in (4, 6)  # the last is written on a thread
    faults.start(tmp_path / "run", ranks=ranks, fault="nothing to draw", codes=[0] * ranks)
    assert_equal_runs(faults.undisturbed(ranks)[0], tmp_path / "run")


@pytest.mark.slow
def test_killed_at_any_moment(faults: Faults, tmp_path: Path) -> None:
    """Also while it starts, saves, evaluates, deletes and ends; never back by more than a checkpoint."""
    _, seconds = faults.undisturbed()
    draw = random.Random(7)
    kills, started_anew = 0, 0
    folder = tmp_path / "0"
    while kills < KILLS:
        before = newest(folder)
        outcome = faults.start(folder, "train.save_every=1", kill_after_s=draw.uniform(0.3, 1.1) * seconds)
        assert outcome.codes[0] in (0, KILLED), output(folder)
        kills += outcome.codes[0] == KILLED
        assert newest(folder) >= before
        done = max(losses(folder), default=0)
        assert newest(folder) >= done - 2  # one save under way, one step after it
        if outcome.codes[0] == 0 or newest(folder) == STEPS:
            faults.finish(folder)
            started_anew += 1
            folder = tmp_path / str(started_anew)
    faults.finish(folder)


@pytest.mark.parametrize("fault", ["die", "die while others wait"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_others(faults: Faults, tmp_path: Path, rank: int, fault: str) -> None:
    outcome = faults.start(tmp_path, ranks=2, fault=fault, at_step=5, fault_rank=rank)
    other = 1 - rank
    assert (outcome.codes[rank], outcome.codes[other]) == (KILLED, LOST_EXIT_CODE), output(tmp_path, other)
    assert outcome.seconds < 60
    said = output(tmp_path, other) + (tmp_path / "run.log").read_text()
    assert f"Rank {rank} on " in said
    assert "is gone: its process was killed or crashed" in said
    assert newest(tmp_path) >= 2
    faults.finish(tmp_path, ranks=2)


@pytest.mark.slow
def test_torchrun_restarts_after_a_dead_rank(faults: Faults, tmp_path: Path) -> None:
    calm, _ = faults.undisturbed(2)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1", "train.py"]
    command = [sys.executable, "-m", *launcher, *faults.settings, f"run_dir={tmp_path / 'run'}"]
    with (tmp_path / "output").open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=said, stderr=subprocess.STDOUT)
    while len(rows(tmp_path / "run")) < 4 and process.poll() is None:
        time.sleep(0.005)
    ranks = [child for child in psutil.Process(process.pid).children() if "train.py" in child.cmdline()]
    ranks[1].kill()
    assert process.wait(timeout=120) == 0, (tmp_path / "output").read_text()
    assert "Going on from" in (tmp_path / "output").read_text()
    assert_equal_runs(calm, tmp_path / "run")


def test_an_error_on_one_rank_reaches_the_user(faults: Faults, tmp_path: Path) -> None:
    outcome = faults.start(tmp_path, ranks=2, fault="fail", at_step=5, fault_rank=1)
    assert outcome.codes == [LOST_EXIT_CODE, 1], output(tmp_path)
    assert "has failed: ValueError: the card has fallen off" in output(tmp_path)
    assert newest(tmp_path) == 4
    faults.finish(tmp_path, ranks=2)


def test_an_error_on_all_ranks_is_told_as_it_is_however_long_wandb_takes(faults: Faults, tmp_path: Path) -> None:
    """Rank 1 is gone while rank 0 still waits for the server, and is not to blame."""
    faults.start(tmp_path, ranks=2, fault="slow wandb", at_step=5, codes=[2, 2])
    assert "Step 5 has a non-finite loss or gradient" in output(tmp_path)
    assert "Rank 1 on" not in output(tmp_path)


def test_a_hang_ends_with_all_stacks(faults: Faults, tmp_path: Path) -> None:
    outcome = faults.start(
        tmp_path,
        "train.watchdog_minutes=0.1",
        ranks=2,
        fault="hang",
        at_step=5,
        fault_rank=1,
        codes=[HANG_EXIT_CODE] * 2,
    )
    assert outcome.seconds < 60
    assert "No step for 0.1 minutes" in output(tmp_path)
    log = (tmp_path / "run.log").read_text()
    for rank, place in ((0, "in poll"), (1, "in hang")):
        stacks = [line for line in log.splitlines() if f" rank {rank} INFO training.watchdog | " in line]
        assert any(place in line for line in stacks), log[-6000:]
        assert any("in _watch" in line for line in stacks)
    faults.finish(tmp_path, ranks=2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run folder whose checkpoints lie on a disk with room for two and a half."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_full_disk(faults: Faults, small_disk: Path, asynchronous: str) -> None:
    run = small_disk.parent
    outcome = faults.start(run, f"train.async_save={asynchronous}", "train.keep_last=0", codes=[2])
    assert outcome.seconds < 60
    said = " ".join(output(run).split())
    last = newest(run)
    assert f"step_{last + 2:08d} was not written, earlier ones are as they were: rank 0: No space left" in said
    assert last >= 2
    assert find_checkpoint(run) == small_disk / f"step_{last:08d}"
    assert not list(small_disk.glob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    faults.finish(run)


@pytest.mark.parametrize("rank", [0, 1])
def test_full_disk_of_one_rank_ends_all(faults: Faults, tmp_path: Path, rank: int) -> None:
    faults.start(tmp_path, ranks=2, fault="full disk", at_step=6, fault_rank=rank, codes=[2, 2])
    assert f"step_00000006 was not written, earlier ones are as they were: rank {rank}: No space" in " ".join(
        output(tmp_path).split()
    )
    assert newest(tmp_path) == 4
    faults.finish(tmp_path, ranks=2)


def test_a_defect_in_one_ranks_save_ends_all(faults: Faults, tmp_path: Path) -> None:
    """And not when the others' collective times out."""
    outcome = faults.start(tmp_path, ranks=2, fault="defect in save", at_step=6, fault_rank=1, codes=[2, 1])
    assert outcome.seconds < 60
    said = " ".join(output(tmp_path).split())
    assert "step_00000006 was not written, earlier ones are as they were: rank 1: TypeError: no such tensor" in said
    assert "TypeError: no such tensor" in output(tmp_path, 1)
    assert newest(tmp_path) == 4
    faults.finish(tmp_path, ranks=2)


def test_saves_that_last_longer_than_steps(faults: Faults, tmp_path: Path) -> None:
    """Steps, polls and saves of two ranks interleave, each kind on collectives of its own."""
    faults.start(tmp_path, "train.save_every=1", ranks=2, fault="slow save", codes=[0, 0])
    assert_equal_runs(faults.undisturbed(2)[0], tmp_path)
    assert newest(tmp_path) == STEPS


def test_a_barrier_that_gave_up_says_what_that_means(faults: Faults, tmp_path: Path) -> None:
    outcome = faults.start(tmp_path, ranks=2, fault="barrier", at_step=3)
    assert outcome.codes[0] == 1
    said = " ".join(output(tmp_path).split())
    assert (
        "RuntimeError: CUDA error: unspecified launch failure If no kernel is at fault, another rank has died" in said
    )
    assert "engine.timeout_minutes=2" in said


def test_nan_gradient_stops_the_run(faults: Faults, tmp_path: Path) -> None:
    faults.start(tmp_path, fault="nan", at_step=6, codes=[2])
    said = " ".join(output(tmp_path).split())
    assert "Step 6 has a non-finite loss or gradient" in said
    assert "step_00000004. resume=auto goes on from it." in said
    assert newest(tmp_path) == 4
    faults.finish(tmp_path)


def test_nan_gradient_is_skipped(faults: Faults, tmp_path: Path) -> None:
    """Step 6 leaves the weights as they are; killed or not after it, the run is the same."""
    skip = "train.nonfinite=skip"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    faults.start(whole, skip, fault="nan", at_step=6, codes=[0])
    assert rows(whole)[-1]["optim/skipped_steps"] == 1
    calm, skipped = losses(faults.undisturbed()[0]), losses(whole)
    assert [step for step in calm if calm[step] != skipped[step]] == list(range(6, STEPS + 1))
    faults.start(killed, skip, "train.steps=8", "optim.schedule=constant", fault="nan", at_step=6, codes=[0])
    faults.start(whole, skip, "resume=never", "optim.schedule=constant", fault="nan", at_step=6, codes=[0])
    faults.start(killed, skip, "optim.schedule=constant", codes=[0])
    assert_equal_runs(whole, killed)


def test_loss_spike_is_ridden_out(faults: Faults, tmp_path: Path) -> None:
    """A loss and gradient of 10,000 times the size are clipped to a step like others; killed after it or not, the run
    is the same."""
    whole, killed, calm = tmp_path / "whole", tmp_path / "killed", tmp_path / "calm"
    faults.start(whole, "optim.schedule=constant", fault="spike", at_step=6, codes=[0])
    logged = {row["step"]: row for row in rows(whole)}
    assert logged[6]["train/loss"] > 1e3 * logged[5]["train/loss"]
    assert logged[6]["optim/grad_norm"] > 1e3 * logged[5]["optim/grad_norm"]
    faults.start(calm, "optim.schedule=constant", codes=[0])  # its gradients are above the limit too: clipped, the same
    undisturbed = {row["step"]: row for row in rows(calm)}
    assert undisturbed[6]["optim/grad_norm"] > 1.0
    for step in range(7, STEPS + 1):
        assert logged[step]["train/loss"] == pytest.approx(undisturbed[step]["train/loss"], rel=1e-6), step
    faults.start(killed, "train.steps=8", "optim.schedule=constant", fault="spike", at_step=6, codes=[0])
    faults.start(killed, "optim.schedule=constant", codes=[0])
    assert_equal_runs(whole, killed)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize(("fault", "step"), [("signal in evaluation", 4), ("signal in save", 6)])
def test_sigterm_at_a_bad_time(faults: Faults, tmp_path: Path, fault: str, step: int, asynchronous: str) -> None:
    saving = f"train.async_save={asynchronous}"
    faults.start(tmp_path, saving, "train.eval_sequences=12", fault=fault, at_step=step, codes=[0])
    assert "SIGTERM received" in output(tmp_path)
    assert "Stopped by SIGTERM" in output(tmp_path)
    done = len(rows(tmp_path))
    assert step <= done < STEPS
    assert newest(tmp_path) == done
    faults.finish(tmp_path)


def test_a_requeue_is_asked_for_only_where_there_is_something_to_go_on_from(faults: Faults, tmp_path: Path) -> None:
    """With train.save_every=0 each start would do the same steps and be stopped in them again."""
    nothing_saved = "train.save_every=0"
    faults.start(tmp_path, nothing_saved, ranks=2, fault="requeue", at_step=5, fault_rank=1, codes=[2, 2])
    said = " ".join(output(tmp_path).split())
    assert "with train.save_every=0 nothing is saved: it would begin at step 0 again, and not after step 5" in said
    assert "the same command again" not in said
    faults.start(tmp_path, nothing_saved, ranks=2, fault="requeue", at_step=STEPS, codes=[0, 0])  # none is needed
    faults.start(
        tmp_path, "resume=never", ranks=2, fault="requeue", at_step=5, fault_rank=1, codes=[REQUEUE_EXIT_CODE] * 2
    )
    assert newest(tmp_path) == 5
    faults.finish(tmp_path, ranks=2)


@pytest.mark.parametrize(("fault", "step"), [("SIGTERM", STEPS), ("requeue", STEPS), ("signal in last evaluation", 0)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_before_the_last_evaluation_leaves_it_to_the_next_start(
    faults: Faults, tmp_path: Path, fault: str, step: int, ranks: int
) -> None:
    """The run is complete and says so; what asks for another start gets one, which evaluates and takes no step."""
    settings = ("train.eval_every=5", "train.eval_sequences=12")
    code = REQUEUE_EXIT_CODE if fault == "requeue" else 0
    faults.start(
        tmp_path, *settings, ranks=ranks, fault=fault, at_step=step, fault_rank=ranks - 1, codes=[code] * ranks
    )
    said = output(tmp_path)
    assert f"All {STEPS} steps are done; " in said
    assert "came before the last evaluation" in said
    assert "Stopped by" not in said
    assert newest(tmp_path) == STEPS
    before = rows(tmp_path)
    assert [row["step"] for row in before if "val/loss" in row] == [5, 10, 15]
    faults.start(tmp_path, *settings, ranks=ranks, codes=[0] * ranks)
    assert "now the last evaluation is too" in output(tmp_path)
    after = rows(tmp_path)
    assert [row["step"] for row in after if "val/loss" in row] == [5, 10, 15, STEPS]
    assert after[:-1] == before[:-1]
    assert after[-1].items() > before[-1].items()
    faults.start(tmp_path, *settings, ranks=ranks, codes=[0] * ranks)
    assert "Nothing to do" in output(tmp_path)
    assert rows(tmp_path) == after


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGUSR1", REQUEUE_EXIT_CODE)])
def test_signal_while_the_corpus_is_prepared(faults: Faults, tmp_path: Path, name: str, code: int) -> None:
    """The run ends at once, since a preparation takes hours; the next start goes on with it."""
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    calm, _ = faults.undisturbed()
    faults.start(tmp_path / "run", cache, fault=f"{name} in preparation", codes=[code])
    assert f"Stopped by {name} while preparing the corpus" in output(tmp_path / "run")
    assert list((tmp_path / "cache").glob("*.partial"))
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    faults.start(tmp_path / "run", cache, codes=[0])
    assert_equal_runs(calm, tmp_path / "run")


def test_wandb_killed(faults: Faults, tmp_path: Path) -> None:
    faults.start(tmp_path, "logging.wandb=offline", fault="wandb", at_step=5, codes=[0])
    assert "wandb" in output(tmp_path)
    assert_equal_runs(faults.undisturbed()[0], tmp_path)
