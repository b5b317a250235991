"""An MLP whose GELU is done inside its products, where their sums still are in registers.

H = GELU(X·W₁ᵀ + b₁), Y = H·W₂ᵀ + b₂. Apart, the GELU is a pass over memory each way: forward it reads the argument and
writes H, backward it reads dH and the argument and writes dA, 5·M elements a token. The first product can write both
the argument and H, and the product that makes dH can read the argument and write dA: 2·M elements a token each way.
dH is never stored and so not rounded; neither is the argument before its GELU. b₁'s
gradient stays a sum of its own: the library's epilogue that takes it too was slower than all of it apart
(docs/mfu_log.md).

On CUDA in 16 bits the products are cuBLASLt's (`model.cublaslt`), and PyTorch's in 16 bits where that has none for the
operands' shapes or addresses; else PyTorch operations of the same roundings.

T tokens (all leading dims), E width, M MLP width.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from configs.errors import UserError
from configs.schema import Activation, ModelConfig, Toggle
from model.cublaslt import Epilogue, UnsupportedError, missing, product
from model.init import Linear

log = logging.getLogger(__name__)


def runs_in_cublas(x: Tensor) -> bool:
    """Whether products of `x` are cuBLASLt's here."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


@cache
def why_not() -> str | None:
    """Why `model.fused_gelu` can't be on CUDA here, or None; said once in the log."""
    reason = missing()
    if reason is not None and torch.cuda.is_available():
        log.info("GELU is apart from its products: %s", reason)
    return reason


def possible(config: ModelConfig) -> bool:
    """Whether the MLP is one that the library has epilogues for."""
    return config.activation is Activation.gelu_tanh and config.bias


def runs_fused(fused: Toggle, reason: str | None, x: Tensor) -> bool:
    """Whether `model.fused_gelu` means these products for `x`. Raises `UserError` for `on` where it can't be."""
    if fused is Toggle.on and x.device.type == "cuda" and (reason is not None or not runs_in_cublas(x)):
        reason = reason or f"the activations are {x.dtype}, not bfloat16 or float16"
        raise UserError(f"model.fused_gelu=on: {reason}; use model.fused_gelu=auto or off")
    return fused is Toggle.on or (fused is Toggle.auto and reason is None and runs_in_cublas(x))


@cache
def _say_apart(reason: str) -> None:
    log.info("some products leave their GELU apart: %s", reason)


def _wide(x: Tensor) -> Tensor:
    """At least fp32, as sums are kept."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("flashtrain::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, E), weight (M, E), bias (M,), contiguous, of one dtype, to GELU(a) and a = x·weightᵀ + bias, (T, M) each.

    The GELU is GPT-2's, of tanh, and taken of a before a is rounded.
    """
    shape = (x.shape[0], weight.shape[0])
    if runs_in_cublas(x):
        out, argument = x.new_empty(shape), x.new_empty(shape)
        try:
            product(Epilogue.gelu_aux_bias, weight, x, out, transpose_a=True, bias=bias, aux=argument)
        except UnsupportedError as error:
            _say_apart(str(error))
            argument = F.linear(x, weight, bias)
            out = F.gelu(argument, approximate="tanh")
        return out, argument
    sums = F.linear(_wide(x), _wide(weight), _wide(bias))
    return F.gelu(sums, approximate="tanh").to(x.dtype), sums.to(x.dtype, copy=True)


