"""Compile every shipped kernel without a GPU and hold it against ``kernels/compile_budget.json``.

Prints a line per kernel and architecture (registers, spills, shared memory, serialised tensor-core products,
instruction counts) and exits non-zero when one breaks ``kernels/compile_budget.json`` or does not compile.
``--triton 3.6.0 3.9.0`` checks under several triton versions (the ones not installed go into
``.cache/triton``); ``--update-budget`` rewrites the budget from what was measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import end_on_ctrl_c, run_tool

end_on_ctrl_c(__name__)

from kernels.compile_check import (
    ROOT,
    CompileReport,
    budget_of,
    check,
    compile_provider,
    load_budget,
    save_budget,
)

PROVIDERS = (
    "kernels.attention.portable:compile_cases",
    "kernels.attention.hopper:compile_cases",
    "model.norm_kernel:compile_cases",
    "model.loss_kernel:compile_cases",
    "training.adamw_kernel:compile_cases",
    "training.mean_kernel:compile_cases",
)
CACHE = ROOT / ".cache" / "triton"


def triton_site(wanted: str) -> Path | None:
    """The directory that holds triton `wanted`, downloaded on first use; None if that is the installed
    version."""
    if wanted == version("triton"):
        return None
    site = CACHE / wanted
    if not (site / "triton").is_dir():
        print(f"installing triton {wanted} into {site.relative_to(ROOT)}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        subprocess.run([*pip, f"triton=={wanted}"], check=True)
    return site


def line(report: CompileReport, breaches: Sequence[str]) -> str:
    """One line of the table."""
    sass = " ".join(f"{op} {n}" for op, n in report.sass.items() if n and op not in ("LDL", "STL"))
    serialized = " ".join(report.wgmma_serialized) or "none"
    return (
        f"{'FAIL' if breaches else 'ok  '} {report.case:<48} sm_{report.arch} triton {report.triton:<6} "
        f"regs {report.registers:>3}  spill {report.spill_bytes:>4} B  shared {report.shared_bytes:>6} B  "
        f"serialized {serialized:<6} {report.seconds:>5.1f} s  {sass}"
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--triton",
        nargs="+",
        default=[version("triton")],
        metavar="VERSION",
        help="triton versions to check under",
    )
    parser.add_argument(
        "--provider",
        nargs="+",
        default=list(PROVIDERS),
        help="package.module:function, each a list of CompileCase",
    )
    parser.add_argument("--names", nargs="+", help="only these cases")
    parser.add_argument("--quick", action="store_true", help="only the representative subset")
    parser.add_argument("--archs", nargs="+", type=int, help="only these architectures, e.g. 80 90")
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes at a time")
    parser.add_argument("--update-budget", action="store_true", help="rewrite the budget of the cases measured now")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> list[CompileReport]:
    """Reports of every provider under every version, `args.jobs` processes at a time."""
    jobs = [(site, provider) for site in map(triton_site, args.triton) for provider in args.provider]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [
            pool.submit(
                compile_provider,
                provider,
                names=args.names,
                quick=args.quick,
                archs=args.archs,
                triton_site=site,
            )
            for site, provider in jobs
        ]
        return [report for future in futures for report in future.result()]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    reports = measure(args)
    if missing := sorted(set(args.names or ()) - {report.case for report in reports}):
        sys.exit(f"no case {missing} in {' '.join(args.provider)}, or not of this selection")
    if args.update_budget:
        everything = not (args.names or args.quick or args.archs) and args.provider == list(PROVIDERS)
        save_budget({**({} if everything else load_budget()), **budget_of(reports)})  # a full run drops stale entries
    budget = load_budget()
    breaches = [check(report, budget) for report in reports]
    for report, found in zip(reports, breaches, strict=True):
        print(line(report, found))
    print(*(breach for found in breaches for breach in found), sep="\n")
    print(f"{len(reports)} kernels compiled, {sum(map(bool, breaches))} over budget")
    return int(any(breaches))


if __name__ == "__main__":
    run_tool(main)
