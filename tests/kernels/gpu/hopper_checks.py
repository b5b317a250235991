"""Checks of the Hopper path on a GPU, in a process of its own: ``python -m tests.kernels.gpu.hopper_checks
GROUP``.

A wrong barrier protocol hangs the GPU's stream for good, and with it the process. So test_hopper_gpu.py runs
each group here under a watchdog; each check announces itself before it starts, which names the one that hung.
Exit status 1 if any check failed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import kernels
from kernels.attention import op
from kernels.attention.dispatch import PATH_ENV
from kernels.attention.hopper import tuning
from kernels.attention.reference import attention_reference
from tests.kernels.cases import Case, assert_close, assert_lse, check_dense, check_varlen, leaves, make_inputs

Check = tuple[str, Callable[[], None]]
BF16, FP16 = torch.bfloat16, torch.float16
CAUSAL = {"causal": True}
# The shapes of flash-attn's own suite.
SHAPES = (
    (1, 1), (3, 3), (64, 32), (64, 128), (128, 192), (239, 1), (799, 3), (113, 203), (128, 217), (113, 211), (108, 256),
    (256, 512), (384, 256), (640, 128), (512, 256), (1023, 1024), (1024, 1023), (2048, 2048), (4224, 4224),
)  # fmt: skip


def dense(case: Case) -> Check:
    return str(case), lambda: check_dense(case)


def shapes() -> Iterator[Check]:
    for (sq, sk), head_dim, causal in itertools.product(SHAPES, (64, 128), (False, True)):
        heads = 2 if max(sq, sk) > 2048 else 4
        dtype = BF16 if causal else FP16
        yield dense(Case(sq, sk, head_dim, heads, heads, batch=2, dtype=dtype, options={"causal": causal}))


def rings() -> Iterator[Check]:
    """1, 2, 3, stages and stages + 1 key blocks; fewer and more tiles than SMs (132 on an H100 and an H200)."""
    for head_dim, keys, (batch, heads) in itertools.product((64, 128, 192), (1, 2, 3, 4, 5), ((1, 1), (4, 8), (9, 16))):
        sizes = (256, 128 * keys, head_dim, heads, heads, batch)
        yield dense(Case(*sizes, dtype=BF16))
        yield dense(Case(*sizes, dtype=BF16, options=CAUSAL))


def windows() -> Iterator[Check]:
    edges = (0, 1, 63, 64, 127, 128, 129)
    pairs = [(a, 0) for a in edges] + [(-1, b) for b in edges] + [(a, a) for a in edges] + [(200, -1)]
    for (left, right), (sq, sk) in itertools.product(pairs, ((300, 300), (513, 700), (700, 513))):
        yield dense(Case(sq, sk, 64, dtype=BF16, options={"window_size": (left, right)}))
    yield dense(Case(2000, 2000, 128, dtype=BF16, options={"window_size": (256, 0)}))
    for head_dim in (64, 128):  # more keys than FIRST_STORES_KEYS, fewer of them in sight
        yield dense(Case(6000, 6000, head_dim, 4, 2, dtype=BF16, options={"window_size": (1023, 0)}))


def heads_and_widths() -> Iterator[Check]:
    for heads_k in (1, 2, 3, 6):
        yield dense(Case(500, 500, 128, 6, heads_k, batch=2, dtype=BF16, options=CAUSAL))
    for head_dim in (8, 32, 40, 80, 96, 112, 120):
        yield dense(Case(333, 444, head_dim, dtype=BF16, options=CAUSAL))
    for scale in (1.0, 0.01):
        yield dense(Case(400, 400, 64, dtype=BF16, options={"softmax_scale": scale}))
    for magnitude in (8.0, 30.0):
        yield dense(Case(400, 400, 128, dtype=BF16, magnitude=magnitude, options=CAUSAL))
    yield "more than 65,535 heads", lambda: forward_only(Case(17, 33, 16, 66_000, 66_000, dtype=BF16))


def forward_only(case: Case) -> None:
    q, k, v, _, _ = make_inputs(case)
    out, lse, _ = kernels.flash_attn_func(q, k, v, return_attn_probs=True, **case.options)
    truth, truth_lse = attention_reference(q, k, v, **case.options)
    plain, _ = attention_reference(q, k, v, **case.options, dtype=case.dtype)
    assert_close("out", out, plain, truth, 2)
    assert_lse(lse, truth_lse)


VARLEN_LENGTHS = ([100, 200, 300], [1, 0, 129, 512, 64], [1000] * 5 + [3] * 40, [2048, 17, 900])


def wide(width: int) -> Iterator[Check]:
    """Head dims above 128, whose backward is a kernel of its own, and which are two pieces up to 192: shapes, narrower
    head dims of the same width, masks, groups, varlen."""
    for (sq, sk), causal in itertools.product(SHAPES, (False, True)):
        heads = 2 if max(sq, sk) > 2048 else 4
        yield dense(Case(sq, sk, width, heads, heads // 2, batch=2, dtype=BF16, options={"causal": causal}))
    for head_dim in (width - 56, width - 32, width - 8, width):
        yield dense(Case(700, 900, head_dim, 4, 2, dtype=BF16, options=CAUSAL))
        yield dense(Case(333, 444, head_dim, dtype=FP16))
    for window in ((0, 0), (1, 0), (62, 63), (63, 64), (64, 0), (65, 65), (500, 100), (-1, 100)):
        yield dense(Case(513, 700, width, dtype=BF16, options={"window_size": window}))
    for heads_k in (1, 3, 6):
        yield dense(Case(500, 500, width, 6, heads_k, batch=2, dtype=BF16, options=CAUSAL))
    yield dense(Case(400, 400, width, dtype=BF16, magnitude=8.0, options=CAUSAL))
    for lengths, head_dim, options in itertools.product(VARLEN_LENGTHS, (width - 56, width), ({}, CAUSAL)):
        case = Case(0, 0, head_dim, 4, 2, dtype=BF16, options=options)
        yield f"varlen {lengths} {case}", lambda lq=lengths, case=case: check_varlen(lq, lq, case, tail=37)


def wide_repeats(width: int) -> Iterator[Check]:
    """Head dims above 128: the race detector, and dQ's sums in a fixed order."""
    for sq, causal, fixed in itertools.product((512, 1000, 4096), (False, True), (False, True)):
        options = {"causal": causal, "deterministic": fixed}
        case = Case(sq, sq, width, 8, 4, batch=2, dtype=BF16, options=options)
        yield f"20 runs {case}", lambda case=case: run_twice_the_same(case)
    for (sq, sk), causal in itertools.product(((1, 1), (239, 1), (113, 211), (512, 4096), (4096, 512)), (False, True)):
        options = {"causal": causal, "deterministic": True}
        yield dense(Case(sq, sk, width, 4, 2, batch=2, dtype=BF16, options=options))
    for window in ((0, 0), (63, 64), (128, 0), (1000, 500), (-1, 100)):
        yield dense(Case(1500, 2100, width, dtype=BF16, options={"window_size": window, "deterministic": True}))
    for lengths in VARLEN_LENGTHS:
        case = Case(0, 0, width, 4, 2, dtype=BF16, options={**CAUSAL, "deterministic": True})
        yield f"varlen {lengths} {case}", lambda lq=lengths, case=case: check_varlen(lq, lq, case, tail=37)


