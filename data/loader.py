"""From token shards to batches on the device.

The position in the data is one integer, the samples consumed by all ranks together. `data.order` says which tokens the
sample at a position takes (with `data.packing=best_fit`, which row of documents); a global batch is `global_batch_size`
positions in a row, and rank r of W takes the r-th of W equal parts of it. Nothing depends on what was loaded before, so
that a resumed run, on any number of ranks, sees the batches that an uninterrupted one would have seen.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configs.schema import Packing as PackingKind
from data.errors import DataError
from data.mixture import MixedDataset
from data.order import MixtureOrder, RowOrder, SampleOrder
from data.packing import Packing, pack_dataset
from data.shards import TokenDataset

IGNORED = -100
"""Target of a position that does not count."""
_POLL_S = 0.2


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass of one rank."""

    tokens: Tensor
    """(b, S) int64."""
    targets: Tensor
    """(b, S) int64, the token after each; -100 where there is none that counts."""
    cu_seqlens: Tensor | None
    """(n + 1,) int32: document i is [cu_seqlens[i], cu_seqlens[i + 1]) of the b·S flattened tokens. None: no mask."""
    max_seqlen: int | None
    """Tokens of the longest of these documents."""
    document_lengths: npt.NDArray[np.int64] | None = None
    """(documents,) tokens of each in training, padding left out; stays in host memory. None: no mask."""


@dataclass(frozen=True)
class GlobalBatch:
    """What one rank trains on in one step."""

    micro_batches: list[MicroBatch]
    """This rank's share, in micro-batches."""
    valid_tokens: int
    """Targets that count in the whole global batch, over all ranks."""
    next_sample: int
    """Position after this batch: what a checkpoint stores."""
    wait_s: float
    """Seconds that the training thread waited for this batch."""


