"""DeepSpeed's optimizer wrappers seen through one interface.

Each ZeRO stage keeps fp32 masters, AdamW moments and reduced gradients in flat tensors of its own layout. A `Partition`
names what this rank holds of them, so that the engine can measure, scale or drop gradients before a step, and a
checkpoint can read and write masters and moments by parameter name in every stage. The attributes used here are those
of DeepSpeed 0.19; `partition_of` is the only place that chooses between wrappers.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from training.gathers import PeerGathers
from training.optimizer import ReplicatedAdamW, adam_state, split, update_flat, update_in_one_kernel
from training.peers import Peers
from training.reduction import PeerSums, ShardedSums, ShardedWeights, rows_of

LOG = logging.getLogger(__name__)


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
        views. Empty if the wrapper has no such place."""
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


class Lean(Partition):
    """Stages 2 and 3 with gradients summed by `ShardedSums`, and a step that updates from these sums where they are.

    DeepSpeed's step takes their norm again (at stage 3 in fp64: 20 bytes an element) and gathers them into a new tensor
    (8, at stage 3), scales them (8), updates (28) and rounds (6), and waits for the host; here they are scaled as in
    stage 1, updated, rounded and emptied, in one kernel if need be. A micro-batch ends without waiting for the device.
    """

    reduction: ShardedSums

    def __init__(
        self, wrapper: Any, adamw: AdamW, names: Mapping[nn.Parameter, str], one_kernel: bool, peers: Peers | None
    ) -> None:
        """`peers`: the ranks, if they read each other's memory."""
        super().__init__(wrapper, adamw, names)
        self.one_kernel = one_kernel
        self.peers = peers
        self.factor: float | Tensor = 1.0
        """The next step multiplies gradients by this; a tensor only with `one_kernel`."""
        self.alone = dist.get_world_size(wrapper.dp_process_group) == 1
        self.flats: list[Tensor] = []
        """The sums of each group's gradients, laid out as its masters."""

    @staticmethod
    @abstractmethod
    def knows(wrapper: Any) -> bool:
        """Whether the wrapper is laid out as it was when this was written, in DeepSpeed 0.19.8."""

    def sum_up(self, shards: Mapping[nn.Parameter, Tensor], stream: torch.cuda.Stream | None) -> None:
        """Replace DeepSpeed's hooks and step. `shards`, `stream`: see `ShardedSums`."""
        stream = stream if self.flats[0].is_cuda and not self.alone else None
        group, bucket_size = self.wrapper.dp_process_group, self.wrapper.reduce_bucket_size
        if self.peers is None:
            self.reduction = ShardedSums(shards, group, bucket_size, stream)
        else:
            self.reduction = PeerSums(shards, group, bucket_size, stream, self.peers)
        for hook in self.wrapper._grad_acc_hooks:
            hook.remove()
        self.wrapper._grad_acc_hooks[:] = self.reduction.hooks  # to be removed by its destroy()
        self.wrapper.overlapping_partition_gradients_reduce_epilogue = self.reduction.finish
        self.wrapper.step = self.step

    def gradients(self) -> list[Tensor]:
        return self.flats

    def sums(self) -> dict[nn.Parameter, Tensor]:
        """On one rank: elsewhere no rank has all of a parameter's gradient."""
        if not self.alone:
            return {}
        return {parameter: shard.view(self.shape(parameter)) for parameter, shard in self.reduction.shards.items()}

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the whole parameter."""
        return parameter.shape

    @abstractmethod
    def step(self) -> None:
        """Update this rank's part of the weights and empty the sums."""

    def update(self, group: int, settings: dict[str, Any], weights: Tensor) -> None:
        """The step of one of DeepSpeed's groups by AdamW's `settings`; its masters are rounded into `weights`."""
        master, gradient = self.masters()[group], self.flats[group]
        if self.one_kernel:
            update_flat(self.adamw, settings, master, gradient, weights, self.factor)
            return
        if self.factor != 1.0:
            gradient.mul_(self.factor)
        master.grad = gradient
        self.wrapper._optimizer_step(group)
        master.grad = None
        gradient.zero_()
        weights.copy_(master)

    def drop(self) -> None:
        self.reduction.forget()
        for gradient in self.flats:
            gradient.zero_()

    def scale(self, factor: float | Tensor) -> None:
        self.factor = factor


