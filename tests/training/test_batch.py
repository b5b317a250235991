"""Batch arithmetic: the third key from the other two, and messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema import TrainConfig
from training.batch import BatchPlan, resolve_batch

SIZES = st.integers(1, 64)


def train(total: int | None, micro: int | None, accumulation: int | None) -> TrainConfig:
    return TrainConfig(global_batch_size=total, micro_batch_size=micro, accumulation_steps=accumulation)


@given(SIZES, SIZES, SIZES)
def test_any_two_decide_the_third(world_size: int, micro: int, accumulation: int) -> None:
    total = world_size * micro * accumulation
    plan = BatchPlan(total, micro, accumulation)
    for sizes in [(None, micro, accumulation), (total, None, accumulation), (total, micro, None)]:
        assert resolve_batch(train(*sizes), world_size) == plan
    assert resolve_batch(train(total, micro, accumulation), world_size) == plan


def test_error_names_the_nearest_values_that_divide() -> None:
    with pytest.raises(UserError) as error:
        resolve_batch(train(100, 12, None), 2)
    assert str(error.value) == (
        "train.global_batch_size=100 is not a multiple of 2 ranks × train.micro_batch_size=12; "
        "nearest train.global_batch_size: 96 or 120; nearest train.micro_batch_size: 10 or 25"
    )
    with pytest.raises(UserError, match=r"train\.accumulation_steps=3; nearest train\.global_batch_size: 3 or 6"):
        resolve_batch(train(4, None, 3), 1)


def test_error_for_a_global_batch_below_one_round() -> None:
    with pytest.raises(UserError, match=r"nearest train\.global_batch_size: 64$"):
        resolve_batch(train(5, 32, None), 2)


@pytest.mark.parametrize("sizes", [(None, None, None), (None, None, 8)])
def test_too_few_keys(sizes: tuple[int | None, ...]) -> None:
    with pytest.raises(UserError, match=r"give train\.global_batch_size or train\.micro_batch_size"):
        resolve_batch(train(*sizes), 1)


def test_one_size_alone_means_no_accumulation() -> None:
    assert resolve_batch(train(8, None, None), 2) == BatchPlan(8, 4, 1)
    assert resolve_batch(train(None, 8, None), 2) == BatchPlan(16, 8, 1)


def test_three_keys_that_contradict() -> None:
    with pytest.raises(UserError, match=r"1 rank × 2 × 4 = 8 sequences, not 16"):
        resolve_batch(train(16, 4, 2), 1)


@pytest.mark.parametrize("sizes", [(0, 4, None), (8, -1, None), (None, 4, 0)])
def test_sizes_below_one(sizes: tuple[int | None, ...]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        resolve_batch(train(*sizes), 1)
