"""Whole runs of train.py in processes of their own, on a tiny model and corpus that a session prepares once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from tests.runs.faults import Driver

ROOT = Path(__file__).parents[2]
TINY = (
    "data.max_documents=40",
    "data.tokenizer_vocab_size=300",
    "data.num_workers=1",
    "data.validation_fraction=0.2",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.width=32",
    "model.sequence_length=32",
    "train.steps=8",
    "train.global_batch_size=4",
    "train.log_every=1",
    "train.eval_every=4",
    "train.eval_sequences=4",
    "train.sample_tokens=0",
    "train.save_every=3",
    "hardware.device=cpu",
    "logging.wandb=disabled",
    "logging.plot=false",
)
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "HYDRA_FULL_ERROR")} | {
    "OMP_NUM_THREADS": "1",
    "WANDB_API_KEY": "",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
}

OUTPUTS = ("output", "errors")
"""Names of the files of a forked run's two streams, before the rank."""


class Runs:
    """Starts train.py with the tiny settings, in fresh processes or in forked ones that have imported its libraries."""

    def __init__(self, folder: Path, driver: Driver) -> None:
        self.overrides = [*TINY, f"data.cache_dir={folder / 'corpus'}"]
        self.folder, self.driver = folder, driver

    def command(self, *overrides: str, processes: int = 1) -> list[str]:
        """The command line; `processes` > 1 goes through torchrun."""
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [*launcher, str(ROOT / "train.py"), *self.overrides, *overrides]

    def run(
        self,
        *overrides: str,
        processes: int = 1,
        code: int | None = 0,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; checks the exit code unless it is None."""
        result = subprocess.run(
            self.command(*overrides, processes=processes),
            cwd=cwd or ROOT,
            env=ENVIRONMENT | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert code is None or result.returncode == code, result.stdout + result.stderr
        return result

    def forked(
        self,
        *overrides: str,
        processes: int = 1,
        code: int | None = 0,
        cwd: Path | None = None,
        kill_after_rows: int = 0,
    ) -> subprocess.CompletedProcess[str]:
        """As `run`, on this process's command line in all but torchrun and the imports, in a tenth of the time.

        With `kill_after_rows` all ranks are killed once the run has so many rows and a checkpoint; the driver may be
        late, so the run stands still at twice as many.
        """
        from tests.runs.faults import Job

        job = Job(str(self.folder), [*self.overrides, *overrides], processes, str(cwd or ROOT), errors_apart=True)
        if kill_after_rows:
            job.fault, job.at_step, job.kill_after_rows = "wait", 2 * kill_after_rows, kill_after_rows
            job.run_dir = next(o.removeprefix("run_dir=") for o in overrides if o.startswith("run_dir="))
        codes = self.driver.run(job).codes
        out, err = ("".join((self.folder / f"{n}_{r}").read_text() for r in range(processes)) for n in OUTPUTS)
        expected = -signal.SIGKILL if kill_after_rows else code
        assert expected is None or codes == [expected] * processes, f"{codes}\n{out}{err}"
        return subprocess.CompletedProcess(job.arguments, codes[0], out, err)

    def interrupt(self, when: Callable[[], bool], number: signal.Signals, *overrides: str, processes: int = 1) -> str:
        """Start a run, send it a signal once `when()` is true, wait for its end; what it printed."""
        process = subprocess.Popen(
            self.command(*overrides, processes=processes),
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.time() + 240
        while not when() and process.poll() is None and time.time() < deadline:
            time.sleep(0.005)
        if number is signal.SIGKILL:  # torchrun's workers are sessions of their own
            for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
                victim.send_signal(number)
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=240)
        self.last_code = process.returncode
        return output


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    """Of whole runs in forked processes."""
    from tests.runs.faults import Driver

    one = Driver()
    yield one
    one.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, driver: Driver) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), driver)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Step → training loss and gradient norm, as logged."""
    return {row["step"]: (row["train/loss"], row["optim/grad_norm"]) for row in rows(run_dir)}
