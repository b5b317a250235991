"""What messages between two GPUs cost the products beside them: NCCL's kernels against the copy engines.

    torchrun --standalone --nproc_per_node 2 -m tests.training.measure_peers

Prints, in milliseconds, the least of a few: 30 products of a feed-forward layer alone, and beside 20 messages of 64 MiB
a rank, on a stream of their own, of each kind; and these messages alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from training.mean_kernel import add_mean_
from training.peers import REDUCTIONS, SymmetricPeers

MESSAGES, SIZE, TRIES = 20, 2**25, 5
"""Messages, elements of one in bf16 on each rank, and measurements."""


def products() -> Callable[[], None]:
    """Forward, input's and weight's gradient of a layer of 2560 x 10240 on 8192 tokens, ten times."""
    tokens, narrow, wide = 8192, 2560, 10240
    x, weight, gradient = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((tokens, narrow), (wide, narrow), (tokens, wide))
    )

    def run() -> None:
        for _ in range(10):
            torch.mm(x, weight.t())
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), x)

    return run


def messages(peers: SymmetricPeers) -> dict[str, Callable[[], None]]:
    """Name → one message."""
    ranks, rank = peers.world_size, peers.rank
    shards = peers.share(SIZE, torch.bfloat16)
    buckets = peers.share(ranks * SIZE, torch.bfloat16)
    for memory in (shards[rank], buckets[rank]):
        memory.zero_()
    whole, bucket = (
        torch.zeros(ranks, SIZE, dtype=torch.bfloat16, device="cuda"),
        torch.zeros(ranks, SIZE, device="cuda"),
    )
    own, total = torch.zeros(SIZE, device="cuda"), torch.zeros(SIZE, device="cuda")
    arrived = torch.zeros(ranks - 1, SIZE, dtype=torch.bfloat16, device="cuda")

    def copies() -> None:
        for other in (rank, *peers.others()):
            whole[other].copy_(shards[other])

    def reads() -> None:
        peers.barrier(REDUCTIONS)
        for other in peers.others():
            arrived[other - (other > rank)].copy_(buckets[other].view(ranks, SIZE)[rank])
        peers.barrier(REDUCTIONS)
        add_mean_(total, buckets[rank].view(ranks, SIZE)[rank], arrived, rank)

    def scatter() -> None:
        dist.reduce_scatter_tensor(own, bucket.view(-1))
        total.add_(own, alpha=1.0 / ranks)

    return {
        "nothing": lambda: None,
        "gather by NCCL": lambda: dist.all_gather_into_tensor(whole.view(-1), whole[rank]),
        "gather by copy engines": copies,
        "reduce-scatter of fp32 by NCCL, and its sum": scatter,
        "the same of bf16 by copy engines": reads,
    }


def timed(run: Callable[[], Tensor | None]) -> float:
    """Milliseconds on the device, least of a few."""
    found = []
    for _ in range(TRIES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return min(found)


def main() -> int:
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    group = dist.group.WORLD
    assert group is not None
    peers = SymmetricPeers(group, device, timeout_s=60)
    side, compute = torch.cuda.Stream(), products()
    for name, message in messages(peers).items():

        def beside(message: Callable[[], None] = message) -> None:
            side.wait_stream(torch.cuda.current_stream())
            compute()  # first, since the host takes longer to send messages
            with torch.cuda.stream(side):
                for _ in range(MESSAGES):
                    message()
            torch.cuda.current_stream().wait_stream(side)

        def alone(message: Callable[[], None] = message) -> None:
            for _ in range(MESSAGES):
                message()

        both, one = timed(beside), timed(alone)
        if rank == 0:
            print(f"{name:<45} beside products {both:6.2f} ms, alone {one:6.2f} ms", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
