"""Look into a prepared corpus: samples, lengths of documents, duplicates, tokens per byte.

    python scripts/inspect_data.py experiment=quickstart
    python scripts/inspect_data.py data=jsonl data.path=corpus.jsonl seed=7

Takes the keys of `train.py`; prepares the corpus if it isn't yet. Checks the checksums of all shards, decodes two
samples as training sees them (`model.sequence_length`, `seed`), and writes a histogram of document lengths beside the
shards.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import end_on_ctrl_c, launch

end_on_ctrl_c(__name__)

import numpy as np
from rich.console import Console

from configs.schema import RunConfig
from data.loader import IGNORED, TokenLoader
from data.preparation import PreparedData, load_tokenizer, prepare
from data.progress import show_progress
from data.report import duplicates, plot_lengths
from scripts.prepare_data import packing_lines, summary

SAMPLES = 2
SAMPLE_CHARS = 700


def main(config: RunConfig) -> int:
    """Prints the report and writes the picture."""
    with show_progress() as progress:
        prepared = prepare(config.data, progress)
    prepared.train.verify()
    prepared.validation.verify()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(summary(prepared))
    lengths = prepared.train.document_lengths()
    quantiles = np.quantile(lengths, [0.05, 0.5, 0.95]).astype(int).tolist()
    console.print(f"Document lengths  5 %, 50 %, 95 %: {quantiles} tokens; longest {lengths.max():,}")
    console.print(f"Tokens per byte   {1 / prepared.train.bytes_per_token:.4f}")
    repeated, looked_at = duplicates(prepared.train)
    console.print(
        f"Duplicates        {repeated / looked_at:.2%} of {looked_at:,} documents repeat an earlier one exactly"
    )
    loader = sample_loader(prepared, config)
    console.print(f"Samples an epoch  {loader.samples_per_epoch:,}")
    for line in packing_lines(prepared, config):
        console.print(line)
    show_samples(loader, prepared, console)
    picture = prepared.folder / "document_lengths.png"
    by_split = {f"{part.name} train".strip(): part.train.document_lengths() for part in prepared.parts}
    by_split |= {f"{part.name} validation".strip(): part.validation.document_lengths() for part in prepared.parts}
    plot_lengths(by_split, picture)
    console.print(f"\nChecksums agree. Histogram of document lengths: {picture}")
    return 0


def sample_loader(prepared: PreparedData, config: RunConfig) -> TokenLoader:
    """The loader of training, for a few samples."""
    return TokenLoader(
        prepared.train,
        sequence_length=config.model.sequence_length,
        global_batch_size=SAMPLES,
        micro_batch_size=SAMPLES,
        seed=config.seed,
        shuffle=config.data.shuffle,
        packing=config.data.packing,
        prefetch=0,
    )


def show_samples(loader: TokenLoader, prepared: PreparedData, console: Console) -> None:
    """The first samples of training, decoded, without padding; `¶` marks where a document begins."""
    tokenizer = load_tokenizer(prepared)
    batch = next(loader.batches()).micro_batches[0]
    for number, (tokens, targets) in enumerate(zip(batch.tokens, batch.targets, strict=True)):
        kept = tokens[targets != IGNORED].tolist()
        text = tokenizer.decode(kept, skip_special_tokens=False).replace(prepared.manifest.eos_token, "¶")
        console.print(f"\n--- sample {number} ---\n{text[:SAMPLE_CHARS]}{' ...' if len(text) > SAMPLE_CHARS else ''}")


if __name__ == "__main__":
    launch(main)
