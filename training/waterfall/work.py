"""What each part of a step has to do at least, on one rank: FLOPs of the model, bytes through memory or the network.

FLOPs are `model.flops`'s: products with weights, and attention to visible keys, a third of it forward and two thirds
backward (4 and 8 of 12·H·D operations a query and key). Recomputed work counts nowhere.

Bytes are analytic: what a perfectly fused implementation would move, e bytes an element, and not what was moved. A rate
made of them tells how far a part is from the memory's own; it is low where a part makes passes that it needn't.

    norms and residuals   (2L+1) times: read x and f, write x+f and its norm; backward: read dy, x, dx', write dx
    activations           forward read and write M; backward read dy and the input, write its gradient; gated: 8 M. With
                          `engine.fp8` a byte more for what is written, which is made with it
    casts to fp8          with `engine.fp8`: e read and 1 written of the other operands of the forward product and the
                          input's gradient, and twice of each weight, a micro-batch
    loss                  the logits, read once and their gradient written
    accumulation          a pass over all gradients a micro-batch: read e, read and write the sum; nothing with
                          `engine.fuse_weight_gradients`, but for the vectors of norms
    optimizer             gradient, master and two moments read, the last three written, the weight written: 28 + e.
                          In fact the norm, which has to be known first, reads the gradient once more (4) and someone
                          empties its sum (4): 36 + e with `optim.fused_step`, 48 + e in passes of their own that clip
    communication         ring collectives: (W-1)/W of what is reduced, scattered or gathered; sequence parallelism's
                          exchanges of heads, as `training.forecast` counts them

E width, M MLP width, L layers, V vocabulary with padding, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import Activation, EngineConfig, Fp8, ModelConfig, Precision
from model.dimensions import resolve_dimensions
from model.flops import FlopsPerToken, flops_per_token, parameter_counts
from training.backend import should_sum_in_products
from training.forecast import exchanged_bytes
from training.waterfall.names import Category

ELEMENT_BYTES = {Precision.bf16: 2, Precision.fp16: 2, Precision.fp32: 4}


@dataclass(frozen=True)
class Work:
    """A step's work on one rank."""

    tokens: int
    """Tokens of this rank's micro-batches."""
    flops_per_token: FlopsPerToken
    flops: dict[Category, float]
    """Operations of the parts that are counted in MFU, attention causally."""
    least_bytes: dict[Category, float]


def work_of(
    model: ModelConfig, engine: EngineConfig, precision: Precision, *, tokens: int, accumulation: int, world_size: int
) -> Work:
    """The work of one step: this rank's `tokens` tokens in `accumulation` micro-batches; `model` has its vocabulary."""
    per_token = flops_per_token(model)
    flops = {
        Category.matmul: tokens * per_token.matmul,
        Category.attention_forward: tokens * per_token.attention_causal / 3,
        Category.attention_backward: tokens * per_token.attention_causal * 2 / 3,
    }
    element = ELEMENT_BYTES[precision]
    least = {kind: float(tokens * element * count) for kind, count in _activation_elements(model).items()}
    fused = should_sum_in_products(engine, precision, world_size)
    least |= _weight_bytes(model, engine, element, accumulation, world_size, fused)
    if engine.fp8 is not Fp8.none:
        least[Category.casts] = _cast_bytes(model, element, tokens, accumulation)
        least[Category.activations] += float(tokens * model.num_layers * sum(_activated(model)))
    if engine.sequence_parallel_size > 1:
        least[Category.communication] += exchanged_bytes(model, engine, element, tokens)
    return Work(tokens, per_token, flops, least)


def _activation_elements(model: ModelConfig) -> dict[Category, int]:
    """Elements a token that must be read or written."""
    sizes = resolve_dimensions(model)
    gated = model.activation is Activation.swiglu
    return {
        Category.norms: (2 * sizes.num_layers + 1) * 8 * sizes.width,
        Category.activations: sizes.num_layers * sizes.mlp_width * (8 if gated else 5),
        Category.loss: 2 * sizes.padded_vocab_size,
    }


def _cast_bytes(model: ModelConfig, element: int, tokens: int, accumulation: int) -> float:
    """Bytes that are read and written to have a step's operands in fp8, but for those that activations make."""
    sizes, (mlp_width, hidden) = resolve_dimensions(model), _activated(model)
    read = 2 * sizes.width + sizes.query_width  # what qkv, up and the projection are given
    read += sizes.qkv_width + 2 * sizes.width  # the gradients that come back to qkv, the projection and down
    weights = sizes.width * (sizes.qkv_width + sizes.query_width + hidden + mlp_width)
    return float(sizes.num_layers * (element + 1) * (tokens * read + accumulation * 2 * weights))


def _activated(model: ModelConfig) -> tuple[int, int]:
    """Elements a token that the activation gives to down forward, and to up backward."""
    mlp_width = resolve_dimensions(model).mlp_width
    return mlp_width, mlp_width * (2 if model.activation is Activation.swiglu else 1)


def _weight_bytes(
    model: ModelConfig, engine: EngineConfig, element: int, accumulation: int, world_size: int, fused: bool
) -> dict[Category, float]:
    """Bytes that go with the weights: their gradients' sum, their update, their way between ranks."""
    count = parameter_counts(model).total
    total = 4 if engine.fp32_accumulation or element == 4 else element  # bytes of a gradient's sum
    shards = world_size if engine.zero_stage > 0 else 1
    result = {
        Category.accumulation: 0.0 if fused else float(count * (element + 2 * total) * accumulation),
        Category.optimizer: count * (28 + element) / shards,
    }
    if world_size > 1:
        gradients = accumulation if engine.zero_stage >= 2 else 1  # reductions a step
        gathers = {0: 0, 1: 1, 2: 1, 3: 2 * accumulation}[engine.zero_stage]
        reduced = total * gradients * (2 if engine.zero_stage == 0 else 1)  # all-reduce: scatter and gather
        result[Category.communication] = count * (world_size - 1) / world_size * (reduced + gathers * element)
    return result
