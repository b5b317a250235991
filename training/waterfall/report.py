"""The waterfall: time, rate and lost MFU of each part of a step.

With F the model's FLOPs of a step (attention causal), P the device's peak and T the step's time, MFU = F / (P·T). A
part that takes the time t for F_i of these FLOPs loses (t - F_i/P) / T of MFU, a part without FLOPs t / T. Since the
parts fill the step, what they lose adds up to 1 - MFU exactly, and the shares of the gap to 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from configs.schema import Attention, Precision, RunConfig
from training.batch import BatchPlan
from training.waterfall.names import LABELS, Category
from training.waterfall.timeline import Account
from training.waterfall.work import Work, work_of

LISTED = 8
"""Kernels listed a part."""


@dataclass(frozen=True)
class Setting:
    """What was profiled."""

    config: RunConfig
    """With the vocabulary's size in `model`."""
    plan: BatchPlan
    precision: Precision
    attention: Attention
    compiled: bool
    world_size: int
    on_device: bool
    """A GPU, not a CPU."""
    peak_tflops: float
    peak_source: str
    device_name: str
    memory_gb_per_s: float | None = None
    """Bandwidth of the device's memory by its clock and bus, 10^9 bytes/s; None where unknown."""

    @property
    def work(self) -> Work:
        """A step's work on one rank."""
        sequences = self.plan.micro_batch_size * self.plan.accumulation_steps
        return work_of(
            self.config.model,
            self.config.engine,
            self.precision,
            tokens=sequences * self.config.model.sequence_length // self.config.engine.sequence_parallel_size,
            accumulation=self.plan.accumulation_steps,
            world_size=self.world_size,
        )


@dataclass(frozen=True)
class Unprofiled:
    """Steps of the same run without the profiler, as its metrics have them."""

    num_steps: int
    step_time_s: float
    """Median."""
    mfu: float | None
    mfu_causal: float | None


@dataclass(frozen=True)
class Part:
    """One category's share of a step."""

    category: Category
    label: str
    time_s: float
    """A step's."""
    share: float
    """Of the step."""
    tflops: float | None
    """Achieved, of the model's FLOPs; None for parts without any."""
    least_gb_per_s: float | None
    """The analytic least bytes over the time; None where there is no count."""
    mfu_lost: float
    """What the part takes from 100 % MFU (attention causal)."""
    gap_share: float
    """The same as a share of all that is lost."""
    names: dict[str, float]
    """Largest kernels or operators: seconds a step."""


@dataclass(frozen=True)
class Remedy:
    """A change of the config."""

    saves_s: float
    """Seconds a step at most."""
    keys: tuple[str, ...]
    """Config keys to change."""
    text: str


@dataclass(frozen=True)
class Report:
    """A step, accounted for."""

    setting: Setting
    num_steps: int
    """Profiled."""
    step_time_s: float
    """Wall time of a profiled step; the sum of the parts'."""
    parts: list[Part]
    mfu: float
    """Of the profiled steps, attention in full (6N + 12·L·E·S)."""
    mfu_causal: float
    communication_s: float
    """Communication a step, hidden or not."""
    hidden_communication_s: float
    """Of it beside computation."""
    unknown: dict[str, float]
    """Kernels or operators of the part `other`, seconds a step."""
    unprofiled: Unprofiled | None
    remedies: list[Remedy] = field(default_factory=list)

    def time_of(self, category: Category) -> float:
        """Seconds a step; 0 for a part that isn't there."""
        return sum(part.time_s for part in self.parts if part.category is category)

    @property
    def overhead(self) -> float | None:
        """How much longer a profiled step takes, as a share; None without steps to compare with."""
        return self.step_time_s / self.unprofiled.step_time_s - 1 if self.unprofiled else None

    @property
    def hidden_share(self) -> float | None:
        """Share of the communication that is hidden; None where there is none."""
        return self.hidden_communication_s / self.communication_s if self.communication_s else None

    def to_json(self) -> dict[str, Any]:
        """Everything, for `waterfall.json`; times in seconds a step."""
        setting, work = self.setting, self.setting.work
        return {
            "name": setting.config.name,
            "rank": 0,
            "world_size": setting.world_size,
            "device": setting.device_name,
            "settings": settings_of(setting),
            "steps": self.num_steps,
            "step_time_s": self.step_time_s,
            "sum_of_parts_s": sum(part.time_s for part in self.parts),
            "unprofiled": None if self.unprofiled is None else asdict(self.unprofiled),
            "profiling_overhead": self.overhead,
            "peak_tflops": setting.peak_tflops,
            "peak_source": setting.peak_source,
            "flops_per_step": sum(work.flops.values()),
            "tokens_per_step": work.tokens,
            "mfu": self.mfu,
            "mfu_causal": self.mfu_causal,
            "parts": [{**asdict(part), "category": part.category.value} for part in self.parts],
            "communication": {
                "total_s": self.communication_s,
                "hidden_s": self.hidden_communication_s,
                "hidden_share": self.hidden_share,
            },
            "remedies": [asdict(remedy) for remedy in self.remedies],
            "unknown": self.unknown,
        }