class LeanStage2(Lean):
    """Stage 2 with each parameter cut into equal parts, one a rank, as at stage 3; whole parameters stay on all.

    DeepSpeed cuts a group of parameters laid side by side, so that a block's gradients belong to one rank or two, and
    reduces them to all. Parts of every parameter can be scattered as they are reduced: half the bytes.

    A rank holds the weights, and of its part of them masters, moments and sums, 16 bytes each. On several ranks also
    the weights of its part side by side, which the others gather.
    """

    def __init__(
        self, wrapper: Any, adamw: AdamW, names: Mapping[nn.Parameter, str], one_kernel: bool, peers: Peers | None
    ) -> None:
        super().__init__(wrapper, adamw, names, one_kernel, peers)
        self.rank = dist.get_rank(wrapper.dp_process_group)
        ranks = dist.get_world_size(wrapper.dp_process_group)
        self.members: list[list[nn.Parameter]] = wrapper.bit16_groups
        self.rows = [[rows_of(parameter, ranks) for parameter in members] for members in self.members]
        """Each parameter's memory, (ranks, n)."""
        self.weights = self.own_weights()
        """This rank's part of each group's weights, flat."""
        self.replace_masters()
        self.flats = [torch.zeros_like(master) for master in self.masters()]
        shards = {
            parameter: shard
            for members, rows, flat in zip(self.members, self.rows, self.flats, strict=True)
            for parameter, shard in zip(members, flat.split([matrix.shape[1] for matrix in rows]), strict=True)
        }
        self.sum_up(shards, wrapper.reduction_stream if wrapper.overlap_comm else None)
        wrapper.zero_grad = lambda: None  # a loop over the parameters, whose gradients hooks have freed
        self.whole = ShardedWeights(self.weights, self.rows, self.reduction)

    @staticmethod
    def knows(wrapper: Any) -> bool:
        needed = (
            "bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups", "dp_process_group",
            "reduction_stream", "overlap_comm", "reduce_bucket_size", "_grad_acc_hooks",
            "overlapping_partition_gradients_reduce_epilogue", "_optimizer_step",
        )  # fmt: skip
        return all(hasattr(wrapper, name) for name in needed) and all(
            [p.data_ptr() for p in members]
            == list(accumulate((p.numel() * p.element_size() for p in members[:-1]), initial=flat.data_ptr()))
            for members, flat in zip(wrapper.bit16_groups, wrapper.bit16_groups_flat, strict=True)
        )

    def own_weights(self) -> list[Tensor]:
        """On one rank all of them, where the parameters are; else copies."""
        if self.alone:
            sizes = [sum(parameter.numel() for parameter in members) for members in self.members]
            return [flat[:size] for flat, size in zip(self.wrapper.bit16_groups_flat, sizes, strict=True)]
        return [torch.cat([matrix[self.rank] for matrix in rows]) for rows in self.rows]

    def replace_masters(self) -> None:
        """Masters of this rank's part, instead of those of DeepSpeed's, which nothing is to keep."""
        for parameter in self.names:
            parameter._hp_mapping = None  # type: ignore[attr-defined]
        for group, (settings, weights) in enumerate(zip(self.adamw.param_groups, self.weights, strict=True)):
            settings["params"].clear()
            self.wrapper.single_partition_of_fp32_groups[group] = None
            master = weights.to(torch.float32, copy=True).requires_grad_()
            self.wrapper.single_partition_of_fp32_groups[group] = master
            settings["params"].append(master)

    def masters(self) -> list[Tensor]:
        flats: list[Tensor] = self.wrapper.single_partition_of_fp32_groups
        return flats

    @torch.no_grad()
    def step(self) -> None:
        if self.one_kernel:
            call_pre_hooks(self.adamw)
        for group, settings in enumerate(self.adamw.param_groups):
            self.update(group, settings, self.weights[group])
        self.whole.gather()

    @torch.no_grad()
    def refresh(self) -> None:
        for weights, master in zip(self.weights, self.masters(), strict=True):
            weights.copy_(master)
        self.whole.gather()

    def ranges(self, owned: bool) -> Iterator[Range]:
        for group, (members, rows) in enumerate(zip(self.members, self.rows, strict=True)):
            offset = 0
            for parameter, matrix in zip(members, rows, strict=True):
                size = matrix.shape[1]
                start = self.rank * size
                length = min(size, parameter.numel() - start)  # the last parts are padded
                if length > 0:
                    yield Range(self.names[parameter], tuple(parameter.shape), start, length, group, offset)
                offset += size


