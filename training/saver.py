"""Checkpoints written beside training: the loop goes on while a thread copies, writes and commits.

Masters and moments change only inside AdamW's step. So the copy into CPU memory needs no pause either: a thread makes
it during the forward and backward pass of the next step, and a hook holds AdamW back until it is done. The commit
then works on that copy, on a process group of its own, and is the same as that of a synchronous save.

Saves don't overlap: the next one, and the end of the run, wait for the one under way. An error in it is raised by
`poll`, `save` or `wait`, at the same place on every rank.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training import checkpoint
from training.checkpoint import CheckpointError, Snapshot
from training.distributed import Processes
from training.engine import Engine
from training.state import TrainState

LOG = logging.getLogger(__name__)
BYTES_PER_ELEMENT = 12
"""Master and two moments, fp32."""
ALIGNMENT = 64
"""Bytes; where a tensor begins in the host's memory."""


class Saver:
    """Saves a run's checkpoints into one folder. Collective over the ranks, as are all its methods but `close`.

    Args:
        engine: whose state is saved.
        folder: `<run>/checkpoints`.
        tokenizer_hash: noted in the manifests.
        keep_last, keep_every: which older ones stay; see `checkpoint.save`.
        abandoned: checkpoints in `folder` that the first save moves aside.
        asynchronous: write on a thread. Takes CPU memory for this rank's fp32 masters and moments, until `close`;
            where a machine doesn't have it, saves are synchronous, with a warning.
        progress: called whenever a part of a checkpoint is written; from the writing thread.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        *,
        tokenizer_hash: str,
        keep_last: int = 0,
        keep_every: int = 0,
        abandoned: Sequence[Path] = (),
        asynchronous: bool = True,
        progress: Callable[[], None] | None = None,
    ) -> None:
        self.engine = engine
        self.folder = folder
        self.tokenizer_hash = tokenizer_hash
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.abandoned = abandoned
        self.asynchronous = asynchronous and memory_suffices(engine)
        self.progress = progress
        self.stalled_s = 0.0
        """Time that training has waited for saves so far, seconds."""
        self._processes = with_own_group(engine.processes) if self.asynchronous else engine.processes
        self._memory = HostMemory(engine.device)
        self._write: _Write | None = None
        self._hook = engine.partition.adamw.register_step_pre_hook(self._before_update)

    def save(self, state: TrainState) -> None:
        """Begin to save the state after a step; return at once if asynchronous. Raises what the last one failed with.

        Not between a forward pass and its update: what is saved belongs to `state`.
        """
        self.wait()
        begin = time.perf_counter()
        taken = checkpoint.snapshot(self.engine, state, tokenizer_hash=self.tokenizer_hash)
        if self.asynchronous:
            ready = torch.cuda.current_stream().record_event() if self._memory.pins else None
            self._write = _Write(lambda write: self._copy_and_commit(taken, ready, write))
            self._write.start()
        else:
            self._commit(taken)
        self.stalled_s += time.perf_counter() - begin

    def poll(self) -> None:
        """Raise what a finished save failed with, on all ranks at once. Cheap while none is under way."""
        if self._write is not None and not self.engine.processes.any(self._write.is_alive()):
            self.wait()

    def wait(self) -> None:
        """Return once nothing is under way. Raises `CheckpointError`, on every rank, if that save failed."""
        if self._write is None:
            return
        begin = time.perf_counter()
        self._write.join()
        write, self._write = self._write, None
        self.stalled_s += time.perf_counter() - begin
        if write.error is not None:
            raise write.error

    def settle(self) -> None:
        """`wait` while another error is on its way: this one only becomes a warning."""
        try:
            self.wait()
        except Exception as error:  # noqa: BLE001 - a peer's end shows as many types; the first error is the one to tell
            LOG.warning(f"the last checkpoint: {error}")

    def close(self) -> None:
        """Let go of the engine and the memory, without waiting: a save under way goes on as long as the process."""
        self._hook.remove()
        self._memory = HostMemory(self.engine.device)

    def _before_update(self, *_: Any) -> None:
        """AdamW's hook: what is being copied must not change."""
        write = self._write
        if write is None or write.copied.is_set():
            return
        begin = time.perf_counter()
        write.copied.wait()
        self.stalled_s += time.perf_counter() - begin

    def _copy_and_commit(self, taken: Snapshot, ready: torch.cuda.Event | None, write: _Write) -> None:
        """What the thread does."""

        def copy() -> None:
            try:
                taken.tensors = self._memory.copy(taken.tensors, ready)
            except RuntimeError as error:  # torch's only type for "not enough memory"
                raise OSError(
                    errno.ENOMEM, f"no CPU memory for a copy of the state ({error}); set train.async_save=false"
                ) from error
            finally:
                write.copied.set()

        checkpoint.agree(self._processes, copy)
        self._commit(taken)

    def _commit(self, taken: Snapshot) -> None:
        checkpoint.commit(
            taken,
            self.folder,
            self._processes,
            keep_last=self.keep_last,
            keep_every=self.keep_every,
            abandoned=self.abandoned,
            progress=self.progress,
        )
        self.abandoned = ()


