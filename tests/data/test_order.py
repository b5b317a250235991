"""The order of samples: a bijection, computed without a table, the same wherever one begins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import SampleOrder, mix, permute


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    images = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(images), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permute_does_not_depend_on_its_neighbours(size: int, key: int, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = permute(indices, size, key)
    alone = np.concatenate([permute(index[None], size, key) for index in indices])
    assert np.array_equal(together, alone)
    assert ((together >= 0) & (together < size)).all()


def test_permute_shuffles() -> None:
    """Displacements and neighbours look like those of a random permutation, for sizes on both sides of a power of 2."""
    for size in (4095, 4097, 10_000):
        images = np.stack([permute(np.arange(size), size, mix(key)) for key in range(8)])
        displacement = np.abs(images - np.arange(size)).mean() / size
        assert displacement == pytest.approx(1 / 3, abs=0.01)  # of two independent uniform variables
        gaps = np.abs(np.diff(images, axis=1)).mean() / size
        assert gaps == pytest.approx(1 / 3, abs=0.01)
        fixed_points = (images == np.arange(size)).sum(1).mean()
        assert fixed_points < 4  # 1 expected
    first, second = permute(np.arange(1000), 1000, 1), permute(np.arange(1000), 1000, 2)
    assert (first == second).sum() < 10


@settings(max_examples=80, deadline=None)
@given(
    num_tokens=st.integers(20, 400),
    sequence_length=st.integers(1, 19),
    seed=st.integers(0, 2**63),
    shuffle=st.booleans(),
)
def test_each_token_is_a_target_once_an_epoch(num_tokens: int, sequence_length: int, seed: int, shuffle: bool) -> None:
    order = SampleOrder(num_tokens, sequence_length, seed, shuffle)
    n = order.samples_per_epoch
    for epoch in range(3):
        starts = order.starts(epoch * n, n)
        targets = (starts[:, None] + 1 + np.arange(sequence_length)).ravel()
        assert len(np.unique(targets)) == n * sequence_length
        assert targets.min() >= 1
        assert targets.max() <= num_tokens - 1
        assert num_tokens - 1 - len(targets) < sequence_length  # what is left out is less than a sample


def test_the_tail_that_is_left_out_changes() -> None:
    order = SampleOrder(num_tokens=1000, sequence_length=64, seed=3, shuffle=True)
    n = order.samples_per_epoch
    offsets = {int(order.starts(epoch * n, n).min()) for epoch in range(50)}
    assert len(offsets) > 10
    assert min(offsets) >= 0


@settings(max_examples=80, deadline=None)
@given(
    position=st.integers(0, 1000), counts=st.lists(st.integers(1, 50), min_size=1, max_size=8), shuffle=st.booleans()
)
def test_samples_do_not_depend_on_where_one_begins(position: int, counts: list[int], shuffle: bool) -> None:
    order = SampleOrder(num_tokens=300, sequence_length=8, seed=5, shuffle=shuffle)  # 37 samples an epoch
    whole = order.starts(position, sum(counts))
    ends = np.cumsum(counts)
    parts = [order.starts(position + int(end) - count, count) for end, count in zip(ends, counts, strict=True)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_epochs_and_seeds_differ_and_corpus_order_does_not() -> None:
    shuffled = SampleOrder(10_000, 10, 1, True)
    n = shuffled.samples_per_epoch
    assert not np.array_equal(shuffled.starts(0, n), shuffled.starts(n, n))
    assert not np.array_equal(shuffled.starts(0, n), SampleOrder(10_000, 10, 2, True).starts(0, n))
    in_order = SampleOrder(10_000, 10, 1, False)
    assert np.array_equal(in_order.starts(n - 1, 3), [(n - 1) * 10, 0, 10])
