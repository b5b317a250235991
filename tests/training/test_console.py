"""What reaches the terminal and what the log, with real file descriptors in processes of their own."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import UserError
from training.console import (
    MAX_ERROR_LINES,
    RunSummary,
    Terminal,
    _Log,
    _Stamped,
    make_console,
    print_summary,
    report_error,
    short_path,
)
from training.hardware import Peak
from training.metrics import Throughput
from training.run import RunFolder

PROLOGUE = """
import ctypes, logging, os, subprocess, sys, threading, warnings
from pathlib import Path
from configs.errors import UserError
from training.console import open_terminal
"""


def run(tmp_path: Path, body: str, rank: int = 0, after: str = "") -> tuple[subprocess.CompletedProcess[str], str]:
    """Run `body` inside `open_terminal`; returns the finished process and the log's text."""
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    log = tmp_path / "run" / "run.log"
    code = f"{PROLOGUE}\nwith open_terminal(Path({str(log)!r}), rank={rank}) as terminal:\n{indented}{after}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return done, log.read_text()


def test_everything_of_libraries_goes_to_the_log(tmp_path: Path) -> None:
    body = """
early = logging.getLogger("library")  # like DeepSpeed's logger: its own handler, nothing passed on
early.propagate = False
early.addHandler(logging.StreamHandler(sys.stdout))
early.warning("own handler")
print("python print")
print("python error", file=sys.stderr)
logging.getLogger("transformers").warning("root handler")
warnings.warn("deprecated thing", FutureWarning)
os.write(1, b"descriptor one\\n")
os.write(2, b"descriptor two\\n")
ctypes.CDLL(None).puts(b"C print")
ctypes.CDLL(None).fflush(None)
subprocess.run(["echo", "child process"])
sys.stderr.write("10%\\r")
sys.stderr.write("50%\\r100%\\n")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(); thread.join()
terminal.say("ours [bold]")
"""
    done, log = run(tmp_path, body)
    assert done.returncode == 0
    assert done.stdout == "ours [bold]\n"
    assert done.stderr == ""
    for text in ("own handler", "python print", "python error", "root handler", "deprecated thing", "descriptor one",
                 "descriptor two", "C print", "child process", "ZeroDivisionError"):  # fmt: skip
        assert text in log, text
    stamp = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank 0 "
    assert re.search(stamp + r"stdout \| python print$", log, re.MULTILINE)
    assert re.search(stamp + r"stderr \| 100%$", log, re.MULTILINE)
    assert re.search(stamp + r"WARNING transformers \| root handler$", log, re.MULTILINE)
    assert "50%" not in log


def test_warnings_of_ours_are_shown(tmp_path: Path) -> None:
    body = """
logging.getLogger("training.metrics").error("peak [is] too low")
logging.getLogger("data.loader").warning("short corpus")
logging.getLogger("model").info("details")
logging.getLogger("modelling").warning("not ours")
"""
    done, log = run(tmp_path, body)
    assert done.stdout == "error: peak [is] too low\nwarning: short corpus\n"
    assert all(text in log for text in ("peak [is] too low", "short corpus", "details", "not ours"))


def test_descriptors_come_back_and_what_comes_at_exit_does_not(tmp_path: Path) -> None:
    body = """
import atexit
atexit.register(lambda: print("goodbye of a library"))
atexit.register(lambda: os.write(2, b"goodbye from C\\n"))
held = sys.stdout
"""
    after = """
print("after", flush=True)
held.write("through an old reference\\n"); held.flush()
subprocess.run(["echo", "child after"])
logging.getLogger("training").warning("no handler of ours any more")
"""
    done, log = run(tmp_path, body, after=after)
    assert done.stdout == "after\nthrough an old reference\nchild after\n"
    assert done.stderr == "no handler of ours any more\n"
    assert "goodbye of a library" in log
    assert "goodbye from C" in log


def test_user_error(tmp_path: Path) -> None:
    done, log = run(tmp_path, 'raise UserError("data.path=x does not exist [y].\\nGive another one.")')
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: data.path=x does not exist [y].\nGive another one.\n"
    assert "Traceback" in log
    assert "UserError: data.path=x" in log


def test_unexpected_error(tmp_path: Path) -> None:
    done, log = run(tmp_path, 'raise RuntimeError("line\\n" * 100)')
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert lines[0] == "error: RuntimeError: line"
    assert len(lines) <= 25
    assert "81 more lines" in done.stderr
    assert str(tmp_path / "run" / "run.log") in lines[-1]
    assert "Traceback" not in done.stderr
    assert log.count("| line") >= 99


