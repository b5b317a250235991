"""Write a trained model as a folder for `transformers`.

    python scripts/export_hf.py runs/quickstart exported/
    python scripts/export_hf.py runs/gpt2_124m/checkpoints/step_00010000 exported/ --dtype bf16

SOURCE is a run folder (its newest checkpoint is taken) or one checkpoint, of any number of ranks and any ZeRO stage.
FOLDER then holds config.json, safetensors and the tokenizer, and loads with `AutoModelForCausalLM.from_pretrained`.
GPT-2 and Llama architectures can be expressed; for others the message names the keys in the way.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer

from configs import say, to_dataclass
from configs.errors import UserError
from configs.schema import RunConfig
from data.preparation import prepare_tokenizer
from data.tokenizer import fetch_tokenizer, inspect_tokenizer
from model.convert import export_hf, hf_architecture
from training.checkpoint import CheckpointError, consolidated_weights, find_checkpoint, read_manifest
from training.shards import CorruptError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: argparse.Namespace) -> None:
    """Read the checkpoint, find its tokenizer, write the folder."""
    checkpoint = find_checkpoint(arguments.source)
    try:
        manifest = read_manifest(checkpoint)
    except CorruptError as error:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {error}") from error
    composed = OmegaConf.merge(OmegaConf.structured(RunConfig), manifest.config)
    assert isinstance(composed, DictConfig)
    run = to_dataclass(composed, "config")
    hf_architecture(run.model)  # before the weights are read
    path = find_tokenizer(run, arguments.tokenizer, manifest.tokenizer_hash)
    info = inspect_tokenizer(Tokenizer.from_file(str(path)))
    config = replace(run.model, vocab_size=run.model.vocab_size or info.vocab_size)
    dtype = DTYPES[arguments.dtype]
    state = {name: weight.to(dtype) for name, weight in consolidated_weights(checkpoint)}
    export_hf(config, state, arguments.folder, tokenizer=path, eos_id=info.eos_id)
    print(
        f"{checkpoint} (step {manifest.step:,}) is now {arguments.folder}: {hf_architecture(config)}, {arguments.dtype}"
    )
    print(f"Next: AutoModelForCausalLM.from_pretrained({str(arguments.folder)!r})")


def find_tokenizer(run: RunConfig, given: Path | None, wanted_hash: str) -> Path:
    """The tokenizer the run was trained with: `given`, or what `data.*` made. Raises `UserError` for another one."""
    path = prepare_tokenizer(run.data) if given is None else given / "tokenizer.json" if given.is_dir() else given
    tokenizer, _ = fetch_tokenizer(str(path), Path(run.data.cache_dir))
    if inspect_tokenizer(tokenizer).hash != wanted_hash:
        raise UserError(f"{path} is not the tokenizer this run was trained with; give its file with --tokenizer")
    return path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="run folder or checkpoint")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write, made if it is not there")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the weights; fp32: the masters")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json or its folder; else that of the run's data.* keys"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        sys.exit(say(error))
