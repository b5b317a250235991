"""Head dims that are no power of two, for the Hopper kernels.

A tensor of Gluon has powers of two for its sizes. A head dim of 192 is two pieces, 128 and 64 columns, each with a
descriptor, buffers and sums of its own: a product over the head dim is the sum of a product for each piece, and a
product with as many columns as the head dim has is one for each piece. Every other head dim is one piece. What comes in
pieces is a tuple of them.
"""

# Triton has no starred lists.
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

PIECE = gl.constexpr(128)
"""Columns of the first piece of a head dim that has two."""


@gluon.jit
def allocate_pieces(descs, COUNT: gl.constexpr):
    """COUNT buffers for blocks of each descriptor."""
    bufs = ()
    for i in gl.static_range(len(descs)):
        buf = gl.allocate_shared_memory(descs[i].dtype, [COUNT] + descs[i].block_type.shape, descs[i].layout)
        bufs = bufs + (buf,)  # type: ignore[assignment]
    return bufs


@gluon.jit
def matrix(buf, number, HEIGHT: gl.constexpr):
    """Buffer ``number`` of several as a matrix of HEIGHT rows."""
    return buf.index(number).reshape((HEIGHT, buf.shape[len(buf.shape) - 1]))


@gluon.jit
def one_of(bufs, number):
    """Buffer ``number`` of each piece."""
    chosen = ()
    for i in gl.static_range(len(bufs)):
        chosen = chosen + (bufs[i].index(number),)
    return chosen


@gluon.jit
def wait_for(products, OTHERS: gl.constexpr):
    """Waits until only OTHERS products, begun later, are under way; returns these."""
    done = warpgroup_mma_wait(OTHERS, deps=products)
    if len(products) == 1:
        return (done,)
    else:
        return done