def test_ctrl_c_and_exit_codes(tmp_path: Path) -> None:
    done, log = run(tmp_path, "raise KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
    assert "Traceback" in log
    done, _ = run(tmp_path, "sys.exit(75)")
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")


def test_crash_in_c_is_in_the_log(tmp_path: Path) -> None:
    done, log = run(tmp_path, "import faulthandler; print('before'); faulthandler._sigsegv()")
    assert done.returncode < 0
    assert done.stdout == done.stderr == ""
    assert "before" in log
    assert "Segmentation fault" in log


def test_other_ranks_are_silent_but_for_errors(tmp_path: Path) -> None:
    body = """
terminal.say("said")
terminal.warn("warned")
logging.getLogger("training").error("logged")
print("printed")
raise UserError("wrong\\nvery")
"""
    done, log = run(tmp_path, body, rank=3)
    assert (done.stdout, done.stderr) == ("", "error: (rank 3) wrong\n")
    assert "rank 3 stdout | printed" in log
    assert "rank 3 ERROR training | logged" in log


def test_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    body = """
print("lost"); print("lost too")
logging.getLogger("x").warning("lost as well")
terminal.say("still here")
"""
    code = f"{PROLOGUE}\nwith open_terminal(Path('/dev/full')) as terminal:\n" + "".join(
        f"    {line}\n" for line in body.strip().splitlines()
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("warning: /dev/full can't be written any more")
    assert lines[1] == "still here"


def test_lines_of_two_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    logs = [_Log(path, 0), _Log(path, 1)]
    for log in logs * 50:
        log.line("stdout", "x" * 300)
    assert all(re.fullmatch(r".* rank [01] stdout \| x{300}", line) for line in path.read_text().splitlines())
    assert len(path.read_text().splitlines()) == 100
    for log in logs:
        os.close(log.fd)


def test_redrawn_lines_leave_their_last_state(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    log = _Log(path, 0)
    stream = _Stamped(log, "stderr", sys.stderr)
    for part in ("1%\r", "2%", "\r3%\r", "4% done", "\nnext", " line\r\n", "unfinished"):
        stream.write(part)
    for _ in range(1000):
        stream.write("\rredrawn for hours")
        assert len(stream._partial) < 50  # nothing piles up
    stream.write("\runfinished")
    stream.release()
    texts = [line.partition("| ")[2] for line in path.read_text().splitlines()]
    assert texts == ["4% done", "next line", "unfinished"]
    os.close(log.fd)


def test_error_before_there_is_a_log() -> None:
    out = io.StringIO()
    assert report_error(UserError("bad key"), Console(file=out)) == 2
    assert out.getvalue() == "error: bad key\n"
    out = io.StringIO()
    full = OSError(errno.ENOSPC, "No space left on device", "/from/a", None, "/to/b")
    assert report_error(full, Console(file=out), Path("run.log")) == 2
    assert "No space left on device: /to/b. What was saved is kept" in out.getvalue()
    assert "traceback" not in out.getvalue()
    out = io.StringIO()
    report_error(UserError("\n".join(map(str, range(MAX_ERROR_LINES)))), Console(file=out))
    assert len(out.getvalue().splitlines()) == MAX_ERROR_LINES
    assert "more lines" not in out.getvalue()


def test_long_lines_are_not_broken() -> None:
    out = io.StringIO()
    terminal = Terminal(make_console(out), Path("run.log"))
    terminal.say("word " * 60)
    assert out.getvalue().count("\n") == 1


def test_short_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_path(tmp_path / "runs" / "a") == "runs/a"
    assert short_path(Path("/elsewhere/a")) == "/elsewhere/a"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=width), tmp_path / "run.log")
    command = "python train.py " + "experiment=quickstart train.steps=2000 " * 3
    summary = RunSummary(
        headline="1,000 steps in 4 min",
        folder=RunFolder(tmp_path / "runs" / "quickstart"),
        val_loss=3.21987,
        val_perplexity=25.02,
        val_bits_per_byte=1.3279,
        throughput=Throughput(90, 12_345.6, 6_172.8, 0.05, 0.049, 0.001, 0.3, 0.382, 0.331),
        peak=Peak(0.8, "measured", "CPU", "best fp32 matrix product"),
        world_size=2,
        checkpoint=tmp_path / "runs" / "quickstart" / "checkpoints" / "step_00001000",
        wandb_note="offline",
        next_steps=[("longer", command.strip())],
    )
    print_summary(terminal, summary)
    text = out.getvalue()
    squeezed = " ".join(text.split())
    for part in ("3.2199", "1.3279", "12,346", "38.2%", "49.0", "measured", "1,000 steps"):
        assert part in squeezed, part
    lines = [line.strip() for line in text.splitlines()]
    assert any(line.endswith("runs/quickstart/checkpoints/step_00001000") for line in lines)
    assert any(line.endswith(command.strip()) for line in lines)  # in one piece, to be copied


def test_summary_leaves_out_what_is_unknown(tmp_path: Path) -> None:
    out = io.StringIO()
    print_summary(Terminal(Console(file=out), tmp_path / "run.log"), RunSummary("stopped", RunFolder(tmp_path)))
    assert "None" not in out.getvalue()
    assert "MFU" not in out.getvalue()
    silent = io.StringIO()
    print_summary(Terminal(Console(file=silent), tmp_path / "run.log", rank=1), RunSummary("x", RunFolder(tmp_path)))
    assert silent.getvalue() == ""
