"""Hangs and lost ranks; whole runs that meet them are in tests/runs/test_faults.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from configs.errors import UserError
from training import backstop, children, watchdog
from training.backstop import Backstop
from training.distributed import Processes
from training.watchdog import (
    GONE,
    HANG_EXIT_CODE,
    LOST_EXIT_CODE,
    Loss,
    Peers,
    Watchdog,
    _Line,
    accept_all,
    of_collective,
    stacks,
)

SCRIPT = """
import ctypes, logging, sys, time
from training import watchdog

logging.basicConfig(level=logging.INFO, stream=sys.stdout)
watchdog.HANG_GRACE_S, watchdog.BACKSTOP_S, watchdog.COMPILE_S = 0.2, 0.3, 2.0
{setup}

def stuck(dog):
    {body}

with watchdog.Watchdog({minutes}) as dog:
    stuck(dog)
print("got to the end", flush=True)
"""


def run(body: str, *, minutes: float = 0.01, setup: str = "") -> subprocess.CompletedProcess[str]:
    """`body` under a watchdog, by default one of 0.6 s, in a process of its own."""
    script = SCRIPT.format(body=body, minutes=minutes, setup=setup)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


def test_a_hang_ends_with_stacks_and_a_code_of_its_own() -> None:
    result = run("dog.beat(); time.sleep(30)")
    assert result.returncode == HANG_EXIT_CODE, result.stderr
    assert "No step for 0.01 minutes" in result.stdout
    assert "train.watchdog_minutes" in result.stdout
    assert "in stuck" in result.stdout


def test_a_hang_that_holds_pythons_lock_ends_as_well() -> None:
    """`PyDLL` keeps the lock during the call, so no other thread of Python runs."""
    result = run("dog.beat(); time.sleep(0.3); ctypes.PyDLL(None).sleep(30)")
    assert result.returncode == -signal.SIGALRM
    assert "gave no sign of life" in result.stderr
    assert "in stuck" in result.stderr


@pytest.mark.parametrize(
    ("whole", "then", "code"),
    [
        (True, "pass", 0),
        (False, "pass", 0),
        (True, "time.sleep(30)", HANG_EXIT_CODE),
        (False, "ctypes.PyDLL(None).sleep(30)", -signal.SIGALRM),
    ],
)
def test_a_run_that_was_stopped_goes_on(whole: bool, then: str, code: int) -> None:
    """After three times what even the backstop allows; later hangs are found as ever. `whole`: all its processes are
    stopped, as by SLURM, and else it alone."""
    step = "[time.sleep(0.02) for _ in range(15)]; dog.beat(); "  # no sleep that is over as it wakes
    body = f"dog.beat(); print('working', flush=True); {step}{step}"
    script = SCRIPT.format(body=body + then, minutes=0.01, setup="")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        send = os.killpg if whole else os.kill
        send(process.pid, signal.SIGSTOP)
        time.sleep(3.3)
        send(process.pid, signal.SIGCONT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    assert ("got to the end" in out) == (code == 0)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)", "pass"])
def test_nothing_is_left_of_the_backstop(end: str) -> None:
    """However the run ends, and also while a fork of it lives on with the pipe."""
    setup = "import os, psutil, signal"
    body = "dog.beat(); time.sleep(0.2); print(psutil.Process().children()[0].pid, flush=True)\n"
    body += "    (os.fork() or time.sleep(20) or os._exit(0))\n" if "kill" in end else ""
    script = SCRIPT.format(body=body + f"    {end}", minutes=0.01, setup=setup)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True, start_new_session=True) as process:  # fmt: skip
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.wait(timeout=20)
        children.wait_for(children.family(pid))
        assert not any(map(children.is_alive, children.family(pid)))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_without_room_for_another_process_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(backstop.subprocess, "Popen", fail)
    before = signal.getsignal(signal.SIGALRM)
    with Backstop(1.0, 0.1) as one:
        one.alive()
    assert "no further process starts" in caplog.text
    assert signal.getsignal(signal.SIGALRM) == before


def test_which_processes_are_stopped() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not backstop.is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while not backstop.is_stopped(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert backstop.is_stopped(process.pid)
        process.kill()
    assert not backstop.is_stopped(process.pid)  # gone


def test_signals_to_all_processes_leave_the_backstop() -> None:
    setup = "import psutil, signal"
    signals = "for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP): one.send_signal(n)"
    body = f"dog.beat(); time.sleep(0.2); one = psutil.Process().children()[0]\n    {signals}\n"
    result = run(body + "    time.sleep(0.1); ctypes.PyDLL(None).sleep(30)", setup=setup)
    assert result.returncode == -signal.SIGALRM, result.stdout + result.stderr
    killed = run(body + "    one.kill(); [(dog.beat(), time.sleep(0.05)) for _ in range(24)]", setup=setup)
    assert (killed.returncode, killed.stdout.strip()) == (0, "got to the end"), killed.stdout + killed.stderr


NO_ALARM = """
    dog.compiling(); time.sleep(1.0)                     # the limit of what compiles is longer
    for _ in range(24): dog.beat(); time.sleep(0.05)     # work
    with watchdog.Watchdog(0.01): time.sleep(1.0); dog.beat()  # nothing watched yet
    with watchdog.Watchdog(0) as off: off.beat(); time.sleep(0.5)
    dog.beat(); time.sleep(0.1)
