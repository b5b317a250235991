"""What a step needs of a device's memory, counted before anything is built: at the very least, and at its peak.

The peak is in the loss, when all activations are there (`step_memory`). With E width, H and K heads, D head dim, M MLP
width, L layers, N weights, t tokens of a micro-batch on this rank, W ranks, in bf16, 2 bytes an element:

    states       stage 0: 18·N; 1: (6 + 12/W)·N: weights 2, fp32 sums of gradients 4; masters and moments 12
                 2: (2 + 18/W)·N, 18·N on one rank; 3: 18/W·N
    activations  L·t elements, what a block keeps for its backward pass: both sums of the residual stream and their
                 norms, 4·E; q, k, v and attention's output, (2·H + 2·K)·D, and (H + K)·D more where q and k are
                 rotated or normalised after the projection; the MLP's argument and result, 2·M, gated 3·M; standard
                 attention's scores and weights, 2·H·S. fp32: H for attention, 4 for the norms. With recomputed blocks
                 L·E, and the larger of one block's and the loss
    loss         a chunk of logits, the head's gradient in fp32, and 3·E a token: the last sum, its norm, its gradient
    gathered     stage 3 on several ranks: weights that DeepSpeed keeps whole, at most 10^9 or four blocks
    buckets      stages 2 and 3 on several ranks: gradients on their way

Not in it: dropout's masks, the two buckets of a block's matrices of `engine.fuse_weight_gradients=on` at stage 2,
scores that standard attention holds for a moment, what the CUDA context and NCCL take, memory that PyTorch's allocator
holds in pieces too small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from configs.schema import (
    Activation,
    Attention,
    EngineConfig,
    Fp8,
    ModelConfig,
    Position,
    Precision,
    Recompute,
    RunConfig,
)
from model.dimensions import Dimensions, resolve_dimensions
from model.flops import parameter_counts
from model.loss import chunks
from training.backend import gathering, should_be_lean
from training.forecast import copies

RESERVED_BYTES = 3 * 10**9
"""Of a GPU, left to the CUDA context, NCCL and the allocator's gaps: assumed, not measured."""

STATE_BYTES = 16
"""A weight's: fp32 master and two moments, 12; the weight and its gradient, 2 each in half precision, or in fp32 the
master itself and 4."""


def least_bytes(config: RunConfig, micro_batch_size: int) -> int:
    """Bytes on one device that trains alone: all states of its weights, and the scores of standard attention.

    Standard attention keeps at least one matrix of B·H·S·S weights a layer for the backward pass; with recomputed
    blocks one layer's are there at a time. Other activations come on top.

    Args:
        micro_batch_size: sequences, B.
    """
    model = replace(config.model, vocab_size=config.model.vocab_size or 1)  # without a corpus nobody knows it
    sizes = resolve_dimensions(model)
    offloaded = config.engine.offload_optimizer or config.engine.offload_params
    states = 0 if offloaded else STATE_BYTES * parameter_counts(model).total
    if model.attention is not Attention.standard:
        return states
    element_bytes = 4 if config.engine.precision is Precision.fp32 else 2
    layers = 1 if config.engine.recompute is Recompute.block else sizes.num_layers
    return states + layers * micro_batch_size * sizes.num_heads * sizes.sequence_length**2 * element_bytes


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a device at the peak of a step, by what they are for."""

    states: int
    """Weights, sums of gradients, masters, moments."""
    activations: int
    loss: int
    gathered: int
    buckets: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.states + self.activations + self.loss + self.gathered + self.buckets


def step_memory(
    model: ModelConfig, engine: EngineConfig, micro_batch_size: int, world_size: int, *, copied: bool = False
) -> StepMemory | None:
    """The peak of a training step in bf16 on one of `world_size` GPUs, by the formulas above.

    None for what they don't cover: offloading, fp8, sums of gradients in bf16, DeepSpeed's own stages 2 and 3.

    Args:
        model: its `vocab_size` set.
        micro_batch_size: sequences, shared by the ranks of a sequence-parallel group.
        copied: whether ranks read gradients from each other's memory (`training.forecast.copies`).
    """
    states = state_bytes(parameter_counts(model).total, engine, world_size)
    if states is None or engine.fp8 is not Fp8.none:
        return None
    sizes = resolve_dimensions(model)
    tokens = micro_batch_size * sizes.sequence_length // engine.sequence_parallel_size
    block = tokens * block_bytes_per_token(model, sizes)
    activations = sizes.num_layers * block
    rows = chunks(tokens, sizes.padded_vocab_size, torch.device("cuda"))[0].stop
    loss = 2 * rows * sizes.padded_vocab_size + 4 * sizes.padded_vocab_size * sizes.width + 6 * tokens * sizes.width
    if engine.recompute is Recompute.block:  # a block is recomputed when the loss is done
        activations = sizes.num_layers * tokens * sizes.width * 2 + block
        loss = max(loss - block, 0)
    gathered = buckets = 0
    if engine.zero_stage > 1 and world_size > 1:
        elements = min(engine.bucket_size, parameter_counts(model).total)
        buckets = elements * (2 * 2 * world_size + 2 * (world_size - 1)) // world_size if copied else 2 * 4 * elements
    if engine.zero_stage == 3 and world_size > 1:
        gathered = 2 * min(parameter_counts(model).total, most_gathered(model, sizes))
    return StepMemory(states, activations, loss, gathered, buckets)


def state_bytes(num_parameters: int, engine: EngineConfig, world_size: int) -> int | None:
    """Bytes of weights and optimizer on a rank, in bf16; None where that isn't known."""
    if engine.offload_optimizer or engine.offload_params or not engine.fp32_accumulation:
        return None
    if engine.zero_stage > 1 and not should_be_lean(engine):
        return None
    whole = {0: 18, 1: 6, 2: 2, 3: 0}[engine.zero_stage]  # a weight, on every rank
    if engine.zero_stage == 2 and world_size == 1:
        return 18 * num_parameters  # the weights are not there a second time
    shared = 12 if engine.zero_stage == 1 else 0 if engine.zero_stage == 0 else 18
    return whole * num_parameters + shared * num_parameters // world_size


