"""The floor of a step: what is counted, and that the counted is what runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import Activation, Attention, Fp8, ModelConfig, Position, Precision, Toggle
from model import build_model
from model.flops import flops_per_token
from model.init import Linear
from tests.training.conftest import run_config
from training import floor
from training.batch import resolve_batch
from training.floor import Floor, attention_inputs, matrices, measure_floor, products, seconds_a_call
from training.waterfall.names import Category
from training.waterfall.report import Setting

CPU = torch.device("cpu")


def setting_of(model: ModelConfig | None = None, attention: Attention = Attention.sdpa) -> Setting:
    config = run_config(stage=1)
    config.engine.fuse_weight_gradients = Toggle.off
    config = replace(config, model=model or config.model)
    return Setting(
        config=config,
        plan=resolve_batch(config.train, 1),
        precision=Precision.bf16,
        attention=attention,
        compiled=False,
        world_size=1,
        on_device=False,
        peak_tflops=1.0,
        peak_source="table",
        device_name="cpu",
    )


@pytest.mark.parametrize("recipe", list(Fp8))
@pytest.mark.parametrize("activation", [Activation.gelu_tanh, Activation.swiglu])
def test_products_are_a_blocks(activation: Activation, recipe: Fp8) -> None:
    """The shapes are those of the model's layers, and a call multiplies what the rate counts, also in fp8."""
    setting = setting_of(replace(setting_of().config.model, activation=activation, num_kv_heads=1))
    setting.config.engine.fp8 = recipe
    block = build_model(setting.config.model).blocks[0]
    assert matrices(setting.config.model) == [tuple(m.weight.shape) for m in block.modules() if isinstance(m, Linear)]
    call = products(setting, matrices(setting.config.model), 40, CPU)
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == 6 * 40 * sum(rows * columns for rows, columns in matrices(setting.config.model))


def test_attention_is_handed_over_as_in_the_model() -> None:
    model = setting_of().config.model
    for changes, attention, packed in [
        ({}, Attention.flash, True),
        ({}, Attention.sdpa, False),
        ({"position": Position.rope}, Attention.flash, False),
        ({"qk_norm": True}, Attention.flash, False),
        ({"num_kv_heads": 1}, Attention.flash, False),
    ]:
        changed = replace(model, **changes)
        setting = setting_of(changed, attention)
        inputs = attention_inputs(setting, build_model(changed).sizes, CPU)
        assert len(inputs) == (1 if packed else 3)
        assert inputs[0].shape == (2, 16, *((3, 2) if packed else (2,)), 32)


def test_floor_is_flops_over_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """With products of 2 ms a block and attention of 1 and 3 ms a layer: by hand from the model's shape."""
    setting = setting_of()
    monkeypatch.setattr(floor, "seconds_a_call", lambda *_: 2e-3)
    monkeypatch.setattr(floor, "attention_seconds", lambda *_: (1e-3, 3e-3))
    found = measure_floor(setting, CPU)
    per_token = flops_per_token(setting.config.model)
    mix = 6 * 32 * 12 * 64 * 64 / 2e-3  # two sequences of 16 tokens a micro-batch
    assert found.matmul_tflops == pytest.approx(mix / 1e12)
    work = setting.work.flops
    products_s = work[Category.matmul] / mix
    attention_s = 2 * 2 * (1e-3 + 3e-3)  # two micro-batches, two layers
    assert work[Category.matmul] == 64 * per_token.matmul
    assert found.step_time_s == pytest.approx(products_s + attention_s)
    assert Floor(1, 1, 1, 0.5).share(2.0) == 0.25


def test_floor_in_fp8_has_the_head_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's products in 1 ms with fp8 and in 2 ms without, no time for attention."""
    setting = setting_of()
    setting.config.engine.fp8 = Fp8.rowwise
    took = iter([1e-3, 2e-3])
    monkeypatch.setattr(floor, "seconds_a_call", lambda *_: next(took))
    monkeypatch.setattr(floor, "attention_seconds", lambda *_: (1e-30, 1e-30))
    found = measure_floor(setting, CPU)
    head = 64 * 6 * 61 * 64  # 64 tokens a step, 61 of 64 rows
    in_bf16 = 6 * 32 * 12 * 64 * 64 / 2e-3
    assert found.head_tflops == pytest.approx(in_bf16 / 1e12)
    assert found.matmul_tflops == pytest.approx(2 * in_bf16 / 1e12)
    assert found.step_time_s == pytest.approx(2 * 2 * 1e-3 + head / in_bf16)


def test_calls_are_timed() -> None:
    calls = []
    took = seconds_a_call(lambda: calls.append(torch.ones(10_000).sum().item()), 0.02, CPU)
    assert len(calls) > 6
    assert 0 < took < 0.02


def test_measures_on_this_machine() -> None:
    found = measure_floor(setting_of(), CPU)
    rates = (found.matmul_tflops, found.attention_forward_tflops, found.attention_backward_tflops)
    assert all(0 < rate < 100 for rate in rates)
    assert 0 < found.step_time_s < 10
