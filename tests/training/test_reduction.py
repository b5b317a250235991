"""`engine.lean_zero2` and `lean_zero3`: sums of gradients in the order of ranks, weights gathered from it, and what is
trained so, against DeepSpeed's way."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Device, Precision, RunConfig, Toggle
from tests.ranks import on_ranks
from tests.training.conftest import Build, make_engine, run_config, train
from training import backend, distributed, engine
from training.backend import should_be_lean
from training.lean_zero import GATHER_STREAM, LeanStage2, LeanStage3
from training.reduction import ShardedSums, ShardedWeights, in_rows, rows_of
from training.zero import Stage3, Stage12

SHAPES = ((7, 5), (4,), (61, 3), (1,), (2, 2))
MICRO_BATCHES = 3


def gradient(rank: int, micro: int, index: int) -> Tensor:
    """Integers, whose sums are exact."""
    generator = torch.Generator().manual_seed(1000 * rank + 10 * micro + index)
    return torch.randint(-64, 64, SHAPES[index], generator=generator).bfloat16()


def reduced(bucket_size: int) -> list[Any]:
    """The parts of the sums that one of the ranks has after three micro-batches with gradients of all parameters."""
    own = distributed.init(Device.cpu, timeout_minutes=0.5)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES]
    shards = {p: torch.zeros(-(-p.numel() // own.world_size)) for p in parameters}
    one = ShardedSums(shards, None, bucket_size, None)
    for micro in range(MICRO_BATCHES):
        terms = [(p * gradient(own.rank, micro, index)).sum() for index, p in enumerate(parameters)]
        torch.stack(terms).sum().backward()
        one.finish()
        assert all(p.grad is None for p in parameters)
    assert len(one.buckets) == (own.world_size > 1)
    assert all(bucket.memory.numel() <= max(bucket_size, own.world_size) for bucket in one.buckets)
    own.close()
    return [shard.numpy() for shard in shards.values()]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("bucket_size", [1, 24, 10_000])
def test_sums_over_ranks_and_micro_batches(ranks: int, bucket_size: int) -> None:
    """Also of parameters that a bucket can't hold, or that don't divide by the ranks: the last has zeros at its end."""
    found = on_ranks(ranks, reduced, bucket_size)
    for index, shape in enumerate(SHAPES):
        terms = [gradient(rank, micro, index).float() for rank in range(ranks) for micro in range(MICRO_BATCHES)]
        expected = in_rows(torch.stack(terms).sum(0) / ranks, ranks)
        assert expected.numel() - torch.Size(shape).numel() == -torch.Size(shape).numel() % ranks
        for rank in range(ranks):
            got = torch.from_numpy(found[rank][index])
            torch.testing.assert_close(got, expected[rank], rtol=1e-6, atol=1e-5)


def test_in_rows() -> None:
    rows = in_rows(torch.arange(1.0, 8.0).view(7, 1), 3)
    assert rows.tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert in_rows(torch.ones(2, 2).t(), 2).shape == (2, 2)


def gathered(bucket_size: int, buckets: int, dtype: torch.dtype) -> list[Any]:
    """The parameters that one of the ranks has, once each has brought its part of them. In two groups."""
    own = distributed.init(Device.cpu, timeout_minutes=0.5)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    sums = ShardedSums({p: torch.zeros(-(-p.numel() // own.world_size)) for p in parameters}, None, bucket_size, None)
    sums.buckets = [sums.make_bucket() for _ in range(buckets)]  # two are a GPU's
    rows = [rows_of(p, own.world_size) for p in parameters]
    values = [in_rows(gradient(0, 0, index).to(dtype), own.world_size)[own.rank] for index in range(len(SHAPES))]
    parts = [torch.cat(values[:3]), torch.cat(values[3:])]
    whole = ShardedWeights(parts, [rows[:3], rows[3:]], sums)
    messages = [message.whole.numel() * message.whole.element_size() for message in whole.messages]
    assert all(size <= 4 * max(bucket_size, own.world_size) for size in messages)
    whole.gather()
    own.close()
    return [p.detach().float().numpy() for p in parameters]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("bucket_size", [1, 24, 10_000])
@pytest.mark.parametrize(("buckets", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_weights_of_all_ranks(ranks: int, bucket_size: int, buckets: int, dtype: torch.dtype) -> None:
    """Also by many messages, which take turns in the memory of a bucket or two."""
    for found in on_ranks(ranks, gathered, bucket_size, buckets, dtype):
        for index, got in enumerate(found):
            assert torch.equal(torch.from_numpy(got), gradient(0, 0, index).float())


PRECISIONS = (Precision.fp32, Precision.bf16)
KINDS: dict[int, tuple[type, type]] = {2: (Stage12, LeanStage2), 3: (Stage3, LeanStage3)}
"""Stage → DeepSpeed's way and ours."""


