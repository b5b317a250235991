"""The attention bench on a CPU: a tiny grid end to end, its arithmetic, and its switches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kernels.attention.dispatch import PATH_ENV
from kernels.attention.hopper import tuning
from kernels.attention.portable import tuning as portable_tuning
from scripts import bench_attention as bench
from scripts import bench_cells, bench_implementations, bench_report
from scripts.bench_cells import Cell
from scripts.bench_implementations import standard

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
    data = run(
        tmp_path, "--seqlens", "32", "--mask", "full", "--implementations", "flex", "sdpa", "--compile-processes", "0"
    )
    errors = {(r["implementation"], r["error"]) for r in data["results"]}
    assert errors == {("flex", "out of something"), ("sdpa", "")}
    assert all((r["median_ms"] is None) == (r["implementation"] == "flex") for r in data["results"])


@pytest.mark.parametrize("mode", [["--memory", "--seqlens", "32"], ["--host"]])
def test_memory_and_host_time_go_on_without_what_fails(
    mode: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of something")

    monkeypatch.setitem(bench.IMPLEMENTATIONS, "flex", broken)
    monkeypatch.setattr(bench.measure_host, "__defaults__", (3,))
    data = run(tmp_path, *mode, "--implementations", "flex", "sdpa")
    assert {r["implementation"] for r in data["results"]} == {"sdpa"}
    assert "out of something" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seqlens", "256"], "--tokens 128 is less than the shortest of --seqlens, 256"),
        (["--seqlens", "0", "64"], "--seqlens [0, 64]: from 1 on"),
        (["--seqlens", "64", "--head-dims", "128"], "--hidden 64 is less than one head"),
        (["--seqlens", "64", "--rounds", "0"], "--rounds 0: from 1 on"),
        (["--seqlens", "64", "--implementations", "nope"], "no implementation 'nope'"),
        (["--seqlens", "64", "--implementations", "portable[x=y]"], "field=value"),
        (["--seqlens", "64", "--implementations", "portable[x]"], "field=value"),
    ],
)
def test_arguments_that_measure_nothing_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments([*TINY, *FAST, *arguments])
    assert message in capsys.readouterr().err


@NEEDS_INTERPRETER
def test_implementations_compute_the_same() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 48, 2, 32) for _ in range(3))
    for causal in (False, True):
        cell = Cell(32, causal, 48, 1, 2)
        want = standard(q, k, v, cell)
        for name in ("sdpa", "portable", "flash1"):
            attention, context = bench.parse_implementation(name)
            with context():
                torch.testing.assert_close(attention(q, k, v, cell), want, atol=1e-4, rtol=1e-4)


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
    cell = Cell(64, True, 512, 1, 2)
    results = [
        bench.result_of(name, cell, "forward", [ms] * 4, "")
        for name, ms in (("standard", 8.0), ("flash1", 4.0), ("portable", 1.0))
    ]
    table = bench.ablation_table(results)
    assert [list(column.cells) for column in table.columns[2:]] == [["2.00"], ["4.00"]]


def test_path_and_tiles_are_forced_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_ENV, "auto")
    before = dict(tuning.FORWARD), dict(tuning.BACKWARD)
    _, context = bench.parse_implementation("hopper[block_n=32,pingpong=false,do_stages=1]")
    with context():
        assert os.environ[PATH_ENV] == "hopper"
        assert all(
            (t.block_n, t.pingpong, t.block_m) == (32, False, o.block_m)
            for t, o in zip(tuning.FORWARD.values(), before[0].values(), strict=True)
        )
        assert {t.do_stages for t in tuning.BACKWARD.values()} == {1}
    assert os.environ[PATH_ENV] == "auto"
    assert before == (tuning.FORWARD, tuning.BACKWARD)


def test_a_field_of_one_kernel_leaves_the_others_and_a_wrong_value_leaves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward's block_n is no field; two Q blocks are needed by pairs, so one is refused halfway through."""
    before = dict(tuning.FORWARD), dict(tuning.FORWARD_LONG), dict(tuning.BACKWARD)
    _, context = bench.parse_implementation("hopper[block_n=64]")
    with context():
        assert {tile.block_n for tile in tuning.FORWARD.values()} == {64}
        assert before[2] == tuning.BACKWARD
    _, context = bench.parse_implementation("hopper[q_stages=1]")
    with pytest.raises(ValueError, match="q_stages is 1"), context():
        pass
    assert before == (tuning.FORWARD, tuning.FORWARD_LONG, tuning.BACKWARD)


