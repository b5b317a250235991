"""The parts of a block around attention: norms, the MLP, rotary and ALiBi positions.

B batch, S sequence, H heads, D head dim, E width, M MLP width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import Activation, ModelConfig
from model.dimensions import Dimensions
from model.init import Linear, residual_std

GELU_SCALE, GELU_CUBIC = math.sqrt(8 / math.pi), 0.044715


class _SigmoidGELU(torch.autograd.Function):
    """GPT-2's GELU as x·σ(u) with u = √(8/π)·(x + 0.044715·x³), keeping x alone for the backward pass.

    It is the same function: (1 + tanh(u/2))/2 = σ(u). Compilers make fewer instructions of a sigmoid than of CUDA's
    tanh, which counts on a GPU where a pass of two or three bf16 operands takes about as long as its arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        out = wide * gelu_gate(wide)
        # A cast to the dtype that it has is the tensor itself; where a Function returns such a one, torch 2.11 compiles
        # a backward whose gradient is zero
        return out if out.dtype is x.dtype else out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        gate = gelu_gate(wide)
        slope = GELU_SCALE * (1 + 3 * GELU_CUBIC * wide * wide)  # u'
        return (d_out * (gate + wide * gate * (1 - gate) * slope)).to(x.dtype)


def gelu_gate(x: Tensor) -> Tensor:
    """σ(u) above."""
    return torch.sigmoid(GELU_SCALE * (x + GELU_CUBIC * x * x * x))


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's GELU. In compiled code as a sigmoid; PyTorch's one kernel, made of tanh, is the better one elsewhere."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    out: Tensor = _SigmoidGELU.apply(x)  # type: ignore[no-untyped-call]
    return out


class MLP(nn.Module):
    """(B, S, E) to (B, S, E) through `mlp_width`.

    `gelu_tanh` is GPT-2's approximation (Hendrycks & Gimpel 2016, section 2), `relu2` is ReLU squared (So et al.
    2021), `swiglu` is SiLU(x·G) · (x·U) (Shazeer 2020, eq. 6), with G and U as one matrix so that one product
    makes both; G's rows come first.
    """

    def __init__(self, config: ModelConfig, sizes: Dimensions) -> None:
        super().__init__()
        self.activation = config.activation
        hidden = sizes.mlp_width * (2 if config.activation is Activation.swiglu else 1)
        out_std = residual_std(config.init_std, sizes.num_layers)
        self.up = Linear(sizes.width, hidden, bias=config.bias, std=config.init_std)
        self.down = Linear(sizes.mlp_width, sizes.width, bias=config.bias, std=out_std)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(x)  # (B, S, M), swiglu (B, S, 2M)
        if self.activation is Activation.swiglu:
            gate, value = hidden.chunk(2, dim=-1)  # (B, S, M) each
            hidden = F.silu(gate) * value
        elif self.activation is Activation.relu2:
            hidden = F.relu(hidden).square()
        else:
            hidden = gelu_tanh(hidden) if self.activation is Activation.gelu_tanh else F.gelu(hidden)
        out: Tensor = self.down(hidden)
        return out


def token_positions(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Position of each token: (S,) int64, or (B, S) counted from the start of its document.

    `cu_seqlens` (n+1,) int32: starts of the documents in the flattened B·S tokens, and B·S itself.
    """
    batch, length = tokens.shape
    if cu_seqlens is None:
        return torch.arange(length, device=tokens.device)
    index = torch.arange(batch * length, device=tokens.device, dtype=cu_seqlens.dtype)
    start = cu_seqlens[document_ids(index, cu_seqlens)]
    return (index - start).long().view(batch, length)  # (B, S)


def document_ids(index: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The document of each flat token index, int64 of the shape of `index`. Needs no transfer to the host."""
    return torch.searchsorted(cu_seqlens, index, right=True) - 1


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, fp32 (S, D/2) or (B, S, D/2) (Su et al. 2021, eq. 15).

    Made anew in each forward pass, once for all blocks: a stored table would be rounded when the model is cast to
    bf16, and at position 4,000 a bf16 angle is off by whole turns.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim  # (D/2,)
    angle = positions[..., None].float() * theta**-exponent  # (..., S, D/2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of each head; x (B, S, H, D), tables (S, D/2) or (B, S, D/2); in fp32.

    Pairing halves instead of neighbours is the convention of Llama's published weights in `transformers`.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., S, 1, D/2)
    first, second = x.float().chunk(2, dim=-1)  # (B, S, H, D/2) each
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)  # (B, S, H, D)
    return rotated.to(x.dtype)


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """ALiBi's slope of each head, fp32 (H,) (Press et al. 2022, section 3).

    With H a power of two, slope h is 2^(-8(h+1)/H). Otherwise the slopes of the next smaller power P come first,
    then every other slope of 2P, as in the authors' code. A score gets slope · (j - i), never positive.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    steps = torch.arange(1, power + 1, device=device, dtype=torch.float32) * (8 / power)
    if power < num_heads:
        odd = torch.arange(1, 2 * (num_heads - power), 2, device=device, dtype=torch.float32)
        steps = torch.cat((steps, odd * (4 / power)))
    return torch.exp2(-steps)
