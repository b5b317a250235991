"""The counted peak of a step beside the peaks that runs reported (`perf/peak_memory_gb`)."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model.loss
from configs import compose
from configs.schema import Fp8, RunConfig
from model.flops import parameter_counts
from training.memory import StepMemory, largest_micro_batch, outlook, state_bytes, step_memory

CHUNK = 2 * 4096 * 50304 / 1e9
"""GB of a chunk of logits. Those runs still held one while they made the next; since then they don't."""

MEASURED = (
    # experiment, stage, ranks, GB. NVIDIA H200, 28 November 2026, torch 2.11.0+cu130: docs/scaling.md, BENCHMARKS.md
    ("gpt3_1b3_2k", 1, 1, 51.0),
    ("gpt3_1b3_2k", 1, 2, 43.1),
    ("gpt3_1b3_2k", 1, 4, 39.2),
    ("gpt3_2b7_8k", 1, 2, 55.1),
    ("gpt3_2b7_8k", 1, 4, 47.1),
    ("gpt3_1b3_2k", 2, 2, 42.0),
    ("gpt3_1b3_2k", 2, 4, 36.14),
    ("gpt3_2b7_8k", 2, 1, 71.06),
    ("gpt3_2b7_8k", 2, 2, 52.63),
    ("gpt3_2b7_8k", 2, 4, 40.65),
    ("gpt3_1b3_2k", 3, 1, 51.00),
    ("gpt3_1b3_2k", 3, 2, 41.4),
    ("gpt3_1b3_2k", 3, 4, 35.53),
    ("gpt3_2b7_8k", 3, 2, 49.50),
    ("gpt3_2b7_8k", 3, 4, 37.52),
    ("gpt3_6b7_2k", 3, 4, 68.60),
)


def peak(config: RunConfig, ranks: int, micro_batch_size: int | None = None) -> StepMemory:
    size = micro_batch_size or config.train.micro_batch_size
    assert isinstance(size, int)
    found = step_memory(config.model, config.engine, size, ranks, copied=config.engine.zero_stage > 1 and ranks > 1)
    assert found is not None
    return found


@pytest.mark.parametrize(("experiment", "stage", "ranks", "measured"), MEASURED)
def test_counted_as_measured(experiment: str, stage: int, ranks: int, measured: float) -> None:
    config = compose([f"experiment={experiment}", f"engine=zero{stage}", "model.vocab_size=50257"])
    assert peak(config, ranks).total / 1e9 + CHUNK == pytest.approx(measured, rel=0.01)


def test_recomputed_blocks_and_shared_samples_as_measured() -> None:
    config = compose(
        ["experiment=gpt3_1b3_8k", "model.vocab_size=50257", "model.sequence_length=131072", "model.position=rope",
         "engine.sequence_parallel_size=2", "engine.recompute=block", "train.micro_batch_size=1"]
    )  # fmt: skip
    assert peak(config, 2).total / 1e9 == pytest.approx(27.1, rel=0.01)


@pytest.mark.parametrize(("experiment", "measured"), [("gpt3_1b3_2k", 103), ("gpt3_2b7_2k", 114)])
def test_standard_attention_as_measured(experiment: str, measured: float) -> None:
    config = compose([f"experiment={experiment}", "model.vocab_size=50257", "model.attention=standard"])
    assert peak(config, 1).total / 1e9 + CHUNK == pytest.approx(measured, rel=0.01)


def test_states_by_stage() -> None:
    engine = compose([]).engine
    a_rank: dict[int, list[float]] = {0: [18, 18], 1: [18, 9], 2: [18, 6.5], 3: [18, 4.5]}
    for stage, bytes_a_weight in a_rank.items():
        found = [state_bytes(100, replace(engine, zero_stage=stage), ranks) for ranks in (1, 4)]
        assert found == [100 * each for each in bytes_a_weight], stage


@pytest.mark.parametrize(
    "overrides",
    [["engine=zero3_offload"], ["engine=zero2", "engine.lean_zero2=off"], ["engine.fp32_accumulation=false"]],
)
def test_nothing_is_said_of_what_is_not_counted(overrides: list[str]) -> None:
    config = compose(["experiment=gpt3_1b3_2k", "model.vocab_size=50257", *overrides])
    assert step_memory(config.model, config.engine, 8, 2) is None
    assert largest_micro_batch(config.model, config.engine, 2, 1e12) is None


def test_nothing_is_said_of_fp8() -> None:
    config = compose(["experiment=gpt3_1b3_2k", "model.vocab_size=50257"])
    assert step_memory(config.model, replace(config.engine, fp8=Fp8.rowwise), 8, 1) is None


@pytest.mark.parametrize("available", [15e9, 30e9, 51e9, 85e9])
def test_largest_micro_batch_fits_and_one_more_does_not(available: float) -> None:
    config = compose(["experiment=gpt3_1b3_2k", "model.vocab_size=50257"])
    size = largest_micro_batch(config.model, config.engine, 2, available)
    if size is None:
        assert peak(config, 2, 1).total > available
    else:
        assert peak(config, 2, size).total <= available < peak(config, 2, size + 1).total
    assert (size is None) == (available == 15e9)


def test_what_a_user_is_told() -> None:
    config = compose(["experiment=gpt3_2b7_8k", "model.vocab_size=50257"])
    too_much, said = outlook(config.model, config.engine, 1, 1, 70 * 10**9, neighbours=1) or (None, "")
    assert too_much
    assert said == "a step is counted to take 70.6 GB of the GPU's 70.0 GB, and no micro-batch fits"
    too_much, said = outlook(config.model, config.engine, 1, 1, 150 * 10**9, neighbours=1) or (None, "")
    assert not too_much
    assert said.endswith("150.0 GB, and micro-batches of up to 4 fit")
    assert outlook(config.model, replace(config.engine, fp8=Fp8.rowwise), 1, 1, 10**9, neighbours=1) is None


def test_gated_and_rotated_blocks_keep_more() -> None:
    small = ["model.num_layers=2", "model.width=64", "model.num_heads=4", "model.sequence_length=32"]
    small += ["model.vocab_size=64", "engine=zero1"]
    plain = compose([*small, "model.mlp_width=256"])
    tokens = 4 * 32
    before = peak(plain, 1, 4).activations
    assert before == 2 * tokens * (2 * (4 * 64 + 4 * 64 + 2 * 256) + 4 * (4 + 4))
    rotated = compose([*small, "model.mlp_width=256", "model.position=rope", "model.num_kv_heads=2"])
    assert peak(rotated, 1, 4).activations - before == 2 * tokens * 2 * ((64 + 32) - 2 * 32)
    gated = compose([*small, "model.mlp_width=256", "model.activation=swiglu"])
    assert peak(gated, 1, 4).activations - before == 2 * tokens * 2 * 256
    assert parameter_counts(gated.model).total > parameter_counts(plain.model).total


def test_a_chunk_of_logits_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time would be half a GB more at a GPU's peak."""
    seen: list[Any] = []
    plain = model.loss.chunk_loss_

    def watched(logits: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(weakref.ref(logits))
        return plain(logits, *rest, **options)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:  # the next chunk's logits
                assert all(earlier() is None for earlier in seen)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(model.loss, "chunk_loss_", watched)
    monkeypatch.setitem(model.loss.CHUNK_LOGITS, "cpu", 8 * 16)
    hidden, weight = torch.randn(24, 4, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    options = model.loss.LossOptions(16, 0.0, 0.0, fused=False)
    with Products():
        model.loss.linear_cross_entropy(hidden, weight, torch.arange(24) % 16, options)
    assert len(seen) == 3