class _Write(threading.Thread):
    """A save under way. A daemon: a second Ctrl-C ends the process at once, and the half-written folder is none."""

    def __init__(self, action: Callable[[_Write], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.action = action
        self.copied = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.action(self)
        except Exception as error:  # noqa: BLE001 - raised again by the thread that trains
            self.error = error
        finally:
            self.copied.set()


def with_own_group(processes: Processes) -> Processes:
    """The same ranks with another control group, for a thread's collectives. Collective."""
    if processes.control is None:
        return processes
    return replace(processes, control=dist.new_group(backend="gloo", timeout=processes.timeout))


def memory_suffices(engine: Engine) -> bool:
    """Whether all machines have CPU memory for a copy of their ranks' state, and a fifth of it left. Collective."""
    own = sum(at.length for at in engine.partition.ranges(owned=True)) * BYTES_PER_ELEMENT
    host = socket.gethostname()
    needed = sum(size for place, size in engine.processes.gather((host, own)) if place == host)
    available = available_memory()
    short = None if needed <= 0.8 * available else (host, needed, available)
    shorts = [found for found in engine.processes.gather(short) if found is not None]
    if shorts:
        host, needed, available = shorts[0]
        LOG.warning(
            f"train.async_save needs {needed / 1e9:.1f} GB of CPU memory on {host}, {available / 1e9:.1f} GB are free: "
            "saves wait for the disk"
        )
    return not shorts


def available_memory() -> float:
    """Bytes of CPU memory that can be had without swapping, within the container's limit; infinite if unknown."""
    found = [float("inf")]
    with contextlib.suppress(OSError):  # not Linux
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(float(lines["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit ("max")
        limit, used = (float((group / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + float(statistics["inactive_file"]))  # the page cache counts as used
    return min(found)


class HostMemory:
    """CPU memory for a snapshot's tensors, used again for the next: fresh pages cost more than the copy itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pins = device.type == "cuda"
        self.pinned = False
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def __del__(self) -> None:
        self.unpin()

    def copy(self, tensors: dict[str, Tensor], ready: torch.cuda.Event | None) -> dict[str, Tensor]:
        """Contiguous copies on the CPU, valid until the next call.

        Those from a GPU are made on a stream of their own, after `ready`, while the GPU goes on. Raises RuntimeError
        if there isn't enough memory.
        """
        sizes = [-(-t.numel() * t.element_size() // ALIGNMENT) * ALIGNMENT for t in tensors.values()]
        stream = None
        if ready is not None:
            torch.cuda.set_device(self.device)  # a thread begins on device 0
            stream = torch.cuda.Stream()
            stream.wait_event(ready)
        self.reserve(sum(sizes))
        copies: dict[str, Tensor] = {}
        offset = 0
        with torch.cuda.stream(stream):  # None: does nothing
            for (name, tensor), size in zip(tensors.items(), sizes, strict=True):
                raw = self.buffer[offset : offset + tensor.numel() * tensor.element_size()]
                copies[name] = raw.view(tensor.dtype).view(tensor.shape)
                copies[name].copy_(tensor, non_blocking=self.pinned)
                offset += size
            if stream is not None:
                stream.synchronize()
        return copies

    def reserve(self, size: int) -> None:
        """Have `size` bytes, page-locked beside a GPU, which copies at full speed only into such memory."""
        if self.buffer.numel() >= size:
            return
        self.unpin()
        self.buffer = torch.empty(size, dtype=torch.uint8)
        if self.pins:  # registered, since PyTorch's pinned allocations are rounded up to a power of two
            code = torch.cuda.cudart().cudaHostRegister(self.buffer.data_ptr(), size, 0)
            self.pinned = int(code) == 0
            if not self.pinned:
                LOG.info(f"{size / 1e9:.1f} GB can't be page-locked (CUDA error {int(code)}): checkpoints copy slower")

    def unpin(self) -> None:
        """Give back the page lock."""
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr())
            self.pinned = False


__all__ = ["CheckpointError", "HostMemory", "Saver", "with_own_group"]
