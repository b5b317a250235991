"""How fast the processes of this host pass messages on: what `training.forecast` needs to know of a machine.

    torchrun --standalone --nproc_per_node 2 -m training.link

prints one line of JSON. A sum over all ranks of b bytes passes 2·(W-1)/W·b through each rank's link, and 2·(W-1) links
one after the other.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from configs.errors import UserError
from configs.schema import Device
from training import distributed
from training.children import child
from training.distributed import Processes

BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
"""Of the large message, by device: like the gradients of a model, NVLink is at its full rate from some 100 MB on."""
REPEATS = 9


@dataclass(frozen=True)
class Link:
    """A ring of processes."""

    world_size: int
    gb_per_s: float
    """10^9 bytes/s that each rank sends while it receives as much."""
    latency_us: float
    """Microseconds for a small message to pass one link, the host's part included."""


def measure(processes: Processes) -> Link:
    """Collective; of at least two processes."""
    ranks = processes.world_size
    size = BYTES[processes.device.type]
    large = _seconds(processes, size // 4)
    small = _seconds(processes, 1)
    rate = 2 * (ranks - 1) / ranks * size / max(large - small, 1e-9)
    return Link(ranks, rate / 1e9, small / (2 * (ranks - 1)) * 1e6)


def _seconds(processes: Processes, elements: int) -> float:
    """Median time of a sum of fp32 elements over all ranks, after two that warm up."""
    value = torch.zeros(elements, device=processes.device)
    times = []
    for _ in range(REPEATS + 2):
        _synchronize(processes.device)
        begin = time.perf_counter()
        dist.all_reduce(value)
        _synchronize(processes.device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def probe(world_size: int, device: Device) -> Link:
    """Measure in fresh processes of this host. Raises `UserError` with the end of their output if they fail."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    command = [*launcher, "-m", "training.link", device.value]
    root = Path(__file__).resolve().parents[1]
    with child(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        printed, said = process.communicate()
    if process.returncode != 0:
        raise UserError(f"The links between {world_size} processes can't be measured:\n{said[-2000:]}")
    answer = next(line for line in printed.splitlines() if line.startswith("{"))  # NCCL may print around it
    return Link(**json.loads(answer))


def main() -> None:
    """One rank of a probe."""
    processes = distributed.init(Device(sys.argv[1]) if len(sys.argv) > 1 else Device.auto)
    found = measure(processes)
    if processes.is_main:
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
    processes.close()


if __name__ == "__main__":
    main()