WIDE_VARIANTS: tuple[dict[str, Any], ...] = (
    {"first_stores": True},
    {"pdl": True},
    {"first_stores": True, "pdl": True},
    {"lookahead": True},
    {"dq_columns": 64, "dq_stages": 1},
    {"dq_columns": 64, "dq_stages": 2, "do_stages": 1},
    {"dq_columns": 64, "dq_stages": 3, "do_stages": 1},
    {"dq_columns": 32, "dq_stages": 4, "do_stages": 1},
)
"""Changed fields of the backward's tiles above head dim 128."""
WIDE_VARIANTS_192: tuple[dict[str, Any], ...] = (
    {"dq_columns": 32},
    {"dq_columns": 32, "dq_stages": 2, "q_stages": 3, "do_stages": 3},
    {"dq_stages": 2, "q_stages": 3},
)
"""More of them: dQ in pieces as at 256, and deeper rings, which have no shared memory there."""


def wide_variants(width: int) -> Iterator[Check]:
    """As launch_variants, for head dims above 128."""
    case = Case(700, 700, width, 4, 2, batch=3, dtype=BF16, options=CAUSAL)
    for fields in WIDE_VARIANTS + (WIDE_VARIANTS_192 if width == 192 else ()):
        tile = dataclasses.replace(tuning.BACKWARD[width], **fields)
        yield f"{tile}", lambda tile=tile: with_tile(tuning.BACKWARD, width, tile, check_dense, case)


