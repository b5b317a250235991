"""Prepare a corpus for training: tokenizer, token shards, validation split.

    python scripts/prepare_data.py experiment=quickstart
    python scripts/prepare_data.py data=jsonl data.path='corpus/*.jsonl.zst' data.tokenizer=gpt2 data.num_workers=16

Takes the keys of `train.py`, and finds what `train.py` with the same `data` keys will find. What is prepared already is
used as it is; what was interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import end_on_ctrl_c, launch

end_on_ctrl_c(__name__)

from rich.console import Console
from rich.table import Table

from configs.schema import Packing, RunConfig
from data.packing import pack_dataset
from data.preparation import PreparedData, prepare
from data.progress import show_progress
from data.report import describe_packing
from data.shards import SPLITS


def main(config: RunConfig) -> int:
    """Prepares and says what there is."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with show_progress() as progress:
        prepared = prepare(config.data, progress)
    console.print(summary(prepared))
    for line in packing_lines(prepared, config):
        console.print(line)
    for part in prepared.parts:
        console.print(f"Corpus     {part.folder}")
    console.print(f"Tokenizer  {prepared.tokenizer_path} ({prepared.vocab_size:,} tokens)")
    console.print("Next       python train.py with the same data keys; scripts/inspect_data.py shows what is in it.")
    return 0


def packing_lines(prepared: PreparedData, config: RunConfig) -> Iterator[str]:
    """With `data.packing=best_fit` its waste at `model.sequence_length`, of each source of a mixture."""
    for part in prepared.parts if config.data.packing is Packing.best_fit else ():
        packing = pack_dataset(part.train, config.model.sequence_length)
        yield f"Packing    {f'{part.name} train'.strip()}: {describe_packing(packing, part.train)}"


def summary(prepared: PreparedData) -> Table:
    """Counts of both splits, of each source of a mixture."""
    table = Table("split")
    for name in ("documents", "tokens", "MB of text", "bytes per token", "shards"):
        table.add_column(name, justify="right")
    for part, name in product(prepared.parts, SPLITS):
        dataset = part.train if name == "train" else part.validation
        table.add_row(
            f"{part.name} {name}".strip(),
            f"{dataset.num_documents:,}",
            f"{dataset.num_tokens:,}",
            f"{dataset.num_bytes / 1e6:,.2f}",
            f"{dataset.bytes_per_token:.3f}",
            str(len(dataset.info.shards)),
        )
    return table


if __name__ == "__main__":
    launch(main)
