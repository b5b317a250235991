"""Device helpers that the forward and the backward share: which tile, which blocks, which mask, and how a
tile moves.

A descriptor addresses q, k, v, ... as [B, H, S, D] (dense), whatever the strides, or as a *ragged* tensor
(varlen): the packed rows appear as three dimensions with strides (2^34 - s, s, s), s the row stride, so that
coordinates (2^30, start + length, ..., 2^30 - length + row) address row ``start + row``: 2^30 * 2^34 elements
vanish modulo 2^64 bytes, and the hardware's bound on the last one cuts at ``row == length``. So rows past the
end of a sequence read as zero and are not written, dense or ragged, although they belong to the next sequence
(the technique of triton.tools.ragged_tma).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.attention.hopper.compat import tma_load, tma_store

RAGGED_ROWS = gl.constexpr(2**30)
PAD = gl.constexpr(128)
"""Scratch rows of varlen sequences start at multiples of this, so that no tile of scratch belongs to two
sequences.
"""


@gluon.jit
def load_tile(desc, bar, tile, b, h, row, start, length, VARLEN: gl.constexpr, COLUMN: gl.constexpr = 0):
    """Start the copy of rows [row, row + rows of ``tile``) of one head of one sequence, from COLUMN on; ``bar``
    counts its bytes.
    """
    if VARLEN:
        tma_load(desc, [RAGGED_ROWS, start + length, h, RAGGED_ROWS - length + row, COLUMN], bar, tile)
    else:
        tma_load(desc, [b, h, row, COLUMN], bar, tile)


@gluon.jit
def store_tile(desc, tile, b, h, row, start, length, VARLEN: gl.constexpr, COLUMN: gl.constexpr = 0):
    """Start the copy of ``tile`` to rows [row, ...) of one head of one sequence, from COLUMN on, cut at its
    end."""
    if VARLEN:
        tma_store(desc, [RAGGED_ROWS, start + length, h, RAGGED_ROWS - length + row, COLUMN], tile)
    else:
        tma_store(desc, [b, h, row, COLUMN], tile)


@gluon.jit
def sequence(b, cu_seqlens, S, VARLEN: gl.constexpr):
    """(first row, number of rows) of sequence ``b``."""
    if VARLEN:
        start = gl.load(cu_seqlens + b)
        return start, gl.load(cu_seqlens + b + 1) - start
    else:
        return 0, S


@gluon.jit
def decode_tile(t, sched, num_blocks, num_heads, batch_heads, section, VARLEN: gl.constexpr, REVERSE: gl.constexpr):
    """Tile number -> (query block, sequence, head).

    Dense: heads vary fastest inside sections whose tensors fit in L2 together; blocks descend where later
    ones have more work (REVERSE), so that the tail of the grid is short tiles. The heads that fill no section come
    first: at the end they would be few tiles, the longest of which would start too late. Varlen: ``sched`` lists the
    blocks in such an order (elementwise.py), heads fastest.
    """
    if VARLEN:
        entry = t // num_heads
        return gl.load(sched + 2 * entry + 3), gl.load(sched + 2 * entry + 2), t % num_heads
    else:
        per_section = section * num_blocks
        odd = batch_heads % section
        s = (t - odd * num_blocks + per_section) // per_section  # 0: the odd heads
        first = gl.maximum(odd + (s - 1) * section, 0)
        width = gl.minimum(odd + s * section, section)
        r = t - first * num_blocks
        block = r // width
        if REVERSE:
            block = num_blocks - 1 - block
        bh = first + r % width
        return block, bh // num_heads, bh % num_heads


@gluon.jit
def padded_start(start, b):
    """First scratch row of sequence ``b``, whose first packed row is ``start``: room for b roundings up."""
    return (start + b * PAD) // PAD * PAD


@gluon.jit
def visible_keys(m0, ROWS: gl.constexpr, Sq, Sk, wl, wr, BN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Key blocks [lo, hi) that queries [m0, m0 + ROWS) may see; at least one, fully masked if they see none."""
    off = Sk - Sq
    hi = gl.cdiv(Sk, BN)
    if RIGHT:
        last = gl.minimum(m0 + ROWS, Sq) - 1
        hi = gl.minimum(hi, gl.cdiv(gl.maximum(last + off + wr + 1, 0), BN))
    lo = 0
    if LEFT:
        lo = gl.maximum(m0 + off - wl, 0) // BN
    return lo, gl.maximum(hi, lo + 1)


@gluon.jit
def visible_queries(n0, COLS: gl.constexpr, Sq, Sk, wl, wr, BM: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Query blocks [lo, hi) that may see keys [n0, n0 + COLS); empty if none does."""
    off = Sk - Sq
    lo = 0
    if RIGHT:
        lo = gl.maximum(n0 - off - wr, 0) // BM
    hi = gl.cdiv(Sq, BM)
    if LEFT:
        last = gl.minimum(n0 + COLS, Sk) - 1
        hi = gl.minimum(hi, gl.cdiv(gl.maximum(last - off + wl + 1, 0), BM))
    return lo, hi


@gluon.jit
def crosses_edge(
    m0, ROWS: gl.constexpr, n0, COLS: gl.constexpr, Sq, Sk, wl, wr, LEFT: gl.constexpr, RIGHT: gl.constexpr
):
    """True (one value for the whole tile) if some of queries [m0, ...) x keys [n0, ...) must be masked."""
    off = Sk - Sq
    cross = n0 + COLS > Sk
    if RIGHT:
        cross = cross | (n0 + COLS - 1 > m0 + off + wr)
    if LEFT:
        cross = cross | (n0 < m0 + ROWS - 1 + off - wl)
    return cross


@gluon.jit
def visible(m, n, Sq, Sk, wl, wr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Mask of queries ``m`` x keys ``n`` (broadcast against each other)."""
    off = Sk - Sq
    last = gl.full(m.shape, 0, gl.int32, m.type.layout) + (Sk - 1)
    if RIGHT:
        last = gl.minimum(last, m + (off + wr))
    keep = n <= last
    if LEFT:
        keep = keep & (n >= m + (off - wl))
    return keep
