"""How long a step takes on W devices, on paper: one device's measured speed, and the bytes that the others add.

    step = compute + what communication no computation hides

Compute is what one device takes alone for a rank's tokens, a third of it forward and two thirds backward. A rank sends
and receives, for N weights of e bytes each and gradients summed in g bytes, W ranks, A micro-batches (a reduction to
all ranks is a reduce-scatter and a gather, so twice the bytes):

    stage 0    2·g·N               after the last backward pass, hidden by nothing
    stage 1    g·N, and e·N        reduced then, the weights gathered after the update; 2·g·N but in bf16 summed in fp32
    stage 2    g·N·A, and e·N      reduced in each backward pass, beside it; gathered after the update; 2·g·N·A by
                                   DeepSpeed's own way (`engine.lean_zero2`)
    stage 3    g·N·A, and 2·e·N·A  blocks gathered ahead in both passes, reduced beside the backward pass

each times (W-1)/W. Where GPUs of one host read each other's memory (`engine.copy_engines`), stages 2 and 3 bring
gradients in the weights' dtype: e·N·A in place of g·N·A; at stage 2 in bf16 with `engine.fuse_weight_gradients=on`
those of norms and biases in fp32, once a step. Sequence parallelism of P ranks exchanges, a layer and token
of a rank, (2·H + 2·max(K, P))·D elements forward and as many backward, times (P-1)/P, and attention waits for each.

In a ring each byte is passed on at the slowest link's rate: the one inside a node as long as all ranks are in it, else
the one between nodes. Each message passes W-1 links and so has their latencies. Of what is hidden, the first or last
block's share is not: there is nothing yet, or no longer, to compute beside it.

Not in it: stragglers, a shared network's other users, links that computation on the same device slows down.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import EngineConfig, ModelConfig, Precision, Recompute, Toggle
from model.dimensions import resolve_dimensions
from model.flops import parameter_counts
from training.backend import should_be_lean


@dataclass(frozen=True)
class Cluster:
    """Devices and what joins them."""

    tokens_per_s: float
    """Of one device alone, with the same micro-batch."""
    link_gb_per_s: float
    """10^9 bytes/s that a device sends to its neighbour in a ring inside a node, while it receives as much."""
    network_gb_per_s: float
    """The same between nodes, for each device."""
    node_size: int
    """Devices in a node."""
    latency_us: float
    """Microseconds for a message to pass one link."""

    def rate(self, ranks: int) -> float:
        """Bytes/s of a ring of neighbouring `ranks`."""
        slowest = self.link_gb_per_s if ranks <= self.node_size else min(self.link_gb_per_s, self.network_gb_per_s)
        return slowest * 1e9


@dataclass(frozen=True)
class Job:
    """What is trained, and how it is spread out."""

    model: ModelConfig
    """With its vocabulary."""
    engine: EngineConfig
    element_bytes: int
    """Of a weight and an activation."""
    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    overlapped: bool
    """Whether communication runs beside computation (`engine.overlap_comm` on GPUs)."""
    copied: bool = False
    """Whether ranks read gradients from each other's memory (see `copies`)."""

    @property
    def micro_batch_tokens(self) -> float:
        """Tokens of a micro-batch on one rank."""
        return self.micro_batch_size * self.model.sequence_length / self.engine.sequence_parallel_size


@dataclass(frozen=True)
class Traffic:
    """Bytes a rank sends in a step (and receives)."""

    gradients: float
    weights: float
    heads: float
    """Sequence parallelism's exchanges."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.gradients + self.weights + self.heads


@dataclass(frozen=True)
class Forecast:
    """A step on paper; times in seconds."""

    traffic: Traffic
    compute_s: float
    communication_s: float
    """All of it, hidden or not."""
    exposed_s: float
    """What no computation hides."""

    @property
    def step_time_s(self) -> float:
        """Wall time of a step."""
        return self.compute_s + self.exposed_s

    @property
    def efficiency(self) -> float:
        """Tokens/s per device relative to one device alone."""
        return self.compute_s / self.step_time_s


def traffic(job: Job) -> Traffic:
    """Bytes of a step, by the table above."""
    counts = parameter_counts(job.model)
    count = counts.total
    ring = (job.world_size - 1) / job.world_size
    repeats = job.accumulation_steps
    gradients = count * _rounds(job) * _summed_bytes(job) * (repeats if job.engine.zero_stage >= 2 else 1)
    if _sums_vectors(job):
        gradients += counts.vectors * (4 - _summed_bytes(job) * repeats)
    weights = {0: 0, 1: 1, 2: 1, 3: 2 * repeats}[job.engine.zero_stage] * job.element_bytes
    tokens = repeats * job.micro_batch_tokens
    heads = exchanged_bytes(job.model, job.engine, job.element_bytes, tokens)
    return Traffic(ring * gradients, ring * count * weights, heads)


def copies(engine: EngineConfig, element_bytes: int, world_size: int, node_size: int) -> bool:
    """Whether GPUs that can read each other's memory do so (`training.peers`): those of one node, in half precision."""
    possible = engine.zero_stage in (2, 3) and should_be_lean(engine) and element_bytes == 2
    return possible and engine.copy_engines is not Toggle.off and 1 < world_size <= node_size


