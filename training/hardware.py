"""Peak arithmetic rates: the denominator of MFU.

A row of the table is one product, keyed by the exact name that `torch.cuda.get_device_name` prints for it.
Rates are **dense** TFLOP/s at boost clock with fp32 accumulation, as the manufacturer states them; a
datasheet that only gives the figure with 2:4 sparsity is halved. Each row names the document its figures
belong to; docs/mfu.md says which of them were compared with it.

Names are compared exactly after `normalise_name`, never by substring: "NVIDIA L4" is not "NVIDIA L40S", and a
MIG slice ("NVIDIA A100-SXM4-40GB MIG 1g.5gb") or an engineering sample is unknown rather than wrong by a
factor. A name that two products with different rates share is left out. For an unknown device, a dtype that
the device has no units for, or a CPU, the peak is measured with matrix products and labelled so: an MFU
against a measured peak says how far the run is from the best product that this machine does.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from configs.schema import Precision

Arithmetic = Literal["fp32", "tf32", "fp16", "bf16", "fp8"]


@dataclass(frozen=True)
class DevicePeaks:
    """Dense peaks of one product in TFLOP/s; None where the device has no units for the type."""

    names: tuple[str, ...]
    """Names as the driver prints them, without the vendor in front."""
    fp32: float
    """IEEE single precision matrix products (CUDA cores; matrix cores on AMD Instinct)."""
    tf32: float | None
    """TensorFloat-32 tensor cores."""
    fp16: float | None
    bf16: float | None
    fp8: float | None
    source: str
    """Datasheet or whitepaper that states the figures."""


@dataclass(frozen=True)
class Peak:
    """What one device could do at most, and how we know."""

    tflops: float
    """Dense peak of one device, TFLOP/s (10^12 floating-point operations a second)."""
    source: Literal["table", "measured", "config"]
    device_name: str
    note: str
    """One line: the datasheet, the way it was measured, or the config key."""

    def __str__(self) -> str:
        return f"{self.tflops:,.4g} TFLOP/s ({self.source}: {self.note})"


_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper V2.1"
_ADA = "NVIDIA Ada GPU Architecture whitepaper V2.1"
_ADA_PRO = "NVIDIA RTX Ada professional GPU datasheets (tensor figure with sparsity, halved)"
_BLACKWELL_RTX = "NVIDIA RTX Blackwell GPU Architecture whitepaper V1.1"
_BLACKWELL_PRO = "NVIDIA RTX PRO Blackwell GPU Architecture whitepaper V1.0"
_TURING = "NVIDIA Turing GPU Architecture whitepaper"
_V100 = "NVIDIA Tesla V100 datasheet"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet (sparse, halved) and Hopper whitepaper"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet (sparse, halved)"
_GH200 = "NVIDIA GH200 Grace Hopper Superchip datasheet (sparse, halved)"
_B100 = "NVIDIA Blackwell Architecture technical brief, HGX B100 (sparse, halved)"
_CDNA2 = "AMD CDNA 2 whitepaper and Instinct MI200 datasheets"
_CDNA3 = "AMD Instinct MI300 series datasheets"
_CDNA4 = "AMD Instinct MI350 series datasheets"


def _row(
    fp32: float,
    tf32: float | None,
    fp16: float | None,
    bf16: float | None,
    fp8: float | None,
    source: str,
    *names: str,
) -> DevicePeaks:
    """A row in the order of a table on paper."""
    return DevicePeaks(names, fp32, tf32, fp16, bf16, fp8, source)


# fmt: off
DEVICES: tuple[DevicePeaks, ...] = (
    #     fp32    tf32    fp16    bf16     fp8
    # Volta and Turing: fp16 tensor cores only.
    _row(  14.0,   None,  112.0,   None,   None, _V100, "Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"),
    _row(  15.7,   None,  125.0,   None,   None, _V100, "Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
    _row(  16.4,   None,  130.0,   None,   None, "NVIDIA Tesla V100S datasheet", "Tesla V100S-PCIE-32GB"),
    _row(   8.1,   None,   65.0,   None,   None, "NVIDIA T4 datasheet", "Tesla T4", "T4"),
    _row(  16.3,   None,  130.5,   None,   None, _TURING, "TITAN RTX", "Quadro RTX 6000",
         "Quadro RTX 8000"),
    _row(  13.4,   None,   53.8,   None,   None, _TURING + " (reference clocks)", "GeForce RTX 2080 Ti"),
    # Ampere, data centre. The A800 differs from the A100 in NVLink and fp64 only.
    _row(  19.5,  156.0,  312.0,  312.0,   None, _A100, "A100-SXM4-40GB", "A100-SXM4-80GB",
         "A100-PCIE-40GB", "A100 80GB PCIe", "A800-SXM4-40GB", "A800-SXM4-80GB",
         "A800 80GB PCIe", "A800 40GB PCIe"),
    _row(  10.3,   82.0,  165.0,  165.0,   None, "NVIDIA A30 datasheet", "A30"),
    _row(  31.2,   62.5,  125.0,  125.0,   None, "NVIDIA A10 datasheet", "A10"),
    _row(  35.0,   35.0,   70.0,   70.0,   None, "NVIDIA A10G datasheet", "A10G"),
    _row(  37.4,   74.8,  149.7,  149.7,   None, _GA102, "A40"),
    _row(   4.5,    9.0,   18.0,   18.0,   None, "NVIDIA A16 datasheet, one of its four GPUs", "A16"),
    _row(   4.5,    9.0,   18.0,   18.0,   None, "NVIDIA A2 datasheet", "A2"),
    # Ampere, workstation: full rate with fp32 accumulation. GeForce: half rate.
    _row(  38.7,   77.4,  154.8,  154.8,   None, _GA102, "RTX A6000"),
    _row(  34.1,   68.2,  136.4,  136.4,   None, "NVIDIA RTX A5500 datasheet (sparse, halved)",
         "RTX A5500"),
    _row(  27.8,   55.6,  111.1,  111.1,   None, "NVIDIA RTX A5000 datasheet (sparse, halved)",
         "RTX A5000"),
    _row(  23.7,   47.3,   94.6,   94.6,   None, "NVIDIA RTX A4500 datasheet (sparse, halved)",
         "RTX A4500"),
    _row(  19.2,   38.3,   76.7,   76.7,   None, "NVIDIA RTX A4000 datasheet (sparse, halved)",
         "RTX A4000"),
    _row(  40.0,   40.0,   80.0,   80.0,   None, _GA102, "GeForce RTX 3090 Ti"),
    _row(  35.6,   35.6,   71.0,   71.0,   None, _GA102, "GeForce RTX 3090"),
    _row(  20.3,   20.3,   40.6,   40.6,   None, _GA102, "GeForce RTX 3070"),
    # Ada.
    _row(  30.3,   60.0,  121.0,  121.0,  242.5, "NVIDIA L4 datasheet (sparse, halved)", "L4"),
    _row(  59.8,   59.8,  119.5,  119.5,  239.0, "NVIDIA L20 datasheet", "L20"),
    _row(  90.5,   90.5, 181.05, 181.05,  362.0, "NVIDIA L40 datasheet", "L40"),
    _row(  91.6,  183.0, 362.05, 362.05,  733.0, "NVIDIA L40S datasheet", "L40S"),
    _row(  91.1,  182.1,  364.2,  364.2,  728.5, _ADA_PRO, "RTX 6000 Ada Generation"),
    _row(  65.3,  130.6,  261.1,  261.1,  522.2, _ADA_PRO, "RTX 5000 Ada Generation"),
    _row(  39.6,   79.3,  158.5,  158.5,  317.0, _ADA_PRO, "RTX 4500 Ada Generation"),
    _row(  26.7,   53.5,  106.9,  106.9,  213.8, _ADA_PRO, "RTX 4000 Ada Generation"),
    _row(  82.6,   82.6,  165.2,  165.2,  330.3, _ADA, "GeForce RTX 4090"),
    _row(  48.7,   48.7,   97.5,   97.5,  194.9, _ADA, "GeForce RTX 4080"),
    _row(  40.1,   40.1,   80.2,   80.2,  160.4, _ADA, "GeForce RTX 4070 Ti"),
    # Hopper. The H800 differs from the H100 in NVLink and fp64 only.
    _row(  66.9,  494.7,  989.4,  989.4, 1978.9, _H100, "H100 80GB HBM3", "H800"),
    _row(  51.2,  378.0,  756.0,  756.0, 1513.0, _H100, "H100 PCIe", "H800 PCIe"),
    _row(  60.0,  417.5,  835.5,  835.5, 1671.0, _H100, "H100 NVL"),
    _row(  66.9,  494.7,  989.4,  989.4, 1978.9, _GH200, "GH200 480GB", "GH200 120GB", "GH200 144G HBM3e"),
    _row(  66.9,  494.7,  989.4,  989.4, 1978.9, _H200, "H200"),
    _row(  60.0,  417.5,  835.5,  835.5, 1671.0, _H200, "H200 NVL"),
    _row(  44.0,   74.0,  148.0,  148.0,  296.0, "NVIDIA H20 datasheet", "H20", "H20-3e"),
    # Blackwell, data centre. HGX figures are for eight GPUs, NVL72 figures for seventy-two.
    _row(  60.0,  900.0, 1750.0, 1750.0, 3500.0, _B100, "B100"),
    _row(  75.0, 1125.0, 2250.0, 2250.0, 4500.0, "NVIDIA HGX B200 datasheet / 8 (sparse, halved)", "B200"),
    _row(  80.0, 1250.0, 2500.0, 2500.0, 5000.0, "NVIDIA GB200 NVL72 datasheet / 72 (sparse, halved)",
         "GB200"),
    _row(  75.0, 1125.0, 2250.0, 2250.0, 4500.0, "NVIDIA HGX B300 datasheet / 8 (sparse, halved)",
         "B300 SXM6 AC"),
    _row(  80.0, 1250.0, 2500.0, 2500.0, 5000.0, "NVIDIA GB300 NVL72 datasheet / 72 (sparse, halved)",
         "GB300"),
    # Blackwell, workstation (full rate) and GeForce (half rate with fp32 accumulation).
    _row( 126.0,  251.9,  503.8,  503.8, 1007.6, _BLACKWELL_PRO,
         "RTX PRO 6000 Blackwell Workstation Edition"),
    _row( 109.7,  219.5,  438.9,  438.9,  877.9, _BLACKWELL_PRO,
         "RTX PRO 6000 Blackwell Max-Q Workstation Edition"),
    _row( 104.8,  104.8,  209.5,  209.5,  419.0, _BLACKWELL_RTX, "GeForce RTX 5090"),
    _row(  56.3,   56.3,  112.6,  112.6,  225.1, _BLACKWELL_RTX, "GeForce RTX 5080"),
    _row(  43.9,   43.9,   87.9,   87.9,  175.8, _BLACKWELL_RTX, "GeForce RTX 5070 Ti"),
    _row(  30.9,   30.9,   61.7,   61.7,  123.5, _BLACKWELL_RTX, "GeForce RTX 5070"),
    # AMD. PyTorch sees each of the two dies of an MI250 or MI250X as a device, so these rows are half of the
    # datasheet.
    _row(  46.1,   None,  184.6,   92.3,   None, "AMD Instinct MI100 datasheet", "Instinct MI100"),
    _row(  45.3,   None,  181.0,  181.0,   None, _CDNA2, "Instinct MI210"),
    _row(  45.3,   None, 181.05, 181.05,   None, _CDNA2 + ", one die", "Instinct MI250"),
    _row(  47.9,   None,  191.5,  191.5,   None, _CDNA2 + ", one die", "Instinct MI250X"),
    _row( 122.6,  490.3,  980.6,  980.6, 1961.2, _CDNA3, "Instinct MI300A"),
    _row( 163.4,  653.7, 1307.4, 1307.4, 2614.9, _CDNA3, "Instinct MI300X", "Instinct MI300X OAM"),
    _row( 163.4,  653.7, 1307.4, 1307.4, 2614.9, _CDNA3, "Instinct MI325X", "Instinct MI325X OAM"),
    _row( 144.2,   None, 2306.9, 2306.9, 4613.7, _CDNA4, "Instinct MI350X", "Instinct MI350X OAM"),
    _row( 157.3,   None, 2516.6, 2516.6, 5033.2, _CDNA4, "Instinct MI355X", "Instinct MI355X OAM"),
)
# fmt: on

_VENDORS = ("nvidia ", "amd ")


def normalise_name(name: str) -> str:
    """The key under which a device name is compared.

    Letter case and runs of white space don't count, nor does the vendor in front: drivers before 470 printed
    "A100-SXM4-40GB" and "GeForce RTX 3090" for what newer ones call "NVIDIA A100-SXM4-40GB" and "NVIDIA
    GeForce RTX 3090".
    """
    key = " ".join(name.split()).casefold()
    for vendor in _VENDORS:
        key = key.removeprefix(vendor)
    return key


@lru_cache(maxsize=1)
def _rows() -> dict[str, DevicePeaks]:
    return {normalise_name(name): row for row in DEVICES for name in row.names}


def table_row(name: str) -> DevicePeaks | None:
    """The row of the device called `name` exactly (see `normalise_name`), or None."""
    return _rows().get(normalise_name(name))


def table_tflops(name: str, arithmetic: Arithmetic) -> float | None:
    """Dense peak in TFLOP/s of the device called `name`; None for an unknown device or a type that it has no
    units for.
    """
    row = table_row(name)
    return None if row is None else getattr(row, arithmetic)


def device_name(device: torch.device) -> str:
    """The GPU's name as the driver prints it, or the CPU's model name with the number of threads PyTorch
    uses.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()} ({torch.get_num_threads()} threads)"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"