def varlen() -> Iterator[Check]:
    lists = [
        ([100, 200, 300], [100, 200, 300]),
        ([1, 0, 129, 512, 64], [5, 40, 129, 700, 0]),
        ([1000] * 5 + [3] * 40, [1000] * 5 + [3] * 40),
        ([2048, 17, 900], [1024, 300, 2048]),
    ]
    for (lq, lk), head_dim, causal in itertools.product(lists, (64, 128), (False, True)):
        case = Case(0, 0, head_dim, 4, 2, dtype=BF16, options={"causal": causal})
        yield f"varlen {lq} {lk} {case}", lambda lq=lq, lk=lk, case=case: check_varlen(lq, lk, case, tail=37)
    case = Case(0, 0, 64, dtype=FP16, options={"window_size": (100, 0)})
    yield "varlen window", lambda: check_varlen([300, 700], [300, 700], case)


def run_twice_the_same(case: Case, times: int = 20, backward: bool = True) -> None:
    """Out, lse, with ``backward`` dk, dv, and dq if it is deterministic, bitwise equal over ``times`` runs while other
    work moves the CTAs around: the race detector.
    """
    q, k, v, dout, _ = make_inputs(case)
    noise = torch.randn(512, 512, device="cuda")
    side = torch.cuda.Stream()
    first: tuple[Tensor, ...] | None = None
    for i in range(times):
        with torch.cuda.stream(side):
            for _ in range(i % 4):
                noise = noise @ noise * 1e-3
        mine = leaves(q, k, v)
        out, lse, _ = kernels.flash_attn_func(*mine, return_attn_probs=True, **case.options)
        now: tuple[Tensor, ...] = (out, lse)
        if backward:
            dq, dk, dv = torch.autograd.grad(out, mine, dout)
            now = (out, lse, dk, dv, *([dq] if case.options.get("deterministic") else []))
        first = now if first is None else first
        for name, a, b in zip(("out", "lse", "dk", "dv", "dq"), first, now, strict=False):
            assert torch.equal(a, b), f"{name} differs in run {i}"


def repeats() -> Iterator[Check]:
    for head_dim, sq, causal in itertools.product((64, 128), (512, 1000, 4096), (False, True)):
        case = Case(sq, sq, head_dim, 8, 4, batch=3, dtype=BF16, options={"causal": causal})
        yield f"20 runs {case}", lambda case=case: run_twice_the_same(case)