def _summed_bytes(job: Job) -> int:
    """Of an element of a gradient as it travels."""
    return 4 if job.engine.fp32_accumulation and not job.copied else job.element_bytes


def _sums_vectors(job: Job) -> bool:
    """Whether each rank sums the gradients of norms and biases over micro-batches (`training.direct`)."""
    engine = job.engine
    in_bf16 = engine.precision is not Precision.fp16 and job.element_bytes == 2
    return job.copied and engine.zero_stage == 2 and in_bf16 and engine.fuse_weight_gradients is Toggle.on


def _rounds(job: Job) -> int:
    """How often a gradient goes around the ring: once if it is scattered as it is reduced, twice if reduced to all."""
    engine, scattered = job.engine, job.engine.zero_stage == 3
    if engine.zero_stage == 1:  # `Bf16Stage1`
        scattered = engine.precision is not Precision.fp16 and job.element_bytes == 2 and _summed_bytes(job) == 4
    elif engine.zero_stage == 2:
        scattered = should_be_lean(engine)
    return 1 if scattered else 2


def exchanged_bytes(model: ModelConfig, engine: EngineConfig, element_bytes: int, tokens: float) -> float:
    """Bytes of sequence parallelism for a rank's tokens: queries, keys, values and the output, forward, backward and
    recomputed."""
    sizes, ranks = resolve_dimensions(model), engine.sequence_parallel_size
    columns = (2 * sizes.num_heads + 2 * max(sizes.num_kv_heads, ranks)) * sizes.head_dim
    passes = 2 if engine.recompute is Recompute.none else 3
    return tokens * sizes.num_layers * columns * passes * element_bytes * (ranks - 1) / ranks


def forecast(job: Job, cluster: Cluster) -> Forecast:
    """A step of `job` on `cluster`."""
    sent = traffic(job)
    micro_s = job.micro_batch_tokens / cluster.tokens_per_s
    repeats, rate = job.accumulation_steps, cluster.rate(job.world_size)
    gradients, weights = sent.gradients / rate, sent.weights / rate
    heads = sent.heads / cluster.rate(job.engine.sequence_parallel_size)
    waits = _latency(job, cluster)
    whole = gradients + weights + heads + waits
    if job.engine.zero_stage < 2 or not job.overlapped:
        exposed = whole
    elif job.engine.zero_stage == 2:
        exposed = heads + weights + repeats * _left(gradients / repeats + waits / repeats, micro_s * 2 / 3, job)
    else:
        half = (weights + waits) / 2 / repeats  # gathered in a forward pass, and again in the backward pass
        forward, backward = half, half + gradients / repeats
        exposed = heads + repeats * (_left(forward, micro_s / 3, job) + _left(backward, micro_s * 2 / 3, job))
    return Forecast(sent, repeats * micro_s, whole, exposed)


def _left(communication_s: float, compute_s: float, job: Job) -> float:
    """What is left of communication beside computation: the excess, or at least one block's share."""
    return max(communication_s - compute_s, communication_s / job.model.num_layers)


def _latency(job: Job, cluster: Cluster) -> float:
    """Seconds that a step's messages are under way, whatever their size."""
    engine, repeats = job.engine, job.accumulation_steps
    buckets = -(-parameter_counts(job.model).total // engine.bucket_size)
    # Reductions to all ranks go around twice. Stage 3 sends a message a block and direction.
    at_2 = (_rounds(job) * repeats + 1) * buckets
    rounds = {0: 2 * buckets, 1: 2 * buckets, 2: at_2, 3: 3 * repeats * job.model.num_layers}
    return rounds[engine.zero_stage] * (job.world_size - 1) * cluster.latency_us * 1e-6


def checkpoint_bytes(job: Job) -> int:
    """Bytes of a checkpoint on the disk: fp32 masters and two moments."""
    return 12 * parameter_counts(job.model).total
