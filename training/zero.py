"""DeepSpeed's optimizer wrappers seen through one interface.

Each ZeRO stage keeps fp32 masters, AdamW moments and reduced gradients in flat tensors of its own layout. A `Partition`
names what this rank holds of them, so that the engine can measure, scale or drop gradients before a step, and a
checkpoint can read and write masters and moments by parameter name in every stage. The attributes used here are those
of DeepSpeed 0.19. `training.lean_zero` has the stages that step by our own code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from training.optimizer import ReplicatedAdamW, adam_state, split, update_in_one_kernel


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of one flattened parameter: elements `start` to `start + master.numel()`."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    master: Tensor
    """fp32 view, (n,)."""
    exp_avg: Tensor
    """First moment, fp32 view, (n,)."""
    exp_avg_sq: Tensor
    """Second moment, fp32 view, (n,)."""


@dataclass(frozen=True)
class Range:
    """Elements `start` to `start + length` of a parameter lie at `offset` in flat tensor number `group`."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    group: int
    offset: int


class Partition(ABC):
    """This rank's part of masters, moments and gradients."""

    def __init__(self, wrapper: Any, adamw: AdamW, names: Mapping[nn.Parameter, str]) -> None:
        self.wrapper = wrapper
        self.adamw = adamw
        self.names = names

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """Flat fp32 masters that AdamW updates on this rank."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Reduced gradients; over all ranks each element once, padding (zeros) aside. Only after the last backward."""

    def sums(self) -> dict[nn.Parameter, Tensor]:
        """Where each parameter's gradients are added up over micro-batches on this rank, in the parameter's shape; live
        views. In the weights' dtype, where each micro-batch's is written. Empty if the wrapper has no such place."""
        return {}

    @abstractmethod
    def drop(self) -> None:
        """Forget the gradients, as a step would, without an update."""

    @abstractmethod
    def scale(self, factor: float | Tensor) -> None:
        """Have the coming step multiply gradients by `factor`; a tensor, fp32 (1,), only where one kernel steps."""

    @abstractmethod
    def refresh(self) -> None:
        """Round masters into the model's weights on all ranks, exactly as a step ends."""

    @abstractmethod
    def ranges(self, owned: bool) -> Iterator[Range]:
        """What the flat masters hold; with `owned`, over all ranks each element once."""

    def fragments(self, owned: bool = True) -> Iterator[Fragment]:
        """Live views of masters and moments; with `owned`, over all ranks each element once."""
        masters = self.masters()
        for at in self.ranges(owned):
            flat = masters[at.group]
            state = adam_state(self.adamw, flat)
            master, first, second = (
                t.detach().narrow(0, at.offset, at.length) for t in (flat, state["exp_avg"], state["exp_avg_sq"])
            )
            yield Fragment(at.name, at.shape, at.start, master, first, second)

    @property
    def updates(self) -> int:
        """Updates AdamW has made: its bias correction's exponent."""
        return int(adam_state(self.adamw, self.masters()[0])["step"].item())

    @updates.setter
    def updates(self, count: int) -> None:
        for flat in self.masters():
            adam_state(self.adamw, flat)["step"].fill_(count)


class Replicated(Partition):
    """Stage 0: `ReplicatedAdamW`. Each rank has everything and owns an even share of it."""

    wrapper: ReplicatedAdamW

    def __init__(self, adamw: ReplicatedAdamW, names: Mapping[nn.Parameter, str], rank: int, world_size: int) -> None:
        super().__init__(adamw, adamw, names)
        self.rank = rank
        self.world_size = world_size

    def masters(self) -> list[Tensor]:
        return self.wrapper.masters

    def share(self, size: int) -> tuple[int, int]:
        """Begin and end of this rank's share of a flat tensor of `size`."""
        return size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size

    def gradients(self) -> list[Tensor]:
        return [g[slice(*self.share(g.numel()))] for g in self.wrapper.gradients]

    def sums(self) -> dict[nn.Parameter, Tensor]:
        return {
            parameter: view
            for members, gradient in zip(self.wrapper.members, self.wrapper.gradients, strict=True)
            for parameter, view in zip(members, split(gradient, members), strict=True)
        }

    def drop(self) -> None:
        self.wrapper.zero_grad()

    def scale(self, factor: float | Tensor) -> None:
        self.wrapper.factor = factor

    def refresh(self) -> None:
        self.wrapper.refresh()

    def ranges(self, owned: bool) -> Iterator[Range]:
        for group, (members, master) in enumerate(zip(self.wrapper.members, self.wrapper.masters, strict=True)):
            low, high = self.share(master.numel()) if owned else (0, master.numel())
            offset = 0
            for parameter in members:
                begin, end = max(offset, low), min(offset + parameter.numel(), high)
                if begin < end:
                    shape = tuple(parameter.shape)
                    yield Range(self.names[parameter], shape, begin - offset, end - begin, group, begin)
                offset += parameter.numel()


