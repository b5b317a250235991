"""The metrics of a run: their names, and the meter behind throughput and MFU.

**Names.** Every key that reaches metrics.jsonl and wandb is defined here once, with its unit.

**Clock.** The meter marks a point of time at the end of each step: on a GPU a CUDA event in the stream of the
step, which costs the host nothing, on a CPU the clock. The time of a step runs from the previous mark to its
own, so that everything counts which keeps the device from training: kernels, communication, waiting for data,
host work between steps. What isn't training (evaluation, checkpoints, samples, plots) happens under
`excluded()` and is cut out. The first steps, which compile kernels and fill caches, are warm-up and count for
nothing. Only `report` waits for the device, and only until it has come to the interval's last mark: a line that is
logged when the next step has been handed over finds it passed.

**MFU** (model FLOPs utilisation; PaLM, appendix B) is the FLOPs that the model needs for the tokens it saw,
over what the devices could have done in that time at their dense peak. FLOPs per token are `model.flops`'s,
in two conventions: `perf/mfu` counts attention as if it weren't causal (6N + 12·L·E·S, Megatron-LM,
FlashAttention-2, nanoGPT), `perf/mfu_causal` counts the unmasked half. The first compares with most published
figures, the second is the share of the peak that does useful work. Recomputed activations count in neither. Where
documents don't see each other (`data.document_mask`) the second counts the keys that they do see, the first still
those of whole sequences, as its convention has it.
"""

from __future__ import annotations

import logging
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

from training.peers import shared_bytes

TRAIN_LOSS: Final = "train/loss"
"""Cross-entropy of the logged step, nats per token: the mean over the valid tokens of the global batch. No
z-loss.
"""
TRAIN_PERPLEXITY: Final = "train/perplexity"
"""exp(train/loss)."""
TRAIN_Z_LOSS: Final = "train/z_loss"
"""The z-loss times its weight, nats per token; only with `model.z_loss`."""
VAL_LOSS: Final = "val/loss"
"""Cross-entropy on the validation sequences, nats per token."""
VAL_PERPLEXITY: Final = "val/perplexity"
"""exp(val/loss)."""
VAL_BITS_PER_BYTE: Final = "val/bits_per_byte"
"""Cross-entropy on the validation sequences in bits per byte of UTF-8 text: comparable across tokenizers."""
LR: Final = "optim/lr"
"""Learning rate of the logged step."""
GRAD_NORM: Final = "optim/grad_norm"
"""L2 norm of the global gradient before clipping."""
LOSS_SCALE: Final = "optim/loss_scale"
"""Loss scale; only with fp16."""
SKIPPED_STEPS: Final = "optim/skipped_steps"
"""Steps so far whose update was skipped because of a non-finite gradient."""
TOKENS_PER_S: Final = "perf/tokens_per_s"
"""Tokens a second, all devices together."""
TOKENS_PER_S_PER_GPU: Final = "perf/tokens_per_s_per_gpu"
"""Tokens a second and device (a rank's CPU counts as one)."""
STEP_TIME: Final = "perf/step_time_s"
"""Mean time of an optimizer step over the interval, seconds, without compilation, evaluation and checkpoints.
"""
STEP_TIME_MEDIAN: Final = "perf/step_time_median_s"
"""Median time of an optimizer step over the interval, seconds."""
DATA_WAIT: Final = "perf/data_wait_s"
"""Mean time a step waited for its batch, seconds; part of the step time."""
MODEL_TFLOPS: Final = "perf/model_tflops"
"""Model FLOPs a second and device, 10^12, in the convention of `perf/mfu`."""
MFU: Final = "perf/mfu"
"""Share of the peak, 0 to 1, with attention counted in full (6N + 12·L·E·S FLOPs per token). With `engine.fp8` still of
the bf16 peak, so that it may be above 1.
"""
MFU_CAUSAL: Final = "perf/mfu_causal"
"""Share of the same peak, with attention counted causally."""
PEAK_MEMORY: Final = "perf/peak_memory_gb"
"""Most memory in use so far, 10^9 bytes: tensors on a GPU, the process (resident) on a CPU. Rank 0's."""
TOKENS_SEEN: Final = "data/tokens_seen"
"""Tokens the model has been trained on, all ranks together."""
EPOCH: Final = "data/epoch"
"""Passes over the training split, a fraction."""

METRICS: Final = (
    *(TRAIN_LOSS, TRAIN_PERPLEXITY, TRAIN_Z_LOSS, VAL_LOSS, VAL_PERPLEXITY, VAL_BITS_PER_BYTE),
    *(LR, GRAD_NORM, LOSS_SCALE, SKIPPED_STEPS),
    *(TOKENS_PER_S, TOKENS_PER_S_PER_GPU, STEP_TIME, STEP_TIME_MEDIAN, DATA_WAIT, MODEL_TFLOPS, MFU, MFU_CAUSAL),
    *(PEAK_MEMORY, TOKENS_SEEN, EPOCH),
)
"""Every key that a run logs."""

