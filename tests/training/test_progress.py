"""The bar on a (pseudo-)terminal, resized under way, and the lines elsewhere."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console

from configs.schema import Toggle
from training import metrics as m
from training.console import Terminal
from training.progress import Eta, Progress, _Bar, format_count, format_duration

METRICS = {
    m.TRAIN_LOSS: 3.14159,
    m.TOKENS_PER_S: 12_345.6,
    m.MFU: 0.382,
    m.LR: 6e-4,
    m.GRAD_NORM: 1.234,
    m.DATA_WAIT: None,
}


def lines_of(mode: Toggle = Toggle.auto, rank: int = 0) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(Terminal(Console(file=out, quiet=rank != 0), Path("run.log"), rank), 1000, mode=mode), out


def test_plain_lines_without_control_characters() -> None:
    progress, out = lines_of()
    with progress:
        assert not progress.is_live
        for step in range(1, 21):
            progress.advance(step)
            if step % 10 == 0:
                progress.report(step, METRICS)
        with progress.status("evaluating"):
            pass
        progress.evaluation(20, {m.VAL_LOSS: 3.2, m.VAL_PERPLEXITY: 24.53, m.VAL_BITS_PER_BYTE: 1.25})
        progress.event("checkpoint saved: [x]")
        progress.sample(20, "def ", "f[x]:\n\treturn \x1b[31m\x07")
    lines = out.getvalue().splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("step 10/1,000  loss 3.1416  12.35k tok/s  MFU 38.2%  lr 6.00e-04  |g| 1.23")
    assert lines[1].endswith(" left")
    assert lines[2] == "step 20: validation loss 3.2000, perplexity 24.53, 1.2500 bits per byte"
    assert lines[3] == "checkpoint saved: [x]"
    assert lines[5] == "  │ def f[x]:"
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", out.getvalue())


def test_unknown_metrics_are_left_out() -> None:
    progress, out = lines_of()
    with progress:
        progress.report(1, {m.TRAIN_LOSS: 3.0, m.MFU: None})
    assert out.getvalue() == "step 1/1,000  loss 3.0000\n"


def test_other_ranks_show_nothing() -> None:
    progress, out = lines_of(Toggle.on, rank=1)
    with progress:
        progress.advance(1)
        progress.report(1, METRICS)
        progress.event("x")
        progress.sample(1, "a", "b")
    assert not progress.is_live
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("mode", "terminal", "term", "live"),
    [
        (Toggle.auto, True, "xterm", True),
        (Toggle.auto, True, "dumb", False),
        (Toggle.auto, False, "xterm", False),
        (Toggle.on, False, "xterm", True),
        (Toggle.off, True, "xterm", False),
    ],
)
def test_when_there_is_a_bar(mode: Toggle, terminal: bool, term: str, live: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, _environ={"TERM": term})
    assert Progress(Terminal(console, Path("run.log")), 10, mode=mode).is_live is live


@pytest.mark.parametrize("width", [10, 25, 40, 60, 80, 120, 250])
def test_bar_is_one_line_at_any_width(width: int) -> None:
    bar = _Bar(100_000, 45_678)
    bar.fields = ["loss 3.1416", "12.3k tok/s", "MFU 38.2%", "lr 6.00e-04", "|g| 1.23"]
    bar.status = "evaluating"
    bar.eta.update(45_676, time.monotonic() - 20)
    bar.eta.update(45_677, time.monotonic() - 10)
    bar.eta.update(45_678, time.monotonic())
    out = io.StringIO()
    Console(file=out, width=width).print(bar)
    lines = out.getvalue().rstrip("\n").split("\n")
    assert len(lines) == 1
    assert len(lines[0]) <= width
    if width >= 25:
        assert "45,678/100,000" in lines[0]
    if width >= 60:
        assert "evaluating" in lines[0]
        assert "6 d 06 h left" in lines[0]
    if width >= 120:
        assert all(field in lines[0] for field in bar.fields)
        assert lines[0].index("loss") < lines[0].index("MFU") < lines[0].index("left")


DEMO = """
import time
from pathlib import Path
from training.console import open_terminal
from training.progress import Progress
with open_terminal(Path("run.log")) as terminal, Progress(terminal, 60) as progress:
    for step in range(1, 61):
        time.sleep(0.05)
        progress.advance(step)
        if step % 5 == 0:
            progress.report(step, {"train/loss": 4.0 - step / 100, "perf/tokens_per_s": 54321.0, "perf/mfu": 0.5})
        if step == 20:
            print("a library's print")
            progress.event("checkpoint saved")
"""


def test_live_bar_on_a_terminal_that_is_resized(tmp_path: Path) -> None:
    main, other = pty.openpty()

    def resize(columns: int) -> None:
        fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    resize(110)
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "CI")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", DEMO], stdin=other, stdout=other, stderr=other, cwd=tmp_path, env=environment
    )
    os.close(other)
    seen = b""
    resized = False
    while select.select([main], [], [], 20.0)[0]:
        try:
            seen += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not resized and re.search(rb"\b2\d/60", seen):
            resize(44)
            resized = True
    os.close(main)
    assert process.wait(timeout=20) == 0
    text = seen.decode()
    frames = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame) for frame in re.split(r"\r|\n", text)]
    wide = [frame for frame in frames if re.search(r"\b1\d/60", frame)]
    narrow = [frame for frame in frames if re.search(r"\b[45]\d/60", frame)]  # a few frames after the change
    assert wide
    assert any("loss 3.9" in frame and "54.32k tok/s" in frame and "MFU 50.0%" in frame for frame in wide)
    assert any("left" in frame for frame in wide)
    assert narrow
    assert max(len(frame) for frame in narrow) <= 44
    assert frames.count("checkpoint saved") == 1  # a line of its own, above the bar
    assert "a library's print" not in text
    assert "a library's print" in (tmp_path / "run.log").read_text()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def test_eta_counts_everything_but_the_first_step() -> None:
    eta = Eta(total_steps=100)
    assert eta.seconds_left(0.0) is None
    eta.update(1, 60.0)  # compiled for a minute
    assert eta.seconds_left(60.0) is None
    eta.update(2, 62.0)
    assert eta.seconds_left(62.0) == pytest.approx(98 * 2.0)
    eta.update(12, 102.0)  # an evaluation in between
    assert eta.seconds_left(102.0) == pytest.approx(88 * 42 / 11)
    assert eta.seconds_left(103.0) == pytest.approx(88 * 42 / 11 - 1)
    eta.update(100, 500.0)
    assert eta.seconds_left(501.0) == 0.0


def test_eta_after_a_resume() -> None:
    eta = Eta(total_steps=1000)
    for step in range(501, 512):
        eta.update(step, float(step))
    assert eta.seconds_left(511.0) == pytest.approx(489)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (187, "3 min 07 s"),
        (7500, "2 h 05 min"),
        (273_600, "3 d 04 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(842.4, "842"), (9_999, "9,999"), (12_345, "12.35k"), (4_560_000, "4.56M"), (2.5e9, "2.5G")]
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text
