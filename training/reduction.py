"""Sums of gradients in ZeRO-2 and 3: each rank adds up its part of every parameter's, in fp32, over micro-batches and
ranks. And ZeRO-2's weights, gathered from such parts after the update.

DeepSpeed 0.19.8 moves a micro-batch's gradient of b bytes an element five times between the product that makes it and
ZeRO-3's sum: into a bucket (b + 4 bytes), into another one in the order of ranks (8), divided by their number (8), the
own part then added to its sum (12/W). Here it is rounded up into its place in the order of ranks (b + 4), reduced
there, and the own part divided as it is added (12/W). On one rank it is added as it comes (b + 8), or not at all, where
the layer has added it itself (`model.weight_gradient`).

A bucket is a matrix (W, n): row r is what rank r keeps. A parameter whose elements W doesn't divide has zeros after its
last. Gradients wait for their bucket to be full; parameters larger than one are cut. While one bucket travels, on a
stream of its own, the next fills; nothing here waits for the device.

`PeerSums` reads the rows of other ranks from their memory, where they are as the products made them: half the bytes of
fp32 and none of NCCL's kernels (`training.peers`). `training.direct` has products write there.

W ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from training.mean_kernel import add_mean_
from training.peers import REDUCTIONS, Peers


@dataclass
class Bucket:
    """Memory that travels."""

    memory: Tensor
    """(W·columns,), fp32 or, where peers read it, the gradients' dtype."""
    peers: list[Tensor] = field(default_factory=list)
    """The same memory of each rank that this one can read."""
    reduced: torch.cuda.Event | None = None
    """After which it may be filled again; None: it may."""