def device_peak(device: torch.device, precision: Precision, override: float | None = None, tf32: bool = True) -> Peak:
    """Dense peak of `device` for matrix products at `precision`: the config's figure, the table's, or a
    measured one.

    Args:
        device: a CUDA (or ROCm) device or the CPU.
        precision: arithmetic of the run, already resolved (not `auto`).
        override: `hardware.peak_tflops`, TFLOP/s; wins over everything.
        tf32: fp32 products may use TF32 units (`hardware.tf32`, False in deterministic runs). Only read for
            fp32.

    Raises:
        ValueError: `precision` is `auto`, or `override` is not a positive number.
    """
    if precision is Precision.auto:
        raise ValueError("the peak needs a resolved precision (bf16, fp16 or fp32), not engine.precision=auto")
    name = device_name(device)
    if override is not None:
        if not (override > 0 and math.isfinite(override)):
            raise ValueError(f"hardware.peak_tflops={override} must be a positive number of TFLOP/s, or null")
        return Peak(override, "config", name, "hardware.peak_tflops")
    row = table_row(name) if device.type == "cuda" else None
    if row is not None:
        for arithmetic in _arithmetics(precision, tf32):
            tflops = table_tflops(name, arithmetic)
            if tflops is not None:
                return Peak(tflops, "table", name, f"dense {arithmetic}, {row.source}")
    return _measured(device, precision, tf32, name, known=row is not None)


