"""`hydra/launcher=slurm` on a scheduler that is local (`tests.runs.slurm`): saved, queued again, the same run."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import free_port
from tests.runs.conftest import ENVIRONMENT, ROOT, Runs, rows
from tests.runs.slurm import Slurm
from tests.runs.test_resume import assert_equal_runs

pytestmark = pytest.mark.slow
STEPS = 200
"""So many that a busy machine has time to signal a run before it ends."""
LONG = [f"train.steps={STEPS}", "train.save_every=1000", "train.eval_every=50", "model.dropout=0.1"]
LAUNCHER = ["--multirun", "hydra/launcher=slurm"]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path / "slurm")
    yield cluster
    cluster.close()


def submit(runs: Runs, slurm: Slurm, *overrides: str) -> subprocess.Popen[str]:
    """The submitting command, which waits for its jobs."""
    pytest.importorskip("submitit", reason="pip install -e '.[slurm]'")
    environment = ENVIRONMENT | slurm.environment() | {"MASTER_PORT": str(free_port())}
    command = runs.command(*LAUNCHER, *overrides)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def signal_after(slurm: Slurm, job: str, folder: Path, steps: int, submitted: subprocess.Popen[str]) -> None:
    """SIGUSR1 to the job once its run has logged so many steps, as before its time limit."""
    while len(rows(folder)) < steps:
        assert submitted.poll() is None, submitted.communicate()
        time.sleep(0.005)
    slurm.signal(job, signal.SIGUSR1)


def test_a_run_is_queued_again_and_ends_like_one_left_alone(runs: Runs, slurm: Slurm, tmp_path: Path) -> None:
    """Two ranks of one step, signalled twice."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    submitted = submit(runs, slurm, *LONG, f"run_dir={stopped}", "hydra.launcher.tasks_per_node=2")
    signal_after(slurm, "1", stopped, 3, submitted)
    while slurm.starts("1") < 2:
        time.sleep(0.01)
    saved = len(rows(stopped))
    assert 3 <= saved < STEPS - 2, "the run was over before the signal"
    assert (stopped / "checkpoints" / "latest").read_text().strip() == f"step_{saved:08d}"
    signal_after(slurm, "1", stopped, saved + 2, submitted)
    output, _ = submitted.communicate(timeout=240)
    assert submitted.returncode == 0, output
    assert (slurm.starts("1"), slurm.state("1")) == (3, "COMPLETED")
    assert slurm.options("1")["signal"] == "USR1@120"
    runs.forked(*LONG, f"run_dir={whole}", processes=2)
    assert_equal_runs(whole, stopped)


def test_a_sweep_is_an_array_and_each_job_is_queued_again_by_itself(runs: Runs, slurm: Slurm, tmp_path: Path) -> None:
    submitted = submit(runs, slurm, *LONG, f"run_dir={tmp_path / 'sweep'}", "seed=1,2")
    signal_after(slurm, "1_1", tmp_path / "sweep" / "1_seed-2", 3, submitted)
    output, _ = submitted.communicate(timeout=240)
    assert submitted.returncode == 0, output
    assert [(slurm.starts(job), slurm.state(job)) for job in slurm.jobs()] == [(1, "COMPLETED"), (2, "COMPLETED")]
    for index, seed in enumerate((1, 2)):
        whole = tmp_path / f"whole_{seed}"
        runs.forked(*LONG, f"run_dir={whole}", f"seed={seed}")
        assert_equal_runs(whole, tmp_path / "sweep" / f"{index}_seed-{seed}")


def test_a_run_that_fails_fails_its_job_and_the_command(runs: Runs, slurm: Slurm, tmp_path: Path) -> None:
    submitted = submit(runs, slurm, "data=text", f"data.path={tmp_path}/absent", f"run_dir={tmp_path / 'run'}")
    output, _ = submitted.communicate(timeout=120)
    assert submitted.returncode == 2, output
    log = tmp_path / "run" / "slurm" / "1" / "1_0_log.out"
    assert f"A SLURM job failed: RuntimeError: the run ended with exit code 2 ({log})" in output
    assert "Traceback" not in output
    assert (slurm.starts("1"), slurm.state("1")) == (1, "FAILED")
    assert "absent: no such file" in log.read_text()


def test_the_documented_batch_script_queues_itself_again(runs: Runs, slurm: Slurm, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    page = (ROOT / "docs" / "slurm.md").read_text()
    script = next(block for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if block.startswith("#!"))
    script = script.replace("ntasks-per-node=8", "ntasks-per-node=1")
    given = re.search(r"python train\.py .*", script)
    assert given is not None
    (tmp_path / "job.sh").write_text(script.replace(given[0], shlex.join(runs.command(*LONG, f"run_dir={stopped}"))))
    environment = ENVIRONMENT | slurm.environment()
    submitted = subprocess.run(
        ["sbatch", tmp_path / "job.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert submitted.stdout.startswith("Submitted batch job 1")
    deadline = time.monotonic() + 120
    signalled = False
    while slurm.state("1") in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline
        if not signalled and len(rows(stopped)) >= 3:
            slurm.signal("1", signal.SIGUSR1)
            signalled = True
        time.sleep(0.005)
    assert (slurm.starts("1"), slurm.state("1")) == (2, "COMPLETED")
    runs.forked(*LONG, f"run_dir={whole}")
    assert_equal_runs(whole, stopped)


def test_without_a_cluster_the_message_is_short(runs: Runs, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="pip install -e '.[slurm]'")
    if shutil.which("srun"):
        pytest.skip("there is a cluster")
    result = runs.forked(*LAUNCHER, f"run_dir={tmp_path / 'run'}", code=2)
    assert "there is no srun here" in result.stderr
    assert len(result.stderr.splitlines()) == 1
