"""The surroundings of a run: its processes, its folder, its terminal and its signals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from configs.schema import RunConfig
from training import distributed
from training.console import Terminal, open_terminal
from training.distributed import Processes
from training.interrupts import Interrupts
from training.rng import make_deterministic
from training.run import RunFolder, claim, run_folder, write_config
from training.validate import validate
from training.watchdog import Peers


@dataclass(frozen=True)
class Session:
    """What every part of a run needs to know about where it runs."""

    config: RunConfig
    """Rank 0's config, checked."""
    processes: Processes
    folder: RunFolder
    terminal: Terminal
    interrupts: Interrupts


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
        validate(config, processes.world_size)
        folder = run_folder(config)
        if processes.is_main:
            stack.enter_context(claim(folder, config.resume))
            write_config(folder, config)
        processes.barrier()  # the folder is there, and an earlier run is out of the way
        terminal = stack.enter_context(open_terminal(folder.log, processes.rank))
        any_rank = processes.any if processes.world_size > 1 else None
        interrupts = stack.enter_context(Interrupts(any_rank, terminal.say))
        stack.enter_context(Peers(processes))
        choose_arithmetic(config)
        yield Session(config, processes, folder, terminal, interrupts)


def choose_arithmetic(config: RunConfig) -> None:
    """Process-wide settings of PyTorch: determinism, or TF32 for what stays in fp32."""
    if config.deterministic:
        make_deterministic()
    else:
        torch.set_float32_matmul_precision("high" if config.hardware.tf32 else "highest")
