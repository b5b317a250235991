"""The head and its loss: cross-entropy in fp32 that never holds all logits.

The logits of N tokens, N x V in fp32, are the largest tensor of a small model's step, and their gradient is as
large. Since the loss is the last thing computed, its gradient can be made on the way forward: the tokens are taken
in chunks, and of each chunk only the sums of its losses, its rows of the hidden state's gradient and its part of
the weight's gradient stay. The backward pass scales what is there (the idea of "cut" and "fused linear"
cross-entropies; Hsu et al. 2024, section 3.2). Three products instead of the four of recomputing in the backward.

For one token with logits x, soft-capped to y = c·tanh(x/c), over the V columns that exist (not the padding):

    lse = log Σ exp(y)        loss = lse - y[target]        z-loss = w·lse²   (Chowdhery et al. 2022, section 5)
    ∂(loss + z-loss)/∂x_j = (softmax(y)_j·(1 + 2·w·lse) - [j = target]) · (1 - (y_j/c)²)

Products run in the model's dtype; the softmax, both sums, and the sum of the weight's gradient over chunks are
fp32. On CUDA one Triton kernel turns a chunk's logits into their gradient in place (`model.loss_kernel`).
Liger's fused linear cross-entropy does the same job, but waits for the host twice a call (`.item()` on the number
of targets, `torch.equal` on the incoming gradient), sums the z-loss in bf16 and can leave out the padding columns
only by slicing the weight to V rows, which takes the products off their aligned tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from configs.errors import UserError
from configs.schema import ModelConfig, Toggle
from model.dimensions import Dimensions, round_up
from model.init import init_table
from model.weight_gradient import SumsGradients, add_weight_gradient_

IGNORE = -100
"""Target of a token that is not counted."""

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**28}
"""Logits held at a time, by device. CUDA: 512 MiB in bf16, 5,300 tokens of a 50,304 vocabulary, so that reading and
writing the weight's fp32 gradient once a chunk stays small beside the products. CPU: 16 MiB in fp32."""


class LossOptions(NamedTuple):
    """What the loss of a token depends on besides its logits."""

    vocab_size: int
    """Columns that exist, V; those after them are padding."""
    softcap: float
    """c above; 0: off."""
    z_loss: float
    """w above; 0: off."""
    fused: bool
    """The Triton kernel instead of PyTorch operations."""