def deterministic() -> Iterator[Check]:
    """dQ in a fixed order: right, and bitwise repeatable, with fewer and many more CTAs than SMs, every kind of walk
    (windows, more keys than queries, rows that see no key, groups of heads, varlen) and a captured graph."""
    fixed = {"deterministic": True}
    for head_dim, (sq, sk), causal in itertools.product(
        (64, 128), ((1, 1), (64, 128), (239, 1), (113, 211), (1024, 1023), (512, 4096), (4096, 512)), (False, True)
    ):
        yield dense(Case(sq, sk, head_dim, 4, 2, batch=2, dtype=BF16, options={"causal": causal, **fixed}))
    for window in ((0, 0), (1, 0), (127, 128), (128, 0), (-1, 300), (300, -1), (1000, 500)):
        yield dense(Case(1500, 2100, 64, dtype=BF16, options={"window_size": window, **fixed}))
    for lengths in ([100, 200, 300], [1, 0, 129, 512, 64], [1000] * 5 + [3] * 40, [2048, 17, 900]):
        case = Case(0, 0, 128, 4, 2, dtype=BF16, options={**CAUSAL, **fixed})
        yield f"varlen {lengths} {case}", lambda lq=lengths, case=case: check_varlen(lq, lq, case, tail=37)
    for head_dim, sq, causal, heads_k in itertools.product((64, 128), (512, 4096), (False, True), (2, 16)):
        case = Case(sq, sq, head_dim, 16, heads_k, batch=4, dtype=BF16, options={"causal": causal, **fixed})
        yield f"20 runs {case}", lambda case=case: run_twice_the_same(case)
    case = Case(16384, 16384, 128, 4, 4, dtype=BF16, options={**CAUSAL, **fixed})
    yield f"20 runs {case}", lambda case=case: run_twice_the_same(case)
    window = Case(4000, 4000, 128, 8, 8, batch=2, dtype=BF16, options={"window_size": (700, 0), **fixed})
    yield f"20 runs {window}", lambda case=window: run_twice_the_same(case)


