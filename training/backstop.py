"""Ends a process that gives no sign of life, however its threads hang: `Watchdog`'s last resort.

A call into C that never returns may hold Python's lock for good, and then no thread of Python can end the process.
`faulthandler.dump_traceback_later` can, but its clock goes on while SLURM (or ctrl-Z) stops the process: a run that was
suspended for longer than the limit would be ended as it wakes, before any thread of Python could put that off. So a
small process of its own watches, which reads signs of life from a pipe. Its time passes only while both run: a tick
that takes longer than it should, since it was stopped itself, counts little, and one in which the other is stopped
doesn't count. It ends the other with SIGALRM, at which `faulthandler` writes all stacks without Python's lock.

Started as a file, with the standard library alone; once the pipe closes, or the process is gone, it ends as well.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

LOG = logging.getLogger(__name__)
OF_THE_PARENT: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a terminal or a scheduler sends to all processes: it is the other's to decide whether to end."""
DYING_S: Final = 5.0
"""Time to write stacks, before SIGKILL."""


class Clock:
    """Seconds in which this process ran, as far as it looks once a tick."""

    def __init__(self, tick_s: float) -> None:
        self.tick_s = tick_s
        self.seconds = 0.0
        self._last = time.monotonic()

    def tick(self, counts: bool = True) -> None:
        """A tick is over. The system's clock goes on while the process is stopped, so two ticks at most count."""
        now = time.monotonic()
        if counts:
            self.seconds += min(now - self._last, 2 * self.tick_s)
        self._last = now


class Backstop:
    """Ends this process `limit_s` seconds after the last `alive`; a context manager. Signs are expected once a tick."""

    def __init__(self, limit_s: float, tick_s: float) -> None:
        # Isolated and without site-packages: up in milliseconds, and this folder's modules shadow nothing.
        own = [str(Path(__file__).resolve()), str(os.getpid()), str(limit_s), str(tick_s)]
        self.command = [sys.executable, "-I", "-S", *own]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        faulthandler.register(signal.SIGALRM, file=2, all_threads=True, chain=True)  # chain: then ends the process
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_PARENT)  # until it ignores them
        try:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            os.set_blocking(self._pipe.fileno(), False)
        except OSError as error:  # of use, not of need
            LOG.warning(f"a hang that holds Python's lock will not be noticed: no further process starts ({error})")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
        return self

    @property
    def _pipe(self) -> IO[bytes]:
        assert self.process is not None
        assert self.process.stdin is not None
        return self.process.stdin

    def alive(self) -> None:
        """A sign of life. Without effect if nobody watches."""
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(self._pipe.fileno(), b".")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process is not None:
            self._pipe.close()
            self.process.kill()
            self.process.wait()
        faulthandler.unregister(signal.SIGALRM)


# In the process that watches


def watch(pid: int, limit_s: float, tick_s: float) -> None:
    """Read signs of life from standard input until it closes; end `pid` once there was none for `limit_s`."""
    clock, deadline = Clock(tick_s), limit_s
    while os.getppid() == pid:
        if select.select([0], [], [], tick_s)[0]:
            if not os.read(0, 4096):
                return
            deadline = clock.seconds + limit_s
            time.sleep(tick_s / 2)  # the next one isn't due
        clock.tick(counts=not is_stopped(pid))
        if clock.seconds > deadline:
            end(pid, limit_s)
            return


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal or a debugger; where there is no /proc nobody knows."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] in (b"T", b"t")  # the name before it may have brackets and spaces


def end(pid: int, limit_s: float) -> None:
    """Say why, and end the process; it is this one's parent, so its number is nobody else's."""
    os.write(2, f"Process {pid} gave no sign of life for {limit_s / 60:.3g} minutes, and is ended.\n".encode())
    os.kill(pid, signal.SIGALRM)
    deadline = time.monotonic() + DYING_S
    while os.getppid() == pid and time.monotonic() < deadline:
        time.sleep(0.01)
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    for number in OF_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_PARENT)
    watch(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