GATHER_STREAM = "_DeepSpeedZeRoOffload__allgather_stream"
"""Attribute of DeepSpeed's `parameter_offload`: where parameters are gathered beside the computation."""


class LeanStage3(Lean, Stage3):
    """Stage 3 so. On one rank nothing is sharded: parameters are views of what the optimizer updates and stay so.

    DeepSpeed would free them after each use, which makes the host wait for the device when they are used again.
    """

    def __init__(
        self, wrapper: Any, adamw: AdamW, names: Mapping[nn.Parameter, str], one_kernel: bool, peers: Peers | None
    ) -> None:
        super().__init__(wrapper, adamw, names, one_kernel, peers)
        self.flats = list(wrapper.grad_partitions_flat_buffer.split(wrapper.fp16_partitioned_groups_flat_numel))
        for hook in wrapper._leaf_module_hooks:
            hook.remove()
        wrapper._leaf_module_hooks.clear()
        for bucket in wrapper.ipg_buckets.values():
            bucket.buffer = None
        if self.alone:
            self.stay()
        self.gathers = None if peers is None else PeerGathers(wrapper, names, peers)
        self.sum_up({parameter: self.shard(parameter) for parameter in names}, wrapper.reduce_and_partition_stream)

    @staticmethod
    def knows(wrapper: Any) -> bool:
        needed = (
            "fp16_partitioned_groups_flat", "fp16_partitioned_groups_flat_numel", "fp32_partitioned_groups_flat",
            "grad_partitions_flat_buffer", "grad_position", "sub_group_to_group_id", "partition_count",
            "reduce_and_partition_stream", "reduce_bucket_size", "dp_process_group", "ipg_buckets", "_grad_acc_hooks",
            "_leaf_module_hooks", "overlapping_partition_gradients_reduce_epilogue", "_optimizer_step", "_pre_step",
            "parameter_offload", "lp_param_buffer", "_unflatten_partitioned_parameters",
        )  # fmt: skip
        if not all(hasattr(wrapper, name) for name in needed) or not hasattr(wrapper.parameter_offload, GATHER_STREAM):
            return False
        sums, masters = wrapper.grad_partitions_flat_buffer, wrapper.fp32_partitioned_groups_flat
        sizes = [master.numel() for master in masters]
        return (
            sizes
            == wrapper.fp16_partitioned_groups_flat_numel
            == [p.numel() for p in wrapper.fp16_partitioned_groups_flat]
            and sums.numel() == sum(sizes)
            and all(sums.dtype is master.dtype and sums.device == master.device for master in masters)
        )

    def shard(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of the parameter's sum, (n,)."""
        group, offset, size = self.wrapper.grad_position[self.wrapper.get_param_id(parameter)]
        return self.flats[group].narrow(0, offset, size)

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
        return shape

    def stay(self) -> None:
        """Make each parameter a view of this rank's part of it, which is all of it, not to be freed after use."""
        for parameter in self.names:
            held: Any = parameter
            held.ds_persist = True
            held.data = held.ds_tensor.data.view(held.ds_shape)
            held.ds_status = type(held.ds_status).AVAILABLE

    @torch.no_grad()
    def step(self) -> None:
        self.wrapper._pre_step()
        if not self.alone:
            self.wrapper._partition_all_parameters()
            self.finish_gathers()
        if self.one_kernel:
            call_pre_hooks(self.adamw)
        for group, weights in enumerate(self.wrapper.fp16_partitioned_groups_flat):
            settings = self.adamw.param_groups[self.wrapper.sub_group_to_group_id[group]]
            self.update(group, settings, weights)
        if not self.alone:
            self.gather_resident()

    def finish_gathers(self) -> None:
        """Keep the update behind gathers that are still to read what it writes, where others read it also theirs."""
        stream = getattr(self.wrapper.parameter_offload, GATHER_STREAM)
        if stream is not None:
            torch.cuda.current_stream(self.flats[0].device).wait_stream(stream)
        if self.gathers is not None:
            self.gathers.barrier()

    def gather_resident(self) -> None:
        """In one message; DeepSpeed's way is one a parameter, and then to wait for the device.

        That wait also kept what the next forward pass gathers, on a stream of its own, behind the update.
        """
        if self.gathers is not None:
            self.gathers.barrier()  # all ranks have written what is read from now on
        stream = getattr(self.wrapper.parameter_offload, GATHER_STREAM)
        if stream is not None:  # as on a CPU
            stream.wait_stream(torch.cuda.current_stream(self.flats[0].device))
        resident = self.wrapper.persistent_parameters
        if resident:
            gather: Any = resident[0].all_gather_coalesced
            gather(resident).wait()

    def drop(self) -> None:
        super().drop()
        if self.alone:
            self.wrapper._pre_step()
        else:
            Stage3.drop(self)

    def refresh(self) -> None:
        if not self.alone:
            self.wrapper._partition_all_parameters()
            self.finish_gathers()
            Stage3.refresh(self)
            return
        for group in range(len(self.flats)):
            self.wrapper._reassign_or_swap_out_partitioned_parameters(group)
        self.stay()


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


def partition_of(
    wrapper: Any,
    names: Mapping[nn.Parameter, str],
    rank: int,
    world_size: int,
    *,
    one_kernel: bool = False,
    lean: bool = False,
    peers: Peers | None = None,
) -> Partition:
    """The interface to DeepSpeed's optimizer `wrapper`. Raises `TypeError` for one that we don't know.

    `lean`: `engine.lean_zero2` or `lean_zero3`, resolved, with `one_kernel` that way's step; DeepSpeed's own way all
    the same, with a warning, if its wrapper isn't the one that we know. `peers`: for our way, the ranks that read each
    other's memory.
    """
    if isinstance(wrapper, ReplicatedAdamW):
        return Replicated(wrapper, names, rank, world_size)
    kinds = {"BF16_Optimizer": Bf16Stage1, "DeepSpeedZeroOptimizer": Stage12, "DeepSpeedZeroOptimizer_Stage3": Stage3}
    kind = kinds.get(type(wrapper).__name__)
    if kind is None:
        raise TypeError(f"DeepSpeed chose {type(wrapper).__name__}; known: {', '.join(kinds)}")
    if lean and kind in (Stage12, Stage3):
        stage, leaner = (2, LeanStage2) if kind is Stage12 else (3, LeanStage3)
        if leaner.knows(wrapper):
            return leaner(wrapper, wrapper.optimizer, names, one_kernel, peers)
        LOG.warning(
            f"engine.lean_zero{stage}: made for DeepSpeed 0.19.8, whose ZeRO-{stage} is laid out otherwise than this "
            "one's; off"
        )
    return kind(wrapper, wrapper.optimizer, names)  # type: ignore[abstract]
