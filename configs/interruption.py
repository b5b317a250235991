"""Ctrl-C while a program still imports its libraries, for seconds: nothing is under way, so it just ends. And signals
while a child runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from configs.errors import INTERRUPTED_EXIT_CODE, TERMINATED_EXIT_CODE


def end_on_ctrl_c(name: str) -> None:
    """From here until `hear_ctrl_c`, Ctrl-C ends the process quietly, with exit code 130, if `name` is `__main__`.

    Else it would be a KeyboardInterrupt somewhere in the libraries: a long traceback, or lost in one that catches all.
    A Ctrl-C that the program was started to ignore stays ignored (`nohup`, a script's background jobs).
    """
    if name == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def hear_ctrl_c() -> None:
    """Ctrl-C is a KeyboardInterrupt again: from here on there is something to clean up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C ends the process after the block, with exit code 130, and not in it: a child is to end by itself first."""
    earlier = signal.getsignal(signal.SIGINT)
    if earlier is signal.SIG_IGN:  # the child is to ignore it as well
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))  # a child begins with the default again
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
    if pressed:
        sys.exit(INTERRUPTED_EXIT_CODE)


@contextmanager
def sigterm_waits() -> Iterator[Callable[[int], None]]:
    """SIGTERM, which a scheduler or `kill` sends to one process, goes to a child, whose process id is to be given as
    soon as there is one; this process ends after the block, with exit code 143."""
    earlier = signal.getsignal(signal.SIGTERM)
    if earlier is signal.SIG_IGN:  # the child is to ignore it as well
        yield lambda pid: None
        return
    received: list[int] = []
    children: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(child, number)

    def pass_on_to(pid: int) -> None:
        children.append(pid)
        if received:
            os.kill(pid, received[0])

    signal.signal(signal.SIGTERM, handle)
    try:
        yield pass_on_to
    finally:
        signal.signal(signal.SIGTERM, earlier)
    if received:
        sys.exit(TERMINATED_EXIT_CODE)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED_EXIT_CODE)
