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


def _pieces(width: int, ones: list[int], dtype: str, rows: Mapping[str, int]) -> dict[str, str]:
    """Tensor -> rows of a block, to types of its descriptors: {name}_desc, and _tail where the head dim has two
    pieces."""
    return {
        f"{name}_{part}": _tile([*ones, count, columns], dtype)
        for part, columns in zip(("desc", "tail"), tuning.PIECES[width], strict=False)
        for name, count in rows.items()
    }


def forward_source(width: int, tile: tuning.ForwardTile, dtype: str, mask: str, varlen: bool) -> ASTSource:
    """The forward kernel in one configuration."""
    left, right = _MASKS[mask]
    ones = [1, 1, 1] if varlen else [1, 1]
    types = _pieces(width, ones, dtype, {"q": 64, "k": tile.block_n, "v": tile.block_n, "o": 64})
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
    rounds: bool = False,
) -> ASTSource:
    """The backward kernel in one configuration; ``order`` of dQ's sums: free, first_stores or deterministic;
    ``rounds``: it writes dQ itself."""
    left, right = _MASKS[mask]
    ones = [1, 1, 1] if varlen else [1, 1]
    block_m, block_n = tile.queries, tile.block_n
    queries = tuning.SCRATCH_TILE
    plain = gl.NVMMASharedLayout(0, 32, 2)
    statistics = _tile([1, tuning.SCRATCH_TILE], "fp32", plain)
    rows = {"q": queries, "do": queries, "k": block_n, "v": block_n, "dk": block_n, "dv": block_n}
    types = _pieces(width, ones, dtype, rows)
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
    absent: dict[str, None] = {} if varlen else {"sched": None, "cu_q": None, "cu_k": None}
    if order == "free" and not rounds:
        absent |= {"turns": None}
    if not isinstance(tile, tuning.WideBackwardTile):
        types |= {"sums": "*fp32", "dq": f"*{dtype}"} | _integers("num_turns", "num_counts", "lag", "stride_qb")
        types |= dict.fromkeys(("stride_qs", "stride_qh"), "i32")
        constants |= {"ROUNDS": rounds, "HEAD_DIM": width}
        absent |= {} if rounds else {"sums": None, "dq": None}
        return source(backward_kernel, types, constants | absent)
    if "q_tail" not in types:
        absent |= dict.fromkeys(f"{name}_tail" for name in rows)
    return source(backward_wide_kernel, types, constants | absent)


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
        cases += _backward_cases(width, backward_tile)
    constants = {"BLOCK": 128, "DESCENDING": True, "CHUNK": 1024}
    cases.append(CompileCase("hopper.list_tiles", _bind(elementwise_source, list_tiles, "bf16", constants), 4))
    for width in (128, 192, 256):
        cases += _small_cases(width, tuning.BACKWARD[width])
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


def _backward_cases(width: int, tile: tuning.BackwardTile | tuning.WideBackwardTile) -> list[CompileCase]:
    """The backward kernel in every combination, and with bf16 in each order of dQ's sums."""
    cases = []
    for dtype, mask, varlen in _combinations():
        name = f"hopper.backward[d{width},{mask},{'varlen' if varlen else 'dense'},{dtype}]"
        make = _bind(backward_source, width, tile, dtype, mask, varlen)
        cases.append(CompileCase(name, make, tile.num_warps, quick=_quick(width, mask, varlen, dtype)))
        for order in ("first_stores", "deterministic") if dtype == "bf16" else ():
            make = _bind(backward_source, width, tile, dtype, mask, varlen, order)
            cases.append(CompileCase(name.replace("[", f"_{order}[", 1), make, tile.num_warps))
        if getattr(tile, "rounds_keys", 0) and mask in ("full", "causal") and not varlen:
            for order in ("free", "first_stores", "deterministic") if dtype == "bf16" else ("first_stores",):
                make = _bind(backward_source, width, tile, dtype, mask, varlen, order, True)
                kind = "rounds" if order == "free" else f"rounds_{order}"
                cases.append(CompileCase(name.replace("[", f"_{kind}[", 1), make, tile.num_warps))
    return cases


def _small_cases(width: int, tile: tuning.BackwardTile | tuning.WideBackwardTile) -> list[CompileCase]:
    """The kernels before and after the backward's."""
    common = {"D": width, "HEAD_DIM": width, "BLOCK_M": tile.queries, "VARLEN": True, "PDL": False}
    before = {"BLOCK": 64, "HAS_DLSE": True, "FIRST_STORES": False, "ROUNDS": False}
    after = {"COLUMN_WARPGROUPS": tile.column_warpgroups}
    suffix = "" if width == 128 else f"[d{width}]"
    small: dict[str, tuple[Any, dict[str, Any], int]] = {
        "preprocess": (backward_preprocess, common | before, tile.preprocess_warps),
        "postprocess": (backward_postprocess, common | after, tile.postprocess_warps),
    }
    return [
        CompileCase(f"hopper.{name}{suffix}", _bind(elementwise_source, kernel, "bf16", constants), num_warps)
        for name, (kernel, constants, num_warps) in small.items()
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
