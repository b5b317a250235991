"""Initial weights, and the layers that draw their own.

GPT-2's scheme (Radford et al. 2019, section 2.3): weights normal with `init_std`, biases zero, norms one, and the
projections that write into the residual stream smaller by 1/sqrt(2L), since 2L of them are summed there.

Each layer draws its weights in its own constructor, from the global random generator, so that a library which
shards parameters while the model is built (ZeRO-3's `zero.Init`) sees them initialised. `initialise` draws them
again, in the same order and so with the same values (`GPT.materialise`).

A generator draws on one thread, which takes minutes for ten billion weights. So the global generator gives one number
a tensor, which seeds a generator for each chunk of it, and PyTorch's threads share the chunks. Which thread draws a
chunk doesn't matter: the weights follow from the seed, for any number of threads and ranks, any device and dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Fp8
from model.fp8 import fp8_linear
from model.weight_gradient import SumsGradients, summed_embedding, summed_linear

CHUNK = 2**20
"""Weights drawn by one generator: milliseconds of a thread, beside which Python's part is nothing, and enough chunks in
the matrices of a large model to keep tens of threads busy. Another size makes other weights of a seed."""


def residual_std(std: float, num_layers: int) -> float:
    """Standard deviation of the 2·`num_layers` projections into the residual stream."""
    return float(std / (2 * num_layers) ** 0.5)


def normal_(weight: Tensor, std: float) -> None:
    """Fill `weight` with normal numbers of mean 0 and standard deviation `std`, by as many threads as PyTorch has
    (`torch.set_num_threads`); draws nothing for one on the meta device.

    Any shape, contiguous; any dtype and device: numbers are drawn in fp32 on the CPU, then rounded and moved, a chunk
    at a time. Takes one number from the CPU's global generator, whatever the size.
    """
    if weight.is_meta:
        return
    chunks = weight.detach().view(-1).split(CHUNK)
    in_place = weight.dtype == torch.float32 and weight.device.type == "cpu"
    key = int(torch.randint(2**32, (), dtype=torch.int64, device="cpu"))
    rest = iter(range(len(chunks)))  # shared: a thread that is ready takes the next

    def draw() -> None:
        generator = torch.Generator("cpu")
        buffer = None if in_place else torch.empty_like(chunks[0], dtype=torch.float32, device="cpu")
        for number in rest:
            chunk = chunks[number]
            drawn = chunk if buffer is None else buffer[: chunk.numel()]
            drawn.normal_(0.0, std, generator=generator.manual_seed(chunk_seed(key, number)))
            if buffer is not None:
                chunk.copy_(drawn)

    num_threads = min(torch.get_num_threads(), len(chunks))
    if num_threads == 1:
        draw()
        return
    # Threads that start now have one thread an operation, instead of starting a team each.
    with host_threads(1), ThreadPoolExecutor(num_threads) as pool:
        for thread in [pool.submit(draw) for _ in range(num_threads)]:
            thread.result()


def chunk_seed(key: int, number: int) -> int:
    """Seed of chunk `number` of the tensor with this `key`, both below 2^32.

    PyTorch's CPU generator keeps 32 bits of a seed. A tensor's chunks count up from its key, so none of them is drawn
    twice; two tensors share a seed only if their ranges meet, for the 164 large ones of a 13B model with a probability
    of 0.0005. PyTorch wants seeds with about as many ones as zeros: MurmurHash3's last step mixes the bits, one to one
    (Appleby 2011, `fmix32`).
    """
    bits = (key + number) % 2**32
    bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
    return bits ^ bits >> 16


@contextmanager
def host_threads(count: int) -> Iterator[None]:
    """Let PyTorch use `count` threads on the CPU meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def init_table(weight: Tensor, std: float, num_used: int) -> None:
    """Draw the first `num_used` rows of an embedding or head; the padding rows after them are zero and stay so:
    they get no gradient, and decay keeps zero at zero."""
    normal_(weight[:num_used], std)
    nn.init.zeros_(weight[num_used:])


class Linear(SumsGradients, nn.Linear):
    """A linear layer that draws its weights with standard deviation `std`; its bias starts at zero."""

    fp8: Fp8 = Fp8.none
    """Whether and how it multiplies in fp8; see `GPT.set_fp8`."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, std: float) -> None:
        self.std = std  # before the parent's constructor, which calls `reset_parameters`
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        normal_(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is not Fp8.none:
            return fp8_linear(x, self.weight, self.bias, self.weight_sum, self.bias_sum, self.fp8)
        if self.weight_sum is None:
            return super().forward(x)
        return summed_linear(x, self.weight, self.bias, self.weight_sum, self.bias_sum)


class Embedding(SumsGradients, nn.Embedding):
    """A look-up table of which only the first `num_used` rows are ever used; the rest pad it."""

    def __init__(self, num_rows: int, width: int, *, std: float, num_used: int | None = None) -> None:
        self.std = std  # before the parent's constructor, which calls `reset_parameters`
        self.num_used = num_rows if num_used is None else num_used
        super().__init__(num_rows, width)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            init_table(self.weight, self.std, self.num_used)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.weight_sum is None:
            return super().forward(tokens)
        return summed_embedding(tokens, self.weight, self.weight_sum)


def initialise(module: nn.Module) -> None:
    """Draw the weights that `module` itself owns anew, as its constructor does, from the global random generator."""
    reset: Any = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