def block_bytes_per_token(model: ModelConfig, sizes: Dimensions) -> int:
    """What a block in bf16 keeps of a token for its backward pass."""
    heads = 2 * sizes.query_width + 2 * sizes.kv_width  # q, k, v, and attention's output
    if model.position is Position.rope or model.qk_norm:
        heads += sizes.query_width + sizes.kv_width
    mlp = (3 if model.activation is Activation.swiglu else 2) * sizes.mlp_width
    scores = 2 * sizes.num_heads * sizes.sequence_length if model.attention is Attention.standard else 0
    return 2 * (4 * sizes.width + heads + mlp + scores) + 4 * (sizes.num_heads + 4)


def most_gathered(model: ModelConfig, sizes: Dimensions) -> int:
    """Weights that ZeRO-3 keeps whole at a time."""
    without = parameter_counts(replace(model, num_layers=0)).total
    block = (parameter_counts(model).total - without) // sizes.num_layers
    return int(gathering(block)["stage3_max_live_parameters"])


def largest_micro_batch(
    model: ModelConfig, engine: EngineConfig, world_size: int, available: float, *, copied: bool = False
) -> int | None:
    """The most sequences of a micro-batch whose step takes at most `available` bytes; None where none does, or where
    `step_memory` knows nothing."""
    one, two = (step_memory(model, engine, n, world_size, copied=copied) for n in (1, 2))
    if one is None or two is None or one.total > available:
        return None
    size = 1
    while (more := step_memory(model, engine, size * 2, world_size, copied=copied)) and more.total <= available:
        size *= 2
    step = size
    while step := step // 2:
        more = step_memory(model, engine, size + step, world_size, copied=copied)
        if more is not None and more.total <= available:
            size += step
    return size


def outlook(
    model: ModelConfig, engine: EngineConfig, micro_batch_size: int, world_size: int, room: int, *, neighbours: int
) -> tuple[bool, str] | None:
    """Whether a step in bf16 is counted to take more than the `room` bytes of a GPU, and a sentence about it.

    None where `step_memory` knows nothing.

    Args:
        neighbours: GPUs of this host, which read each other's memory.
    """
    copied = copies(engine, 2, world_size, neighbours)
    peak = step_memory(model, engine, micro_batch_size, world_size, copied=copied)
    if peak is None:
        return None
    largest = largest_micro_batch(model, engine, world_size, room - RESERVED_BYTES, copied=copied)
    fits = "no micro-batch fits" if largest is None else f"micro-batches of up to {largest} fit"
    return peak.total > room, (
        f"a step is counted to take {peak.total / 1e9:.1f} GB of the GPU's {room / 1e9:.1f} GB, and {fits}"
    )
