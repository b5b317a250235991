"""What the attention bench times: implementations by name, the calls into them, and how they are timed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from kernels.attention.dispatch import PATH_ENV
from scripts.bench_cells import Cell

Attention = Callable[[Tensor, Tensor, Tensor, Cell], Tensor]
"""q, k, v of the cell's shape, and the cell, whose mask it applies, to the output of that shape."""

L2_FLUSH_BYTES = 256 * 2**20
HEAD_START_CYCLES = 4_000_000
"""The device spins about two milliseconds before each measured call, so that the host has queued all of it by then: the
device alone is timed. ``--host`` times the host."""


@contextlib.contextmanager
def forced_path(name: str) -> Iterator[None]:
    """``FLASH_ATTN_PATH`` for the duration, as the dispatcher reads it at every call."""
    before = os.environ.get(PATH_ENV)
    os.environ[PATH_ENV] = name
    try:
        yield
    finally:
        os.environ.pop(PATH_ENV)
        if before is not None:
            os.environ[PATH_ENV] = before


@contextlib.contextmanager
def restored(tables: Sequence[dict[Any, Any]]) -> Iterator[None]:
    """Tile tables that may be changed, as they were before afterwards. What was planned for others is forgotten."""
    from kernels.attention import op

    before = [dict(table) for table in tables]
    op.forget()
    try:
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.update(old)
        op.forget()


@contextlib.contextmanager
def hopper_tiles(changes: dict[str, Any]) -> Iterator[None]:
    """The Hopper path's tile tables with these fields changed for every width. ``candidate``: the name of one of
    tuning.FORWARD_CANDIDATES, which takes the forward's place for every length at the widths that have it."""
    from kernels.attention.hopper import tuning

    name = changes.get("candidate")
    candidates = {width: tiles[name] for width, tiles in tuning.FORWARD_CANDIDATES.items() if name in tiles}
    if name is not None and not candidates:
        names = set().union(*tuning.FORWARD_CANDIDATES.values())
        raise ValueError(f"no forward candidate {name!r}; there are {sorted(names)}")
    tables: tuple[dict[int, Any], ...] = (tuning.FORWARD, tuning.FORWARD_LONG, tuning.BACKWARD)
    known = {f.name for table in tables for tile in table.values() for f in dataclasses.fields(tile)}
    if unknown := set(changes) - known - {"candidate"}:
        raise ValueError(f"hopper has no tile parameter {sorted(unknown)}; it has {sorted(known)}")
    with restored(tables):
        for table in tables:
            for width, shipped in table.items():
                tile = shipped if table is tuning.BACKWARD else candidates.get(width, shipped)
                mine = {f.name: changes[f.name] for f in dataclasses.fields(tile) if f.name in changes}
                table[width] = dataclasses.replace(tile, **mine)
        yield


@contextlib.contextmanager
def portable_tiles(changes: dict[str, Any]) -> Iterator[None]:
    """The portable path's tile tables with these fields, ``<forward | dq | dkdv>_<field of Tile>``, changed for every
    width and architecture."""
    from kernels.attention.portable import tuning

    tables = (tuning.HOPPER, tuning.HOPPER_SHORT, tuning.AMPERE, tuning.DROPOUT)
    fields = [f.name for f in dataclasses.fields(tuning.Tile)]
    known = {f"{kernel}_{field}": (kernel, field) for kernel in tuning.HOPPER for field in fields}
    if unknown := set(changes) - set(known):
        raise ValueError(f"portable has no tile parameter {sorted(unknown)}; it has {sorted(known)}")
    with restored(tables):
        for table in tables:
            for name, value in changes.items():
                kernel, field = known[name]
                if kernel not in table:
                    continue
                table[kernel] = tuple(dataclasses.replace(tile, **{field: value}) for tile in table[kernel])
        yield


TILES: dict[str, Callable[[dict[str, Any]], contextlib.AbstractContextManager[None]]] = {
    "portable": portable_tiles,
    "hopper": hopper_tiles,
}
"""Paths whose tiles a specification may change."""


def refuse_masks(name: str, cell: Cell, *, window: bool = False) -> None:
    """Refuse what the named implementation doesn't have; ``window``: it has windows."""
    if cell.documents is not None:
        raise ValueError(f"{name} has no documents of different lengths")
    if cell.window is not None and not window:
        raise ValueError(f"{name} has no window")


@functools.lru_cache(maxsize=1)
def _offsets(documents: tuple[int, ...], device: str) -> Tensor:
    """Where each document begins and the last one ends, (number + 1,) int32: made before the call that is timed."""
    return torch.tensor((0, *documents), device=device).cumsum(0, dtype=torch.int32)


def ours(q: Tensor, k: Tensor, v: Tensor, cell: Cell) -> Tensor:
    import kernels

    window = (-1, -1) if cell.window is None else (cell.window - 1, 0)
    if cell.documents is None:
        return kernels.flash_attn_func(q, k, v, causal=cell.causal, window_size=window)
    offsets, longest = _offsets(cell.documents, q.device.type), max(cell.documents)
    out = kernels.flash_attn_varlen_func(
        q[0], k[0], v[0], offsets, offsets, longest, longest, causal=cell.causal, window_size=window
    )
    return out[None]


def flash1(q: Tensor, k: Tensor, v: Tensor, cell: Cell) -> Tensor:
    from kernels.attention.flash1 import flash1_attn_func

    refuse_masks("flash1", cell)
    return flash1_attn_func(q, k, v, causal=cell.causal)