def test_a_forward_candidate_takes_every_length_at_its_widths() -> None:
    before = dict(tuning.FORWARD), dict(tuning.FORWARD_LONG), dict(tuning.BACKWARD)
    want = tuning.FORWARD_CANDIDATES[64]["two_ctas"]
    _, context = bench.parse_implementation('hopper[candidate="two_ctas",stages=3]')
    with context():
        for keys, right in itertools.product((512, 16384), (False, True)):
            assert tuning.forward_tile(64, keys, False, right) == dataclasses.replace(want, stages=3)
        assert tuning.FORWARD[128] == dataclasses.replace(before[0][128], stages=3)
        assert before[2] == tuning.BACKWARD
    assert before == (tuning.FORWARD, tuning.FORWARD_LONG, tuning.BACKWARD)
    _, context = bench.parse_implementation('hopper[candidate="typo"]')
    with pytest.raises(ValueError, match="no forward candidate"), context():
        pass


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


def visible(cell: Cell) -> torch.Tensor:
    """The mask of one sequence, (S, S) of bool, by its definition."""
    i, j = torch.arange(cell.seqlen)[:, None], torch.arange(cell.seqlen)[None, :]
    seen = (i >= j) if cell.causal else torch.ones(cell.seqlen, cell.seqlen, dtype=torch.bool)
    return seen if cell.window is None else seen & (j > i - cell.window)


def test_blocks_and_scores_are_those_of_the_mask() -> None:
    windows = (None, 1, 2, 127, 128, 129, 130, 300)
    for seqlen, window, causal in itertools.product((1, 127, 128, 129, 513), windows, (True, False)):
        cell = Cell(64, causal or window is not None, seqlen, 3, 2, window)
        mask, n = visible(cell), bench_cells.BLOCK
        blocks = (mask[i : i + n, j : j + n].any() for i in range(0, seqlen, n) for j in range(0, seqlen, n))
        assert cell.blocks() == 3 * sum(map(int, blocks))
        if window is not None:
            assert cell.scores() == 3 * mask.sum()


