"""Packing: best fit, every token once, no document cut without need, the same batches for any ranks and start."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import MixtureSource, Packing, Source
from data import DataError, PreparedData, TokenLoader, prepare
from data.loader import IGNORED
from data.packing import concatenation_cuts, pack
from tests.data.conftest import jsonl_config, make_texts, write_jsonl
from tests.data.test_loader import global_batch, loader, stream_of
from tests.data.test_tools import tool

BEST_FIT = Packing.best_fit
LENGTHS = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 100)), min_size=1, max_size=120)


def best_fit_decreasing(lengths: list[int], size: int) -> list[int]:
    """Room left in each row, by the textbook: one piece after the other, into the fullest row that holds it."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, free in enumerate(room) if free >= length]
        if fitting:
            room[min(fitting, key=lambda index: room[index])] -= length
        else:
            room.append(size - length)
    return sorted(room)


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 40))
def test_groups_give_what_one_after_the_other_gives(lengths: list[int], size: int) -> None:
    packing = pack(np.array(lengths), size)
    assert sorted(size - packing.row_tokens) == best_fit_decreasing(packing.lengths.tolist(), size)


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 40))
def test_every_token_but_the_last_is_an_input_once(lengths: list[int], size: int) -> None:
    packing = pack(np.array(lengths), size)
    covered = [np.arange(start, start + length) for start, length in zip(packing.starts, packing.lengths, strict=True)]
    assert sorted(np.concatenate([[], *covered])) == list(range(sum(lengths) - 1))
    for row in range(packing.num_rows):
        _, here = packing.pieces(row)
        assert 0 < sum(here) == packing.row_tokens[row] <= size
    total = packing.num_rows * size
    assert packing.padding == pytest.approx(1 - (sum(lengths) - 1) / total if total else 1)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, size=st.integers(2, 40))
