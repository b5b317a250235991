"""The norms' bench on a CPU: its calls and checks in Triton's interpreter, its arithmetic, its words without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import pytest
import torch
from rich.console import Console

from model import norm_kernel
from model.norm_kernel import BackwardSchedule, ForwardSchedule, backward_candidates, forward_candidates
from scripts import bench_norms as bench

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted on a CPU only")


def arguments(*more: str) -> argparse.Namespace:
    args = bench.parse_arguments(["--widths", "24", "--tokens", "5", "--beside", "copy", *more])
    args.device, args.dtype = "cpu", torch.float32
    return args


def steady(call: bench.Call, repeats: int) -> list[float]:
    """A timer by which each call takes 2 us."""
    for _ in range(repeats):
        call()
    return [2.0] * repeats


FEW = ("--warmup", "1", "--repeats", "2", "--rounds", "2")


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("direction", list(bench.ROWS_MOVED))
@pytest.mark.parametrize("shift", [False, True])
def test_measure(norm: str, direction: str, shift: bool) -> None:
    """All candidates are right, and bytes are those of the rows that the pass must move."""
    results = bench.measure(arguments("--norm", norm, *FEW, *["--shift"] * shift), 24, 5, direction, steady)
    candidates: Any = forward_candidates(24) if direction in ("forward", "first") else backward_candidates(24)
    assert [r.implementation for r in results] == [*candidates, "copy"]
    rows = {"forward": 4, "first": 2, "backward": 4, "kernel": 4}[direction]
    for r in results:
        assert r.error == ""
        assert r.median_us == r.low_us == r.high_us == 2.0
        assert r.gb_per_s == pytest.approx(rows * 5 * 24 * 4 / 2e-6 / 1e9)
        assert json.loads(json.dumps(dataclasses.asdict(r))) == dataclasses.asdict(r)
    assert [r.schedule is None for r in results] == [False] * len(candidates) + [True]


@pytest.mark.parametrize("direction", list(bench.ROWS_MOVED))
def test_wrong_results_are_not_timed(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element off in either output is an error of that schedule."""
    name = "run_forward" if direction in ("forward", "first") else "run_backward"
    original = getattr(bench, name)
    for index in (0, 1) if direction != "first" else (1,):

        def spoilt(*given: Any, index: int = index) -> Any:
            outputs = original(*given)
            outputs[index].view(-1)[7] += 0.1
            return outputs

        monkeypatch.setattr(bench, name, spoilt)
        option = ("--forward", "plain") if name == "run_forward" else ("--backward", "plain")
        copied, wrong = bench.measure(arguments(*option, *FEW), 24, 5, direction, steady)
        assert copied.implementation == "copy"
        assert wrong.error.startswith("wrong: ")
        assert wrong.gb_per_s == 0


def test_compile_and_plain_are_the_same_function() -> None:
    for direction, shift in (("forward", False), ("first", False), ("backward", False), ("backward", True)):
        given = bench.make_inputs("layernorm", 5, 24, "cpu", torch.float32, shift)
        found = bench.call_of(torch.compile(bench.plain(True), backend="aot_eager"), given, direction)()
        assert bench.breach(given, direction, found) == ""
        assert "outputs, expected" in bench.breach(given, direction, found[:1])


def test_schedules_by_fields() -> None:
    args = arguments("--backward", "plain", "split", "warps=4,split=true,per_sm=3,stages=5,joint=true")
    found = bench.schedules_of(args, 24, "backward")
    assert next(iter(found.values())) == backward_candidates(24)["plain"]
    assert list(found.values())[2] == BackwardSchedule(4, True, 3, stages=5, joint=True)
    assert bench.schedules_of(args, 24, "forward") == forward_candidates(24)
    for text in ("nothing", "warps=4,joint=true", "warps=x", "warps=4,stages=2"):
        with pytest.raises(SystemExit):
            arguments("--forward", text)


def test_the_shipped_schedule_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its candidate's name, or apart where it is no candidate; and wherever it is asked for."""
    assert bench.schedules_of(arguments("--backward", "shipped"), 24, "kernel") == {
        "shipped": norm_kernel.backward_schedule(24, False)
    }
    monkeypatch.setitem(norm_kernel.PER_SM_WITH_SHIFT, 24, 1)
    assert bench.schedules_of(arguments("--backward", "shipped", "--shift"), 24, "kernel") == {
        "shipped": norm_kernel.backward_schedule(24, True)
    }
    assert norm_kernel.backward_schedule(24, True) != norm_kernel.backward_schedule(24, False)
    assert "shipped" not in bench.schedules_of(arguments(), 2560, "backward")
    other = ForwardSchedule(2, early=True, streaming=True)
    monkeypatch.setitem(norm_kernel.FORWARD, 24, other)
    assert bench.schedules_of(arguments(), 24, "first") == {"shipped": other, **forward_candidates(24)}
    assert bench.schedules_of(arguments("--forward", "plain", "shipped"), 24, "forward")["shipped"] is other


def test_fastest_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule that is fastest over all sizes, unless it failed at one; as an expression that makes it, beside the
    shipped one, whatever that is called."""
    schedules = {
        "plain": ForwardSchedule(8),
        "own": ForwardSchedule(2),
        "good": ForwardSchedule(1, split=True, early=True),
        "failing": ForwardSchedule(4),
    }
    times = {"plain": 40.0, "own": 20.0, "good": 10.0, "failing": 1.0, "copy": 9.0}
    results = []
    for name, us in times.items():
        schedule = dataclasses.asdict(schedules[name]) if name in schedules else None
        for tokens in (8, 16):
            error = "wrong" if (name, tokens) == ("failing", 16) else ""
            results += [
                bench.Result(name, "layernorm", 2560, tokens, direction, schedule, us, us, us, 5.0, error)
                for direction in ("forward", "first")
            ]
    made = "FORWARD[2560] = ForwardSchedule(warps=1, split=True, early=True)  # good"
    assert bench.fastest(results) == [made]
    monkeypatch.setitem(norm_kernel.FORWARD, 2560, schedules["own"])
    assert bench.fastest(results) == [f"{made}, 2.00 times the speed of the shipped own"]
    monkeypatch.setitem(norm_kernel.FORWARD, 2560, schedules["good"])
    assert bench.fastest(results) == [f"{made}, 1.00 times the speed of the shipped good"]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(bench.table_of(results))
    printed = capture.get()
    assert "16 tokens" in printed
    assert "5 (20.0)" in printed


def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err