class ShardedSums:
    """Adds each parameter's gradient to the shards of its sum, as soon as autograd has it."""

    def __init__(
        self,
        shards: Mapping[nn.Parameter, Tensor],
        group: dist.ProcessGroup | None,
        bucket_size: int,
        stream: torch.cuda.Stream | None,
    ) -> None:
        """`shards`: this rank's part of each sum, fp32, (elements / W, rounded up,). `bucket_size`: elements that
        travel together. `stream`: where they do, None: where gradients are made."""
        self.shards = shards
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.stream = stream
        self.pending: list[tuple[Tensor, Tensor]] = []
        """Gradients that wait, (W, n), and the shards that they are to be added to, (n,)."""
        self.waiting = 0
        """Columns of those."""
        self.columns = max(1, min(bucket_size // self.world_size, sum(shard.numel() for shard in shards.values())))
        """Of a full bucket."""
        count = 0 if self.world_size == 1 else 1 if stream is None else 2
        self.buckets = [self.make_bucket() for _ in range(count)]
        self.hooks = [parameter.register_post_accumulate_grad_hook(self.add) for parameter in shards]

    def make_bucket(self) -> Bucket:
        like = next(iter(self.shards.values()))
        return Bucket(torch.empty(self.world_size * self.columns, dtype=like.dtype, device=like.device))

    @torch.no_grad()
    def add(self, parameter: Tensor) -> None:
        """Hook: take a parameter's gradient. It also runs where a layer has given autograd none."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        shard = self.shards[parameter]  # type: ignore[index]
        if self.world_size == 1:
            shard.view(gradient.shape).add_(gradient)
            return
        rows = in_rows(gradient, self.world_size)
        for part, sums in zip(rows.split(self.columns, dim=1), shard.split(self.columns), strict=True):
            if self.waiting + sums.numel() > self.columns:
                self.reduce()
            self.pending.append((part, sums))
            self.waiting += sums.numel()

    @torch.no_grad()
    def reduce(self) -> None:
        """Send what waits, and add this rank's part to its sums."""
        if not self.pending:
            return
        bucket = self.buckets[0]
        self.buckets.reverse()
        whole = self.fill(bucket)
        sums = [shard for _, shard in self.pending]
        self.pending.clear()
        self.waiting = 0
        self.launch(bucket, lambda: self.send(bucket, whole, sums))

    def launch(self, bucket: Bucket, send: Callable[[], None]) -> None:
        """`send` what is in the bucket by now, on the stream where buckets travel."""
        if self.stream is None:
            send()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            send()
            bucket.reduced = self.stream.record_event()

    def await_room(self, bucket: Bucket) -> None:
        """Keep what is launched from now on behind the bucket's reduction: it may be filled again."""
        if bucket.reduced is not None:
            torch.cuda.current_stream().wait_event(bucket.reduced)

    def fill(self, bucket: Bucket) -> Tensor:
        """The waiting gradients side by side in the bucket, (W, waiting)."""
        self.await_room(bucket)
        whole = bucket.memory[: self.world_size * self.waiting].view(self.world_size, self.waiting)
        places = whole.split([part.shape[1] for part, _ in self.pending], dim=1)
        for place, (part, _) in zip(places, self.pending, strict=True):
            place.copy_(part)
        return whole

    def send(self, bucket: Bucket, whole: Tensor, sums: list[Tensor]) -> None:
        """Reduce `whole` (W, n), which is the bucket's begin, and add the mean of this rank's row to `sums`, n elements
        in all."""
        own = whole[dist.get_rank(self.group)]
        dist.reduce_scatter_tensor(own, whole.view(-1), group=self.group)
        parts = own.split([shard.numel() for shard in sums])
        torch._foreach_add_(sums, list(parts), alpha=1.0 / self.world_size)

    def finish(self, *_: Any) -> None:
        """Send what is left of a backward pass. What is launched after this finds the sums complete."""
        self.reduce()
        self.await_all()

    def await_all(self) -> None:
        """Keep what is launched from now on behind all reductions."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def forget(self) -> None:
        """Drop what waits."""
        self.pending.clear()
        self.waiting = 0


class PeerSums(ShardedSums):
    """The same where ranks read each other's memory."""

    def __init__(
        self,
        shards: Mapping[nn.Parameter, Tensor],
        group: dist.ProcessGroup | None,
        bucket_size: int,
        stream: torch.cuda.Stream | None,
        peers: Peers,
    ) -> None:
        """`peers`: the ranks of the group."""
        self.peers = peers
        super().__init__(shards, group, bucket_size, stream)
        self.arrived = self.buckets[0].memory.new_empty(self.world_size - 1, self.columns)
        """This rank's row of the other ranks' buckets."""

    def make_bucket(self) -> Bucket:
        memories = self.peers.share(self.world_size * self.columns, next(iter(self.shards)).dtype)
        return Bucket(memories[self.peers.rank], memories)

    def send(self, bucket: Bucket, whole: Tensor, sums: list[Tensor]) -> None:
        rank, waiting = self.peers.rank, whole.shape[1]
        self.bring(bucket, [(rank * waiting, waiting)], self.arrived)
        begin = 0
        for shard in sums:
            end = begin + shard.numel()
            add_mean_(shard, whole[rank, begin:end], self.arrived[:, begin:end], rank)
            begin = end

    def bring(self, bucket: Bucket, parts: Sequence[tuple[int, int]], arrived: Tensor) -> None:
        """Copy parts of the other ranks' buckets side by side to `arrived`, (W - 1, n). `parts`: where each begins in a
        bucket, and its elements."""
        rank = self.peers.rank
        self.peers.barrier(REDUCTIONS)  # all ranks have filled theirs
        for other in self.peers.others():
            offset = 0
            for begin, size in parts:
                row = bucket.peers[other].narrow(0, begin, size)
                arrived[other - (other > rank), offset : offset + size].copy_(row, non_blocking=True)
                offset += size
        self.peers.barrier(REDUCTIONS)  # all ranks have read this one


def in_rows(gradient: Tensor, world_size: int) -> Tensor:
    """A gradient of any shape cut into W equal rows, (W, elements / W rounded up); zeros after its last element."""
    flat = gradient.reshape(-1)
    missing = -flat.numel() % world_size
    return (F.pad(flat, (0, missing)) if missing else flat).view(world_size, -1)


def rows_of(parameter: nn.Parameter, world_size: int) -> Tensor:
    """A parameter's memory as `in_rows` cuts it, (W, n). Where W doesn't divide the elements, it moves to have room."""
    rows = in_rows(parameter.data, world_size)
    parameter.data = rows.view(-1)[: parameter.numel()].view(parameter.shape)
    return rows


@dataclass
class Message:
    """Columns of parameters on their way from all ranks to all."""

    own: Tensor
    """This rank's row of them, (n,)."""
    whole: Tensor
    """Where all rows arrive, (W, n)."""
    parts: list[Tensor]
    """Each parameter's columns there, (W, m)."""
    places: list[Tensor]
    """The same columns in the parameters, (W, m)."""


class ShardedWeights:
    """Makes parameters whole on all ranks, once each has updated its row of them."""

    def __init__(self, own: Sequence[Tensor], rows: Sequence[Sequence[Tensor]], sums: ShardedSums) -> None:
        """Of each group, `own`: this rank's row of its parameters, one after the other, (n,); `rows`: the parameters,
        (W, m). Messages arrive in the buckets of `sums`, where nothing is between backward passes."""
        self.group = sums.group
        self.memories = [bucket.memory for bucket in sums.buckets]
        """As many messages are under way at once; those after them take their places in turn."""
        self.messages: list[Message] = []
        if self.memories:
            for row, matrices in zip(own, rows, strict=True):
                self.plan(row, matrices)

    def plan(self, own: Tensor, rows: Sequence[Tensor]) -> None:
        """Add the messages of a group."""
        world_size = len(rows[0])
        columns = self.memories[0].view(own.dtype).numel() // world_size
        for begin in range(0, own.numel(), columns):
            end = min(begin + columns, own.numel())
            memory = self.memories[len(self.messages) % len(self.memories)].view(own.dtype)
            whole = memory[: world_size * (end - begin)].view(world_size, -1)
            message, offset = Message(own[begin:end], whole, [], []), 0
            for matrix in rows:
                low, high = max(begin, offset), min(end, offset + matrix.shape[1])
                if low < high:
                    message.parts.append(whole[:, low - begin : high - begin])
                    message.places.append(matrix[:, low - offset : high - offset])
                offset += matrix.shape[1]
            self.messages.append(message)

    @torch.no_grad()
    def gather(self) -> None:
        """While one message is copied to its places, the next travels. What is launched after this finds them whole."""
        under_way: deque[tuple[Message, dist.Work]] = deque()

        def arrive() -> None:
            message, work = under_way.popleft()
            work.wait()  # on a GPU its stream waits, and not the host
            torch._foreach_copy_(message.places, message.parts)

        for message in self.messages:
            if len(under_way) == len(self.memories):
                arrive()
            work = dist.all_gather_into_tensor(message.whole.view(-1), message.own, group=self.group, async_op=True)
            under_way.append((message, work))
        while under_way:
            arrive()