def test_only_documents_longer_than_a_row_are_cut(lengths: list[int], size: int) -> None:
    packing = pack(np.array(lengths), size)
    inputs = np.array(lengths)
    inputs[-1] -= 1
    firsts = np.cumsum(lengths) - lengths
    pieces = Counter(np.searchsorted(firsts, packing.starts, side="right") - 1)
    assert pieces == Counter({index: -(-int(length) // size) for index, length in enumerate(inputs) if length})
    assert packing.cut_documents == int((inputs > size).sum())


def test_documents_that_concatenation_cuts() -> None:
    assert concatenation_cuts(np.array([4, 4, 3, 6, 4, 3]), 4) == 2  # [11, 17) and [17, 21)
    assert concatenation_cuts(np.array([4, 4, 4]), 4) == 0


def test_packing_wastes_little_and_does_not_tell_lengths_by_position() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 20_000).astype(np.int64) + 2
    packing = pack(lengths, 1024)
    assert packing.padding < 0.001
    assert packing.cut_documents < 0.4 * concatenation_cuts(lengths, 1024)
    several = np.flatnonzero(np.diff(packing.offsets) > 1)
    first = packing.lengths[packing.offsets[several]].mean()
    last = packing.lengths[packing.offsets[several + 1] - 1].mean()
    assert first == pytest.approx(last, rel=0.1)


@pytest.mark.parametrize("sequence_length", [16, 200])
def test_an_epoch_of_batches(tiny: PreparedData, sequence_length: int) -> None:
    """Tokens, targets, padding, counts and document bounds, over shards, of every row of a shuffled epoch."""
    stream = stream_of(tiny.train).astype(np.int64)
    load = loader(tiny, sequence_length=sequence_length, global_batch_size=1, packing=BEST_FIT, document_mask=True)
    assert load.packing is not None
    assert len(tiny.train.info.shards) > 3
    rows = load.order.starts(0, load.samples_per_epoch)
    assert np.array_equal(np.sort(rows), np.arange(load.packing.num_rows))
    assert not np.array_equal(rows, np.sort(rows))
    for row, batch in zip(rows.tolist(), load.batches(0), strict=False):
        (micro,) = batch.micro_batches
        starts, lengths = load.packing.pieces(row)
        filled = sum(lengths)
        pieces = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        places = np.concatenate(pieces)
        assert np.array_equal(micro.tokens[0, :filled].numpy(), stream[places])
        assert np.array_equal(micro.targets[0, :filled].numpy(), stream[places + 1])
        assert (micro.targets[0, filled:] == IGNORED).all()
        assert batch.valid_tokens == filled == int((micro.targets != IGNORED).sum())
        padding = [sequence_length] if filled < sequence_length else []
        assert micro.cu_seqlens is not None
        assert micro.cu_seqlens.dtype == torch.int32
        assert micro.cu_seqlens.tolist() == [0, *np.cumsum(lengths), *padding]
        assert micro.max_seqlen == micro.cu_seqlens.diff().max()
        assert micro.document_lengths is not None
        assert micro.document_lengths.tolist() == lengths
        for start in starts:  # a piece begins a document, unless that is longer than a row
            assert stream[start] == tiny.eos_id or tiny.train.document_lengths().max() > sequence_length


@pytest.mark.parametrize("micro", [1, 2])
def test_batches_are_the_same_for_any_ranks_and_start(tiny: PreparedData, micro: int) -> None:
    n = loader(tiny, packing=BEST_FIT).samples_per_epoch
    for position in (0, n - 9, 2 * n - 1):
        expected = global_batch(tiny, position, 3, 1, packing=BEST_FIT)
        for world_size in (1, 2, 4):
            found = global_batch(tiny, position, 3, world_size, micro_batch_size=micro, packing=BEST_FIT, prefetch=2)
            assert torch.equal(found, expected)
        assert torch.equal(global_batch(tiny, position + 8, 2, 2, packing=BEST_FIT), expected[1:])
    counts = [
        [batch.valid_tokens for batch in islice(loader(tiny, rank=rank, world_size=2, packing=BEST_FIT).batches(5), 9)]
        for rank in range(2)
    ]
    assert counts[0] == counts[1]
    assert all(
        int((rows[:, 1] != IGNORED).sum()) == count
        for rows, count in zip(global_batch(tiny, 5, 9, 1, packing=BEST_FIT), counts[0], strict=True)
    )


def test_corpus_order_without_shuffling(tiny: PreparedData) -> None:
    load = loader(tiny, packing=BEST_FIT, shuffle=False)
    assert load.packing is not None
    firsts = [min(load.packing.pieces(row)[0]) for row in load.order.starts(0, load.samples_per_epoch)]
    assert firsts == sorted(firsts)


def test_a_mixture_packs_each_source_by_itself(tmp_path: Path) -> None:
    """No row of two sources; the shares are those of the rows."""
    for name, seed in (("a", 1), ("b", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", make_texts(200, seed))
    sources = [
        MixtureSource(name=name, weight=weight, source=Source.jsonl, path=str(tmp_path / f"{name}.jsonl"))
        for name, weight in (("a", 3.0), ("b", 1.0))
    ]
    corpus = prepare(replace(jsonl_config(tmp_path, tmp_path / "cache", mixture=sources), path=None))
    load = TokenLoader(
        corpus.train, sequence_length=64, global_batch_size=8, micro_batch_size=8, seed=1, packing=BEST_FIT, prefetch=0
    )
    assert load.packing is not None
    first = corpus.parts[0].train.num_tokens
    stream = np.concatenate([stream_of(part.train) for part in corpus.parts]).astype(np.int64)
    rows = load.order.starts(0, 4096)
    of_first = 0
    for row in rows.tolist():
        starts, lengths = load.packing.pieces(row)
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        assert max(ends) < first or min(starts) >= first
        of_first += starts[0] < first
    assert of_first == 3072
    row = int(np.flatnonzero(load.packing.starts[load.packing.offsets[rows]] >= first)[0])
    batch = next(load.batches(row)).micro_batches[0]
    starts, lengths = load.packing.pieces(int(rows[row]))
    assert batch.tokens[0, : lengths[0]].tolist() == stream[starts[0] : starts[0] + lengths[0]].tolist()
    assert load.source_epochs(4096)["a"] == 3072 / load.order.orders[0].samples_per_epoch  # type: ignore[union-attr]


def test_a_corpus_without_tokens_to_predict() -> None:
    assert pack(np.array([1]), 8).num_rows == 0
    assert pack(np.array([], np.int64), 8).num_rows == 0


def test_the_loader_names_an_empty_corpus(tmp_path: Path) -> None:
    corpus = prepare(jsonl_config(write_jsonl(tmp_path / "a.jsonl", make_texts(30)), tmp_path / "cache"))
    empty = replace(corpus, train=type(corpus.train)(corpus.folder / "train", type(corpus.train.info)(), "<u2"))
    with pytest.raises(DataError, match="training split has 0 tokens"):
        loader(empty, packing=BEST_FIT)


def test_tools_report_the_waste(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", make_texts(100))
    for name in ("prepare_data", "inspect_data"):
        result = tool(name, tmp_path, "model.sequence_length=128", "data.packing=best_fit")
        assert result.returncode == 0, result.stderr
        assert "best fit in" in result.stdout
        assert "% padding" in result.stdout
        assert "of documents cut (concatenated:" in result.stdout
