"""The terminal is ours, the log has the rest.

While `open_terminal` runs, file descriptors 1 and 2 of the process lead to `run.log` in the run folder: whatever
libraries log, warn or print, from Python, from C or from a child process, lands there and survives a crash, since no
thread or pipe stands between. Python's own output gets a time, the rank and its source in front of each line. What a
user should see is written to a duplicate of the terminal that only this module holds.

An exception that leaves the block becomes a few lines on the terminal; its traceback goes to the log. Records of our
own loggers from WARNING on are shown as well.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import faulthandler
import io
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Final, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleDimensions
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table

from configs.errors import INTERRUPTED_EXIT_CODE, UserError
from training.run import RunFolder

if TYPE_CHECKING:  # torch takes seconds to import, and the terminal comes first
    from training.hardware import Peak
    from training.metrics import Throughput

OUR_PACKAGES: Final = frozenset({"train", "training", "model", "data", "kernels", "configs", "scripts", "__main__"})
"""Top-level names of the loggers whose warnings a user sees."""
MAX_ERROR_LINES: Final = 20
"""Longest message of an error on the terminal; the log has all of it."""

DISK_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""A disk that takes no more; nothing in the program is wrong."""

_TIME = "%Y-%m-%d %H:%M:%S"


class Terminal:
    """What the user sees, and the log beside it. Only rank 0 speaks; errors speak on every rank."""

    def __init__(self, console: Console, log_path: Path, rank: int = 0) -> None:
        self.console = console
        self.log_path = log_path
        self.rank = rank

    def say(self, text: str) -> None:
        """A line of plain text; rank 0 only. The terminal wraps long lines, so that they can be copied."""
        if self.rank == 0:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that begins with `warning:`; rank 0 only."""
        if self.rank == 0:
            self.console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


class _SizedConsole(Console):
    """rich asks descriptors 0 to 2 for the terminal's size, but 1 and 2 lead to the log; this asks the terminal."""

    @property
    def size(self) -> ConsoleDimensions:
        if self._width is None and self.is_terminal:
            with contextlib.suppress(OSError):  # not a terminal after all (forced colours): rich's own way
                columns, lines = os.get_terminal_size(self.file.fileno())
                return ConsoleDimensions(columns or 80, lines or 25)
        return super().size

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


def make_console(file: IO[str] | None = None, quiet: bool = False) -> Console:
    """A console on `file`. None: on standard output."""
    return _SizedConsole(file=file, quiet=quiet, highlight=False)


