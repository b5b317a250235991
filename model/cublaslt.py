"""Matrix products of cuBLASLt with an epilogue: the arithmetic that follows a product, done on its sums in registers.

PyTorch passes on bias and GELU alone, without the GELU's argument that a backward pass needs. This module asks the same
library, which PyTorch has loaded, for the others. A plan (descriptor, layouts, the algorithm that
`Plan.choose` takes) is made once for each kind of product and kept.

cuBLAS's matrices are column-major: a row-major (r, c) tensor is, to it, the (c, r) transpose. So `product` computes
outᵀ = op(a)·op(b) with the operands' transposes as they lie. Constants are those of CUDA 12's and 13's `cublasLt.h`.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 << 20
"""What PyTorch gives cuBLAS on Hopper."""


class Epilogue(enum.IntEnum):
    """What follows a product: AUX is the GELU's argument, written by GELU_AUX_BIAS and read by DGELU."""

    gelu_aux_bias = 164
    dgelu = 192


DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
COMPUTE_FP32 = 68
TRANS_A, TRANS_B, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_STRIDE, BIAS_DTYPE = 3, 4, 7, 8, 11, 12, 26
MAX_WORKSPACE, REDUCTIONS, MIN_ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # of a, b, c, d
REPEATABLE_REDUCTIONS = 2 | 4  # through the workspace; without 1, sums in place in any order
ALGORITHM_ID, TILE, SPLITS, REDUCTION, CLUSTER = 0, 1, 2, 3, 8
CANDIDATES = 8
LEAST_ALIGNMENT = 16
"""Bytes, of every address and row: what bulk copies and 16-byte loads need."""

FASTEST = {Epilogue.gelu_aux_bias: (66, 28, 5), Epilogue.dgelu: (39, 20, 9)}
"""Algorithm, tile and cluster that are taken where the heuristic names them. They are numbers of the library's own.

H200 at its power limit, cuBLASLt 13.1, bf16, E = 2,560, M = 10,240, 8,192 tokens, screened: GELU_AUX_BIAS 0.625 ms,
against 0.674 of the heuristic's first; DGELU and an eager sum 0.704, against 0.757 of the first, which splits K.
Timing them in each process instead would let ranks, and a run and its resumption, differ in their last bits.
"""


class UnsupportedError(RuntimeError):
    """The library has no algorithm for these operands."""


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", c_uint64 * 8),)


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


P, PP = c_void_p, ctypes.POINTER(c_void_p)
SIGNATURES: dict[str, list[Any]] = {
    "cublasLtCreate": [PP],
    "cublasLtMatmulDescCreate": [PP, c_int, c_int],
    "cublasLtMatmulDescSetAttribute": [P, c_int, P, c_size_t],
    "cublasLtMatrixLayoutCreate": [PP, c_int, c_uint64, c_uint64, c_int64],
    "cublasLtMatmulPreferenceCreate": [PP],
    "cublasLtMatmulPreferenceDestroy": [P],
    "cublasLtMatmulPreferenceSetAttribute": [P, c_int, P, c_size_t],
    "cublasLtMatmulAlgoGetHeuristic": [P] * 7 + [c_int, ctypes.POINTER(_Heuristic), ctypes.POINTER(c_int)],
    "cublasLtMatmulAlgoConfigGetAttribute": [P, c_int, P, c_size_t, ctypes.POINTER(c_size_t)],
    "cublasLtMatmul": [P] * 14 + [c_size_t, P],
}


@cache
def library() -> Any:
    """The libcublasLt of PyTorch's CUDA version, which is in the process already."""
    if torch.version.cuda is None:
        raise RuntimeError("this PyTorch is built without CUDA and has no cuBLASLt")
    found = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    for name, arguments in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, c_int
    return found


