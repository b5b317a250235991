"""Signals that ask a run to stop: finish the step, save, exit.

SIGINT (Ctrl-C), SIGTERM (a scheduler's notice) and SIGUSR1 (SLURM's `--signal=USR1@120`) only set a flag. The loops
poll it at places where every rank comes by: `poll` agrees over the ranks, since a signal may reach one of them only and
a rank that leaves alone hangs the rest in their next collective. A second Ctrl-C raises KeyboardInterrupt at once.

The notice to the user comes from a thread that the interpreter's C-level handler wakes through a pipe. So it appears
right away even while the main thread waits inside a collective or a kernel, and nothing is printed from a signal
handler, where the terminal's lock may be held.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Final, Self

from configs.errors import REQUEUE_EXIT_CODE

_STOP: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ECHO_S: Final = 1.0
"""A second SIGINT within this time of the first is the same Ctrl-C: launchers pass it on to ranks that the terminal
already told."""


class Interrupts:
    """Handlers of the stop signals while the block runs; earlier handlers come back at its end.

    Args:
        any_rank: (flag) -> whether any rank gave True; a collective, called by every `poll`. None: one process.
        notify: shows a line to the user; called from a thread of its own, once a signal.
        last: whether the process ends after the block. Then SIGUSR1 stays ignored: all is saved, and its default action
            would make a failure of the run.
        saves: whether the notice promises that the run saves.
    """

    def __init__(
        self,
        any_rank: Callable[[bool], bool] | None = None,
        notify: Callable[[str], None] | None = None,
        last: bool = False,
        saves: bool = True,
    ) -> None:
        self._any_rank = any_rank
        self._notify = notify
        self._last = last
        self._saves = saves
        self._received: list[signal.Signals] = []
        self._first_sigint_s: float | None = None
        self._agreed = False
        self._requeue = False
        self._cleanup = contextlib.ExitStack()

    @property
    def requested(self) -> bool:
        """Whether this rank has received a signal; not agreed over ranks."""
        return bool(self._received)

    @property
    def reason(self) -> str:
        """The first signal's name; "another rank" if none arrived here but a poll agreed to stop, else empty."""
        if self._received:
            return self._received[0].name
        return "another rank" if self._agreed else ""

    @property
    def exit_code(self) -> int:
        """0, or `REQUEUE_EXIT_CODE` once the ranks have agreed to stop and any of them had SIGUSR1."""
        return REQUEUE_EXIT_CODE if self._requeue else 0

    @property
    def own_exit_code(self) -> int:
        """0, or `REQUEUE_EXIT_CODE` if this rank has had SIGUSR1; not agreed over ranks."""
        return REQUEUE_EXIT_CODE if signal.SIGUSR1 in self._received else 0

    def hears_requeue(self, wait_s: float) -> bool:
        """Whether this rank has received SIGUSR1, or does so within `wait_s` seconds; not agreed over ranks."""
        deadline = time.monotonic() + wait_s
        while signal.SIGUSR1 not in self._received and time.monotonic() < deadline:
            time.sleep(0.02)
        return signal.SIGUSR1 in self._received

    def poll(self) -> bool:
        """Whether to stop, the same on every rank.

        A collective if `any_rank` is given: call it at the same places on every rank (after each step, each batch of an
        evaluation). Once it has said True it says so without communicating.
        """
        if self._agreed:
            return True
        if self._any_rank is None:
            self._agreed = self.requested
            self._requeue = signal.SIGUSR1 in self._received
            return self._agreed
        self._agreed = self._any_rank(self.requested)
        if self._agreed:  # rare, so the second collective costs nothing
            self._requeue = self._any_rank(signal.SIGUSR1 in self._received)
        return self._agreed

    def __enter__(self) -> Self:
        """Install the handlers. Raises RuntimeError outside the main thread, where Python allows none."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signal handlers can only be installed in the main thread")
        with contextlib.ExitStack() as stack:  # undone if anything below fails
            if self._notify is not None:
                self._start_notices(stack)
            for number in _STOP:
                earlier = signal.signal(number, self._handle)
                ignored = self._last and number is signal.SIGUSR1
                stack.callback(signal.signal, number, signal.SIG_IGN if ignored else earlier)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        self._received.append(received)
        if received is not signal.SIGINT:
            return
        now = time.monotonic()
        if self._first_sigint_s is None:
            self._first_sigint_s = now
        elif now - self._first_sigint_s > _ECHO_S:
            raise KeyboardInterrupt

    def _start_notices(self, stack: contextlib.ExitStack) -> None:
        read_fd, write_fd = os.pipe()
        stack.callback(os.close, read_fd)
        os.set_blocking(write_fd, False)  # a full pipe must not block a signal handler
        thread = threading.Thread(target=self._watch, args=(read_fd,), name="interrupt-notices", daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(os.close, write_fd)  # ends the thread's loop
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False))

    def _watch(self, read_fd: int) -> None:
        """Turn signal numbers, a byte each, into notices until the pipe closes."""
        assert self._notify is not None
        said: set[int] = set()
        while number := os.read(read_fd, 1):
            if number[0] in _STOP and number[0] not in said:
                said.add(number[0])
                name = signal.Signals(number[0]).name
                again = " Press Ctrl-C again to stop at once." if number[0] == signal.SIGINT else ""
                then = "saving and exiting" if self._saves else "exiting; no checkpoint is written"
                self._notify(f"{name} received: finishing what is under way, then {then}.{again}")