class Linked(Partition):
    """Stages 1 and 2, whose parameters link to their part of the flat masters (`param._hp_mapping`)."""

    def ranges(self, owned: bool) -> Iterator[Range]:
        for parameter, name in self.names.items():
            link = parameter._hp_mapping  # type: ignore[attr-defined]
            if link is not None:  # this rank holds a part of it
                part, at = link.lp_fragment_address, link.hp_fragment_address
                shape = tuple(parameter.shape)
                yield Range(name, shape, part.start, part.numel, link.param_group_index, at.start)

    def refresh(self) -> None:
        self.wrapper.update_lp_params()


class Bf16Stage1(Linked):
    """Stage 1, bf16 summed in fp32: `BF16_Optimizer`, which has room for all gradients on every rank.

    Its step takes the norm of the sums tensor by tensor, waits for it on the host and empties the sums; DeepSpeed's
    engine then empties them again. The norm is known by then, to our engine, and once is enough: 8 bytes a weight.
    `step_by_kernel` replaces that step.
    """

    def __init__(self, wrapper: Any, adamw: AdamW, names: Mapping[nn.Parameter, str]) -> None:
        super().__init__(wrapper, adamw, names)
        nothing = [torch.zeros(1, device=self.masters()[0].device)]
        wrapper.get_grads_for_norm = lambda for_clipping=False: (nothing, {})
        wrapper.zero_grad = wrapper.clear_lp_grads
        self.one_kernel = False
        self.factor: float | Tensor = 1.0
        """The next `step_in_one_kernel` multiplies gradients by this."""

    def step_by_kernel(self) -> None:
        """From now on step by `step_in_one_kernel`, where DeepSpeed makes passes of their own to clip, update, round
        and empty. Nothing else is left to empty: hooks free each parameter's gradient once it is added to its sum."""
        self.one_kernel = True
        self.wrapper.step = self.step_in_one_kernel
        self.wrapper.zero_grad = lambda: None

    @torch.no_grad()
    def step_in_one_kernel(self) -> None:
        """Update this rank's part, send its weights to the other ranks, and empty the sums of theirs meanwhile."""
        groups, flats = self.wrapper.real_dp_process_group, self.wrapper.bf16_groups_flat
        ranks = [dist.get_rank(group) for group in groups]
        weights = [parts[rank] for parts, rank in zip(self.wrapper.bf16_partitioned_groups, ranks, strict=True)]
        call_pre_hooks(self.adamw)
        update_in_one_kernel(self.adamw, self.gradients(), weights, self.factor)
        gathers = [
            dist.all_gather_into_tensor(flat, own, group=group, async_op=True)
            for flat, own, group in zip(flats, weights, groups, strict=True)
            if dist.get_world_size(group) > 1
        ]
        for total, own, rank in zip(self.wrapper.fp32_groups_gradients_flat, self.gradients(), ranks, strict=True):
            begin, end = rank * own.numel(), (rank + 1) * own.numel()
            for others in (total[:begin], total[end:]):
                if others.numel():
                    others.zero_()
        for gather in gathers:
            gather.wait()

    def masters(self) -> list[Tensor]:
        flats: list[Tensor] = self.wrapper.fp32_groups_flat_partition
        return flats

    def gradients(self) -> list[Tensor]:
        flats: list[Tensor] = self.wrapper.fp32_groups_gradient_flat_partition
        return flats

    def sums(self) -> dict[nn.Parameter, Tensor]:
        groups = zip(self.wrapper.bf16_groups, self.wrapper.fp32_groups_gradients, strict=True)
        return {p: view.view(p.shape) for members, views in groups for p, view in zip(members, views, strict=True)}

    def average(self, **_: Any) -> None:
        """In place of DeepSpeed's `buffered_allreduce_fallback`: average gradients over the ranks, each its own part.

        That reduces all of them to all ranks, by way of two copies, and each then updates its part: twice the bytes.
        """
        flats = self.wrapper.fp32_groups_gradients_flat
        for flat, own, group in zip(flats, self.gradients(), self.wrapper.real_dp_process_group, strict=True):
            dist.reduce_scatter_tensor(own, flat, group=group)
            own.div_(dist.get_world_size(group))

    def drop(self) -> None:
        self.wrapper.clear_lp_grads(set_to_none=True)
        self.wrapper.clear_hp_grads()

    def scale(self, factor: float | Tensor) -> None:
        if self.one_kernel:
            self.factor = factor
        elif factor != 1.0:
            torch._foreach_mul_(self.gradients(), factor)