FP8_CEILING: Final = 2.0
"""The highest MFU there can be with `engine.fp8`: its units are twice as fast as those whose peak MFU is a share of."""

_LOG = logging.getLogger(__name__)
_REMEDY = "give its dense TFLOP/s as hardware.peak_tflops=NUMBER."
_MASKED_HALF = (
    f"It counts the masked half of attention too, so a long sequence alone can do this: quote {MFU_CAUSAL} then."
)


def perplexity(loss: float) -> float:
    """exp(`loss`) for a loss in nats per token; infinite where that overflows."""
    return math.exp(loss) if loss < 709.0 else (math.nan if math.isnan(loss) else math.inf)


def bits_per_byte(loss: float, tokens: int, num_bytes: int) -> float:
    """Loss in bits per byte of text, from `loss` in nats per token and the length of one text in tokens and
    bytes.

    Any stretch of text does for the ratio, as long as both lengths are of the same one. Raises ValueError
    where `num_bytes` isn't positive.
    """
    if num_bytes <= 0:
        raise ValueError(f"bits per byte need a text of at least one byte, not {num_bytes}")
    return loss / math.log(2) * tokens / num_bytes


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far, in 10^9 bytes: by tensors on a GPU (`max_memory_allocated`, and what is shared with
    other ranks), resident on a CPU.
    """
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) + shared_bytes(device)) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@dataclass(frozen=True)
class Throughput:
    """Averages over the counted steps of an interval or of the run."""

    num_steps: int
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    step_time_s: float
    step_time_median_s: float
    data_wait_s: float
    model_tflops: float
    """A device's, with attention in full."""
    mfu: float | None
    """None where it would lie outside what is possible, (0, 1] without fp8; the meter has then said so."""
    mfu_causal: float | None

    def metrics(self) -> dict[str, float | None]:
        """The `perf/*` metrics."""
        return {
            TOKENS_PER_S: self.tokens_per_s,
            TOKENS_PER_S_PER_GPU: self.tokens_per_s_per_gpu,
            STEP_TIME: self.step_time_s,
            STEP_TIME_MEDIAN: self.step_time_median_s,
            DATA_WAIT: self.data_wait_s,
            MODEL_TFLOPS: self.model_tflops,
            MFU: self.mfu,
            MFU_CAUSAL: self.mfu_causal,
        }


class Clock(Protocol):
    """Marks points of time without waiting, and says later how far apart they were."""

    def mark(self) -> object:
        """A point of time: now, in the order of the work handed to the device."""

    def wait(self, mark: object) -> None:
        """Wait until the device has passed `mark`, and so all earlier ones."""

    def seconds(self, start: object, end: object) -> float:
        """Seconds between two marks that the device has passed."""


class HostClock:
    """Marks for a CPU, where a call returns when its work is done."""

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self, mark: object) -> None:
        """Nothing runs on after a call."""

    def seconds(self, start: object, end: object) -> float:
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start


