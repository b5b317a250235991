"""A residual sum and its normalisation as one Triton kernel each way.

    s = x + f,   y = (s - m)·r·w + b,   m = mean(s),   r = 1 / sqrt(var(s) + eps)          RMSNorm: m = 0, no b

and backward, with n = (s - m)·r, g = dy·w, and ds the gradient that reaches s past the norm, along the residual stream:

    dx = df = ds + r·(g - mean(g) - n·mean(g·n)),   dw = Σ dy·n,   db = Σ dy               RMSNorm: no mean(g)

Where x or f comes from a layer with a bias c, its gradient is dc = Σ dx. It is summed here on demand: summed by that
layer, dx would be read again.

Forward reads x and f and writes s and y, backward reads dy, ds and s and writes dx: 8 elements a token and channel,
the least there is. A program of the forward pass has one row, or with `per_sm` goes through rows as one of the backward
pass does. The backward pass has few programs, each of which goes through every `num_programs`-th row and keeps its part
of dw, db and dc in registers, so that no second pass over dy, s and dx makes them. Their sum over programs is left to
the caller, in the same order each time. s is rounded to its dtype before it is normalised, as if it had been stored and
loaded; arithmetic and statistics are fp32.

A row is held whole, as one tile of the next power of two or as two: 2,560 = 2,048 + 512. How it is done (tiles, warps,
what is loaded ahead) is a `ForwardSchedule` and a `BackwardSchedule`; results don't depend on it but for the order of
sums.

N rows, E width, P programs, K from 1 to 3: dw, db and dc, as many as there are; C columns of a tile.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from triton.compiler import ASTSource

    from kernels.compile_check import CompileCase

MAX_WIDTH = 16384
"""A row is held whole in a program's registers."""
WARPS_PER_SM = 16
"""Of the plain backward kernel: its 128 registers a thread (sm_90, widths 768 to 8,192) allow no more."""
REGISTERS_PER_SM = 65536
SHIFT_WIDTHS = (768, 1024, 1600, 2048, 2560, 4096, 5120)
"""Of the compile check with dc: GPT-2's and GPT-3's."""
CPU_PROGRAMS = 3
"""Programs that go through rows in Triton's interpreter."""