def test_the_window_that_the_project_promises() -> None:
    dense = Cell(128, True, 16384, 1, 16)
    (cell,) = bench_cells.windowed([dense, Cell(128, True, 1024, 16, 16)], 1024)
    assert (cell.blocks(), dense.blocks()) == (9 * 128 - 36, 128 * 129 // 2)
    assert cell.flops("forward") == 4 * 128 * 16 * (1024 * 16384 - 1024 * 1023 // 2)


def test_documents_have_the_same_total_and_the_same_lengths_each_time() -> None:
    dense = Cell(128, False, 512, 32, 16)
    more, mixed = bench_cells.ragged([dense])
    assert more.shape == (32, 513, 16, 128)
    assert mixed.shape == (1, 16384, 16, 128)
    assert mixed.documents is not None
    assert max(mixed.documents) <= 512
    assert len(set(mixed.documents)) > 20
    assert mixed.flops("forward") == 4 * 128 * 16 * sum(s * s for s in mixed.documents)
    assert bench_cells.ragged([dense]) == {more: dense, mixed: dense}


def test_cost_divides_time_by_blocks() -> None:
    dense = Cell(64, True, 512, 1, 2)  # 10 blocks
    cell = Cell(64, True, 512, 1, 2, 128)  # 7
    results = [
        bench.result_of(name, c, "forward", [ms] * 4, error)
        for name, c, ms, error in (
            ("hopper", dense, 10.0, ""),
            ("hopper", cell, 14.0, ""),
            ("sdpa", dense, 5.0, ""),
            ("sdpa", cell, math.nan, "sdpa has no window"),
        )
    ]
    (cost,) = bench.costs_of(results, {cell: dense})
    assert (cost.implementation, cost.time_ratio, cost.block_ratio) == ("hopper", 1.4, 0.7)
    assert cost.cost_ratio == pytest.approx(2.0)
    table = bench.cost_table([cost])
    assert [list(column.cells) for column in table.columns] == [[str(cell)], [str(dense)], ["0.700"], ["2.000"]]


def test_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run(tmp_path, "--window", "32", "--seqlens", "32", "64", "--implementations", "sdpa", "standard")
    measured = {(r["implementation"], r["seqlen"], r["window"]) for r in data["results"] if not r["error"]}
    assert measured == {("sdpa", 32, None), ("sdpa", 64, None)} | {
        ("standard", s, w) for s, w in ((32, None), (64, None), (64, 32))
    }
    assert {r["error"] for r in data["results"]} == {"", "sdpa has no window"}
    assert all(r["causal"] for r in data["results"])
    assert [(c["implementation"], c["cell"], c["dense_cell"]) for c in data["costs"]] == [
        ("standard", "D=32 causal S=64 window=32", "D=32 causal S=64")
    ] * 2
    assert all(c["cost_ratio"] == pytest.approx(c["time_ratio"] / c["block_ratio"]) for c in data["costs"])
    assert "Cost of a block" in capsys.readouterr().out


@NEEDS_INTERPRETER
def test_ragged(tmp_path: Path) -> None:
    args = ["--ragged", "--seqlens", "32", "--mask", "causal", "--tokens", "64", "--hidden", "32", "--repeats", "1"]
    data = run(tmp_path, *args, "--implementations", "portable", "sdpa")
    forward = [r for r in data["results"] if r["direction"] == "forward"]
    assert [(r["implementation"], r["seqlen"], bool(r["documents"]), r["error"]) for r in forward] == [
        ("portable", 32, False, ""),
        ("sdpa", 32, False, ""),
        ("portable", 33, False, ""),
        ("sdpa", 33, False, ""),
        ("portable", 32, True, ""),
        ("sdpa", 32, True, "sdpa has no documents of different lengths"),
    ]
    assert sum(forward[4]["documents"]) == 64
    assert len(data["costs"]) == 2 * 3
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_lines_go_by_length_and_cells_of_a_token_more_are_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    grid = bench_cells.dense_grid([32], [True], [64, 128, 256], 256, 64)
    cells = [cell for dense, others in _with_ragged(grid) for cell in (*others, dense)][::-1]
    lines: list[tuple[float, ...]] = []
    titles: list[str] = []
    plot, set_title = Axes.plot, Axes.set_title
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: (lines.append(x), plot(self, x, y, **style)))
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **style: (titles.append(text), set_title(self, text)))
    results = [bench_cells.result_of("portable", cell, "forward", [1.0], "") for cell in cells]
    bench_report.plot_results(results, tmp_path / "bench.png", "")
    found = dict(zip(titles, lines, strict=True))
    assert found["forward, D = 32, causal"] == (64, 128, 256)
    assert found["forward, D = 32, causal, S + 1"] == (65, 129, 257)
    assert found["forward, D = 32, causal, documents"] == (64, 128, 256)


def _with_ragged(grid: Sequence[Cell]) -> Iterator[tuple[Cell, list[Cell]]]:
    """Each cell of the grid with those that `--ragged` adds."""
    dense_of = bench_cells.ragged(grid)
    for dense in grid:
        yield dense, [cell for cell, of in dense_of.items() if of == dense]


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cell: Cell) -> torch.Tensor:
    outs, begin = [], 0
    for length in cell.documents or (cell.seqlen,):
        one = Cell(cell.head_dim, cell.causal, length, 1, cell.heads, cell.window)
        rows = (t[:, begin : begin + length].transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=visible(one))
        outs.append(out.transpose(1, 2))
        begin += length
    return torch.cat(outs, 1)


MASKED = [
    Cell(32, True, 48, 1, 2, 16),
    Cell(32, True, 40, 1, 2, None, (9, 1, 30)),
    Cell(32, False, 40, 1, 2, None, (9, 1, 30)),
]


