"""What a user sees while a run goes on: a live bar on a terminal, a line an interval elsewhere.

The bar stands on the last line; events (an evaluation, a checkpoint, a sampled text) are printed above it and stay. It
is drawn anew at the terminal's width each time, and what doesn't fit is left out from the right, so resizing the window
can't break it. Where output is a file, a pipe or a dumb terminal there are only lines, without control characters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from configs.schema import Toggle
from training import metrics as m
from training.console import Terminal

_REFRESH_PER_S: Final = 4.0
_LONGEST_BAR: Final = 30
_SHORTEST_BAR: Final = 8


def format_duration(seconds: float) -> str:
    """Time for people: `42 s`, `3 min 07 s`, `2 h 05 min`, `3 d 04 h`."""
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"


def format_count(value: float) -> str:
    """Three or four digits and a unit: `842`, `12.3k`, `4.56M`."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    return f"{value:,.0f}"


class Eta:
    """Time left, from the wall clock since the first step: what isn't training counts here, since one waits for it."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._first: tuple[int, float] | None = None
        self._latest: tuple[int, float] | None = None

    def update(self, step: int, now_s: float) -> None:
        """Step `step` ended at `now_s`. The first one, which compiles, only sets the clock."""
        if self._first is None:
            self._first = (step, now_s)
        self._latest = (step, now_s)

    def seconds_left(self, now_s: float) -> float | None:
        """Seconds from `now_s` to the end of the last step; None before there is anything to go by."""
        if self._first is None or self._latest is None or self._latest[0] <= self._first[0]:
            return None
        (first, start_s), (latest, latest_s) = self._first, self._latest
        per_step_s = (latest_s - start_s) / (latest - first)
        return max(0.0, (self._total - latest) * per_step_s - (now_s - latest_s))


class _Bar:
    """The bar's line, drawn for the width it is given."""

    def __init__(self, total_steps: int, step: int) -> None:
        self.total_steps = total_steps
        self.step = step
        self.fields: list[str] = []
        self.status = ""
        self.eta = Eta(total_steps)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = "  ".join(self._parts(options.max_width - _SHORTEST_BAR - 2) or self._parts(options.max_width - 1))
        width = min(_LONGEST_BAR, options.max_width - len(text) - 2)
        line = Table.grid(padding=(0, 1))
        cells: list[ProgressBar | Text] = [Text(text, no_wrap=True, overflow="ellipsis")]
        if width >= _SHORTEST_BAR:
            cells.insert(
                0, ProgressBar(total=max(1, self.total_steps), completed=self.step, width=width, complete_style="cyan")
            )
        line.add_row(*cells)
        yield line

    def _parts(self, width: int) -> list[str]:
        """What fits into `width`, chosen by importance, in the order of reading; empty if not even the count fits."""
        left_s = self.eta.seconds_left(time.monotonic())
        left = "" if left_s is None else f"{format_duration(left_s)} left"
        reading = [f"{self.step:,}/{self.total_steps:,}", self.status, *self.fields, left]
        importance = [reading[0], self.status, left, *self.fields]
        kept: list[str] = []
        for part in filter(None, importance):
            if len("  ".join([*kept, part])) > width:
                break
            kept.append(part)
        return [part for part in reading if part in kept]


class Progress:
    """Progress of a run on its terminal; a context manager.

    Args:
        terminal: where to draw. On ranks other than 0 nothing is shown.
        total_steps: steps of the whole run.
        initial_step: steps already done (after a resume).
        mode: `logging.progress`. auto: live on a terminal; on: live anywhere; off: lines.
    """

    def __init__(
        self, terminal: Terminal, total_steps: int, *, initial_step: int = 0, mode: Toggle = Toggle.auto
    ) -> None:
        self._terminal = terminal
        self._console = terminal.console
        self._bar = _Bar(total_steps, initial_step)
        able = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live: Live | None = None
        if terminal.rank == 0 and (mode is Toggle.on or (mode is Toggle.auto and able)):
            self._live = Live(
                self._bar,
                console=self._console,
                refresh_per_second=_REFRESH_PER_S,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    @property
    def is_live(self) -> bool:
        """Whether there is a bar."""
        return self._live is not None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, step: int) -> None:
        """`step` steps are done. Cheap: the bar is redrawn by a thread a few times a second."""
        self._bar.step = step
        self._bar.eta.update(step, time.monotonic())

    def report(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Show the metrics of a logged step: on the bar, or as a line."""
        fields = _fields(metrics)
        if self._live is not None:
            self._bar.fields = fields
            return
        left_s = self._bar.eta.seconds_left(time.monotonic())
        left = [] if left_s is None else [f"{format_duration(left_s)} left"]
        self._terminal.say("  ".join([f"step {step:,}/{self._bar.total_steps:,}", *fields, *left]))

    def event(self, text: str) -> None:
        """A line that stays: above the bar, or between the lines. Can be called from another thread."""
        self._terminal.say(text)

    def evaluation(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """A line with the result of an evaluation."""
        loss, perplexity, bits = (metrics.get(k) for k in (m.VAL_LOSS, m.VAL_PERPLEXITY, m.VAL_BITS_PER_BYTE))
        parts = [f"step {step:,}: validation loss {loss:.4f}" if loss is not None else f"step {step:,}: evaluated"]
        if perplexity is not None:
            parts.append(f"perplexity {perplexity:,.2f}")
        if bits is not None:
            parts.append(f"{bits:.4f} bits per byte")
        self.event(", ".join(parts))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A sampled text, indented, its prompt in bold. Control characters are shown, not obeyed."""
        if self._terminal.rank != 0:
            return
        shown = Text(_visible(prompt + text))
        shown.stylize("bold", 0, len(prompt))
        self._console.print(f"[dim]step {step:,}: sample[/]")
        for line in shown.split("\n"):
            self._console.print(Text.assemble(("  │ ", "dim"), line), soft_wrap=True)

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Show what the run is doing (`evaluating`, `saving`) on the bar while the block runs."""
        self._bar.status = text
        try:
            yield
        finally:
            self._bar.status = ""


def _fields(metrics: Mapping[str, float | None]) -> list[str]:
    """Loss, speed and MFU as far as they are known, the most important first."""
    shown: list[tuple[str, Callable[[float], str]]] = [
        (m.TRAIN_LOSS, lambda x: f"loss {x:.4f}"),
        (m.TOKENS_PER_S, lambda x: f"{format_count(x)} tok/s"),
        (m.MFU, lambda x: f"MFU {x:.1%}"),
        (m.LR, lambda x: f"lr {x:.2e}"),
        (m.GRAD_NORM, lambda x: f"|g| {x:.2f}"),
    ]
    return [show(value) for key, show in shown if (value := metrics.get(key)) is not None]


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\t\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
