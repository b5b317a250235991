"""Time attention implementations side by side: ``python scripts/bench_attention.py``.

Every cell of the grid is measured for all implementations in one process, in alternating order, median over
repeats, with the L2 cache flushed in between. Prints one table and writes JSON and PNG files beside each
other.

    bench_attention.py                  the anchor grid: 16k tokens, H*D = 2048
    bench_attention.py --implementations portable sdpa_cudnn --seqlens 1024 8192 --head-dims 128
    bench_attention.py --implementations hopper 'hopper[candidate="tall"]' --head-dims 64
    bench_attention.py --implementations portable 'portable[forward_block_n=64,dkdv_num_stages=2]' --head-dims 128
    bench_attention.py --ablation       what each of the paper's ideas brings
    bench_attention.py --memory         memory against S, beside standard attention
    bench_attention.py --host           host time per call
    bench_attention.py --window 1024    a causal sliding window beside full causal attention, and what a block costs
    bench_attention.py --ragged         S + 1 and documents of random lengths beside S, and what a block costs
    bench_attention.py --once --implementations hopper ...     for profilers: docs/kernel_log.md has the command
    bench_attention.py --device cpu --tokens 256 --hidden 128 --seqlens 64 128 --head-dims 32

FLOPs: forward 4 S^2 D H B, halved when causal, of the visible scores alone with a window; backward 2.5 times that.
Backward is ``torch.autograd.grad`` on a retained graph, so every kernel of it counts.

Cost of a block (``--window``, ``--ragged``): (time of the cell / time of the dense cell) / (blocks of 128 x 128 scores
that the cell must visit / those of the dense cell). The aim for a window of 1024 at S = 16384 is at most 1.3.

``flex`` is compiled anew for every cell and direction, with its own defaults: 5 to 10 s each on a node with an H100.
Where there are several, ``--compile-processes`` compile them first, in parallel, into Inductor's cache on disk
(``TORCHINDUCTOR_CACHE_DIR``), which later runs find too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
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

from configs import end_on_ctrl_c, run_tool

end_on_ctrl_c(__name__)

import torch
from rich.console import Console
from torch import Tensor

from scripts.bench_cells import Cell, Result, costs_of, dense_grid, ragged, result_of, windowed
from scripts.bench_implementations import (
    IMPLEMENTATIONS,
    Attention,
    Timer,
    compile_flex_ahead,
    first_line,
    make_call,
    parse_implementation,
)
from scripts.bench_report import (
    MemoryResult,
    ablation_table,
    cost_table,
    memory_table,
    plot_memory,
    plot_results,
    table_of,
)

SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
DEFAULT_CUDA = ("portable", "hopper", "sdpa_cudnn", "sdpa_flash", "flex")
DEFAULT_CPU = ("sdpa", "standard")
NO_GPU = (
    "kernels are timed on a GPU, and PyTorch finds no CUDA device here. PyTorch's own implementations can be timed on "
    "the CPU: --device cpu --tokens 256 --hidden 128 --seqlens 64 128 --head-dims 32"
)
STANDARD_LIMIT_BYTES = 16 * 2**30
"""Standard attention is left out where its score matrices alone would take more than this."""


def measure_cell(cell: Cell, direction: str, args: argparse.Namespace, timer: Timer) -> list[Result]:
    """All implementations in one cell: warm up each, then rounds in which the order rotates."""
    calls: dict[str, tuple[Callable[[], Any], Any]] = {}
    errors: dict[str, str] = {}
    for spec in args.implementations:
        attention, context = parse_implementation(spec)
        if spec == "standard" and cell.score_bytes() > STANDARD_LIMIT_BYTES:
            errors[spec] = "score matrices too large"
            continue
        try:
            with context():
                call = make_call(attention, cell, direction, args.device, args.dtype)
                timer(call, args.warmup)
            calls[spec] = (call, context)
        except Exception as error:  # noqa: BLE001 - one implementation's failure is a result; the others go on
            errors[spec] = first_line(error)
    times: dict[str, list[float]] = {spec: [] for spec in calls}
    order = list(calls)
    for _ in range(args.rounds):
        for spec in order:
            call, context = calls[spec]
            with context():
                call()  # launches of changed tiles are worked out anew
                times[spec] += timer(call, max(1, args.repeats // args.rounds))
        order = order[1:] + order[:1]
    return [
        result_of(spec, cell, direction, times.get(spec, []), errors.get(spec, "")) for spec in args.implementations
    ]


def plan(args: argparse.Namespace) -> tuple[list[Cell], dict[Cell, Cell]]:
    """The cells to measure, in order, and of those that are compared with a dense one, that one."""
    masks = {"causal": [True], "full": [False], "both": [True, False]}[args.mask]
    grid = dense_grid(args.head_dims, masks, args.seqlens, args.tokens, args.hidden)
    dense_of = windowed(grid, args.window) if args.window else ragged(grid) if args.ragged else {}
    return [c for dense in grid for c in (dense, *(c for c, d in dense_of.items() if d == dense))], dense_of


# ---- for profilers
# ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def profiled(device: str) -> Iterator[None]:
    """The range that ``ncu --profile-from-start off`` sees: what was queued before is done, and so is what's inside."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        yield
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()


