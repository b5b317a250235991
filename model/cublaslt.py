"""Matrix products of cuBLASLt with an epilogue: the arithmetic that follows a product, done on its sums in registers.

PyTorch passes on bias and GELU alone, without the GELU's argument that a backward pass needs. This module asks the same
library, which PyTorch has loaded, for the others. A plan (descriptor, layouts, the algorithm that the library's
heuristic names first) is made once for each kind of product and kept.

cuBLAS's matrices are column-major: a row-major (r, c) tensor is, to it, the (c, r) transpose. So `product` computes
outᵀ = op(a)·op(b) with the operands' transposes as they lie. Constants are those of CUDA 12's and 13's `cublasLt.h`.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 << 20
"""What PyTorch gives cuBLAS on Hopper."""


class Epilogue(enum.IntEnum):
    """What follows a product: AUX is the GELU's argument, written by GELU_AUX_BIAS and read by DGELU_BGRAD."""

    gelu_aux_bias = 164
    dgelu_bgrad = 208


DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
COMPUTE_FP32 = 68
TRANS_A, TRANS_B, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_STRIDE, BIAS_DTYPE = 3, 4, 7, 8, 11, 12, 26
MAX_WORKSPACE, MIN_ALIGNMENTS = 1, (5, 6, 7, 8)  # of a, b, c, d


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
    bias: Matrix
    aux: Matrix


class Plan:
    """A descriptor whose two pointers are set before each call, under a lock: the library reads them in the call."""

    def __init__(self, kind: Kind, bias: Tensor, aux: Tensor) -> None:
        """Of this kind, with the alignments that `bias` and `aux` have."""
        self.kind, self.lock, self.desc = kind, threading.Lock(), c_void_p()
        self.one, self.zero = c_float(1.0), c_float(0.0)
        check(library().cublasLtMatmulDescCreate(byref(self.desc), COMPUTE_FP32, DTYPES[torch.float32]), "DescCreate")
        self.put(TRANS_A, c_int32(kind.transpose_a))
        self.put(TRANS_B, c_int32(0))
        self.put(EPILOGUE, c_uint32(kind.epilogue))
        self.put(AUX_STRIDE, c_int64(kind.aux.columns))
        if kind.bias.dtype is not kind.out.dtype:
            self.put(BIAS_DTYPE, c_int32(DTYPES[kind.bias.dtype]))
        self.point(bias, aux)
        self.layouts = [self.layout(matrix) for matrix in (kind.a, kind.b, kind.out)]
        self.algorithm = self.choose()

    def put(self, attribute: int, value: Any) -> None:
        status = library().cublasLtMatmulDescSetAttribute(self.desc, attribute, byref(value), ctypes.sizeof(value))
        check(status, f"DescSetAttribute({attribute})")

    def point(self, bias: Tensor, aux: Tensor) -> None:
        self.put(BIAS_POINTER, c_void_p(bias.data_ptr()))
        self.put(AUX_POINTER, c_void_p(aux.data_ptr()))

    def layout(self, matrix: Matrix) -> c_void_p:
        out, (rows, columns) = c_void_p(), (matrix.rows, matrix.columns)
        status = library().cublasLtMatrixLayoutCreate(byref(out), DTYPES[matrix.dtype], columns, rows, columns)
        check(status, "MatrixLayoutCreate")
        return out

    def choose(self) -> _Algorithm:
        """The heuristic's first."""
        preference, count, kind = c_void_p(), c_int(), self.kind
        check(library().cublasLtMatmulPreferenceCreate(byref(preference)), "PreferenceCreate")
        values: list[tuple[int, Any]] = [(MAX_WORKSPACE, c_uint64(WORKSPACE_BYTES))]
        alignments = (kind.a.alignment, kind.b.alignment, kind.out.alignment, kind.out.alignment)
        values += zip(MIN_ALIGNMENTS, map(c_uint32, alignments), strict=True)
        for attribute, value in values:
            status = library().cublasLtMatmulPreferenceSetAttribute(
                preference, attribute, byref(value), ctypes.sizeof(value)
            )
            check(status, f"PreferenceSetAttribute({attribute})")
        a, b, out = self.layouts
        result = _Heuristic()
        status = library().cublasLtMatmulAlgoGetHeuristic(
            handle(kind.device_index), self.desc, a, b, out, out, preference, 1, byref(result), byref(count)
        )
        check(library().cublasLtMatmulPreferenceDestroy(preference), "PreferenceDestroy")
        if status != 0 or count.value == 0:
            raise RuntimeError(f"cuBLASLt has no algorithm for {kind} (cublasStatus_t {status})")
        algorithm: _Algorithm = result.algorithm
        return algorithm

    def run(self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor, aux: Tensor) -> None:
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
    epilogue: Epilogue, a: Tensor, b: Tensor, out: Tensor, *, transpose_a: bool, bias: Tensor, aux: Tensor
) -> None:
    """outᵀ = op(aᵀ)·bᵀ through the epilogue. Raises `RuntimeError` where the library has no algorithm for it.

    b (T, K); a (N, K) if `transpose_a` else (K, N); out and aux (T, N); bias (N,), read or, for a gradient, written.
    """
    kind = Kind(out.get_device(), epilogue, transpose_a, *map(Matrix.of, (a, b, out, bias, aux)))
    with _planning:
        plan = _plans.get(kind)
        if plan is None:
            plan = _plans[kind] = Plan(kind, bias, aux)
    plan.run(a, b, out, bias, aux)
