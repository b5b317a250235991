"""FLOPs and parameter counts against arithmetic written out by hand, PyTorch's counter, and the built model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import Activation, Attention, ModelConfig, Norm, Position
from model import build_model
from model.flops import causal_flops_of_documents, flops_per_token, mean_visible_keys, parameter_counts

MODERN: dict[str, Any] = {
    "position": Position.rope,
    "norm": Norm.rmsnorm,
    "activation": Activation.swiglu,
    "bias": False,
}


def test_gpt2_124m_by_hand() -> None:
    config = ModelConfig(vocab_size=50257, vocab_multiple=128)
    counts = parameter_counts(config)
    # One block: qkv 768·2304 = 1,769,472; proj 768·768 = 589,824; MLP 2·768·3072 = 4,718,592; together 7,077,888.
    # Its vectors: two norms 4·768 = 3,072; biases 2304 + 768 + 3072 + 768 = 6,912; together 9,984.
    # Twelve blocks 12·7,077,888 = 84,934,656 and 12·9,984 = 119,808; last norm 2·768 = 1,536.
    # Tokens 50,257·768 = 38,597,376; padding 47·768 = 36,096; positions 1,024·768 = 786,432.
    assert counts.embedding == 38_597_376
    assert counts.padding == 36_096
    assert counts.position == 786_432
    assert counts.matmul == 84_934_656 + 38_597_376
    assert counts.total - counts.padding == 124_439_808  # the published size of GPT-2 small
    assert counts.megatron == 124_439_808 - 786_432
    flops = flops_per_token(config)
    assert flops.matmul == 6 * 123_532_032
    assert flops.attention_full == 12 * 12 * 768 * 1024  # 113,246,208
    assert flops.attention_causal == 12 * 12 * 768 * 512.5  # 56,678,400: half a sequence and the diagonal
    assert flops.causal == 741_192_192 + 56_678_400
    assert flops.megatron == 6 * 123_653_376 + 113_246_208


def test_gpt3_1b3_by_hand() -> None:
    config = ModelConfig(num_layers=24, num_heads=16, width=2048, sequence_length=2048, vocab_size=50257)
    # One block 12·2048² = 50,331,648; 24 of them 1,207,959,552. Head 50,257·2048 = 102,926,336.
    # Vectors of a block: norms 4·2048 = 8,192, biases 9·2048 = 18,432; 24·26,624 = 638,976; last norm 4,096.
    flops = flops_per_token(config)
    assert flops.matmul == 6 * (1_207_959_552 + 102_926_336)  # 7,865,315,328
    assert flops.attention_full == 12 * 24 * 2048 * 2048  # 1,207,959,552
    assert flops.attention_causal == 12 * 24 * 2048 * 1024.5
    assert flops.megatron == 6 * (1_310_885_888 + 638_976 + 4_096) + 1_207_959_552
    assert flops.megatron == pytest.approx(9.07e9, rel=2e-3)


@pytest.mark.parametrize("window", [None, 4])
def test_documents_that_do_not_see_each_other(window: int | None) -> None:
    config = ModelConfig(num_layers=2, num_heads=2, width=64, sequence_length=16, vocab_size=100, window=window)
    whole = flops_per_token(config)
    assert causal_flops_of_documents(config, np.array([16, 16])) == whole.causal
    lengths = [1, 5, 7, 3]
    keys = sum(min(query, window or query) + 1 for length in lengths for query in range(length))
    assert causal_flops_of_documents(config, np.array(lengths)) == whole.matmul + 12 * 2 * 64 * keys / 16


def test_llama_with_grouped_heads_by_hand() -> None:
    config = ModelConfig(
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        width=512,
        mlp_width=1408,
        sequence_length=256,
        vocab_size=1000,
        vocab_multiple=1,
        tied_embeddings=False,
        **MODERN,
    )
    # qkv 512·(8+4)·64 = 393,216; proj 512² = 262,144; MLP 3·512·1408 = 2,162,688; block 2,818,048; norms 1,024.
    counts = parameter_counts(config)
    assert counts.matmul == 2 * 2_818_048 + 512_000
    assert counts.total == 2 * (2_818_048 + 1_024) + 512 + 2 * 512_000
    assert counts.megatron == counts.total - 512_000  # the input table is a look-up
    assert flops_per_token(config).attention_full == 12 * 2 * 512 * 256  # query heads count, not key heads


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 0), (7, 3), (7, 6), (7, 100), (64, 5)])
def test_mean_visible_keys_counts_the_band(length: int, window: int | None) -> None:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance <= (length if window is None else window))
    assert mean_visible_keys(length, window) == pytest.approx(seen.sum().item() / length)


def test_a_window_limits_both_counts() -> None:
    config = ModelConfig(sequence_length=1024, vocab_size=100, window=127)
    flops = flops_per_token(config)
    assert flops.attention_full == 12 * 12 * 768 * 128
    assert flops.attention_causal < flops.attention_full
    assert flops.matmul == flops_per_token(ModelConfig(sequence_length=1024, vocab_size=100)).matmul


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2},
    {"tied_embeddings": False},
    {"head_dim": 24},
    {"qk_norm": True},
    {"bias": False},
    MODERN,
    MODERN | {"num_kv_heads": 1, "tied_embeddings": False, "bias": True},
    {"vocab_multiple": 1},
    {"mlp_width": 40, "activation": Activation.relu2, "norm": Norm.rmsnorm},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_total_is_what_the_model_stores(options: dict[str, Any]) -> None:
    config = ModelConfig(num_layers=3, num_heads=4, width=64, sequence_length=32, vocab_size=131, **options)
    with torch.device("meta"):
        model = build_model(config)
    assert parameter_counts(config).total == sum(p.numel() for p in model.parameters())
    assert parameter_counts(config).vectors == sum(p.numel() for p in model.parameters() if p.dim() == 1)


@pytest.mark.parametrize("options", OPTIONS)
def test_flops_agree_with_pytorchs_counter(options: dict[str, Any]) -> None:
    """PyTorch counts the products that run: with standard attention all S x S scores, and the padding columns."""
    options = options | {"vocab_multiple": 1}
    config = ModelConfig(
        num_layers=3,
        num_heads=4,
        width=64,
        sequence_length=32,
        vocab_size=131,
        attention=Attention.standard,
        **options,
    )
    model = build_model(config)
    tokens = torch.randint(0, 131, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).sum().backward()
    flops = flops_per_token(config)
    assert counter.get_total_flops() == tokens.numel() * (flops.matmul + flops.attention_full)
