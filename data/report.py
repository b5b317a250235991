"""Figures about a prepared corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.packing import Packing, concatenation_cuts
from data.shards import TokenDataset

MOST_DOCUMENTS = 5_000_000


def duplicates(dataset: TokenDataset) -> tuple[int, int]:
    """Documents that repeat an earlier one exactly, and documents looked at: at most five million."""
    looked_at = min(dataset.num_documents, MOST_DOCUMENTS)
    hashes = np.empty(looked_at, np.uint64)
    for index, tokens in enumerate(dataset.documents(0, looked_at)):
        hashes[index] = int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")
    return looked_at - len(np.unique(hashes)), looked_at


def describe_packing(packing: Packing, dataset: TokenDataset) -> str:
    """What best fit packing costs, its padding, and what it is for, documents that stay whole."""
    count = max(dataset.num_documents, 1)
    others = concatenation_cuts(dataset.document_lengths(), packing.sequence_length)
    return (
        f"best fit in {packing.num_rows:,} samples of {packing.sequence_length:,} tokens: {packing.padding:.2%} "
        f"padding, {packing.cut_documents / count:.2%} of documents cut (concatenated: {others / count:.2%})"
    )


def plot_lengths(lengths: Mapping[str, npt.NDArray[np.int64]], path: Path) -> None:
    """Writes a histogram of document lengths in tokens, a line for each split, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = max((int(values.max()) for values in lengths.values() if len(values)), default=1)
    bins = np.geomspace(1, longest + 1, 60).tolist()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, values in lengths.items():
        axes.hist(values, bins=bins, histtype="step", linewidth=1.5, label=f"{name}: {len(values):,} documents")
    axes.set(xscale="log", yscale="log", xlabel="tokens per document", ylabel="documents")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
