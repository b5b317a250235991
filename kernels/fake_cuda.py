"""A CUDA driver that starts nothing, so that the host's side of a launch runs on a machine without a GPU.

A shared library with the soname of the real driver stands behind Triton's own launcher: kernels are compiled for real,
descriptors are encoded (their fields written in a row, instead of NVIDIA's packed form) and launches noted with every
byte of their parameters. So it can be measured what a launch costs the host beside the driver's own time, and shown
that two ways to launch give the kernel the same bytes.

Only in a process of its own that has not used CUDA: `install`, then `activate`. CPU tensors stand for those of
the GPU. Needs gcc, as Triton does.
"""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
SOURCE = r"""
#include <cuda.h>
#include <stdint.h>
#include <string.h>


static int num_params, sizes[512];
static long launches, encodes;
static unsigned char params[65536];
static struct { unsigned grid[3], block, shared, attributes; uint64_t stream, function; } config;

void fake_expect(int n, const int *bytes) { num_params = n; memcpy(sizes, bytes, n * sizeof(int)); }
long fake_launches(void) { return launches; }
long fake_encodes(void) { return encodes; }
const void *fake_params(void) { return params; }
const void *fake_config(void) { return &config; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **extra) {
  unsigned at = 0;
  for (int i = 0; i < num_params; at += sizes[i++]) memcpy(params + at, p[i], sizes[i]);
  config.grid[0] = c->gridDimX; config.grid[1] = c->gridDimY; config.grid[2] = c->gridDimZ;
  config.block = c->blockDimX; config.shared = c->sharedMemBytes; config.attributes = c->numAttrs;
  config.stream = (uint64_t)c->hStream; config.function = (uint64_t)f;
  ++launches;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2,
    CUtensorMapFloatOOBfill fill) {
  uint64_t *out = (uint64_t *)map;
  memset(out, 0, sizeof *map);
  out[0] = (uint64_t)address;
  out[1] = (uint64_t)type << 56 | (uint64_t)rank << 48 | (uint64_t)swizzle << 40 | (uint64_t)l2 << 32;
  for (unsigned i = 0; i < rank; ++i) out[2 + i] = dims[i] << 16 | box[i];
  for (unsigned i = 0; i + 1 < rank; ++i) out[7 + i] = strides[i];
  ++encodes;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice d) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1024;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr p) {
  *(CUdeviceptr *)data = p;
  return CUDA_SUCCESS;
}

#define OK(name, ...) CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
#define SETS(name, type, value, ...) \
  CUresult name(type *out, ##__VA_ARGS__) { *out = (type)(value); return CUDA_SUCCESS; }
OK(cuInit, unsigned flags)
SETS(cuDeviceGetCount, int, 1)
SETS(cuDriverGetVersion, int, 13020)
SETS(cuDeviceGet, CUdevice, 0, int ordinal)
SETS(cuCtxGetCurrent, CUcontext, 1)
SETS(cuCtxGetDevice, CUdevice, 0)
SETS(cuDevicePrimaryCtxRetain, CUcontext, 1, CUdevice d)
OK(cuCtxSetCurrent, CUcontext c)
OK(cuCtxSetLimit, CUlimit limit, size_t value)
SETS(cuCtxGetLimit, size_t, 0, CUlimit limit)
static uintptr_t next_handle = 16;
SETS(cuModuleLoadData, CUmodule, next_handle++, const void *image)
SETS(cuModuleGetFunction, CUfunction, next_handle++, CUmodule m, const char *name)
OK(cuModuleUnload, CUmodule m)
OK(cuFuncSetAttribute, CUfunction f, CUfunction_attribute attribute, int value)
OK(cuFuncSetCacheConfig, CUfunction f, CUfunc_cache cache)
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *status) { *status = 0; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "error"; return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return CUDA_SUCCESS; }
"""


class FakeCuda:
    """What the driver that stands in has been asked to do."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("fake_params", "fake_config"):
            getattr(library, name).restype = ctypes.c_void_p
        self._bytes = 0

    @property
    def launches(self) -> int:
        """Kernels started so far."""
        return int(self._library.fake_launches())

    @property
    def encodes(self) -> int:
        """Descriptors encoded so far."""
        return int(self._library.fake_encodes())

    def expect(self, sizes: Sequence[int]) -> None:
        """Note that many bytes of each parameter of the launches to come."""
        self._bytes = sum(sizes)
        self._library.fake_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def last(self) -> tuple[bytes, bytes]:
        """Grid, stream and the like of the last launch, and its parameters."""
        config = ctypes.string_at(self._library.fake_config(), 40)
        return config, ctypes.string_at(self._library.fake_params(), self._bytes)


def install(directory: Path) -> FakeCuda:
    """Build the library in ``directory`` and load it as this process's CUDA driver."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise RuntimeError("triton is not installed")
    include = Path(spec.origin).parent / "backends" / "nvidia" / "include"
    source, library = directory / "fake_cuda.c", directory / "libcuda.so.1"
    source.write_text(SOURCE)
    gcc = ["gcc", "-shared", "-fPIC", "-O2", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*gcc, str(source)], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(directory)
    fake = FakeCuda(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    if not hasattr(ctypes.CDLL("libcuda.so.1"), "fake_launches"):
        raise RuntimeError("this process has loaded a CUDA driver already")
    return fake


def activate() -> None:
    """Make Triton, and this project's kernels, take CPU tensors for those of an H100."""
    import torch
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from kernels.attention import op, portable
    from kernels.attention.hopper import launch

    libc = ctypes.CDLL(None)  # keeps what is freed, as the GPU's allocator does: no new pages, the same addresses again
    libc.mallopt(M_MMAP_THRESHOLD, 2**30)
    libc.mallopt(M_TRIM_THRESHOLD, 2**30)
    active = CudaDriver()
    active.get_device_capability = lambda device=0: (9, 0)
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: 7
    driver.set_active(active)
    torch.cuda.is_current_stream_capturing = lambda: False
    describe: Any = op.describe
    op.describe = lambda *args: _replaced(describe(*args))
    portable.device_capability = lambda tensor: (9, 0)
    launch._num_sms = lambda device: 132  # type: ignore[assignment]


def _replaced(problem: Any) -> Any:
    from dataclasses import replace

    return replace(problem, device_type="cuda", capability=(9, 0))


def parameter_sizes(compiled: Any) -> list[int]:
    """Bytes of every parameter of a compiled kernel, as the launcher hands them to the driver."""
    sizes = {"i32": 4, "u32": 4, "fp32": 4, "i64": 8, "u64": 8}
    out: list[int] = []
    for kind in compiled.src.signature.values():
        if kind.startswith("tensordesc"):
            rank = kind.split("[")[1].split("]")[0].count(",") + 1
            out += [128, *[4] * rank, *[8] * rank]
        elif kind != "constexpr":
            out.append(8 if kind.startswith("*") else sizes[kind])
    return [*out, 8, 8]  # scratch