def run_once(args: argparse.Namespace, console: Console) -> int:
    """Each cell, direction and implementation called once inside the profiler's range, after one call outside it.

    Returns:
        How many failed.
    """
    failed = 0
    for cell in plan(args)[0]:
        for direction in args.directions:
            for spec in args.implementations:
                attention, context = parse_implementation(spec)
                console.print(f"{cell} {direction} {spec}", highlight=False, markup=False, soft_wrap=True)
                try:
                    with context():
                        call = make_call(attention, cell, direction, args.device, args.dtype)
                        call()
                        with profiled(args.device):
                            call()
                except Exception as error:  # noqa: BLE001 - the others go on
                    failed += 1
                    console.print(f"  {first_line(error)}", highlight=False, markup=False, soft_wrap=True)
    return failed


# ---- other measurements
# ----------------------------------------------------------------------------------------------


def measure_memory(cell: Cell, args: argparse.Namespace, console: Console) -> list[MemoryResult]:
    """Of each implementation that has room, one forward and backward pass; one that fails is said and left out."""
    found = []
    for spec in args.implementations:
        if spec == "standard" and cell.score_bytes() > STANDARD_LIMIT_BYTES:
            continue
        try:
            found.append(memory_of(spec, cell, args))
        except Exception as error:  # noqa: BLE001 - one implementation's failure is a result; the others go on
            say_failure(console, f"{spec} S={cell.seqlen}", error)
    return found


def say_failure(console: Console, what: str, error: Exception) -> None:
    """One line."""
    console.print(f"{what}: {first_line(error)}", highlight=False, markup=False, soft_wrap=True)


