"""Compile kernels for a GPU that is not there, and read what the compiler did.

Three properties of a kernel decide its speed and show up nowhere at run time: registers that spill to local
memory, tensor-core products that the assembler had to serialise (ptxas warnings C7510 to C7515), and
tensor-core products that were never made. All three can be read from the assembler's log and from the
disassembly, and triton's wheel carries both tools, so no GPU, driver, CUDA toolkit or torch is needed.
`compile_case` measures one kernel, `check` holds a measurement against the budget file, and
`compile_provider` does the work in a fresh process: kernels must be defined without ``TRITON_INTERPRET``, and
possibly by another triton version than ours.

A *provider* is ``"package.module:function"``; the function returns a list of `CompileCase`.
Works with triton 3.6 to 3.9.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET_FILE = Path(__file__).with_name("compile_budget.json")

# Opcodes that tell which hardware unit a kernel uses. HGMMA: Hopper tensor cores; HMMA: older tensor-core
# path; LDL, STL: spills; UTMALDG, UTMASTG, UTMAREDG: bulk tensor loads, stores, reductions; MUFU: exp2 and
# reciprocals; PRMT: 16-bit repacking; USETMAXREG: register handover.
OPCODES = (
    *("HGMMA", "HMMA", "LDL", "STL", "UTMALDG", "UTMASTG", "UTMAREDG", "USETMAXREG"),
    *("MUFU", "PRMT", "LDGSTS", "BAR", "TOTAL"),
)


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """One kernel in one shipped configuration."""

    name: str
    """Unique over all providers, e.g. ``"hopper.forward[d128,causal,bf16]"``."""
    make_source: Callable[[], Any]
    """Returns a fresh ``triton.compiler.ASTSource`` or ``GluonASTSource``, with the attributes the JIT would
    infer."""
    num_warps: int
    num_stages: int = 3
    archs: tuple[int, ...] = (90,)
    """Compute capabilities times ten for which the configuration ships."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further launch options, e.g. ``{"maxnreg": 168}``."""
    quick: bool = False
    """Part of the representative subset that the default test run compiles."""


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """What the compiler made of one case on one architecture."""

    case: str
    arch: int
    triton: str
    registers: int
    """Per thread at entry. In a warp-specialised kernel this is the cap before the hand-over, so only the
    spills tell."""
    spill_bytes: int
    """Bytes of spill stores plus spill loads, counted once per instruction in the code."""
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    wgmma_serialized: tuple[str, ...]
    """The assembler's warning codes (C7510 to C7515)."""
    sass: dict[str, int]
    """Instruction counts, keyed by `OPCODES`."""
    seconds: float

    @property
    def key(self) -> str:
        """The budget file's key."""
        return f"{self.case} sm_{self.arch}"


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most that one case may use on one architecture."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    serialized: int
    """Number of serialisation warnings."""
    hgmma: bool
    """True if the kernel must run its products on Hopper's tensor cores (HGMMA and no HMMA)."""


def compile_case(case: CompileCase, arch: int) -> CompileReport:
    """Compile `case` for compute capability `arch` (e.g. 90) in this process.

    Raises RuntimeError under ``TRITON_INTERPRET=1`` (there is nothing to compile then; use
    `compile_provider`), and whatever triton raises when the kernel does not compile.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; call compile_provider"
        )
    log, start = io.StringIO(), time.perf_counter()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = (
            True  # triton always asks ptxas for its statistics, and prints them only if told to
        )
        knobs.compilation.always_compile = True  # a cached kernel has no log
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
        kernel = triton.compile(case.make_source(), target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    stack_bytes, sass = _disassemble(
        kernel.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    )
    return CompileReport(
        case=case.name,
        arch=arch,
        triton=triton.__version__,
        stack_bytes=stack_bytes,
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        sass=sass,
        seconds=round(seconds, 2),
        **parse_ptxas_log(log.getvalue()),
    )


def parse_ptxas_log(log: str) -> dict[str, Any]:
    """Registers, spill bytes and serialisation warnings from the log of ``ptxas -v``. Raises ValueError on a
    log without statistics."""
    registers = re.findall(r"Used (\d+) registers", log)
    if not registers:
        raise ValueError(f"no statistics in the assembler's log: {log[:200]!r}")
    return {
        "registers": int(registers[-1]),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        "wgmma_serialized": tuple(re.findall(r"\((C75\d\d)\)", log)),
    }


def count_sass(text: str) -> dict[str, int]:
    """Instruction counts, keyed by `OPCODES`, from ``cuobjdump -sass`` output."""
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_]+)", re.MULTILINE)
    count = Counter(instruction.findall(text))
    return {op: count.total() if op == "TOTAL" else count[op] for op in OPCODES}


def _disassemble(cubin: bytes, cuobjdump: Path) -> tuple[int, dict[str, int]]:
    """(stack bytes, instruction counts) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    stack = re.search(r"STACK:(\d+)", usage)
    if stack is None:
        raise ValueError(f"no resource usage in cuobjdump's output: {usage[:200]!r}")
    return int(stack.group(1)), count_sass(sass)


