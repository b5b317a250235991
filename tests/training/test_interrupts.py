"""Stop signals, with real ones in processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from configs.errors import REQUEUE_EXIT_CODE
from training import session
from training.interrupts import Interrupts
from training.watchdog import RankLostError

LOOP = """
import os, signal, sys, time
from training.interrupts import Interrupts

def say(text):
    os.write(1, (text + chr(10)).encode())

with Interrupts(notify=lambda text: say("notice: " + text)) as interrupts:
    say("ready")
    for step in range(1000):
        if sys.argv[1] == "busy":  # one long step; the flag is polled after it
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                time.sleep(0.01)
        else:
            time.sleep(0.01)
        say(f"step {step}")
        if interrupts.poll():
            break
    say(f"saved after {interrupts.reason}")
sys.exit(interrupts.exit_code)
"""


class Process:
    """A process that runs `LOOP`, its output line by line."""

    def __init__(self, mode: str) -> None:
        command = [sys.executable, "-c", LOOP, mode]
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.wait_for("ready")

    def wait_for(self, start: str) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line.rstrip())
            if line.startswith(start):
                return
        pytest.fail(f"no line {start!r} in {self.lines}")

    def end(self) -> int:
        out, self.errors = self.popen.communicate(timeout=20)
        self.lines += out.splitlines()
        return self.popen.returncode

    @property
    def work(self) -> list[str]:
        """The lines of the loop. Notices come from a thread, so on a busy machine anywhere between them."""
        return [line for line in self.lines if not line.startswith("notice")]


@pytest.fixture
def start() -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.popen.kill()
        process.popen.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGUSR1, REQUEUE_EXIT_CODE)]
)
def test_first_signal_finishes_the_step_and_saves(start: list[Process], number: signal.Signals, code: int) -> None:
    process = Process("quick")
    start.append(process)
    process.wait_for("step 3")
    process.popen.send_signal(number)
    assert process.end() == code
    assert process.work[-1] == f"saved after {number.name}"
    notices = [line for line in process.lines if line.startswith("notice")]
    assert len(notices) == 1
    assert number.name in notices[0]


def test_notice_comes_before_the_step_ends(start: list[Process]) -> None:
    process = Process("busy")
    start.append(process)
    process.popen.send_signal(signal.SIGTERM)
    process.wait_for("notice")
    assert not any(line.startswith("step") for line in process.lines)
    assert process.end() == 0
    assert process.work[-2:] == ["step 0", "saved after SIGTERM"]


def test_second_ctrl_c_stops_at_once(start: list[Process]) -> None:
    process = Process("busy")
    start.append(process)
    process.popen.send_signal(signal.SIGINT)
    time.sleep(1.2)  # longer than an echo of a launcher
    process.popen.send_signal(signal.SIGINT)
    assert process.end() != 0
    assert "KeyboardInterrupt" in process.errors
    assert not any(line.startswith("saved") for line in process.lines)


def test_echo_of_a_launcher_is_the_same_ctrl_c(start: list[Process]) -> None:
    process = Process("quick")
    start.append(process)
    process.wait_for("step 3")
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.popen.send_signal(number)
    assert process.end() == 0
    assert process.work[-1] == "saved after SIGINT"


def _send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs the handler between two instructions


def test_flag_without_a_poll() -> None:
    with Interrupts() as interrupts:
        assert not interrupts.requested
        assert not interrupts.poll()
        assert interrupts.reason == ""
        _send(signal.SIGTERM)
        assert interrupts.requested
        assert interrupts.poll()
        assert interrupts.exit_code == 0


def test_handlers_come_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    with contextlib.suppress(ValueError), Interrupts(notify=lambda text: None):
        assert [signal.getsignal(number) for number in numbers] != before
        raise ValueError("inside")
    assert [signal.getsignal(number) for number in numbers] == before
    after = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(after)
    assert after == wakeup
    assert not any(thread.name == "interrupt-notices" for thread in threading.enumerate())


def test_a_late_sigusr1_does_not_end_a_process_that_is_done() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with Interrupts(last=True):
            pass
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN  # its default action would end this process
        _send(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("error", [RuntimeError("gloo: Connection closed by peer"), RankLostError("rank 1 is gone")])
def test_a_rank_lost_to_sigusr1_asks_for_a_requeue(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal ends ranks without a handler; those that have one must not take it for a crash."""
    with Interrupts() as interrupts:
        monkeypatch.setattr(session, "SKEW_S", 0.0)
        with pytest.raises(type(error)), session.requeue_if_signalled(interrupts):
            raise error  # without a signal it is a crash
        monkeypatch.setattr(session, "SKEW_S", 30.0)
        late = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
        late.start()
        with pytest.raises(session.RequeueError) as raised, session.requeue_if_signalled(interrupts):
            raise error
        assert raised.value.exit_code == REQUEUE_EXIT_CODE
        late.join()
        with pytest.raises(ValueError, match="own"), session.requeue_if_signalled(interrupts):
            raise ValueError("its own")


class Ranks:
    """Two ranks in one process: `any_rank` gives what rank 0 says or the other rank said."""

    def __init__(self, other: bool = False, other_requeues: bool = False) -> None:
        self.other = [other, other_requeues]
        self.asked: list[bool] = []

    def any_rank(self, flag: bool) -> bool:
        self.asked.append(flag)
        return flag or self.other[len(self.asked) - 1] if len(self.asked) <= 2 else flag


def test_signal_of_another_rank_stops_this_one() -> None:
    ranks = Ranks(other=True)
    with Interrupts(ranks.any_rank) as interrupts:
        assert not interrupts.requested
        assert interrupts.poll()
        assert interrupts.reason == "another rank"
        assert interrupts.exit_code == 0


def test_requeue_of_another_rank_is_the_exit_code_here() -> None:
    ranks = Ranks(other=True, other_requeues=True)
    with Interrupts(ranks.any_rank) as interrupts:
        assert interrupts.poll()
        assert interrupts.exit_code == REQUEUE_EXIT_CODE


def test_own_signal_is_put_to_the_ranks_and_asked_once() -> None:
    ranks = Ranks()
    with Interrupts(ranks.any_rank) as interrupts:
        _send(signal.SIGUSR1)
        assert interrupts.poll()
        assert interrupts.poll()
        assert ranks.asked == [True, True]  # stop? requeue? and no collective after that
        assert interrupts.exit_code == REQUEUE_EXIT_CODE


def test_flag_is_not_believed_before_the_ranks_agree() -> None:
    """A rank that saw a signal after the collective began must go on with the others until the next poll."""
    with Interrupts(lambda flag: False) as interrupts:
        _send(signal.SIGTERM)
        assert interrupts.requested
        assert not interrupts.poll()
        assert interrupts.exit_code == 0


def test_only_in_the_main_thread() -> None:
    failures: list[str] = []

    def enter() -> None:
        try:
            with Interrupts():
                pass
        except RuntimeError as error:
            failures.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failures == ["signal handlers can only be installed in the main thread"]
