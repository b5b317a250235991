"""The surroundings of a run: its processes, its folder, its terminal and its signals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from configs.errors import REQUEUE_EXIT_CODE, UserError
from configs.schema import RunConfig
from training import distributed
from training.console import Terminal, open_terminal
from training.distributed import Processes
from training.interrupts import Interrupts
from training.resume import on_restart
from training.rng import make_deterministic
from training.run import RunFolder, claim, is_restart, run_folder, write_config
from training.validate import validate
from training.watchdog import Peers, RankLostError, of_collective

SKEW_S = 1.0
"""How much later than another rank this one may get a signal that all are sent."""


class RequeueError(UserError):
    """The run could not save, and is to be started again."""

    exit_code = REQUEUE_EXIT_CODE


@dataclass(frozen=True)
class Session:
    """What every part of a run needs to know about where it runs."""

    config: RunConfig
    """Rank 0's config, checked."""
    processes: Processes
    folder: RunFolder
    terminal: Terminal
    interrupts: Interrupts
    peers: Peers


@contextmanager
def open_session(config: RunConfig) -> Iterator[Session]:
    """Join the run's processes, claim its folder, take the terminal and the signals; undo all of it at the end.

    Raises `UserError` for a device, a folder or a config that can't be; from the terminal on, errors become messages
    and SystemExit.
    """
    with ExitStack() as stack:
        processes = distributed.init(config.hardware.device, config.engine.timeout_minutes)
        stack.callback(processes.close)
        config = processes.broadcast(config)
        folder, start = run_folder(config), distributed.start_of(os.environ)
        # What `resume` names has served once a restart goes on from its own, and may be gone.
        restarted = processes.is_main and is_restart(folder, start)
        validate(processes.broadcast(on_restart(config, folder) if restarted else config), processes.world_size)
        if processes.is_main:
            again = stack.enter_context(claim(folder, config.resume, start))
            write_config(folder, config)
            config = on_restart(config, folder) if again else config
        config = processes.broadcast(config)  # by now the folder is there, and an earlier run is out of the way
        terminal = stack.enter_context(open_terminal(folder.log, processes.rank))
        saves = config.train.save_every > 0
        any_rank = processes.any if processes.world_size > 1 else None
        interrupts = stack.enter_context(Interrupts(any_rank, terminal.say, last=True, saves=saves))
        stack.enter_context(requeue_if_signalled(interrupts))
        peers = stack.enter_context(Peers(processes))
        choose_arithmetic(config)
        yield Session(config, processes, folder, terminal, interrupts, peers)


@contextmanager
def requeue_if_signalled(interrupts: Interrupts) -> Iterator[None]:
    """Ask for a requeue where another rank is lost and SIGUSR1 has come: it ends ranks that can't handle it yet.

    Ranks take up their handlers some milliseconds apart, and a scheduler signals all of them at once.
    """
    try:
        yield
    except (UserError, RuntimeError) as error:
        lost = isinstance(error, RankLostError) or of_collective(error)
        if lost and interrupts.hears_requeue(SKEW_S):
            raise RequeueError("SIGUSR1 has ended a rank that was still starting: start again.") from error
        raise


def choose_arithmetic(config: RunConfig) -> None:
    """Process-wide settings of PyTorch: determinism, or TF32 for what stays in fp32."""
    if config.deterministic:
        make_deterministic()
    else:
        torch.set_float32_matmul_precision("high" if config.hardware.tf32 else "highest")
