"""The model's options, initialisation, and what the engine relies on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Activation, Attention, ModelConfig, Norm, Position
from model import GPT, build_model
from model.checks import check
from tests.model.small import LLAMA, batch, small


def logits_of(config: ModelConfig, train: bool = False) -> Tensor:
    torch.manual_seed(3)
    model = build_model(config).train(train)
    with torch.no_grad():  # norms and biases away from 1 and 0
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
    return model(batch(config)[0])


CHANGES: dict[str, dict[str, Any]] = {
    "position=none": {"position": Position.none},
    "position=rope": {"position": Position.rope},
    "position=alibi": {"position": Position.alibi},
    "norm": {"norm": Norm.rmsnorm},
    "norm_eps": {"norm_eps": 1e-2},
    "activation=gelu": {"activation": Activation.gelu},
    "activation=relu2": {"activation": Activation.relu2},
    "activation=swiglu": {"activation": Activation.swiglu},
    "bias": {"bias": False},
    "tied_embeddings": {"tied_embeddings": False},
    "qk_norm": {"qk_norm": True},
    "num_kv_heads": {"num_kv_heads": 2},
    "head_dim": {"head_dim": 16},
    "mlp_width": {"mlp_width": 64},
    "window": {"window": 3},
    "attention_softcap": {"attention_softcap": 0.5, "attention": Attention.standard},
    "logit_softcap": {"logit_softcap": 0.5},
    "init_std": {"init_std": 0.05},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_option_changes_the_function(change: dict[str, Any]) -> None:
    base = logits_of(small(init_std=0.2))
    changed = logits_of(small(**({"init_std": 0.2} | change)))
    assert changed.shape == base.shape
    assert not torch.allclose(base, changed, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"num_kv_heads": 4},
        {"head_dim": 8},
        {"mlp_width": 128},
        {"rope_theta": 5.0},  # without rotary positions
        {"z_loss": 0.1},  # in the loss alone
        {"dropout": 0.5},  # in training alone
        {"window": 15},  # all of the sequence
        {"vocab_multiple": 1},
        {"attention": Attention.standard},
    ],
    ids=str,
)
def test_what_says_the_same_changes_nothing(change: dict[str, Any]) -> None:
    base, changed = logits_of(small(init_std=0.2)), logits_of(small(init_std=0.2, **change))
    torch.testing.assert_close(base, changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["queries", "keys"])
def test_qk_norm_makes_the_length_of_queries_and_keys_irrelevant(part: str) -> None:
    rows = slice(0, 32) if part == "queries" else slice(32, 64)
    for qk_norm in (True, False):
        model = build_model(small(qk_norm=qk_norm, init_std=0.3))
        tokens = batch(model.config)[0]
        before = model(tokens)
        with torch.no_grad():
            model.blocks[0].attention.qkv.weight[rows] *= 3.0
        assert torch.allclose(before, model(tokens), atol=1e-3) == qk_norm


def test_rope_theta_counts_with_rotary_positions() -> None:
    base, changed = logits_of(small(**LLAMA)), logits_of(small(rope_theta=5.0, **LLAMA))
    assert not torch.allclose(base, changed)


def test_parameters_are_those_of_the_options() -> None:
    names = {name for name, _ in build_model(small(qk_norm=True, **LLAMA)).named_parameters()}
    block = {"attention_norm", "attention.qkv", "attention.q_norm", "attention.k_norm", "attention.proj", "mlp_norm"}
    block |= {"mlp.up", "mlp.down"}
    expected = {f"blocks.{i}.{part}.weight" for i in range(2) for part in block}
    assert names == expected | {"embedding.weight", "norm.weight"}


def test_llamas_default_mlp_width() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(num_layers=1, num_heads=32, width=4096, vocab_size=32000, **LLAMA))
    assert model.sizes.mlp_width == 11008  # Llama 7B's


def test_initial_weights_follow_gpt2() -> None:
    config = small(num_layers=8, width=256, num_heads=4, vocab_size=2000, sequence_length=64)
    model = build_model(config)
    residual = 0.02 / (2 * 8) ** 0.5
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(weight, torch.zeros_like(weight)), name
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            used = weight[:2000] if name == "embedding.weight" else weight
            std = residual if "proj" in name or "down" in name else 0.02
            assert used.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(used.mean().item()) < 5 * std / used.numel() ** 0.5, name
    assert torch.equal(model.embedding.weight[2000:], torch.zeros(48, 256))


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    config = small(width=64, vocab_size=1000)
    tokens, targets = batch(config, size=16)
    loss = build_model(config)(tokens, targets)[0] / (targets != -100).sum()
    assert loss.item() == pytest.approx(torch.tensor(1000.0).log().item(), abs=0.05)


@pytest.mark.parametrize("options", [{}, {"tied_embeddings": False}, LLAMA], ids=["tied", "untied", "llama"])
def test_meta_model_initialises_to_the_same_weights(options: dict[str, Any]) -> None:
    config = small(**options)
    torch.manual_seed(5)
    direct = build_model(config)
    with torch.device("meta"):
        model = build_model(config)
    assert all(p.is_meta for p in model.parameters())
    torch.manual_seed(5)
    model = model.materialise("cpu")
    assert (model.head.weight is model.embedding.weight) == config.tied_embeddings
    for (name, a), (_, b) in zip(direct.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_padding_rows_draw_nothing() -> None:
    """The real weights do not depend on the padding, so that runs with and without it start alike."""
    torch.manual_seed(5)
    plain = build_model(small(vocab_multiple=1))
    torch.manual_seed(5)
    padded = build_model(small(vocab_multiple=128))
    assert torch.equal(plain.embedding.weight, padded.embedding.weight[:131])
    assert torch.equal(plain.blocks[1].mlp.down.weight, padded.blocks[1].mlp.down.weight)


@pytest.mark.parametrize("options", [{}, {"tied_embeddings": False}, LLAMA | {"qk_norm": True}])
def test_decay_groups_hold_every_parameter_once(options: dict[str, Any]) -> None:
    model = build_model(small(**options))
    (decay_name, decay), (no_decay_name, no_decay) = model.decay_groups()
    assert (decay_name, no_decay_name) == ("decay", "no_decay")
    assert {id(p) for p in (*decay, *no_decay)} == {id(p) for p in model.parameters()}
    assert len(decay) + len(no_decay) == len(list(model.parameters()))
    assert all(p.ndim == 2 for p in decay)
    assert all(p.ndim == 1 for p in no_decay)


def test_dropout_acts_in_training_only_and_everywhere() -> None:
    config = small(dropout=0.5)
    assert torch.equal(logits_of(config), logits_of(config))
    assert torch.equal(logits_of(config), logits_of(small()))
    model = build_model(config).train()
    x = torch.ones(1, 16, 32)
    assert (model.dropout(x) == 0).any()
    assert (model.blocks[0].dropout(x) == 0).any()
    tokens = batch(config)[0]
    for part in (model.dropout, model.blocks[0].dropout, model.blocks[1].dropout):
        part.eval()
    assert not torch.equal(model(tokens), model(tokens))  # what is left is dropout of attention weights


def gradients(model: GPT, config: ModelConfig) -> list[Tensor | None]:
    model.zero_grad()
    torch.manual_seed(11)
    model(*batch(config)).sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, LLAMA | {"num_kv_heads": 2}], ids=str)
def test_recomputed_blocks_give_the_same_gradients(options: dict[str, Any]) -> None:
    config = small(**options)
    model = build_model(config).train()
    expected = gradients(model, config)
    calls: list[nn.Module] = []
    model.blocks[0].register_forward_pre_hook(lambda module, _: calls.append(module))
    model.set_recompute(True)
    for ours, theirs in zip(gradients(model, config), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert len(calls) == 2  # forward, and again in the backward pass
    model.set_recompute(False)
    gradients(model, config)
    assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, LLAMA | {"num_kv_heads": 2, "qk_norm": True}], ids=["gpt2", "llama"])
def test_compiled_blocks_equal_eager_ones(options: dict[str, Any]) -> None:
    config = small(**options)
    model = build_model(config)
    names = list(model.state_dict())
    expected = gradients(model, config)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_blocks()
    for ours, theirs in zip(gradients(model, config), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # all blocks share one
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_compiled_model_has_its_own_weights(copied: Callable[[GPT], GPT]) -> None:
    """Eager until its blocks are compiled: a compiled `forward` is bound to the block it was compiled for."""
    config = small()
    model = build_model(config)
    model.compile_blocks()
    twin = copied(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(2)
    same = build_model(config)
    same.load_state_dict(twin.state_dict())
    tokens, _ = batch(config)
    assert torch.equal(twin(tokens), same(tokens))


@pytest.mark.parametrize("norm", list(Norm))
def test_norms_keep_their_statistics_in_fp32(norm: Norm) -> None:
    """A bf16 input of mean 100 has a variance that bf16 sums would lose."""
    model = build_model(small(norm=norm)).bfloat16()
    x = (torch.randn(4, 32) + 100).bfloat16()
    exact = build_model(small(norm=norm)).norm(x.float())[1]
    error = (model.norm(x)[1].float() - exact).abs().max()
    assert error <= exact.abs().max() * 2**-8  # rounding of the result


def test_bf16_model_stays_near_fp32() -> None:
    config = small(**LLAMA)
    model = build_model(config)
    tokens, targets = batch(config)
    exact = model(tokens, targets)
    half = model.bfloat16()(tokens, targets)
    assert half.dtype is torch.float32
    torch.testing.assert_close(half, exact, rtol=5e-3, atol=0)
    assert model(tokens).dtype is torch.float32


def test_last_only_is_the_last_of_all_logits() -> None:
    config = small()
    model = build_model(config)
    tokens = batch(config)[0]
    torch.testing.assert_close(model(tokens, last_only=True), model(tokens)[:, -1:])


def test_more_tokens_than_learned_positions_are_refused() -> None:
    tokens = torch.zeros(1, 17, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"17 tokens are more than the 16 learned positions.*model\.sequence_length"):
        build_model(small())(tokens)
    assert build_model(small(**LLAMA))(tokens).shape == (1, 17, 131)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 33}, ["model.width=33", "model.num_heads=4", "model.head_dim"]),
        ({"num_kv_heads": 3}, ["model.num_kv_heads=3", "model.num_heads=4", "1, 2, 4"]),
        ({"head_dim": 7, "position": Position.rope}, ["model.position=rope", "odd (7)"]),
        ({"head_dim": 257, "attention": Attention.flash}, ["257", "256", "model.attention=sdpa"]),
        ({"attention_softcap": 5.0}, ["model.attention=sdpa", "model.attention=flash or standard"]),
        ({"dropout": 0.1, "attention": Attention.flash1}, ["model.dropout", "model.attention=flash"]),
        ({"dropout": 1.0}, ["model.dropout=1", "below 1"]),
        ({"num_layers": 0}, ["model.num_layers=0", "at least 1"]),
        ({"window": -1}, ["model.window=-1", "null"]),
        ({"z_loss": float("nan")}, ["model.z_loss=nan"]),
        ({"norm_eps": 0.0}, ["model.norm_eps=0", "above 0"]),
    ],
    ids=str,
)
def test_a_faulty_config_is_named_with_its_remedy(options: dict[str, Any], words: list[str]) -> None:
    (problem,) = check(small(**options))
    assert [word for word in words if word not in problem] == []
    with pytest.raises(UserError):
        build_model(small(**options))


def test_all_faults_are_found_together_and_sound_configs_have_none() -> None:
    assert len(check(small(num_layers=0, dropout=2.0, z_loss=-1.0))) == 3
    assert len(check(small(num_kv_heads=3, head_dim=7, position=Position.rope))) == 2
    assert check(small()) == []
    assert check(ModelConfig()) == []
    assert check(small(attention=Attention.standard), documents=True) != []
    with pytest.raises(UserError, match=r"model\.vocab_size is not set"):
        build_model(small(vocab_size=None))
