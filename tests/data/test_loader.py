"""Batches: the same for any number of ranks and any start, exact document masks, honest threads."""

from __future__ import annotations

import threading
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, MicroBatch, PreparedData, TokenLoader, evaluation_batches
from data.loader import IGNORED
from data.shards import TokenDataset

S = 16


def stream_of(dataset: TokenDataset) -> npt.NDArray[Any]:
    """All tokens of a dataset."""
    return np.concatenate(list(dataset.documents()))


def loader(prepared: PreparedData, **changes: Any) -> TokenLoader:
    """A loader with small settings."""
    arguments: dict[str, Any] = {
        "sequence_length": S,
        "global_batch_size": 8,
        "micro_batch_size": 1,
        "seed": 11,
        "prefetch": 0,
    }
    return TokenLoader(prepared.train, **{**arguments, **changes})


def global_batch(prepared: PreparedData, position: int, steps: int, world_size: int, **changes: Any) -> torch.Tensor:
    """(steps, global batch, 2, S) tokens and targets of all ranks, put together in rank order."""
    ranks = []
    for rank in range(world_size):
        batches = loader(prepared, rank=rank, world_size=world_size, **changes).batches(position)
        ranks.append(torch.stack([_rows(batch.micro_batches) for batch in islice(batches, steps)]))
        batches.close()
    return torch.cat(ranks, dim=1)


def _rows(micro_batches: list[MicroBatch]) -> torch.Tensor:
    return torch.cat([torch.stack([batch.tokens, batch.targets], dim=1) for batch in micro_batches])  # (rows, 2, S)


@settings(max_examples=25, deadline=None)
@given(distance=st.integers(-20, 20), epoch=st.integers(1, 4), micro=st.sampled_from([1, 2]))
def test_batches_are_the_same_for_any_ranks_and_start(
    tiny: PreparedData, distance: int, epoch: int, micro: int
) -> None:
    """Bitwise, around epoch boundaries, also where one falls inside a batch."""
    n = loader(tiny).samples_per_epoch
    position = max(epoch * n + distance, 0)
    expected = global_batch(tiny, position, 3, 1)
    for world_size in (1, 2, 4):
        assert torch.equal(global_batch(tiny, position, 3, world_size, micro_batch_size=micro), expected)
    resumed = global_batch(tiny, position + 8, 2, 2)
    assert torch.equal(resumed, expected[1:])


@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_epoch_holds_each_token_once(tiny: PreparedData, prefetch: int) -> None:
    """Read through the loader: targets of an epoch are the corpus without its tail, each once."""
    stream = stream_of(tiny.train)
    load = loader(tiny, global_batch_size=1, prefetch=prefetch, shuffle=False)
    batches = load.batches(0)
    rows = [next(batches) for _ in range(load.samples_per_epoch)]
    batches.close()
    tokens = np.concatenate([batch.micro_batches[0].tokens[0].numpy() for batch in rows])
    targets = np.concatenate([batch.micro_batches[0].targets[0].numpy() for batch in rows])
    assert np.array_equal(tokens, stream[: len(tokens)])
    assert np.array_equal(targets, stream[1 : len(tokens) + 1])
    assert [batch.next_sample for batch in rows] == list(range(1, len(rows) + 1))
    assert len(stream) - 1 - len(targets) < S


def test_shuffled_rows_are_pieces_of_the_corpus(tiny: PreparedData) -> None:
    stream = stream_of(tiny.train).astype(np.int64)
    windows = {row.tobytes() for row in np.lib.stride_tricks.sliding_window_view(stream, S + 1)}
    batch = next(loader(tiny).batches(3)).micro_batches
    for micro in batch:
        row = np.append(micro.tokens[0].numpy(), micro.targets[0, -1].item())
        assert row.tobytes() in windows
        assert torch.equal(micro.tokens[0, 1:], micro.targets[0, :-1])
        assert micro.tokens.dtype == micro.targets.dtype == torch.int64


def test_valid_tokens_counts_all_ranks(tiny: PreparedData) -> None:
    batches = [next(loader(tiny, rank=rank, world_size=2, micro_batch_size=2).batches(0)) for rank in range(2)]
    counted = sum(int((micro.targets != IGNORED).sum()) for batch in batches for micro in batch.micro_batches)
    assert batches[0].valid_tokens == batches[1].valid_tokens == counted == 8 * S
    assert len(batches[0].micro_batches) == 2


def expected_bounds(tokens: torch.Tensor, eos_id: int) -> list[int]:
    """Document bounds from token ids; right only because no document of the corpus contains the id itself."""
    flat = tokens.flatten().tolist()
    b = tokens.shape[0]
    return sorted({*range(0, b * S + 1, S), *(index for index, token in enumerate(flat) if token == eos_id)})


