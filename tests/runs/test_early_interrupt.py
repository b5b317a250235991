"""Ctrl-C in the first seconds, while a program imports its libraries."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.conftest import ENVIRONMENT, ROOT

PROGRAMS = [
    "train.py",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("scripts/*.py") if "__main__" in p.read_text()),
]
INTERRUPTED_TORCH = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(10**9): pass\n"
"""A module that stands for the library, so that the moment is the same each time."""


def start(program: str, folder: Path, library: str) -> subprocess.CompletedProcess[str]:
    """The program with `library` in the place of PyTorch."""
    (folder / "torch.py").write_text(library)
    environment = ENVIRONMENT | {"PYTHONPATH": f"{folder}:{ENVIRONMENT['PYTHONPATH']}"}
    runner = (
        "import runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = sys.argv[0].rpartition('/')[0]; "
        f"sys.path.insert(0, {str(folder)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", runner, str(ROOT / program)],
        env=environment, capture_output=True, text=True, timeout=60, check=False, cwd=folder,
    )  # fmt: skip


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p != "scripts/profile_host.py"])  # imports torch in `main`
def test_ctrl_c_while_libraries_are_imported_is_quiet(program: str, tmp_path: Path) -> None:
    done = start(program, tmp_path, INTERRUPTED_TORCH)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    """As under nohup, or in a script's background job."""
    code = (
        "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from configs import end_on_ctrl_c; end_on_ctrl_c('__main__')\n"
        "os.kill(os.getpid(), signal.SIGINT); print('goes on')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "goes on\n")


@pytest.mark.parametrize(("name", "code"), [("__main__", 130), ("train", 0)])
def test_only_a_program_ends(name: str, code: int) -> None:
    """An import of train.py, as by tests, leaves Ctrl-C alone; and a program's work can be cleaned up after."""
    text = (
        f"import os, signal\nfrom configs import end_on_ctrl_c, run_tool\nend_on_ctrl_c({name!r})\n"
        f"assert (signal.getsignal(signal.SIGINT) is signal.default_int_handler) == ({name!r} != '__main__')\n"
        "def work():\n    try:\n        signal.raise_signal(signal.SIGINT)\n    finally:\n        print('cleaned up')\n"
        f"{'run_tool(work)' if code else ''}"
    )
    done = subprocess.run([sys.executable, "-c", text], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout == ("cleaned up\n" if code else "")
    assert done.stderr == ("Interrupted.\n" if code else "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


SWEEP = """
import sys
from configs import end_on_ctrl_c, run_sweep_job
from configs.schema import RunConfig

end_on_ctrl_c("__main__")
for number in range(2):
    run_sweep_job(RunConfig(run_dir=sys.argv[1]), [sys.argv[2], "seed=1,2"], [f"seed={number}"], number)
    print("job", number, "is over", flush=True)
"""
JOB = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
parent = os.getppid()
try:
    print("ready", flush=True)
    time.sleep(30)
except KeyboardInterrupt:
    time.sleep(1)  # subprocess.run itself gives a child 0.25 s after Ctrl-C, then kills it
    print("saved" if os.getppid() == parent else "saved, and no one waits for it", flush=True)
"""


def started_sweep(folder: Path) -> subprocess.Popen[str]:
    """A sweep whose first job is ready for signals."""
    (folder / "job.py").write_text(JOB)
    sweep = subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(folder / "runs"), str(folder / "job.py")],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert sweep.stdout is not None
    assert sweep.stdout.readline() == "ready\n"
    return sweep


def test_ctrl_c_in_a_sweep_lets_the_job_save_and_starts_no_other(tmp_path: Path) -> None:
    """The terminal sends it to both processes."""
    sweep = started_sweep(tmp_path)
    os.killpg(sweep.pid, signal.SIGINT)
    out, err = sweep.communicate(timeout=60)
    assert (sweep.returncode, out, err) == (130, "saved\n", "")


def test_sigterm_of_a_sweep_goes_to_its_job_which_saves_and_is_the_last(tmp_path: Path) -> None:
    """`kill` and schedulers send it to the sweep alone."""
    sweep = started_sweep(tmp_path)
    sweep.terminate()
    out, err = sweep.communicate(timeout=60)
    assert (sweep.returncode, out, err) == (143, "saved\n", "")
