"""Best-fit packing: whole documents in rows of S tokens, instead of one stream that is cut every S tokens.

Legend: S tokens a row, L tokens of a document with its separator, r free tokens of a row.

Concatenation wastes nothing, but cuts most documents longer than a fraction of S, and what a piece refers to may be in
another sample. Best-fit decreasing (Johnson 1974; for pretraining Ding et al. 2024, "Fewer Truncations Improve Language
Modeling") cuts only documents longer than S, into pieces of S and a rest; then it takes the pieces by length, the
longest first, and puts each into the row with the least room that still holds it. What stays free in a row is padding.

Pieces of one length are interchangeable, and so are rows with equal room. So the work goes by groups of both: with all
pieces of one length, the row with the least room takes as many as fit before the next row is looked at, which is what
best fit does with one after the other. The cost is O(documents · log) for a sort, and a step for each pair of groups.

A piece begins at some token of the stream and takes the tokens from there as inputs, those one further as targets: as
without packing, the last target of a document is the next one's separator. The stream's last token has no target and is
no input. Everything follows from the lengths of the documents and S, so that every rank computes the same rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.order import permute
from data.shards import TokenDataset

_ORDER_KEY = 0x5EED
"""Of the permutation that orders the pieces within their rows."""


@dataclass(frozen=True)
class Packing:
    """Rows of pieces of documents. Memory: 16 bytes a piece and 16 a row."""

    sequence_length: int
    offsets: npt.NDArray[np.int64]
    """(rows + 1,): row i holds the pieces [offsets[i], offsets[i + 1])."""
    starts: npt.NDArray[np.int64]
    """(pieces,) first token of each piece in the stream."""
    lengths: npt.NDArray[np.int64]
    """(pieces,) its inputs; as many targets."""
    row_tokens: npt.NDArray[np.int64]
    """(rows,) inputs of each row; the rest of it is padding."""
    cut_documents: int
    """Documents that are in more than one piece."""

    @property
    def num_rows(self) -> int:
        """Rows: the samples of an epoch."""
        return len(self.row_tokens)

    @property
    def padding(self) -> float:
        """Share of the rows' tokens that is padding: the waste."""
        return 1 - int(self.row_tokens.sum()) / max(self.num_rows * self.sequence_length, 1)

    def pieces(self, row: int) -> tuple[list[int], list[int]]:
        """Starts and lengths of the pieces of a row."""
        here = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return self.starts[here].tolist(), self.lengths[here].tolist()


def pack_dataset(dataset: TokenDataset, sequence_length: int) -> Packing:
    """The rows of one corpus."""
    return pack(dataset.document_lengths(), sequence_length)


def pack(document_lengths: npt.NDArray[np.int64], sequence_length: int) -> Packing:
    """Best-fit decreasing.

    Args:
        document_lengths: (documents,) tokens of each, separators included, in the order of the stream.
        sequence_length: S.
    """
    starts, lengths, cut_documents = _cut(document_lengths, sequence_length)
    rows = _best_fit(lengths, sequence_length)
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    rows = _by_first_token(rows, starts, num_rows)
    # By length, long pieces would always begin a row and short ones never: a position must not tell the length.
    shuffled = permute(np.arange(len(rows)), max(len(rows), 1), _ORDER_KEY)
    order = np.lexsort((shuffled, rows))
    offsets = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=num_rows), out=offsets[1:])
    row_tokens = np.zeros(num_rows, np.int64)
    np.add.at(row_tokens, rows, lengths)
    return Packing(sequence_length, offsets, starts[order], lengths[order], row_tokens, cut_documents)


