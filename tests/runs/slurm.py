"""A small SLURM for one machine: sbatch, srun, scontrol requeue and sacct, with jobs that are local processes.

`Slurm(folder)` puts the commands into `folder/bin` (a symbolic link each to this file, which looks at the name it was
called by). What the scheduler knows lies in `folder/jobs/ID/`: the batch script, its options, `starts` (a line each),
`state`, and while a step runs the process group of its tasks. Like SLURM it

- signals every process of a step (`--signal=USR1@...`, here when the test says so), the batch script not;
- on `scontrol requeue` ends the job with SIGTERM, SIGKILL after `KILL_WAIT_S`, and starts the same script again with
  SLURM_RESTART_COUNT one higher.

Only the standard library, so that a command starts in no time.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

KILL_WAIT_S = 3.0
START_WAIT_S = 1.0
"""A job begins some time after its submission: submitit makes the folder of its output between the two."""
COMMANDS = ("sbatch", "srun", "scontrol", "sacct", "scancel")


class Slurm:
    """The test's view of the scheduler."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "jobs").mkdir()
        for command in COMMANDS:
            path = folder / "bin" / command
            path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__)} {command} "$@"\n')
            path.chmod(0o755)

    def environment(self) -> dict[str, str]:
        """What a login node of the cluster adds to a user's variables."""
        return {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(self.folder)}

    def jobs(self) -> list[str]:
        """Ids of all jobs, in the order of their submission."""
        return sorted((path.name for path in (self.folder / "jobs").iterdir()), key=lambda name: (len(name), name))

    def signal(self, job: str, number: signal.Signals) -> None:
        """What SLURM does some time before the job's limit."""
        os.killpg(int((self.folder / "jobs" / job / "step").read_text()), number)

    def starts(self, job: str) -> int:
        """How often the job was started."""
        return len((self.folder / "jobs" / job / "starts").read_text().splitlines())

    def state(self, job: str) -> str:
        """As `sacct` shows it."""
        return (self.folder / "jobs" / job / "state").read_text()

    def options(self, job: str) -> dict[str, str]:
        """The `#SBATCH` lines of its script."""
        return options_of((self.folder / "jobs" / job / "script").read_text())

    def close(self) -> None:
        """End what is left of all jobs."""
        for step in self.folder.glob("jobs/*/step"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.killpg(int(step.read_text()), signal.SIGKILL)


def options_of(script: str) -> dict[str, str]:
    """`--key=value` of the `#SBATCH` lines."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?'?([^'\n]*)'?$", script, re.MULTILINE))


def note(path: Path, text: str) -> None:
    """Write a file that others read at any time."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


# The commands


def sbatch(folder: Path, arguments: list[str]) -> int:
    """Submit a script; an array becomes one job an element."""
    script = Path(arguments[-1]).read_text()
    number = 1 + len({path.name.split("_")[0] for path in folder.glob("jobs/*")})
    array = re.match(r"0-(\d+)", options_of(script).get("array", ""))
    names = [f"{number}_{element}" for element in range(int(array[1]) + 1)] if array else [str(number)]
    for name in names:
        place = folder / "jobs" / name
        place.mkdir()
        (place / "script").write_text(script)
        note(place / "state", "PENDING")
        command = [sys.executable, "-S", __file__, "controller", name]
        quiet = subprocess.DEVNULL  # whoever reads what sbatch says would wait for the job's end
        subprocess.Popen(command, start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet)
    print(f"Submitted batch job {number}")
    return 0


def controller(folder: Path, arguments: list[str]) -> int:
    """Runs one job, and again as often as it is requeued."""
    place = folder / "jobs" / arguments[0]
    time.sleep(START_WAIT_S)
    restarts = 0
    while True:
        with (place / "starts").open("a") as file:
            file.write(f"{time.time()}\n")
        note(place / "state", "RUNNING")
        code = run_script(place, arguments[0], restarts)
        if code is not None:
            note(place / "state", "FAILED" if code else "COMPLETED")
            return 0
        restarts += 1


def run_script(place: Path, name: str, restarts: int) -> int | None:
    """The batch script's exit code, or None where the job is to be started again."""
    number, _, element = name.partition("_")
    environment = {**os.environ, "SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "localhost", "FAKE_JOB": name}
    environment["SLURM_NTASKS"] = options_of((place / "script").read_text()).get("ntasks-per-node", "1")
    environment["SLURM_JOB_NUM_NODES"] = "1"
    if element:
        environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": element}
    if restarts:
        environment["SLURM_RESTART_COUNT"] = str(restarts)
    with (place / "output").open("a") as output:
        process = subprocess.Popen(["bash", place / "script"], env=environment, stdout=output, stderr=output)
    while process.poll() is None and not (place / "requeue").exists():
        time.sleep(0.02)
    if (place / "requeue").exists():  # also where the script asked for it and has ended since
        end_step(place, process)
        (place / "requeue").unlink()
        return None
    return process.returncode


def end_step(place: Path, process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the step's processes, SIGKILL to those that are still there later."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int((place / "step").read_text()), signal.SIGTERM)
        time.sleep(KILL_WAIT_S)
        os.killpg(int((place / "step").read_text()), signal.SIGKILL)
    process.wait()


def srun(folder: Path, arguments: list[str]) -> int:
    """Starts the tasks of a step in a process group of their own; ends with the highest of their codes."""
    files, command = [], list(arguments)
    while command[0].startswith("--"):
        flag = command.pop(0)
        if flag == "--output":
            files.append(command.pop(0))
    name, tasks = os.environ["FAKE_JOB"], int(os.environ["SLURM_NTASKS"])
    group, processes = 0, []
    for task in range(tasks):
        environment = {**os.environ, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_NODEID": "0"}
        environment |= {"SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NODELIST": "localhost"}
        output = None
        if files:
            array = os.environ.get("SLURM_ARRAY_TASK_ID", "")
            place = files[0].replace("%j", name).replace("%A", name.split("_")[0]).replace("%a", array)
            output = open(place.replace("%t", str(task)), "a")  # noqa: SIM115 - the task's own
        process = subprocess.Popen(
            command, env=environment, process_group=group, stdout=output, stderr=subprocess.STDOUT if output else None
        )
        group = group or process.pid
        processes.append(process)
    note(folder / "jobs" / name / "step", str(group))
    codes = [process.wait() for process in processes]
    return max(128 - code if code < 0 else code for code in codes)  # a shell's way to tell a signal


def scontrol(folder: Path, arguments: list[str]) -> int:
    """`scontrol requeue ID`."""
    action, name = arguments
    assert action == "requeue", arguments
    (folder / "jobs" / name / "requeue").touch()
    return 0


def sacct(folder: Path, arguments: list[str]) -> int:
    """States of all jobs, as submitit asks for them."""
    print("JobID|State|NodeList")
    for place in folder.glob("jobs/*"):
        print(f"{place.name}|{(place / 'state').read_text()}|localhost")
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](Path(os.environ["FAKE_SLURM"]), sys.argv[2:]))