def check(report: CompileReport, budget: Mapping[str, Budget]) -> list[str]:
    """The breaches of `budget` in `report`, one sentence each; empty when it is within. A case without a
    budget is a breach."""
    limit = budget.get(report.key)
    if limit is None:
        return [f"{report.key}: no entry in {BUDGET_FILE.name}; run scripts/compile_check.py --update-budget"]
    used = {
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "shared_bytes": report.shared_bytes,
        "serialized": len(report.wgmma_serialized),
    }
    where = f"{report.key}, triton {report.triton}"
    breaches = [
        f"{where}: {name} is {value}, budget {getattr(limit, name)}"
        for name, value in used.items()
        if value > getattr(limit, name)
    ]
    if limit.hgmma and not _runs_on_hgmma(report):
        breaches.append(f"{where}: {report.sass['HGMMA']} HGMMA and {report.sass['HMMA']} HMMA; only HGMMA expected")
    return breaches


def budget_of(reports: Iterable[CompileReport]) -> dict[str, Budget]:
    """The tightest budget that `reports` (several triton versions per case allowed) stay within."""
    by_key: dict[str, list[CompileReport]] = {}
    for report in reports:
        by_key.setdefault(report.key, []).append(report)
    return {
        key: Budget(
            registers=max(r.registers for r in group),
            spill_bytes=max(r.spill_bytes for r in group),
            shared_bytes=max(r.shared_bytes for r in group),
            serialized=max(len(r.wgmma_serialized) for r in group),
            hgmma=all(_runs_on_hgmma(r) for r in group),
        )
        for key, group in by_key.items()
    }


def _runs_on_hgmma(report: CompileReport) -> bool:
    return report.sass["HGMMA"] > 0 and report.sass["HMMA"] == 0


def load_budget(path: Path = BUDGET_FILE) -> dict[str, Budget]:
    """The budget file's entries, keyed like `CompileReport.key`."""
    return {key: Budget(**entry) for key, entry in json.loads(path.read_text()).items()}


def save_budget(budget: Mapping[str, Budget], path: Path = BUDGET_FILE) -> None:
    """Write `budget`, one line per case so that a change reads well in a diff."""
    lines = [f"  {json.dumps(key)}: {json.dumps(dataclasses.asdict(budget[key]))}" for key in sorted(budget)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def compile_provider(
    provider: str,
    *,
    names: Sequence[str] | None = None,
    quick: bool = False,
    archs: Sequence[int] | None = None,
    triton_site: Path | None = None,
    timeout_s: float = 3600.0,
) -> list[CompileReport]:
    """Compile a provider's cases in a fresh process, with ``TRITON_INTERPRET`` unset.

    `names` keeps the cases so named, if the provider has them, `quick` those marked quick, `archs` those
    architectures. `triton_site` is a directory holding another triton version (``pip install --target``), which
    then goes before the installed one. Raises RuntimeError with the process's error output if a case does not compile.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_DEFAULT_FP_FUSION"] = "1"  # what the launchers ask for; unset, triton 3.9 warns
    search_path = [triton_site, ROOT, os.environ.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(str(entry) for entry in search_path if entry)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "reports.json"
        command = [sys.executable, str(Path(__file__)), provider, "--out", str(out)]
        command += ["--quick"] if quick else []
        command += ["--names", *names] if names else []
        command += ["--archs", *map(str, archs)] if archs else []
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"compiling {provider} failed:\n{done.stderr[-4000:]}")
        entries = json.loads(out.read_text())
    return [CompileReport(**{**e, "wgmma_serialized": tuple(e["wgmma_serialized"])}) for e in entries]


def _import_provider(provider: str) -> Callable[[], list[CompileCase]]:
    """The provider's function. Without torch, `kernels` and its subpackages are entered without running their
    ``__init__`` (the public API needs torch, the device code does not)."""
    module, _, function = provider.partition(":")
    if importlib.util.find_spec("torch") is None:
        for name in ("kernels", "kernels.attention"):
            package = types.ModuleType(name)
            package.__path__ = [str(ROOT / name.replace(".", "/"))]
            sys.modules[name] = package
    return getattr(importlib.import_module(module), function)


def _worker(argv: Sequence[str] | None = None) -> None:
    """The process that `compile_provider` starts: compiles and writes the reports as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("provider")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--archs", nargs="+", type=int)
    args = parser.parse_args(argv)
    cases = _import_provider(args.provider)()
    cases = [case for case in cases if (not args.names or case.name in args.names) and (case.quick or not args.quick)]
    wanted = [(case, arch) for case in cases for arch in case.archs if not args.archs or arch in args.archs]
    reports = [dataclasses.asdict(compile_case(case, arch)) for case, arch in wanted]
    args.out.write_text(json.dumps(reports))


if __name__ == "__main__":
    # Run as a file, this module is __main__; the cases were made by the importable module, and dataclasses of
    # one name are not one class.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    _worker()
