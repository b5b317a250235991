"""What a training step needs of a device's memory at the very least, counted before anything is built."""

from __future__ import annotations

from dataclasses import replace

from configs.schema import Attention, Precision, Recompute, RunConfig
from model.dimensions import resolve_dimensions
from model.flops import parameter_counts

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
