"""The least time of a step on this device today: its products and its attention, each at the rate it reaches alone.

A card under load sits at its power limit, and cards differ, so that a share of the datasheet's peak says little about
the code. The floor asks the same card right after the run: the products of a block, forward and backward, one after the
other for seconds until the clock has settled, and the attention that the run uses. Whatever a step takes beyond

    floor = FLOPs of products / their rate + FLOPs of attention / its rates, forward and backward

is passes over memory, communication and gaps. Products inside a step can be a little faster than the mix, as other
phases let the card cool down.

With `engine.fp8` the products are the run's own, two of three in fp8, of operands that have been cast before: the casts
are passes over memory. The head's stay in bf16 and are counted at the rate that a block's products have in bf16.

B batch, S sequence, H heads, K key-value heads, D head dim, T = B·S tokens, I in, O out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from configs.schema import Activation, Attention, Fp8, ModelConfig, Position
from model.attention import Context, Scores, attend, flash_packed
from model.dimensions import Dimensions, resolve_dimensions
from model.fp8 import backward_operands, forward_operands, peak_of, product
from model.layers import alibi_slopes
from model.weight_gradient import add_weight_gradient_
from training.backend import DTYPES, should_sum_in_products
from training.waterfall.names import Category
from training.waterfall.report import Report, Setting

MIX_SECONDS, ATTENTION_SECONDS = 5.0, 1.0
"""How long the products run, and attention each way, on a GPU."""
CPU_SECONDS = 0.1


@dataclass(frozen=True)
class Floor:
    """What was measured, and what a step of the run's FLOPs takes at these rates."""

    matmul_tflops: float
    """The products of a block, one after the other; with `engine.fp8` two of three in fp8."""
    attention_forward_tflops: float
    """Of the model's FLOPs, as the waterfall counts them: causal, a third forward."""
    attention_backward_tflops: float
    """Two thirds backward."""
    step_time_s: float
    """The floor of a step."""
    head_tflops: float | None = None
    """With `engine.fp8`: the products of a block in bf16, in which the head's are made."""

    def share(self, step_time_s: float) -> float:
        """How much of a step is its floor: 1 is the best that these products and this attention allow."""
        return self.step_time_s / step_time_s


def measure_floor(setting: Setting, device: torch.device) -> Floor:
    """The rates of the setting's products and attention at its micro-batch, right now."""
    work, model = setting.work, setting.config.model
    tokens = setting.plan.micro_batch_size * model.sequence_length
    mix_s, attention_s = (MIX_SECONDS, ATTENTION_SECONDS) if setting.on_device else (CPU_SECONDS, CPU_SECONDS)
    shapes = matrices(model)
    mix_flops = 6 * tokens * sum(rows * columns for rows, columns in shapes)
    mix = mix_flops / seconds_a_call(products(setting, shapes, tokens, device), mix_s, device)
    head = None
    if setting.config.engine.fp8 is not Fp8.none:
        plain = replace(setting, config=replace(setting.config, engine=replace(setting.config.engine, fp8=Fp8.none)))
        head = mix_flops / seconds_a_call(products(plain, shapes, tokens, device), mix_s, device)
    block_flops = 6 * work.tokens * model.num_layers * sum(rows * columns for rows, columns in shapes)
    layer_flops = work.flops_per_token.attention_causal * tokens / resolve_dimensions(model).num_layers
    forward_s, backward_s = attention_seconds(setting, attention_s, device)
    forward, backward = layer_flops / 3 / forward_s, layer_flops * 2 / 3 / backward_s
    floor_s = (
        block_flops / mix
        + (work.flops[Category.matmul] - block_flops) / (head or mix)
        + work.flops[Category.attention_forward] / forward
        + work.flops[Category.attention_backward] / backward
    )
    return Floor(mix / 1e12, forward / 1e12, backward / 1e12, floor_s, None if head is None else head / 1e12)


def matrices(model: ModelConfig) -> list[tuple[int, int]]:
    """(O, I) of a block's four matrices."""
    sizes = resolve_dimensions(model)
    hidden = sizes.mlp_width * (2 if model.activation is Activation.swiglu else 1)
    return [
        (sizes.qkv_width, sizes.width),
        (sizes.width, sizes.query_width),
        (hidden, sizes.width),
        (sizes.width, sizes.mlp_width),
    ]