def join(packings: Sequence[Packing], num_tokens: Sequence[int]) -> Packing:
    """The rows of several corpora whose streams, of `num_tokens` each, lie end to end."""
    bases = np.cumsum([0, *num_tokens])
    pieces = np.cumsum([0, *(len(packing.starts) for packing in packings)])
    offsets = [packing.offsets[1:] + first for packing, first in zip(packings, pieces, strict=False)]
    return Packing(
        packings[0].sequence_length,
        np.concatenate([[0], *offsets]),
        np.concatenate([packing.starts + base for packing, base in zip(packings, bases, strict=False)]),
        np.concatenate([packing.lengths for packing in packings]),
        np.concatenate([packing.row_tokens for packing in packings]),
        sum(packing.cut_documents for packing in packings),
    )


def concatenation_cuts(document_lengths: npt.NDArray[np.int64], sequence_length: int) -> int:
    """Documents that samples of S tokens, one after the other, would cut: the figure to compare with."""
    ends = np.cumsum(document_lengths)
    return int(np.count_nonzero((ends - document_lengths) // sequence_length != (ends - 1) // sequence_length))


def _cut(
    document_lengths: npt.NDArray[np.int64], sequence_length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Starts and lengths, at most S, of the pieces of all documents, and how many documents have several."""
    starts = np.cumsum(document_lengths) - document_lengths
    lengths = document_lengths.copy()
    if len(lengths):
        lengths[-1] -= 1  # the last token has no target
    counts = -(-lengths // sequence_length)  # (documents,) pieces
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # number of a piece in its document
    piece_lengths = np.minimum(np.repeat(lengths, counts) - index * sequence_length, sequence_length)
    return np.repeat(starts, counts) + index * sequence_length, piece_lengths, int(np.count_nonzero(counts > 1))


def _best_fit(lengths: npt.NDArray[np.int64], sequence_length: int) -> npt.NDArray[np.int64]:
    """(pieces,) row of each piece."""
    rows = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    bounds = np.flatnonzero(np.diff(lengths[order], prepend=-1))  # where the next length begins
    room: dict[int, npt.NDArray[np.int64]] = {}  # r → rows with so much room
    sizes: list[int] = []  # the keys of `room`, sorted
    num_rows = 0
    for pieces in np.split(order, bounds[1:]) if len(order) else []:
        length = int(lengths[pieces[0]])
        while len(pieces):
            first = bisect_left(sizes, length)
            if first < len(sizes):
                free = sizes.pop(first)
                candidates = room.pop(free)
            else:
                free = sequence_length
                candidates = np.arange(num_rows, num_rows - (-len(pieces) // (free // length)))
                num_rows += len(candidates)
            taken = _fill(rows, pieces, candidates, free // length)
            pieces = pieces[int(taken.sum()) :]
            for count in np.unique(taken).tolist():  # at most three: full rows, one that is not, untouched ones
                _add(room, sizes, free - count * length, candidates[taken == count])
    return rows


def _fill(
    rows: npt.NDArray[np.int64], pieces: npt.NDArray[np.int64], candidates: npt.NDArray[np.int64], most: int
) -> npt.NDArray[np.int64]:
    """Put up to `most` pieces into each candidate row, one row after the other; (candidates,) how many each took."""
    count = min(len(pieces), len(candidates) * most)
    taken = np.clip(count - np.arange(len(candidates)) * most, 0, most)
    rows[pieces[:count]] = np.repeat(candidates, taken)
    return taken


def _add(room: dict[int, npt.NDArray[np.int64]], sizes: list[int], free: int, rows: npt.NDArray[np.int64]) -> None:
    """File rows under their room."""
    if free in room:
        room[free] = np.concatenate([room[free], rows])
    elif free:
        room[free] = rows
        insort(sizes, free)


def _by_first_token(rows: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], num_rows: int) -> npt.NDArray[np.int64]:
    """The same rows, numbered by their earliest token: the order of the corpus, as far as there is one."""
    firsts = np.full(num_rows, np.iinfo(np.int64).max)
    np.minimum.at(firsts, rows, starts)
    numbers = np.empty(num_rows, np.int64)
    numbers[np.argsort(firsts)] = np.arange(num_rows)
    return numbers[rows]
