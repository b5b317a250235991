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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import end_on_ctrl_c, run_tool

end_on_ctrl_c(__name__)

import torch

from configs.errors import UserError
from model.convert import export_hf, hf_architecture
from training.checkpoint import consolidated_weights
from training.saved_run import open_saved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: argparse.Namespace) -> None:
    """Read the checkpoint, find its tokenizer, write the folder."""
    run = open_saved(arguments.source, arguments.tokenizer)
    kind = hf_architecture(run.model)  # this and the folder before the weights are read
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{arguments.folder} can't be written: {error.strerror}. Give another FOLDER.") from error
    dtype = DTYPES[arguments.dtype]
    state = {name: weight.to(dtype) for name, weight in consolidated_weights(run.checkpoint)}
    export_hf(run.model, state, arguments.folder, tokenizer=run.tokenizer_path, eos_id=run.info.eos_id)
    print(f"{run.checkpoint} (step {run.manifest.step:,}) is now {arguments.folder}: {kind}, {arguments.dtype}")
    print(f"Next: AutoModelForCausalLM.from_pretrained({str(arguments.folder)!r})")


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
    run_tool(lambda: main(parse()))
