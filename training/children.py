"""The processes that a tool starts, and how they end with it: on Ctrl-C, SIGTERM or an error, all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import IO, Any

import psutil

PATIENCE_S = 5.0
"""From SIGTERM, on which a run finishes its step and a launcher ends its ranks, to SIGKILL."""
SWEEPS = 3
"""Times that what is left is looked for and killed: a process that is being started may be missed by the first."""
STARTING_S = 0.5
"""For so long a new process may be without an environment."""
NEW_S = 5.0
"""A process is new for so long: those of the kernel never have an environment."""
MARKS = "FLASHTRAIN_CHILD_OF"
"""Environment variable with a word for each `child` that a process is of."""


class Stop:
    """Turns the first SIGINT or SIGTERM into the end of the tool's trials, and none into the end of its report.

    A context for the whole of a tool, which does its trials by `trials`. What comes after the first signal, or after
    the trials, is ignored: what is measured gets written, and processes get ended. A signal that the tool was started
    to ignore stays ignored (`nohup`, a script's background jobs).
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first that came."""
        self._armed = False
        """Whether the first signal is raised where it comes."""
        self._earlier: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, else 0."""
        return 0 if self.signal is None else 128 + self.signal

    def trials(self, run: Callable[[], None]) -> None:
        """Call `run`, which the first signal ends, without an error; not at all if that has come already."""
        try:
            self._armed = True
            if self.signal is None:
                run()
        except KeyboardInterrupt:
            if self.signal is None:
                raise
        finally:
            self._armed = False

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = self.signal is None, self.signal or signal.Signals(number)
        if first and self._armed:
            raise KeyboardInterrupt


@contextlib.contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process (`subprocess.Popen` of text) that has ended, with all that it started, when the block has.

    What it starts inherits a mark in its environment, by which it is found even if the process ends first: a launcher
    that is killed leaves its ranks, sessions of their own, to the system.
    """
    mark = uuid.uuid4().hex
    environment = dict(options.pop("env", os.environ))
    environment[MARKS] = " ".join([*environment.get(MARKS, "").split(), mark])
    process = None
    try:
        process = subprocess.Popen(command, text=True, env=environment, **options)
        yield process
    finally:
        try:
            end_tree(process, mark)
        except KeyboardInterrupt:
            end_tree(process, mark)
            raise
        if process is not None:
            close(process.stdout)
            close(process.stderr)


def close(stream: IO[str] | None) -> None:
    """Close a pipe, if it is one."""
    if stream is not None:
        stream.close()


def end_tree(process: subprocess.Popen[str] | None, mark: str) -> None:
    """End a process, its descendants and all others that have the mark, whatever of them still runs.

    The process alone is asked, by SIGTERM, to end with what it started; if it has ended, all others are.
    """
    tree = marked(mark)
    if process is not None and process.poll() is None:
        tree = list({*tree, *family(process.pid)})
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
    else:
        send(signal.SIGTERM, tree)
        wait_for(tree)
    for _ in range(SWEEPS):
        tree = [member for member in {*tree, *marked(mark)} if is_alive(member)]  # with what started in the meantime
        if not tree:
            break
        send(signal.SIGKILL, tree)
        wait_for(tree)
    if process is not None:
        process.wait()


def send(number: signal.Signals, members: Iterable[psutil.Process]) -> None:
    """Send a signal to those that are still there; psutil knows a process from another with its number."""
    for member in members:
        with contextlib.suppress(psutil.Error):
            member.send_signal(number)


def wait_for(members: Sequence[psutil.Process]) -> None:
    """Wait until none of them runs, `PATIENCE_S` at most. Exit codes stay for those who have a right to them."""
    deadline = time.monotonic() + PATIENCE_S
    while any(map(is_alive, members)) and time.monotonic() < deadline:
        time.sleep(0.01)


def is_alive(member: psutil.Process) -> bool:
    """Whether it runs; one that has ended stays in the system's list until its parent has asked for its exit code."""
    try:
        return member.is_running() and member.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def marked(mark: str) -> list[psutil.Process]:
    """The processes started with this mark in their environment. Linux shows none of a process that has just been
    started, for a moment; that is waited out."""
    found: list[psutil.Process] = []
    unknown = list(psutil.process_iter())
    deadline = time.monotonic() + STARTING_S
    while unknown and time.monotonic() < deadline:
        starting = []
        for process in unknown:
            with contextlib.suppress(psutil.Error, OSError):  # gone, or another user's
                environment = process.environ()
                if mark in environment.get(MARKS, "").split():
                    found.append(process)
                elif not environment and time.time() - process.create_time() < NEW_S and is_alive(process):
                    starting.append(process)
        unknown = starting
        if unknown:
            time.sleep(0.01)
    return found


def family(pid: int) -> list[psutil.Process]:
    """The process and its descendants; none if it is gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
