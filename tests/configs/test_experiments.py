"""Every shipped experiment is valid and builds, and has the size its name says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs import compose
from model import build_model
from model.flops import parameter_counts
from training.batch import resolve_batch
from training.validate import validate

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment").glob("*.yaml"))
MILLIONS = {
    "gpt2_124m": (124, 125), "gpt2_350m": (353, 356), "gpt2_774m": (772, 776), "gpt2_1b5": (1555, 1560),
    "gpt3_125m": (124, 131), "gpt3_1b3": (1310, 1330), "gpt3_2b7": (2640, 2670), "gpt3_6b7": (6640, 6690),
    "gpt3_13b": (12800, 12950), "llama_150m": (148, 156), "llama_400m": (360, 400), "llama_1b": (1000, 1200),
    "llama_3b": (3000, 3200), "llama_7b": (7000, 7500),
}  # fmt: skip
"""Parameters with GPT-2's tokenizer, padding and position table included: from, to."""


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("world_size", [1, 8])
def test_experiment_is_valid(name: str, world_size: int) -> None:
    validate(compose([f"experiment={name}"]), world_size)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_builds(name: str) -> None:
    config = compose([f"experiment={name}"]).model
    config = replace(config, vocab_size=50257)
    with torch.device("meta"):
        model = build_model(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameter_counts(config).total
    if name != "quickstart":
        low, high = MILLIONS[name.removesuffix("_2k").removesuffix("_8k")]
        assert low <= count / 1e6 <= high


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("gpt3_")])
def test_gpt3_has_the_heads_and_lengths_it_should(name: str) -> None:
    config = compose([f"experiment={name}"]).model
    assert config.sequence_length == (2048 if name.endswith("_2k") else 8192)
    assert config.width // config.num_heads == (64 if "125m" in name else 128)


@pytest.mark.parametrize("name", ["gpt2_124m", "gpt3_1b3_2k", "gpt3_1b3_8k", "gpt3_2b7_2k", "gpt3_2b7_8k"])
def test_benchmarks_can_ask_for_65536_tokens_a_step(name: str) -> None:
    """The global batch of the published figures, on one GPU, by its one key."""
    sequences = 65536 // compose([f"experiment={name}"]).model.sequence_length
    config = compose([f"experiment={name}", f"train.global_batch_size={sequences}"])
    validate(config, 1)
    plan = resolve_batch(config.train, 1)
    assert plan.micro_batch_size * plan.accumulation_steps * config.model.sequence_length == 65536