class Stage12(Linked):
    """Stages 1 and 2 otherwise: `DeepSpeedZeroOptimizer`."""

    def masters(self) -> list[Tensor]:
        flats: list[Tensor] = self.wrapper.single_partition_of_fp32_groups
        return flats

    def gradients(self) -> list[Tensor]:
        if self.wrapper.cpu_offload:
            return offloaded_gradients(self.masters())
        return [gradient for group in self.wrapper.averaged_gradients.values() for gradient in group]

    def drop(self) -> None:
        self.wrapper.micro_step_id = -1  # as its own step() resets it, so that the next backward doesn't accumulate
        self.wrapper.zero_grad(set_to_none=True)
        if self.wrapper.cpu_offload:
            self.wrapper._offload_accumulated_param_ids = set()
            self.wrapper.reset_cpu_buffers()
        for group in self.wrapper.averaged_gradients:
            self.wrapper.averaged_gradients[group] = None
            self.wrapper.all_grad_tensors[group] = None

    def scale(self, factor: float | Tensor) -> None:
        divide_in_step(self.wrapper, factor)


class Stage3(Partition):
    """Stage 3: every parameter is cut into equal parts, one a rank."""

    def masters(self) -> list[Tensor]:
        flats: list[Tensor] = self.wrapper.fp32_partitioned_groups_flat
        return flats

    def gradients(self) -> list[Tensor]:
        if self.wrapper.offload_optimizer:
            return offloaded_gradients(self.masters())
        return [gradient for group in self.wrapper.averaged_gradients.values() for gradient in group]

    def drop(self) -> None:
        self.wrapper._pre_step()
        self.wrapper._partition_all_parameters()
        self.wrapper._overflow_clean_up(1.0)

    def scale(self, factor: float | Tensor) -> None:
        divide_in_step(self.wrapper, factor)

    def refresh(self) -> None:
        self.wrapper._partition_all_parameters()
        for group in range(len(self.wrapper.fp16_groups)):
            self.wrapper._reassign_or_swap_out_partitioned_parameters(group)
        self.gather_resident()

    def gather_resident(self) -> None:
        """Gather the parameters that stay gathered."""
        resident = self.wrapper.persistent_parameters  # small ones that every rank keeps whole
        if resident:
            resident[0].all_gather(resident)

    def ranges(self, owned: bool) -> Iterator[Range]:
        for parameter, name in self.names.items():
            group, offset, size = self.wrapper.grad_position[self.wrapper.get_param_id(parameter)]
            total: int = parameter.ds_numel  # type: ignore[attr-defined]
            start = self.wrapper._get_param_partition_rank(parameter) * size
            length = min(size, total - start)  # the last parts are padded
            if length > 0:
                yield Range(name, tuple(parameter.ds_shape), start, length, group, offset)  # type: ignore[attr-defined]


def call_pre_hooks(adamw: AdamW) -> None:
    """What AdamW's own step calls first: an asynchronous save has the update wait for its copies."""
    for hook in adamw._optimizer_step_pre_hooks.values():
        hook(adamw, (), {})


def offloaded_gradients(flats: list[Tensor]) -> list[Tensor]:
    """The gradients that an offloading wrapper copies from the GPU beside its masters, once they have arrived."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    gradients = [flat.grad for flat in flats]
    assert all(gradient is not None for gradient in gradients)
    return gradients  # type: ignore[return-value]


def divide_in_step(wrapper: Any, factor: float | Tensor) -> None:
    """Let the wrapper's unscaling, which divides by the loss scale in its step, also clip.

    The loss scale itself is ours (`training.optimizer.LossScale`): the wrapper's backward must find 1 here.
    """
    wrapper.custom_loss_scaler = True
    wrapper.external_loss_scale = 1.0 / factor