@NEEDS_INTERPRETER
@pytest.mark.parametrize("cell", MASKED, ids=str)
def test_windows_and_documents_are_those_of_the_cell(cell: Cell) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(cell.shape) for _ in range(3))
    want = by_definition(q, k, v, cell)
    names = ("portable",) if cell.documents else ("portable", "standard")
    for name in names:
        attention, context = bench.parse_implementation(name)
        with context():
            torch.testing.assert_close(attention(q, k, v, cell), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cell", MASKED, ids=str)
def test_flex_sees_the_same(cell: Cell) -> None:
    from torch.nn.attention.flex_attention import create_mask

    def dense_mask(mask: object, *_: object, device: str) -> torch.Tensor:
        return create_mask(mask, None, None, cell.shape[1], cell.shape[1], device=device)

    lengths = cell.documents or (cell.seqlen,)
    want = torch.block_diag(*(visible(Cell(32, cell.causal, s, 1, 1, cell.window)).float() for s in lengths)).bool()
    assert torch.equal(bench_implementations._flex_mask(cell, "cpu", dense_mask)[0, 0], want)


def test_flex_is_compiled_for_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    bench_implementations._flex.cache_clear()
    limit = torch._dynamo.config.recompile_limit
    try:
        for seqlen in range(16, 16 * 13, 16):  # 12 cells; dynamo's own limit is 8
            bench_implementations.flex(*torch.randn(3, 1, seqlen, 1, 16), Cell(16, True, seqlen, 1, 1))
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()
        bench_implementations._flex.cache_clear()
    assert len(compiled) == 12


def test_flex_is_compiled_ahead_for_every_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def ahead(problems: list, device: str, dtype: torch.dtype, processes: int) -> list[str]:
        asked.append((len(problems), device, dtype, processes))
        return ["D=32 full S=32 forward: no"]

    monkeypatch.setattr(bench, "compile_flex_ahead", ahead)
    monkeypatch.setitem(bench.IMPLEMENTATIONS, "flex", standard)
    grid = ["--seqlens", "32", "64", "--directions", "forward"]
    run(tmp_path, *grid, "--implementations", "flex", "--compile-processes", "3")
    assert asked == [(4, "cpu", torch.float32, 3)]
    assert "flex: 3 of 4 compiled ahead" in capsys.readouterr().out
    run(tmp_path, *grid, "--implementations", "flex", "--compile-processes", "0")
    run(tmp_path, *grid, "--implementations", "sdpa")
    assert len(asked) == 1


@pytest.mark.slow
def test_what_was_compiled_ahead_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cell = Cell(16, True, 128, 1, 1)
    problems = [(cell, "forward"), (Cell(16, True, 0, 1, 1), "forward")]
    (failure,) = bench_implementations.compile_flex_ahead(problems, "cpu", torch.float32, 1)
    assert failure.startswith("D=16 causal S=0 forward: ")
    torch._dynamo.reset()
    bench_implementations._flex.cache_clear()
    counters.clear()
    bench_implementations.make_call(bench_implementations.flex, cell, "forward", "cpu", torch.float32)()
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


def test_once_profiles_one_call_of_each_after_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def profiled(device: str) -> Iterator[None]:
        seen.append(f"start {device}")
        yield
        seen.append("stop")

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cell: Cell) -> torch.Tensor:
        seen.append(f"call {cell.window}")
        return standard(q, k, v, cell)

    monkeypatch.setattr(bench, "profiled", profiled)
    monkeypatch.setitem(bench.IMPLEMENTATIONS, "standard", watched)
    args = [
        *TINY,
        "--once",
        "--window",
        "16",
        "--seqlens",
        "32",
        "--directions",
        "forward",
        "--out",
        str(tmp_path / "x"),
    ]
    assert bench.main([*args, "--implementations", "standard"]) == 0
    assert seen == [line for w in (None, 16) for line in (f"call {w}", "start cpu", f"call {w}", "stop")]
    assert "D=32 causal S=32 window=16 forward standard" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert bench.main([*args, "--implementations", "standard", "sdpa"]) == 1  # a profile that lacks a cell says so


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--window", "64", "--mask", "full"], "is causal"),
        (["--window", "0"], "from 1 to below"),
        (["--window", "64", "--seqlens", "32", "64"], "from 1 to below"),
        (["--once", "--memory"], "--once calls"),
        (["--window", "64", "--ragged"], "not allowed with"),
    ],
)
def test_switches_that_do_not_go_together(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main([*TINY, *args])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_the_profiler_sees_the_call_alone(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("synchronize"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: seen.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: seen.append("stop"))
    with pytest.raises(RuntimeError, match="no") if fails else contextlib.nullcontext(), bench.profiled("cuda"):
        seen.append("call")
        if fails:
            raise RuntimeError("no")
    assert seen == ["synchronize", "start", "call", *([] if fails else ["synchronize"]), "stop"]
