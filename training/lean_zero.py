"""ZeRO-2 and 3 by our own code: gradients summed as they come, a step from these sums, weights gathered by us or by
DeepSpeed (`engine.lean_zero2`, `lean_zero3`). And `partition_of`, the only place that chooses between the wrappers.

The attributes used here are those of DeepSpeed 0.19.8, which each class checks before it takes over.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from training.direct import DirectSums
from training.gathers import PeerGathers
from training.optimizer import ReplicatedAdamW, update_flat
from training.peers import Peers
from training.reduction import PeerSums, ShardedSums, ShardedWeights, rows_of
from training.zero import Bf16Stage1, Partition, Range, Replicated, Stage3, Stage12, call_pre_hooks

LOG = logging.getLogger(__name__)


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
        self.matrices: Sequence[Sequence[nn.Parameter]] = ()
        """Of each block, those whose gradients go where the peers read them (`DirectSums`)."""
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
        elif self.matrices:
            is_last = self.wrapper.is_gradient_accumulation_boundary
            self.reduction = DirectSums(shards, group, bucket_size, stream, self.peers, self.matrices, is_last)
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
        """On one rank: elsewhere no rank has all of a parameter's gradient, but for `DirectSums`."""
        if isinstance(self.reduction, DirectSums):
            return self.reduction.places
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
        self,
        wrapper: Any,
        adamw: AdamW,
        names: Mapping[nn.Parameter, str],
        one_kernel: bool,
        peers: Peers | None,
        matrices: Sequence[Sequence[nn.Parameter]] = (),
    ) -> None:
        super().__init__(wrapper, adamw, names, one_kernel, peers)
        self.matrices = matrices
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
            "overlapping_partition_gradients_reduce_epilogue", "_optimizer_step", "is_gradient_accumulation_boundary",
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


def partition_of(
    wrapper: Any,
    names: Mapping[nn.Parameter, str],
    rank: int,
    world_size: int,
    *,
    one_kernel: bool = False,
    lean: bool = False,
    peers: Peers | None = None,
    matrices: Sequence[Sequence[nn.Parameter]] = (),
) -> Partition:
    """The interface to DeepSpeed's optimizer `wrapper`. Raises `TypeError` for one that we don't know.

    `lean`: `engine.lean_zero2` or `lean_zero3`, resolved, with `one_kernel` that way's step; DeepSpeed's own way all
    the same, with a warning, if its wrapper isn't the one that we know. `peers`: for our way, the ranks that read each
    other's memory. `matrices`: of each block, those whose gradients at stage 2 are written where peers read them.
    """
    if isinstance(wrapper, ReplicatedAdamW):
        return Replicated(wrapper, names, rank, world_size)
    kinds = {"BF16_Optimizer": Bf16Stage1, "DeepSpeedZeroOptimizer": Stage12, "DeepSpeedZeroOptimizer_Stage3": Stage3}
    kind = kinds.get(type(wrapper).__name__)
    if kind is None:
        raise TypeError(f"DeepSpeed chose {type(wrapper).__name__}; known: {', '.join(kinds)}")
    if lean and kind in (Stage12, Stage3):
        arguments = (wrapper, wrapper.optimizer, names, one_kernel, peers)
        if kind is Stage12 and LeanStage2.knows(wrapper):
            return LeanStage2(*arguments, matrices)
        if kind is Stage3 and LeanStage3.knows(wrapper):
            return LeanStage3(*arguments)
        stage = 2 if kind is Stage12 else 3
        LOG.warning(
            f"engine.lean_zero{stage}: made for DeepSpeed 0.19.8, whose ZeRO-{stage} is laid out otherwise than this "
            "one's; off"
        )
    return kind(wrapper, wrapper.optimizer, names)  # type: ignore[abstract]
