"""Time attention implementations side by side: ``python scripts/bench_attention.py``.

Every cell of the grid is measured for all implementations in one process, in alternating order, median over
repeats, with the L2 cache flushed in between. Prints one table and writes JSON and PNG files beside each
other.

    bench_attention.py                  the anchor grid: 16k tokens, H*D = 2048
    bench_attention.py --implementations portable sdpa_cudnn --seqlens 1024 8192 --head-dims 128
    bench_attention.py --implementations hopper 'hopper[block_m=192,stages=2,consumer_regs=160]' --head-dims 64
    bench_attention.py --implementations portable 'portable[forward_block_n=64,dkdv_stages=2]' --head-dims 128
    bench_attention.py --ablation       what each of the paper's ideas brings
    bench_attention.py --memory         memory against S, beside standard attention
    bench_attention.py --host           host time per call
    bench_attention.py --device cpu --tokens 256 --hidden 128 --seqlens 64 128 --head-dims 32

FLOPs: forward 4 S^2 D H B, halved when causal; backward 2.5 times that. Backward is ``torch.autograd.grad``
on a retained graph, so every kernel of it counts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernels.attention.dispatch import PATH_ENV

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
DEFAULT_CUDA = ("portable", "hopper", "sdpa_cudnn", "sdpa_flash", "flex")
DEFAULT_CPU = ("sdpa", "standard")
STANDARD_LIMIT_BYTES = 16 * 2**30
"""Standard attention is left out where its score matrices alone would take more than this."""
L2_FLUSH_BYTES = 256 * 2**20
HEAD_START_CYCLES = 4_000_000
"""The device spins about two milliseconds before each measured call, so that the host has queued all of it by then: the
device alone is timed. ``--host`` times the host."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One problem of the grid."""

    head_dim: int
    causal: bool
    seqlen: int
    batch: int
    heads: int

    def flops(self, direction: str) -> float:
        forward = 4.0 * self.seqlen**2 * self.head_dim * self.heads * self.batch * (0.5 if self.causal else 1.0)
        return forward if direction == "forward" else 2.5 * forward

    def __str__(self) -> str:
        return f"D={self.head_dim} {'causal' if self.causal else 'full'} S={self.seqlen}"


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
    median_ms: float
    low_ms: float
    """First quartile."""
    high_ms: float
    """Third quartile."""
    tflops: float
    error: str = ""
    """Why there is no number (then the times are nan)."""


# ---- implementations: q, k, v (B, S, H, D) -> (B, S, H, D)
# -----------------------------------------------------------


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
def hopper_tiles(changes: dict[str, Any]) -> Iterator[None]:
    """The Hopper path's tile tables with these fields changed for every width."""
    from kernels.attention import op
    from kernels.attention.hopper import tuning

    tables: tuple[dict[int, Any], ...] = (tuning.FORWARD, tuning.FORWARD_TALL, tuning.BACKWARD)
    known = {f.name for table in tables for tile in table.values() for f in dataclasses.fields(tile)}
    if unknown := set(changes) - known:
        raise ValueError(f"hopper has no tile parameter {sorted(unknown)}; it has {sorted(known)}")
    before = [dict(table) for table in tables]
    for table in tables:
        for width, tile in table.items():
            mine = {k: v for k, v in changes.items() if hasattr(tile, k)}
            table[width] = dataclasses.replace(tile, **mine)
    op.forget()
    try:
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.update(old)
        op.forget()