class _Log:
    """run.log, opened for appending: each line is one write, so the lines of several ranks don't mix."""

    def __init__(self, path: Path, rank: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._rank = rank
        self._lost = False
        self.lost_message = f"{path} can't be written any more"
        self.on_loss: logging.Handler | None = None

    def line(self, source: str, text: str) -> None:
        """Append `text`, each of its lines with the time, the rank and its source in front."""
        front = f"{time.strftime(_TIME)} rank {self._rank} {source} | "
        lines = "".join(f"{front}{part}\n" for part in text.splitlines() or [""])
        try:
            os.write(self.fd, lines.encode("utf-8", "backslashreplace"))
        except OSError as error:  # a full disk must not end a run that could still save elsewhere
            if not self._lost:
                self._lost = True
                if self.on_loss is not None:
                    text = f"{self.lost_message}: {error.strerror}"
                    self.on_loss.emit(
                        logging.makeLogRecord({"msg": text, "name": __name__, "levelno": logging.WARNING})
                    )


class _Stamped(io.TextIOBase):
    """Stands in for sys.stdout or sys.stderr: whole lines go to the log; of a redrawn line (\\r) only its last state.

    Libraries keep a reference to it, so after `release` it passes everything on to the stream it stood in for.
    """

    def __init__(self, log: _Log, source: str, stood_for: TextIO) -> None:
        self._log = log
        self._source = source
        self._stood_for = stood_for
        self._partial = ""
        self._released = False
        self._lock = threading.RLock()  # a signal handler may print while the main thread does

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    @property
    def buffer(self) -> BinaryIO:
        return self._stood_for.buffer

    def fileno(self) -> int:
        return self._stood_for.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._released:
            return self._stood_for.write(text)
        with self._lock:
            *lines, rest = (self._partial + text).split("\n")
            self._partial = rest.rpartition("\r")[2] if not rest.endswith("\r") else rest[rest.rfind("\r", 0, -1) + 1 :]
            for line in lines:
                self._log.line(self._source, line.rstrip("\r").rpartition("\r")[2])
        return len(text)

    def flush(self) -> None:
        if self._released:
            self._stood_for.flush()

    def release(self) -> None:
        """Write out what is left and step aside."""
        with self._lock:
            if self._partial:
                self._log.line(self._source, self._partial)
            self._partial = ""
            self._released = True


class _LogHandler(logging.Handler):
    """Records of all loggers into the log, with their tracebacks."""

    def __init__(self, log: _Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log.line(f"{record.levelname} {record.name}", self.format(record))
        except Exception:  # noqa: BLE001 - logging's contract: a record that can't be formatted must not end the program
            self.handleError(record)


class _TerminalHandler(logging.Handler):
    """Warnings and errors of our own packages onto the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self._terminal = terminal
        self.addFilter(lambda record: record.name.partition(".")[0] in OUR_PACKAGES)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR:
            self._terminal.warn(record.getMessage())
        elif self._terminal.rank == 0:
            self._terminal.console.print(f"[bold red]error:[/] {escape(record.getMessage())}", soft_wrap=True)


@contextlib.contextmanager
def open_terminal(log_path: Path, rank: int = 0) -> Iterator[Terminal]:
    """Take the terminal; send everything else to `log_path`.

    An exception that leaves the block is told in a few lines, with its traceback in the log, and becomes SystemExit:
    the code of a `UserError`, 130 for KeyboardInterrupt, else 1. Imports of noisy libraries belong inside.
    """
    log = _Log(log_path, rank)
    with contextlib.ExitStack() as stack:
        stack.callback(_silence_exit, log)
        screen, complaints = _redirect_descriptors(log, stack)
        console = make_console(screen, quiet=rank != 0)
        terminal = Terminal(console, log_path, rank)
        on_screen = _TerminalHandler(terminal)
        log.on_loss = on_screen
        _redirect_python(log, on_screen, stack)
        try:
            yield terminal
        except (SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - every way to fail ends as a message and an exit code
            log.line("ERROR", "".join(traceback.format_exception(error)))
            raise SystemExit(report_error(error, make_console(complaints), log_path, rank)) from None


class _Screen(io.FileIO):
    """What a terminal's stream writes to. Its reader may go (`| head`, a closed window), its disk may be full: then the
    text is lost, and not the run, which has its log and its metrics."""

    def write(self, text: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(text) or 0
        return memoryview(text).nbytes


def _redirect_descriptors(log: _Log, stack: contextlib.ExitStack) -> tuple[IO[str], IO[str]]:
    """Lead descriptors 1 and 2 to the log until the stack closes; returns text streams on what they were before."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    streams: list[IO[str]] = []
    for number in (1, 2):
        before = os.dup(number)
        screen = io.BufferedWriter(_Screen(os.dup(before), "w"))
        streams.append(io.TextIOWrapper(screen, encoding=encoding, errors="replace", line_buffering=True))
        stack.callback(streams[-1].close)
        stack.callback(os.close, before)
        stack.callback(os.dup2, before, number)
        os.dup2(log.fd, number)
    return streams[0], streams[1]


def _redirect_python(log: _Log, on_screen: logging.Handler, stack: contextlib.ExitStack) -> None:
    """Lead sys.stdout, sys.stderr, logging, warnings and crash tracebacks to the log until the stack closes."""
    for name, redirect in (("stdout", contextlib.redirect_stdout), ("stderr", contextlib.redirect_stderr)):
        stamped = _Stamped(log, name, getattr(sys, name))
        stack.enter_context(redirect(stamped))
        stack.callback(stamped.release)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = [_LogHandler(log), on_screen]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    stack.callback(logging.captureWarnings, False)
    stack.callback(root.setLevel, level)
    stack.callback(setattr, root, "handlers", handlers)
    if not faulthandler.is_enabled():
        faulthandler.enable(log.fd)
        stack.callback(faulthandler.disable)


def _silence_exit(log: _Log) -> None:
    """Lead the descriptors to the log again when the interpreter exits: libraries say goodbye from atexit hooks.

    Hooks run last in, first out, so this one precedes those that were registered during the run. The log's descriptor
    stays open for it, and for streams that libraries hold.
    """

    def again() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fd, 1)
        os.dup2(log.fd, 2)

    atexit.register(again)


def report_error(error: BaseException, console: Console, log_path: Path | None = None, rank: int = 0) -> int:
    """Tell the user about `error` in at most `MAX_ERROR_LINES` + 2 lines. Returns the exit code.

    A `UserError` is its own text, and so is what a full or read-only disk says. Of anything else the type and the
    message are shown, and where the traceback is.
    Ranks other than 0 say one line: as a rule the others fail for the same reason.
    """
    if isinstance(error, KeyboardInterrupt):
        if rank == 0:
            console.print("Interrupted.", soft_wrap=True)
        return INTERRUPTED_EXIT_CODE
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        error = UserError(disk_problem(error))
    text = str(error).strip()
    if not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    lines = [line for part in (text, *getattr(error, "__notes__", ())) for line in part.splitlines()]
    if rank != 0:
        lines = [f"(rank {rank}) {lines[0]}"]
    elif len(lines) > MAX_ERROR_LINES:
        lines = [*lines[: MAX_ERROR_LINES - 1], f"... {len(lines) - MAX_ERROR_LINES + 1} more lines"]
    console.print(f"[bold red]error:[/] {escape(chr(10).join(lines))}", soft_wrap=True)
    if log_path is not None and rank == 0 and not isinstance(error, UserError):
        console.print(f"The traceback is in {escape(short_path(log_path))}", soft_wrap=True)
    return error.exit_code if isinstance(error, UserError) else 1


def disk_problem(error: OSError) -> str:
    """What a disk refused, where, and what to do."""
    place = error.filename2 or error.filename  # of a copy, where it goes
    where = f": {short_path(Path(os.fsdecode(place)))}" if place is not None else ""
    return f"{error.strerror}{where}. What was saved is kept; make room, and the same command goes on."


def short_path(path: Path) -> str:
    """`path` relative to the working directory if it lies in it, else as it is."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)


@dataclass(frozen=True)
class RunSummary:
    """What the end of a run says."""

    headline: str
    """For example "1,000 steps in 4 min 12 s"."""
    folder: RunFolder
    train_loss: float | None = None
    """Nats per token."""
    val_loss: float | None = None
    """Nats per token."""
    val_perplexity: float | None = None
    val_bits_per_byte: float | None = None
    throughput: Throughput | None = None
    peak: Peak | None = None
    world_size: int = 1
    checkpoint: Path | None = None
    wandb_note: str = ""
    next_steps: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """(what it does, command) pairs."""


def print_summary(terminal: Terminal, summary: RunSummary) -> None:
    """Results, where things are, and what to run next. Paths and commands stand on lines of their own, to be copied."""
    if terminal.rank != 0:
        return
    console = terminal.console
    console.print(Rule(f"[bold]{escape(summary.headline)}", style="green"))
    console.print(_results_table(summary))
    for label, place in _places(summary, terminal.log_path):
        console.print(f"  [dim]{label:<12}[/] {escape(place)}", soft_wrap=True)
    if summary.next_steps:
        console.print("\n[bold]Next[/]")
        width = max(len(what) for what, _ in summary.next_steps)
        for what, command in summary.next_steps:
            console.print(f"  {what:<{width}}  [cyan]{escape(command)}[/]", soft_wrap=True)


def _results_table(summary: RunSummary) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(justify="left", style="dim")
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(justify="left")
    for label, value, unit in _results(summary):
        table.add_row(f"  {label}", value, unit)
    return table


def _results(summary: RunSummary) -> Iterator[tuple[str, str, str]]:
    if summary.train_loss is not None:
        yield "training loss", f"{summary.train_loss:.4f}", "nats per token"
    if summary.val_loss is not None:
        perplexity = "" if summary.val_perplexity is None else f" (perplexity {summary.val_perplexity:,.2f})"
        yield "validation loss", f"{summary.val_loss:.4f}", f"nats per token{perplexity}"
    if summary.val_bits_per_byte is not None:
        yield "", f"{summary.val_bits_per_byte:.4f}", "bits per byte of text"
    if summary.throughput is None:
        return
    throughput = summary.throughput
    devices = "" if summary.world_size == 1 else f", {throughput.tokens_per_s_per_gpu:,.0f} a device"
    yield "speed", f"{throughput.tokens_per_s:,.0f}", f"tokens/s{devices}"
    yield "step time", f"{throughput.step_time_median_s * 1e3:,.1f}", "ms (median)"
    if throughput.mfu is not None:
        causal = "" if throughput.mfu_causal is None else f" ({throughput.mfu_causal:.1%} counting attention causally)"
        yield "MFU", f"{throughput.mfu:.1%}", f"{throughput.model_tflops:,.4g} TFLOP/s a device{causal}"
    if summary.peak is not None:
        yield "peak", f"{summary.peak.tflops:,.4g}", f"TFLOP/s, {summary.peak.source}: {summary.peak.note}"


def _places(summary: RunSummary, log_path: Path) -> Iterator[tuple[str, str]]:
    folder = summary.folder
    yield "run folder", short_path(folder.path)
    if summary.checkpoint is not None:
        yield "checkpoint", short_path(summary.checkpoint)
    yield "metrics", short_path(folder.metrics)
    if folder.curves.exists():
        yield "curves", short_path(folder.curves)
    yield "log", short_path(log_path)
    if summary.wandb_note:
        yield "wandb", summary.wandb_note
