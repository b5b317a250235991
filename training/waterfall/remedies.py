"""Which config keys would win time back, and how much at most.

Each function looks at one lever that this run has not pulled yet. What it promises is an upper bound made of this run's
own times: that a part vanishes, halves, or runs at the memory's bandwidth or at the rate of this run's own products. A
lever without a bound, or one that is already pulled, is not named. Those that change what is trained say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from configs.schema import Attention, Precision, Recompute, Toggle
from model.norm_kernel import MAX_WIDTH
from training.backend import should_fuse_step, should_sum_in_products
from training.hardware import table_tflops
from training.waterfall.names import Category
from training.waterfall.report import Remedy, Report
from training.waterfall.work import ELEMENT_BYTES

WORTH = 0.002
"""Share of a step below which a lever isn't named."""


def remedies_for(report: Report) -> list[Remedy]:
    """Every lever that is left, the largest first."""
    found = [remedy for lever in LEVERS for remedy in lever(report)]
    return sorted((r for r in found if r.saves_s > WORTH * report.step_time_s), key=lambda r: -r.saves_s)


def data(report: Report) -> Iterator[Remedy]:
    """Waiting for batches."""
    waited, prefetch = report.time_of(Category.data_wait), report.setting.config.data.prefetch
    if prefetch == 0:
        yield Remedy(
            waited + report.time_of(Category.copies), ("data.prefetch",), "load ahead on a thread: data.prefetch=4"
        )
    else:
        text = f"batches come too late: raise data.prefetch (now {prefetch}), or put data.cache_dir on a faster disk"
        yield Remedy(waited, ("data.prefetch", "data.cache_dir"), text)


def compilation(report: Report) -> Iterator[Remedy]:
    """Fusion of everything that passes over activations, and fewer launches."""
    setting = report.setting
    if setting.compiled:
        return
    parts = (Category.norms, Category.activations, Category.elementwise, Category.copies)
    saves = sum(_above_bandwidth(report, part) for part in parts) + report.time_of(Category.host) / 2
    if setting.config.engine.zero_stage == 3:
        if setting.world_size == 1 or setting.on_device:
            text = "ZeRO-3 can't compile blocks: engine=zero2, if the weights fit, with engine.compile=on"
            yield Remedy(saves, ("engine.zero_stage", "engine.compile"), text)
        return
    text = "fuse norms, activations, biases and casts: engine.compile=on (takes a while to start)"
    yield Remedy(saves, ("engine.compile",), text)


def micro_batch(report: Report) -> Iterator[Remedy]:
    """Half as many passes over the gradients, and half as many launches."""
    plan, stage = report.setting.plan, report.setting.config.engine.zero_stage
    if plan.accumulation_steps < 2:
        return
    saved = report.time_of(Category.accumulation) + report.time_of(Category.host) + report.time_of(Category.idle)
    if stage >= 2:  # each micro-batch's gradients are reduced
        saved += report.time_of(Category.communication)
    size = 2 * plan.micro_batch_size
    text = (
        f"half the passes over gradients and half the launches: train.micro_batch_size={size} "
        f"(accumulation {plan.accumulation_steps} to {-(-plan.accumulation_steps // 2)}), if the memory suffices"
    )
    yield Remedy(saved / 2, ("train.micro_batch_size",), text)


def global_batch(report: Report) -> Iterator[Remedy]:
    """What happens once a step, over twice the tokens."""
    setting = report.setting
    once = report.time_of(Category.optimizer)
    if setting.config.engine.zero_stage < 2:
        once += report.time_of(Category.communication)
    if setting.plan.accumulation_steps == 1:
        once += report.time_of(Category.host) + report.time_of(Category.idle)
    text = (
        f"update half as often for the same tokens: train.global_batch_size={2 * setting.plan.global_batch_size} "
        "(changes the training: optim.lr goes with it)"
    )
    yield Remedy(once / 2, ("train.global_batch_size", "optim.lr"), text)