def settings_of(setting: Setting) -> dict[str, Any]:
    """The settings that decide where the time goes."""
    config = setting.config
    return {
        "micro_batch_size": setting.plan.micro_batch_size,
        "accumulation_steps": setting.plan.accumulation_steps,
        "sequence_length": config.model.sequence_length,
        "attention": setting.attention.value,
        "precision": setting.precision.value,
        "fp8": config.engine.fp8.value,
        "zero_stage": config.engine.zero_stage,
        "compiled": setting.compiled,
        "recompute": config.engine.recompute.value,
    }


def build_report(account: Account, num_steps: int, setting: Setting, unprofiled: Unprofiled | None) -> Report:
    """What the account of `num_steps` steps says."""
    from training.waterfall.remedies import remedies_for

    work = setting.work
    step_s = account.total_ns / 1e9 / num_steps
    flops = sum(work.flops.values())
    lost_s = step_s - flops / (setting.peak_tflops * 1e12)
    parts = [
        build_part(account, kind, num_steps, setting, work, step_s, lost_s) for kind in Category if account.times[kind]
    ]
    per_second = work.tokens / step_s / (setting.peak_tflops * 1e12)
    report = Report(
        setting=setting,
        num_steps=num_steps,
        step_time_s=step_s,
        parts=parts,
        mfu=per_second * work.flops_per_token.megatron,
        mfu_causal=per_second * work.flops_per_token.causal,
        communication_s=account.communication_ns / 1e9 / num_steps,
        hidden_communication_s=account.hidden_communication_ns / 1e9 / num_steps,
        unknown={name: ns / 1e9 / num_steps for name, ns in _largest(account.unknown, len(account.unknown))},
        unprofiled=unprofiled,
    )
    report.remedies.extend(remedies_for(report)[:3])
    return report


def build_part(
    account: Account, category: Category, num_steps: int, setting: Setting, work: Work, step_s: float, lost_s: float
) -> Part:
    """One category; `lost_s` is what a step takes longer than at peak."""
    time_s = account.times[category] / 1e9 / num_steps
    flops, least_bytes = work.flops.get(category), work.least_bytes.get(category)
    if category is Category.copies and account.bytes_copied:
        least_bytes = account.bytes_copied / num_steps
    excess_s = time_s - (flops or 0.0) / (setting.peak_tflops * 1e12)
    return Part(
        category=category,
        label=label_of(category, setting.on_device),
        time_s=time_s,
        share=time_s / step_s,
        tflops=None if flops is None else flops / time_s / 1e12,
        least_gb_per_s=None if least_bytes is None else least_bytes / time_s / 1e9,
        mfu_lost=excess_s / step_s,
        gap_share=excess_s / lost_s,
        names={name: ns / 1e9 / num_steps for name, ns in _largest(account.names[category], LISTED)},
    )


def label_of(category: Category, on_device: bool) -> str:
    """The category for people; on a CPU the host is all that is no operator."""
    if category is Category.host and not on_device:
        return "host: Python, dispatch"
    return LABELS[category]


def _largest(times: dict[str, int], count: int) -> list[tuple[str, int]]:
    return sorted(times.items(), key=lambda item: -item[1])[:count]
