"""Throughput and MFU against a clock that the test turns, and against hand counts."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from training import metrics as m
from training.metrics import HostClock, ThroughputMeter, bits_per_byte, peak_memory_gb, perplexity

CPU = torch.device("cpu")


@dataclass
class FakeClock:
    """A device that works on what it is given: marks are stamped when the device gets there, not when they are made."""

    host_s: float = 0.0
    device_s: float = 0.0
    waits: int = 0
    passed_s: float = -1.0
    """The latest mark that was waited for."""
    marks: list[float] = field(default_factory=list)

    def work(self, seconds: float) -> None:
        """Hand work to the device; the host goes on at once."""
        self.device_s = max(self.device_s, self.host_s) + seconds

    def mark(self) -> float:
        self.device_s = max(self.device_s, self.host_s)
        self.marks.append(self.device_s)
        return self.device_s

    def wait(self, mark: object) -> None:
        assert isinstance(mark, float)
        self.waits += 1
        self.passed_s = max(self.passed_s, mark)
        self.host_s = max(self.host_s, mark)

    def seconds(self, start: object, end: object) -> float:
        assert isinstance(start, float)
        assert isinstance(end, float)
        assert start <= end <= self.passed_s, "a mark was read before the device had passed it"
        return end - start


def meter_on(clock: FakeClock, warmup_steps: int = 0, world_size: int = 1, **changes: Any) -> ThroughputMeter:
    numbers: dict[str, Any] = {"flops_per_token": 8e9, "flops_per_token_causal": 6e9, "peak_tflops": 100.0} | changes
    return ThroughputMeter(world_size=world_size, device=CPU, warmup_steps=warmup_steps, clock=clock, **numbers)


def test_rates_of_a_hand_count() -> None:
    """4 devices, 10 steps of 40,000 tokens in 2 s each: 20,000 tokens/s, 5,000 a device, 40 and 30 TFLOP/s of 100."""
    clock = FakeClock()
    meter = meter_on(clock, world_size=4)
    meter.start()
    for _ in range(10):
        clock.work(2.0)
        meter.step(40_000, data_wait_s=0.25)
    report = meter.report()
    assert report is not None
    assert report.num_steps == 10
    assert report.tokens_per_s == pytest.approx(20_000)
    assert report.tokens_per_s_per_gpu == pytest.approx(5_000)
    assert report.step_time_s == pytest.approx(2.0)
    assert report.data_wait_s == pytest.approx(0.25)
    assert report.model_tflops == pytest.approx(40.0)
    assert report.mfu == pytest.approx(0.40)
    assert report.mfu_causal == pytest.approx(0.30)


def test_steps_of_other_flops() -> None:
    """Of two steps of 1,000 tokens in 1 s each, the second with 2 GFLOP a token where causal attention needs 6."""
    clock = FakeClock()
    meter = meter_on(clock)
    meter.start()
    for flops in (None, 2e9):
        clock.work(1.0)
        meter.step(1000, causal_flops_per_token=flops)
    report = meter.report()
    assert report is not None
    assert report == meter.total()
    assert (report.mfu, report.mfu_causal) == (pytest.approx(0.08), pytest.approx((6 + 2) / 2 * 1000 * 1e9 / 1e14))


def test_no_wait_between_reports() -> None:
    clock = FakeClock()
    meter = meter_on(clock)
    meter.start()
    for _ in range(50):
        clock.work(1.0)
        meter.step(1)
        with meter.excluded():
            pass
    assert clock.waits == 0
    assert clock.host_s == 0.0
    meter.report()
    assert clock.waits == 1


def test_warmup_does_not_count() -> None:
    clock = FakeClock()
    meter = meter_on(clock, warmup_steps=2)
    meter.start()
    for seconds in (60.0, 30.0):
        clock.work(seconds)
        meter.step(1000)
    assert meter.report() is None
    assert meter.total() is None
    clock.work(2.0)
    meter.step(1000)
    report = meter.report()
    assert report is not None
    assert (report.num_steps, report.step_time_s, report.tokens_per_s) == (1, 2.0, 500.0)


def test_excluded_time_does_not_count_but_host_time_between_steps_does() -> None:
    clock = FakeClock()
    meter = meter_on(clock)
    meter.start()
    clock.work(1.0)
    meter.step(100)
    with meter.excluded():  # an evaluation on the device and a checkpoint on the host
        clock.work(50.0)
        clock.wait(clock.mark())
        clock.host_s += 100.0
    clock.host_s += 0.5  # the host dawdles while the device is idle: that is training time
    clock.work(1.0)
    meter.step(100)
    report = meter.report()
    assert report is not None
    assert report.step_time_s * 2 == pytest.approx(2.5)
    assert report.tokens_per_s == pytest.approx(200 / 2.5)


def test_excluded_in_the_middle_of_a_step() -> None:
    clock = FakeClock()
    meter = meter_on(clock)
    meter.start()
    clock.work(1.0)
    with meter.excluded():
        clock.work(9.0)
    clock.work(2.0)
    meter.step(1)
    report = meter.report()
    assert report is not None
    assert report.step_time_s == pytest.approx(3.0)


def test_excluded_time_ends_even_if_the_block_fails() -> None:
    clock = FakeClock()
    meter = meter_on(clock)
    meter.start()
    with contextlib.suppress(ValueError), meter.excluded():
        clock.work(9.0)
        raise ValueError("evaluation failed")
    clock.work(1.0)
    meter.step(1)
    report = meter.report()
    assert report is not None
    assert report.step_time_s == pytest.approx(1.0)


def test_intervals_are_separate_and_the_total_has_all() -> None:
    clock = FakeClock()
    meter = meter_on(clock)
    meter.start()
    for seconds in (1.0, 1.0, 4.0):
        clock.work(seconds)
        meter.step(10)
    first = meter.report()
    clock.work(10.0)
    meter.step(10)
    second = meter.report()
    total = meter.total()
    assert first is not None
    assert second is not None
    assert total is not None
    assert (first.step_time_s, first.step_time_median_s, first.num_steps) == (2.0, 1.0, 3)
    assert (second.step_time_s, second.num_steps) == (10.0, 1)
    assert (total.step_time_s, total.step_time_median_s, total.num_steps) == (4.0, 2.5, 4)
    assert meter.report() is None


def test_step_before_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="start"):
        meter_on(FakeClock()).step(1)


def test_impossible_mfu_is_an_error_once_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    meter = meter_on(clock, peak_tflops=5.0)
    meter.start()
    for _ in range(3):
        clock.work(1.0)
        meter.step(1000)  # 8 TFLOP/s in full, 6 causally
        report = meter.report()
        assert report is not None
        assert report.mfu is None
        assert report.mfu_causal is None
        assert report.model_tflops == pytest.approx(8.0)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2  # one a convention
    assert all("hardware.peak_tflops" in error and "outside (0, 1]" in error for error in errors)
    assert "perf/mfu is 1.6" in errors[0]
    assert "perf/mfu_causal is 1.2" in errors[1]


def test_faster_units_than_the_peaks_may_exceed_it(caplog: pytest.LogCaptureFixture) -> None:
    """With `engine.fp8` 1.6 of the bf16 peak is a measurement, and 2.2 is none; a measured peak isn't doubted."""
    for peak, expected in [(5.0, 1.6), (3.6, None)]:
        clock = FakeClock()
        meter = meter_on(
            clock, peak_tflops=peak, ceiling=m.FP8_CEILING, remeasure=lambda: pytest.fail("measured again")
        )
        meter.start()
        clock.work(1.0)
        meter.step(1000)
        report = meter.report()
        assert report is not None
        assert report.mfu == (None if expected is None else pytest.approx(expected))
    assert "outside (0, 2]" in caplog.text