def missing() -> str | None:
    """Why these products can't run on the current device, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (9, 0):
        return "the GPU's compute capability is below 9.0"
    try:
        library()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"cuBLASLt can't be loaded: {error}"
    return None


def check(status: int, call: str) -> None:
    if status != 0:
        raise RuntimeError(f"cuBLASLt's {call} failed with cublasStatus_t {status}")


@cache
def handle(device_index: int) -> c_void_p:
    """The library's handle of a device, for good."""
    out = c_void_p()
    with torch.cuda.device(device_index):
        check(library().cublasLtCreate(byref(out)), "cublasLtCreate")
    return out


@dataclass(frozen=True)
class Matrix:
    """A row-major matrix; `alignment` is the power of two up to 256 that divides its address."""

    rows: int
    columns: int
    dtype: torch.dtype
    alignment: int

    @staticmethod
    def of(tensor: Tensor) -> Matrix:
        """Of a contiguous (r, c) tensor, or a (c,) one as a single row."""
        if not tensor.is_contiguous():
            raise ValueError(f"a product's operands have to be contiguous, given strides {tensor.stride()}")
        rows, columns = tensor.shape if tensor.dim() == 2 else (1, tensor.shape[0])
        address = tensor.data_ptr()
        return Matrix(rows, columns, tensor.dtype, min(256, address & -address))


@dataclass(frozen=True)
class Kind:
    """All that a plan depends on. `b` is never transposed here."""

    device_index: int
    epilogue: Epilogue
    transpose_a: bool
    a: Matrix
    b: Matrix
    out: Matrix
    bias: Matrix | None
    aux: Matrix


def config(algorithm: _Algorithm, attribute: int) -> int:
    """One number of an algorithm."""
    value, written = (c_uint16 if attribute == CLUSTER else c_int32)(), c_size_t()
    status = library().cublasLtMatmulAlgoConfigGetAttribute(
        byref(algorithm), attribute, byref(value), ctypes.sizeof(value), byref(written)
    )
    check(status, f"AlgoConfigGetAttribute({attribute})")
    return int(value.value)


def preferred(epilogue: Epilogue, found: list[_Algorithm]) -> _Algorithm:
    """The measured one of the candidates, else the first with K unsplit, else the first."""
    whole = [a for a in found if config(a, SPLITS) == 1 and config(a, REDUCTION) == 0]
    for algorithm in whole:
        if tuple(config(algorithm, attribute) for attribute in (ALGORITHM_ID, TILE, CLUSTER)) == FASTEST[epilogue]:
            return algorithm
    return (whole or found)[0]