def config_of(stage: int, precision: Precision, lean: Toggle) -> RunConfig:
    config = run_config(stage, accumulation=2, micro=2, bucket_size=5000, **{f"lean_zero{stage}": lean})
    config.engine.precision, config.engine.fuse_weight_gradients = precision, Toggle.off
    config.optim.grad_clip = 0.0  # the norm's last digits would be in everything
    return config


def courses(stage: int) -> dict[tuple[Precision, Toggle], Any]:
    """On one of the ranks, by precision and `engine.lean_zero…`: losses and norms of four steps, the third of them with
    a loss that isn't finite, this rank's masters and moments, and the weights."""
    own = distributed.init(Device.cpu, timeout_minutes=0.5)
    # On one rank PyTorch's, which rounds otherwise, would take the place of ZeRO-3's `linear`.
    backend.keeps_plain_linear = engine.keeps_plain_linear = lambda *_: False  # type: ignore[attr-defined]
    found = {}
    for precision in PRECISIONS:
        for lean in (Toggle.off, Toggle.on):
            one = make_engine(config_of(stage, precision, lean), own)
            assert type(one.partition) is KINDS[stage][lean is Toggle.on]
            results, plain = train(one, 0, 2), one.forward
            one.forward = lambda micro, plain=plain: plain(micro) * torch.nan  # type: ignore[method-assign]
            assert not train(one, 2, 3)[0].updated
            one.forward = plain  # type: ignore[method-assign]
            results += train(one, 3, 5)
            parts = [
                (name, f.start, tensor.clone().numpy())
                for f in one.partition.fragments()
                for name, tensor in ((f.name, f.master), (f"m {f.name}", f.exp_avg), (f"v {f.name}", f.exp_avg_sq))
            ]
            weights = {name: p.detach().flatten().float().numpy() for name, p in one.module.named_parameters()}
            found[precision, lean] = ([(r.loss, r.grad_norm) for r in results], parts, weights)
            one.close()
    own.close()
    return found


def joined(ranks: list[list[tuple[str, int, Any]]]) -> dict[str, Tensor]:
    """Flat tensors by name from the parts that ranks have of them; each element once."""
    parts = sorted((name, start, rank, part) for rank, held in enumerate(ranks) for name, start, part in held)
    found: dict[str, list[Tensor]] = {}
    for name, start, _, part in parts:
        assert start == sum(map(len, found.setdefault(name, [])))
        found[name].append(torch.from_numpy(part))
    return {name: torch.cat(pieces) for name, pieces in found.items()}