class CudaClock:
    """Marks are events in the current stream: the device stamps them when it gets there, the host goes on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: object) -> None:
        assert isinstance(mark, torch.cuda.Event)
        mark.synchronize()

    def seconds(self, start: object, end: object) -> float:
        assert isinstance(start, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1e3  # milliseconds


@dataclass
class _Interval:
    """Counted steps: their stretches of time, tokens and waits. One step has several stretches if it was
    interrupted.
    """

    stretches: list[list[tuple[object, object]]] = field(default_factory=list)
    tokens: int = 0
    causal_flops: float = 0.0
    data_wait_s: float = 0.0


class ThroughputMeter:
    """Tokens a second, step times and MFU of a run.

        meter.start()
        for each step:
            ...train...
            meter.step(tokens, wait)
            if it is time to log:
                throughput = meter.report()
            with meter.excluded():
                ...evaluate, save, log...

    Args:
        flops_per_token: training FLOPs (forward and backward) per token with attention in full.
        flops_per_token_causal: the same with attention counted causally.
        peak_tflops: dense peak of one device, TFLOP/s.
        world_size: devices that share a global batch.
        device: where the steps run; decides the clock.
        remeasure: measures the peak again, TFLOP/s, if the model seems to be faster than a measured peak: something
            else kept the device busy the first time. None: the peak is known.
        ceiling: the highest MFU that is possible, 1 unless units are used that are faster than those of the peak.
        warmup_steps: steps after `start` that don't count (compilation, autotuning, allocation).
        clock: for tests.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        flops_per_token_causal: float,
        peak_tflops: float,
        world_size: int,
        device: torch.device,
        remeasure: Callable[[], float] | None = None,
        ceiling: float = 1.0,
        warmup_steps: int = 2,
        clock: Clock | None = None,
    ) -> None:
        self._flops_per_token = flops_per_token
        self._flops_per_token_causal = flops_per_token_causal
        self.peak_tflops = peak_tflops
        self._remeasure = remeasure
        self._ceiling = ceiling
        self._world_size = world_size
        self._warmup_left = warmup_steps
        self._clock = clock or (CudaClock(device) if device.type == "cuda" else HostClock())
        self._last_mark: object | None = None
        self._current: list[tuple[object, object]] = []  # stretches of the step under way
        self._interval = _Interval()
        self._step_times_s: list[float] = []
        self._total_tokens = 0
        self._total_causal_flops = 0.0
        self._total_wait_s = 0.0
        self._complained: set[str] = set()

    def start(self) -> None:
        """Begin the first step. Call again after a pause of the loop that isn't under `excluded`."""
        self._current = []
        self._last_mark = self._clock.mark()

    def step(self, tokens: int, data_wait_s: float = 0.0, causal_flops_per_token: float | None = None) -> None:
        """End a step of `tokens` tokens of the global batch (all ranks), of which `data_wait_s` was spent
        waiting for data. `causal_flops_per_token`: of these tokens; None: as usual.

        Doesn't wait for the device. Raises RuntimeError before `start`.
        """
        now = self._clock.mark()
        self._current.append((self._begun(), now))
        if self._warmup_left > 0:
            self._warmup_left -= 1
        else:
            self._interval.stretches.append(self._current)
            self._interval.tokens += tokens
            self._interval.causal_flops += tokens * (causal_flops_per_token or self._flops_per_token_causal)
            self._interval.data_wait_s += data_wait_s
        self._current = []
        self._last_mark = now

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time inside doesn't count; on a GPU neither does the work handed to the device inside."""
        self._current.append((self._begun(), self._clock.mark()))
        try:
            yield
        finally:
            self._last_mark = self._clock.mark()

    def report(self) -> Throughput | None:
        """Averages since the last report, once the device has done these steps; None if no step since then counts."""
        interval, self._interval = self._interval, _Interval()
        if not interval.stretches:
            return None
        self._clock.wait(interval.stretches[-1][-1][1])
        times_s = [sum(self._clock.seconds(a, b) for a, b in step) for step in interval.stretches]
        self._step_times_s += times_s
        self._total_tokens += interval.tokens
        self._total_causal_flops += interval.causal_flops
        self._total_wait_s += interval.data_wait_s
        return self._throughput(times_s, interval.tokens, interval.causal_flops, interval.data_wait_s)

    def total(self) -> Throughput | None:
        """Averages over all reported steps; None if there are none."""
        if not self._step_times_s:
            return None
        return self._throughput(self._step_times_s, self._total_tokens, self._total_causal_flops, self._total_wait_s)

    def _begun(self) -> object:
        if self._last_mark is None:
            raise RuntimeError("ThroughputMeter.start() comes before the first step")
        return self._last_mark

    def _throughput(self, times_s: list[float], tokens: int, causal_flops: float, data_wait_s: float) -> Throughput:
        seconds = max(sum(times_s), 1e-9)  # clocks are finer than any step; no division by zero even so
        per_device = tokens / seconds / self._world_size
        model_tflops = per_device * self._flops_per_token / 1e12
        causal_tflops = causal_flops / seconds / self._world_size / 1e12
        if self._remeasure is not None and causal_tflops > self._ceiling * self.peak_tflops:
            self.peak_tflops = max(self.peak_tflops, self._remeasure())
        return Throughput(
            num_steps=len(times_s),
            tokens_per_s=tokens / seconds,
            tokens_per_s_per_gpu=per_device,
            step_time_s=seconds / len(times_s),
            step_time_median_s=statistics.median(times_s),
            data_wait_s=data_wait_s / len(times_s),
            model_tflops=model_tflops,
            mfu=self._checked(MFU, model_tflops, per_device),
            mfu_causal=self._checked(MFU_CAUSAL, causal_tflops, per_device),
        )

    def _checked(self, key: str, tflops: float, tokens_per_s: float) -> float | None:
        """`tflops` over the peak if that is possible; else None, and an error in the log the first time."""
        mfu = tflops / self.peak_tflops
        if 0 < mfu <= self._ceiling:
            return mfu
        if key not in self._complained:
            self._complained.add(key)
            reason = f"The peak is too low for this device: {_REMEDY}"
            if key == MFU:
                reason = f"{_MASKED_HALF} Otherwise the peak is too low for this device: {_REMEDY}"
            numbers = f"{tflops:.4g} model TFLOP/s a device ({tokens_per_s:.4g} tokens/s), peak {self.peak_tflops:.4g}"
            _LOG.error(f"{key} is {mfu:.4g}, outside (0, {self._ceiling:g}], and is left out: {numbers}. {reason}")
        return None