def recompute(report: Report) -> Iterator[Remedy]:
    """A second forward pass: a quarter of the products' time, half of what attention does forward."""
    if report.setting.config.engine.recompute is not Recompute.block:
        return
    saves = report.time_of(Category.matmul) / 4 + report.time_of(Category.attention_forward) / 2
    text = "no second forward pass: engine.recompute=none, with a smaller train.micro_batch_size if memory is short"
    yield Remedy(saves, ("engine.recompute", "train.micro_batch_size"), text)


def attention(report: Report) -> Iterator[Remedy]:
    """An implementation that isn't the fast one; heads that fill the kernels' tiles."""
    setting, config = report.setting, report.setting.config.model
    fast = Attention.flash if setting.on_device else Attention.sdpa
    saves = sum(_above_products(report, part) for part in (Category.attention_forward, Category.attention_backward))
    if setting.attention is not fast:
        text = f"at best at the rate of the products: model.attention={fast} (now {setting.attention})"
        if setting.precision is Precision.fp32 and setting.on_device:
            text += " with engine.precision=bf16"
        yield Remedy(saves, ("model.attention", "engine.precision"), text)
        return
    head_dim = config.head_dim or config.width // config.num_heads
    if setting.on_device and head_dim < 128:
        text = (
            f"heads of {head_dim} keep tensor cores waiting for the softmax: heads of 128 at the same width, "
            "model.num_heads and model.head_dim (changes the model)"
        )
        yield Remedy(saves, ("model.num_heads", "model.head_dim"), text)


def precision(report: Report) -> Iterator[Remedy]:
    """fp32 on a GPU whose tensor cores could do the products in bf16."""
    setting = report.setting
    if not setting.on_device or setting.precision is not Precision.fp32:
        return
    half, full = table_tflops(setting.device_name, "bf16"), setting.peak_tflops
    if half is not None and half > full:
        saves = report.time_of(Category.matmul) * (1 - full / half)
        text = "products on the bf16 tensor cores, weights still fp32 in the optimizer: engine.precision=bf16"
        yield Remedy(saves, ("engine.precision",), text)


def loss(report: Report) -> Iterator[Remedy]:
    """The plain loss where the fused kernel could run."""
    if report.setting.on_device and report.setting.config.model.fused is Toggle.off:
        text = "one kernel for the softmax and its gradient: model.fused=auto (now off)"
        yield Remedy(_above_bandwidth(report, Category.loss), ("model.fused",), text)


def norms(report: Report) -> Iterator[Remedy]:
    """Norms in more than one pass."""
    model = report.setting.config.model
    if report.setting.on_device and model.fused_norms is Toggle.off and model.width <= MAX_WIDTH:
        text = "norms and residual sums as one kernel each way: model.fused_norms=auto (now off)"
        yield Remedy(_above_bandwidth(report, Category.norms), ("model.fused_norms",), text)


def accumulation(report: Report) -> Iterator[Remedy]:
    """Weight gradients added in passes of their own."""
    setting, engine = report.setting, report.setting.config.engine
    auto = replace(engine, fuse_weight_gradients=Toggle.auto)
    possible = should_sum_in_products(auto, setting.precision, setting.world_size)
    if possible and engine.fuse_weight_gradients is Toggle.off:
        text = "sum weight gradients inside their products: engine.fuse_weight_gradients=auto (now off)"
        yield Remedy(report.time_of(Category.accumulation), ("engine.fuse_weight_gradients",), text)