class Head(SumsGradients, nn.Module):
    """Hidden state to logits or loss. Owns its weight (padded V, E), or shares the embedding's."""

    def __init__(self, config: ModelConfig, sizes: Dimensions, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.std, self.num_used = config.init_std, sizes.vocab_size
        self.softcap, self.z_loss, self.fused = config.logit_softcap, config.z_loss, config.fused
        self.tied = tied is not None
        self.weight = nn.Parameter(torch.empty(sizes.padded_vocab_size, sizes.width)) if tied is None else tied
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.tied:  # else it is the embedding's to draw
            with torch.no_grad():
                init_table(self.weight, self.std, self.num_used)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden (B, S, E). Without targets: logits fp32 (B, S, V). With targets (B, S): see `linear_cross_entropy`."""
        if targets is None:
            logits = nn.functional.linear(hidden, self.weight)[..., : self.num_used].float()  # (B, S, V)
            return self.softcap * torch.tanh(logits / self.softcap) if self.softcap > 0 else logits
        options = LossOptions(self.num_used, self.softcap, self.z_loss, resolve_fused(self.fused, hidden.device))
        return linear_cross_entropy(hidden, self.weight, targets, options, self.weight_sum)


def resolve_fused(fused: Toggle, device: torch.device) -> bool:
    """Whether `model.fused` means the Triton kernel on this device. Raises `UserError` for `on` where it can't run."""
    from model import loss_kernel

    if fused is Toggle.on and not loss_kernel.runs_on(device):
        raise UserError(f"model.fused=on needs a CUDA device, not {device.type}; use model.fused=auto or off")
    return fused is Toggle.on or (fused is Toggle.auto and device.type == "cuda")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions, weight_sum: Tensor | None = None
) -> Tensor:
    """Sums over the counted tokens: fp32 (2,), [cross-entropy in nats, z-loss times its weight].

    hidden (..., E); weight (padded V, E), same dtype; targets (...) int64, `IGNORE` where not counted. The weight's
    gradient is added to `weight_sum` (padded V, E), fp32, if given, and not handed to autograd.

    The gradient of both sums flows through the first entry, the second is for the log; so the loss to minimise
    is `sums.sum()`, or equally its first entry's graph. It can't be differentiated twice.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    sums: Tensor = _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), options, weight_sum)
    return sums


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden (N, E), weight (padded V, E), targets (N,) to sums (2,); gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions, weight_sum: Tensor | None
    ) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        for part in chunks(hidden.shape[0], weight.shape[0], hidden.device):
            logits = hidden[part] @ weight.t()  # (n, padded V)
            sums += chunk_loss_(logits, targets[part], options, want_gradient=want_hidden or want_weight)
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[part])  # logits hold their own gradient now
            if d_weight is not None:
                add_weight_gradient_(d_weight, logits, hidden[part])
            del logits  # before the next chunk's are there
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype, ctx.weight_sum = weight.dtype, weight_sum
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sums: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = d_sums[:1]  # 1-dimensional, so that the product below is fp32 and rounded once
        if d_hidden is not None:
            d_hidden = torch.mul(d_hidden, scale, out=torch.empty_like(d_hidden))
        if d_weight is not None and ctx.weight_sum is not None:
            ctx.weight_sum.addcmul_(d_weight, scale)
            d_weight = None
        elif d_weight is not None:
            d_weight = torch.mul(d_weight, scale, out=torch.empty_like(d_weight, dtype=ctx.weight_dtype))
        return d_hidden, d_weight, None, None, None


def chunks(num_tokens: int, num_columns: int, device: torch.device) -> list[slice]:
    """Slices of the tokens, alike but for the last, of whole tiles if possible, with at most `CHUNK_LOGITS` logits."""
    most = max(1, CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cuda"]) // num_columns)
    tile = 128 if most >= 128 else 1
    most = most // tile * tile
    count = max(1, -(-num_tokens // most))
    size = max(1, round_up(-(-num_tokens // count), tile))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def chunk_loss_(logits: Tensor, targets: Tensor, options: LossOptions, want_gradient: bool) -> Tensor:
    """The sums (2,) of a chunk's losses; with `want_gradient`, `logits` (n, padded V) become their gradient."""
    if options.fused:
        from model import loss_kernel

        return loss_kernel.cross_entropy_(logits, targets, options, want_gradient)
    return plain_chunk_loss_(logits, targets, options, want_gradient)


def plain_chunk_loss_(logits: Tensor, targets: Tensor, options: LossOptions, want_gradient: bool) -> Tensor:
    """`chunk_loss_` in PyTorch operations; needs a second tensor of the logits' size, in fp32."""
    counted = targets != IGNORE  # (n,)
    column = targets.where(counted, 0)[:, None]  # (n, 1): a column that exists, also for tokens that don't count
    used = logits[:, : options.vocab_size]
    y = used.float() if options.softcap == 0 else options.softcap * torch.tanh(used.float() / options.softcap)
    lse = y.logsumexp(dim=-1)  # (n,)
    loss = (lse - y.gather(1, column)[:, 0]).where(counted, 0.0).sum()
    z_loss = options.z_loss * lse.square().where(counted, 0.0).sum()
    if want_gradient:
        d_y = torch.exp(y - lse[:, None])  # (n, V)
        d_y *= (1 + 2 * options.z_loss * lse)[:, None]
        d_y.scatter_add_(1, column, torch.full_like(column, -1, dtype=d_y.dtype))
        d_y *= counted[:, None]
        if options.softcap > 0:
            d_y *= 1 - (y / options.softcap).square_()
        used.copy_(d_y)
        logits[:, options.vocab_size :] = 0
    return torch.stack((loss, z_loss))