def products(setting: Setting, shapes: list[tuple[int, int]], tokens: int, device: torch.device) -> Callable[[], None]:
    """A call of the twelve products of a block on random data, weight gradients made as the run makes them, operands of
    fp8 products cast before."""
    dtype = DTYPES[setting.precision]
    fused = should_sum_in_products(setting.config.engine, setting.precision, setting.world_size)
    recipe = setting.config.engine.fp8
    operands = [
        (
            torch.randn(tokens, columns, device=device).to(dtype),  # X (T, I)
            torch.randn(tokens, rows, device=device).to(dtype),  # dY (T, O)
            torch.randn(rows, columns, device=device).to(dtype),  # W (O, I)
            torch.zeros(rows, columns, device=device),  # sum of dW (O, I)
        )
        for rows, columns in shapes
    ]

    casts = []
    for x, d_y, weight, _ in operands if recipe is not Fp8.none else []:
        peak = peak_of(weight, recipe)
        casts.append((forward_operands(x, weight, peak, recipe), backward_operands(d_y, weight, peak, recipe)))

    def call() -> None:
        for forward, backward in casts:
            product(*forward, dtype, fast=True)
            product(*backward, dtype, fast=False)
        for x, d_y, weight, total in operands:
            if not casts:
                x @ weight.t()
                d_y @ weight
            if fused:
                add_weight_gradient_(total, d_y, x)
            else:
                d_y.t() @ x

    return call


def attention_seconds(setting: Setting, least_s: float, device: torch.device) -> tuple[float, float]:
    """Forward and backward time of one layer's attention at the run's micro-batch and implementation."""
    model = setting.config.model
    sizes = resolve_dimensions(model)
    alibi = alibi_slopes(sizes.num_heads, device) if model.position is Position.alibi else None
    context = Context(setting.attention, alibi=alibi)
    scores = Scores(model.window, model.attention_softcap)
    inputs = attention_inputs(setting, sizes, device)

    def forward() -> Tensor:
        if len(inputs) == 1:
            return flash_packed(inputs[0], scores, context)
        q, k, v = inputs
        return attend(q, k, v, scores, context)

    out = forward()
    d_out = torch.randn_like(out)
    forward_s = seconds_a_call(forward, least_s, device)
    backward_s = seconds_a_call(lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True), least_s, device)
    return forward_s, backward_s


def attention_inputs(setting: Setting, sizes: Dimensions, device: torch.device) -> list[Tensor]:
    """Random q (B, S, H, D), k and v (B, S, K, D), or qkv (B, S, 3, H, D) where the model hands it over whole."""
    model, dtype = setting.config.model, DTYPES[setting.precision]
    batch = setting.plan.micro_batch_size, model.sequence_length

    def random(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, sizes.head_dim, device=device).to(dtype).requires_grad_()

    whole = model.position is not Position.rope and not model.qk_norm and sizes.num_heads == sizes.num_kv_heads
    if whole and setting.attention is Attention.flash:
        return [random(3, sizes.num_heads)]
    return [random(heads) for heads in (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)]


def seconds_a_call(call: Callable[[], object], least_s: float, device: torch.device) -> float:
    """Mean time of a call over at least `least_s`, after two that compile and allocate."""

    def repeat(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    repeat(2)
    count = max(2, int(least_s / max(repeat(2) / 2, 1e-6)))
    return repeat(count) / count


def floor_line(floor: Floor, report: Report) -> str:
    """One line for people: the floor, its rates, and the run as a share of it."""
    plain = report.unprofiled
    step_s = plain.step_time_s if plain else report.step_time_s
    in_fp8 = "" if floor.head_tflops is None else f" (two of three in fp8; {floor.head_tflops:.3g} without)"
    at_floor = report.mfu * report.step_time_s / floor.step_time_s
    return (
        f"Floor: a step of {1e3 * floor.step_time_s:,.0f} ms, {at_floor:.1%} MFU, with the products at "
        f"{floor.matmul_tflops:.3g} TFLOP/s{in_fp8} and attention at {floor.attention_forward_tflops:.3g} forward and "
        f"{floor.attention_backward_tflops:.3g} backward, as measured after the run. The run's step is at "
        f"{floor.share(step_s):.1%} of it."
    )


def floor_json(floor: Floor, report: Report) -> dict[str, Any]:
    """For `waterfall.json`."""
    step_s = report.unprofiled.step_time_s if report.unprofiled else report.step_time_s
    return {**asdict(floor), "share": floor.share(step_s)}
