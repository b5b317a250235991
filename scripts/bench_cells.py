"""What the attention bench measures and finds: its cells, their work, its results and cost ratios."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Sequence

BLOCK = 128
"""Queries and keys of a block in :meth:`Cell.blocks`, for every implementation alike."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One problem of the grid: q, k, v of (batch, seqlen, heads, head_dim)."""

    head_dim: int
    causal: bool
    seqlen: int
    batch: int
    heads: int
    window: int | None = None
    """Keys that a query sees, its own the last of them; None: no limit. Causal only."""
    documents: tuple[int, ...] | None = None
    """Lengths of documents packed into one row, none longer than ``seqlen``; then q, k, v are
    (1, sum of the lengths, heads, head_dim). None: sequences of one length."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of q, k and v."""
        if self.documents is not None:
            return 1, sum(self.documents), self.heads, self.head_dim
        return self.batch, self.seqlen, self.heads, self.head_dim

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of every sequence."""
        return (self.seqlen,) * self.batch if self.documents is None else self.documents

    def scores(self) -> float:
        """Visible scores of one head: S^2, half of it when causal, as the field counts; exact with a window."""
        return sum(self._scores(length) for length in self.lengths)

    def _scores(self, length: int) -> float:
        if self.window is None:
            return length**2 * (0.5 if self.causal else 1.0)
        seen = min(self.window, length)
        return seen * length - seen * (seen - 1) / 2  # the first queries see fewer keys

    def flops(self, direction: str) -> float:
        forward = 4.0 * self.scores() * self.head_dim * self.heads
        return forward if direction == "forward" else 2.5 * forward

    def blocks(self) -> int:
        """Blocks of scores of one head that hold a visible one."""
        return sum(self._blocks(length) for length in self.lengths)

    def _blocks(self, length: int) -> int:
        count = -(-length // BLOCK)
        total = 0
        for i in range(count):
            first = 0 if self.window is None else max(0, i * BLOCK - self.window + 1) // BLOCK
            last = i if self.causal else count - 1
            total += last - first + 1
        return total

    def score_bytes(self) -> float:
        """What standard attention takes for its scores: fp32 and a 16-bit copy of them."""
        return 6.0 * self.seqlen**2 * self.heads * self.batch

    def __str__(self) -> str:
        text = f"D={self.head_dim} {'causal' if self.causal else 'full'} S={self.seqlen}"
        if self.window is not None:
            text += f" window={self.window}"
        if self.documents is not None:
            text = text.replace("S=", f"{len(self.documents)} documents S<=")
        return text


@dataclasses.dataclass(frozen=True)
class Result:
    """One implementation in one cell and direction."""

    implementation: str
    direction: str
    head_dim: int
    causal: bool
    seqlen: int
    batch: int
    heads: int
    window: int | None
    documents: tuple[int, ...] | None
    median_ms: float
    low_ms: float
    """First quartile."""
    high_ms: float
    """Third quartile."""
    tflops: float
    error: str = ""
    """Why there is no number (then the times are nan, and null in the JSON)."""

    @property
    def cell(self) -> Cell:
        return Cell(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Cell)})


def result_of(spec: str, cell: Cell, direction: str, times: Sequence[float], error: str) -> Result:
    """From the milliseconds of each call."""
    median = statistics.median(times) if times else float("nan")
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (median, median, median)
    return Result(
        implementation=spec,
        direction=direction,
        **{field.name: getattr(cell, field.name) for field in dataclasses.fields(Cell)},
        median_ms=median,
        low_ms=low,
        high_ms=high,
        tflops=cell.flops(direction) / median / 1e9,
        error=error,
    )


@dataclasses.dataclass(frozen=True)
class Cost:
    """Time of a cell beside that of its dense one, per block of scores that each must visit."""

    implementation: str
    direction: str
    cell: str
    dense_cell: str
    time_ratio: float
    """Time of the cell over that of the dense one."""
    block_ratio: float
    """Blocks that the cell must visit over those of the dense one."""
    cost_ratio: float
    """``time_ratio / block_ratio``: 1 where a block costs the same in both."""


def costs_of(results: Sequence[Result], dense_of: dict[Cell, Cell]) -> list[Cost]:
    """Of every result whose cell has a dense one; a missing time is left out."""
    times = {(r.cell, r.direction, r.implementation): r.median_ms for r in results if not r.error}
    costs = []
    for (cell, direction, spec), ms in times.items():
        dense = dense_of.get(cell)
        if dense is None or (dense, direction, spec) not in times:
            continue
        time_ratio = ms / times[dense, direction, spec]
        block_ratio = cell.blocks() / dense.blocks()
        costs.append(Cost(spec, direction, str(cell), str(dense), time_ratio, block_ratio, time_ratio / block_ratio))
    return costs


def random_documents(longest: int, tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths, uniform from 1 to ``longest``, that add up to ``tokens``: the last is what was left."""
    draw = random.Random(f"{seed} {longest} {tokens}")
    lengths: list[int] = []
    left = tokens
    while left:
        lengths.append(min(left, draw.randint(1, longest)))
        left -= lengths[-1]
    return tuple(lengths)


def dense_grid(
    head_dims: Sequence[int], masks: Sequence[bool], seqlens: Sequence[int], tokens: int, hidden: int
) -> list[Cell]:
    """Cells of a fixed number of tokens and a fixed width; ``masks``: causal or not."""
    return [
        Cell(d, causal, s, tokens // s, hidden // d)
        for d in head_dims
        for causal in masks
        for s in seqlens
        if s <= tokens
    ]


def windowed(cells: Sequence[Cell], window: int) -> dict[Cell, Cell]:
    """The cells that a window shortens, with it, and the dense cell of each."""
    return {dataclasses.replace(cell, window=window): cell for cell in cells if cell.seqlen > window}


def ragged(cells: Sequence[Cell]) -> dict[Cell, Cell]:
    """Of each cell one with a token more in every sequence and one with as many tokens in documents of
    random lengths, and their dense cell."""
    found: dict[Cell, Cell] = {}
    for cell in cells:
        documents = random_documents(cell.seqlen, cell.seqlen * cell.batch)
        found[dataclasses.replace(cell, seqlen=cell.seqlen + 1)] = cell
        found[dataclasses.replace(cell, batch=1, documents=documents)] = cell
    return found
