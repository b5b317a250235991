"""Let a trained model write.

    python scripts/sample.py runs/quickstart --prompt "def main("
    python scripts/sample.py runs/gpt2_124m/checkpoints/step_00010000 --tokens 400 --temperature 0.7 --number 3

SOURCE is a run folder (its newest checkpoint is taken) or one checkpoint, of any number of ranks and any ZeRO stage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import end_on_ctrl_c, run_tool

end_on_ctrl_c(__name__)

import torch
from rich.console import Console
from rich.text import Text

from model import build_model
from model.generate import generate
from training.checkpoint import load_weights
from training.saved_run import open_saved


def main(arguments: argparse.Namespace) -> None:
    """Load the weights, then print one text after the other."""
    run = open_saved(arguments.source, arguments.tokenizer)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.device(device):
        model = build_model(run.model)
    load_weights(model, run.checkpoint)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        model = model.to(torch.bfloat16)
    prompt = run.tokenizer.encode(arguments.prompt, add_special_tokens=False).ids or [run.info.eos_id]
    start = torch.tensor([prompt], device=device)  # (1, T)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    console = Console(highlight=False)
    for number in range(arguments.number):
        tokens = generate(model, start, arguments.tokens, arguments.temperature, arguments.top_k, generator)
        text = run.tokenizer.decode(tokens[0, len(prompt) :].tolist())
        if arguments.number > 1:
            console.rule(f"{number + 1} of {arguments.number}")
        console.print(Text(arguments.prompt, style="bold").append(text, style="not bold"), soft_wrap=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="run folder or checkpoint")
    parser.add_argument("--prompt", default="", help="what the text begins with; nothing: the start of a document")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of a text")
    parser.add_argument("--number", type=int, default=1, help="how many texts")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="draw from so many likeliest tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="else a GPU if there is one")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder; else the run's own")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(lambda: main(parse()))
