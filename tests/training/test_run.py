"""The run folder: claimed by one process, moved aside only when asked."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from configs import compose
from configs.errors import UserError
from configs.schema import DataConfig, RunConfig, TrainConfig
from training.distributed import start_of
from training.resume import on_restart
from training.run import RunFolder, claim, keep_config, move_aside, run_folder, write_config


def test_folder_is_runs_name_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder(compose([])).path == tmp_path / "runs" / "quickstart"
    assert run_folder(compose(["run_dir=else/where"])).path == tmp_path / "else" / "where"


def test_second_process_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    holder = (
        "import sys, time; from pathlib import Path; from training.run import RunFolder, claim\n"
        f"with claim(RunFolder(Path({str(folder.path)!r})), 'auto'):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        with pytest.raises(UserError, match=str(process.pid)), claim(folder, "auto"):
            pass
    finally:
        process.kill()
        process.wait()
    deadline = time.time() + 10
    while time.time() < deadline:  # the kernel drops a dead process's lock
        try:
            with claim(folder, "auto"):
                return
        except UserError:
            time.sleep(0.1)
    pytest.fail("the lock outlived its process")


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    with claim(RunFolder(tmp_path), "auto"):
        assert "has no locks (Function not implemented): nothing keeps a second run out of it" in caplog.text


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"run_dir .*file/run can't be written"),
        claim(RunFolder(tmp_path / "file" / "run"), "auto"),
    ):
        pass


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 16 KB, of which nothing is left."""
    folder = tmp_path / "full"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("only root can mount a small disk")
    (folder / "rest").write_bytes(bytes(16384))
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_is_named(full_disk: Path) -> None:
    with (
        pytest.raises(UserError, match=r"run_dir .*full can't be written: No space left on device\. Give run_dir=PATH"),
        claim(RunFolder(full_disk), "auto"),
    ):
        pass
    (full_disk / "rest").write_bytes(bytes(8192))
    with claim(RunFolder(full_disk), "auto"), pytest.raises(UserError, match="can't be written: No space left"):
        write_config(RunFolder(full_disk), RunConfig(data=DataConfig(path="x" * 8192)))


def test_where_nothing_can_be_saved_is_known_at_the_start(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.write_text("")
    with pytest.raises(UserError, match=r"run_dir .*checkpoints can't be written"):
        write_config(folder, RunConfig())
    write_config(folder, RunConfig(train=TrainConfig(save_every=0)))


def test_never_moves_an_earlier_run_aside_and_keeps_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in (1, 2):
        folder.checkpoints.mkdir()
        (folder.checkpoints / "weights").write_text(f"run {number}")
        (tmp_path / "notes.txt").write_text("the user's")
        with claim(folder, "never"):
            assert not folder.checkpoints.exists()
        assert (tmp_path / "previous" / str(number) / "checkpoints" / "weights").read_text() == f"run {number}"
    assert (tmp_path / "notes.txt").read_text() == "the user's"
    assert move_aside(folder) is None


def test_auto_leaves_an_earlier_run_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    with claim(folder, "auto"):
        assert folder.checkpoints.exists()


def slurm(restarts: int, job: str = "7") -> dict[str, str]:
    counted = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    return start_of({"SLURM_JOB_ID": job, **counted})


def save(folder: RunFolder) -> None:
    """What matters here of a checkpoint."""
    folder.checkpoints.mkdir(exist_ok=True)
    (folder.checkpoints / "latest").write_text("step_00000001\n")


@pytest.mark.parametrize("resume", ["never", "some/where"])
def test_a_launcher_that_starts_a_run_again_goes_on(tmp_path: Path, resume: str) -> None:
    """The command is the same, and would begin anew, or again from the other run, each time."""
    folder, config = RunFolder(tmp_path), compose([f"resume={resume}"])
    save(folder)  # an earlier run's
    with claim(folder, resume, slurm(0)) as again:
        assert not again
    for restarts in (1, 2):
        with claim(folder, resume, slurm(restarts)) as again:
            assert again
            if restarts == 1:
                assert on_restart(config, folder).resume == resume  # it has saved nothing yet
                time.sleep(0.02)  # a file system's clock may be this coarse
                save(folder)
            assert on_restart(config, folder).resume == "auto"
            assert folder.checkpoints.exists()
    for other in (slurm(2, job="8"), {}):
        with claim(folder, resume, other) as again:
            assert not again
        assert folder.checkpoints.exists() is (resume != "never")


def test_a_clock_that_is_set_back_loses_no_checkpoint(tmp_path: Path) -> None:
    """The time of a start may lie ahead of all that follows: a node that had no time yet, another one's clock."""
    folder = RunFolder(tmp_path)
    with claim(folder, "never", slurm(0)):
        save(folder)
        os.utime(folder.checkpoints / "latest", (0, 0))
    with claim(folder, "never", slurm(1)) as again:
        assert again
        assert on_restart(compose(["resume=never"]), folder).resume == "auto"


def test_torchruns_restarts_are_known_by_its_process(tmp_path: Path) -> None:
    """Whatever it counts: after the loss of another node it counts none."""
    folder, start = RunFolder(tmp_path), start_of({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"})
    assert str(os.getppid()) in start["torchrun"]
    for again in (False, True):
        with claim(folder, "never", start) as known:
            assert known is again
    with claim(folder, "never", {"torchrun": "another"}) as known:
        assert not known


def test_the_same_job_may_start_anew_as_often_as_it_likes(tmp_path: Path) -> None:
    """A command given twice in one allocation is no restart."""
    for _ in range(2):
        with claim(RunFolder(tmp_path), "never", slurm(1)) as again:
            assert not again


def test_config_is_written_resolved(tmp_path: Path) -> None:
    config = compose(["train.steps=7", "model.attention=standard"])
    write_config(RunFolder(tmp_path), config)
    keep_config(RunFolder(tmp_path))
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert tree["train"]["steps"] == 7
    assert tree["model"]["attention"] == "standard"
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.yaml"]