@contextlib.contextmanager
def portable_tiles(changes: dict[str, Any]) -> Iterator[None]:
    """The portable path's tile tables with these fields, ``<forward | dq | dkdv>_<field of Tile>``, changed for every
    width and architecture."""
    from kernels.attention import op
    from kernels.attention.portable import tuning

    tables = (tuning.HOPPER, tuning.AMPERE, tuning.DROPOUT)
    fields = [f.name for f in dataclasses.fields(tuning.Tile)]
    known = {f"{kernel}_{field}": (kernel, field) for kernel in tuning.HOPPER for field in fields}
    if unknown := set(changes) - set(known):
        raise ValueError(f"portable has no tile parameter {sorted(unknown)}; it has {sorted(known)}")
    before = [dict(table) for table in tables]
    for table in tables:
        for name, value in changes.items():
            kernel, field = known[name]
            table[kernel] = tuple(dataclasses.replace(tile, **{field: value}) for tile in table[kernel])
    op.forget()
    try:
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.update(old)
        op.forget()


TILES: dict[str, Callable[[dict[str, Any]], contextlib.AbstractContextManager[None]]] = {
    "portable": portable_tiles,
    "hopper": hopper_tiles,
}
"""Paths whose tiles a specification may change."""


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    import kernels

    return kernels.flash_attn_func(q, k, v, causal=causal)