class TokenLoader:
    """Global batches of a dataset from any position on, without end.

    Raises DataError where the sizes don't divide or the dataset is shorter than one sample.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        shuffle: bool = True,
        packing: PackingKind = PackingKind.concatenate,
        document_mask: bool = False,
        prefetch: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        """Sizes in sequences; `prefetch` in global batches, 0 loads on the calling thread."""
        if global_batch_size % (world_size * micro_batch_size):
            raise DataError(
                f"train.global_batch_size={global_batch_size} is not a multiple of {world_size} ranks × "
                f"train.micro_batch_size={micro_batch_size}."
            )
        self.packing: Packing | None = None
        self.order: SampleOrder | RowOrder | MixtureOrder
        if packing is PackingKind.best_fit:
            self.packing, self.order = packed_order(dataset, sequence_length, seed, shuffle)
        else:
            self.order = sample_order(dataset, sequence_length, seed, shuffle)
        if self.order.samples_per_epoch == 0:
            raise DataError(
                f"The training split has {dataset.num_tokens} tokens, fewer than one sample of "
                f"model.sequence_length={sequence_length} + 1. Use more text or shorter sequences."
            )
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.document_mask, self.prefetch = document_mask, prefetch
        self.device = torch.device(device)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that hold each token once; of a mixture, those of all its sources together."""
        return self.order.samples_per_epoch

    def source_epochs(self, position: int) -> dict[str, float]:
        """Passes over each source of a mixture in the samples before `position`; empty for a single source."""
        if not isinstance(self.dataset, MixedDataset) or not isinstance(self.order, MixtureOrder):
            return {}
        samples = zip(self.dataset.names, self.order.samples(position), self.order.orders, strict=True)
        return {name: count / order.samples_per_epoch for name, count, order in samples}

    def position_after(self, num_targets: int) -> int:
        """Samples from the beginning that hold `num_targets` targets: where a run goes on whose samples were others.

        Without packing exact, but for the part of a sample, which is read again. Rows are filled differently: with
        packing they hold as many on average.
        """
        if self.packing is None:
            return num_targets // self.sequence_length
        weights = None
        if isinstance(self.order, MixtureOrder):
            rows = [order.samples_per_epoch for order in self.order.orders]
            weights = np.repeat(np.divide(self.order.quotas, rows), rows)  # (rows of all,): those of a source are alike
        return round(num_targets / float(np.average(self.packing.row_tokens, weights=weights)))

    def batches(self, start_sample: int = 0) -> Generator[GlobalBatch, None, None]:
        """Batches from the position `start_sample` on, over epoch after epoch.

        Loaded ahead on a thread that ends with the iterator (`close()`, or when it is dropped). An error on the thread
        is raised here.
        """
        return self._ahead(start_sample) if self.prefetch > 0 else self._directly(start_sample)

    def _directly(self, position: int) -> Generator[GlobalBatch, None, None]:
        while True:
            begin = time.perf_counter()
            micro_batches = [place(batch, self.device) for batch in self._load(position)]
            position += self.global_batch_size
            yield self._global_batch(micro_batches, position, time.perf_counter() - begin)

    def _ahead(self, position: int) -> Generator[GlobalBatch, None, None]:
        stream = _Prefetcher(self, position)
        try:
            while True:
                begin = time.perf_counter()
                micro_batches = stream.get()
                position += self.global_batch_size
                yield self._global_batch(micro_batches, position, time.perf_counter() - begin)
        finally:
            stream.close()

    def _global_batch(self, micro_batches: list[MicroBatch], position: int, wait_s: float) -> GlobalBatch:
        valid_tokens = self._valid_tokens(position - self.global_batch_size)
        return GlobalBatch(micro_batches, valid_tokens, position, wait_s)

    def _valid_tokens(self, position: int) -> int:
        """Targets of the global batch at `position`: known without asking the other ranks."""
        if self.packing is None:  # every position of the stream has one
            return self.global_batch_size * self.sequence_length
        return int(self.packing.row_tokens[self.order.starts(position, self.global_batch_size)].sum())

    def _load(self, position: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch at `position`, in host memory."""
        share = self.global_batch_size // self.world_size
        starts = self.order.starts(position + self.rank * share, share)  # (share,)
        groups = starts.reshape(-1, self.micro_batch_size)  # (accumulation, b)
        if self.packing is not None:
            return [make_packed_micro_batch(self.dataset, self.packing, group, self.document_mask) for group in groups]
        return [make_micro_batch(self.dataset, group, self.sequence_length, self.document_mask) for group in groups]


def sample_order(dataset: TokenDataset, sequence_length: int, seed: int, shuffle: bool) -> SampleOrder | MixtureOrder:
    """The order of a dataset's samples, mixed where it is a mixture."""
    if isinstance(dataset, MixedDataset):
        return dataset.order(sequence_length, seed, shuffle)
    return SampleOrder(dataset.num_tokens, sequence_length, seed, shuffle)


def packed_order(
    dataset: TokenDataset, sequence_length: int, seed: int, shuffle: bool
) -> tuple[Packing, RowOrder | MixtureOrder]:
    """The rows of a dataset and their order."""
    if isinstance(dataset, MixedDataset):
        return dataset.packed(sequence_length, seed, shuffle)
    packing = pack_dataset(dataset, sequence_length)
    return packing, RowOrder(packing.num_rows, seed, shuffle)


class _Prefetcher:
    """A thread that loads, pins and copies batches ahead of the training thread."""

    def __init__(self, loader: TokenLoader, position: int) -> None:
        self._queue: queue.Queue[tuple[list[MicroBatch], Any] | BaseException] = queue.Queue(loader.prefetch)
        self._stop = threading.Event()
        self._device = loader.device
        self._thread = threading.Thread(target=self._run, args=(loader, position), name="data-loader", daemon=True)
        self._thread.start()

    def _run(self, loader: TokenLoader, position: int) -> None:
        try:
            copier = Copier(self._device)
            while not self._stop.is_set():
                self._put(copier.copy(loader._load(position)))
                position += loader.global_batch_size
        except BaseException as error:  # noqa: BLE001 - raised again on the training thread
            self._put(error)

    def _put(self, item: tuple[list[MicroBatch], Any] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
                return
            except queue.Full:
                continue

    def get(self) -> list[MicroBatch]:
        """The next batch; what the thread failed with is raised."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        micro_batches, event = item
        if event is not None:
            hand_over(micro_batches, event)
        return micro_batches

    def close(self) -> None:
        """Ends the thread and waits for it."""
        self._stop.set()
        self._thread.join()


class Copier:
    """Copies micro-batches to the device on a stream of its own, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, micro_batches: list[MicroBatch]) -> tuple[list[MicroBatch], Any]:
        """The micro-batches on the device, and the event that the computation has to wait for (None on a CPU)."""
        if self.stream is None:
            return [place(batch, self.device) for batch in micro_batches], None
        with torch.cuda.stream(self.stream):
            placed = [place(batch, self.device) for batch in micro_batches]
        return placed, self.stream.record_event()


def hand_over(micro_batches: list[MicroBatch], event: Any) -> None:
    """Makes the current stream wait for the copy, and keeps the memory from reuse until this stream is done with it."""
    current = torch.cuda.current_stream(micro_batches[0].tokens.device)
    current.wait_event(event)
    for batch in micro_batches:
        for tensor in (batch.tokens, batch.targets, batch.cu_seqlens):
            if tensor is not None:
                tensor.record_stream(current)


def place(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch on `device`; to a GPU through pinned memory, without waiting for the copy."""
    if device.type == "cpu":
        return batch

    def move(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    cu_seqlens = None if batch.cu_seqlens is None else move(batch.cu_seqlens)
    return MicroBatch(move(batch.tokens), move(batch.targets), cu_seqlens, batch.max_seqlen, batch.document_lengths)


def make_micro_batch(
    dataset: TokenDataset, starts: npt.NDArray[np.int64], sequence_length: int, document_mask: bool
) -> MicroBatch:
    """The sequences that begin at `starts` (b,), in host memory."""
    rows = dataset.read(starts, sequence_length + 1)  # (b, S + 1)
    tokens = torch.from_numpy(rows[:, :-1].astype(np.int64))  # (b, S)
    targets = torch.from_numpy(rows[:, 1:].astype(np.int64))  # (b, S)
    if not document_mask:
        return MicroBatch(tokens, targets, None, None)
    bounds = document_bounds(dataset, starts, np.full(len(starts), sequence_length), sequence_length)
    lengths = np.diff(bounds).astype(np.int64)
    return MicroBatch(tokens, targets, torch.from_numpy(bounds), int(lengths.max()), lengths)


def make_packed_micro_batch(
    dataset: TokenDataset, packing: Packing, rows: npt.NDArray[np.int64], document_mask: bool
) -> MicroBatch:
    """The packed rows `rows` (b,), in host memory. Padding is token 0 with target -100, a document of its own."""
    S = packing.sequence_length
    tokens = np.zeros((len(rows), S), np.int64)
    targets = np.full((len(rows), S), IGNORED, np.int64)
    bounds, pieces = [0], []
    for index, row in enumerate(rows.tolist()):
        filled = 0
        for start, length in zip(*packing.pieces(row), strict=True):
            end = filled + length
            stream = dataset.read(np.array([start]), length + 1)[0]  # (length + 1,)
            tokens[index, filled:end], targets[index, filled:end] = stream[:-1], stream[1:]
            bounds.append(index * S + end)
            pieces.append(length)
            filled = end
        if filled < S:
            bounds.append((index + 1) * S)
    batch = MicroBatch(torch.from_numpy(tokens), torch.from_numpy(targets), None, None)
    if not document_mask:
        return batch
    cu_seqlens = np.array(bounds, np.int32)  # (n + 1,)
    longest = int(np.diff(cu_seqlens).max())
    return MicroBatch(batch.tokens, batch.targets, torch.from_numpy(cu_seqlens), longest, np.array(pieces, np.int64))


def document_bounds(
    dataset: TokenDataset, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], sequence_length: int
) -> npt.NDArray[np.int32]:
    """(n + 1,) int32 `cu_seqlens`: where documents begin in the flattened (b·S) tokens, and their end.

    A row is a boundary in any case: a document cut by a sample goes on unseen in another. Positions of a row beyond its
    `lengths` (padding) are a document of their own.
    """
    bounds = [np.arange(len(starts) + 1, dtype=np.int64) * sequence_length]
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        bounds.append(dataset.document_starts(start + 1, start + length) - start + row * sequence_length)
        if 0 < length < sequence_length:
            bounds.append(np.array([row * sequence_length + length]))
    return np.sort(np.concatenate(bounds)).astype(np.int32)


def evaluation_batches(
    dataset: TokenDataset,
    *,
    sequence_length: int,
    micro_batch_size: int,
    num_sequences: int = 0,
    rank: int = 0,
    world_size: int = 1,
    document_mask: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[MicroBatch]:
    """This rank's part of the first `num_sequences` sequences of a dataset (0: all), always the same, in order.

    Each target counts on exactly one rank. All ranks get the same number of micro-batches of the same shape, as the
    collectives of ZeRO-3 require; what is missing is filled with targets of -100. With 0, or more than there are, the
    last sequence holds the tokens that don't fill one. Raises DataError where there are no two tokens.
    """
    num_targets = dataset.num_tokens - 1
    if num_targets < 1:
        raise DataError(
            "The validation split is empty. Set data.validation_fraction above 0, or train.eval_every=0 to go without."
        )
    available = -(-num_targets // sequence_length)
    count = min(num_sequences, available) if num_sequences > 0 else available
    device = torch.device(device)
    for first in range(0, count, micro_batch_size * world_size):
        indices = first + rank * micro_batch_size + np.arange(micro_batch_size)
        starts = np.where(indices < count, indices * sequence_length, 0)
        lengths = np.where(indices < count, np.minimum(num_targets - starts, sequence_length), 0)
        yield place(_padded_micro_batch(dataset, starts, lengths, sequence_length, document_mask), device)


def _padded_micro_batch(
    dataset: TokenDataset,
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    sequence_length: int,
    document_mask: bool,
) -> MicroBatch:
    """Like `make_micro_batch`, but row i counts only its first `lengths[i]` targets; the rest is padding."""
    if (lengths == sequence_length).all():
        return make_micro_batch(dataset, starts, sequence_length, document_mask)
    tokens = np.zeros((len(starts), sequence_length), np.int64)
    targets = np.full((len(starts), sequence_length), IGNORED, np.int64)
    for row, (start, length) in enumerate(zip(starts, lengths.tolist(), strict=True)):
        if length:
            stream = dataset.read(np.array([start]), length + 1)[0]  # (length + 1,)
            tokens[row, :length], targets[row, :length] = stream[:-1], stream[1:]
    batch = MicroBatch(torch.from_numpy(tokens), torch.from_numpy(targets), None, None)
    if not document_mask:
        return batch
    bounds = document_bounds(dataset, starts, lengths, sequence_length)
    return MicroBatch(batch.tokens, batch.targets, torch.from_numpy(bounds), int(np.diff(bounds).max()))
