"""The same function as `transformers` with the same weights, and weights that survive the way there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from configs.errors import UserError
from configs.schema import Activation, ModelConfig, Norm, Position
from model import GPT, build_model
from model.convert import (
    export_hf,
    from_hf_config,
    from_hf_state_dict,
    hf_architecture,
    import_hf,
    to_hf_config,
    to_hf_state_dict,
)
from tests.model.small import LLAMA, batch, small

transformers = pytest.importorskip("transformers")

CASES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-untied-erf": {"tied_embeddings": False, "activation": Activation.gelu, "mlp_width": 48},
    "gpt2-relu2": {"activation": Activation.relu2, "norm_eps": 1e-3},
    "llama-gqa": LLAMA | {"num_kv_heads": 2, "tied_embeddings": False},
    "llama-mqa-tied-bias": LLAMA | {"num_kv_heads": 1, "bias": True},
    "llama-mha-head-dim": LLAMA | {"head_dim": 16, "rope_theta": 500000.0, "mlp_width": 48},
}


def assert_close(ours: Tensor, theirs: Tensor, name: str = "logits") -> None:
    """Equal in fp32 up to the order of sums: 1e-5 of the largest value, 84 units in the last place of it."""
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item(), msg=lambda m: f"{name}: {m}"
    )


def scatter(model: GPT) -> None:
    """Weights large enough, and biases and norms away from 0 and 1, for every term to show."""
    for name, weight in model.named_parameters():
        with torch.no_grad():
            weight.normal_(std=0.2).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            if name in ("embedding.weight", "head.weight"):
                weight[model.sizes.vocab_size :] = 0


def hf_model(config: ModelConfig, model: GPT) -> Any:
    kind = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[hf_architecture(config)]
    theirs = getattr(transformers, kind)(to_hf_config(config)).eval()
    state = to_hf_state_dict(config, model.state_dict())
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tied_embeddings else [])
    theirs.tie_weights()
    return theirs


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_loss_and_gradients_agree(options: dict[str, Any]) -> None:
    config = small(**options)
    model = build_model(config)
    scatter(model)
    theirs = hf_model(config, model)
    tokens, targets = batch(config)
    logits = theirs(tokens).logits
    assert_close(model(tokens), logits)

    sums = model(tokens, targets)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert_close(sums[0], loss, "loss")
    sums.sum().backward()
    loss.backward()
    ours: dict[str, Tensor] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == {name for name, _ in model.named_parameters()}
    converted = to_hf_state_dict(config, ours)
    for name, weight in theirs.named_parameters():
        assert_close(converted[name], weight.grad, name)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_weights_and_config_survive_both_ways(options: dict[str, Any]) -> None:
    config = small(**options)
    model = build_model(config)
    scatter(model)
    state = model.state_dict()
    back = from_hf_state_dict(config, to_hf_state_dict(config, state))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
    again = from_hf_config(to_hf_config(config))
    assert to_hf_config(again).to_dict() == to_hf_config(config).to_dict()
    build_model(again).load_state_dict(back)


def write_tokenizer(path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:130]
    vocab = {"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_exported_folder_loads_in_transformers_and_here(name: str, tmp_path: Path) -> None:
    config = small(**CASES[name])
    model = build_model(config)
    scatter(model)
    write_tokenizer(tmp_path / "tokenizer.json")
    folder = tmp_path / "export"
    export_hf(config, model.state_dict(), folder, tokenizer=tmp_path / "tokenizer.json", eos_id=0)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens, _ = batch(config)
    assert_close(model(tokens), theirs(tokens).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer("a+b").input_ids) == "a+b"

    imported, state = import_hf(folder)
    again = build_model(imported)
    again.load_state_dict(state)
    assert torch.equal(again(tokens), model(tokens))


def test_sharded_folders_and_published_gpt2_names_are_read(tmp_path: Path) -> None:
    config = small()
    model = build_model(config)
    state = to_hf_state_dict(config, model.state_dict())
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()  # the causal mask of the published files
    from huggingface_hub import save_torch_state_dict

    to_hf_config(config).save_pretrained(tmp_path)
    save_torch_state_dict(bare, tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    _, imported = import_hf(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(imported[name], tensor), name


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"position": Position.alibi}, "model.position"),
        ({"window": 4}, "model.window"),
        ({"norm": Norm.rmsnorm}, "model.norm"),
        ({"width": 34, "head_dim": 8}, "model.head_dim"),  # 34 // 4 is 8, and yet 4 heads of 8 aren't 34
        (LLAMA | {"qk_norm": True}, "model.qk_norm"),
        (LLAMA | {"logit_softcap": 30.0}, "model.logit_softcap"),
        (LLAMA | {"activation": Activation.gelu}, "model.activation"),
    ],
)
def test_what_transformers_cannot_express_is_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        hf_architecture(small(**options))


def test_what_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        import_hf(tmp_path)
    with pytest.raises(UserError, match="bert"):
        from_hf_config(transformers.BertConfig())
    scaled = to_hf_config(small(**LLAMA))
    scaled.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UserError, match="rope_type"):
        from_hf_config(scaled)
    config = small()
    state = to_hf_state_dict(config, build_model(config).state_dict())
    with pytest.raises(UserError, match=r"wpe\.weight has 16 rows .* 32"):
        from_hf_state_dict(small(sequence_length=32), state)
    del state["transformer.ln_f.bias"]
    with pytest.raises(UserError, match=r"ln_f\.bias"):
        from_hf_state_dict(config, state)