def test_full_convention_alone_may_exceed_the_peak(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    meter = meter_on(clock, peak_tflops=7.0)
    meter.start()
    clock.work(1.0)
    meter.step(1000)
    report = meter.report()
    assert report is not None
    assert report.mfu is None
    assert report.mfu_causal == pytest.approx(6 / 7)
    assert "quote perf/mfu_causal" in caplog.text


def test_mfu_of_exactly_one_is_possible() -> None:
    clock = FakeClock()
    meter = meter_on(clock, peak_tflops=8.0)
    meter.start()
    clock.work(1.0)
    meter.step(1000)
    report = meter.report()
    assert report is not None
    assert report.mfu == 1.0


def test_host_clock_measures_seconds() -> None:
    meter = ThroughputMeter(
        flops_per_token=1.0, flops_per_token_causal=1.0, peak_tflops=1.0, world_size=1, device=CPU, warmup_steps=0
    )
    meter.start()
    time.sleep(0.05)
    meter.step(1)
    with meter.excluded():
        time.sleep(0.2)
    report = meter.report()
    assert report is not None
    assert 0.05 <= report.step_time_s < 0.2


def test_report_has_the_defined_keys() -> None:
    clock = FakeClock()
    meter = meter_on(clock)
    meter.start()
    clock.work(1.0)
    meter.step(1)
    report = meter.report()
    assert report is not None
    assert set(report.metrics()) == {key for key in m.METRICS if key.startswith("perf/")} - {m.PEAK_MEMORY}


def test_keys_are_distinct_and_grouped() -> None:
    defined = {
        value for name, value in vars(m).items() if re.match("[A-Z]", name) and isinstance(value, str) and "/" in value
    }
    assert defined == set(m.METRICS)
    assert len(m.METRICS) == len(set(m.METRICS))
    assert all(key.count("/") == 1 and key == key.lower() for key in m.METRICS)


def test_perplexity_and_bits_per_byte() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))
    # One token every four bytes and two bits a token are half a bit a byte.
    assert bits_per_byte(2 * math.log(2), tokens=100, num_bytes=400) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="byte"):
        bits_per_byte(1.0, tokens=1, num_bytes=0)