def memory_of(spec: str, cell: Cell, args: argparse.Namespace) -> MemoryResult:
    """Bytes that the forward pass saves, q, k, v among them, and at the peak beyond them: out, its gradient, dq, dk and
    dv too. Everything is let go on return: what one implementation leaves must not count as there before the next."""
    attention, context = parse_implementation(spec)
    q, k, v = (torch.randn(cell.shape, device=args.device, dtype=args.dtype, requires_grad=True) for _ in range(3))
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    before = 0
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with context(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = attention(q, k, v, cell)
        out.backward(torch.ones_like(out))
    peak = torch.cuda.max_memory_allocated() - before if args.device == "cuda" else None
    return MemoryResult(spec, cell.seqlen, sum(saved.values()), peak)


def measure_host(args: argparse.Namespace, console: Console, calls: int = 500) -> list[dict[str, Any]]:
    """Microseconds that the host spends per call on a small problem, not waiting for the device: of each implementation
    a forward without gradients, then a backward through autograd. One that fails is said and left out."""
    results: list[dict[str, Any]] = []
    for spec in args.implementations:
        attention, context = parse_implementation(spec)
        try:
            with context():
                for direction in ("forward", "backward"):
                    host_us = host_time(attention, direction, args, calls)
                    results.append({"implementation": spec, "direction": direction, "host_us": host_us})
        except Exception as error:  # noqa: BLE001 - one implementation's failure is a result; the others go on
            say_failure(console, spec, error)
    return results


def host_time(attention: Attention, direction: str, args: argparse.Namespace, calls: int) -> float:
    """Microseconds of a call, the median of five times ``calls``."""
    call = make_call(attention, Cell(128, True, 128, 1, 4), direction, args.device, args.dtype)
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
    return statistics.median(per_call)


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


def write_json(path: Path, meta: dict[str, Any], results: Sequence[Any], **others: Any) -> None:
    """The environment, the results and, under their names, what follows from them; null for a number that there isn't,
    since JSON has no NaN and no infinity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(r) if dataclasses.is_dataclass(r) and not isinstance(r, type) else r for r in results]
    content = without_nan({"environment": meta, "results": rows, **others})
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """The same nested values, but None for numbers that aren't finite."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    parser.add_argument("--mask", choices=["causal", "full", "both"], help="default: both; causal with --window")
    parser.add_argument("--directions", nargs="+", choices=["forward", "backward"], default=["forward", "backward"])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in all: the batch is this over S")
    parser.add_argument("--hidden", type=int, default=2048, help="heads times head dim")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--warmup", type=int, default=25, help="calls before measuring, per cell and implementation")
    parser.add_argument("--repeats", type=int, default=40, help="measured calls per cell and implementation")
    parser.add_argument("--rounds", type=int, default=4, help="turns over which the repeats are spread")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/attention"), help="without suffix: .json, .png")
    parser.add_argument(
        "--compile-processes",
        type=int,
        default=min(8, max(1, len(os.sched_getaffinity(0)) // 2)),
        help="processes that compile flex for all cells first; below 2: each is compiled in its turn (default: half "
        "the processors, at most 8)",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="for profilers: one call of each after a warm-up call, which is outside the range of "
        "torch.cuda.profiler.start and stop; no times, no files",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--ablation", action="store_true", help="standard, flash1, flash2 and hopper as a ladder")
    mode.add_argument("--memory", action="store_true", help="memory against S instead of speed")
    mode.add_argument("--host", action="store_true", help="host time per call instead of device time")
    mode.add_argument("--window", type=int, metavar="N", help="causal attention to the last N keys beside all keys")
    mode.add_argument("--ragged", action="store_true", help="S + 1, and documents of random lengths, beside S")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(NO_GPU)
    if args.once and (args.ablation or args.memory or args.host):
        parser.error("--once calls the cells of the grid, --window or --ragged: not --ablation, --memory or --host")
    if args.window is not None:
        if args.mask not in (None, "causal"):
            parser.error(f"--window is causal: --mask {args.mask} has none")
        if not 0 < args.window < max(args.seqlens):
            parser.error(f"--window {args.window}: from 1 to below the longest of --seqlens, {max(args.seqlens)}")
        args.mask = "causal"
    if problem := problem_of(args):
        parser.error(problem)
    args.mask = args.mask or "both"
    args.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    if args.implementations is None:
        args.implementations = list(_default_implementations(args))
    try:
        for spec in args.implementations:
            parse_implementation(spec)
    except ValueError as error:
        parser.error(f"--implementations: {error}")
    return args


def problem_of(args: argparse.Namespace) -> str:
    """What no cell can be made of, or no device found for; empty if all is well."""
    counts = ("seqlens", "head_dims", "tokens", "hidden", "repeats", "rounds")
    for name in counts:
        given = getattr(args, name)
        if min(given if isinstance(given, list) else [given]) < 1:
            return f"--{name.replace('_', '-')} {given}: from 1 on"
    if args.hidden < max(args.head_dims):
        return f"--hidden {args.hidden} is less than one head of --head-dims {max(args.head_dims)}"
    if not (args.memory or args.host) and args.tokens < min(args.seqlens):
        return f"--tokens {args.tokens} is less than the shortest of --seqlens, {min(args.seqlens)}"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: PyTorch finds no GPU"
    return ""


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


def compile_ahead(args: argparse.Namespace, console: Console) -> None:
    """FlexAttention's kernels for all cells, where there are several; a failure is said and costs only time."""
    problems = [(cell, direction) for cell in plan(args)[0] for direction in args.directions]
    if "flex" not in args.implementations or args.compile_processes < 2 or len(problems) < 2:
        return
    start = time.perf_counter()
    failures = compile_flex_ahead(problems, args.device, args.dtype, args.compile_processes)
    compiled = len(problems) - len(failures)
    text = f"flex: {compiled} of {len(problems)} compiled ahead in {time.perf_counter() - start:.0f} s"
    for line in (text, *(f"  {failure}" for failure in failures)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def run_speed(args: argparse.Namespace, console: Console, meta: dict[str, Any]) -> None:
    timer, results = Timer(args.device), []
    cells, dense_of = plan(args)
    count = len(cells) * len(args.directions)
    names = ", ".join(args.implementations)
    console.print(
        f"{count} rows in TFLOP/s, each of {args.warmup} + {args.repeats} calls of {names}:",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for cell in cells:
        for direction in args.directions:
            found = measure_cell(cell, direction, args, timer)
            results += found
            line = "  ".join(f"{r.implementation} {r.error or f'{r.tflops:.4g}'}" for r in found)
            console.print(f"{cell} {direction}: {line}", highlight=False, markup=False, soft_wrap=True)
            write_json(args.out.with_suffix(".json"), meta, results)  # a stopped run keeps what it has
    meta["clocks_after"] = clocks(args.device)
    costs = costs_of(results, dense_of)
    derived = {"costs": [dataclasses.asdict(cost) for cost in costs]} if dense_of else {}
    write_json(args.out.with_suffix(".json"), meta, results, **derived)
    console.print(table_of(results))
    if dense_of:
        console.print(cost_table(costs))
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
    results: list[MemoryResult] = []
    for cell in cells:
        results += measure_memory(cell, args, console)
        write_json(args.out.with_suffix(".json"), meta, results)  # a stopped run keeps what it has
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
    if not (args.host or args.memory):
        compile_ahead(args, console)
    if args.once:
        return min(1, run_once(args, console))
    if args.host:
        host = measure_host(args, console)
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
    run_tool(main)