def warps_of(block: int) -> int:
    """Warps of a program whose row takes `block` lanes: 16 elements a thread, so that the sums stay in registers."""
    return min(max(block // 512, 1), 16)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """What both ways have."""

    warps: int
    """Of a program."""
    split: bool = False
    """A row as two tiles, the second for what is beyond the largest power of two, instead of one of the next: no lanes
    without columns at 768, 1,536, 2,560, 3,072, 5,120. The row's sums take two exchanges between warps for one."""
    per_sm: int = 0
    """Programs on an SM, each of which goes through rows. 0: forward, a program a row."""
    stages: int = 1
    """From 2 on, rows are copied to shared memory ahead of their use, `stages` - 1 rows of them (Triton's pipeline)."""
    ahead: bool = False
    """A row is loaded to registers while the one before it is worked on."""
    early: bool = False
    """Forward: weight and bias are loaded before the row's sums instead of after them. Backward: ds is, and a row's
    statistics come with the row before it."""
    streaming: bool = False
    """What is read goes first from the L2 cache (`evict_first`): nothing that runs soon reads it again."""


@dataclasses.dataclass(frozen=True)
class ForwardSchedule(_Schedule):
    """Raises ValueError for loads ahead where a program has one row."""

    def __post_init__(self) -> None:
        if self.per_sm == 0 and (self.stages > 1 or self.ahead):
            raise ValueError(f"stages and ahead are of programs that go through rows: per_sm must be set in {self}")


@dataclasses.dataclass(frozen=True)
class BackwardSchedule(_Schedule):
    """Raises ValueError without `per_sm`."""

    joint: bool = False
    """The two sums of a row share their exchange between warps."""

    def __post_init__(self) -> None:
        if self.per_sm == 0:
            raise ValueError(f"programs of the backward pass go through rows: per_sm must be set in {self}")


FORWARD: dict[int, ForwardSchedule] = {
    768: ForwardSchedule(warps=1, split=True),
    2560: ForwardSchedule(warps=4, split=True),
}
"""By width, where another than the plain one has been measured to be faster (docs/mfu_log.md)."""
BACKWARD: dict[int, BackwardSchedule] = {
    768: BackwardSchedule(warps=2, split=True, per_sm=8, ahead=True, early=True, joint=True),
    2048: BackwardSchedule(warps=4, per_sm=4, stages=3, early=True, joint=True),
    2560: BackwardSchedule(warps=8, split=True, per_sm=2, ahead=True, early=True, joint=True),
}
PER_SM_WITH_SHIFT = {2048: 3}
"""By width, `per_sm` where the registers of dc leave room for fewer programs (168 a thread instead of 128)."""


def forward_schedule(width: int) -> ForwardSchedule:
    """How the forward kernel is run at this width."""
    return FORWARD.get(int(width)) or ForwardSchedule(warps_of(triton.next_power_of_2(width)))


def backward_schedule(width: int, has_shift: bool) -> BackwardSchedule:
    """How the backward kernel is run at this width, with dc or without."""
    warps = warps_of(triton.next_power_of_2(width))
    found = BACKWARD.get(int(width)) or BackwardSchedule(warps, per_sm=WARPS_PER_SM // warps)
    return dataclasses.replace(found, per_sm=PER_SM_WITH_SHIFT.get(int(width), found.per_sm)) if has_shift else found


def forward_candidates(width: int) -> dict[str, ForwardSchedule]:
    """Schedules to measure, by name; `plain` is that of widths without another in `FORWARD`. Programs on an SM are what
    registers allow (ptxas for sm_90, triton 3.6.0, the same at 768 and 2,560)."""
    warps = warps_of(triton.next_power_of_2(width))
    half, split = max(warps // 2, 1), tiles_of(width, True)[1] > 0
    found = {
        "plain": ForwardSchedule(warps),
        "early": ForwardSchedule(warps, early=True),
        "streaming": ForwardSchedule(warps, streaming=True),
        "wide": ForwardSchedule(min(2 * warps, 32)),
        "stages3": ForwardSchedule(warps, per_sm=_resident(warps, 80), stages=3, early=True),
    }
    if split:
        found |= {
            "split": ForwardSchedule(warps, split=True),
            "split,early": ForwardSchedule(warps, split=True, early=True),
            "split,half": ForwardSchedule(half, split=True),
            "split,half,early": ForwardSchedule(half, split=True, early=True),
            "split,half,early,streaming": ForwardSchedule(half, split=True, early=True, streaming=True),
            "split,ahead": ForwardSchedule(warps, True, _resident(warps, 80), ahead=True, early=True),
            "split,stages3": ForwardSchedule(warps, True, _resident(warps, 80), stages=3, early=True),
            "split,half,ahead": ForwardSchedule(half, True, _resident(half, 128), ahead=True, early=True),
            "split,half,stages3": ForwardSchedule(half, True, _resident(half, 128), stages=3, early=True),
        }
    return found


def backward_candidates(width: int) -> dict[str, BackwardSchedule]:
    """As `forward_candidates`."""
    warps = warps_of(triton.next_power_of_2(width))
    half, wide, split = max(warps // 2, 1), min(2 * warps, 32), tiles_of(width, True)[1] > 0

    def make(warps: int, registers: int, **fields: Any) -> BackwardSchedule:
        return BackwardSchedule(warps, per_sm=_resident(warps, registers), joint=True, early=True, **fields)

    found = {
        "plain": BackwardSchedule(warps, per_sm=WARPS_PER_SM // warps),
        "early": make(warps, 128),
        "ahead": make(warps, 168, ahead=True),
        "stages2": make(warps, 128, stages=2),
        "stages3": make(warps, 128, stages=3),
        "wide": make(wide, 80),
        "wide,stages3": make(wide, 88, stages=3),
        "wide,stages4": make(wide, 88, stages=4),
    }
    if split:
        found |= {
            "split": make(warps, 104, split=True),
            "split,ahead": make(warps, 128, split=True, ahead=True),
            "split,stages2": make(warps, 128, split=True, stages=2),
            "split,stages3": make(warps, 128, split=True, stages=3),
            "split,stages3,streaming": make(warps, 128, split=True, stages=3, streaming=True),
            "split,half": make(half, 168, split=True),
            "split,half,ahead": make(half, 200 if half > 1 else 168, split=True, ahead=True),
            "split,half,stages2": make(half, 168, split=True, stages=2),
            "split,half,stages3": make(half, 168, split=True, stages=3),
            "split,half,stages3,streaming": make(half, 168, split=True, stages=3, streaming=True),
            "split,half,stages4": make(half, 168 if half > 1 else 224, split=True, stages=4),
        }
    return found


def _resident(warps: int, registers: int) -> int:
    """Programs on an SM, at least one."""
    return max(REGISTERS_PER_SM // (32 * warps * registers), 1)


def tiles_of(width: int, split: bool) -> tuple[int, int]:
    """Columns of a row's two tiles, powers of two; the second 0 where there is one."""
    block = triton.next_power_of_2(width)
    if not split or block == width:
        return block, 0
    return block // 2, triton.next_power_of_2(width - block // 2)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sums(a, b, JOINT: tl.constexpr):
    """Sums of two tiles; JOINT: in one exchange between warps instead of two."""
    if JOINT:
        return tl.reduce((a, b), 0, _add_pairs)
    return tl.sum(a, axis=0), tl.sum(b, axis=0)


@triton.jit
def _load(ptr, row, width, FIRST: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr, EVICT: tl.constexpr):
    """(C,): a row's columns from FIRST, zeros where it has none. EXACT: it has them all."""
    columns = FIRST + tl.arange(0, C)
    place = ptr + (tl.cast(row, tl.int64) * width + columns)
    if EXACT:
        return tl.load(place, eviction_policy=EVICT)
    return tl.load(place, mask=columns < width, other=0.0, eviction_policy=EVICT)


@triton.jit
def _store(ptr, value, row, width, FIRST: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr):
    """The counterpart of `_load`; rounds to the tensor's dtype."""
    columns = FIRST + tl.arange(0, C)
    place = ptr + (tl.cast(row, tl.int64) * width + columns)
    if EXACT:
        tl.store(place, value.to(ptr.dtype.element_ty))
    else:
        tl.store(place, value.to(ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def _existing(value, width, FIRST: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr):
    """(C,) with zeros in the columns that the row doesn't have."""
    if EXACT:
        return value
    return tl.where(FIRST + tl.arange(0, C) < width, value, 0.0)


@triton.jit
def _add(x, f, HAS_ADD: tl.constexpr):
    """x + f in their dtype, or x."""
    if HAS_ADD:
        return (x.to(tl.float32) + f.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _scale(n, weight, bias, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        return n * weight.to(tl.float32) + bias.to(tl.float32)
    return n * weight.to(tl.float32)


@triton.jit
def _add_norm_kernel(
    x_ptr,  # (N, E)
    f_ptr,  # (N, E), read with HAS_ADD
    weight_ptr,  # (E,)
    bias_ptr,  # (E,), read with HAS_BIAS
    sum_ptr,  # (N, E), written with HAS_ADD
    y_ptr,  # (N, E)
    stats_ptr,  # (2, N) fp32: r, m; RMSNorm (1, N): r
    num_rows,
    width,
    eps,
    HAS_ADD: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    EXACT: tl.constexpr,
    LOOP: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
    EVICT: tl.constexpr,
):
    first, step = tl.program_id(0), tl.num_programs(0)
    turns = tl.cdiv(num_rows - first, step) if LOOP else 1
    if EARLY:
        weight = _load(weight_ptr, 0, width, 0, MAIN, EXACT, "")
        bias = weight
        if HAS_BIAS:
            bias = _load(bias_ptr, 0, width, 0, MAIN, EXACT, "")
        if REST:
            weight_rest = _load(weight_ptr, 0, width, MAIN, REST, EXACT, "")
            bias_rest = weight_rest
            if HAS_BIAS:
                bias_rest = _load(bias_ptr, 0, width, MAIN, REST, EXACT, "")
    if AHEAD:
        next_x = _load(x_ptr, first, width, 0, MAIN, EXACT, EVICT)
        next_f = next_x
        if HAS_ADD:
            next_f = _load(f_ptr, first, width, 0, MAIN, EXACT, EVICT)
        if REST:
            next_x_rest = _load(x_ptr, first, width, MAIN, REST, EXACT, EVICT)
            next_f_rest = next_x_rest
            if HAS_ADD:
                next_f_rest = _load(f_ptr, first, width, MAIN, REST, EXACT, EVICT)
    for turn in tl.range(0, turns, num_stages=STAGES):
        row = first + turn * step
        if AHEAD:
            x, f = next_x, next_f
            if REST:
                x_rest, f_rest = next_x_rest, next_f_rest
            following = tl.minimum(row + step, num_rows - 1)  # the last row again where there is no next one
            next_x = _load(x_ptr, following, width, 0, MAIN, EXACT, EVICT)
            if HAS_ADD:
                next_f = _load(f_ptr, following, width, 0, MAIN, EXACT, EVICT)
            if REST:
                next_x_rest = _load(x_ptr, following, width, MAIN, REST, EXACT, EVICT)
                if HAS_ADD:
                    next_f_rest = _load(f_ptr, following, width, MAIN, REST, EXACT, EVICT)
        else:
            x = _load(x_ptr, row, width, 0, MAIN, EXACT, EVICT)
            f = x
            if HAS_ADD:
                f = _load(f_ptr, row, width, 0, MAIN, EXACT, EVICT)
            if REST:
                x_rest = _load(x_ptr, row, width, MAIN, REST, EXACT, EVICT)
                f_rest = x_rest
                if HAS_ADD:
                    f_rest = _load(f_ptr, row, width, MAIN, REST, EXACT, EVICT)
        s = _add(x, f, HAS_ADD)
        if HAS_ADD:
            _store(sum_ptr, s, row, width, 0, MAIN, EXACT)
        s = s.to(tl.float32)
        if REST:
            s_rest = _add(x_rest, f_rest, HAS_ADD)
            if HAS_ADD:
                _store(sum_ptr, s_rest, row, width, MAIN, REST, EXACT)
            s_rest = s_rest.to(tl.float32)
        if HAS_MEAN:
            mean = tl.sum(s, axis=0)
            if REST:
                mean += tl.sum(s_rest, axis=0)
            mean /= width
            tl.store(stats_ptr + num_rows + row, mean)
            s = _existing(s - mean, width, 0, MAIN, EXACT)
            if REST:
                s_rest = _existing(s_rest - mean, width, MAIN, REST, EXACT)
        squares = tl.sum(s * s, axis=0)
        if REST:
            squares += tl.sum(s_rest * s_rest, axis=0)
        r = tl.rsqrt(squares / width + eps)
        tl.store(stats_ptr + row, r)
        if not EARLY:
            weight = _load(weight_ptr, 0, width, 0, MAIN, EXACT, "")
            bias = weight
            if HAS_BIAS:
                bias = _load(bias_ptr, 0, width, 0, MAIN, EXACT, "")
        _store(y_ptr, _scale(s * r, weight, bias, HAS_BIAS), row, width, 0, MAIN, EXACT)
        if REST:
            if not EARLY:
                weight_rest = _load(weight_ptr, 0, width, MAIN, REST, EXACT, "")
                bias_rest = weight_rest
                if HAS_BIAS:
                    bias_rest = _load(bias_ptr, 0, width, MAIN, REST, EXACT, "")
            _store(y_ptr, _scale(s_rest * r, weight_rest, bias_rest, HAS_BIAS), row, width, MAIN, REST, EXACT)


@triton.jit
def _normalised(s, r, mean, width, FIRST: tl.constexpr, C: tl.constexpr, HAS_MEAN: tl.constexpr, EXACT: tl.constexpr):
    """n of the C columns from FIRST."""
    n = s.to(tl.float32)
    if HAS_MEAN:
        n = _existing(n - mean, width, FIRST, C, EXACT)
    return n * r


@triton.jit
def _gradient(g, n, r, along, level, d_sum, HAS_MEAN: tl.constexpr, HAS_STREAM: tl.constexpr):
    """dx of the module's docstring, with `along` mean(g·n) and `level` mean(g)."""
    d_x = g - n * along
    if HAS_MEAN:
        d_x -= level
    d_x *= r
    if HAS_STREAM:
        d_x += d_sum.to(tl.float32)
    return d_x


@triton.jit
def _add_norm_backward_kernel(
    d_y_ptr,  # (N, E)
    d_sum_ptr,  # (N, E), read with HAS_STREAM
    sum_ptr,  # (N, E)
    weight_ptr,  # (E,)
    stats_ptr,  # (2, N) or (1, N) fp32
    d_x_ptr,  # (N, E)
    parts_ptr,  # (K, P, E) fp32: dw, with HAS_BIAS db, with HAS_SHIFT dc
    num_rows,
    width,
    HAS_STREAM: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    JOINT: tl.constexpr,
    EARLY: tl.constexpr,
    EVICT: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    weight = _load(weight_ptr, 0, width, 0, MAIN, EXACT, "").to(tl.float32)
    d_weight = tl.zeros((MAIN,), dtype=tl.float32)
    d_bias = tl.zeros((MAIN,), dtype=tl.float32)
    d_shift = tl.zeros((MAIN,), dtype=tl.float32)
    if REST:
        weight_rest = _load(weight_ptr, 0, width, MAIN, REST, EXACT, "").to(tl.float32)
        d_weight_rest = tl.zeros((REST,), dtype=tl.float32)
        d_bias_rest = tl.zeros((REST,), dtype=tl.float32)
        d_shift_rest = tl.zeros((REST,), dtype=tl.float32)
    if EARLY:
        next_r = tl.load(stats_ptr + program)
        next_mean = next_r
        if HAS_MEAN:
            next_mean = tl.load(stats_ptr + num_rows + program)
    if AHEAD:
        next_d_y = _load(d_y_ptr, program, width, 0, MAIN, EXACT, EVICT)
        next_s = _load(sum_ptr, program, width, 0, MAIN, EXACT, EVICT)
        next_d_sum = next_s
        if HAS_STREAM:
            next_d_sum = _load(d_sum_ptr, program, width, 0, MAIN, EXACT, EVICT)
        if REST:
            next_d_y_rest = _load(d_y_ptr, program, width, MAIN, REST, EXACT, EVICT)
            next_s_rest = _load(sum_ptr, program, width, MAIN, REST, EXACT, EVICT)
            next_d_sum_rest = next_s_rest
            if HAS_STREAM:
                next_d_sum_rest = _load(d_sum_ptr, program, width, MAIN, REST, EXACT, EVICT)
    for row in tl.range(program, num_rows, num_programs, num_stages=STAGES):
        following = tl.minimum(row + num_programs, num_rows - 1)  # the last row again where there is no next one
        if AHEAD:
            d_y, s, d_sum = next_d_y, next_s, next_d_sum
            if REST:
                d_y_rest, s_rest, d_sum_rest = next_d_y_rest, next_s_rest, next_d_sum_rest
            next_d_y = _load(d_y_ptr, following, width, 0, MAIN, EXACT, EVICT)
            next_s = _load(sum_ptr, following, width, 0, MAIN, EXACT, EVICT)
            if HAS_STREAM:
                next_d_sum = _load(d_sum_ptr, following, width, 0, MAIN, EXACT, EVICT)
            if REST:
                next_d_y_rest = _load(d_y_ptr, following, width, MAIN, REST, EXACT, EVICT)
                next_s_rest = _load(sum_ptr, following, width, MAIN, REST, EXACT, EVICT)
                if HAS_STREAM:
                    next_d_sum_rest = _load(d_sum_ptr, following, width, MAIN, REST, EXACT, EVICT)
        else:
            d_y = _load(d_y_ptr, row, width, 0, MAIN, EXACT, EVICT)
            s = _load(sum_ptr, row, width, 0, MAIN, EXACT, EVICT)
            d_sum = s
            if REST:
                d_y_rest = _load(d_y_ptr, row, width, MAIN, REST, EXACT, EVICT)
                s_rest = _load(sum_ptr, row, width, MAIN, REST, EXACT, EVICT)
                d_sum_rest = s_rest
            if EARLY and HAS_STREAM:
                d_sum = _load(d_sum_ptr, row, width, 0, MAIN, EXACT, EVICT)
                if REST:
                    d_sum_rest = _load(d_sum_ptr, row, width, MAIN, REST, EXACT, EVICT)
        if EARLY:
            r, mean = next_r, next_mean
            next_r = tl.load(stats_ptr + following)
            if HAS_MEAN:
                next_mean = tl.load(stats_ptr + num_rows + following)
        else:
            r = tl.load(stats_ptr + row)
            mean = r
            if HAS_MEAN:
                mean = tl.load(stats_ptr + num_rows + row)
        d_y = d_y.to(tl.float32)
        n = _normalised(s, r, mean, width, 0, MAIN, HAS_MEAN, EXACT)
        d_weight += d_y * n
        if HAS_BIAS:
            d_bias += d_y
        g = d_y * weight
        along, level = _sums(g * n, g, JOINT)
        if REST:
            d_y_rest = d_y_rest.to(tl.float32)
            n_rest = _normalised(s_rest, r, mean, width, MAIN, REST, HAS_MEAN, EXACT)
            d_weight_rest += d_y_rest * n_rest
            if HAS_BIAS:
                d_bias_rest += d_y_rest
            g_rest = d_y_rest * weight_rest
            along_rest, level_rest = _sums(g_rest * n_rest, g_rest, JOINT)
            along += along_rest
            level += level_rest
        along /= width
        level /= width
        if HAS_STREAM and not (EARLY or AHEAD):
            d_sum = _load(d_sum_ptr, row, width, 0, MAIN, EXACT, EVICT)
            if REST:
                d_sum_rest = _load(d_sum_ptr, row, width, MAIN, REST, EXACT, EVICT)
        d_x = _gradient(g, n, r, along, level, d_sum, HAS_MEAN, HAS_STREAM)
        _store(d_x_ptr, d_x, row, width, 0, MAIN, EXACT)
        if HAS_SHIFT:
            d_shift += d_x
        if REST:
            d_x_rest = _gradient(g_rest, n_rest, r, along, level, d_sum_rest, HAS_MEAN, HAS_STREAM)
            _store(d_x_ptr, d_x_rest, row, width, MAIN, REST, EXACT)
            if HAS_SHIFT:
                d_shift_rest += d_x_rest
    part, following_part = parts_ptr + program * width, num_programs * width
    _store(part, d_weight, 0, width, 0, MAIN, EXACT)
    if REST:
        _store(part, d_weight_rest, 0, width, MAIN, REST, EXACT)
    if HAS_BIAS:
        part += following_part
        _store(part, d_bias, 0, width, 0, MAIN, EXACT)
        if REST:
            _store(part, d_bias_rest, 0, width, MAIN, REST, EXACT)
    if HAS_SHIFT:
        part += following_part
        _store(part, d_shift, 0, width, 0, MAIN, EXACT)
        if REST:
            _store(part, d_shift_rest, 0, width, MAIN, REST, EXACT)


def programs_of(num_rows: int, per_sm: int, device: torch.device) -> int:
    """P: programs that go through rows, as many as run at once."""
    if device.type != "cuda":
        return min(num_rows, CPU_PROGRAMS)
    return min(num_rows, per_sm * torch.cuda.get_device_properties(device).multi_processor_count)


def constants_of(schedule: ForwardSchedule | BackwardSchedule, width: int) -> dict[str, Any]:
    """The kernels' constexpr arguments that the schedule decides."""
    main, rest = tiles_of(width, schedule.split)
    found: dict[str, Any] = {
        "MAIN": main,
        "REST": rest,
        "EXACT": main + rest == width,
        "STAGES": schedule.stages,
        "AHEAD": schedule.ahead,
        "EARLY": schedule.early,
        "EVICT": "evict_first" if schedule.streaming else "",
    }
    if isinstance(schedule, BackwardSchedule):
        return found | {"JOINT": schedule.joint}
    return found | {"LOOP": schedule.per_sm > 0}


def run_forward(
    x: Tensor, f: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, mean: bool, schedule: ForwardSchedule
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_norm` by the given schedule."""
    x = x.contiguous()
    rows, width = x.shape
    total = torch.empty_like(x) if f is not None else x.new_empty(0)
    y, stats = torch.empty_like(x), x.new_empty((2 if mean else 1, rows), dtype=torch.float32)
    programs = programs_of(rows, schedule.per_sm, x.device) if schedule.per_sm else rows
    _add_norm_kernel[(programs,)](
        x_ptr=x,
        f_ptr=x if f is None else f.contiguous(),
        weight_ptr=weight,
        bias_ptr=weight if bias is None else bias,
        sum_ptr=total,
        y_ptr=y,
        stats_ptr=stats,
        num_rows=rows,
        width=width,
        eps=eps,
        HAS_ADD=f is not None,
        HAS_MEAN=mean,
        HAS_BIAS=bias is not None,
        num_warps=schedule.warps,
        **constants_of(schedule, width),
    )
    return total, y, stats


def run_backward(
    d_y: Tensor,
    d_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    stats: Tensor,
    has_bias: bool,
    has_shift: bool,
    schedule: BackwardSchedule,
) -> tuple[Tensor, Tensor]:
    """`add_norm_backward` by the given schedule."""
    rows, width = total.shape
    programs = programs_of(rows, schedule.per_sm, total.device)
    d_x = torch.empty_like(total)
    parts = total.new_empty((1 + has_bias + has_shift, programs, width), dtype=torch.float32)
    _add_norm_backward_kernel[(programs,)](
        d_y_ptr=d_y.contiguous(),
        d_sum_ptr=total if d_sum is None else d_sum.contiguous(),
        sum_ptr=total,
        weight_ptr=weight,
        stats_ptr=stats,
        d_x_ptr=d_x,
        parts_ptr=parts,
        num_rows=rows,
        width=width,
        HAS_STREAM=d_sum is not None,
        HAS_MEAN=stats.shape[0] == 2,
        HAS_BIAS=has_bias,
        HAS_SHIFT=has_shift,
        num_warps=schedule.warps,
        **constants_of(schedule, width),
    )
    return d_x, parts


@torch.library.custom_op("flashtrain::add_norm", mutates_args=())
def add_norm(
    x: Tensor, f: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """s (N, E) (without `f` empty: it is x), y (N, E), and r and with `mean` m, fp32 (2 or 1, N)."""
    return run_forward(x, f, weight, bias, eps, mean, forward_schedule(x.shape[1]))


@add_norm.register_fake
def _add_norm_fake(
    x: Tensor, f: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape) if f is not None else x.new_empty(0)
    return total, x.new_empty(x.shape), x.new_empty((2 if mean else 1, x.shape[0]), dtype=torch.float32)


@torch.library.custom_op("flashtrain::add_norm_backward", mutates_args=())
def add_norm_backward(
    d_y: Tensor, d_sum: Tensor | None, total: Tensor, weight: Tensor, stats: Tensor, has_bias: bool, has_shift: bool
) -> tuple[Tensor, Tensor]:
    """dx (N, E), and each program's part of dw, with `has_bias` of db and with `has_shift` of dc, fp32 (K, P, E).
    `d_sum`: ds, None for zero."""
    schedule = backward_schedule(total.shape[1], has_shift)
    return run_backward(d_y, d_sum, total, weight, stats, has_bias, has_shift, schedule)


@add_norm_backward.register_fake
def _add_norm_backward_fake(
    d_y: Tensor, d_sum: Tensor | None, total: Tensor, weight: Tensor, stats: Tensor, has_bias: bool, has_shift: bool
) -> tuple[Tensor, Tensor]:
    rows, width = total.shape
    programs = programs_of(rows, backward_schedule(width, has_shift).per_sm, total.device)
    parts = (1 + has_bias + has_shift, programs, width)
    return total.new_empty(total.shape), total.new_empty(parts, dtype=torch.float32)


def compile_cases() -> list[CompileCase]:
    """Both kernels as LayerNorm with bias, on bf16 with a residual sum, by every candidate at three widths; and the
    backward kernel with dc, as it is shipped, at more.

    Quick are those that are shipped, for these widths and for others.
    """
    from kernels.compile_check import CompileCase

    candidates_of = (("forward", forward_candidates), ("backward", backward_candidates))
    plain = [
        CompileCase(
            name=f"norm.{direction}[{width},{name}]",
            make_source=lambda schedule=schedule, width=width: _source(schedule, width),  # type: ignore[misc]
            num_warps=schedule.warps,
            quick=name == "plain" or schedule in (forward_schedule(width), backward_schedule(width, False)),
        )
        for width in (768, 2048, 2560)
        for direction, candidates in candidates_of
        for name, schedule in candidates(width).items()
    ]
    shifted = [
        CompileCase(
            name=f"norm.backward[{width},shift]",
            make_source=lambda width=width: _source(backward_schedule(width, True), width, True),  # type: ignore[misc]
            num_warps=backward_schedule(width, True).warps,
            quick=True,
        )
        for width in SHIFT_WIDTHS
    ]
    return [*plain, *shifted]


def _source(schedule: ForwardSchedule | BackwardSchedule, width: int, has_shift: bool = False) -> ASTSource:
    from triton.compiler import ASTSource

    backward = isinstance(schedule, BackwardSchedule)
    kernel: Any = _add_norm_backward_kernel if backward else _add_norm_kernel
    constants = constants_of(schedule, width) | {"HAS_MEAN": True, "HAS_BIAS": True}
    constants |= {"HAS_STREAM": True, "HAS_SHIFT": has_shift} if backward else {"HAS_ADD": True}
    types = {"stats_ptr": "*fp32", "parts_ptr": "*fp32", "num_rows": "i32", "width": "i32", "eps": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if name not in constants and name != "eps"]
    return ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
