"""The order of samples: pure arithmetic, the same on every rank, nothing stored.

Legend: N tokens of the dataset, S tokens a sample, n = (N - 1) // S samples an epoch, p position (samples consumed).

Sample i of an epoch takes the tokens [o + iS, o + iS + S] (S inputs and, one further, S targets), so that neighbours
share one token as input and target and every token is a target exactly once an epoch. N - 1 - nS < S tokens, the tail,
do not fill a sample. With shuffling each epoch has its own offset o, drawn from [0, tail], so that it isn't always the
same tokens that are left out; in corpus order o is 0.

A mixture of K sources deals its positions out in blocks of M = 4096: in each block source k has exactly q_k positions
(its quota, the share rounded to a whole number; together they are M), at places that a permutation drawn for the block
chooses. Source k hands its own samples out in its own order, over its own epochs, one at each of its positions. After
any number of whole blocks the tokens of a source are exact; within a block they differ from the share by as much as a
draw without replacement does.

Where documents are packed (`data.packing`), a sample is a row: `RowOrder` gives its number instead of its first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

BLOCK = 4096
"""Positions of a mixture over which the shares of its sources are exact, M."""
_ROUNDS = 8
_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """64 bits that look random (SplitMix64's finaliser, Steele et al. 2014) from 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # wraps modulo 2^64
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(indices: npt.NDArray[np.int64], size: int, key: int) -> npt.NDArray[np.int64]:
    """Images of `indices` under the permutation of [0, size) that `key` chooses; O(len(indices)) time and memory.

    A Feistel network over the smallest power of two that holds `size`: it splits the bits of an index in two halves and
    xors each in turn with a hash of the other, which can be undone, so that it is a bijection for any hash. Images
    outside [0, size) are permuted again until they fall inside (cycle walking, Black & Rogaway 2002), less than once on
    average, which keeps it a bijection.

    Args:
        indices: (n,) in [0, size).
        size: at least 1.
        key: 64 bits.
    """
    bits = max((size - 1).bit_length(), 2)
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    keys = [np.uint64(mix(key ^ (round_ + 1))) for round_ in range(_ROUNDS)]

    def network(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        high, low = values >> low_bits, values & low_mask
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            high ^= _mix_array(low + first) & high_mask
            low ^= _mix_array(high + second) & low_mask
        return (high << low_bits) | low

    images = network(indices.astype(np.uint64))
    while (outside := images >= size).any():
        images[outside] = network(images[outside])
    return images.astype(np.int64)


@dataclass(frozen=True)
class SampleOrder:
    """Which tokens the sample at a position takes: a function of position, seed and sizes alone."""

    num_tokens: int
    sequence_length: int
    seed: int
    shuffle: bool

    @property
    def samples_per_epoch(self) -> int:
        """Samples an epoch, n."""
        return max(self.num_tokens - 1, 0) // self.sequence_length

    @property
    def extent(self) -> int:
        """`starts` are below this."""
        return self.num_tokens

    def starts(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """(count,) first tokens of the samples at `position`, `position` + 1, ...; epochs follow each other."""
        return _over_epochs(self._epoch_starts, self.samples_per_epoch, position, count)

    def _epoch_starts(self, epoch: int, first: int, count: int) -> npt.NDArray[np.int64]:
        indices = np.arange(first, first + count)
        if not self.shuffle:
            return indices * self.sequence_length
        key = _epoch_key(self.seed, epoch)
        tail = self.num_tokens - 1 - self.samples_per_epoch * self.sequence_length
        offset = mix(key) % (tail + 1)
        return permute(indices, self.samples_per_epoch, key) * self.sequence_length + offset


@dataclass(frozen=True)
class RowOrder:
    """Which row of a packed corpus is the sample at a position."""

    num_rows: int
    seed: int
    shuffle: bool

    @property
    def samples_per_epoch(self) -> int:
        """Every row once."""
        return self.num_rows

    @property
    def extent(self) -> int:
        """`starts` are below this."""
        return self.num_rows

    def starts(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """(count,) rows of the samples at `position`, `position` + 1, ...; epochs follow each other."""
        return _over_epochs(self._epoch_rows, self.num_rows, position, count)

    def _epoch_rows(self, epoch: int, first: int, count: int) -> npt.NDArray[np.int64]:
        indices = np.arange(first, first + count)
        return permute(indices, self.num_rows, _epoch_key(self.seed, epoch)) if self.shuffle else indices


def _over_epochs(
    of_epoch: Callable[[int, int, int], npt.NDArray[np.int64]], samples_per_epoch: int, position: int, count: int
) -> npt.NDArray[np.int64]:
    """(count,) what `of_epoch` (epoch, first, count) gives for the samples at `position` and after it."""
    found = []
    while count:
        epoch, first = divmod(position, samples_per_epoch)
        here = min(count, samples_per_epoch - first)
        found.append(of_epoch(epoch, first, here))
        position, count = position + here, count - here
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _epoch_key(seed: int, epoch: int) -> int:
    return mix(mix(seed & _MASK) ^ epoch)


def quotas(weights: Sequence[float], total: int = BLOCK) -> tuple[int, ...]:
    """Whole numbers in proportion to positive `weights` that add up to `total`: the largest remainders round up."""
    exact = [weight * total / sum(weights) for weight in weights]
    parts = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: (parts[index] - exact[index], index))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return tuple(parts)


@dataclass(frozen=True)
class MixtureOrder:
    """Which tokens the sample at a position of a mixture takes, as positions in its sources' tokens laid end to end.

    Of packed sources, which row, their rows laid end to end.
    """

    orders: tuple[SampleOrder | RowOrder, ...]
    """One a source; none of them is empty."""
    quotas: tuple[int, ...]
    """Positions of each source in a block; they add up to `BLOCK`."""
    seed: int

    @property
    def samples_per_epoch(self) -> int:
        """Samples that all sources have together."""
        return sum(order.samples_per_epoch for order in self.orders)

    def starts(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """(count,) first tokens of the samples at `position`, `position` + 1, ..."""
        bases = [0, *accumulate(order.extent for order in self.orders)]
        starts = np.empty(count, np.int64)
        done = 0
        while done < count:
            block, first = divmod(position + done, BLOCK)
            sources = self._sources(block)
            here = sources[first : first + count - done]
            for index, order in enumerate(self.orders):
                places = np.flatnonzero(here == index)
                before = block * self.quotas[index] + int(np.count_nonzero(sources[:first] == index))
                starts[done + places] = bases[index] + order.starts(before, len(places))
            done += len(here)
        return starts

    def samples(self, position: int) -> tuple[int, ...]:
        """Samples that each source has given to the positions before `position`: its tokens over S, exactly."""
        block, first = divmod(position, BLOCK)
        counts = np.bincount(self._sources(block)[:first], minlength=len(self.quotas))
        return tuple(block * quota + int(count) for quota, count in zip(self.quotas, counts, strict=True))

    def _sources(self, block: int) -> npt.NDArray[np.int64]:
        """(BLOCK,) source of each position of a block."""
        key = mix(mix(mix(self.seed & _MASK) ^ BLOCK) ^ block)
        return np.repeat(np.arange(len(self.quotas)), self.quotas)[permute(np.arange(BLOCK), BLOCK, key)]
