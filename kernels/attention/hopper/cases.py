"""What scripts/compile_check.py compiles of the Hopper path: the configurations of tuning.py, without torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.attention.hopper import tuning
from kernels.attention.hopper.elementwise import backward_postprocess, backward_preprocess, list_tiles
from kernels.attention.hopper.gluon_backward import backward_kernel
from kernels.attention.hopper.gluon_backward_wide import backward_wide_kernel
from kernels.attention.hopper.gluon_forward import forward_kernel
from kernels.compile_check import CompileCase

_DTYPES = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}
_MASKS = {"full": (False, False), "causal": (False, True), "window": (True, True), "left": (True, False)}


def source(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]) -> ASTSource:
    """What the JIT would compile for arguments of these types: 16-byte aligned pointers, nothing known of the
    integers.
    """
    names = kernel.arg_names
    missing = set(names) - set(types) - set(constants)
    if missing or set(constants) - set(names):
        raise ValueError(
            f"{kernel.__name__}: no type or value for {missing}, no parameter {set(constants) - set(names)}"
        )
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    return make(kernel, signature, dict(constants), aligned)


def _tile(block: list[int], dtype: str, layout: gl.NVMMASharedLayout | None = None) -> str:
    """Type of a descriptor with this block."""
    layout = layout or gl.NVMMASharedLayout.get_default_for(block, _DTYPES[dtype])
    return f"tensordesc<{dtype}{block},{layout!r}>"


def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def forward_source(width: int, tile: tuning.ForwardTile, dtype: str, mask: str, varlen: bool) -> ASTSource:
    """The forward kernel in one configuration."""
    left, right = _MASKS[mask]
    ones = [1, 1, 1] if varlen else [1, 1]
    types: dict[str, str] = {}
    for part, columns in zip(("desc", "tail"), tuning.FORWARD_PIECES[width], strict=False):
        rows, keys = (_tile([*ones, n, columns], dtype) for n in (64, tile.block_n))
        types |= {f"q_{part}": rows, f"k_{part}": keys, f"v_{part}": keys, f"o_{part}": rows}
    types |= {"lse_ptr": "*fp32", "sched": "*i32", "cu_q": "*i32", "cu_k": "*i32", "scale_log2": "fp32"}
    types |= _integers("wl", "wr", "num_m", "num_tiles", "section", "Sq", "Sk", "num_heads", "group", "batch_heads")
    types |= _integers("lse_stride_b", "lse_stride_h")
    constants = {
        "BM": tile.block_m,
        "BN": tile.block_n,
        "D": width,
        "STAGES": tile.stages,
        "CONSUMER_REGS": tile.consumer_regs,
        "VARLEN": varlen,
        "LEFT": left,
        "RIGHT": right,
        "OWN_O": tile.own_o,
        "PINGPONG": tile.pingpong,
        "OVERLAP": tile.overlap,
        "AHEAD": tile.ahead,
        "Q_TILES": tile.q_tiles,
        "TRIM": tile.trim,
        "NAMED": tile.named_kv,
    }
    tails = {} if "q_tail" in types else dict.fromkeys(("q_tail", "k_tail", "v_tail", "o_tail"))
    return source(forward_kernel, types, constants | tails | ({} if varlen else {"cu_q": None, "cu_k": None}))


def backward_source(
    width: int,
    tile: tuning.BackwardTile | tuning.WideBackwardTile,
    dtype: str,
    mask: str,
    varlen: bool,
    order: str = "free",
) -> ASTSource:
    """The backward kernel in one configuration; ``order`` of dQ's sums: free, first_stores or deterministic."""
    left, right = _MASKS[mask]
    ones = [1, 1, 1] if varlen else [1, 1]
    block_m, block_n = tile.queries, tile.block_n
    rows, keys = (_tile([*ones, n, width], dtype) for n in (tuning.SCRATCH_TILE, block_n))
    plain = gl.NVMMASharedLayout(0, 32, 2)
    statistics = _tile([1, tuning.SCRATCH_TILE], "fp32", plain)
    types = {"q_desc": rows, "k_desc": keys, "v_desc": keys, "do_desc": rows, "dk_desc": keys, "dv_desc": keys}
    sums = _tile([tile.sum_rows(width), 256], "fp32", plain)
    types |= {"lse_desc": statistics, "delta_desc": statistics, "dq_desc": sums}
    types |= {"sched": "*i32", "cu_q": "*i32", "cu_k": "*i32", "turns": "*i32", "scale_log2": "fp32"}
    types |= {"scale": "fp32"} | _integers("wl", "wr", "num_n", "num_tiles", "section", "Sq", "Sk", "padded")
    types |= _integers("num_heads_k", "group", "batch_heads_k")
    constants = {
        "BM": block_m,
        "BN": block_n,
        "D": width,
        "STAGES": tile.q_stages,
        "DO_STAGES": tile.do_stages,
        **tile.constants(),
        "VARLEN": varlen,
        "LEFT": left,
        "RIGHT": right,
        "FIRST_STORES": order != "free",
        "DETERMINISTIC": order == "deterministic",
        "PDL": tile.pdl and not varlen,
    }
    absent = ({} if varlen else {"sched": None, "cu_q": None, "cu_k": None}) | (
        {} if order != "free" else {"turns": None}
    )
    kernel = backward_wide_kernel if isinstance(tile, tuning.WideBackwardTile) else backward_kernel
    return source(kernel, types, constants | absent)


