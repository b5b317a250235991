"""Shared pieces of the portable attention kernels: tiles, masks, scores, dropout, scheduling.

Notation (all kernels of this package): q block rows are queries, columns are keys; ``offset`` = Sk - Sq
aligns the masks to the bottom right corner; query i sees key j iff

    j < Sk  and  i + offset - window_left <= j <= i + offset + window_right    (a limit of -1 is absent).

Scores are kept in log2 units (natural-log score times log2 e), so that the hot loop needs exp2 alone.
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRET = tl.constexpr(bool(knobs.runtime.interpret))
"""True when kernels run in Triton's interpreter. It multiplies the bit patterns of bf16 operands in
``tl.dot``, so operands are widened there (the products are the same: a product of two bf16 or fp16 numbers is
exact in fp32)."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
PHILOX_ROUNDS = tl.constexpr(7)
"""Philox-4x32-7: the fewest rounds that pass BigCrush (Salmon et al., SC11, table 2)."""


@triton.jit
def dot(a, b, acc=None):
    """acc + a @ b with fp32 accumulation; fp32 operands are multiplied in full precision (no TF32)."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def decode_tile(tile, num_blocks, num_heads, section):
    """Flat tile index -> (block, flat head). Heads vary fastest inside a section of ``section`` heads whose
    operands fit in L2 together, then blocks, then sections."""
    per_section = section * num_blocks
    index = tile // per_section
    rest = tile % per_section
    width = tl.minimum(section, num_heads - index * section)  # the last section may be narrower
    return rest // width, index * section + rest % width


@triton.jit
def sequence_range(CuSeqlens, batch, seqlen, VARLEN: tl.constexpr):
    """(first row in the packed tensor, length) of sequence ``batch``; (0, seqlen) when dense."""
    start = tl.zeros((), tl.int64)
    length = seqlen
    if VARLEN:
        first = tl.load(CuSeqlens + batch)
        length = tl.load(CuSeqlens + batch + 1) - first
        start = first.to(tl.int64)
    return start, length


@triton.jit
def head_base(pointer, batch, head, start, stride_b, stride_s, stride_h):
    """Address of row ``start`` of one (batch, head), in 64 bits: tensors may hold more than 2**31 elements."""
    return pointer + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + start * stride_s


@triton.jit
def tile_pointers(base, row, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, BLOCK_D) addresses of rows row.. of one head: one 64-bit base, 32-bit offsets inside the tile."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    return base + row.to(tl.int64) * stride + (rows[:, None] * stride + cols[None, :])


@triton.jit
def tile_mask(row, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, BLOCK_D) mask of the elements that exist."""
    mask = (row + tl.arange(0, ROWS) < num_rows)[:, None]
    if BLOCK_D > HEAD_DIM:
        mask = mask & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_tile(
    base,
    row,
    num_rows,
    stride,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """(ROWS, BLOCK_D) tile from row ``row`` on; what does not exist reads as 0 (0 * NaN would poison a
    product)."""
    pointers = tile_pointers(base, row, stride, ROWS, BLOCK_D)
    if MASK_ROWS:
        tile = tl.load(pointers, mask=tile_mask(row, num_rows, ROWS, HEAD_DIM, BLOCK_D), other=0.0)
    elif BLOCK_D > HEAD_DIM:
        tile = tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    base,
    row,
    num_rows,
    stride,
    tile,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the existing part of a (ROWS, BLOCK_D) tile in the dtype of the destination."""
    pointers = tile_pointers(base, row, stride, ROWS, BLOCK_D)
    mask = tile_mask(row, num_rows, ROWS, HEAD_DIM, BLOCK_D)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def visible(
    rows,
    cols,
    offset,
    seqlen_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Mask of the (query, key) pairs that see each other; ``rows`` and ``cols`` broadcast to the tile. BOUNDED: keys
    past the end may be among ``cols``. One of the three flags must hold."""
    mask = None
    if HAS_RIGHT:
        mask = cols <= rows + (offset + window_right)
    if HAS_LEFT:
        inside = cols >= rows + (offset - window_left)
        mask = mask & inside if HAS_RIGHT else inside
    if BOUNDED:
        exists = cols < seqlen_k
        mask = mask & exists if HAS_RIGHT or HAS_LEFT else exists
    return mask


@triton.jit
def key_blocks(
    row,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Key blocks that the query block at ``row`` visits, as (first, full_first, full_last, last): blocks in
    [first, last) hold a visible pair, those in [full_first, full_last) need no mask.
    Dividends are clamped to >= 0 before each division, which truncates."""
    offset = seqlen_k - seqlen_q
    begin = tl.zeros((), tl.int32)
    full_begin = begin
    end = seqlen_k
    full_end = seqlen_k
    if HAS_RIGHT:
        last_row = tl.minimum(row + BLOCK_M, seqlen_q) - 1
        end = tl.minimum(end, tl.maximum(last_row + offset + window_right + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(row + offset + window_right + 1, 0))
    if HAS_LEFT:
        begin = tl.maximum(row + offset - window_left, 0)
        full_begin = tl.maximum(row + BLOCK_M - 1 + offset - window_left, 0)
    last = tl.cdiv(end, BLOCK_N)
    first = tl.minimum(begin // BLOCK_N, last)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_begin, BLOCK_N), first), last)
    full_last = tl.minimum(tl.maximum(full_end // BLOCK_N, full_first), last)
    return first, full_first, full_last, last


@triton.jit
def query_blocks(
    col,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Query blocks that visit the key block at ``col``, like :func:`key_blocks`: (first, full_first,
    full_last, last). Blocks outside the full range need bounds or masks."""
    offset = seqlen_k - seqlen_q
    begin = tl.zeros((), tl.int32)
    full_begin = begin
    end = seqlen_q
    full_end = seqlen_q
    if HAS_RIGHT:
        begin = tl.maximum(col - offset - window_right, 0)
        full_begin = tl.maximum(col + BLOCK_N - 1 - offset - window_right, 0)
    if HAS_LEFT:
        last_col = tl.minimum(col + BLOCK_N, seqlen_k) - 1
        end = tl.minimum(end, tl.maximum(last_col - offset + window_left + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(col - offset + window_left + 1, 0))
    last = tl.cdiv(end, BLOCK_M)
    first = tl.minimum(begin // BLOCK_M, last)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_begin, BLOCK_M), first), last)
    full_last = last
    if HAS_LEFT:
        full_last = tl.minimum(tl.maximum(full_end // BLOCK_M, full_first), last)
    return first, full_first, full_last, last


@triton.jit
def tanh(x):
    """1 - 2 / (1 + exp(2x)): absolute error about 1e-7, right at both ends (exp2 gives inf or 0)."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))


@triton.jit
def bias_scores(
    products, rows, cols, offset, scale, softcap, slope, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr
):
    """Scores in log2 units from raw products q·k: scale, soft cap, ALiBi. Second result: d score / d scaled
    product (1 - tanh**2, for the backward; a scalar 1 without a soft cap).

    scale: softmax_scale * log2 e; softcap: the cap * log2 e; slope: the head's ALiBi slope * log2 e."""
    scores = products * scale
    slope_of_cap = 1.0
    if HAS_SOFTCAP:
        capped = tanh(scores / softcap)
        scores = softcap * capped
        slope_of_cap = 1.0 - capped * capped
    if HAS_ALIBI:
        scores -= slope * tl.abs(rows + offset - cols).to(tl.float32)
    return scores, slope_of_cap


@triton.jit
def dropout_keep(Rng, head, row, col, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) int1: True where the softmax entry is kept.

    Counter-based: entry (row, col) of flat head ``head`` (batch * H + h) takes lane col % 4 of Philox at
    counter (col // 4, row, head, offset) under key seed, so that the mask depends on nothing else, block
    sizes least of all. It is kept if its upper 24 bits reach ``threshold`` = dropout_p * 2**24."""
    seed = tl.load(Rng)
    offset = tl.load(Rng + 1).to(tl.uint32)
    rows = (row + tl.arange(0, BLOCK_M))[:, None].to(tl.uint32)
    quads = (col // 4 + tl.arange(0, BLOCK_N // 4))[None, :].to(tl.uint32)
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, quads + zero, rows + zero, zero + head.to(tl.uint32), zero + offset, PHILOX_ROUNDS)
    k0 = (r0 >> 8).to(tl.int32) >= threshold
    k1 = (r1 >> 8).to(tl.int32) >= threshold
    k2 = (r2 >> 8).to(tl.int32) >= threshold
    k3 = (r3 >> 8).to(tl.int32) >= threshold
    # join stacks in a new last axis: even lanes (0, 2) and odd lanes (1, 3) first, then even beside odd
    even = tl.join(k0.to(tl.int8), k2.to(tl.int8))  # (BLOCK_M, BLOCK_N // 4, 2)
    odd = tl.join(k1.to(tl.int8), k3.to(tl.int8))
    return tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_N)) != 0
