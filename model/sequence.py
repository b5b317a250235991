"""Sequence parallelism: the tokens of a sample on several ranks, and the whole of them for attention.

DeepSpeed-Ulysses (Jacobs et al. 2023, section 3): everything but attention works on a token alone, so each of the P
ranks of a group keeps S/P consecutive tokens of every sample. Around attention the ranks exchange: each gives the
others its tokens' part of their heads and gets all S tokens of its own H/P heads, so that any kernel runs as it is. An
exchange moves (P-1)/P of a tensor once; a block needs one for queries, keys and values together and one for the
output, and the backward pass the same two again.

Key heads fewer than the ranks are repeated, each for the ranks whose query heads share it; autograd adds up the
gradients of the copies.

B batch, S sequence, P ranks of the group, s = S/P, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import ModelConfig


class SequenceGroup(NamedTuple):
    """The ranks that share each sample. Plain values, which torch.compile takes for constants."""

    rank: int
    """This rank's place in the group, and so its part of the tokens and of the heads."""
    size: int
    """P."""
    name: str
    """PyTorch's name of the process group."""


def problems(config: ModelConfig, size: int) -> list[str]:
    """Why `size` ranks can't share a sample of this model, each with its remedy; empty if they can.

    For configs that `model.checks.check` finds no fault with.
    """
    key = f"engine.sequence_parallel_size={size}"
    found = []
    if config.sequence_length % size:
        found.append(f"{key} does not divide model.sequence_length={config.sequence_length}; change one of them")
    if config.num_heads % size:
        possible = ", ".join(str(n) for n in range(1, config.num_heads + 1) if config.num_heads % n == 0)
        found.append(f"{key} does not divide model.num_heads={config.num_heads}; use one of {possible}")
    kv_heads = config.num_kv_heads or config.num_heads
    if kv_heads % size and size % kv_heads:
        found.append(
            f"{key}: model.num_kv_heads={kv_heads} can be neither split among the ranks nor repeated evenly; "
            "use a multiple or a divisor of the one for the other"
        )
    return found


def own_part(x: Tensor, group: SequenceGroup | None, dim: int = 1) -> Tensor:
    """This rank's part of a tensor with all S tokens, or all heads, along `dim`; without a group the tensor itself."""
    return x if group is None else x.chunk(group.size, dim)[group.rank]


def to_heads(tensors: Sequence[Tensor], group: SequenceGroup) -> Tensor:
    """This rank's heads of each tensor, for all tokens: (B, s, H_i, D) each to (B, S, sum of H_i/P, D).

    One exchange for all of them. A tensor of K < P heads counts as one of P.
    """
    parts = [_repeated(t, group.size).unflatten(2, (group.size, -1)).permute(2, 0, 1, 3, 4) for t in tensors]
    received = all_to_all(torch.cat(parts, dim=3), group.name)  # (P, B, s, heads, D): first whose tokens they are
    return received.transpose(0, 1).flatten(1, 2)  # (B, S, heads, D)


def to_tokens(x: Tensor, group: SequenceGroup) -> Tensor:
    """All heads of this rank's tokens: (B, S, H/P, D) to (B, s, H, D)."""
    sent = x.unflatten(1, (group.size, -1)).transpose(0, 1).contiguous()  # (P, B, s, H/P, D)
    received = all_to_all(sent, group.name)  # (P, B, s, H/P, D): first whose heads they are
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)  # (B, s, H, D)


def heads_on_rank(num_heads: int, size: int) -> int:
    """Heads of a tensor of `num_heads` that `to_heads` leaves on a rank."""
    return max(num_heads // size, 1)


def _repeated(x: Tensor, size: int) -> Tensor:
    """(B, s, K, D) with at least `size` heads: neighbours are copies where K is below it."""
    return x.repeat_interleave(size // x.shape[2], dim=2) if x.shape[2] < size else x


@torch.library.custom_op("flashtrain::all_to_all", mutates_args=())
def all_to_all(x: Tensor, group: str) -> Tensor:
    """x (P, ...) contiguous: row r goes to rank r of the group; row r of the result is what rank r sent here.

    An operator of its own is opaque to torch.compile, and its result is a plain tensor that kernels take; those of
    PyTorch's functional collectives are tensors that wait when they are first used.
    """
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=dist.distributed_c10d._resolve_process_group(group))  # type: ignore[arg-type]
    return out


@all_to_all.register_fake
def _all_to_all_fake(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _all_to_all_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """What row r of the result gets goes back to rank r: the same exchange."""
    return all_to_all(grad.contiguous(), ctx.group), None


all_to_all.register_autograd(_all_to_all_backward, setup_context=_setup_context)
