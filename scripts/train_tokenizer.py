"""Train a byte-level BPE on the training split of a corpus.

    python scripts/train_tokenizer.py data=text data.path=books/ data.tokenizer_vocab_size=32768

Takes the keys of `train.py`. The tokenizer stays in `data.cache_dir`, where `train.py` and `scripts/prepare_data.py`
with the same keys find it; `data.tokenizer=FILE` uses it for another corpus.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import end_on_ctrl_c, launch

end_on_ctrl_c(__name__)

from rich.console import Console
from tokenizers import Tokenizer

from configs.schema import RunConfig
from data.errors import DataError
from data.preparation import prepare_tokenizer
from data.progress import show_progress
from data.tokenizer import inspect_tokenizer

EXAMPLE = "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)  # naïve 🙂\n"


def main(config: RunConfig) -> int:
    """Trains the tokenizer and shows how it cuts a line."""
    if config.data.tokenizer != "train":
        raise DataError(f"data.tokenizer={config.data.tokenizer} exists already; data.tokenizer=train trains one.")
    with show_progress() as progress:
        path = prepare_tokenizer(config.data, progress)
    tokenizer = Tokenizer.from_file(str(path))
    info = inspect_tokenizer(tokenizer)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(EXAMPLE).ids]
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"Tokenizer  {path}")
    console.print(f"Vocabulary {info.vocab_size:,} tokens; {info.eos_token} is {info.eos_id}")
    console.print(f"Example    {'|'.join(pieces)!r}")
    console.print(f"Next       python scripts/prepare_data.py with the same keys, or data.tokenizer={path}")
    return 0


if __name__ == "__main__":
    launch(main)
