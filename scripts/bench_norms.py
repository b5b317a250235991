"""Time the fused norms' schedules side by side: ``python scripts/bench_norms.py``. Needs a CUDA device.

    bench_norms.py                                     width 2560, 8,192 tokens
    bench_norms.py --widths 768 2048 2560 --tokens 8192 16384 32768
    bench_norms.py --norm rmsnorm --beside copy
    bench_norms.py --passes backward kernel --shift    with Σ dx, the gradient of the bias before the norm
    bench_norms.py --backward shipped 'warps=4,split=true,per_sm=3,stages=5,joint=true,early=true'

Passes, in bf16, and the bytes that each must move, in rows of the residual stream (2·E·N bytes each; gradients of
weight and bias are small beside them):

    forward     x + f and its norm                       4: reads x, f, writes both
    first       the norm of x alone                      2
    backward    of `forward`                             4: reads dy, ds, s, writes dx; parts of dw, db summed
    kernel      the same without that sum, ours only     4

With `--shift` the backward passes also sum dx over tokens: ours in its registers, the others by a pass of PyTorch's.
Candidates' programs on an SM are those without: only the shipped schedule is made for both.

Schedules are the candidates of `model.norm_kernel`, among them the one that is shipped for the width, which can be
asked for as ``shipped``. Beside them: ``compile``, PyTorch's sum and norm compiled; ``liger``, PyTorch's sum and
Liger's LayerNorm or RMSNorm kernel, where it can be imported; ``copy``, a copy on the device that moves as many bytes,
the most that a pass could reach.

All in one process, in rotating order, CUDA events around each call, median over repeats. Before each call the L2 cache
is filled by reading something else: filled by writing, it would have to be written back within the time measured. Each
implementation is checked first: no further from fp32 than one and a half times PyTorch's bf16. Prints one table and,
by width, the fastest schedule as a line for `model.norm_kernel` with its speed beside the shipped one's, and writes
JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import end_on_ctrl_c, run_tool

end_on_ctrl_c(__name__)

import torch
import torch._functorch.config
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from model.norm_kernel import (
    BackwardSchedule,
    ForwardSchedule,
    backward_candidates,
    backward_schedule,
    forward_candidates,
    forward_schedule,
    run_backward,
    run_forward,
)
from scripts.bench_attention import clocks, environment, write_json
from scripts.bench_implementations import L2_FLUSH_BYTES, first_line

ROWS_MOVED = {"forward": 4, "first": 2, "backward": 4, "kernel": 4}
BESIDE = ("compile", "liger", "copy")
EPS = 1e-5
HEAD_START_CYCLES = 1_000_000
"""The device waits for about half a millisecond, in which the host queues the whole call."""

Call = Callable[[], tuple[Tensor, ...]]
"""forward and first: s, y; backward: dx, dw, with bias db, with --shift dc; kernel: dx and parts; copy: nothing to
check."""
AddNorm = Callable[[Tensor, "Tensor | None", Tensor, "Tensor | None"], tuple[Tensor, Tensor]]
"""x, f, weight, bias to x + f and its norm."""


@dataclasses.dataclass(frozen=True)
class Result:
    implementation: str
    norm: str
    width: int
    tokens: int
    direction: str
    schedule: dict[str, Any] | None
    median_us: float
    low_us: float
    """A tenth of the calls were faster."""
    high_us: float
    gb_per_s: float
    """Of the bytes that the pass must move; 0 after an error."""
    error: str


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of one cell, (N, E) and (E,), in bf16 or what was asked for."""

    x: Tensor
    f: Tensor
    d_y: Tensor
    d_sum: Tensor
    weight: Tensor
    bias: Tensor | None
    mean: bool
    shift: bool = False
    """Whether Σ dx is asked for."""

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def make_inputs(norm: str, tokens: int, width: int, device: str, dtype: torch.dtype, shift: bool = False) -> Inputs:
    """Random normal; zeros would draw less power and run faster."""
    torch.manual_seed(width)
    x, f, d_y, d_sum = (torch.randn(tokens, width, device=device, dtype=dtype) for _ in range(4))
    weight, bias = (torch.randn(width, device=device, dtype=dtype) for _ in range(2))
    return Inputs(x, f, d_y, d_sum, weight, bias if norm == "layernorm" else None, norm == "layernorm", shift)


