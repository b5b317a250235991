"""Memory that the GPUs of one host read from each other, by their copy engines.

A collective of NCCL is a kernel. Beside a matrix product, which starts a program for each multiprocessor, it holds some
of them, and both wait for each other. Copies by the copy engines take no multiprocessor (what that brings:
docs/scaling.md; `tests/training/measure_peers.py`). So stages 2 and 3 of ZeRO reduce gradients, and stage 3 gathers
weights, from the neighbours' memory (`engine.copy_engines`), ordered by barriers: tiny kernels in which the GPUs wait
for each other.

The memory is PyTorch's symmetric memory (`torch.distributed._symmetric_memory`, torch 2.11 to 2.14), which its caching
allocator and its statistics don't know: see `shared_bytes`.
"""

from __future__ import annotations

import logging
import socket
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import UserError
from configs.schema import EngineConfig, Precision, Toggle
from training.distributed import Processes

LOG = logging.getLogger(__name__)
UPDATES, REDUCTIONS = 0, 1
"""Channels of barriers: those on one stream have one, so that they can't be taken for those on another."""
BARRIER_ERROR = "unspecified launch failure"
"""What CUDA calls a barrier that has waited for too long, and other traps in kernels."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_shared: dict[torch.device, int] = {}


class Peers(ABC):
    """The ranks of a group, whose memory each can read."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    @abstractmethod
    def share(self, size: int, dtype: torch.dtype) -> list[Tensor]:
        """A tensor (size,) of each rank, in their order, uninitialised. Collective, and held as long as this object."""

    @abstractmethod
    def barrier(self, channel: int) -> None:
        """What this stream does next, on any rank, comes after what was launched on it before, on all ranks; the host
        doesn't wait. Collective; `channel`: `UPDATES` or `REDUCTIONS`."""

    def others(self) -> list[int]:
        """The other ranks, from the next one on: each rank reads from another one first."""
        return [(self.rank + step) % self.world_size for step in range(1, self.world_size)]


class SymmetricPeers(Peers):
    """Ranks with a GPU each, on one host."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> None:
        """Raises `RuntimeError` if the GPUs can't read each other's memory. `timeout_s`: of barriers."""
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self.group = group
        self.device = device
        self.timeout_ms = int(1000 * timeout_s)
        self.handles: list[Any] = []
        self.meeting = self._allocate(1, torch.float32)[1]

    def _allocate(self, size: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """This rank's tensor, and the handle to all ranks'."""
        import torch.distributed._symmetric_memory as symmetric_memory

        own = symmetric_memory.empty(size, dtype=dtype, device=self.device)
        handle = symmetric_memory.rendezvous(own, self.group)
        self.handles.append(handle)
        _count(self, own)
        return own, handle

    def share(self, size: int, dtype: torch.dtype) -> list[Tensor]:
        own, handle = self._allocate(size, dtype)
        ranks = range(self.world_size)
        return [own if rank == self.rank else handle.get_buffer(rank, (size,), dtype) for rank in ranks]

    def barrier(self, channel: int) -> None:
        self.meeting.barrier(channel=channel, timeout_ms=self.timeout_ms)


def explain(error: BaseException, config: EngineConfig, world_size: int) -> None:
    """Note on an error that may come from a barrier what that means: CUDA says only that a kernel has failed."""
    if world_size > 1 and config.copy_engines is not Toggle.off and BARRIER_ERROR in str(error):
        error.add_note(
            "If no kernel is at fault, another rank has died or hangs: GPUs that wait for one in a barrier give up "
            f"after engine.timeout_minutes={config.timeout_minutes:g} with this error. See what other ranks said last."
        )


def shared_bytes(device: torch.device) -> int:
    """Bytes of the device's memory that this process shares with its peers: no part of PyTorch's own statistics."""
    return _shared.get(device, 0)


def _count(owner: Any, tensor: Tensor) -> None:
    """Count the tensor's memory for as long as its owner lives."""
    device, size = tensor.device, tensor.numel() * tensor.element_size()
    _shared[device] = shared_bytes(device) + size

    def forget() -> None:
        _shared[device] -= size

    weakref.finalize(owner, forget)


def find_peers(config: EngineConfig, precision: Precision, processes: Processes, lean: bool) -> Peers | None:
    """The run's ranks as peers, where `engine.copy_engines` asks for them and they can be. Collective.

    `lean`: whether our code gathers and reduces. Raises `UserError` for `on` where they can't.
    """
    if config.copy_engines is Toggle.off or processes.world_size == 1:
        return None
    cause = obstacle(config, precision, processes, lean)
    if cause is None:
        try:
            return SymmetricPeers(dist.group.WORLD, processes.device, processes.timeout.total_seconds())  # type: ignore[arg-type]
        except RuntimeError as error:
            cause = f"GPUs that read each other's memory; PyTorch says: {str(error).splitlines()[0]}"
    if config.copy_engines is Toggle.on:
        raise UserError(f"engine.copy_engines=on: needs {cause}; or use engine.copy_engines=auto or off")
    if lean:  # else nobody expects them
        LOG.info("engine.copy_engines: off, it needs %s", cause)
    return None


def obstacle(config: EngineConfig, precision: Precision, processes: Processes, lean: bool) -> str | None:
    """What ranks miss to be peers, on all of them alike; None if nothing is known. Collective."""
    if not lean:
        return (
            f"engine.zero_stage=2 with engine.lean_zero2, or 3 with engine.lean_zero3, given {config.zero_stage}"
            f"{' without' if config.zero_stage > 1 else ''}"
        )
    if precision is Precision.fp32:
        return "engine.precision=bf16 or fp16, given fp32"
    if processes.device.type != "cuda" or torch.version.hip is not None:
        return f"NVIDIA GPUs, given {processes.device.type}"
    hosts = {*processes.gather((socket.gethostname(), BOOT_ID.read_text() if BOOT_ID.exists() else ""))}
    if len(hosts) > 1:
        return f"all GPUs on one host, given {len(hosts)}"
    return None