def packed_layouts() -> None:
    """Slices of a qkv tensor and of a larger allocation give what contiguous tensors give, to the bit."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 700, 3, 4, 128, device="cuda", dtype=BF16)
    packed = kernels.flash_attn_qkvpacked_func(qkv, causal=True)
    separate = kernels.flash_attn_func(*(t.contiguous() for t in qkv.unbind(2)), causal=True)
    assert torch.equal(packed, separate)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv.unbind(2)]  # (B, H, S, D) in memory
    assert torch.equal(packed, kernels.flash_attn_func(*transposed, causal=True))


def graph_capture() -> None:
    """A captured forward and backward, replayed on new inputs and beside eager calls."""
    case = Case(600, 600, 128, 8, 8, batch=2, dtype=BF16, options=CAUSAL)
    q, k, v, dout, _ = make_inputs(case)
    static = leaves(q, k, v)

    def step() -> tuple[Tensor, ...]:
        out = kernels.flash_attn_func(*static, causal=True)
        return (out, *torch.autograd.grad(out, static, dout))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for t in static:
                t.copy_(torch.randn_like(t))
        graph.replay()
        for name, got, want in zip(("out", "dq", "dk", "dv"), captured, step(), strict=True):
            if name == "dq":  # summed in varying order
                torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)
            else:
                assert torch.equal(got, want), f"{name} differs, seed {seed}"


def streams() -> None:
    """Calls on two streams at once do not share their tile counters."""
    case = Case(2048, 2048, 128, 16, 16, batch=4, dtype=BF16, options=CAUSAL)
    q, k, v, _, _ = make_inputs(case)
    want = kernels.flash_attn_func(q, k, v, causal=True)
    torch.cuda.synchronize()
    lanes = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for _ in range(10):
        for lane in lanes:
            with torch.cuda.stream(lane):
                results.append(kernels.flash_attn_func(q, k, v, causal=True))
    torch.cuda.synchronize()
    assert all(torch.equal(want, got) for got in results)


def end_of_allocation() -> None:
    """Ragged inputs whose last row ends an allocation of whole pages."""
    rows, heads, head_dim = 333, 2, 128
    pages = torch.randn(2 * 2**20 // 2 * 4, device="cuda").to(BF16)
    q = pages[-rows * heads * head_dim :].view(1, rows, heads, head_dim)
    got = kernels.flash_attn_func(q, q, q, causal=True)
    assert torch.equal(got, kernels.flash_attn_func(*(q.clone() for _ in range(3)), causal=True))


def beyond_2_31() -> None:
    """More than 2^31 elements; the last head of the last sequence must be right."""
    batch, seqlen, heads, head_dim = 9, 32768, 64, 128
    q = torch.randn(batch, seqlen, heads, head_dim, device="cuda", dtype=BF16)
    out = kernels.flash_attn_func(q, q, q, causal=True)
    last = q[-1:, :, -1:].contiguous()
    assert torch.equal(out[-1:, :, -1:], kernels.flash_attn_func(last, last, last, causal=True))


def launch_variants() -> Iterator[Check]:
    """Tiles that tuning.py does not choose but a measurement may: they must be right before they are timed."""
    case = Case(700, 700, 64, 4, 2, batch=3, dtype=BF16, options=CAUSAL)
    for tile in (
        tuning.ForwardTile(192, 128, 2, 160, own_o=True, pingpong=True),
        tuning.ForwardTile(192, 128, 2, 160, own_o=True, pingpong=False),
        tuning.ForwardTile(128, 128, 2, 240, own_o=False, pingpong=True),
        tuning.ForwardTile(128, 128, 3, 240, own_o=True, pingpong=False),
    ):
        yield f"{tile}", lambda tile=tile: with_forward_tile(tile, check_dense, case)
    for tall in (
        Case(700, 700, 64, 4, 2, batch=3, dtype=BF16),
        Case(1, 4097, 64, 4, 2, dtype=FP16, options=CAUSAL),
        Case(4200, 4300, 40, 3, 1, dtype=BF16, options=CAUSAL),
    ):
        yield f"tall {tall}", lambda case=tall: check_dense(case)
    for options in ({}, CAUSAL):
        case = Case(0, 0, 64, 4, 2, dtype=BF16, options=options)
        yield f"tall varlen {case}", lambda case=case: check_varlen([1, 4100, 0, 193, 900], [77, 4100, 5, 193, 1], case)
    adding = dataclasses.replace(tuning.BACKWARD[128], first_stores=False)
    for options in ({}, CAUSAL, {"window_size": (100, 0)}):
        case = Case(700, 700, 128, 4, 2, batch=3, dtype=BF16, options=options)
        yield f"adding {case}", lambda case=case: with_tile(tuning.BACKWARD, 128, adding, check_dense, case)
    for backward_tile in (
        tuning.BackwardTile(3, 3),
        tuning.BackwardTile(2, 2, first_stores=True),
        tuning.BackwardTile(2, 2, pdl=True),
        tuning.BackwardTile(2, 2, first_stores=True, pdl=True),
    ):
        yield f"{backward_tile}", lambda tile=backward_tile: with_tile(tuning.BACKWARD, 64, tile, check_dense, case)


BACKWARD_VARIANTS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "named": [
        (64, {"named": True}),
        (128, {"named": True}),
        (64, {"named": True, "q_stages": 3, "do_stages": 3}),
    ],
    "pairs": [
        (64, {"pairs": True, "named": True}),
        (64, {"pairs": True, "named": True, "kv_registers": True}),
        (64, {"pairs": True}),
    ],
}
"""Group -> (width, changed fields) of the backward's other orders of work."""


def backward_variants(group: str) -> Iterator[Check]:
    """Every walk, ring phase and mask, and 20 equal runs of each."""
    common = {"q_stages": 2, "do_stages": 2}
    fixed = {"deterministic": True}
    for width, fields in BACKWARD_VARIANTS[group]:
        tile = tuning.BackwardTile(**(common | fields))
        checks: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        for sq, sk in ((1, 1), (64, 128), (128, 64), (65, 300), (700, 513), (1000, 1000), (2048, 4096)):
            for options in ({}, CAUSAL, {"window_size": (100, 0)}, {"window_size": (64, 129)}, {**CAUSAL, **fixed}):
                checks.append((check_dense, (Case(sq, sk, width, 4, 2, batch=2, dtype=BF16, options=options),)))
        for options in ({}, CAUSAL, {**CAUSAL, **fixed}):
            case = Case(0, 0, width, 4, 2, dtype=BF16, options=options)
            for lengths in ([1, 0, 129, 512, 64], [1000] * 5 + [3] * 40):
                checks.append((check_varlen, (lengths, lengths, case)))
        for options in ({}, CAUSAL, {**CAUSAL, **fixed}):
            checks.append(
                (run_twice_the_same, (Case(4096, 4096, width, 16, 16, batch=2, dtype=BF16, options=options),))
            )
        for check, arguments in checks:
            name = f"{fields} {check.__name__} {' '.join(map(str, arguments))}"
            yield name, functools.partial(with_tile, tuning.BACKWARD, width, tile, check, *arguments)


