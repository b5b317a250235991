"""The attention bench on a CPU: a tiny grid end to end, its arithmetic, and its switches."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from kernels.attention.dispatch import PATH_ENV
from kernels.attention.hopper import tuning
from kernels.attention.portable import tuning as portable_tuning
from scripts import bench_attention as bench

NEEDS_INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted on a CPU only")
TINY = ["--device", "cpu", "--dtype", "fp32", "--tokens", "128", "--hidden", "64", "--head-dims", "32"]
FAST = ["--warmup", "1", "--repeats", "4", "--rounds", "2"]


def run(tmp_path: Path, *args: str) -> dict:
    assert bench.main([*TINY, *FAST, "--out", str(tmp_path / "bench"), *args]) == 0
    return json.loads((tmp_path / "bench.json").read_text())


def test_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run(tmp_path, "--seqlens", "32", "64", "--implementations", "sdpa", "standard")
    assert len(data["results"]) == 2 * 2 * 2 * 2  # masks, lengths, directions, implementations
    for r in data["results"]:
        assert r["error"] == ""
        assert 0 < r["low_ms"] <= r["median_ms"] <= r["high_ms"]
        flops = (
            4
            * r["seqlen"] ** 2
            * 64
            * r["batch"]
            * (0.5 if r["causal"] else 1)
            * (1 if r["direction"] == "forward" else 2.5)
        )
        assert r["tflops"] == pytest.approx(flops / r["median_ms"] / 1e9)
        assert r["batch"] * r["seqlen"] == 128
    assert {"command", "date", "torch", "triton", "gpu"} <= set(data["environment"])
    assert (tmp_path / "bench.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "D=32 causal S=64" in printed
    assert "TFLOP/s" in printed


def test_a_failing_implementation_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of something")

    monkeypatch.setitem(bench.IMPLEMENTATIONS, "flex", broken)
    data = run(tmp_path, "--seqlens", "32", "--mask", "full", "--implementations", "flex", "sdpa")
    errors = {(r["implementation"], r["error"]) for r in data["results"]}
    assert errors == {("flex", "out of something"), ("sdpa", "")}
    assert all(math.isnan(r["median_ms"]) == (r["implementation"] == "flex") for r in data["results"])


@NEEDS_INTERPRETER
def test_implementations_compute_the_same() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 48, 2, 32) for _ in range(3))
    for causal in (False, True):
        want = bench.standard(q, k, v, causal)
        for name in ("sdpa", "portable", "flash1"):
            attention, context = bench.parse_implementation(name)
            with context():
                torch.testing.assert_close(attention(q, k, v, causal), want, atol=1e-4, rtol=1e-4)


@NEEDS_INTERPRETER
def test_memory_is_linear_for_flash_and_quadratic_for_standard(tmp_path: Path) -> None:
    data = run(tmp_path, "--memory", "--seqlens", "64", "128", "256", "--implementations", "portable", "standard")
    saved = {(r["implementation"], r["seqlen"]): r["saved_bytes"] for r in data["results"]}
    assert saved["portable", 256] == pytest.approx(2 * saved["portable", 128], rel=0.02)
    heads, elements = 2, 256 * 256 * 4
    assert saved["standard", 256] - 2 * saved["standard", 128] >= heads * elements / 2 * 0.9
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_host_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.measure_host, "__defaults__", (3,))
    data = run(tmp_path, "--host", "--implementations", "sdpa")
    assert [r["direction"] for r in data["results"]] == ["forward", "backward"]
    assert all(r["host_us"] > 0 for r in data["results"])


def test_ablation_table_divides_neighbours() -> None:
    cell = bench.Cell(64, True, 512, 1, 2)
    results = [
        bench._result(name, cell, "forward", [ms] * 4, "")
        for name, ms in (("standard", 8.0), ("flash1", 4.0), ("portable", 1.0))
    ]
    table = bench.ablation_table(results)
    assert [list(column.cells) for column in table.columns[2:]] == [["2.00"], ["4.00"]]


def test_path_and_tiles_are_forced_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_ENV, "auto")
    before = dict(tuning.FORWARD), dict(tuning.BACKWARD)
    _, context = bench.parse_implementation("hopper[block_m=192,pingpong=false,do_stages=1]")
    with context():
        assert os.environ[PATH_ENV] == "hopper"
        assert all(
            (t.block_m, t.pingpong, t.block_n) == (192, False, o.block_n)
            for t, o in zip(tuning.FORWARD.values(), before[0].values(), strict=True)
        )
        assert {t.do_stages for t in tuning.BACKWARD.values()} == {1}
    assert os.environ[PATH_ENV] == "auto"
    assert before == (tuning.FORWARD, tuning.BACKWARD)


def test_portable_tiles_are_changed_for_one_kernel_and_restored() -> None:
    before = [dict(t) for t in (portable_tuning.HOPPER, portable_tuning.AMPERE, portable_tuning.DROPOUT)]
    _, context = bench.parse_implementation("portable[forward_block_n=64,forward_max_registers=null,dkdv_num_stages=4]")
    with context():
        assert os.environ[PATH_ENV] == "portable"
        forward, dq, dkdv = (
            portable_tuning.choose_tile(kernel, 128, 2, (9, 0), dropout=False) for kernel in ("forward", "dq", "dkdv")
        )
        assert (forward.block_n, forward.max_registers, dkdv.num_stages) == (64, None, 4)
        assert dq == before[0]["dq"][2]
    assert before == [portable_tuning.HOPPER, portable_tuning.AMPERE, portable_tuning.DROPOUT]


@pytest.mark.parametrize("spec", ["typo", "sdpa[block_m=1]", "hopper[block_m"])
def test_unknown_implementation(spec: str) -> None:
    with pytest.raises(ValueError, match="no implementation"):
        bench.parse_implementation(spec)


@pytest.mark.parametrize("path", ["portable", "hopper"])
def test_unknown_tile_parameter(path: str) -> None:
    _, context = bench.parse_implementation(f"{path}[typo=1]")
    with pytest.raises(ValueError, match="no tile parameter"), context():
        pass
