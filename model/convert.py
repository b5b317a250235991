"""Weights to and from `transformers`: `GPT2LMHeadModel` and `LlamaForCausalLM`.

A conversion is a list of `Rule`s, read in one direction or the other. Three things differ between the two worlds:
GPT-2 there stores its matrices transposed (`Conv1D`), Llama there splits the fused projections (queries, keys and
values; gate and up), and the vocabulary here is padded. Rotary positions pair the same columns on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Activation, ModelConfig, Norm, Position
from model.checks import check
from model.dimensions import Dimensions, resolve_dimensions

GPT2_ACTIVATIONS = {Activation.gelu_tanh: "gelu_new", Activation.gelu: "gelu", Activation.relu2: "relu2"}
"""Names of the activations in `transformers`; `gelu_pytorch_tanh` there is `gelu_new` by another routine."""


class Rule(NamedTuple):
    """One tensor here and the tensors there that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    """Names there; their tensors follow one another along the first dimension of ours."""
    rows: tuple[int, ...]
    """Size of that dimension for each of them."""
    transposed: bool = False
    """Stored (in, out) there instead of (out, in)."""
    padded_rows: int = 0
    """Rows here that are padding and do not exist there."""


def hf_architecture(config: ModelConfig) -> str:
    """`gpt2` or `llama`: the architecture of `transformers` that computes exactly what this config does.

    Raises `UserError` with what stands in the way of the nearer of the two. What only concerns training (`z_loss`,
    dropout under Llama) does not.
    """
    neither = {
        "model.qk_norm": config.qk_norm,
        "model.window": config.window is not None,
        "model.attention_softcap": config.attention_softcap > 0,
        "model.logit_softcap": config.logit_softcap > 0,
    }
    gpt2 = {
        "model.norm": config.norm is not Norm.layernorm,
        "model.position": config.position is not Position.learned,
        "model.bias": not config.bias,
        "model.activation": config.activation not in GPT2_ACTIVATIONS,
        "model.num_kv_heads": config.num_kv_heads not in (None, config.num_heads),
        "model.head_dim": config.head_dim is not None and config.head_dim * config.num_heads != config.width,
    }
    llama = {
        "model.norm": config.norm is not Norm.rmsnorm,
        "model.position": config.position is not Position.rope,
        "model.activation": config.activation is not Activation.swiglu,
    }
    for name, differs in (("gpt2", gpt2), ("llama", llama)):
        if not any((neither | differs).values()):
            return name
    nearer, differs = ("gpt2", gpt2) if config.position is Position.learned else ("llama", llama)
    keys = ", ".join(key for key, blocked in (neither | differs).items() if blocked)
    raise UserError(
        f"transformers' {nearer} can't express this model because of {keys}; there is nothing to convert to"
    )


# ---------------------------------------------------------------------------------------------------------------
# Names and shapes
# ---------------------------------------------------------------------------------------------------------------


def rules(config: ModelConfig) -> list[Rule]:
    """All tensors of the model and their counterparts. A tied head is the embedding, and has no rule of its own."""
    sizes = resolve_dimensions(config)
    if hf_architecture(config) == "gpt2":
        found = [
            _table("embedding.weight", "transformer.wte.weight", sizes),
            Rule("position.weight", ("transformer.wpe.weight",), (sizes.sequence_length,)),
            *_gpt2_blocks(sizes),
            *_both("norm", "transformer.ln_f", sizes.width, bias=True),
        ]
    else:
        found = [
            _table("embedding.weight", "model.embed_tokens.weight", sizes),
            *_llama_blocks(sizes, config.bias),
            *_both("norm", "model.norm", sizes.width, bias=False),
        ]
    if not config.tied_embeddings:
        found.append(_table("head.weight", "lm_head.weight", sizes))
    return found


def _table(ours: str, theirs: str, sizes: Dimensions) -> Rule:
    """One of the vocabulary's matrices."""
    padding = sizes.padded_vocab_size - sizes.vocab_size
    return Rule(ours, (theirs,), (sizes.vocab_size,), padded_rows=padding)


def _both(ours: str, theirs: str, rows: int, *, bias: bool, transposed: bool = False) -> Iterator[Rule]:
    """Weight and, where there is one, bias of a layer."""
    yield Rule(f"{ours}.weight", (f"{theirs}.weight",), (rows,), transposed)
    if bias:
        yield Rule(f"{ours}.bias", (f"{theirs}.bias",), (rows,))


