"""`hydra/launcher=slurm`: runs as SLURM jobs that save before their time limit and are queued again until they end.

hydra-submitit-launcher (`pip install -e '.[slurm]'`) writes the batch script, submits it, and in the job runs what this
class is called with; several settings (`--multirun seed=1,2`) become a job array. Three things are ours:

- Order. Its handler of SLURM's signal queues the job again at once, and SLURM then kills what still runs, a run that is
  saving as well. Here the signal, which SLURM sends to every process of the step, is left to the run: that finishes the
  step, saves and exits with `REQUEUE_EXIT_CODE`. Only then the handler is called.
- Failures. A run that ends with any other code fails the job, and the submitting command.
- Surroundings. The job composes the config again, in a process that has not called `configs.launch`.

The job's own description is a pickle that the submitting command writes into the run folder and its job reads back.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from hydra_plugins.hydra_submitit_launcher import submitit_launcher

from configs import CONFIG_FOLDER, register
from configs.errors import REQUEUE_EXIT_CODE, UserError

END_WAIT_S = 120.0
"""Ranks above 0 wait so long to be ended by SLURM: some clusters end a whole step when one of its ranks leaves."""


class SlurmLauncher(submitit_launcher.SlurmLauncher):
    """Submits jobs and waits for them; in the job it is called, and runs one setting of the sweep."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Submit all jobs and wait for their ends. Raises `UserError` where there is no SLURM or a job failed."""
        prepare_environment()
        from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

        try:
            return super().launch(job_overrides, initial_job_idx)
        except (FailedJobError, FailedSubmissionError, UncompletedJobError) as error:
            raise UserError(f"A SLURM job failed: {failure(error)}") from error
        except RuntimeError as error:
            if "srun" not in str(error):
                raise
            raise UserError("hydra/launcher=slurm: there is no srun here; submit from a SLURM cluster.") from error

    def __call__(self, *arguments: Any) -> Any:
        """In the job, on one rank: run, and have the job queued again if the run asks for it."""
        register()
        queue_again = leave_signal_to_the_run()
        result = super().__call__(*arguments)
        code = result.return_value
        if code in (REQUEUE_EXIT_CODE, -signal.SIGUSR1):  # the latter before it could handle signals
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM ends the step while scontrol, a part of it, runs
            queue_again(signal.SIGUSR1, None)  # does not return on rank 0
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(END_WAIT_S)
            sys.exit(REQUEUE_EXIT_CODE)
        if code:
            raise RuntimeError(f"the run ended with exit code {code}")
        return result


def failure(error: Exception) -> str:
    """The exception that ended a job, and the file with its output, from submitit's account of some twenty lines."""
    lines = [line.strip(" -") for line in str(error).strip().splitlines()]
    reasons = [line for line in lines if re.match(r"[\w.]*Error: ", line)]
    return " ".join([*reasons[-1:], f"({lines[-1]})"])


def prepare_environment() -> None:
    """Variables that the jobs inherit: the signal that our runs know, and where our packages are."""
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
    paths = [str(CONFIG_FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def leave_signal_to_the_run() -> Callable[[int, Any], Any]:
    """Ignore SIGUSR1 in this process, not in those it starts; returns submitit's handler, to be called later."""
    handler = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    if not callable(handler):
        raise RuntimeError("SUBMITIT_PREEMPT_SIGNAL is not USR1 here: the job did not get the submitter's environment")
    return handler
