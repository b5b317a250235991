"""Rings of buffers in shared memory between a producer and its consumers, for the Hopper kernels.

A ring has STAGES buffers. Block number ``step`` of a CTA, counted from 0 over all its tiles and never reset, lies in
buffer ``step % STAGES``, as the use number ``step // STAGES`` of that buffer. Each buffer has two barriers:

    full    the copy engine has written the block (it counts the bytes)      producer -> consumers
    empty   every consumer has read it                                       consumers -> producer

A barrier's phase is a bit that flips each time it completes, and ``mbarrier.wait(barrier, phase)`` returns once the
phase with that bit is over. So a consumer waits for the use's parity, and the producer for the opposite one: before
the first use that is the phase before the barrier's first, which counts as over, and the producer goes on at once.
What has to hold: each consumer releases each block once, in order, also a block that it does not need.

``empty`` may be a hardware barrier by number instead of an mbarrier (NAMED, the first number of the ring; 0: an
mbarrier). A consumer then arrives without waiting for its own other warps, as ``mbarrier.arrive`` does. Such a barrier
counts threads, the producer's too, and remembers nothing: the producer waits at it once for each time that the
consumers arrive, so not before a ring's first use of a buffer, which is what ``step >= STAGES`` says.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.attention.hopper.compat import ring_barrier_arrive, ring_barrier_sync


@gluon.jit
def make_barrier(COUNT: gl.constexpr, ARRIVALS: gl.constexpr = 1):
    """An array of mbarriers, each of so many arrivals. To be made only where somebody uses it: its memory is given to
    others otherwise, and a GPU that switches between processes writes the barrier there again (docs/kernel_log.md)."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def await_full(full, step, STAGES: gl.constexpr):
    """Consumer: waits until the block of ``step`` has arrived."""
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)


@gluon.jit
def release(empty, stage, NAMED: gl.constexpr, THREADS: gl.constexpr):
    """Consumer: is done with a stage. THREADS: the consumers' and the producer's at a named barrier."""
    if NAMED > 0:
        ring_barrier_arrive(NAMED + stage, THREADS)
    else:
        mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def await_empty(empty, step, STAGES: gl.constexpr, NAMED: gl.constexpr, THREADS: gl.constexpr):
    """Producer: waits until the stage of ``step`` has been released by everybody who read it last."""
    if NAMED > 0:
        if step >= STAGES:
            ring_barrier_sync(NAMED + step % STAGES, THREADS)
    else:
        mbarrier.wait(empty.index(step % STAGES), ((step // STAGES) & 1) ^ 1)


@gluon.jit
def claim_tile(bufs, bars, prob, n):
    """Producer (one warp): takes the CTA's n-th tile and tells the other partitions."""
    t = gl.atomic_add(prob.counter, 1, sem="relaxed")
    mbarrier.wait(bars.slot_empty.index(n % 2), ((n // 2) & 1) ^ 1)
    bufs.slot.index(n % 2).store(gl.full((1,), 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + t)
    mbarrier.arrive(bars.slot_full.index(n % 2), count=1)
    return t


@gluon.jit
def told_tile(bufs, bars, n, WARPS: gl.constexpr):
    """Another partition, of so many warps: the CTA's n-th tile."""
    mbarrier.wait(bars.slot_full.index(n % 2), (n // 2) & 1)
    t = gl.max(bufs.slot.index(n % 2).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    mbarrier.arrive(bars.slot_empty.index(n % 2), count=1)
    return t
