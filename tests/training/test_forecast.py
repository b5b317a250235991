"""The model of a step on many devices against sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.schema import EngineConfig, ModelConfig, Recompute, Toggle
from model.flops import parameter_counts
from training.forecast import Cluster, Job, checkpoint_bytes, copies, forecast, traffic

MODEL = ModelConfig(num_layers=4, num_heads=8, num_kv_heads=2, width=64, sequence_length=128, vocab_size=256)
COUNT = parameter_counts(MODEL).total
CLUSTER = Cluster(tokens_per_s=1e6, link_gb_per_s=1.0, network_gb_per_s=0.1, node_size=8, latency_us=0.0)


def job(stage: int, world_size: int = 4, **engine: object) -> Job:
    config = EngineConfig(zero_stage=stage, **engine)  # type: ignore[arg-type]
    return Job(MODEL, config, 2, micro_batch_size=2, accumulation_steps=3, world_size=world_size, overlapped=True)


@pytest.mark.parametrize(("stage", "per_weight"), [(0, 8), (1, 4 + 2), (2, 3 * 4 + 2), (3, 3 * 4 + 3 * 2 * 2)])
def test_bytes_by_stage(stage: int, per_weight: int) -> None:
    assert traffic(job(stage)).total == pytest.approx(COUNT * per_weight * 3 / 4)
    assert traffic(job(stage, world_size=1)).total == 0


@pytest.mark.parametrize(
    ("stage", "fuse", "per_weight", "per_vector"),
    [
        (2, Toggle.on, 3 * 2 + 2, 4 + 2),  # norms and biases: in fp32, once
        (2, Toggle.auto, 3 * 2 + 2, 3 * 2 + 2),
        (3, Toggle.auto, 3 * 2 + 3 * 2 * 2, 3 * 2 + 3 * 2 * 2),
    ],
)
def test_bytes_where_gpus_read_each_others_memory(stage: int, fuse: Toggle, per_weight: int, per_vector: int) -> None:
    vectors = 4 * (4 * 64 + 64 * (1 + 4 + 1) + 12 * 8) + 2 * 64  # norms; biases of projection, MLP and qkv; last norm
    expected = ((COUNT - vectors) * per_weight + vectors * per_vector) * 3 / 4
    assert traffic(replace(job(stage, fuse_weight_gradients=fuse), copied=True)).total == expected


def test_where_gpus_read_each_others_memory() -> None:
    """Two or more of one node, in half precision, by our code at stages 2 and 3."""
    for stage in range(4):
        assert copies(EngineConfig(zero_stage=stage), 2, 8, 8) is (stage > 1)
    config = EngineConfig(zero_stage=3)
    assert not any(copies(config, *given) for given in [(4, 8, 8), (2, 1, 8), (2, 16, 8)])
    for key in ("copy_engines", "lean_zero3"):
        assert not copies(replace(config, **{key: Toggle.off}), 2, 8, 8)  # type: ignore[arg-type]


def test_bytes_of_deepspeeds_stage_2() -> None:
    """It reduces to all ranks."""
    assert traffic(job(2, lean_zero2=Toggle.off)).total == pytest.approx(COUNT * (3 * 8 + 2) * 3 / 4)
    assert traffic(job(2, fp32_accumulation=False)).total == pytest.approx(COUNT * (3 * 4 + 2) * 3 / 4)


def test_bytes_of_sequence_parallelism() -> None:
    """64 tokens a rank and sample: 8 query heads, 8 of the output, keys and values repeated to 4 heads each, of 8."""
    sent = traffic(job(1, sequence_parallel_size=4))
    assert sent.heads == 3 * 2 * (128 / 4) * 4 * (8 + 8 + 4 + 4) * 8 * 2 * 2 * 3 / 4
    recomputed = traffic(job(1, sequence_parallel_size=4, recompute=Recompute.block))
    assert recomputed.heads == 1.5 * sent.heads


def test_alone_is_compute_alone() -> None:
    for stage in range(4):
        alone = forecast(job(stage, world_size=1), CLUSTER)
        assert alone.step_time_s == pytest.approx(3 * 256 / 1e6)
        assert alone.efficiency == 1.0


def test_stage_1_waits_for_all_of_it() -> None:
    found = forecast(job(1), CLUSTER)
    assert found.exposed_s == pytest.approx(COUNT * 6 * 0.75 / 1e9) == found.communication_s


def test_stage_2_hides_what_its_backward_passes_have_room_for() -> None:
    reduce_s, gather_s, backward_s = COUNT * 4 * 0.75 / 1e9, COUNT * 2 * 0.75 / 1e9, 256 / 1e6 * 2 / 3
    assert reduce_s > backward_s  # some of it is left
    assert forecast(job(2), CLUSTER).exposed_s == pytest.approx(gather_s + 3 * (reduce_s - backward_s))
    fast = replace(CLUSTER, link_gb_per_s=1000.0)  # all of it is hidden but a block's
    assert forecast(job(2), fast).exposed_s == pytest.approx((gather_s + 3 * reduce_s / 4) / 1000)
    serial = replace(job(2), overlapped=False)
    assert forecast(serial, CLUSTER).exposed_s == pytest.approx(gather_s + 3 * reduce_s)


def test_stage_3_gathers_in_both_passes() -> None:
    gather_s, reduce_s = COUNT * 2 * 0.75 / 1e9, COUNT * 4 * 0.75 / 1e9
    forward_s, backward_s = 256 / 1e6 / 3, 256 / 1e6 * 2 / 3
    expected = 3 * (gather_s - forward_s + gather_s + reduce_s - backward_s)
    assert gather_s > forward_s
    assert forecast(job(3), CLUSTER).exposed_s == pytest.approx(expected)


def test_beyond_a_node_the_network_is_what_counts() -> None:
    inside, outside = forecast(job(1, 8), CLUSTER), forecast(job(1, 16), CLUSTER)
    assert outside.exposed_s / inside.exposed_s == pytest.approx(10 * (15 / 16) / (7 / 8))


def test_latency_grows_with_the_ranks_and_the_messages() -> None:
    slow = replace(CLUSTER, latency_us=10.0)
    extra = [forecast(job(3, ranks), slow).communication_s - forecast(job(3, ranks), CLUSTER).communication_s
             for ranks in (2, 8)]  # fmt: skip
    assert extra == pytest.approx([3 * 3 * 4 * 1e-5, 3 * 3 * 4 * 7 * 1e-5])


def test_checkpoint_holds_masters_and_moments() -> None:
    assert checkpoint_bytes(job(1)) == 12 * COUNT
