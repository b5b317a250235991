"""Make a checkpoint of a `transformers` model, so that `train.py` goes on from its weights.

    python scripts/import_hf.py gpt2/ imported/
    python train.py data=text data.path=books/ data.tokenizer=gpt2/ resume=imported/ model.vocab_size=50257 ...

SOURCE is a folder with config.json, safetensors and tokenizer.json of a GPT-2 or Llama model. FOLDER then holds a
checkpoint of step 0 with fresh optimizer moments; the keys of `train.py` that describe the model are printed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import compose, end_on_ctrl_c, run_tool

end_on_ctrl_c(__name__)

import torch
from torch import Tensor

from configs.errors import UserError
from configs.messages import plain
from configs.schema import ModelConfig, RunConfig
from data.tokenizer import fetch_tokenizer, inspect_tokenizer, name_separator
from model import build_model
from model.convert import import_hf
from training import checkpoint, rng
from training.optimizer import LossScale
from training.run import TOKENIZER
from training.state import TrainState


def main(arguments: argparse.Namespace) -> None:
    """Convert, write the checkpoint, say how to go on."""
    config, state = import_hf(arguments.source)
    place = arguments.tokenizer or arguments.source
    if not (place.is_file() or (place / "tokenizer.json").is_file()):
        raise UserError(f"{place} has no tokenizer.json; give one with --tokenizer")
    tokenizer, separator = fetch_tokenizer(str(place), Path())
    info = inspect_tokenizer(tokenizer, separator)
    written = write_checkpoint(config, state, arguments.folder, info.hash)
    shutil.copyfile(place if place.is_file() else place / TOKENIZER, arguments.folder / TOKENIZER)
    name_separator(arguments.folder, info.eos_token)
    print(f"{arguments.source} is now {written}")
    keys = " ".join(overrides(config))
    print(f"Next: python train.py {keys} data.tokenizer={place} resume={arguments.folder} name=NAME")


def write_checkpoint(config: ModelConfig, state: dict[str, Tensor], folder: Path, tokenizer_hash: str) -> Path:
    """A checkpoint of step 0 in `folder`, as one rank writes it."""
    with torch.device("meta"):
        shapes = {name: list(weight.shape) for name, weight in build_model(config).named_parameters()}
    random = rng.capture()
    tensors = {"random.torch_cpu": random.torch_cpu}
    for name in shapes:
        weight = state[name].float().flatten()
        tensors |= {f"{checkpoint.MASTER}.{name}": weight}
        tensors |= {f"{moment}.{name}": torch.zeros_like(weight) for moment in (checkpoint.FIRST, checkpoint.SECOND)}
    manifest = checkpoint.Manifest(
        format=checkpoint.FORMAT,
        step=0,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        state=TrainState(),
        config=values(RunConfig(model=config)),
        tokenizer_hash=tokenizer_hash,
        world_size=1,
        zero_stage=0,
        precision="fp32",
        updates=0,
        loss_scale=LossScale(),
        parameters=shapes,
        versions=checkpoint.installed("torch", "transformers", "flashtrain"),
    )
    parts = {name: (0, state[name].numel()) for name in shapes}
    snapshot = checkpoint.Snapshot(manifest, tensors, parts, random.host)
    target = folder / f"{checkpoint.PREFIX}{0:08d}"
    temporary = folder / (target.name + checkpoint.TEMPORARY)
    checkpoint.prepare(temporary)
    manifest.shards = [checkpoint.write_share(snapshot, temporary, rank=0)]
    checkpoint.publish(manifest, temporary, target)
    return target


def overrides(config: ModelConfig) -> list[str]:
    """The keys of `train.py` that make this model of the one it trains when nothing is said."""
    default, wanted = values(compose().model), values(config)
    changed = {key: value for key, value in wanted.items() if value != default[key]}
    return [f"model.{key}={'null' if value is None else value}" for key, value in changed.items()]


def values(config: ModelConfig | RunConfig) -> dict[str, Any]:
    """A section as plain values."""
    nested = plain(config)
    assert isinstance(nested, dict)
    return nested


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of a transformers model")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write the checkpoint into")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder; else SOURCE's")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(lambda: main(parse()))