"""


def test_no_false_alarm() -> None:
    result = run(NO_ALARM, minutes=0.02)
    assert (result.returncode, result.stdout.strip()) == (0, "got to the end"), result.stdout + result.stderr


def test_compiling_has_a_limit_too() -> None:
    assert run("dog.compiling(); time.sleep(30)").returncode == HANG_EXIT_CODE


def test_a_beat_is_cheap() -> None:
    dog = Watchdog(30)
    begin = time.perf_counter()
    for _ in range(10_000):
        dog.beat()
    assert time.perf_counter() - begin < 0.5  # 50 us each would be, on the slowest machine


def test_stacks_name_all_threads() -> None:
    release = threading.Event()

    def waiting_in_a_thread() -> None:
        release.wait(20)

    thread = threading.Thread(target=waiting_in_a_thread)
    thread.start()
    try:
        text = stacks()
    finally:
        release.set()
        thread.join()
    assert "in waiting_in_a_thread" in text
    assert "in test_stacks_name_all_threads" in text


# Lines between ranks


def pair() -> tuple[_Line, _Line]:
    left, right = socket.socketpair()
    return _Line(Tcp(left), 1, "near"), _Line(Tcp(right), 2, "far")


class Tcp:
    """A socket of a pair, which has no TCP options."""

    def __init__(self, plain: socket.socket) -> None:
        self.plain = plain

    def setsockopt(self, *_: Any) -> None:
        return

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


def test_the_end_of_a_line_is_a_loss_but_for_a_goodbye() -> None:
    near, far = pair()
    near.send({"bye": True})
    near.close()
    assert far.receive() is None
    assert far.ended
    near, far = pair()
    near.close()
    assert far.receive() == Loss(2, "far", GONE)
    assert far.ended


def test_messages_arrive_in_pieces() -> None:
    near, far = pair()
    loss = Loss(5, "gpu7", "has failed: ValueError: x")
    text = json.dumps({"bye": True, "loss": loss.__dict__}).encode() + b"\n"
    near.socket.sendall(text[:20])
    assert far.receive() is None
    near.socket.sendall(text[20:])
    assert far.receive() == loss
    assert far.ended
    assert str(loss).startswith("Rank 5 on gpu7 has failed: ValueError: x. ")


def test_strangers_are_turned_away(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    clients = [socket.create_connection(server.getsockname()) for _ in range(3)]
    clients[0].sendall(b'{"secret": "guess", "rank": 1, "host": "evil"}\n')
    clients[1].sendall(b"GET / HTTP/1.1\r\n")
    clients[2].sendall(b'{"secret": "s3cret", "rank": 1, "host": "good"}\n')
    lines = accept_all(server, 2, "s3cret")
    assert {rank: line.host for rank, line in lines.items()} == {1: "good"}
    assert caplog.text.count("no rank of this run was turned away") == 2
    monkeypatch.setattr(watchdog, "CONNECT_S", 0.1)
    with pytest.raises(TimeoutError):
        accept_all(server, 2, "s3cret")
    for one in [*clients, server, *(line.socket for line in lines.values())]:
        one.close()


def test_which_errors_are_a_collectives() -> None:
    assert of_collective(RuntimeError("[/pytorch/third_party/gloo/pair.cc:534] Connection closed by peer"))
    assert of_collective(dist.DistBackendError("NCCL error: remote process exited"))
    assert not of_collective(ValueError("the card has fallen off"))
    outer = UserError("the checkpoint failed")
    outer.__cause__ = RuntimeError("gloo: Connection reset")
    assert of_collective(outer)


LEAVE = """
import logging, sys, threading, time
from types import SimpleNamespace
from configs.errors import OutOfMemoryError
from training import watchdog

logging.basicConfig(level=logging.INFO, stream=sys.stdout)
watchdog.GRACE_S, watchdog.ENDING_S = 0.1, {ending_s}
peers = watchdog.Peers(SimpleNamespace(rank=0, world_size=2, is_main=True))
peers._lines = {{1: SimpleNamespace(rank=1, send=lambda message: None, close=lambda: None)}}
{before}
peers._note(watchdog.Loss(1, "far", "has failed: ValueError: x"))
time.sleep({then_s})
print("came to its end", flush=True)
sys.exit(5)
"""


@pytest.mark.parametrize(
    ("before", "ending_s", "then_s", "code"),
    [
        ("", 30, 60, LOST_EXIT_CODE),  # in a collective
        ("peers.ending()", 30, 1.0, 5),  # longer than the grace, and by itself
        ("peers.ending()", 0.5, 60, LOST_EXIT_CODE),  # not for ever
        ("peers.ending(); peers.__exit__(None, OutOfMemoryError('x'), None)", 0.5, 60, 3),  # with an error of its own
    ],
)
def test_how_a_rank_leaves_when_another_has_failed(before: str, ending_s: float, then_s: float, code: int) -> None:
    script = LEAVE.format(before=before, ending_s=ending_s, then_s=then_s)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    assert ("Rank 1 on far has failed" in result.stdout) == (code == LOST_EXIT_CODE)
    assert ("came to its end" in result.stdout) == (code == 5)


def test_one_process_watches_nobody(processes: Processes) -> None:
    before = threading.active_count()
    with Peers(processes) as peers:
        assert threading.active_count() == before
    assert peers.lost is None
