"""Processes that end with the tool that started them, and signals that end its trials only."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

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

LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)
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
    assert not any(map(children.is_alive, family))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_descendants_end_though_the_child_has_ended_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: signal.Signals
) -> None:
    """As a launcher that is killed leaves its ranks: to the system, in sessions of their own."""
    monkeypatch.setattr(children, "PATIENCE_S", 0.2)
    script, mark = tmp_path / "stubborn.py", tmp_path / "mark"
    script.write_text(STUBBORN)
    outer = [sys.executable, "-c", LAUNCHER, str(script), str(mark)]
    with child(outer) as process:
        while not (tmp_path / "mark2").exists():
            time.sleep(0.01)
        left = children.family(process.pid)[1:]
        assert len(left) == 1
        process.send_signal(how)
        process.wait()
        assert children.is_alive(left[0])
        assert children.family(process.pid) == []
    assert process.returncode == -how
    assert not any(map(children.is_alive, left))


def test_a_child_whose_start_is_interrupted_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a signal that comes when it runs already, before anyone has it in hand."""
    started = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(psutil.Process(self.pid))
            raise KeyboardInterrupt

    monkeypatch.setattr(children.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt), child([sys.executable, "-c", "import time; time.sleep(600)"]):
        raise AssertionError("never comes here")
    assert len(started) == 1
    assert not children.is_alive(started[0])


def test_a_child_within_a_child_is_of_both(tmp_path: Path) -> None:
    """A tool that is killed leaves what its own trials started to the one that started it."""
    code = (
        "import sys, time; from training.children import child\n"
        "with child([sys.executable, '-c', 'import time; time.sleep(600)']) as inner:\n"
        "    print(inner.pid, flush=True); time.sleep(600)"
    )
    root = Path(__file__).parents[2]
    with child([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        inner = psutil.Process(int(process.stdout.readline()))
        process.kill()
        process.wait()
        assert children.is_alive(inner)
    assert not children.is_alive(inner)


def test_a_child_that_is_just_being_started_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux shows an empty environment between a process's start and its program's."""
    environ, empty = psutil.Process.environ, [3]

    def late(self: psutil.Process) -> dict[str, str]:
        if self.pid == started.pid and empty[0]:
            empty[0] -= 1
            return {}
        return environ(self)

    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(command, env={**os.environ, children.MARKS: "one two"}) as started:
        monkeypatch.setattr(psutil.Process, "environ", late)
        found = [process.pid for process in children.marked("two")]
        started.kill()
    assert found == [started.pid]
    assert empty == [0]


def test_others_are_left_alone() -> None:
    with child([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        with child([sys.executable, "-c", "pass"]) as process:
            process.wait()
        assert other.poll() is None


def test_a_child_may_end_by_itself() -> None:
    with child([sys.executable, "-c", "print('done')"], stdout=subprocess.PIPE) as process:
        printed, _ = process.communicate()
    assert (printed, process.returncode) == ("done\n", 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_the_trials_and_no_other_anything(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    done = []

    def trials() -> None:
        try:
            os.kill(os.getpid(), number)
            done.append("trial")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # while processes are ended
            done.append("cleared")

    with Stop() as stop:
        stop.trials(trials)
        os.kill(os.getpid(), signal.SIGINT)
        done.append("report")
    assert done == ["cleared", "report"]
    assert (stop.signal, stop.exit_code) == (number, code)
    assert signal.getsignal(number) is before


def test_a_signal_after_the_trials_waits_for_the_report() -> None:
    with Stop() as stop:
        stop.trials(lambda: None)
        assert stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.exit_code == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_trials_leaves_the_report(number: signal.Signals, code: int) -> None:
    done = []
    with Stop() as stop:
        os.kill(os.getpid(), number)
        stop.trials(lambda: done.append("trial"))
        done.append("report")
    assert (done, stop.exit_code) == (["report"], code)


def test_errors_of_trials_and_ignored_signals_stay_what_they_are() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            stop.trials(lambda: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.exit_code == 0

    def fail(error: type[BaseException]) -> None:
        raise error

    for error in (KeyboardInterrupt, ZeroDivisionError):  # the first not by a signal that `Stop` has seen
        with pytest.raises(error), Stop() as stop:
            stop.trials(partial(fail, error))
