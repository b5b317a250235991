"""Processes of a run: who this one is, and how all of them agree.

The same command works alone (`python train.py`), under `torchrun` or the `deepspeed` launcher (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT), and under `srun` (SLURM_*). Gradients travel over NCCL on GPUs and gloo on
CPUs. What the host decides (a signal, a failed write, a config) travels over a second group, always gloo: it needs no
device synchronisation, and a thread that writes a checkpoint can use it while the training thread uses the first.
"""

from __future__ import annotations

import math
import os
import re
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from typing import TypeVar
from urllib.parse import urlsplit

import psutil
import torch
import torch.distributed as dist

from configs.errors import UserError
from configs.schema import Device
from data.cpus import available_cpus, cpu_quotas, own_cpus
from model.sequence import SequenceGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """Where a process stands, as its launcher says."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    """Where PyTorch finds the other processes: `env://` leaves it to the launcher's variables."""


@dataclass(frozen=True)
class Place:
    """Where a process runs, and what it may use there."""

    host: str
    cpus: frozenset[int]
    quotas: dict[int, Fraction] = field(default_factory=dict)
    """See `data.cpus.cpu_quotas`."""


@dataclass
class Processes:
    """The process group of a run, from `init` to `close`."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout: timedelta
    control: dist.ProcessGroup | None
    """gloo group for `broadcast`, `gather`, `any` and `barrier`; None with one process."""
    host: str = "localhost"
    """Where rank 0 runs, as the others reach it."""

    @property
    def is_main(self) -> bool:
        """True on the process that writes logs and manifests."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank; it travels pickled between the processes of the run, never in a file."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` on every rank, in the order of ranks."""
        if self.control is None:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one."""
        if self.control is None:
            return flag
        votes = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return bool(votes.item())

    def barrier(self) -> None:
        """Return once every rank has come here."""
        self.any(False)

    def cpu_share(self) -> int:
        """CPUs for this process, at least one: those it may run on, each divided by the ranks of its host that may run
        on it too, and no more than its part of a quota that it shares with them. Collective."""
        return share_of(self.rank, self.gather(Place(socket.gethostname(), own_cpus(), cpu_quotas())))

    def sequence_group(self, size: int) -> SequenceGroup | None:
        """Divide all ranks into groups of `size` neighbours that share samples; this rank's. None: `size` is 1.

        Neighbours, since the fastest links are those inside a node. Collective; `size` divides the number of ranks.
        """
        if size == 1:
            return None
        own, _ = dist.new_subgroups(group_size=size, timeout=self.timeout)
        return SequenceGroup(self.rank % size, size, own.group_name)

    def close(self) -> None:
        """Leave the group. Waits for nobody, so that a failed rank can go; may be called twice."""
        if dist.is_initialized():
            dist.destroy_process_group()


def init(device: Device = Device.auto, timeout_minutes: float = 10.0) -> Processes:
    """Join the run's processes; alone, be a group of one, without MPI or a launcher. Once a process.

    Raises `UserError` if the device isn't there, or if there are more processes on a node than GPUs.
    """
    keep_to_quota(os.environ)
    detected = detect_launch(os.environ)
    launch = detected or Launch(0, 1, 0, "")
    target = pick_device(device, launch.local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    store = restart_store(os.environ, timeout) if detected else dist.HashStore()
    dist.init_process_group(
        backend="nccl" if target.type == "cuda" else "gloo",
        store=store,
        init_method=launch.address if store is None else None,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
    )
    control = dist.new_group(backend="gloo", timeout=timeout) if launch.world_size > 1 else None
    host = os.environ.get("MASTER_ADDR") if launch.address == "env://" else urlsplit(launch.address).hostname
    rank, world_size, local_rank = launch.rank, launch.world_size, launch.local_rank
    return Processes(rank, world_size, local_rank, target, timeout, control, host or "localhost")


def keep_to_quota(environment: Mapping[str, str]) -> None:
    """Have PyTorch use no more threads than a container has CPUs, unless the user says how many.

    By itself it takes one for each CPU of the affinity: with a quota Linux stops all of them most of the time.
    """
    if {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & environment.keys():
        return
    count = available_cpus()
    if count < torch.get_num_threads():
        torch.set_num_threads(count)


def restart_store(environment: Mapping[str, str], timeout: timedelta) -> dist.Store | None:
    """Where the processes find each other after `torchrun --max-restarts` has started them again; else None.

    On one node torchrun keeps its store, which still holds the addresses of the processes that have died. Those of
    several nodes don't count restarts alike, and meet at a new store.
    """
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    one_node = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")
    if restarts == 0 or not one_node or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return dist.PrefixStore(f"restart_{restarts}", dist.TCPStore(host, port, is_master=False, timeout=timeout))


def pick_device(device: Device, local_rank: int) -> torch.device:
    """The device of the process that is number `local_rank` on its node. Raises `UserError` if it isn't there."""
    if device is Device.cpu or (device is Device.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or count == 0:
        raise UserError("hardware.device=cuda: PyTorch sees no CUDA device here; possible: hardware.device=cpu")
    if count == 1:  # a launcher that shows each process only its own GPU
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise UserError(f"process {local_rank + 1} on this node has no GPU: {count} are visible; start {count} a node")
    return torch.device("cuda", local_rank)


def detect_launch(environment: Mapping[str, str]) -> Launch | None:
    """Read the launcher's variables: torchrun's, else those of a SLURM step; None if there is no launcher."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Launch(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            address="env://",
        )
    # Only srun sets the STEP variables: a plain `python train.py` in a batch script of many tasks is one process.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        host = environment.get("MASTER_ADDR") or first_node(environment["SLURM_STEP_NODELIST"])
        port = environment.get("MASTER_PORT") or 20000 + int(environment["SLURM_JOB_ID"]) % 20000
        return Launch(
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            address=f"tcp://{host}:{port}",
        )
    return None


def share_of(rank: int, places: list[Place]) -> int:
    """CPUs for `rank`; `places`: where each rank runs (`Processes.cpu_share`)."""
    own = places[rank]
    neighbours = [place for place in places if place.host == own.host]
    users = Counter(cpu for place in neighbours for cpu in place.cpus)
    limited = Counter(group for place in neighbours for group in place.quotas)
    whole = int(sum(Fraction(1, users[cpu]) for cpu in own.cpus))
    return max(1, min([whole, *(math.ceil(quota / limited[group]) for group, quota in own.quotas.items())]))


def start_of(environment: Mapping[str, str]) -> dict[str, str]:
    """By what a start that a launcher makes of itself, with the command of the first one, is known (`is_restart` of
    `training.run`): torchrun's process, and the SLURM job with how often it was queued again. Empty without either."""
    found: dict[str, str] = {}
    if "TORCHELASTIC_RUN_ID" in environment:
        agent = psutil.Process(os.getppid())
        found["torchrun"] = f"{socket.gethostname()} {agent.pid} {agent.create_time()}"
    if "SLURM_JOB_ID" in environment:
        found["slurm_job"] = environment["SLURM_JOB_ID"]
        found["slurm_restarts"] = environment.get("SLURM_RESTART_COUNT", "0")
    return found


def first_node(nodes: str) -> str:
    """First host of SLURM's compressed list: `gpu[007-009,12],login` → `gpu007`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r}: no host name in it; set MASTER_ADDR")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")