def _joined(ours: str, theirs: tuple[str, ...], rows: tuple[int, ...], bias: bool) -> Iterator[Rule]:
    """Weight and bias of a fused layer."""
    for kind in ("weight", "bias") if bias else ("weight",):
        yield Rule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), rows)


def _gpt2_blocks(sizes: Dimensions) -> Iterator[Rule]:
    for i in range(sizes.num_layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        matrix = {"bias": True, "transposed": True}
        yield from _both(f"{ours}.attention_norm", f"{theirs}.ln_1", sizes.width, bias=True)
        yield from _both(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", sizes.qkv_width, **matrix)
        yield from _both(f"{ours}.attention.proj", f"{theirs}.attn.c_proj", sizes.width, **matrix)
        yield from _both(f"{ours}.mlp_norm", f"{theirs}.ln_2", sizes.width, bias=True)
        yield from _both(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc", sizes.mlp_width, **matrix)
        yield from _both(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj", sizes.width, **matrix)


def _llama_blocks(sizes: Dimensions, bias: bool) -> Iterator[Rule]:
    qkv_rows = (sizes.query_width, sizes.kv_width, sizes.kv_width)
    for i in range(sizes.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        qkv = tuple(f"{theirs}.self_attn.{x}_proj" for x in "qkv")
        gated = (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
        yield from _both(f"{ours}.attention_norm", f"{theirs}.input_layernorm", sizes.width, bias=False)
        yield from _joined(f"{ours}.attention.qkv", qkv, qkv_rows, bias)
        yield from _both(f"{ours}.attention.proj", f"{theirs}.self_attn.o_proj", sizes.width, bias=bias)
        yield from _both(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", sizes.width, bias=False)
        yield from _joined(f"{ours}.mlp.up", gated, (sizes.mlp_width, sizes.mlp_width), bias)
        yield from _both(f"{ours}.mlp.down", f"{theirs}.mlp.down_proj", sizes.width, bias=bias)


def to_hf_state_dict(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict (a tied `head.weight` may be there or not) as that of the `transformers` model; copies."""
    converted: dict[str, Tensor] = {}
    for rule in rules(config):
        tensor = state[rule.ours][: sum(rule.rows)]
        for name, part in zip(rule.theirs, tensor.split(rule.rows), strict=True):
            converted[name] = _copy(part.t() if rule.transposed else part)
    return converted


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy with a storage of its own size, as safetensors wants it."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def from_hf_state_dict(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the `transformers` model as ours, for `load_state_dict`; padding rows are zero.

    Published GPT-2 files leave out the prefix `transformer.` and add the causal mask; both are taken as they are.
    Raises `UserError` for a tensor that is missing or of another shape.
    """
    prefix = "transformer."
    if hf_architecture(config) == "gpt2" and not any(name.startswith(prefix) for name in state):
        state = {(name if name.startswith("lm_head.") else prefix + name): value for name, value in state.items()}
    converted = {rule.ours: _join(rule, state) for rule in rules(config)}
    if config.tied_embeddings:
        converted["head.weight"] = converted["embedding.weight"]
    return converted


def _join(rule: Rule, state: Mapping[str, Tensor]) -> Tensor:
    parts = []
    for name, rows in zip(rule.theirs, rule.rows, strict=True):
        if name not in state:
            raise UserError(f"the weights have no tensor {name}, which {rule.ours} is made of")
        part = state[name].t() if rule.transposed else state[name]
        if part.shape[0] != rows:
            raise UserError(f"{name} has {part.shape[0]} rows where the model config asks for {rows}")
        parts.append(part)
    if rule.padded_rows:
        parts.append(parts[0].new_zeros((rule.padded_rows, *parts[0].shape[1:])))
    return torch.cat(parts).contiguous()


# ---------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------


def to_hf_config(config: ModelConfig, eos_id: int | None = None) -> Any:
    """The `transformers` config (`GPT2Config` or `LlamaConfig`) of the same model."""
    from transformers import GPT2Config, LlamaConfig

    sizes = resolve_dimensions(config)
    shared: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
    }
    if hf_architecture(config) == "gpt2":
        return GPT2Config(
            n_layer=sizes.num_layers,
            n_head=sizes.num_heads,
            n_embd=sizes.width,
            n_inner=sizes.mlp_width,
            n_positions=sizes.sequence_length,
            activation_function=GPT2_ACTIVATIONS[config.activation],
            layer_norm_epsilon=config.norm_eps,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            resid_pdrop=config.dropout,
            architectures=["GPT2LMHeadModel"],
            **shared,
        )
    return LlamaConfig(
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        max_position_embeddings=sizes.sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_eps,
        attention_bias=config.bias,
        mlp_bias=config.bias,
        attention_dropout=config.dropout,
        architectures=["LlamaForCausalLM"],
        **shared,
    )


def from_hf_config(hf: Any) -> ModelConfig:
    """The config of the same model here, from a `GPT2Config` or `LlamaConfig`.

    Raises `UserError` for other architectures and for options that have no counterpart here.
    """
    readers = {"gpt2": _from_gpt2, "llama": _from_llama}
    if hf.model_type not in readers:
        raise UserError(f"models of type {hf.model_type} can't be imported; possible are {', '.join(readers)}")
    config = readers[hf.model_type](hf)
    problems = check(config)
    if problems:
        raise UserError("\n".join(problems))
    return config


def _from_gpt2(hf: Any) -> ModelConfig:
    activations = {name: ours for ours, name in GPT2_ACTIVATIONS.items()} | {"gelu_pytorch_tanh": Activation.gelu_tanh}
    _refuse("activation_function", hf.activation_function, list(activations))
    _refuse("scale_attn_by_inverse_layer_idx", hf.scale_attn_by_inverse_layer_idx, [False])
    _refuse("scale_attn_weights", hf.scale_attn_weights, [True])
    return ModelConfig(
        num_layers=hf.n_layer,
        num_heads=hf.n_head,
        width=hf.n_embd,
        mlp_width=hf.n_inner,
        sequence_length=hf.n_positions,
        vocab_size=hf.vocab_size,
        position=Position.learned,
        norm=Norm.layernorm,
        norm_eps=hf.layer_norm_epsilon,
        activation=activations[hf.activation_function],
        bias=True,
        tied_embeddings=hf.tie_word_embeddings,
        dropout=hf.resid_pdrop,
        init_std=hf.initializer_range,
    )


def _from_llama(hf: Any) -> ModelConfig:
    _refuse("hidden_act", hf.hidden_act, ["silu"])
    _refuse("rope_parameters.rope_type", hf.rope_parameters.get("rope_type", "default"), ["default"])
    _refuse("mlp_bias", hf.mlp_bias, [hf.attention_bias])
    return ModelConfig(
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        width=hf.hidden_size,
        mlp_width=hf.intermediate_size,
        sequence_length=hf.max_position_embeddings,
        vocab_size=hf.vocab_size,
        position=Position.rope,
        rope_theta=hf.rope_parameters["rope_theta"],
        norm=Norm.rmsnorm,
        norm_eps=hf.rms_norm_eps,
        activation=Activation.swiglu,
        bias=hf.attention_bias,
        tied_embeddings=hf.tie_word_embeddings,
        dropout=hf.attention_dropout,
        init_std=hf.initializer_range,
    )


def _refuse(key: str, value: object, possible: list[Any]) -> None:
    if value not in possible:
        raise UserError(f"config.json: {key}={value!r} has no counterpart here; possible: {possible}")


# ---------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------


def export_hf(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    folder: Path,
    tokenizer: Path | None = None,
    eos_id: int | None = None,
) -> None:
    """Write a folder that `transformers`' `from_pretrained` loads: config.json, safetensors (shards of 5 GB), and with
    `tokenizer` (a `tokenizer.json`) the tokenizer's files. Dtypes stay as they are in `state`."""
    from huggingface_hub import save_torch_state_dict
    from transformers import PreTrainedTokenizerFast

    converted = to_hf_state_dict(config, state)
    hf_config = to_hf_config(config, eos_id)
    hf_config.dtype = next(iter(converted.values())).dtype
    folder.mkdir(parents=True, exist_ok=True)
    hf_config.save_pretrained(folder)
    save_torch_state_dict(converted, folder, metadata={"format": "pt"})
    if tokenizer is not None:
        fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), model_max_length=config.sequence_length)
        if eos_id is not None:
            fast.eos_token = fast.bos_token = fast.convert_ids_to_tokens(eos_id)
        fast.save_pretrained(folder)


def import_hf(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and state dict (for `GPT.load_state_dict`) of a `transformers` folder of GPT-2 or Llama in safetensors."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give the folder of a transformers model")
    config = from_hf_config(AutoConfig.from_pretrained(folder))
    return config, from_hf_state_dict(config, read_safetensors(folder))


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards that its index lists."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; weights are read from safetensors only")
    state: dict[str, Tensor] = {}
    for name in names:
        state |= load_file(folder / name)
    return state
