"""Initial weights, and the layers that draw their own.

GPT-2's scheme (Radford et al. 2019, section 2.3): weights normal with `init_std`, biases zero, norms one, and the
projections that write into the residual stream smaller by 1/sqrt(2L), since 2L of them are summed there.

Each layer draws its weights in its own constructor, from the global random generator, so that a library which
shards parameters while the model is built (ZeRO-3's `zero.Init`) sees them initialised. `initialise` draws them
again, in the same order and so with the same values (`GPT.materialise`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Fp8
from model.fp8 import fp8_linear
from model.weight_gradient import SumsGradients, summed_embedding, summed_linear


def residual_std(std: float, num_layers: int) -> float:
    """Standard deviation of the 2·`num_layers` projections into the residual stream."""
    return float(std / (2 * num_layers) ** 0.5)


def init_table(weight: Tensor, std: float, num_used: int) -> None:
    """Draw the first `num_used` rows of an embedding or head; the padding rows after them are zero and stay so:
    they get no gradient, and decay keeps zero at zero."""
    nn.init.normal_(weight[:num_used], std=std)
    nn.init.zeros_(weight[num_used:])


class Linear(SumsGradients, nn.Linear):
    """A linear layer that draws its weights with standard deviation `std`; its bias starts at zero."""

    fp8: Fp8 = Fp8.none
    """Whether and how it multiplies in fp8; see `GPT.set_fp8`."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, std: float) -> None:
        self.std = std  # before the parent's constructor, which calls `reset_parameters`
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
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