def standard(q: Tensor, k: Tensor, v: Tensor, cell: Cell) -> Tensor:
    from kernels.attention.standard import standard_attention

    refuse_masks("standard", cell, window=True)
    window = (-1, -1) if cell.window is None else (cell.window - 1, 0)
    return standard_attention(q, k, v, causal=cell.causal, window_size=window)


def sdpa(q: Tensor, k: Tensor, v: Tensor, cell: Cell, backend: str | None = None) -> Tensor:
    """PyTorch's, which wants (B, H, S, D)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    refuse_masks("sdpa", cell)
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext():
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=cell.causal).transpose(1, 2)


@functools.lru_cache(maxsize=1)
def _flex(cell: Cell, device: str) -> Callable[..., Tensor]:
    import torch._dynamo
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Beyond this many geometries dynamo would go on uncompiled, with all scores in memory.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 2**20
    return functools.partial(
        torch.compile(flex_attention, dynamic=False), block_mask=_flex_mask(cell, device, create_block_mask)
    )


def _flex_mask(cell: Cell, device: str, create_block_mask: Callable[..., Any]) -> Any:
    """The cell's mask in FlexAttention's form; None where every score is visible."""
    window = cell.window

    def below_diagonal(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    def sliding(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window)

    masks: list[Callable[..., Tensor]] = []
    if cell.causal:
        masks.append(below_diagonal if window is None else sliding)
    if cell.documents is not None:
        number = torch.arange(len(cell.documents), device=device)
        document = number.repeat_interleave(torch.tensor(cell.documents, device=device))  # (tokens,)

        def same_document(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return document[i] == document[j]

        masks.append(same_document)
    if not masks:
        return None
    from torch.nn.attention.flex_attention import and_masks

    tokens = cell.shape[1]
    mask = masks[0] if len(masks) == 1 else and_masks(*masks)
    return create_block_mask(mask, None, None, tokens, tokens, device=device)


def flex(q: Tensor, k: Tensor, v: Tensor, cell: Cell) -> Tensor:
    attention = _flex(cell, q.device.type)
    return attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


IMPLEMENTATIONS: dict[str, Attention] = {
    "portable": ours,
    "hopper": ours,
    "flash1": flash1,
    "standard": standard,
    "sdpa": sdpa,
    "sdpa_flash": functools.partial(sdpa, backend="FLASH_ATTENTION"),
    "sdpa_cudnn": functools.partial(sdpa, backend="CUDNN_ATTENTION"),
    "flex": flex,
}


def parse_implementation(spec: str) -> tuple[Attention, Callable[[], contextlib.AbstractContextManager[None]]]:
    """(function, context to run it in) of ``name``, ``portable[field=value,...]`` or ``hopper[field=value,...]``."""
    match = re.fullmatch(r"(\w+)(?:\[(.*)\])?", spec)
    if match is None or match[1] not in IMPLEMENTATIONS or (match[2] is not None and match[1] not in TILES):
        names = (*IMPLEMENTATIONS, *(f"{path}[field=value,...]" for path in TILES))
        raise ValueError(f"no implementation {spec!r}; there are {', '.join(names)}")
    name, fields = match[1], match[2]
    try:
        changes = {k: json.loads(v) for k, v in (pair.split("=") for pair in (fields or "").split(",") if pair)}
    except ValueError as error:
        raise ValueError(f'{spec!r}: fields are field=value,... with values as in JSON: 64, true, "tall"') from error

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if name in TILES:
                stack.enter_context(forced_path(name))
            if changes:
                stack.enter_context(TILES[name](changes))
            yield

    return IMPLEMENTATIONS[name], context


# ---- calls and their time
# ----------------------------------------------------------------------------------------------


class Timer:
    """Milliseconds of a call on the device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda") if self.cuda else None

    def __call__(self, call: Callable[[], Any], repeats: int) -> list[float]:
        if self.flush is None:
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e3)
            return times
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in events:
            torch.cuda._sleep(HEAD_START_CYCLES)
            self.flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]


def make_call(attention: Attention, cell: Cell, direction: str, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """What is timed, on random normal inputs (zeros would draw less power and run faster)."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(cell.shape, device=device, dtype=dtype) for _ in range(4))
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return attention(q, k, v, cell)

        return forward
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attention(q, k, v, cell)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


# ---- FlexAttention compiled ahead
# -----------------------------------------------------------------------------------------------


def compile_flex_ahead(
    problems: Sequence[tuple[Cell, str]], device: str, dtype: torch.dtype, processes: int
) -> list[str]:
    """Compile FlexAttention for every (cell, direction) in parallel, into Inductor's cache on disk, where this
    process then finds the very kernels that it would have compiled itself, one after the other.

    Returns:
        Why a problem could not be compiled, of each that couldn't: it is compiled again, and fails, in its turn.
    """
    spawn = multiprocessing.get_context("spawn")  # a forked process can't use CUDA
    failures = []
    with ProcessPoolExecutor(min(processes, len(problems)), spawn, initializer=_compile_alone) as pool:
        pending = [pool.submit(_compile_flex, cell, direction, device, dtype) for cell, direction in problems]
        for (cell, direction), done in zip(problems, pending, strict=True):
            if error := done.exception():
                failures.append(f"{cell} {direction}: {first_line(error)}")
    return failures


def _compile_alone() -> None:
    """One thread for the compiler of this process: the others have the other processors."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1


def _compile_flex(cell: Cell, direction: str, device: str, dtype: torch.dtype) -> None:
    make_call(flex, cell, direction, device, dtype)()


def first_line(error: BaseException) -> str:
    """Of its message, at most 200 characters."""
    return str(error).strip().split("\n")[0][:200]