def test_document_bounds(tiny: PreparedData) -> None:
    """Across rows, shards and epochs; a separator in a text's own words is text and no boundary."""
    load = loader(tiny, micro_batch_size=4, document_mask=True)
    found = 0
    for batch in islice(load.batches(0), 2 * load.samples_per_epoch // 8):
        for micro in batch.micro_batches:
            assert micro.cu_seqlens is not None
            assert micro.cu_seqlens.dtype == torch.int32
            bounds = micro.cu_seqlens.tolist()
            assert bounds == expected_bounds(micro.tokens, tiny.eos_id)
            assert micro.max_seqlen == max(np.diff(bounds))
            assert micro.document_lengths is not None
            assert micro.document_lengths.tolist() == np.diff(bounds).tolist()
            found += len(bounds) - 5
    assert found > 100


def test_document_starts_across_shards(tiny: PreparedData) -> None:
    stream = stream_of(tiny.train)
    separators = np.flatnonzero(stream == tiny.eos_id)
    assert len(tiny.train.info.shards) > 3
    rng = np.random.default_rng(0)
    for start, stop in rng.integers(0, len(stream) + 1, (200, 2)):
        expected = separators[(separators >= start) & (separators < stop)]
        assert np.array_equal(tiny.train.document_starts(int(start), int(stop)), expected)
    assert np.array_equal(tiny.train.document_starts(0, len(stream)), separators)


def test_read_across_shards(tiny: PreparedData) -> None:
    stream = stream_of(tiny.train)
    starts = np.random.default_rng(1).integers(0, len(stream) - 5000, 50)
    rows = tiny.train.read(starts, 5000)  # each over two to four shards
    assert np.array_equal(rows, np.stack([stream[start : start + 5000] for start in starts]))


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("num_sequences", [0, 1, 7, 10**6])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_each_token_once(
    tiny: PreparedData, world_size: int, num_sequences: int, document_mask: bool
) -> None:
    """Equal numbers of equal shapes on every rank, each target on exactly one of them."""
    stream = stream_of(tiny.validation).astype(np.int64)
    ranks = [
        list(
            evaluation_batches(
                tiny.validation,
                sequence_length=S,
                micro_batch_size=3,
                num_sequences=num_sequences,
                rank=rank,
                world_size=world_size,
                document_mask=document_mask,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert {tuple(batch.tokens.shape) for batches in ranks for batch in batches} == {(3, S)}
    in_order = [batch for step in zip(*ranks, strict=True) for batch in step]
    targets = torch.cat([batch.targets.flatten() for batch in in_order])
    tokens = torch.cat([batch.tokens.flatten() for batch in in_order])
    count = len(stream) - 1 if num_sequences in (0, 10**6) else num_sequences * S
    assert np.array_equal(targets[targets != IGNORED].numpy(), stream[1 : count + 1])
    assert np.array_equal(tokens[targets != IGNORED].numpy(), stream[:count])
    for batch in in_order:
        assert (batch.cu_seqlens is not None) == document_mask
        if batch.cu_seqlens is not None:
            assert set(range(0, 3 * S + 1, S)) <= set(batch.cu_seqlens.tolist())
            assert batch.cu_seqlens.diff().min() > 0


def test_sizes_that_do_not_fit(tiny: PreparedData) -> None:
    with pytest.raises(DataError, match=r"global_batch_size=8 .* 3 ranks × train.micro_batch_size=1"):
        loader(tiny, world_size=3)
    with pytest.raises(DataError, match=r"model\.sequence_length=1000000"):
        loader(tiny, sequence_length=1_000_000)


class Broken(TokenDataset):
    """A dataset whose disk fails."""

    def __init__(self, good: TokenDataset) -> None:
        self.__dict__.update(good.__dict__)
        self.reads = 0

    def read(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
        self.reads += 1
        if self.reads > 2:
            raise OSError("input/output error")
        return super().read(starts, length)


def test_an_error_on_the_thread_reaches_the_training_thread(tiny: PreparedData) -> None:
    broken = TokenLoader(
        Broken(tiny.train), sequence_length=S, global_batch_size=1, micro_batch_size=1, seed=0, prefetch=4
    )
    batches = broken.batches(0)
    next(batches)
    next(batches)
    with pytest.raises(OSError, match="input/output error"):
        next(batches)
    assert not any(thread.name == "data-loader" for thread in threading.enumerate())


def test_the_thread_ends_with_the_iterator(tiny: PreparedData) -> None:
    batches = loader(tiny, prefetch=2).batches(0)
    batch = next(batches)
    assert any(thread.name == "data-loader" for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name == "data-loader" for thread in threading.enumerate())
    assert batch.wait_s >= 0


def test_prefetching_changes_nothing(tiny: PreparedData) -> None:
    assert torch.equal(global_batch(tiny, 5, 20, 2, prefetch=3), global_batch(tiny, 5, 20, 2, prefetch=0))


@pytest.mark.gpu
def test_batches_on_the_gpu_are_the_same(tiny: PreparedData) -> None:
    """Copied on a stream of its own while the default stream is busy, with memory that is reused."""
    expected = list(islice(loader(tiny, micro_batch_size=4, document_mask=True).batches(0), 50))
    batches = loader(tiny, micro_batch_size=4, document_mask=True, prefetch=2, device="cuda").batches(0)
    busy = torch.randn(2048, 2048, device="cuda")
    for reference, batch in zip(expected, batches, strict=False):
        busy = busy @ busy.softmax(0)
        for one, other in zip(reference.micro_batches, batch.micro_batches, strict=True):
            assert other.tokens.device.type == "cuda"
            assert torch.equal(one.tokens, other.tokens.cpu())
            assert torch.equal(one.targets, other.targets.cpu())
            assert one.cu_seqlens is not None
            assert other.cu_seqlens is not None
            assert torch.equal(one.cu_seqlens, other.cu_seqlens.cpu())
    batches.close()