@linear_gelu.register_fake
def _linear_gelu_fake(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("flashtrain::linear_gelu_backward", mutates_args=())
def linear_gelu_backward(d_out: Tensor, weight: Tensor, argument: Tensor) -> Tensor:
    """Through Y = GELU(a)·weightᵀ back to a: d_out (T, E), weight (E, M), argument (T, M), contiguous, of one dtype, to
    d_a (T, M) in that dtype."""
    if runs_in_cublas(d_out):
        d_argument = torch.empty_like(argument)
        try:
            product(Epilogue.dgelu, weight, d_out, d_argument, transpose_a=False, bias=None, aux=argument)
        except UnsupportedError as error:
            _say_apart(str(error))
            d_argument = torch.ops.aten.gelu_backward(d_out @ weight, argument, approximate="tanh")
        return d_argument
    d_sums = torch.ops.aten.gelu_backward(_wide(d_out) @ _wide(weight), _wide(argument), approximate="tanh")
    return d_sums.to(d_out.dtype)


@linear_gelu_backward.register_fake
def _linear_gelu_backward_fake(d_out: Tensor, weight: Tensor, argument: Tensor) -> Tensor:
    return torch.empty_like(argument)


@register_flop_formula(torch.ops.flashtrain.linear_gelu)  # type: ignore[untyped-decorator]
def _linear_gelu_flops(x: torch.Size, weight: torch.Size, bias: torch.Size, **_: Any) -> int:
    """2·T·E·M: PyTorch's counter doesn't look into operators."""
    return 2 * x.numel() * weight[0]


@register_flop_formula(torch.ops.flashtrain.linear_gelu_backward)  # type: ignore[untyped-decorator]
def _linear_gelu_backward_flops(d_out: torch.Size, weight: torch.Size, argument: torch.Size, **_: Any) -> int:
    """2·T·E·M."""
    return 2 * d_out.numel() * weight[1]


class _GeluMLP(torch.autograd.Function):
    """x (..., E), W₁ (M, E), b₁ (M,), W₂ (E, M), b₂ (E,) to (..., E). Where there are sums, fp32, in this order of the
    four, these get the gradients of weights and biases, and autograd gets none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor,
        up_bias: Tensor,
        down: Tensor,
        down_bias: Tensor,
        *sums: Tensor | None,
    ) -> Tensor:
        hidden, argument = torch.ops.flashtrain.linear_gelu(x.flatten(0, -2), up, up_bias)
        ctx.save_for_backward(x, up, down, hidden, argument)
        ctx.sums = sums
        return F.linear(hidden, down, down_bias).view(x.shape)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, up, down, hidden, argument = ctx.saved_tensors
        up_sum, up_bias_sum, down_sum, down_bias_sum = ctx.sums
        rows = d_out.flatten(0, -2).contiguous()  # (T, E)
        d_down = _weight_gradient(rows, hidden, down_sum)
        d_down_bias = _bias_gradient(rows.sum(0, dtype=_wide(rows[:0]).dtype), rows.dtype, down_bias_sum)
        d_argument = torch.ops.flashtrain.linear_gelu_backward(rows, down, argument)
        d_up = _weight_gradient(d_argument, x.flatten(0, -2), up_sum)
        d_up_bias = _bias_gradient(d_argument.sum(0, dtype=_wide(rows[:0]).dtype), rows.dtype, up_bias_sum)
        d_x = (d_argument @ up).view(x.shape)  # (T, E) to (..., E)
        return d_x, d_up, d_up_bias, d_down, d_down_bias, None, None, None, None


def _weight_gradient(d_out: Tensor, x: Tensor, into: Tensor | None) -> Tensor | None:
    """d_outᵀ (O, T) · x (T, I), or None once it is added to `into` (O, I)."""
    if into is None:
        return d_out.t() @ x
    torch.ops.flashtrain.add_weight_gradient_(into, d_out, x)
    return None


def _bias_gradient(gradient: Tensor, dtype: torch.dtype, into: Tensor | None) -> Tensor | None:
    """The gradient (O,) in `dtype`, or None once it is added to `into` (O,)."""
    if into is None:
        return gradient.to(dtype)
    into.add_(gradient)
    return None


def gelu_mlp(x: Tensor, up: Linear, down: Linear) -> Tensor:
    """down(GELU(up(x))) of two linear layers with biases, x (B, S, E) to (B, S, E), all of one dtype."""
    weights = (up.weight, up.bias, down.weight, down.bias)
    sums = (up.weight_sum, up.bias_sum, down.weight_sum, down.bias_sum)
    out: Tensor = _GeluMLP.apply(x.contiguous(), *weights, *sums)  # type: ignore[no-untyped-call]
    return out
