"""Ranks that read each other's memory without GPUs: files that all of them map, and a barrier for which hosts wait."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.distributed import Processes
from training.peers import Peers


class Watched(Tensor):
    """Memory of another rank, which counts the bytes that are copied from it."""

    read = 0
    """By this process."""

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.copy_:
            Watched.read += args[1].numel() * args[1].element_size()
        return super().__torch_function__(function, types, args, kwargs)


class FilePeers(Peers):
    """Processes on one host. What they are told to do is done when the call returns, so that a barrier of hosts orders
    it as one of streams does on GPUs."""

    def __init__(self, own: Processes) -> None:
        super().__init__(own.rank, own.world_size)
        self.own = own
        self.folder = Path(own.broadcast(tempfile.mkdtemp()))
        self.count = 0
        self.barriers: list[int] = []
        """Channels of those so far."""

    def share(self, size: int, dtype: torch.dtype) -> list[Tensor]:
        self.count += 1
        paths = [self.folder / f"{self.count}.{rank}" for rank in range(self.world_size)]
        paths[self.rank].write_bytes(b"\xff" * size * dtype.itemsize)  # NaN, of which nothing may be left
        self.own.barrier()
        found = [torch.from_file(str(path), shared=True, size=size, dtype=dtype) for path in paths]
        return [one if rank == self.rank else one.as_subclass(Watched) for rank, one in enumerate(found)]

    def barrier(self, channel: int) -> None:
        self.barriers.append(channel)
        dist.barrier()
