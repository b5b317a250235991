"""The processes that a tool starts, and how they end with it: on Ctrl-C, SIGTERM or an error, all of them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO, Any

import psutil

PATIENCE_S = 5.0
"""From SIGTERM, on which a run finishes its step and a launcher ends its ranks, to SIGKILL."""


class Stop:
    """Turns the first SIGINT or SIGTERM into the end of the tool's trials, and none into the end of its report.

    A context for the whole of a tool, `trials()` one inside it, which the first signal ends. What comes later, or after
    the trials, is ignored: what is measured gets written, and processes get ended. A signal that the tool was started
    to ignore stays ignored (`nohup`, a script's background jobs).
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first that came."""
        self._armed = True
        self._earlier: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, else 0."""
        return 0 if self.signal is None else 128 + self.signal

    @contextlib.contextmanager
    def trials(self) -> Iterator[None]:
        """A block that the first signal ends, without an error."""
        try:
            yield
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
    """A process (`subprocess.Popen` of text) that has ended, with all that it started, when the block has."""
    process = subprocess.Popen(command, text=True, **options)
    try:
        yield process
    finally:
        end_tree(process)
        for stream in (process.stdout, process.stderr):
            close(stream)


def close(stream: IO[str] | None) -> None:
    """Close a pipe, if it is one."""
    if stream is not None:
        stream.close()


def end_tree(process: subprocess.Popen[str]) -> None:
    """End a process that still runs, and its descendants: ranks are sessions of their own, which no group reaches."""
    if process.poll() is not None:
        return
    tree = family(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE_S)
    tree += [member for member in family(process.pid) if member not in tree]  # what started in the meantime
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil knows a process from another with its number
            member.kill()
    process.wait()
    psutil.wait_procs([member for member in tree if member.pid != process.pid], PATIENCE_S)


def family(pid: int) -> list[psutil.Process]:
    """The process and its descendants; none if it is gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