def _arithmetics(precision: Precision, tf32: bool) -> tuple[Arithmetic, ...]:
    """The units a matrix product of `precision` runs on, best first."""
    if precision is Precision.fp32:
        return ("tf32", "fp32") if tf32 else ("fp32",)
    return ("bf16",) if precision is Precision.bf16 else ("fp16",)


def _measured(device: torch.device, precision: Precision, tf32: bool, name: str, known: bool) -> Peak:
    dtype = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}[precision]
    tflops, size = measure_matmul(device, dtype, tf32)
    note = f"best {precision.value} matrix product of {size}³ on this machine"
    if device.type == "cuda":
        note += f", {name} has no {precision.value} units" if known else ", device not in the table"
    return Peak(tflops, "measured", name, note)


def measure_matmul(
    device: torch.device, dtype: torch.dtype, tf32: bool = True, budget_s: float | None = None
) -> tuple[float, int]:
    """Rate of a large square matrix product: (TFLOP/s, edge of the matrices).

    The edge doubles from 256 until one product takes long enough to hide its launch; products then run in
    bursts. The result is the median of the faster half of the bursts: the best the device holds, without one
    lucky reading. Data are random, since a GPU draws less power, and clocks higher, on zeros.

    Args:
        budget_s: seconds to spend in all, about. None: 1.5 on a GPU, 0.6 on a CPU.
    """
    on_gpu = device.type == "cuda"
    budget_s = budget_s if budget_s is not None else (1.5 if on_gpu else 0.6)
    deadline = time.perf_counter() + budget_s
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.no_grad():
            size, a, b, seconds = _large_enough(device, dtype, enough_s=5e-3, limit=8192, until=deadline)
            repeats = max(1, round((0.05 if on_gpu else 0.02) / seconds))
            rates = [2 * size**3 / seconds / 1e12]
            while time.perf_counter() + repeats * seconds < deadline:
                rates.append(repeats * 2 * size**3 / _burst(a, b, device, repeats) / 1e12)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    rates.sort(reverse=True)
    return statistics.median(rates[: (len(rates) + 1) // 2]), size


def _large_enough(
    device: torch.device, dtype: torch.dtype, enough_s: float, limit: int, until: float
) -> tuple[int, torch.Tensor, torch.Tensor, float]:
    """The first edge from 256 on, doubling, whose product takes `enough_s`; (edge, a, b, seconds of one
    product).

    Stops early at `limit`, at the time `until`, or where the device's memory ends. The generator is our own:
    the run's random numbers stay where they are.
    """
    generator = torch.Generator(device).manual_seed(0)
    size = 256
    while True:
        a = torch.randn(size, size, device=device, generator=generator).to(dtype)
        b = torch.randn(size, size, device=device, generator=generator).to(dtype)
        _burst(a, b, device, 1)  # first call: library handles, thread pool, heuristics
        seconds = _burst(a, b, device, 1)
        # The next size takes eight times as long, twice (with its first call).
        too_late = time.perf_counter() + 16 * seconds > until
        if seconds >= enough_s or 2 * size > limit or too_late or _memory_ends(device, size, a.element_size()):
            return size, a, b, seconds
        size *= 2


def _memory_ends(device: torch.device, size: int, element_size: int) -> bool:
    """Whether matrices of edge 2 × `size` would take more than a quarter of the GPU's free memory."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    wanted = (2 * size) ** 2 * (4 + 3 * element_size)  # fp32 random numbers, two operands, the product
    return wanted > free // 4


def _burst(a: torch.Tensor, b: torch.Tensor, device: torch.device, repeats: int) -> float:
    """Seconds that `repeats` products a·b take, from an idle device to an idle device."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b)
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