def test_peak_memory_of_the_process_grows() -> None:
    before = peak_memory_gb(CPU)
    block = torch.ones(100_000_000)  # 0.4 GB
    after = peak_memory_gb(CPU)
    assert 0.05 < before < 200
    assert after >= max(before, block.numel() * 4 / 1e9)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_clock_measures_the_device_not_the_host() -> None:
    device = torch.device("cuda")
    meter = ThroughputMeter(
        flops_per_token=1.0, flops_per_token_causal=1.0, peak_tflops=1.0, world_size=1, device=device, warmup_steps=1
    )
    a = torch.randn(4096, 4096, device=device)
    meter.start()
    host_s = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(20):
            a @ a
        meter.step(1)
        host_s.append(time.perf_counter() - start)
        with meter.excluded():
            for _ in range(200):
                a @ a
    report = meter.report()
    assert report is not None
    torch.cuda.synchronize()  # what was left out is still running
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    by_hand_s = time.perf_counter() - start
    assert report.step_time_median_s == pytest.approx(by_hand_s, rel=0.3)
    assert min(host_s) < report.step_time_median_s  # the host didn't wait


class SteppingClock(HostClock):
    """One second a mark."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        self.now += 1.0
        return self.now


def test_a_peak_that_was_measured_too_low_is_measured_again() -> None:
    measured: list[float] = []

    def remeasure() -> float:
        measured.append(4.0)
        return 4.0

    meter = ThroughputMeter(
        flops_per_token=2e12,
        flops_per_token_causal=2e12,
        peak_tflops=1.0,
        world_size=1,
        device=torch.device("cpu"),
        remeasure=remeasure,
        warmup_steps=0,
        clock=SteppingClock(),
    )
    meter.start()
    for _ in range(2):
        meter.step(1)
        report = meter.report()
        assert report is not None
        assert report.mfu == pytest.approx(0.5)
    assert measured == [4.0]
    assert meter.peak_tflops == 4.0


def test_the_page_of_runs_has_every_metric() -> None:
    page = (Path(__file__).parents[2] / "docs" / "runs.md").read_text()
    missing = [key for key in m.METRICS if f"`{key}`" not in page]
    assert not missing, f"docs/runs.md lacks {missing}"
