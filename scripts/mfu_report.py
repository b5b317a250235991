"""Where the FLOPs of a training step go: a waterfall from 100 % MFU down to what is reached.

    python scripts/mfu_report.py experiment=gpt3_2b7_8k train.global_batch_size=8 train.profile_steps=4
    torchrun --nproc_per_node 8 scripts/mfu_report.py experiment=gpt3_1b3_2k engine=zero2

Takes the keys of train.py and trains with them, without evaluation, checkpoints and wandb, until `train.profile_steps`
steps are profiled (default: 4). A few micro-batches a step are enough: a profile grows with their number. Prints each
part of a step with its time, its rate and its share of what is lost, and the three changes of the config that would
win most of it back; and the step's floor, its products and its attention at the rates that they reach alone on this
device right after the run, with the run as a share of it. Leaves `waterfall.json`, `waterfall.png` and the run's own
files (`profiled/`) in the run folder. docs/waterfall.md says what the parts mean. With several ranks the first one is
reported. A signal ends it without a report, and not with the exit code on which a job script starts it again.
"""

from __future__ import annotations

import gc
import json
import shutil
import signal
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import end_on_ctrl_c, launch

end_on_ctrl_c(__name__)

import torch

from configs.errors import UserError
from configs.schema import RunConfig, Toggle, WandbMode
from training.floor import floor_json, floor_line, measure_floor
from training.profile import PICTURE, REPORT, SETTLED_STEPS, TRACE
from training.report import wide_console, write_json
from training.run import run_folder
from training.schedule import learning_rate
from training.session import Session, open_session
from training.trainer import Trainer
from training.waterfall.show import lines_of, table_of

DEFAULT_STEPS = 4
PROFILED = "profiled"
"""Folder of the run, inside the report's."""


def main(config: RunConfig) -> int:
    """Profile, print the table, write the files."""
    folder = run_folder(config).path
    with open_session(quiet(config, folder)) as session:
        with Trainer(session) as trainer:
            train_until_profiled(session, trainer)
        if trainer.state.step < last_step(session.config) and session.interrupts.poll():
            raise stopped_by(session.interrupts.reason)
        if not session.processes.is_main:
            return 0
        report = trainer.report
        device = session.processes.device
    if report is None:
        raise UserError(f"Nothing was profiled; {folder / PROFILED / 'run.log'} says more.")
    for name in (REPORT, PICTURE, TRACE):
        shutil.move(folder / PROFILED / name, folder / name)
    del trainer
    gc.collect()  # the model's memory
    torch.cuda.empty_cache()
    floor = measure_floor(report.setting, device)
    found = json.loads((folder / REPORT).read_text())
    write_json(folder / REPORT, found | {"floor": floor_json(floor, report)})
    console = wide_console()
    console.print(table_of(report))
    console.print("\n".join([floor_line(floor, report), *lines_of(report)]), markup=False, soft_wrap=True)
    console.print(f"{folder / REPORT}\n{folder / PICTURE}", markup=False, soft_wrap=True)
    return 0


def quiet(config: RunConfig, folder: Path) -> RunConfig:
    """The run that is profiled: the same steps, and nothing between them."""
    steps = config.train.profile_steps or DEFAULT_STEPS
    train = replace(
        config.train,
        profile_steps=steps,
        steps=max(config.train.steps, SETTLED_STEPS + 1 + steps),
        eval_every=0,
        save_every=0,
    )
    logging = replace(config.logging, wandb=WandbMode.disabled, progress=Toggle.off, plot=False)
    return replace(config, train=train, logging=logging, run_dir=str(folder / PROFILED), resume="never")


def train_until_profiled(session: Session, trainer: Trainer) -> None:
    """The loop of train.py, up to the report."""
    config, state = session.config, trainer.state
    last = last_step(config)
    with closing(trainer.batches()) as batches:
        while state.step < last and not session.interrupts.poll():
            batch = next(batches)
            step = trainer.engine.train_step(batch, learning_rate(state.step, config.optim, config.train.steps))
            trainer.advance(batch, step)


def last_step(config: RunConfig) -> int:
    """The step after which there is a report."""
    return SETTLED_STEPS + 1 + config.train.profile_steps


def stopped_by(reason: str) -> UserError:
    """What ends a report that a signal keeps from being made: 130 after Ctrl-C, 143 after SIGTERM.

    SIGUSR1 is no request to be started again here, as it is of train.py: a report that begins anew each time meets the
    same time limit. So its code, 2, is one that no job script requeues on.
    """
    error = UserError(
        f"{reason} came before the profiled steps were done: there is no report, and nothing to go on from. Start "
        "again, with more time or with fewer micro-batches a step (train.global_batch_size)."
    )
    error.exit_code = {"SIGINT": 128 + signal.SIGINT, "SIGTERM": 128 + signal.SIGTERM}.get(reason, error.exit_code)
    return error


if __name__ == "__main__":
    launch(main)