def with_tile(table: dict[int, Any], width: int, tile: Any, check: Callable[..., None], *arguments: Any) -> None:
    """``check`` with this tile at this width."""
    try:
        with mock.patch.dict(table, {width: tile}):
            op.forget()  # what was planned for the other tile
            check(*arguments)
    finally:
        op.forget()


def rounding() -> Iterator[Check]:
    """dQ out of the main kernel: in a fixed order of sums the bits of a kernel of its own, for fewer and more CTAs than
    run at once and than lie between two that meet, with sums stored first and zeroed, and as fast as they come."""
    tiles = {
        width: {
            "shipped": {},
            "at once": {"lag_sms": 0},
            "late": {"lag_sms": 3},
            "overlapping": {"pdl": True},
        }
        for width in (64, 128)
    }
    shapes = [
        (1, 1, 4),
        (65, 2, 4),
        (512, 1, 2),
        (512, 32, 16),
        (1000, 9, 16),
        (2048, 4, 16),
        (5000, 1, 6),
        (8192, 1, 4),
    ]
    for (width, variants), (sq, batch, heads), causal in itertools.product(tiles.items(), shapes, (False, True)):
        case = Case(sq, sq, width - 8 * causal, heads, heads // 2, batch=batch, dtype=BF16, options={"causal": causal})
        yield f"bits of {case}", functools.partial(rounds_alike, case, width, variants)
    for width, causal in itertools.product((64, 128), (False, True)):
        case = Case(500, 500, width, 6, 3, batch=5, dtype=FP16, options={"causal": causal})
        yield dense(case)
        case = Case(777, 777, width, 32, 32, batch=4, dtype=BF16, options={"causal": causal, "deterministic": True})
        yield f"20 runs {case}", functools.partial(run_twice_the_same, case)


def rounds_alike(case: Case, width: int, variants: dict[str, dict[str, Any]]) -> None:
    """dQ, dK and dV of tiles that round in the main kernel, bit for bit those of one that doesn't, three times each."""
    q, k, v, dout, _ = make_inputs(case)
    options = {**case.options, "deterministic": True}

    def gradients() -> tuple[Tensor, ...]:
        mine = leaves(q, k, v)
        return torch.autograd.grad(kernels.flash_attn_func(*mine, **options), mine, dout)

    want: list[Tensor] = []
    with_tile(
        tuning.BACKWARD,
        width,
        dataclasses.replace(tuning.BACKWARD[width], rounds_keys=0),
        lambda: want.extend(gradients()),
    )
    for name, fields in variants.items():

        def check(name: str = name) -> None:
            for turn in range(2):
                for which, a, b in zip(("dq", "dk", "dv"), gradients(), want, strict=True):
                    assert torch.equal(a, b), f"{which} differs, {name}, run {turn}"

        with_tile(
            tuning.BACKWARD,
            width,
            dataclasses.replace(tuning.BACKWARD[width], **{"rounds_keys": 16384, **fields}),
            check,
        )


def forward_candidate(width: int, name: str) -> Iterator[Check]:
    """One forward tile for everything, whichever is chosen: ring phases with fewer and more tiles than there are CTAs,
    shapes, windows, groups of heads, varlen, and 20 equal runs."""
    tile = tuning.FORWARD_CANDIDATES[width][name]
    cases = []
    phases = sorted({1, 2, 3, tile.stages, tile.stages + 1})
    for blocks, (batch, heads) in itertools.product(phases, ((1, 1), (4, 8), (9, 32))):
        keys = tile.block_n * blocks
        for sq, options in ((256, {}), (256, CAUSAL), (keys, CAUSAL)):
            cases.append(Case(sq, keys, width, heads, heads, batch, dtype=BF16, options=options))
    for (sq, sk), causal in itertools.product(SHAPES, (False, True)):
        cases.append(Case(sq, sk, width, 4, 2, batch=2, dtype=FP16, options={"causal": causal}))
    for window in ((0, 0), (63, 64), (64, 63), (127, 0), (-1, 100), (200, -1)):
        cases.append(Case(513, 700, width, dtype=BF16, options={"window_size": window}))
    cases.append(Case(700, 700, width - 24, 6, 3, batch=3, dtype=BF16, options=CAUSAL))
    cases.append(Case(400, 400, width, dtype=BF16, magnitude=30.0, options=CAUSAL))
    for case in cases:
        yield f"{name} {case}", functools.partial(with_forward_tile, tile, forward_only, case)
    for options, lengths in itertools.product(({}, CAUSAL), VARLEN_LENGTHS):
        case = Case(0, 0, width, 4, 2, dtype=BF16, options=options)
        check = functools.partial(check_varlen, lengths, lengths, case, tail=37)
        yield f"{name} varlen {lengths} {case}", functools.partial(with_forward_tile, tile, check)
    for sq, causal, heads in itertools.product((512, 1000, 4096), (False, True), (2, 32)):
        case = Case(sq, sq, width, heads, heads, batch=4, dtype=BF16, options={"causal": causal})
        yield (
            f"{name} 20 runs {case}",
            functools.partial(with_forward_tile, tile, functools.partial(run_twice_the_same, case, backward=False)),
        )


def with_forward_tile(tile: tuning.ForwardTile, check: Callable[..., None], *arguments: Any) -> None:
    """``check`` with this forward tile for every length and mask."""
    with mock.patch.object(tuning, "forward_tile", return_value=tile):
        op.forget()  # what was planned for another tile
        check(*arguments)
    op.forget()


def systems() -> Iterator[Check]:
    yield "packed and transposed layouts", packed_layouts
    yield "CUDA graph", graph_capture
    yield "three streams", streams
    yield "end of an allocation", end_of_allocation
    if torch.cuda.mem_get_info()[0] > 60 * 2**30:
        yield "more than 2^31 elements", beyond_2_31


GROUPS: dict[str, Callable[[], Iterator[Check]]] = {
    "rings": rings,
    "shapes": shapes,
    "windows": windows,
    "heads_and_widths": heads_and_widths,
    **{
        f"{group.__name__}_{width}": functools.partial(group, width)
        for group in (wide, wide_repeats, wide_variants)
        for width in (192, 256)
    },
    "varlen": varlen,
    "repeats": repeats,
    "deterministic": deterministic,
    "systems": systems,
    "launch_variants": launch_variants,
    "rounding": rounding,
    **{
        f"forward_{width}_{name}": functools.partial(forward_candidate, width, name)
        for width, tiles in tuning.FORWARD_CANDIDATES.items()
        for name in tiles
    },
    **{f"backward_{group}": functools.partial(backward_variants, group) for group in BACKWARD_VARIANTS},
}


def main(group: str) -> int:
    os.environ[PATH_ENV] = "hopper"  # read at every call
    failures = 0
    for name, check in GROUPS[group]():
        print(f"start {name}", flush=True)
        try:
            check()
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001 - reported, and counted in the exit status
            failures += 1
            print(f"FAILED {name}\n{traceback.format_exc(limit=-3)}", flush=True)
    print(f"{failures} failures", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stdout.flush()
    # Not by way of the interpreter's end, where autograd's thread may still be letting go of a graph: it then asks for
    # the interpreter, is ended by it, and takes the process down ("terminate called without an active exception")
    os._exit(status)