def plain(mean: bool) -> AddNorm:
    """PyTorch's."""

    def run(x: Tensor, f: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if f is None else x + f
        shape = (x.shape[-1],)
        return total, F.layer_norm(total, shape, weight, bias, EPS) if mean else F.rms_norm(total, shape, weight, EPS)

    return run


def liger(mean: bool) -> AddNorm:
    """Liger's kernel after PyTorch's sum. Raises ImportError where it is not installed."""
    if mean:
        layer: Any = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    else:
        # as Llama's, and not over dy, which others need
        rms: Any = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction

    def run(x: Tensor, f: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if f is None else x + f
        return total, layer.apply(total, weight, bias, EPS) if mean else rms.apply(
            total, weight, EPS, 0.0, "llama", False
        )

    return run


def call_of(function: AddNorm, given: Inputs, direction: str) -> Call:
    """A call of `function`, or of its backward on a kept graph."""
    if direction in ("forward", "first"):

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(given.x, given.f if direction == "forward" else None, given.weight, given.bias)

        return forward
    x, f = (t.detach().clone().requires_grad_() for t in (given.x, given.f))
    parameters = [t.detach().clone().requires_grad_() for t in given.parameters]
    outputs = function(x, f, parameters[0], parameters[1] if len(parameters) == 2 else None)
    gradients = (given.d_sum, given.d_y)

    def backward() -> tuple[Tensor, ...]:
        d_x, _, *others = torch.autograd.grad(outputs, [x, f, *parameters], gradients, retain_graph=True)
        return (d_x, *others, *([d_x.sum(0, dtype=torch.float32)] if given.shift else []))

    return backward


def call_of_schedule(schedule: ForwardSchedule | BackwardSchedule, given: Inputs, direction: str) -> Call:
    """A call of our kernel by `schedule`."""
    if isinstance(schedule, ForwardSchedule):
        f = given.f if direction == "forward" else None

        def forward() -> tuple[Tensor, ...]:
            total, y, _ = run_forward(given.x, f, given.weight, given.bias, EPS, given.mean, schedule)
            return given.x if f is None else total, y

        return forward
    total, _, stats = torch.ops.flashtrain.add_norm(given.x, given.f, given.weight, given.bias, EPS, given.mean)
    has_bias = given.bias is not None
    sums = torch.zeros(3, given.x.shape[1], device=given.x.device)  # grow from call to call: the first one is checked
    totals = sums[: 1 + has_bias + given.shift].unbind()

    def backward() -> tuple[Tensor, ...]:
        d_x, parts = run_backward(given.d_y, given.d_sum, total, given.weight, stats, has_bias, given.shift, schedule)
        if direction == "kernel":
            return d_x, parts
        for into, gradient in zip(totals, parts.sum(1), strict=True):
            into.add_(gradient)
        return d_x, *totals

    return backward


def copy_call(num_bytes: int, device: str) -> Call:
    """A copy that reads and writes `num_bytes` together."""
    source = torch.randint(0, 127, (num_bytes // 2,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: (target.copy_(source),)


def breach(given: Inputs, direction: str, found: Sequence[Tensor]) -> str:
    """What is wrong with the outputs of a call, beside fp32; empty if they are right."""
    if direction == "kernel":
        found = (found[0], *found[1].sum(1))
    direction = "backward" if direction == "kernel" else direction
    exact = exact_of(given)
    if direction != "first":  # the exact norm is that of the rounded sum
        exact = dataclasses.replace(exact, x=(given.x + given.f).float(), f=torch.zeros_like(exact.f))
    truth = call_of(plain(given.mean), exact, direction)()
    theirs = call_of(plain(given.mean), given, direction)()
    gradients = ["dx", "dw"] + ["db"] * (given.bias is not None) + ["dc"] * given.shift
    names = gradients if direction == "backward" else ["s", "y"]
    wrong = []
    for name, value, other, true in zip(names, found, theirs, truth, strict=False):
        error, allowed = (value.float() - true).norm(), 1.5 * (other.float() - true).norm() + 2e-6 * true.norm()
        if not error <= allowed:
            wrong.append(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")
    if len(found) != len(truth):
        wrong.append(f"{len(found)} outputs, expected {len(truth)}")
    return "; ".join(wrong)


def exact_of(given: Inputs) -> Inputs:
    """In fp32."""
    tensors = {name: t.float() for name, t in vars(given).items() if isinstance(t, Tensor)}
    return dataclasses.replace(given, **tensors)


class ColdTimer:
    """Microseconds of a call on the device, with an L2 cache that holds none of its data and nothing to write back."""

    def __init__(self) -> None:
        self.other = torch.zeros(L2_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def __call__(self, call: Call, repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in events:
            torch.cuda._sleep(HEAD_START_CYCLES)
            self.other.amax()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in events]


def shipped(width: int, direction: str, shift: bool) -> ForwardSchedule | BackwardSchedule:
    """What the model runs."""
    return forward_schedule(width) if direction in ("forward", "first") else backward_schedule(width, shift)


def schedules_of(args: argparse.Namespace, width: int, direction: str) -> dict[str, Any]:
    """Those asked for, by name; unless some are all candidates, and the shipped one if it is none of them."""
    forward = direction in ("forward", "first")
    candidates: dict[str, Any] = dict(forward_candidates(width) if forward else backward_candidates(width))
    own = shipped(width, direction, args.shift)
    asked = args.forward if forward else args.backward
    kind = ForwardSchedule if forward else BackwardSchedule
    if asked is None:
        return candidates if own in candidates.values() else {"shipped": own, **candidates}
    known = {**candidates, "shipped": own}
    return {text: known[text] if text in known else parse_schedule(kind, text) for text in asked}


def parse_schedule(kind: type[ForwardSchedule] | type[BackwardSchedule], text: str) -> Any:
    """A schedule of ``field=value,...``. Raises ValueError for what it hasn't."""
    known = [field.name for field in dataclasses.fields(kind)]
    try:
        return kind(**{name: json.loads(value) for name, value in (pair.split("=") for pair in text.split(","))})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{text!r} is neither shipped, nor a candidate of this width, nor field=value,... of "
            f"{', '.join(known)}: {error}"
        ) from error


def calls_of(
    args: argparse.Namespace, given: Inputs, direction: str
) -> tuple[dict[str, Call], dict[str, Any], dict[str, str]]:
    """(calls that give right results, schedules, errors of the others), by implementation."""
    tokens, width = given.x.shape
    schedules = schedules_of(args, width, direction)
    makers: dict[str, Callable[[], Call]] = {
        name: lambda schedule=schedule: call_of_schedule(schedule, given, direction)  # type: ignore[misc]
        for name, schedule in schedules.items()
    }
    if direction != "kernel":
        if "compile" in args.beside:
            compiled = torch.compile(plain(given.mean), dynamic=False)
            makers["compile"] = lambda: call_of(compiled, given, direction)
        if "liger" in args.beside:
            makers["liger"] = lambda: call_of(liger(given.mean), given, direction)
    calls, errors = {}, {}
    for name, make in makers.items():
        try:
            call = make()
            wrong = breach(given, direction, call())
            if wrong and name not in BESIDE:  # others' precision is theirs
                errors[name] = f"wrong: {wrong}"
                continue
            calls[name] = call
        except Exception as error:  # noqa: BLE001 - one implementation's failure is a result; the others go on
            errors[name] = first_line(error) or type(error).__name__
    if "copy" in args.beside:
        calls["copy"] = copy_call(ROWS_MOVED[direction] * tokens * width * given.x.element_size(), given.x.device.type)
    return calls, schedules, errors


def measure(
    args: argparse.Namespace, width: int, tokens: int, direction: str, timer: Callable[[Call, int], list[float]]
) -> list[Result]:
    """All implementations of one pass at one size."""
    given = make_inputs(args.norm, tokens, width, args.device, args.dtype, args.shift)
    calls, schedules, errors = calls_of(args, given, direction)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timer(call, args.warmup)
    order = list(calls)
    for _ in range(args.rounds):
        for name in order:
            times[name] += timer(calls[name], max(1, args.repeats // args.rounds))
        order = order[1:] + order[:1]
    num_bytes = ROWS_MOVED[direction] * tokens * width * given.x.element_size()

    def result(name: str) -> Result:
        schedule = dataclasses.asdict(schedules[name]) if name in schedules else None
        cell = (name, args.norm, width, tokens, direction, schedule)
        if name in errors:
            return Result(*cell, float("nan"), float("nan"), float("nan"), 0.0, errors[name])
        median = statistics.median(times[name])
        ordered = sorted(times[name])
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        return Result(*cell, median, low, high, num_bytes / median / 1e3, "")

    return [result(name) for name in (*calls, *errors)]


def table_of(results: Sequence[Result]) -> Table:
    """A row per width, pass and implementation, a column per number of tokens."""
    tokens = sorted({r.tokens for r in results})
    table = Table(title="Norms, GB/s of the bytes that must move (median us)", title_justify="left")
    for name in ("width", "pass", "implementation"):
        table.add_column(name)
    for count in tokens:
        table.add_column(f"{count:,} tokens", justify="right")
    before: tuple[int, str] | None = None
    for width, direction, name in dict.fromkeys((r.width, r.direction, r.implementation) for r in results):
        found = {r.tokens: r for r in results if (r.width, r.direction, r.implementation) == (width, direction, name)}
        cells = (found.get(count) for count in tokens)
        texts = ("-" if r is None or r.error else f"{r.gb_per_s:,.0f} ({r.median_us:.1f})" for r in cells)
        new = (width, direction) != before
        table.add_row(str(width) if new else "", direction if new else "", name, *texts)
        before = (width, direction)
    return table


def told(schedule: ForwardSchedule | BackwardSchedule) -> str:
    """The expression that makes the schedule, without fields that have their default."""
    values = ((field, getattr(schedule, field.name)) for field in dataclasses.fields(schedule))
    fields = ", ".join(f"{field.name}={value}" for field, value in values if value != field.default)
    return f"{type(schedule).__name__}({fields})"


def fastest(results: Sequence[Result], shift: bool = False) -> list[str]:
    """By width the schedules whose times, over all numbers of tokens, are least, as lines for `model.norm_kernel`, with
    their speed relative to the shipped schedule's if that was measured too. Forward is counted with and without f as a
    block has them, once each."""
    lines = []
    for width in sorted({r.width for r in results}):
        for table, kind, passes in (
            ("FORWARD", ForwardSchedule, ("forward", "first")),
            ("BACKWARD", BackwardSchedule, ("backward",)),
        ):
            mine = [r for r in results if r.width == width and r.direction in passes and r.schedule is not None]
            cells = {(r.tokens, r.direction) for r in mine}
            right = {
                name: sum(r.median_us / (r.tokens * len(cells)) for r in mine if r.implementation == name)
                for name in dict.fromkeys(r.implementation for r in mine)
                if sum(r.implementation == name and not r.error for r in mine) == len(cells)
            }
            if not right:
                continue
            best = min(right, key=lambda name: right[name])
            schedules = {r.implementation: kind(**r.schedule) for r in mine if r.schedule is not None}
            own = next((name for name in right if schedules[name] == shipped(width, passes[0], shift)), None)
            gain = "" if own is None else f", {right[own] / right[best]:.2f} times the speed of the shipped {own}"
            lines.append(f"{table}[{width}] = {told(schedules[best])}  # {best}{gain}")
    return lines


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", nargs="+", type=int, default=[2560])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192], help="rows of a call")
    parser.add_argument("--norm", choices=["layernorm", "rmsnorm"], default="layernorm", help="layernorm has a bias")
    parser.add_argument("--passes", nargs="+", choices=list(ROWS_MOVED), default=list(ROWS_MOVED))
    parser.add_argument(
        "--forward", nargs="+", metavar="SCHEDULE", help="candidates, shipped, or field=value,...; default: all"
    )
    parser.add_argument("--backward", nargs="+", metavar="SCHEDULE")
    parser.add_argument("--shift", action="store_true", help="backward with the sum of dx over tokens")
    parser.add_argument("--beside", nargs="*", choices=BESIDE, default=list(BESIDE))
    parser.add_argument("--warmup", type=int, default=5, help="calls before measuring, per implementation")
    parser.add_argument("--repeats", type=int, default=40, help="measured calls per implementation")
    parser.add_argument("--rounds", type=int, default=4, help="turns over which the repeats are spread")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/norms.json"))
    args = parser.parse_args(argv)
    for width in args.widths:
        for direction in args.passes:
            try:
                schedules_of(args, width, direction)
            except ValueError as error:
                parser.error(str(error))
    args.device, args.dtype = "cuda", torch.bfloat16
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if not torch.cuda.is_available():
        print("bench_norms.py times kernels on a GPU, and PyTorch finds no CUDA device here", file=sys.stderr)
        return 2
    torch._functorch.config.donated_buffer = False  # compiled backward passes are called again on a kept graph
    console = Console(width=None if sys.stdout.isatty() else 160)
    meta, timer, results = environment(args), ColdTimer(), []
    console.print(f"{meta['gpu']}  torch {meta['torch']}  triton {meta['triton']}  {meta['date']}", highlight=False)
    for width in args.widths:
        for tokens in args.tokens:
            for direction in args.passes:
                results += measure(args, width, tokens, direction, timer)
                write_json(args.out, meta, results)  # a stopped run keeps what it has
            torch.compiler.reset()
    meta["clocks_after"] = clocks(args.device)
    lines = fastest(results, args.shift)
    write_json(args.out, meta, results, fastest=lines)
    console.print(table_of(results))
    failed = [r for r in results if r.error]
    errors = [f"{r.implementation} {r.direction} {r.width} x {r.tokens}: {r.error}" for r in failed]
    for line in (*errors, *lines, f"written: {args.out}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return int(any(r.schedule is not None for r in failed))


if __name__ == "__main__":
    run_tool(main)
