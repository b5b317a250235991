"""Gluon under triton 3.6 to 3.9: the names that moved, and the two instructions Gluon does not wrap
everywhere.

Everything version-dependent of the Hopper path is in this file. Device code; imports triton, not torch.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# Renamed in 3.8; the old names raise in 3.9.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# Barrier over the warps of the current partition. Renamed in 3.7.
partition_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@builtin
def _tma_reduce_add(desc, coord, src, _semantic=None):
    """Bulk tensor add of a shared tile to global memory: the builder has it in 3.6, a wrapper came in 3.8."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, desc.handle, coord, src.handle)


tma_reduce_add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _tma_reduce_add


# Raw named barriers. Triton owns id 0, id 1 and one id per worker partition; ours start at 8. They are
# invisible to Triton's analyses, so they must stand in control flow that every thread of the partition takes.
@gluon.jit
def named_barrier_sync(ID: gl.constexpr, THREADS: gl.constexpr):
    """Arrive at barrier ``ID`` and wait until ``THREADS`` threads have arrived."""
    gl.inline_asm_elementwise(
        f"bar.sync {ID}, {THREADS}; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def named_barrier_arrive(ID: gl.constexpr, THREADS: gl.constexpr):
    """Arrive at barrier ``ID`` without waiting."""
    gl.inline_asm_elementwise(
        f"bar.arrive {ID}, {THREADS}; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def ring_barrier_sync(number, THREADS: gl.constexpr):
    """``named_barrier_sync`` of a barrier whose number is known only on the device, 8 to 15."""
    gl.inline_asm_elementwise(
        f"bar.sync $1, {THREADS}; mov.u32 $0, 0;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def ring_barrier_arrive(number, THREADS: gl.constexpr):
    """``named_barrier_arrive`` at a barrier whose number is known only on the device, 8 to 15."""
    gl.inline_asm_elementwise(
        f"bar.arrive $1, {THREADS}; mov.u32 $0, 0;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_previous_kernel():
    """Wait until the kernel before this one in the stream has ended and its writes can be seen. Returns at once unless
    this kernel was launched with ``launch_pdl``."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pack_pairs(even, odd, DTYPE: gl.constexpr):
    """fp32 ``even`` and ``odd`` as pairs of 16-bit floats in int32, ``even`` in the lower half."""
    IS_BF16: gl.constexpr = DTYPE == gl.bfloat16  # noqa: SIM300
    asm: gl.constexpr = ("cvt.rn.bf16x2.f32" if IS_BF16 else "cvt.rn.f16x2.f32") + " $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def opaque_zero():
    """0, of which the compiler knows nothing: an address made with it is computed there, not before the loop."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


# Turns: a count in global memory that orders additions by several CTAs. Both run in a partition of one warp.
@gluon.jit
def wait_turn(turn, rank):
    """Wait until ``turn`` (int32 pointer) holds ``rank`` or more; what its writers did before is then visible, to the
    copy engine too."""
    gl.inline_asm_elementwise(
        "{ .reg .pred %again; .reg .s32 %seen; POLL: ld.acquire.gpu.global.s32 %seen, [$1]; "
        "setp.lt.s32 %again, %seen, $2; @%again bra POLL; fence.proxy.async.global; mov.u32 $0, 0; }",
        "=r,l,r",
        [turn, rank],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def wait_count(counter, count):
    """``wait_turn`` for waits that may take long: it sleeps between two looks."""
    gl.inline_asm_elementwise(
        "{ .reg .pred %again; .reg .s32 %seen; POLL: ld.acquire.gpu.global.s32 %seen, [$1]; "
        "setp.ge.s32 %again, %seen, $2; @%again bra DONE; nanosleep.u32 200; bra POLL; "
        "DONE: fence.proxy.async.global; mov.u32 $0, 0; }",
        "=r,l,r",
        [counter, count],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def pass_turn(turn):
    """Add 1 to ``turn`` (int32 pointer) once the copy engine has performed every store and reduction of this warp.

    ``tma.store_wait`` waits only until their sources have been read. Any lane may have issued them: each waits for its
    own, then one of them speaks for the warp."""
    gl.inline_asm_elementwise(
        "{ .reg .pred %first; .reg .u32 %lane; cp.async.bulk.wait_group 0; fence.proxy.async.global; bar.warp.sync -1; "
        "mov.u32 %lane, %laneid; setp.eq.u32 %first, %lane, 0; @%first red.release.gpu.global.add.s32 [$1], 1; "
        "mov.u32 $0, 0; }",
        "=r,l",
        [turn],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