class Plan:
    """A descriptor whose two pointers are set before each call, under a lock: the library reads them in the call."""

    def __init__(self, kind: Kind, bias: Tensor | None, aux: Tensor) -> None:
        """Of this kind, with the alignments that `bias` and `aux` have."""
        self.kind, self.lock, self.desc = kind, threading.Lock(), c_void_p()
        self.one, self.zero = c_float(1.0), c_float(0.0)
        check(library().cublasLtMatmulDescCreate(byref(self.desc), COMPUTE_FP32, DTYPES[torch.float32]), "DescCreate")
        self.put(TRANS_A, c_int32(kind.transpose_a))
        self.put(TRANS_B, c_int32(0))
        self.put(EPILOGUE, c_uint32(kind.epilogue))
        self.put(AUX_STRIDE, c_int64(kind.aux.columns))
        if kind.bias is not None and kind.bias.dtype is not kind.out.dtype:
            self.put(BIAS_DTYPE, c_int32(DTYPES[kind.bias.dtype]))
        self.point(bias, aux)
        self.layouts = [self.layout(matrix) for matrix in (kind.a, kind.b, kind.out)]
        self.algorithm = self.choose()

    def put(self, attribute: int, value: Any) -> None:
        status = library().cublasLtMatmulDescSetAttribute(self.desc, attribute, byref(value), ctypes.sizeof(value))
        check(status, f"DescSetAttribute({attribute})")

    def point(self, bias: Tensor | None, aux: Tensor) -> None:
        if bias is not None:
            self.put(BIAS_POINTER, c_void_p(bias.data_ptr()))
        self.put(AUX_POINTER, c_void_p(aux.data_ptr()))

    def layout(self, matrix: Matrix) -> c_void_p:
        out, (rows, columns) = c_void_p(), (matrix.rows, matrix.columns)
        status = library().cublasLtMatrixLayoutCreate(byref(out), DTYPES[matrix.dtype], columns, rows, columns)
        check(status, "MatrixLayoutCreate")
        return out

    def choose(self) -> _Algorithm:
        """The `preferred` of the heuristic's candidates.

        A function of library, device and `kind` alone, and each candidate sums in a fixed order.
        """
        preference, count, kind = c_void_p(), c_int(), self.kind
        check(library().cublasLtMatmulPreferenceCreate(byref(preference)), "PreferenceCreate")
        values: list[tuple[int, Any]] = [
            (MAX_WORKSPACE, c_uint64(WORKSPACE_BYTES)),
            (REDUCTIONS, c_uint32(REPEATABLE_REDUCTIONS)),
        ]
        alignments = (kind.a.alignment, kind.b.alignment, kind.out.alignment, kind.out.alignment)
        values += zip(MIN_ALIGNMENTS, map(c_uint32, alignments), strict=True)
        for attribute, value in values:
            status = library().cublasLtMatmulPreferenceSetAttribute(
                preference, attribute, byref(value), ctypes.sizeof(value)
            )
            check(status, f"PreferenceSetAttribute({attribute})")
        a, b, out = self.layouts
        results = (_Heuristic * CANDIDATES)()
        status = library().cublasLtMatmulAlgoGetHeuristic(
            handle(kind.device_index), self.desc, a, b, out, out, preference, CANDIDATES, results, byref(count)
        )
        check(library().cublasLtMatmulPreferenceDestroy(preference), "PreferenceDestroy")
        found: list[_Algorithm] = [r.algorithm for r in results[: count.value] if r.status == 0]
        if status != 0 or not found:
            raise UnsupportedError(f"cuBLASLt has no algorithm for {kind} (cublasStatus_t {status})")
        return preferred(kind.epilogue, found)

    def run(self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, aux: Tensor) -> None:
        workspace = torch.empty(
            WORKSPACE_BYTES, dtype=torch.uint8, device=out.device
        )  # the stream's own until it is read
        layout_a, layout_b, layout_out = self.layouts
        with self.lock, torch.cuda.device(out.device):
            self.point(bias, aux)
            status = library().cublasLtMatmul(
                handle(self.kind.device_index), self.desc,
                byref(self.one), a.data_ptr(), layout_a, b.data_ptr(), layout_b,
                byref(self.zero), out.data_ptr(), layout_out, out.data_ptr(), layout_out,
                byref(self.algorithm), workspace.data_ptr(), WORKSPACE_BYTES, torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
        check(status, "Matmul")


_plans: dict[Kind, Plan] = {}
_planning = threading.Lock()


def product(
    epilogue: Epilogue, a: Tensor, b: Tensor, out: Tensor, *, transpose_a: bool, bias: Tensor | None, aux: Tensor
) -> None:
    """outᵀ = op(aᵀ)·bᵀ through the epilogue. Raises `UnsupportedError` where the library has no algorithm for it.

    b (T, K); a (N, K) if `transpose_a` else (K, N); out and aux (T, N); bias (N,).
    """
    a_kind, b_kind, out_kind, aux_kind = matrices = [Matrix.of(t) for t in (a, b, out, aux)]
    bias_kind = None if bias is None else Matrix.of(bias)
    if out.numel() == 0 or any(
        m.alignment < LEAST_ALIGNMENT or m.columns * m.dtype.itemsize % LEAST_ALIGNMENT
        for m in (*matrices, *([] if bias_kind is None else [bias_kind]))
    ):
        raise UnsupportedError(f"no tokens, or addresses and rows that aren't whole {LEAST_ALIGNMENT} bytes")
    kind = Kind(out.get_device(), epilogue, transpose_a, a_kind, b_kind, out_kind, bias_kind, aux_kind)
    with _planning:
        plan = _plans.get(kind)
        if plan is None:
            plan = _plans[kind] = Plan(kind, bias, aux)
    plan.run(a, b, out, bias, aux)
