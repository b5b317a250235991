"""Processes that end with the tool that started them, and signals that end its trials only."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from training import children
from training.children import Stop, child

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 2:
    subprocess.Popen([sys.executable, *sys.argv[:2]], start_new_session=True)
open(sys.argv[1] + str(len(sys.argv)), "w").close()
time.sleep(600)
"""


def test_a_child_ends_with_its_descendants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of which one is a session of its own, as torchrun's ranks are, and neither heeds SIGTERM."""
    monkeypatch.setattr(children, "PATIENCE_S", 0.2)
    script, mark = tmp_path / "stubborn.py", tmp_path / "mark"
    script.write_text(STUBBORN)
    with child([sys.executable, str(script), str(mark), "parent"]) as process:
        while not (tmp_path / "mark2").exists() or not (tmp_path / "mark3").exists():
            time.sleep(0.01)
        family = children.family(process.pid)
        assert len(family) == 2
    assert process.returncode == -signal.SIGKILL
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]


def test_a_child_may_end_by_itself() -> None:
    with child([sys.executable, "-c", "print('done')"], stdout=subprocess.PIPE) as process:
        printed, _ = process.communicate()
    assert (printed, process.returncode) == ("done\n", 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_the_trials_and_no_other_anything(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    done = []
    with Stop() as stop:
        with stop.trials():
            try:
                os.kill(os.getpid(), number)
                done.append("trial")
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # while processes are ended
                done.append("cleared")
        os.kill(os.getpid(), signal.SIGINT)
        done.append("report")
    assert done == ["cleared", "report"]
    assert (stop.signal, stop.exit_code) == (number, code)
    assert signal.getsignal(number) is before


def test_a_signal_after_the_trials_waits_for_the_report() -> None:
    with Stop() as stop:
        with stop.trials():
            pass
        assert stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.exit_code == 130


def test_errors_of_trials_and_ignored_signals_stay_what_they_are() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop, stop.trials():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.exit_code == 0
    for error in (KeyboardInterrupt, ZeroDivisionError):  # the first not by a signal that `Stop` has seen
        with pytest.raises(error), Stop() as stop, stop.trials():
            raise error
