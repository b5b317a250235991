"""The residual stream's sums and norms: x and f to x + f and its normalisation, in one pass where that can be.

A block adds a branch to the stream and normalises the sum; backward, the norm's gradient is added to the stream's. Done
apart these are passes over memory (`model.norm_kernel` counts what one kernel each way needs). `model.fused_norms` asks
for the kernel.

What a linear layer adds to the stream has the gradient dx of the norm that follows. Where gradients are summed in place
(`model.weight_gradient`), the norm's kernel, which has dx at hand, also sums the gradient of that layer's bias:
`shift_sum`, bound by `GPT.bind_sums`.

B batch, S sequence, E width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.errors import UserError
from configs.schema import ModelConfig, Norm, Toggle
from model.weight_gradient import SumsGradients


class _AddNorm(torch.autograd.Function):
    """x (..., E), f (..., E) or None, weight (E,), bias (E,) or None to x + f and its norm. Weight and bias get their
    gradients from autograd, or where there are sums, these get them. `shift_sum` (E,) gets Σ dx."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        mean: bool,
        weight_sum: Tensor | None,
        bias_sum: Tensor | None,
        shift_sum: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, -2)  # (B·S, E)
        added = None if f is None else f.flatten(0, -2)
        total, y, stats = torch.ops.flashtrain.add_norm(rows, added, weight, bias, eps, mean)
        total = x if f is None else total.view(x.shape)
        ctx.save_for_backward(total, weight, stats)
        ctx.has_f, ctx.has_bias = f is not None, bias is not None
        ctx.weight_sum, ctx.bias_sum, ctx.shift_sum = weight_sum, bias_sum, shift_sum
        return total.view_as(total), y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, weight, stats = ctx.saved_tensors
        rows = (d_y.flatten(0, -2), d_total.flatten(0, -2), total.flatten(0, -2))  # (B·S, E) each
        d_x, parts = torch.ops.flashtrain.add_norm_backward(
            *rows, weight, stats, ctx.has_bias, ctx.shift_sum is not None
        )
        d_x = d_x.view(total.shape)
        d_parameters: list[Tensor | None] = [None, None]
        gradients = parts.sum(1)  # dw, db, dc, as many as there are: (K, E) fp32
        if ctx.weight_sum is not None:
            totals = [total for total in (ctx.weight_sum, ctx.bias_sum, ctx.shift_sum) if total is not None]
            for into, gradient in zip(totals, gradients, strict=True):
                into.add_(gradient)
        else:
            for index in range(2 if ctx.has_bias else 1):
                d_parameters[index] = gradients[index].to(weight.dtype)  # (E,)
        return d_x, d_x if ctx.has_f else None, *d_parameters, None, None, None, None, None


class ResidualNorm(SumsGradients, nn.Module):
    """x (B, S, E) and a branch f to add to it, or None, to x + f and its LayerNorm or RMSNorm, both (B, S, E)."""

    shift_sum: Tensor | None = None
    """Where the gradient of the bias that f (without f: x) ends with is summed, (E,) fp32; None: by its layer."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.eps, self.mean, self.fused = config.norm_eps, config.norm is Norm.layernorm, config.fused_norms
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if config.bias and self.mean else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def release_sums(self) -> None:
        super().release_sums()
        self.shift_sum = None

    def forward(self, x: Tensor, f: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if norms_run_fused(self.fused, x.device, x.shape[-1]):
            sums = (self.weight_sum, self.bias_sum, self.shift_sum)
            total, y = _AddNorm.apply(  # type: ignore[no-untyped-call]
                x, f, self.weight, self.bias, self.eps, self.mean, *sums
            )
            return total, y
        total = x if f is None else x + f
        if self.mean:
            return total, F.layer_norm(total, (total.shape[-1],), self.weight, self.bias, self.eps)
        return total, F.rms_norm(total, (total.shape[-1],), self.weight, self.eps)


def norms_run_fused(fused: Toggle, device: torch.device, width: int) -> bool:
    """Whether `model.fused_norms` means the kernel here. Raises `UserError` for `on` where it can't run."""
    if fused is Toggle.off:
        return False
    from model import loss_kernel, norm_kernel

    possible = width <= norm_kernel.MAX_WIDTH and loss_kernel.runs_on(device)
    if fused is Toggle.on and not possible:
        raise UserError(
            f"model.fused_norms=on: needs a CUDA device and a width of at most {norm_kernel.MAX_WIDTH}, given "
            f"{device.type} and {width}; use model.fused_norms=off"
        )
    return fused is Toggle.on or (possible and device.type == "cuda")
