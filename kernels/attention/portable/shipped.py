"""Every kernel configuration that ships, as sources that compile without a GPU.

The arguments come from the launchers' own planning functions on meta tensors, so the compiled signature, the attributes
(divisibility, arguments equal to 1) and the tiles are those of a real launch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.compiler import ASTSource

from kernels.attention.dispatch import AttnExtras, AttnParams
from kernels.attention.portable.launch import (
    Call,
    Plan,
    plan_delta,
    plan_dkdv,
    plan_dq,
    plan_forward,
    plan_probs,
)
from kernels.attention.portable.tuning import SHORT_KEYS
from kernels.compile_check import CompileCase

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
ARCHS = (80, 90)
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 160, 192, 256)
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "short": {},
    "causal": {"causal": True, "window_right": 0},
    "window": {"window_left": 1024, "window_right": 0},
    "softcap": {"causal": True, "window_right": 0, "softcap": 30.0},
    "alibi": {"causal": True, "window_right": 0},
    "dropout": {"causal": True, "window_right": 0, "dropout_p": 0.1},
    "varlen": {"causal": True, "window_right": 0},
}


def make_source(launch: Plan) -> ASTSource:
    """What Triton's JIT would compile for this launch."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        kind = _kind(value)
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (kind == "i32" and value == 1 and specialise):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = kind
        if isinstance(value, Tensor) or (kind == "i32" and value % 16 == 0 and specialise):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if isinstance(value, int) and -(2**31) <= value < 2**31 else "i64"


def plan_all(
    head_dim: int, dtype: torch.dtype, feature: str, capability: tuple[int, int], group: int = 1
) -> dict[str, Plan]:
    """The launches of a call of (4, 4096, 16, head_dim), or of the longest short one, by kernel name."""
    batch, seqlen, heads = 4, SHORT_KEYS if feature == "short" else 4096, 16
    params = AttnParams(head_dim**-0.5, seqlen, seqlen, **FEATURES[feature])

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    varlen = feature == "varlen"
    lead = (batch * seqlen,) if varlen else (batch, seqlen)
    q, k = meta(*lead, heads, head_dim), meta(*lead, heads // group, head_dim)
    stats = meta(heads, batch * seqlen, dtype=torch.float32)
    stats = stats if varlen else meta(batch, heads, seqlen, dtype=torch.float32)
    cu = meta(batch + 1, dtype=torch.int32) if varlen else None
    slopes = meta(heads, dtype=torch.float32) if feature == "alibi" else None
    rng = meta(2, dtype=torch.int64) if feature == "dropout" else None
    call = Call(q, k, params, AttnExtras(cu, cu, slopes, rng), capability)
    plans = {
        "forward": plan_forward(call, k, q, stats),
        "delta": plan_delta(call, q, q, stats, None, stats, stats),
        "dq": plan_dq(call, k, q, stats, stats, q),
        "dkdv": plan_dkdv(call, k, q, stats, stats, k, k),
    }
    if feature == "dropout":
        plans["probs"] = plan_probs(call, stats, meta(batch, heads, seqlen, seqlen))
    return plans


def _configurations() -> Iterator[tuple[int, torch.dtype, str, int]]:
    """(head dim, dtype, feature, group): every head dim causal and full in bf16, every feature at 64 and 128."""
    for head_dim in HEAD_DIMS:
        for feature in ("full", "causal"):
            yield head_dim, torch.bfloat16, feature, 1
    for head_dim in (64, 128):
        for feature in FEATURES:
            if feature not in ("full", "causal", "short"):
                yield head_dim, torch.bfloat16, feature, 1
        yield head_dim, torch.float16, "causal", 1
        yield head_dim, torch.bfloat16, "causal", 4
    yield 64, torch.bfloat16, "short", 1
    yield 64, torch.float32, "causal", 1


def compile_cases() -> list[CompileCase]:
    """Every shipped configuration; the default test run compiles the causal bf16 ones at head dims 64 and 128."""
    cases = []
    for head_dim, dtype, feature, group in _configurations():
        for arch in ARCHS:
            capability = (arch // 10, arch % 10)
            for kernel, launch in plan_all(head_dim, dtype, feature, capability, group).items():
                if feature == "short" and kernel != "forward":
                    continue  # those of longer rows
                name = f"portable.{kernel}[d{head_dim},{feature},{_TYPES[dtype]},g{group},sm{arch}]"
                cases.append(
                    CompileCase(
                        name=name,
                        make_source=lambda launch=launch: make_source(launch),  # type: ignore[misc]
                        num_warps=launch.tile.num_warps,
                        num_stages=launch.tile.num_stages,
                        archs=(arch,),
                        options=launch.tile.options(),
                        quick=head_dim in (64, 128) and feature == "causal" and dtype == torch.bfloat16 and group == 1,
                    )
                )
    return cases