@pytest.mark.parametrize("stage", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_trains_as_deepspeed(stage: int, ranks: int) -> None:
    """On one and two ranks bit for bit: division by two is exact, before a sum or after it. By three it is not; and it
    leaves a rest of parameters. Norms: the sums' order differs."""
    found = on_ranks(ranks, courses, stage)
    for precision in PRECISIONS if ranks < 3 else (Precision.fp32,):  # a weight rounded the other way shows in all
        (theirs, ours) = ([rank[precision, lean] for rank in found] for lean in (Toggle.off, Toggle.on))
        near = 0.0 if ranks < 3 else 1e-5
        for (their_steps, *_), (our_steps, *_) in zip(theirs, ours, strict=True):
            assert [loss for loss, _ in our_steps] == pytest.approx([loss for loss, _ in their_steps], rel=near, abs=0)
            assert [norm for _, norm in our_steps] == pytest.approx([norm for _, norm in their_steps], rel=1e-6 + near)
        left, right = (joined([parts for _, parts, _ in way]) for way in (theirs, ours))
        assert left.keys() == right.keys()
        for name, expected in left.items():
            torch.testing.assert_close(right[name], expected, rtol=near, atol=near)
        for _, _, weights in ours if stage == 2 or ranks == 1 else ():
            for name, weight in weights.items():
                rounded = right[name].to(backend.DTYPES[precision]).float()
                assert torch.equal(torch.from_numpy(weight), rounded), name


@pytest.mark.parametrize("stage", KINDS)
def test_parameters_of_one_rank_are_what_the_optimizer_updates(build: Build, stage: int) -> None:
    """They stay, at the same place, from the third step, when ZeRO-3 has traced a step."""
    one = build(config_of(stage, Precision.bf16, Toggle.on))
    train(one, 0, 3)
    places = [p.data_ptr() for p in one.module.parameters()]
    wrapper = one.partition.wrapper
    flats = wrapper.bit16_groups_flat if stage == 2 else wrapper.fp16_partitioned_groups_flat
    train(one, 3, 5)
    assert [p.data_ptr() for p in one.module.parameters()] == places
    storages = {flat.untyped_storage().data_ptr() for flat in flats}
    assert {p.untyped_storage().data_ptr() for p in one.module.parameters()} == storages


def held_bytes() -> int:
    """Memory of all tensors there are."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def resident() -> tuple[int, int]:
    """Bytes that one of the ranks holds after steps of stage 2, and the model's weights."""
    own = distributed.init(Device.cpu, timeout_minutes=0.5)
    before = held_bytes()
    one = make_engine(config_of(2, Precision.bf16, Toggle.on), own)
    train(one, 0, 2)
    held, count = held_bytes() - before, engine.count_parameters(one.module)
    one.close()
    own.close()
    return held, count


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_of_stage_2(ranks: int) -> None:
    """Weights on all ranks, sums and optimizer states of a rank's part; nothing of what DeepSpeed has prepared."""
    for held, count in on_ranks(ranks, resident):
        part = count / ranks * (16 + (2 if ranks > 1 else 0))
        bucket = 4 * 5000 if ranks > 1 else 0
        assert held == pytest.approx(2 * count + part + bucket, rel=0.02)


class Waits:
    """A stream that notes which other it was told to wait for."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def wait_stream(self, other: Waits) -> None:
        self.order.append(f"{self.name} waits for {other.name}")


def order_at_stage_2() -> list[str]:
    """What a step of two ranks does, in order."""
    own = distributed.init(Device.cpu, timeout_minutes=5)
    one = make_engine(config_of(2, Precision.bf16, Toggle.on), own)
    order: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **keys: Any) -> Any:
            order.append(name)
            return function(*args, **keys)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one.partition, "update", noted("update", one.partition.update))  # type: ignore[attr-defined]
        patch.setattr(dist, "reduce_scatter_tensor", noted("reduce", dist.reduce_scatter_tensor))
        patch.setattr(dist, "all_gather_into_tensor", noted("gather", dist.all_gather_into_tensor))
        train(one, 0, 1)
    one.close()
    own.close()
    return order


def test_weights_travel_after_the_update_and_gradients_before_the_end() -> None:
    """At stage 2: while a backward pass goes on, a bucket after the other, in each of the two micro-batches."""
    order = on_ranks(2, order_at_stage_2)[0]
    reductions, gathers = order.count("reduce"), order.count("gather")
    assert order == ["reduce"] * reductions + ["update"] * 2 + ["gather"] * gathers
    assert reductions > gathers > 2  # of fp32, twice; of bf16


def order_of_a_step() -> list[str]:
    """What a step of two ranks does, in order, to the streams that compute and gather, and between."""
    own = distributed.init(Device.cpu, timeout_minutes=5)
    one = make_engine(config_of(3, Precision.bf16, Toggle.on), own)
    assert isinstance(one.partition, LeanStage3)
    order: list[str] = []
    update = one.partition.update

    def noted(*arguments: Any) -> None:
        order.append("update")
        update(*arguments)

    one.partition.update = noted  # type: ignore[method-assign]
    setattr(one.partition.wrapper.parameter_offload, GATHER_STREAM, Waits("gathering", order))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda *_: Waits("computing", order))
        train(one, 0, 1)
    one.close()
    own.close()
    return order


def test_update_and_gathers_wait_for_each_other() -> None:
    """DeepSpeed gathers on a stream of its own, and waits for the device between an update and the next gather."""
    order = on_ranks(2, order_of_a_step)[0]
    assert order[0] == "computing waits for gathering"
    assert order[-1] == "gathering waits for computing"
    assert set(order[1:-1]) == {"update"}


@pytest.mark.parametrize("stage", KINDS)
def test_where_it_is_possible(
    build: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """`auto` takes it there and nowhere else, `on` refuses elsewhere, an unknown wrapper is left as it is."""
    key = f"lean_zero{stage}"
    assert should_be_lean(run_config(stage).engine)
    assert not should_be_lean(run_config(stage, **{key: Toggle.off}).engine)
    assert should_be_lean(run_config(stage, **{f"lean_zero{5 - stage}": Toggle.off}).engine)  # the other stage's
    for at, keys in [(1, {}), (stage, {"fp32_accumulation": False}), (stage, {"offload_optimizer": True})]:
        assert not should_be_lean(run_config(at, **keys).engine)
        with pytest.raises(UserError, match=rf"engine\.{key}=on: needs .* or off"):
            should_be_lean(run_config(at, **keys, **{key: Toggle.on}).engine)
    plain, lean = KINDS[stage]
    monkeypatch.setattr(lean, "knows", staticmethod(lambda _: False))
    config = config_of(stage, Precision.bf16, Toggle.on)
    config.optim.fused_step = Toggle.on
    one = build(config)
    assert type(one.partition) is plain
    assert not one.decides_on_device
    assert f"engine.{key}: made for DeepSpeed 0.19.8" in caplog.text
    assert train(one, 0, 1)[0].updated