def elementwise_source(kernel: Any, dtype: str, constants: Mapping[str, Any]) -> ASTSource:
    """One of the small kernels, with varlen's arguments."""
    pointers = {"lse": "*fp32", "dlse": "*fp32", "lse_log2": "*fp32", "delta": "*fp32", "sums": "*fp32"}
    pointers |= {"out": f"*{dtype}", "dout": f"*{dtype}", "dq": f"*{dtype}", "cu_q": "*i32"}
    pointers |= {"turns": "*i32", "sched": "*i32", "cu_seqlens": "*i32", "scale": "fp32"}
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names if name not in constants}
    return source(kernel, types, constants)


def compile_cases() -> list[CompileCase]:
    """Every configuration of tuning.py, each mask, dense and varlen; fp16 where only the conversions differ:
    once per width.
    """
    cases = []
    for width, tile in tuning.FORWARD.items():
        for dtype, mask, varlen in _combinations():
            quick = _quick(width, mask, varlen, dtype)
            cases.append(_forward_case("forward", width, tile, dtype, mask, varlen, quick=quick))
    for (width, right), dtype, varlen in itertools.product(tuning.LONG_KEYS, ("bf16", "fp16"), (False, True)):
        mask = "causal" if right else "full"
        cases.append(_forward_case("forward_long", width, tuning.FORWARD_LONG[width], dtype, mask, varlen))
    for width, backward_tile in tuning.BACKWARD.items():
        num_warps = backward_tile.num_warps
        for dtype, mask, varlen in _combinations():
            name = f"hopper.backward[d{width},{mask},{'varlen' if varlen else 'dense'},{dtype}]"
            make = _bind(backward_source, width, backward_tile, dtype, mask, varlen)
            cases.append(CompileCase(name, make, num_warps, quick=_quick(width, mask, varlen, dtype)))
            for order in ("first_stores", "deterministic") if dtype == "bf16" else ():
                make = _bind(backward_source, width, backward_tile, dtype, mask, varlen, order)
                cases.append(CompileCase(name.replace("backward", f"backward_{order}"), make, num_warps))
    small: dict[str, tuple[Any, dict[str, Any], int]] = {
        "list_tiles": (list_tiles, {"BLOCK": 128, "DESCENDING": True, "CHUNK": 1024}, 4),
    }
    for width, suffix in ((128, ""), (256, "[d256]")):
        main = tuning.BACKWARD[width]
        common = {"D": width, "HEAD_DIM": width, "BLOCK_M": main.queries, "VARLEN": True, "PDL": False}
        before, after = {"BLOCK": 64, "HAS_DLSE": True}, {"COLUMN_WARPGROUPS": main.column_warpgroups}
        small[f"preprocess{suffix}"] = (backward_preprocess, common | before, main.preprocess_warps)
        small[f"postprocess{suffix}"] = (backward_postprocess, common | after, main.postprocess_warps)
    for name, (kernel, constants, num_warps) in small.items():
        cases.append(CompileCase(f"hopper.{name}", _bind(elementwise_source, kernel, "bf16", constants), num_warps))
    return cases


def candidate_cases() -> list[CompileCase]:
    """FORWARD_CANDIDATES in every combination, also those for which they are not chosen: ``scripts/compile_check.py
    --provider kernels.attention.hopper.cases:candidate_cases`` (they have no budget)."""
    return [
        _forward_case(f"forward_{name}", width, tile, dtype, mask, varlen)
        for width, tiles in tuning.FORWARD_CANDIDATES.items()
        for name, tile in tiles.items()
        for dtype, mask, varlen in _combinations()
    ]


def _forward_case(
    name: str, width: int, tile: tuning.ForwardTile, dtype: str, mask: str, varlen: bool, quick: bool = False
) -> CompileCase:
    full_name = f"hopper.{name}[d{width},{mask},{'varlen' if varlen else 'dense'},{dtype}]"
    make = _bind(forward_source, width, tile, dtype, mask, varlen)
    return CompileCase(full_name, make, 4, options=tile.options(), quick=quick)


def _combinations() -> list[tuple[str, str, bool]]:
    masks = [("full", False), ("full", True), ("causal", False), ("causal", True)]
    masks += [("window", False), ("window", True), ("left", False)]
    return [("bf16", mask, varlen) for mask, varlen in masks] + [("fp16", "causal", False)]


def _quick(width: int, mask: str, varlen: bool, dtype: str) -> bool:
    return width == 128 and dtype == "bf16" and (mask, varlen) in {("causal", False), ("window", True)}


def _bind(make: Any, *args: Any) -> Any:
    return lambda: make(*args)
