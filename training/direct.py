"""ZeRO-2's gradients written by the products that make them where other ranks read them.

`training.reduction.PeerSums` copies each gradient into a bucket: 4 bytes a weight and micro-batch, beside the 2 that
the product writes. Here a block's matrices have places in a bucket of their own, which are bound to its linear layers
(`model.weight_gradient`). Two such buckets take turns: while the gradients of one block travel, the next are written.

Hundreds of gradients are vectors, of biases and norms. Each rank adds them up over the micro-batches in fp32, inside
the kernels of norms where it can be, and all ranks together reduce them once a step, in one message.

Embeddings and head go the old way. So does the gradient of a layer that has given it to autograd all the same: a copy
to its place.

W ranks. A gradient's elements in W equal rows, of which rank r keeps row r, are contiguous in it; zeros come after its
last, where W doesn't divide them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.mean_kernel import add_mean_
from training.peers import Peers
from training.reduction import Bucket, PeerSums

ALIGNMENT = 256
"""Elements that places begin at a multiple of: 512 bytes, as PyTorch's allocator has it, or more."""


@dataclass(frozen=True)
class Area:
    """Where a gradient is in a bucket."""

    begin: int
    row: int
    """Elements of each of its W rows."""


class DirectSums(PeerSums):
    """Sums of which layers bring most terms themselves."""

    def __init__(
        self,
        shards: Mapping[nn.Parameter, Tensor],
        group: dist.ProcessGroup | None,
        bucket_size: int,
        stream: torch.cuda.Stream | None,
        peers: Peers,
        matrices: Sequence[Sequence[nn.Parameter]],
        is_last: Callable[[], bool],
    ) -> None:
        """`matrices`: those of each block, alike in all; backward passes go through the blocks from the last to the
        first. `is_last`: whether the backward pass is a step's last. Raises `ValueError` for blocks that differ."""
        super().__init__(shards, group, bucket_size, stream, peers)
        self.matrices = matrices
        self.is_last = is_last
        self.block_of = {parameter: block for block, members in enumerate(matrices) for parameter in members}
        self.written = [0] * len(matrices)
        """Matrices of each block whose gradients this backward pass has written."""
        self.areas = self.plan()
        self.block_buckets = [self.share(self.areas, matrices[0][0].dtype) for _ in range(2)]
        self.vectors = [parameter for parameter in shards if parameter.dim() == 1]
        columns = sum(shards[vector].numel() for vector in self.vectors)
        self.vector_bucket = self.share([Area(0, columns)], torch.float32)
        self.vectors_arrived = self.vector_bucket.memory.new_empty(self.world_size - 1, columns)
        widest = max(self.columns, sum(area.row for area in self.areas))
        self.arrived = self.arrived.new_empty(self.world_size - 1, widest)
        vector_areas = self.layout(self.vectors)
        self.totals = torch.zeros(self.size_of(vector_areas), device=self.vector_bucket.memory.device)
        """This rank's sums of the vectors over the micro-batches so far."""
        self.vector_rows = [self.rows(self.totals, area) for area in vector_areas]
        self.places = {
            vector: rows.view(-1)[: vector.numel()] for vector, rows in zip(self.vectors, self.vector_rows, strict=True)
        }
        """Where layers bring the gradients of vectors and matrices, in the parameters' shapes."""
        for block, members in enumerate(matrices):
            memory = self.bucket_of(block).memory
            for parameter, area in zip(members, self.areas, strict=True):
                flat = memory.narrow(0, area.begin, parameter.numel())
                self.places[parameter] = flat.view(parameter.shape)

    def plan(self) -> list[Area]:
        """The places of a block's matrices."""
        shapes = [[parameter.shape for parameter in members] for members in self.matrices]
        if any(others != shapes[0] for others in shapes):
            raise ValueError(f"blocks whose matrices have different shapes: {shapes}")
        return self.layout(self.matrices[0])

    def layout(self, parameters: Sequence[nn.Parameter]) -> list[Area]:
        """One after the other, each aligned."""
        areas, end = [], 0
        for parameter in parameters:
            areas.append(Area(end, self.shards[parameter].numel()))
            end += -(-self.world_size * areas[-1].row // ALIGNMENT) * ALIGNMENT
        return areas

    def size_of(self, areas: Sequence[Area]) -> int:
        """Elements of all of them."""
        return areas[-1].begin + self.world_size * areas[-1].row

    def share(self, areas: Sequence[Area], dtype: torch.dtype) -> Bucket:
        """A bucket of zeros that other ranks read."""
        memories = self.peers.share(self.size_of(areas), dtype)
        memories[self.peers.rank].zero_()
        return Bucket(memories[self.peers.rank], memories)

    def rows(self, memory: Tensor, area: Area) -> Tensor:
        """A gradient, (W, n)."""
        return memory.narrow(0, area.begin, self.world_size * area.row).view(self.world_size, area.row)

    def bucket_of(self, block: int) -> Bucket:
        """Where the gradients of a block's matrices are written."""
        return self.block_buckets[block % len(self.block_buckets)]

    @torch.no_grad()
    def add(self, parameter: Tensor) -> None:
        place = self.places.get(parameter)  # type: ignore[call-overload]
        if place is None:
            super().add(parameter)
            return
        gradient, parameter.grad = parameter.grad, None
        block = self.block_of.get(parameter)  # type: ignore[call-overload]
        if block is None:
            if gradient is not None:
                place.add_(gradient)
            return
        if gradient is not None:
            place.copy_(gradient)
        self.written[block] += 1
        if self.written[block] == len(self.areas):
            self.written[block] = 0
            self.reduce_block(block)

    def reduce_block(self, block: int) -> None:
        """Send a block's gradients. The block that comes next in the backward pass writes over those of the last but
        this: not before they are read."""
        bucket = self.bucket_of(block)
        sums = [self.shards[parameter] for parameter in self.matrices[block]]
        self.launch(bucket, lambda: self.send_block(bucket, sums))
        if block > 0:
            self.await_room(self.bucket_of(block - 1))

    def send_block(self, bucket: Bucket, sums: Sequence[Tensor]) -> None:
        """Add the means of this rank's rows to `sums`."""
        rank = self.peers.rank
        self.bring(bucket, [(area.begin + rank * area.row, area.row) for area in self.areas], self.arrived)
        begin = 0
        for area, shard in zip(self.areas, sums, strict=True):
            own = self.rows(bucket.memory, area)[rank]
            add_mean_(shard, own, self.arrived[:, begin : begin + area.row], rank)
            begin += area.row

    def reduce_vectors(self) -> None:
        """Send the sums of the vectors, and begin new ones."""
        torch.cat(self.vector_rows, dim=1, out=self.vector_bucket.memory.view(self.world_size, -1))
        self.totals.zero_()
        self.launch(self.vector_bucket, self.send_vectors)

    def send_vectors(self) -> None:
        """As `send_block`."""
        rank, (_, columns) = self.peers.rank, self.vectors_arrived.shape
        self.bring(self.vector_bucket, [(rank * columns, columns)], self.vectors_arrived)
        mean = torch.zeros_like(self.vectors_arrived[0])
        add_mean_(mean, self.vector_bucket.memory.view(self.world_size, -1)[rank], self.vectors_arrived, rank)
        sums = [self.shards[vector] for vector in self.vectors]
        torch._foreach_add_(sums, list(mean.split([shard.numel() for shard in sums])))

    @torch.no_grad()
    def finish(self, *_: object) -> None:
        self.reduce()
        if self.is_last():
            self.reduce_vectors()
        self.await_all()

    def forget(self) -> None:
        super().forget()
        self.written = [0] * len(self.matrices)
        self.totals.zero_()
