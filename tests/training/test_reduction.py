"""`engine.lean_zero3`: sums of gradients in the order of ranks, and what is trained with them, against DeepSpeed's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Device, Precision, RunConfig, Toggle
from tests.ranks import on_ranks
from tests.training.conftest import Build, make_engine, run_config, train
from training import backend, distributed, engine
from training.backend import should_be_lean
from training.reduction import ShardedSums, in_rows
from training.zero import GATHER_STREAM, LeanStage3, Stage3

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


PRECISIONS = (Precision.fp32, Precision.bf16)


def config_of(precision: Precision, lean: Toggle) -> RunConfig:
    config = run_config(3, accumulation=2, micro=2, lean_zero3=lean, bucket_size=5000)
    config.engine.precision, config.engine.fuse_weight_gradients = precision, Toggle.off
    config.optim.grad_clip = 0.0  # the norm's last digits would be in everything
    return config


def courses() -> dict[tuple[Precision, Toggle], Any]:
    """On one of the ranks, by precision and `engine.lean_zero3`: losses and norms of four steps, the third of them with
    a loss that isn't finite, and this rank's masters and moments."""
    own = distributed.init(Device.cpu, timeout_minutes=0.5)
    # On one rank PyTorch's, which rounds otherwise, would take the place of ZeRO-3's `linear`.
    backend.keeps_plain_linear = engine.keeps_plain_linear = lambda *_: False  # type: ignore[attr-defined]
    found = {}
    for precision in PRECISIONS:
        for lean in (Toggle.off, Toggle.on):
            one = make_engine(config_of(precision, lean), own)
            assert (type(one.partition) is LeanStage3) == (lean is Toggle.on)
            results, plain = train(one, 0, 2), one.forward
            one.forward = lambda micro, plain=plain: plain(micro) * torch.nan  # type: ignore[method-assign]
            assert not train(one, 2, 3)[0].updated
            one.forward = plain  # type: ignore[method-assign]
            results += train(one, 3, 5)
            parts = [t.clone().numpy() for f in one.partition.fragments() for t in (f.master, f.exp_avg, f.exp_avg_sq)]
            found[precision, lean] = ([(r.loss, r.grad_norm) for r in results], parts)
            one.close()
    own.close()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_trains_as_deepspeed_bit_for_bit(ranks: int) -> None:
    """Division by two is exact, before a sum or after it. Norms: the sums' order differs."""
    for found in on_ranks(ranks, courses):
        for precision in PRECISIONS:
            (theirs, their_parts), (ours, our_parts) = (found[precision, lean] for lean in (Toggle.off, Toggle.on))
            assert [loss for loss, _ in ours] == [loss for loss, _ in theirs]
            assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in theirs], rel=1e-6)
            assert len(our_parts) == len(their_parts) > 0
            for left, right in zip(our_parts, their_parts, strict=True):
                assert (left == right).all()


def test_parameters_of_one_rank_are_what_the_optimizer_updates(build: Build) -> None:
    """They stay, at the same place, from the third step, when ZeRO-3 has traced a step."""
    one = build(config_of(Precision.bf16, Toggle.on))
    train(one, 0, 3)
    places = [p.data_ptr() for p in one.module.parameters()]
    flats = [flat.untyped_storage().data_ptr() for flat in one.partition.wrapper.fp16_partitioned_groups_flat]
    train(one, 3, 5)
    assert [p.data_ptr() for p in one.module.parameters()] == places
    assert {p.untyped_storage().data_ptr() for p in one.module.parameters()} == set(flats)


class Waits:
    """A stream that notes which other it was told to wait for."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def wait_stream(self, other: Waits) -> None:
        self.order.append(f"{self.name} waits for {other.name}")


def order_of_a_step() -> list[str]:
    """What a step of two ranks does, in order, to the streams that compute and gather, and between."""
    own = distributed.init(Device.cpu, timeout_minutes=5)
    one = make_engine(config_of(Precision.bf16, Toggle.on), own)
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


def test_where_it_is_possible(build: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes it there and nowhere else, `on` refuses elsewhere, an unknown wrapper is left as it is."""
    for stage, keys in [(2, {}), (3, {"fp32_accumulation": False}), (3, {"offload_params": True})]:
        assert not should_be_lean(run_config(stage, **keys).engine)
        with pytest.raises(UserError, match=r"engine\.lean_zero3=on: needs .* or off"):
            should_be_lean(run_config(stage, lean_zero3=Toggle.on, **keys).engine)
    monkeypatch.setattr(LeanStage3, "knows", staticmethod(lambda _: False))
    one = build(config_of(Precision.fp32, Toggle.on))
    assert type(one.partition) is Stage3
    assert "engine.lean_zero3: made for DeepSpeed 0.19.8" in caplog.text
    assert train(one, 0, 1)[0].updated
