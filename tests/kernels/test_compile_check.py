"""The compile check itself: it must see a clean kernel as clean, and each defect as that defect."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.compiler import ASTSource

from kernels.compile_check import (
    ROOT,
    Budget,
    CompileCase,
    CompileReport,
    budget_of,
    check,
    compile_case,
    compile_provider,
    count_sass,
    load_budget,
    parse_ptxas_log,
    save_budget,
)
from scripts.compile_check import main

PROVIDER = "tests.kernels.test_compile_check:demo_cases"


@triton.jit
def product(A, B, C, K, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """C[ROWS, COLS] = A[ROWS, K] @ B[K, COLS], bf16, one program."""
    m, n, k0 = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(A + m[:, None] * K + (k + k0)[None, :])
        b = tl.load(B + (k + k0)[:, None] * COLS + n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(C + m[:, None] * COLS + n[None, :], acc.to(tl.bfloat16))


def demo_case(name: str, rows: int, cols: int, num_warps: int, **more: Any) -> CompileCase:
    signature = {"A": "*bf16", "B": "*bf16", "C": "*bf16", "K": "i32"}
    constants = {"ROWS": rows, "COLS": cols, "BLOCK": 64}
    aligned: dict[Any, Any] = {(i,): [["tt.divisibility", 16]] for i in range(4)}

    def source() -> ASTSource:
        return ASTSource(product, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, aligned)

    return CompileCase(name, source, num_warps, **more)


def demo_cases() -> list[CompileCase]:
    return [
        demo_case("clean", 128, 128, 8, archs=(80, 90), quick=True),
        demo_case("spilling", 256, 256, 4),  # 512 accumulator registers a thread
        demo_case("no_hgmma", 32, 64, 4),  # a warpgroup product needs 64 rows
    ]


@pytest.fixture(scope="module")
def reports() -> dict[str, CompileReport]:
    return {report.key: report for report in compile_provider(PROVIDER)}


def test_clean_kernel(reports: dict[str, CompileReport]) -> None:
    hopper, ampere = reports["clean sm_90"], reports["clean sm_80"]
    assert hopper.spill_bytes == hopper.stack_bytes == hopper.sass["LDL"] == 0
    assert hopper.sass["HGMMA"] > 0
    assert hopper.sass["HMMA"] == 0
    assert ampere.sass["HMMA"] > 0
    assert ampere.sass["HGMMA"] == 0
    assert 32 < hopper.registers < 200
    assert hopper.shared_bytes >= 2 * 128 * 64 * 2  # at least one stage of both operands
    assert hopper.triton == triton.__version__


def test_spills_and_lost_tensor_cores_are_seen(reports: dict[str, CompileReport]) -> None:
    assert reports["spilling sm_90"].spill_bytes > 0
    assert reports["spilling sm_90"].sass["STL"] > 0
    assert reports["no_hgmma sm_90"].sass["HGMMA"] == 0
    assert reports["no_hgmma sm_90"].sass["HMMA"] > 0


def test_budget_of_a_report_admits_exactly_that_report(reports: dict[str, CompileReport]) -> None:
    report = reports["clean sm_90"]
    budget = budget_of([report])
    assert check(report, budget) == []
    for change in (
        {"registers": report.registers + 1},
        {"spill_bytes": 4},
        {"shared_bytes": report.shared_bytes + 1},
        {"wgmma_serialized": ("C7513",)},
        {"sass": {**report.sass, "HGMMA": 0}},
        {"sass": {**report.sass, "HMMA": 1}},
    ):
        breaches = check(dataclasses.replace(report, **change), budget)
        assert len(breaches) == 1, change
        assert "clean sm_90" in breaches[0]
    assert "no entry" in check(report, {})[0]


def test_budget_covers_several_versions(reports: dict[str, CompileReport]) -> None:
    report = reports["clean sm_90"]
    other = dataclasses.replace(report, triton="3.6.0", registers=report.registers + 8, shared_bytes=1)
    budget = budget_of([report, other])
    assert budget == {report.key: Budget(report.registers + 8, 0, report.shared_bytes, 0, True)}


def test_budget_file_round_trip(tmp_path: Any, reports: dict[str, CompileReport]) -> None:
    path = tmp_path / "budget.json"
    budget = budget_of(reports.values())
    save_budget(budget, path)
    assert load_budget(path) == budget


def test_names_archs_and_quick_select() -> None:
    assert [r.key for r in compile_provider(PROVIDER, quick=True, archs=[80])] == ["clean sm_80"]
    assert [r.key for r in compile_provider(PROVIDER, names=["no_hgmma"])] == ["no_hgmma sm_90"]


def test_a_name_may_be_of_any_provider_but_must_be_of_one() -> None:
    """Of two providers, one has the first name and neither the other."""
    providers = ["--provider", PROVIDER, "training.adamw_kernel:compile_cases", "--archs", "90"]
    with pytest.raises(SystemExit, match=r"no case \['typo'\]"):
        main([*providers, "--names", "clean", "typo"])


def test_works_from_an_interpreting_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_case(demo_cases()[0], 90)
    assert compile_provider(PROVIDER, quick=True, archs=[90])[0].sass["HGMMA"] > 0


def test_log_and_disassembly_parsers() -> None:
    log = (
        "ptxas info : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
        "    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads\n"
        "ptxas info : Used 168 registers, used 3 barriers\n"
    )
    assert parse_ptxas_log(log) == {"registers": 168, "spill_bytes": 32, "wgmma_serialized": ("C7513",)}
    with pytest.raises(ValueError, match="no statistics"):
        parse_ptxas_log("")
    sass = (
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;\n"
        "        /*1a40*/              @!P1 STL [R1+0x4], R5 ;\n"
        "        /*1a50*/             @!UP0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;\n"
    )
    assert {op: n for op, n in count_sass(sass).items() if n} == {"STL": 1, "HGMMA": 1, "TOTAL": 3}


def test_script_fails_on_a_breach(tmp_path: Any) -> None:
    """The demo kernels have no budget, so the command must exit non-zero and say so."""
    command = [sys.executable, "scripts/compile_check.py", "--provider", PROVIDER, "--quick", "--archs", "90"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "FAIL clean" in done.stdout
    assert "no entry" in done.stdout
