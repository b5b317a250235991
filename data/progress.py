"""A live display of a preparation, for a terminal, and plain lines for everything else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from data.preparation import Progress, ProgressCallback

LINE_INTERVAL_S = 15.0
_TITLES = {
    "wait": "Waiting for another process that prepares the same corpus",
    "tokenizer": "Training the tokenizer",
    "tokenize": "Tokenising",
}


@contextmanager
def show_progress(console: Console | None = None) -> Iterator[ProgressCallback]:
    """A callback for `data.preparation` that shows what it is told; nothing appears before its first call."""
    console = console or Console(stderr=True)
    if console.is_terminal:
        with _Bars(console) as bars:
            yield bars.update
    else:
        yield _Lines(console).update


class _Bars:
    """One bar a stage, with time left."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            TaskProgressColumn(),
            TextColumn("{task.fields[what]}"),
        )
        self.bar = Bar(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
        self.tasks: dict[str, tuple[TaskID, Progress, float]] = {}

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, progress: Progress) -> None:
        if progress.stage not in self.tasks:
            self.bar.start()
            task = self.bar.add_task(_TITLES[progress.stage], total=None, what="")
            self.tasks[progress.stage] = task, progress, time.monotonic()
        task, first, begin = self.tasks[progress.stage]
        fraction = progress.fraction
        total = None if fraction is None else 1.0
        self.bar.update(task, total=total, completed=fraction or 0.0, what=amounts(progress, first, begin))


class _Lines:
    """A line at the beginning and end of a stage, and now and then between them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage, self.first, self.begin, self.last = "", Progress("wait", None, 0, 0, 0), 0.0, 0.0

    def update(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage != self.stage:
            self.stage, self.first, self.begin, self.last = progress.stage, progress, now, now
            self.console.print(f"{_TITLES[progress.stage]} ...", highlight=False)
        elif progress.stage != "wait" and (progress.fraction == 1.0 or now - self.last > LINE_INTERVAL_S):
            self.last = now
            share = "" if progress.fraction is None else f"{progress.fraction:.0%}, "
            words = amounts(progress, self.first, self.begin)
            self.console.print(f"{_TITLES[progress.stage]}: {share}{words}", highlight=False)


def amounts(progress: Progress, first: Progress, begin: float) -> str:
    """What has been done so far, and how fast since `first` was reported at `begin`."""
    if progress.stage == "wait":
        return ""
    seconds = max(time.monotonic() - begin, 1e-3)
    if not progress.tokens:
        return f"{progress.num_bytes / 1e6:.1f} MB of text"
    speed = (progress.tokens - first.tokens) / seconds
    return f"{progress.documents:,} documents, {progress.tokens / 1e6:.2f} M tokens, {speed / 1e6:.2f} M tokens/s"
