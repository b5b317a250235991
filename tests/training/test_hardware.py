"""The peak table: right products, dense figures, and honest labels where it doesn't know."""

from __future__ import annotations

import time

import pytest
import torch

from configs.schema import Precision
from training import hardware
from training.hardware import DEVICES, device_peak, measure_matmul, normalise_name, table_row, table_tflops

CPU = torch.device("cpu")
GPU = torch.device("cuda:0")

# Figures that the datasheets print with 2:4 sparsity, and that must never be in the column of that dtype.
SPARSE = {
    "bf16": {
        "NVIDIA A100-SXM4-80GB": 624.0,
        "NVIDIA H100 80GB HBM3": 1979.0,
        "NVIDIA H100 PCIe": 1513.0,
        "NVIDIA H100 NVL": 1671.0,
        "NVIDIA H200": 1979.0,
        "NVIDIA L4": 242.0,
        "NVIDIA L40": 362.05,
        "NVIDIA L40S": 733.0,
        "NVIDIA RTX A6000": 309.7,
        "NVIDIA GeForce RTX 3090": 142.0,
        "NVIDIA GeForce RTX 4090": 330.4,
        "NVIDIA B200": 4500.0,
    },
    "tf32": {"NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA L40S": 366.0},
    "fp8": {"NVIDIA H100 80GB HBM3": 3958.0, "NVIDIA L40S": 1466.0, "NVIDIA B200": 9000.0},
}


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("A100-SXM4-40GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("AMD Instinct MI250X", 191.5),
        ("AMD Instinct MI300X", 1307.4),
        ("  nvidia   h200 ", 989.4),
    ],
)
def test_names_resolve_to_their_own_row(name: str, bf16: float) -> None:
    assert table_tflops(name, "bf16") == bf16


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100",
        "H100 80GB",
        "NVIDIA L40S-24Q",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3080",  # 10 GB and 12 GB cards of different rates share the name
        "",
    ],
)
def test_other_names_are_unknown(name: str) -> None:
    assert table_row(name) is None


def test_no_name_twice() -> None:
    keys = [normalise_name(name) for row in DEVICES for name in row.names]
    assert len(keys) == len(set(keys))
    assert all(row.source for row in DEVICES)


def test_no_sparse_figure() -> None:
    for arithmetic, figures in SPARSE.items():
        for name, sparse in figures.items():
            dense = table_tflops(name, arithmetic)  # type: ignore[arg-type]
            assert dense == pytest.approx(sparse / 2, rel=0.02), f"{name} {arithmetic}"


@pytest.mark.parametrize("row", DEVICES, ids=lambda row: row.names[0])
def test_rates_double_from_type_to_type(row: hardware.DevicePeaks) -> None:
    """Tensor cores run a type of half the width twice as fast, so one sparse figure in a row shows up as a 4."""
    if row.bf16 is not None and row.tf32 is not None:
        assert row.bf16 / row.tf32 == pytest.approx(2.0, rel=0.03)
    if row.bf16 is not None and row.fp8 is not None:
        assert row.fp8 / row.bf16 == pytest.approx(2.0, rel=0.03)
    if row.bf16 is not None and row.names[0] != "Instinct MI100":  # its bf16 runs at half rate
        assert row.bf16 == row.fp16
    assert row.tf32 is None or row.fp32 <= row.tf32


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A GPU whose name is `gpu["name"]` and whose measured product gives 1.25 TFLOP/s."""
    state = {"name": "NVIDIA H200"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: state["name"])
    monkeypatch.setattr(hardware, "measure_matmul", lambda device, dtype, tf32: (1.25, 4096))
    return state


@pytest.mark.parametrize(
    ("precision", "tf32", "tflops", "word"),
    [
        (Precision.bf16, True, 989.4, "bf16"),
        (Precision.fp16, True, 989.4, "fp16"),
        (Precision.fp32, True, 494.7, "tf32"),
        (Precision.fp32, False, 66.9, "fp32"),
    ],
)
def test_precision_picks_the_column(
    gpu: dict[str, str], precision: Precision, tf32: bool, tflops: float, word: str
) -> None:
    peak = device_peak(GPU, precision, tf32=tf32)
    assert (peak.tflops, peak.source, peak.device_name) == (tflops, "table", "NVIDIA H200")
    assert f"dense {word}, NVIDIA H200" in peak.note


def test_fp32_on_a_gpu_without_tf32(gpu: dict[str, str]) -> None:
    gpu["name"] = "Tesla V100-SXM2-16GB"
    assert device_peak(GPU, Precision.fp32, tf32=True).tflops == 15.7


def test_type_without_units_is_measured(gpu: dict[str, str]) -> None:
    gpu["name"] = "Tesla T4"
    peak = device_peak(GPU, Precision.bf16)
    assert (peak.tflops, peak.source) == (1.25, "measured")
    assert "no bf16 units" in peak.note


def test_unknown_gpu_is_measured(gpu: dict[str, str]) -> None:
    gpu["name"] = "NVIDIA Z1000"
    peak = device_peak(GPU, Precision.bf16)
    assert (peak.tflops, peak.source, peak.device_name) == (1.25, "measured", "NVIDIA Z1000")
    assert "not in the table" in peak.note


def test_config_wins(gpu: dict[str, str]) -> None:
    peak = device_peak(GPU, Precision.bf16, override=123.0)
    assert (peak.tflops, peak.source, peak.note) == (123.0, "config", "hardware.peak_tflops")


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_override(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"hardware\.peak_tflops"):
        device_peak(CPU, Precision.fp32, override=wrong)


def test_auto_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="resolved precision"):
        device_peak(CPU, Precision.auto)


def test_cpu_is_measured() -> None:
    """The figure agrees with a product timed by hand, and the measurement stays inside its time."""
    start = time.perf_counter()
    peak = device_peak(CPU, Precision.fp32)
    elapsed_s = time.perf_counter() - start
    assert peak.source == "measured"
    assert elapsed_s < 2.0  # 0.6 s, on a busy machine
    a = torch.randn(1024, 1024)
    torch.mm(a, a)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    by_hand = 2 * 1024**3 / min(seconds) / 1e12
    assert 0.2 < peak.tflops / by_hand < 3.0
    hurried, size = measure_matmul(CPU, torch.float32, budget_s=0.0)  # a single product
    assert size == 256
    assert 0.02 < hurried / by_hand < 3.0


def test_measuring_leaves_the_random_numbers_and_tf32_alone() -> None:
    torch.manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = torch.rand(3)
    torch.manual_seed(1)
    measure_matmul(CPU, torch.float32, tf32=True, budget_s=0.05)
    assert torch.equal(torch.rand(3), expected)
    assert torch.backends.cuda.matmul.allow_tf32 is False


@pytest.mark.gpu
@pytest.mark.alone  # beside other tests a product gets a fraction of the card
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measured_is_below_the_table() -> None:
    """On a GPU of the table, a measured product reaches a good part of the peak and never more than it."""
    name = torch.cuda.get_device_name(GPU)
    peak = table_tflops(name, "bf16")
    if peak is None:
        pytest.skip(f"{name} is not in the table")
    tflops, _ = measure_matmul(GPU, torch.bfloat16)
    assert 0.4 * peak < tflops <= 1.02 * peak
