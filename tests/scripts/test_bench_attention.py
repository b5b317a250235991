"""The attention bench without a GPU: what it refuses, and that it says what it does before it does it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from scripts import bench_attention as bench

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
SMALL = ["--device", "cpu", "--tokens", "8", "--hidden", "16", "--seqlens", "8", "--head-dims", "16", "--mask", "full"]


@pytest.mark.parametrize("given", [[], ["--device", "cuda"], ["--ablation"], ["--memory"]], ids=str)
def test_without_a_gpu_it_says_so_before_it_measures(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Left to itself it timed the grid for GPUs on the CPU, the first line after minutes."""
    with pytest.raises(SystemExit) as end:
        bench.main(given)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert "PyTorch finds no CUDA device here" in said.err
    assert "--device cpu --tokens 256" in said.err, "the remedy"
    assert said.out == ""


def test_what_is_measured_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, seen = io.StringIO(), []

    def measure_cell(*_: object) -> list[bench.Result]:
        seen.append(screen.getvalue())
        return []

    monkeypatch.setattr(bench, "measure_cell", measure_cell)
    monkeypatch.setattr(bench, "plot_results", lambda *_: None)
    args = bench.parse_arguments([*SMALL, "--out", str(tmp_path / "a"), "--warmup", "1", "--repeats", "2"])
    bench.run_speed(args, Console(file=screen, width=200), {"gpu": None, "cpu": "", "torch": "", "triton": ""})
    assert len(seen) == 2  # forward, backward
    assert "2 rows in TFLOP/s, each of 1 + 2 calls of sdpa, standard:" in seen[0]


def test_an_implementation_that_fails_is_null_in_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no NaN: most readers refuse a file with one. Table and picture are made all the same."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    def measure_cell(cell: bench.Cell, direction: str, *_: object) -> list[bench.Result]:
        return [
            bench.result_of("standard", cell, direction, [2.0, 1.0, 3.0], ""),
            bench.result_of("sdpa", cell, direction, [], "out of memory"),
        ]

    monkeypatch.setattr(bench, "measure_cell", measure_cell)
    screen = io.StringIO()
    args = bench.parse_arguments([*SMALL, "--out", str(tmp_path / "a"), "--warmup", "1", "--repeats", "2"])
    bench.run_speed(args, Console(file=screen, width=200), {"gpu": None, "cpu": "", "torch": "", "triton": ""})
    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    measured, failed = content["results"][:2]
    assert (measured["median_ms"], measured["error"]) == (2.0, "")
    assert measured["tflops"] > 0
    assert [failed[key] for key in ("median_ms", "low_ms", "high_ms", "tflops", "error")] == [None] * 4 + [
        "out of memory"
    ]
    assert "sdpa out of memory" in screen.getvalue()
    assert (tmp_path / "a.png").stat().st_size > 0
