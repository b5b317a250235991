"""AdamW as the engine uses it, and the loss scale of fp16.

`ReplicatedAdamW` serves ZeRO stage 0. DeepSpeed's own wrapper there (`FP16_UnfusedOptimizer`) warms its state up with a
real AdamW step on zero gradients, which decays the weights and shifts the bias correction, and doesn't scale the fp16
loss. Ours keeps the layout of stage 1 with a single partition: per parameter group one flat tensor of fp32 masters and
one flat buffer in which the micro-batches' gradients are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from configs.schema import OptimConfig


def adamw_arguments(optim: OptimConfig, one_kernel: bool) -> dict[str, Any]:
    """Keyword arguments of `torch.optim.AdamW`, decay aside: that differs between the groups.

    `fused` is one kernel a group on CUDA and one vectorised loop on a CPU, so offloaded states need no compiler. With
    `one_kernel` the updates are `update_in_one_kernel`'s and PyTorch keeps the state.
    """
    return {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps, "fused": not one_kernel}


def adam_state(optimizer: AdamW, flat: Tensor) -> dict[str, Tensor]:
    """Moments and step count of the flat master tensor; zeros, as AdamW itself starts them, if it has none yet.

    As in AdamW itself the count lies beside the masters if its own fused kernel reads it there, else in host memory.
    """
    state = optimizer.state[flat]
    if not state:
        device = flat.device if optimizer.defaults["fused"] else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["exp_avg"] = torch.zeros_like(flat)
        state["exp_avg_sq"] = torch.zeros_like(flat)
    return state


@torch.no_grad()
def update_in_one_kernel(
    optimizer: AdamW, gradients: Sequence[Tensor], weights: Sequence[Tensor], factor: float | Tensor
) -> None:
    """AdamW's step for groups of one flat fp32 master each: one launch a group, and no wait for the device.

    gradients: each group's summed gradients, multiplied by `factor` on their way and zero afterwards. weights: what
    its masters are rounded into. Both flat and of the master's size, (n,). factor: a number, or fp32 (1,) beside them
    in which NaN leaves the update out; it is counted all the same, until whoever learns of that takes it back.
    """
    for group, gradient, weight in zip(optimizer.param_groups, gradients, weights, strict=True):
        (master,) = group["params"]
        update_flat(optimizer, group, master, gradient, weight, factor)


@torch.no_grad()
def update_flat(
    optimizer: AdamW, group: dict[str, Any], master: Tensor, gradient: Tensor, weight: Tensor, factor: float | Tensor
) -> None:
    """`update_in_one_kernel` of one flat master, with the learning rate, betas and decay of `group`."""
    from training.adamw_kernel import scalars_of, update

    if not isinstance(factor, Tensor):
        factor = torch.full((1,), factor, dtype=torch.float32, device=gradient.device)
    state = adam_state(optimizer, master)
    state["step"] += 1.0  # in host memory
    scalars = scalars_of(
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        step=int(state["step"].item()),
    )
    update(master.detach(), gradient, state["exp_avg"], state["exp_avg_sq"], weight, factor, scalars)


class ReplicatedAdamW(AdamW):
    """AdamW on flat fp32 masters of parameters in any dtype; every rank holds and updates all of them."""

    def __init__(
        self, groups: Sequence[dict[str, Any]], accumulation: torch.dtype, one_kernel: bool = False, **arguments: Any
    ) -> None:
        """`groups`: AdamW parameter groups of the model's parameters. `accumulation`: dtype gradients are summed in.
        `one_kernel`: step by `update_in_one_kernel`, for which the parameters become views of one tensor a group."""
        self.members: list[list[nn.Parameter]] = [list(group["params"]) for group in groups]
        self.masters = [flatten(members) for members in self.members]
        self.weights = [join(members) for members in self.members] if one_kernel else []
        """Flat parameters of each group, with `one_kernel`."""
        self.gradients = [torch.zeros_like(master, dtype=accumulation) for master in self.masters]
        self.factor: float | Tensor = 1.0
        """The next `step` multiplies gradients by this: clipping and the inverse loss scale. A tensor, fp32 (1,), only
        with `one_kernel`."""
        flat = [{**g, "params": [master]} for g, master in zip(groups, self.masters, strict=True)]
        super().__init__(flat, **arguments)
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(self.accumulate(buffer))
            for members, gradient in zip(self.members, self.gradients, strict=True)
            for parameter, buffer in zip(members, split(gradient, members), strict=True)
        ]

    @staticmethod
    def accumulate(buffer: Tensor) -> Any:
        """Hook that adds a parameter's gradient to its part of the flat buffer and frees it at once.

        It also runs for a layer that has added its gradient there itself and given autograd none.
        """

        def add(parameter: Tensor) -> None:
            if parameter.grad is not None:
                buffer.add_(parameter.grad)
                parameter.grad = None

        return add

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """The tensors DeepSpeed averages over ranks after the last micro-batch (dense, and none of experts)."""
        return self.gradients, {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update masters from the summed gradients, then the parameters from the masters."""
        if self.weights:
            return update_in_one_kernel(self, self.gradients, self.weights, self.factor)
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient.to(master.dtype)  # itself when summed in fp32
            if self.factor != 1.0:
                master.grad.mul_(self.factor)
        super().step()
        self.refresh()
        self.zero_grad()
        return None

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the parameters."""
        for master, members in zip(self.masters, self.members, strict=True):
            torch._foreach_copy_(members, split(master, members))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Empty the gradient buffers."""
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            gradient.zero_()
            master.grad = None


def flatten(parameters: Sequence[Tensor]) -> Tensor:
    """One fp32 leaf with the parameters' values one after the other, shape (sum of sizes,)."""
    return torch.cat([p.detach().float().flatten() for p in parameters]).requires_grad_()


def join(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Move the parameters, of one dtype, into one flat tensor, (sum of sizes,), of which they become views."""
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, view in zip(parameters, split(flat, parameters), strict=True):
        parameter.data = view
    return flat


def split(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Views of `flat` in the parameters' shapes."""
    parts = flat.detach().split([p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


@dataclass
class LossScale:
    """Loss scale of fp16 (Micikevicius et al. 2018, section 3.2): fixed, or halved at overflow, doubled when calm."""

    scale: float = 1.0
    dynamic: bool = False
    calm_steps: int = 0
    """Steps without overflow since the scale last changed."""

    window: int = 1000
    """Calm steps before the scale doubles."""

    def overflowed(self) -> bool:
        """Note a non-finite gradient. True if a smaller scale may cure it, so that it is no failure of the run."""
        curable = self.dynamic and self.scale > 1.0
        if curable:
            self.scale, self.calm_steps = max(self.scale / 2.0, 1.0), 0
        return curable

    def succeeded(self) -> None:
        """Note a finite step."""
        if self.dynamic:
            self.calm_steps += 1
            if self.calm_steps == self.window and self.scale < 2.0**24:
                self.scale, self.calm_steps = self.scale * 2.0, 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)


def fp16_scale(loss_scale: float) -> LossScale:
    """`engine.loss_scale` as a scale: 0 is dynamic from 2^16, else fixed."""
    return LossScale(2.0**16, dynamic=True) if loss_scale == 0 else LossScale(loss_scale)