def step(report: Report) -> Iterator[Remedy]:
    """An update in several passes, which read the masters again to round them (4 bytes a weight) and, in a step that
    clips, read and write the gradients once more (8): of 48 and the weight's own in all."""
    setting, config = report.setting, report.setting.config
    if not setting.on_device or config.optim.fused_step is not Toggle.off:
        return
    cuda, auto = torch.device("cuda"), replace(config.optim, fused_step=Toggle.auto)
    if should_fuse_step(auto, config.engine, setting.precision, cuda):
        text = "clip, update, round and empty in one kernel: optim.fused_step=auto (now off)"
        saves = report.time_of(Category.optimizer) * 12 / (48 + ELEMENT_BYTES[setting.precision])
        yield Remedy(saves, ("optim.fused_step",), text)


def vocabulary(report: Report) -> Iterator[Remedy]:
    """A vocabulary that isn't padded to whole tiles."""
    model = report.setting.config.model
    if report.setting.on_device and model.vocab_multiple % 64:
        saves = _above_products(report, Category.loss)
        text = f"logits of whole tiles: model.vocab_multiple=128 (now {model.vocab_multiple})"
        yield Remedy(saves, ("model.vocab_multiple",), text)


def biases(report: Report) -> Iterator[Remedy]:
    """Gradients of biases are sums over all tokens."""
    if report.setting.config.model.bias:
        text = "no sums over all tokens for the biases' gradients: model.bias=false (changes the model)"
        yield Remedy(report.time_of(Category.elementwise), ("model.bias",), text)


def sharding(report: Report) -> Iterator[Remedy]:
    """The optimizer's work and traffic."""
    setting, engine = report.setting, report.setting.config.engine
    if engine.offload_optimizer or engine.offload_params:
        text = "states cross the bus every step: engine.offload_optimizer=false and engine.offload_params=false"
        saves = sum(report.time_of(part) for part in (Category.copies, Category.optimizer, Category.host))
        yield Remedy(saves, ("engine.offload_optimizer", "engine.offload_params"), text + ", if the memory suffices")
    if setting.world_size > 1 and engine.zero_stage == 0:
        saves = report.time_of(Category.optimizer) * (1 - 1 / setting.world_size)
        yield Remedy(saves, ("engine.zero_stage",), "each rank updates its share of the weights only: engine=zero1")


def communication(report: Report) -> Iterator[Remedy]:
    """Communication that nothing hides."""
    setting, engine = report.setting, report.setting.config.engine
    exposed = report.time_of(Category.communication)
    if setting.world_size == 1:
        return
    if engine.zero_stage > 0 and not engine.overlap_comm and setting.on_device:
        yield Remedy(
            exposed, ("engine.overlap_comm",), "reduce gradients beside the backward pass: engine.overlap_comm=true"
        )
    if engine.zero_stage >= 2:
        text = f"ZeRO-{engine.zero_stage} communicates at every micro-batch: engine=zero1, if the memory suffices"
        yield Remedy(exposed * (1 - 1 / max(setting.plan.accumulation_steps, 1)), ("engine.zero_stage",), text)


LEVERS: tuple[Callable[[Report], Iterator[Remedy]], ...] = (
    data,
    compilation,
    micro_batch,
    global_batch,
    recompute,
    attention,
    precision,
    loss,
    norms,
    accumulation,
    step,
    vocabulary,
    biases,
    sharding,
    communication,
)


def _above_bandwidth(report: Report, category: Category) -> float:
    """Time of a part beyond what its least bytes take at the memory's bandwidth; all of it where either is unknown."""
    time_s, bandwidth = report.time_of(category), report.setting.memory_gb_per_s
    least = report.setting.work.least_bytes.get(category)
    if bandwidth is None or least is None or category is Category.copies:
        return time_s
    return max(0.0, time_s - least / (bandwidth * 1e9))


def _above_products(report: Report, category: Category) -> float:
    """Time of a part beyond what its FLOPs would take at the rate of this run's products."""
    time_s, work = report.time_of(category), report.setting.work.flops
    products_s = report.time_of(Category.matmul)
    if not products_s:
        return 0.0
    return max(0.0, time_s - work.get(category, 0.0) / work[Category.matmul] * products_s)