def flash1(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from kernels.attention.flash1 import flash1_attn_func

    return flash1_attn_func(q, k, v, causal=causal)


def standard(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from kernels.attention.standard import standard_attention

    return standard_attention(q, k, v, causal=causal)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: str | None = None) -> Tensor:
    """PyTorch's, which wants (B, H, S, D)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext():
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)


@functools.cache
def _flex(causal: bool, seqlen: int, device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def below_diagonal(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    mask = create_block_mask(below_diagonal, None, None, seqlen, seqlen, device=device) if causal else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=mask)


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    attention = _flex(causal, q.shape[1], q.device.type)
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
    changes = {k: json.loads(v) for k, v in (pair.split("=") for pair in (fields or "").split(",") if pair)}

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if name in TILES:
                stack.enter_context(forced_path(name))
            if changes:
                stack.enter_context(TILES[name](changes))
            yield

    return IMPLEMENTATIONS[name], context


# ---- timing
# ----------------------------------------------------------------------------------------------------------


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
    shape = (cell.batch, cell.seqlen, cell.heads, cell.head_dim)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return attention(q, k, v, cell.causal)

        return forward
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attention(q, k, v, cell.causal)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def measure_cell(cell: Cell, direction: str, args: argparse.Namespace, timer: Timer) -> list[Result]:
    """All implementations in one cell: warm up each, then rounds in which the order rotates."""
    calls: dict[str, tuple[Callable[[], Any], Any]] = {}
    errors: dict[str, str] = {}
    for spec in args.implementations:
        attention, context = parse_implementation(spec)
        if "standard" in spec and 6.0 * cell.seqlen**2 * cell.heads * cell.batch > STANDARD_LIMIT_BYTES:
            errors[spec] = "score matrices too large"
            continue
        try:
            with context():
                call = make_call(attention, cell, direction, args.device, args.dtype)
                timer(call, args.warmup)
            calls[spec] = (call, context)
        except Exception as error:  # noqa: BLE001 - one implementation's failure is a result; the others go on
            errors[spec] = str(error).strip().split("\n")[0][:200]
    times: dict[str, list[float]] = {spec: [] for spec in calls}
    order = list(calls)
    for _ in range(args.rounds):
        for spec in order:
            call, context = calls[spec]
            with context():
                call()  # launches of changed tiles are worked out anew
                times[spec] += timer(call, max(1, args.repeats // args.rounds))
        order = order[1:] + order[:1]
    return [_result(spec, cell, direction, times.get(spec, []), errors.get(spec, "")) for spec in args.implementations]


def _result(spec: str, cell: Cell, direction: str, times: list[float], error: str) -> Result:
    median = statistics.median(times) if times else float("nan")
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (median, median, median)
    tflops = cell.flops(direction) / median / 1e9
    where = dataclasses.asdict(cell)
    return Result(
        implementation=spec,
        direction=direction,
        median_ms=median,
        low_ms=low,
        high_ms=high,
        tflops=tflops,
        error=error,
        **where,
    )


def grid(args: argparse.Namespace) -> list[Cell]:
    """Cells of a fixed number of tokens and a fixed width."""
    masks = {"causal": [True], "full": [False], "both": [True, False]}[args.mask]
    return [
        Cell(d, causal, s, args.tokens // s, args.hidden // d)
        for d in args.head_dims
        for causal in masks
        for s in args.seqlens
        if s <= args.tokens
    ]


# ---- other measurements
# ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MemoryResult:
    """Memory that one forward and backward take, beyond their inputs."""

    implementation: str
    seqlen: int
    saved_bytes: int
    """Kept from forward to backward, the inputs included."""
    peak_bytes: int | None
    """Highest use during both, inputs not included; None without CUDA."""


def measure_memory(cell: Cell, args: argparse.Namespace) -> list[MemoryResult]:
    results = []
    for spec in args.implementations:
        attention, context = parse_implementation(spec)
        if "standard" in spec and 6.0 * cell.seqlen**2 * cell.heads * cell.batch > STANDARD_LIMIT_BYTES:
            continue
        shape = (cell.batch, cell.seqlen, cell.heads, cell.head_dim)
        q, k, v = (torch.randn(shape, device=args.device, dtype=args.dtype, requires_grad=True) for _ in range(3))
        saved: dict[int, int] = {}

        def keep(t: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with context(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = attention(q, k, v, cell.causal)
            out.backward(torch.ones_like(out))
        peak = torch.cuda.max_memory_allocated() - before if args.device == "cuda" else None
        results.append(MemoryResult(spec, cell.seqlen, sum(saved.values()), peak))
    return results


def measure_host(args: argparse.Namespace, calls: int = 500) -> list[dict[str, Any]]:
    """Microseconds that the host spends per call on a small problem, not waiting for the device: of each implementation
    a forward without gradients, then a backward through autograd."""
    cell = Cell(128, True, 128, 1, 4)
    results: list[dict[str, Any]] = []
    for spec in args.implementations:
        attention, context = parse_implementation(spec)
        with context():
            for direction in ("forward", "backward"):
                call = make_call(attention, cell, direction, args.device, args.dtype)
                for _ in range(20):
                    call()
                per_call = []
                for _ in range(5):
                    if args.device == "cuda":
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(calls):
                        call()
                    per_call.append((time.perf_counter() - start) / calls * 1e6)
                host_us = statistics.median(per_call)
                results.append({"implementation": spec, "direction": direction, "host_us": host_us})
    return results


# ---- output
# ----------------------------------------------------------------------------------------------------------


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Everything needed to repeat the measurement."""
    packages = {}
    for name in ("torch", "triton"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if args.device == "cuda" else None,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **packages,
        "clocks_before": clocks(args.device),
    }


def clocks(device: str) -> str | None:
    """SM clock, memory clock and power as nvidia-smi reports them; None without a GPU."""
    if device != "cuda":
        return None
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else f"nvidia-smi failed: {done.stderr.strip()}"


def table_of(results: Sequence[Result], unit: str = "TFLOP/s") -> Table:
    """A row per cell, a column per implementation and direction."""
    columns = list(dict.fromkeys((r.direction, r.implementation) for r in results))
    table = Table(title=f"Attention, {unit}, median", title_justify="left")
    table.add_column("cell")
    for direction, name in columns:
        table.add_column(f"{name}\n{direction}", justify="right")
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for r in results:
        cell = str(Cell(r.head_dim, r.causal, r.seqlen, r.batch, r.heads))
        rows.setdefault(cell, {})[(r.direction, r.implementation)] = "-" if r.error else f"{r.tflops:.4g}"
    for cell, row in rows.items():
        table.add_row(cell, *(row.get(column, "-") for column in columns))
    return table


def ablation_table(results: Sequence[Result]) -> Table:
    """Speed-ups between neighbouring steps of the ladder standard → flash1 → flash2 (portable) → hopper, per
    cell.

    Standard → flash1 is tiling: no S x S matrix in memory. Flash1 → portable is FlashAttention-2: at S = 512,
    where batch x heads fill the GPU, it is the fewer operations outside the products; towards S = 16k, where
    they do not, it is the split of the sequence over thread blocks. Portable → hopper is asynchrony.
    """
    ladder = [
        name for name in ("standard", "flash1", "portable", "hopper") if any(r.implementation == name for r in results)
    ]
    table = Table(title="Time of the step before / time of this step", title_justify="left")
    table.add_column("cell")
    table.add_column("direction")
    for before, after in itertools.pairwise(ladder):
        table.add_column(f"{before}\n→ {after}", justify="right")
    times: dict[tuple[str, str], dict[str, float]] = {}
    for r in results:
        cell = str(Cell(r.head_dim, r.causal, r.seqlen, r.batch, r.heads))
        times.setdefault((cell, r.direction), {})[r.implementation] = r.median_ms
    for (cell, direction), row in times.items():
        ratios = [row[a] / row[b] for a, b in itertools.pairwise(ladder)]
        table.add_row(cell, direction, *("-" if x != x else f"{x:.2f}" for x in ratios))
    return table


def plot_results(results: Sequence[Result], path: Path, title: str) -> None:
    """A panel per direction and (head dim, mask)."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys((r.head_dim, r.causal) for r in results))
    directions = list(dict.fromkeys(r.direction for r in results))
    figure, axes = plt.subplots(
        len(directions), len(kinds), figsize=(4.2 * len(kinds), 3.4 * len(directions)), squeeze=False, sharey="row"
    )
    for i, direction in enumerate(directions):
        for j, (head_dim, causal) in enumerate(kinds):
            ax = axes[i][j]
            for name in dict.fromkeys(r.implementation for r in results):
                line = [
                    (r.seqlen, r.tflops)
                    for r in results
                    if (r.implementation, r.direction, r.head_dim, r.causal) == (name, direction, head_dim, causal)
                    and not r.error
                ]
                if line:
                    ax.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
            ax.set_xscale("log", base=2)
            ax.set_ylim(bottom=0)
            ax.set_title(f"{direction}, D = {head_dim}, {'causal' if causal else 'full'}", fontsize=9)
            ax.set_xlabel("sequence length")
            ax.grid(alpha=0.3)
        axes[i][0].set_ylabel("TFLOP/s")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def memory_table(results: Sequence[MemoryResult]) -> Table:
    names = list(dict.fromkeys(r.implementation for r in results))
    table = Table(
        title="Attention forward and backward, MiB beyond the inputs: saved for backward / peak", title_justify="left"
    )
    table.add_column("S")
    for name in names:
        table.add_column(name, justify="right")
    for seqlen in dict.fromkeys(r.seqlen for r in results):
        cells = []
        for name in names:
            found = [r for r in results if (r.implementation, r.seqlen) == (name, seqlen)]
            peak = "-" if not found or found[0].peak_bytes is None else f"{found[0].peak_bytes / 2**20:.0f}"
            cells.append(f"{found[0].saved_bytes / 2**20:.1f} / {peak}" if found else "-")
        table.add_row(str(seqlen), *cells)
    return table


def plot_memory(results: Sequence[MemoryResult], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(5, 3.6))
    for name in dict.fromkeys(r.implementation for r in results):
        mine = [r for r in results if r.implementation == name]
        mib = [(r.saved_bytes if r.peak_bytes is None else r.peak_bytes) / 2**20 for r in mine]
        ax.plot([r.seqlen for r in mine], mib, marker="o", markersize=3, label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xlabel("sequence length, one sequence")
    peak = all(r.peak_bytes is not None for r in results)
    ax.set_ylabel("peak memory, MiB" if peak else "saved for backward, MiB")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    ax.set_title(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_json(path: Path, meta: dict[str, Any], results: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(r) if dataclasses.is_dataclass(r) and not isinstance(r, type) else r for r in results]
    path.write_text(json.dumps({"environment": meta, "results": rows}, indent=1) + "\n")


# ---- command line
# ----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        help=f"of {', '.join(IMPLEMENTATIONS)}, portable[field=value,...] or hopper[field=value,...]",
    )
    parser.add_argument("--seqlens", nargs="+", type=int, default=list(SEQLENS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--mask", choices=["causal", "full", "both"], default="both")
    parser.add_argument("--directions", nargs="+", choices=["forward", "backward"], default=["forward", "backward"])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in all: the batch is this over S")
    parser.add_argument("--hidden", type=int, default=2048, help="heads times head dim")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warmup", type=int, default=25, help="calls before measuring, per cell and implementation")
    parser.add_argument("--repeats", type=int, default=40, help="measured calls per cell and implementation")
    parser.add_argument("--rounds", type=int, default=4, help="turns over which the repeats are spread")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/attention"), help="without suffix: .json, .png")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--ablation", action="store_true", help="standard, flash1, flash2 and hopper as a ladder")
    mode.add_argument("--memory", action="store_true", help="memory against S instead of speed")
    mode.add_argument("--host", action="store_true", help="host time per call instead of device time")
    args = parser.parse_args(argv)
    args.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    if args.implementations is None:
        args.implementations = list(_default_implementations(args))
    for spec in args.implementations:
        parse_implementation(spec)
    return args


def _default_implementations(args: argparse.Namespace) -> tuple[str, ...]:
    if args.device == "cpu":
        return DEFAULT_CPU
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    names: tuple[str, ...] = DEFAULT_CUDA
    if args.ablation:
        names = ("standard", "flash1", "portable", "hopper")
    elif args.memory:
        names = ("standard", "portable", "hopper")
    return names if on_hopper else tuple(name for name in names if name != "hopper")


def run_speed(args: argparse.Namespace, console: Console, meta: dict[str, Any]) -> None:
    timer, results = Timer(args.device), []
    for cell in grid(args):
        for direction in args.directions:
            found = measure_cell(cell, direction, args, timer)
            results += found
            line = "  ".join(f"{r.implementation} {r.error or f'{r.tflops:.4g}'}" for r in found)
            console.print(f"{cell} {direction}: {line}", highlight=False, markup=False, soft_wrap=True)
            write_json(args.out.with_suffix(".json"), meta, results)  # a stopped run keeps what it has
    meta["clocks_after"] = clocks(args.device)
    write_json(args.out.with_suffix(".json"), meta, results)
    console.print(table_of(results))
    if args.ablation:
        console.print(ablation_table(results))
    plot_results(
        results,
        args.out.with_suffix(".png"),
        f"{meta['gpu'] or meta['cpu']}, torch {meta['torch']}, triton {meta['triton']}",
    )


def run_memory(args: argparse.Namespace, console: Console, meta: dict[str, Any]) -> None:
    head_dim = args.head_dims[0]
    cells = [Cell(head_dim, True, s, 1, args.hidden // head_dim) for s in args.seqlens]
    results = [r for cell in cells for r in measure_memory(cell, args)]
    write_json(args.out.with_suffix(".json"), meta, results)
    console.print(memory_table(results))
    plot_memory(
        results,
        args.out.with_suffix(".png"),
        f"causal, H*D = {args.hidden}, D = {head_dim}, {meta['gpu'] or meta['cpu']}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    meta = environment(args)
    console.print(
        f"{meta['gpu'] or meta['cpu']}  torch {meta['torch']}  triton {meta['triton']}  {meta['date']}", highlight=False
    )
    if args.host:
        host = measure_host(args)
        for row in host:
            line = f"{row['implementation']}: {row['host_us']:.1f} us of host time per {row['direction']} call"
            console.print(line, highlight=False, markup=False)
        write_json(args.out.with_suffix(".json"), meta, host)
    elif args.memory:
        run_memory(args, console, meta)
    else:
        run_speed(args, console, meta)
    console.print(f"written: {args.out.with_suffix('.json')}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
