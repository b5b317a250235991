"""ZeRO-3's gathers from the memory of the other ranks, by the copy engines (`training.peers`).

DeepSpeed copies a block's shards into one message, has NCCL gather it, and copies each parameter out of that: 4 bytes
an element in bf16 and 4 / W before, besides what travels. Here each shard is copied from the rank that has it to its
place in the parameter. Nothing of that needs a multiprocessor.

Shards are read while their ranks compute, which is right as long as none is written meanwhile: an update is between two
barriers. The parameters that stay gathered are small and many: those go DeepSpeed's way, in one message.

W ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from training.peers import UPDATES, Peers


class Arrival:
    """What DeepSpeed waits for before it uses parameters. On the stream that gathers, nothing is left to wait for."""

    def __init__(self, parameters: list[Any], others: Any | None) -> None:
        """`others`: the same of parameters that DeepSpeed gathers."""
        self.parameters = parameters
        self.others = others

    def wait(self, handle_dependency: bool = True) -> None:
        """Say that they are there."""
        for parameter in self.parameters:
            parameter.ds_status = type(parameter.ds_status).AVAILABLE
        self.parameters = []
        if self.others is not None:
            self.others.wait(handle_dependency=handle_dependency)


class PeerGathers:
    """Takes the place of each parameter's `all_gather_coalesced`, which DeepSpeed calls for those that it needs."""

    def __init__(self, wrapper: Any, parameters: Iterable[nn.Parameter], peers: Peers) -> None:
        """The shards move to memory that the others can read. `wrapper`: DeepSpeed's optimizer of stage 3."""
        self.peers = peers
        self.flats = peers.share(wrapper.lp_param_buffer.numel(), wrapper.lp_param_buffer.dtype)
        """The shards of each rank, one after the other."""
        self.move(wrapper)
        self.barrier()
        self.offsets: dict[int, int] = {}
        """`ds_id` of a parameter → where its shard begins."""
        for parameter in parameters:
            held: Any = parameter
            self.offsets[held.ds_id] = held.ds_tensor.storage_offset()
            self.by_message = held.all_gather_coalesced
            held.all_gather_coalesced = self.gather

    def move(self, wrapper: Any) -> None:
        """Make the shards views of this rank's flat tensor, and let go of the one they were in."""
        own = self.flats[self.peers.rank]
        own.copy_(wrapper.lp_param_buffer)
        wrapper.lp_param_buffer, offset = own, 0
        for group, flat in enumerate(wrapper.fp16_partitioned_groups_flat):
            wrapper.fp16_partitioned_groups_flat[group] = own.narrow(0, offset, flat.numel())
            wrapper._unflatten_partitioned_parameters(group)
            offset += flat.numel()

    def barrier(self) -> None:
        """Between reading shards and writing them, on all ranks."""
        self.peers.barrier(UPDATES)

    def gather(self, params: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Arrival:
        """DeepSpeed's interface: bring parameters on the current stream, to be used once the result was waited for."""
        found = list(params)
        resident = [parameter for parameter in found if parameter.ds_persist]
        others = self.by_message(resident, safe_mode=safe_mode, quantize=quantize) if resident else None
        own = [parameter for parameter in found if not parameter.ds_persist]
        for parameter in own:
            self.bring(parameter)
        return Arrival(own, others)

    def bring(self, parameter: Any) -> None:
        """Copy a parameter's shards to where they belong in a new tensor, this rank's first."""
        status = type(parameter.ds_status)
        if parameter.ds_status is not status.NOT_AVAILABLE:
            raise RuntimeError(parameter.ds_summary())
        size, offset = parameter.ds_tensor.numel(), self.offsets[parameter.ds_id]
        whole = torch.empty(self.peers.world_size * size, dtype=parameter.ds_tensor.dtype, device=parameter.device)
        for rank in (self.peers.rank, *self.peers.others()):
            shard = self.flats[rank].narrow(0, offset, size)
            whole.narrow(0, rank * size, size).copy_(shard, non_blocking=True)
        parameter.data = whole.narrow(0, 0, parameter.ds_numel).view(parameter.ds_shape)
        parameter.ds_status = status.INFLIGHT
