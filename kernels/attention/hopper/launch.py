"""Launchers of the Hopper path: from tensors and scalars to descriptors, scratch memory and grids.

No host synchronisation anywhere; every size that lives on the device (varlen) enters as an upper bound. All
of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from kernels.attention.dispatch import AttnExtras, AttnParams
from kernels.attention.hopper import tuning
from kernels.attention.hopper.elementwise import backward_postprocess, backward_preprocess, list_tiles
from kernels.attention.hopper.gluon_backward import backward_kernel
from kernels.attention.hopper.gluon_backward_wide import backward_wide_kernel
from kernels.attention.hopper.gluon_forward import forward_kernel
from kernels.attention.memory import uninitialised
from kernels.attention.relaunch import Chain, Launch

RAGGED_ROWS = 2**30
RAGGED_STRIDE = 2**34
MAX_DIM = 0x7FFF0000
PAD = 128
LOG2E = math.log2(math.e)
_GL_DTYPE = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@dataclass(frozen=True, slots=True)
class Call:
    """The sizes of one attention call."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    width: int
    """Head dim padded to that of the direction's tile."""
    total_q: int
    """Varlen: rows of q. Dense: Sq."""
    total_k: int
    varlen: bool

    @staticmethod
    def of(q: Tensor, k: Tensor, params: AttnParams, extras: AttnExtras, tiles: Iterable[int]) -> Call:
        """``tiles``: tuning.FORWARD or BACKWARD."""
        cu = extras.cu_seqlens_q
        return Call(
            batch=q.shape[0] if cu is None else cu.shape[0] - 1,
            seqlen_q=params.max_seqlen_q,
            seqlen_k=params.max_seqlen_k,
            num_heads=q.shape[-2],
            num_heads_k=k.shape[-2],
            head_dim=q.shape[-1],
            width=tuning.padded_head_dim(q.shape[-1], tiles),
            total_q=q.shape[-3],
            total_k=k.shape[-3],
            varlen=cu is not None,
        )

    def tiles(self, side: str, block: int) -> int:
        """Number of blocks of all sequences of q or k; an upper bound for varlen."""
        longest, total = (self.seqlen_q, self.total_q) if side == "q" else (self.seqlen_k, self.total_k)
        if self.varlen:
            return min(total // block + self.batch, self.batch * triton.cdiv(longest, block))
        return self.batch * triton.cdiv(longest, block)

    @property
    def padded(self) -> int:
        """Scratch columns: queries of a dense row, or of all sequences each on a multiple of PAD."""
        return (self.total_q // PAD + self.batch) * PAD if self.varlen else triton.cdiv(self.seqlen_q, PAD) * PAD

    @property
    def scratch_rows(self) -> int:
        return self.num_heads if self.varlen else self.batch * self.num_heads


@functools.lru_cache(maxsize=64)
def _shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _GL_DTYPE[dtype])


def describe_tensor(tensor: Tensor, rows: int, width: int, varlen: bool) -> TensorDescriptor:
    """Descriptor of a (B, S, H, D) or (total, H, D) tensor, whatever its strides, in blocks of ``rows`` x ``width``.

    See tiles.py for how a varlen tensor gets five dimensions. Strides of dimensions of size 1 mean nothing and may
    be anything in torch, but must be valid here."""
    head_dim = tensor.shape[-1]
    stride_s, stride_h = (_stride(tensor, dim) for dim in (-3, -2))
    block: tuple[int, ...]
    if varlen:
        shape = [MAX_DIM, MAX_DIM, tensor.shape[1], RAGGED_ROWS, head_dim]
        strides = [RAGGED_STRIDE - stride_s, stride_s, stride_h, stride_s, 1]
        block = (1, 1, 1, rows, width)
    else:
        shape = [tensor.shape[0], tensor.shape[2], tensor.shape[1], head_dim]
        strides = [_stride(tensor, 0), stride_h, stride_s, 1]
        block = (1, 1, rows, width)
    return TensorDescriptor(tensor, shape, strides, list(block), _shared_layout(block, tensor.dtype))


def _stride(tensor: Tensor, dim: int) -> int:
    return tensor.stride(dim) if tensor.shape[dim] > 1 else max(tensor.shape[-1], 8) // 8 * 8


def addressable(tensor: Tensor) -> bool:
    """Whether the copy engine can address ``tensor``: 16-byte base and strides, none of them 0."""
    return tensor.data_ptr() % 16 == 0 and _addressable(tensor.shape, tensor.stride(), tensor.element_size())


@functools.lru_cache(maxsize=4096)
def _addressable(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> bool:
    steps = [step * size for step, n in zip(strides[:-1], shape[:-1], strict=True) if n > 1]
    return strides[-1] == 1 and all(step > 0 and step % 16 == 0 for step in steps)


_counters: dict[tuple[int | None, int], Tensor] = {}


def _tile_counter(device: torch.device) -> Tensor:
    """An int32 zero that the forward kernel leaves at zero: one per stream, since launches on a stream do not
    overlap.

    A captured launch may be replayed on any stream, so it gets a counter of its own, cleared by a node of its
    graph.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device.index, driver.active.get_current_stream(device.index))
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]


def _plan_tile_list(cu_seqlens: Tensor, call: Call, bound: int, block: int, descending: bool) -> Launch:
    """Fills (2 + 2 bound,) int32 from cu_seqlens: counter, number of tiles and list of tiles (see list_tiles)."""
    arguments = {
        "sched": torch.empty(0, dtype=torch.int32, device=cu_seqlens.device),
        "cu_seqlens": cu_seqlens,
        "num_seqs": call.batch,
        "BLOCK": block,
        "DESCENDING": descending,
        "CHUNK": 1024,
    }
    return Launch(list_tiles, call.batch, arguments, num_warps=4)


def _list_tiles(plan: Launch, cu_seqlens: Tensor | None, bound: int) -> Tensor:
    assert cu_seqlens is not None
    sched = torch.empty(2 + 2 * bound, dtype=torch.int32, device=cu_seqlens.device)
    plan(sched, cu_seqlens)
    return sched


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """A forward call but for its tensors."""

    zero: bool
    """Whether rows of out and LSE are in no tile: 0 and -inf there."""
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]
    lse_shape: tuple[int, ...]
    lse_strides: tuple[int, ...]
    copies: tuple[bool, ...] | None
    """Which of q, k, v the copy engine can't address: contiguous copies take their place. None: none of them."""
    bound: int
    """Upper bound of the query blocks of all sequences."""
    tiles: Launch | None
    """Lists the query blocks; varlen only."""
    pieces: int
    """Tensors that the head dim is split into: the kernel has as many descriptors of each of q, k, v and out."""
    launch: Launch | None
    """None: there is no query or no key."""

    def results(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for out and LSE, which the kernel is to fill."""
        out = uninitialised(self.out_shape, self.out_strides, q.dtype, q)
        lse = uninitialised(self.lse_shape, self.lse_strides, torch.float32, q)
        return (out.zero_(), lse.fill_(float("-inf"))) if self.zero else (out, lse)


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, params: AttnParams, extras: AttnExtras, memo: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """out (as q) and lse (fp32, natural log)."""
    plan: ForwardPlan | None = memo.get("forward")
    if plan is None:
        plan = memo["forward"] = _plan_forward(q, k, v, params, extras)
    out, lse = plan.results(q)
    if plan.launch is None:
        return out, lse
    if plan.copies is not None:
        q, k, v = _addressable_copies((q, k, v), plan.copies)
    if plan.tiles is not None:
        sched = _list_tiles(plan.tiles, extras.cu_seqlens_q, plan.bound)
    else:
        sched = _tile_counter(q.device)
    plan.launch(*(q, k, v, out) * plan.pieces, lse, sched, extras.cu_seqlens_q, extras.cu_seqlens_k)
    return out, lse


def _which_to_copy(*tensors: Tensor) -> tuple[bool, ...] | None:
    """Which tensors the copy engine can't address; None: it can address all of them."""
    copies = tuple(not addressable(t) for t in tensors)
    return copies if any(copies) else None


def _addressable_copies(tensors: tuple[Tensor, ...], copies: tuple[bool, ...] | None) -> tuple[Tensor, ...]:
    if copies is None:
        return tensors
    return tuple(t.contiguous() if copy else t for t, copy in zip(tensors, copies, strict=True))


def _plan_forward(q: Tensor, k: Tensor, v: Tensor, params: AttnParams, extras: AttnExtras) -> ForwardPlan:
    call = Call.of(q, k, params, extras, tuning.FORWARD)
    copies = _which_to_copy(q, k, v)
    shape = (call.num_heads, call.total_q) if call.varlen else (call.batch, call.num_heads, call.total_q)
    out = torch.empty(q.shape, dtype=q.dtype, device="meta")
    lse = torch.empty(shape, dtype=torch.float32, device="meta")
    cu = extras.cu_seqlens_q
    bound, tiles, launch = 0, None, None
    if 0 not in q.shape and 0 not in k.shape and call.seqlen_q > 0:
        tile = tuning.forward_tile(call.width, call.seqlen_k, params.window_left >= 0, params.window_right >= 0)
        bound = call.tiles("q", tile.block_m)
        if cu is not None:
            tiles = _plan_tile_list(cu, call, bound, tile.block_m, descending=params.window_right >= 0)
        q, k, v = _addressable_copies((q, k, v), copies)
        launch = _plan_forward_launch(call, tile, bound, q, k, v, out, lse, params, extras)
    zero = call.varlen or launch is None
    pieces = len(tuning.PIECES[call.width])
    return ForwardPlan(zero, tuple(out.shape), out.stride(), shape, lse.stride(), copies, bound, tiles, pieces, launch)


def _describe_pieces(
    call: Call, tensors: dict[str, tuple[Tensor, int]], tails: bool = True
) -> dict[str, TensorDescriptor | None]:
    """Name -> tensor and rows of a block, to arguments {name}_desc, and _tail for the second piece of the head dim.
    ``tails``: whether the kernel has those."""
    first, *rest = tuning.PIECES[call.width]
    parts = {"desc": first} | ({"tail": rest[0] if rest else None} if tails else {})
    return {
        f"{name}_{part}": None if columns is None else describe_tensor(tensor, rows, columns, call.varlen)
        for part, columns in parts.items()
        for name, (tensor, rows) in tensors.items()
    }


def _plan_forward_launch(
    call: Call, tile: tuning.ForwardTile, bound: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    params: AttnParams, extras: AttnExtras,
) -> Launch:  # fmt: skip
    num_tiles = bound * call.num_heads
    group = call.num_heads // call.num_heads_k
    right = params.window_right >= 0
    arguments = {
        **_describe_pieces(call, {"q": (q, 64), "k": (k, tile.block_n), "v": (v, tile.block_n), "o": (out, 64)}),
        "lse_ptr": lse,
        "sched": torch.empty(0, dtype=torch.int32, device=q.device),
        "cu_q": extras.cu_seqlens_q,
        "cu_k": extras.cu_seqlens_k,
        "wl": params.window_left,
        "wr": params.window_right,
        "num_m": triton.cdiv(call.seqlen_q, tile.block_m),
        "num_tiles": num_tiles,
        "section": _section(
            params,
            budget_bytes=tuning.FORWARD_L2_BUDGET_BYTES,
            row_bytes=4 * call.width,
            seqlen=call.seqlen_k,
            num_heads=call.batch * call.num_heads,
            blocks_per_head=triton.cdiv(call.seqlen_q, tile.block_m),
            block=tile.block_m,
            in_flight=tile.ctas * _num_sms(q.device),
            multiple=group,
        ),
        "Sq": call.seqlen_q,
        "Sk": call.seqlen_k,
        "num_heads": call.num_heads,
        "group": group,
        "batch_heads": call.batch * call.num_heads,
        "lse_stride_b": 0 if call.varlen else lse.stride(0),
        "lse_stride_h": lse.stride(-2),
        "scale_log2": params.softmax_scale * LOG2E,
        "BM": tile.block_m,
        "BN": tile.block_n,
        "D": call.width,
        "STAGES": tile.stages,
        "CONSUMER_REGS": tile.consumer_regs,
        "VARLEN": call.varlen,
        "LEFT": params.window_left >= 0,
        "RIGHT": right,
        "OWN_O": tile.own_o,
        "PINGPONG": tile.pingpong,
        "OVERLAP": tile.overlap,
        "AHEAD": tile.ahead,
        "Q_TILES": tile.q_tiles,
        "TRIM": tile.trim,
        "NAMED": tile.named_kv,
    }
    num_programs = min(tile.ctas * _num_sms(q.device), num_tiles)
    return Launch(forward_kernel, num_programs, arguments, num_warps=4, enable_fp_fusion=True, **tile.options())


def _section(
    params: AttnParams, *, budget_bytes: int, row_bytes: int, seqlen: int, num_heads: int, blocks_per_head: int,
    block: int, in_flight: int, multiple: int = 1,
) -> int:  # fmt: skip
    """Heads per section, where ``in_flight`` programs run, each a block of ``block`` rows that meets up to ``seqlen``
    rows of ``row_bytes``, which ``multiple`` heads share."""
    bytes_per_head = row_bytes * seqlen // multiple
    section = tuning.section_heads(budget_bytes, bytes_per_head, num_heads, blocks_per_head, in_flight, multiple)
    rows = tuning.keys_in_sight(seqlen, params.window_left, params.window_right) + block - 1
    if rows >= seqlen:
        return section
    window = tuning.window_section_heads(budget_bytes, row_bytes, rows, num_heads, in_flight * block, multiple)
    return max(section, window)


@dataclass(frozen=True, slots=True)
class BackwardPlan:
    """A backward call but for its tensors."""

    columns: int
    """Queries of all heads, each row padded: see `_scratch`."""
    width: int
    num_counts: int
    """Turns that key blocks take at dQ, one a scratch tile (128 queries at once count at the first of theirs), a head's
    key blocks that have added theirs, and the tiles that were taken; 0: nothing is counted."""
    copies: tuple[bool, ...] | None
    """Which of dO, q, k, v the copy engine can't address: contiguous copies take their place. None: none of them."""
    spares: tuple[bool, bool] | None
    """Which of dK, dV are not wanted or the copy engine can't address: spare memory takes their place."""
    bound: int
    """Upper bound of the key blocks of all sequences."""
    stores_first: bool
    """Whether dQ's sums are not zeroed: the first key block that sees a query stores its own."""
    preprocess: Launch
    tiles: Launch | None
    """Lists the key blocks; varlen only."""
    main: Launch
    postprocess: Launch | None
    """None: no dQ is wanted, or the main kernel rounds it."""
    chain: Chain | None
    """The kernels of a dense call that needs no copies."""
    scratch_shape: tuple[int]
    """Memory of the chain, in 4 bytes: LSE, delta, the sums and the counts, one behind the other."""
    pieces: int
    """As in ForwardPlan, of q, k, v and dO and of dK and dV."""

    def start_again(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
                    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> bool:  # fmt: skip
        """Start the chain as it was started before. False: there is none, or nothing was started."""
        if self.chain is None:
            return False
        assert dq is not None
        assert dk is not None
        assert dv is not None
        memory = uninitialised(self.scratch_shape, (1,), torch.float32, q)
        row = 4 * self.columns
        lse_log2 = memory.data_ptr()
        delta, sums = lse_log2 + row, lse_log2 + 2 * row
        turns = (sums + row * self.width,) if self.num_counts else ()
        at_dout = dout.data_ptr()
        statistics = (lse.data_ptr(),) if dlse is None else (lse.data_ptr(), dlse.data_ptr())
        inputs = (q.data_ptr(), k.data_ptr(), v.data_ptr(), at_dout) * self.pieces
        gradients = (dk.data_ptr(), dv.data_ptr()) * self.pieces
        before = (out.data_ptr(), at_dout, *statistics, lse_log2, delta, sums, *turns)
        main = (*inputs, lse_log2, delta, sums, *gradients, *turns)
        at_dq = dq.data_ptr()
        if self.postprocess is None:
            return self.chain.start(q.get_device(), before, (*main, sums, at_dq))
        after = (sums, *turns, at_dq) if self.stores_first else (sums, at_dq)
        return self.chain.start(q.get_device(), before, main, after)


def launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, params: AttnParams, extras: AttnExtras,
    memo: dict[str, Any],
) -> None:  # fmt: skip
    """Fill those of ``dq``, ``dk`` and ``dv`` that are given. There is at least one query and one key."""
    plan: BackwardPlan | None = memo.get("backward")
    if plan is None:
        plan = memo["backward"] = _plan_backward(dout, q, k, v, out, lse, dlse, dq, dk, dv, params, extras)
    if plan.copies is not None:
        dout, q, k, v = _addressable_copies((dout, q, k, v), plan.copies)
    target_k, target_v = dk, dv
    if plan.spares is not None:
        target_k, target_v = _targets(k, v, dk, dv, plan.spares)
    lse_log2, delta, sums = _scratch(plan.columns, plan.width, q.device)
    turns = torch.empty(plan.num_counts, dtype=torch.int32, device=q.device) if plan.num_counts else None
    cu_q, cu_k = extras.cu_seqlens_q, extras.cu_seqlens_k
    plan.preprocess(out, dout, lse, dlse, lse_log2, delta, sums, turns, cu_q)
    sched = None if plan.tiles is None else _list_tiles(plan.tiles, cu_k, plan.bound)
    inputs, gradients = (q, k, v, dout) * plan.pieces, (target_k, target_v) * plan.pieces
    if plan.postprocess is None and dq is not None:
        plan.main(*inputs, lse_log2, delta, sums, *gradients, turns, sums, dq)
    else:
        plan.main(*inputs, lse_log2, delta, sums, *gradients, sched, cu_q, cu_k, turns)
    if plan.postprocess is not None:
        plan.postprocess(sums, turns if plan.stores_first else None, dq, cu_q)
    for grad, target in ((dk, target_k), (dv, target_v)):
        if grad is not None and target is not None and grad is not target:
            grad.copy_(target)


def _targets(
    k: Tensor, v: Tensor, dk: Tensor | None, dv: Tensor | None, spares: tuple[bool, bool]
) -> tuple[Tensor | None, ...]:
    """What the kernel writes for dK and dV: themselves or, where ``spares`` says so, spare memory."""
    return tuple(
        torch.zeros(like.shape, dtype=like.dtype, device=like.device) if spare else grad
        for grad, like, spare in ((dk, k, spares[0]), (dv, v, spares[1]))
    )


def _plan_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, params: AttnParams, extras: AttnExtras,
) -> BackwardPlan:  # fmt: skip
    call = Call.of(q, k, params, extras, tuning.BACKWARD)
    copies = _which_to_copy(dout, q, k, v)
    dout, q, k, v = _addressable_copies((dout, q, k, v), copies)
    spare_k, spare_v = (t is None or not addressable(t) for t in (dk, dv))
    dk, dv = _targets(k, v, dk, dv, (spare_k, spare_v))
    assert dk is not None
    assert dv is not None
    columns = call.scratch_rows * call.padded
    scratch = _shaped(_scratch(columns, call.width, torch.device("meta")), call)
    tile = tuning.BACKWARD[call.width]
    keys = tuning.keys_in_sight(call.seqlen_k, params.window_left, params.window_right)
    stores_first = params.deterministic or tile.stores_first(keys)
    rounds = dq is not None and _rounds(call, params, tile, dq)
    num_counts = columns // tuning.SCRATCH_TILE + call.scratch_rows + 1 if stores_first or rounds else 0
    turns = torch.empty(num_counts, dtype=torch.int32, device="meta") if num_counts else None
    block_n = tile.block_n
    bound = call.tiles("k", block_n)
    cu = extras.cu_seqlens_k
    tiles = None if cu is None else _plan_tile_list(cu, call, bound, block_n, descending=False)
    preprocess = _plan_preprocess(call, dout, out, lse, dlse, scratch, turns, stores_first, rounds, extras)
    target_q = dq if rounds else None
    main = _plan_main(call, bound, dout, q, k, v, target_q, dk, dv, scratch, turns, stores_first, params, extras)
    postprocess = None
    if dq is not None and not rounds:
        first_stored = turns if stores_first else None
        postprocess = _plan_postprocess(call, scratch, first_stored, dq, params.softmax_scale, extras)
    as_they_are = copies is None and not (spare_k or spare_v or call.varlen)
    return BackwardPlan(
        columns=columns,
        width=call.width,
        num_counts=num_counts,
        stores_first=stores_first,
        copies=copies,
        spares=(spare_k, spare_v) if spare_k or spare_v else None,
        bound=bound,
        preprocess=preprocess,
        tiles=tiles,
        main=main,
        postprocess=postprocess,
        chain=Chain(*filter(None, (preprocess, main, postprocess))) if as_they_are and dq is not None else None,
        scratch_shape=(columns * (2 + call.width) + num_counts,),
        pieces=len(tuning.PIECES[call.width]),
    )


def _rounds(call: Call, params: AttnParams, tile: tuning.BackwardTile | tuning.WideBackwardTile, dq: Tensor) -> bool:
    """Whether the main kernel makes dQ of its sums: every query sees a key then, CTAs share out the queries as they do
    the keys, and dQ is written in words of two elements, at 32-bit offsets within a tile."""
    if not isinstance(tile, tuning.BackwardTile) or call.varlen or call.seqlen_k > tile.rounds_keys:
        return False
    square = call.seqlen_q == call.seqlen_k and params.window_left < 0
    in_words = call.head_dim % 2 == 0 and addressable(dq) and dq.stride(-3) < 2**24
    return square and in_words


def _scratch(columns: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """Device memory of one backward call, fp32, linear in the number of queries: LSE in log2 units and delta, each of
    ``columns`` numbers (a row per head, padded to whole tiles), and the dQ sums, columns * width, tiles in register
    order. One allocation: each costs the host more than a microsecond."""
    memory = torch.empty(columns * (2 + width), dtype=torch.float32, device=device)
    return memory.split_with_sizes((columns, columns, columns * width))


def _shaped(scratch: tuple[Tensor, ...], call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The scratch as the kernels see it: [rows, padded] twice and [rows * padded * width / 256, 256]."""
    lse_log2, delta, sums = scratch
    shape = (call.scratch_rows, call.padded)
    return lse_log2.view(shape), delta.view(shape), sums.view(-1, 256)


def _overlaps(call: Call) -> bool:
    """Whether the three kernels of a backward overlap. Not for varlen, whose list of tiles is made by a kernel between
    the first and the second, which all warps read at once."""
    return tuning.BACKWARD[call.width].pdl and not call.varlen


def _describe_scratch(
    scratch: tuple[Tensor, Tensor, Tensor], tile: tuning.BackwardTile | tuning.WideBackwardTile, width: int
) -> tuple[TensorDescriptor, ...]:
    """Descriptors of the three, unswizzled: the tiles are read row by row."""
    plain = gl.NVMMASharedLayout(0, 32, 2)
    statistics = [1, tuning.SCRATCH_TILE]
    blocks = (statistics, statistics, [tile.sum_rows(width), 256])
    return tuple(
        TensorDescriptor(t, list(t.shape), list(t.stride()), block, plain)
        for t, block in zip(scratch, blocks, strict=True)
    )


def _strides(name: str, tensor: Tensor, varlen: bool) -> dict[str, int]:
    """Arguments stride_{name}b, s and h; the batch stride is 0 for varlen."""
    batch = 0 if varlen else tensor.stride(0)
    return {f"stride_{name}b": batch, f"stride_{name}s": tensor.stride(-3), f"stride_{name}h": tensor.stride(-2)}


def _plan_preprocess(
    call: Call, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, scratch: tuple[Tensor, Tensor, Tensor],
    turns: Tensor | None, stores_first: bool, rounds: bool, extras: AttnExtras,
) -> Launch:  # fmt: skip
    block = tuning.SCRATCH_TILE
    num_blocks = triton.cdiv(call.seqlen_q, PAD) * (PAD // block)  # padding rows too
    arguments = {
        "out": out,
        "dout": dout,
        "lse": lse,
        "dlse": dlse,
        **dict(zip(("lse_log2", "delta", "sums"), scratch, strict=True)),
        "turns": turns,
        "cu_q": extras.cu_seqlens_q,
        **_strides("o", out, call.varlen),
        **_strides("d", dout, call.varlen),
        "stride_lb": 0 if call.varlen else lse.stride(0),
        "stride_lh": lse.stride(-2),
        "stride_gb": 0 if call.varlen or dlse is None else dlse.stride(0),
        "stride_gh": 0 if dlse is None else dlse.stride(-2),
        "seqlen_q": call.seqlen_q,
        "padded": call.padded,
        "num_heads": call.num_heads,
        "num_blocks": num_blocks,
        "num_turns": call.scratch_rows * call.padded // block,
        "num_counts": call.scratch_rows * (call.padded // block + 1),
        "HEAD_DIM": call.head_dim,
        "D": call.width,
        "BLOCK": block,
        "BLOCK_M": tuning.BACKWARD[call.width].queries,
        "VARLEN": call.varlen,
        "HAS_DLSE": dlse is not None,
        "FIRST_STORES": stores_first,
        "ROUNDS": rounds,
        "PDL": _overlaps(call),
    }
    num_warps = tuning.BACKWARD[call.width].preprocess_warps
    return Launch(backward_preprocess, num_blocks * call.batch * call.num_heads, arguments, num_warps=num_warps)


def _plan_main(
    call: Call, bound: int, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor, dv: Tensor,
    scratch: tuple[Tensor, Tensor, Tensor], turns: Tensor | None, stores_first: bool, params: AttnParams,
    extras: AttnExtras,
) -> Launch:  # fmt: skip
    """``dq``: given if the kernel is to write it."""
    tile = tuning.BACKWARD[call.width]
    block_n = tile.block_n
    if isinstance(tile, tuning.BackwardTile) and tile.pairs and call.width != 64:
        raise ValueError(f"pairs are for head dims up to 64 (registers), this one is {call.head_dim}")
    num_tiles = bound * call.num_heads_k
    group = call.num_heads // call.num_heads_k
    names = ("lse_desc", "delta_desc", "dq_desc")
    rows, wide = tuning.SCRATCH_TILE, isinstance(tile, tuning.WideBackwardTile)
    arguments = {
        **_describe_pieces(call, {"q": (q, rows), "k": (k, block_n), "v": (v, block_n), "do": (dout, rows)}, wide),
        **dict(zip(names, _describe_scratch(scratch, tile, call.width), strict=True)),
        **_describe_pieces(call, {"dk": (dk, block_n), "dv": (dv, block_n)}, wide),
        "sched": torch.empty(0, dtype=torch.int32, device=q.device) if call.varlen else None,
        "cu_q": extras.cu_seqlens_q,
        "cu_k": extras.cu_seqlens_k,
        "turns": turns,
        "wl": params.window_left,
        "wr": params.window_right,
        "num_n": triton.cdiv(call.seqlen_k, block_n),
        "num_tiles": num_tiles,
        "section": _section(
            params,
            budget_bytes=tile.l2_budget_mib * 2**20,
            row_bytes=8 * call.width * group,
            seqlen=call.seqlen_q,
            num_heads=call.batch * call.num_heads_k,
            blocks_per_head=triton.cdiv(call.seqlen_k, block_n),
            block=block_n,
            in_flight=_num_sms(q.device),
        ),
        "Sq": call.seqlen_q,
        "Sk": call.seqlen_k,
        "padded": call.padded,
        "num_heads_k": call.num_heads_k,
        "group": group,
        "batch_heads_k": call.batch * call.num_heads_k,
        "scale_log2": params.softmax_scale * LOG2E,
        "scale": params.softmax_scale,
        "BM": tile.queries,
        "BN": block_n,
        "D": call.width,
        "STAGES": tile.q_stages,
        "DO_STAGES": tile.do_stages,
        **tile.constants(),
        "VARLEN": call.varlen,
        "LEFT": params.window_left >= 0,
        "RIGHT": params.window_right >= 0,
        "FIRST_STORES": stores_first,
        "DETERMINISTIC": params.deterministic,
        "PDL": _overlaps(call),
    }
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": True, "launch_pdl": _overlaps(call)}
    if isinstance(tile, tuning.WideBackwardTile):
        return Launch(backward_wide_kernel, num_tiles, arguments, **options)
    lag = 0
    if dq is not None:
        in_a_section = min(num_tiles, arguments["section"] * arguments["num_n"])
        lag = min(num_tiles, in_a_section + tile.lag_sms * _num_sms(q.device))
    arguments |= _rounding_arguments(call, scratch, dq, lag)
    num_programs = num_tiles if dq is None else min(num_tiles + lag, _num_sms(q.device))
    return Launch(backward_kernel, num_programs, arguments, **options)


def _rounding_arguments(
    call: Call, scratch: tuple[Tensor, Tensor, Tensor], dq: Tensor | None, lag: int
) -> dict[str, Any]:
    strides = dict.fromkeys(("stride_qb", "stride_qs", "stride_qh"), 0) if dq is None else _strides("q", dq, False)
    return {
        "sums": None if dq is None else scratch[2],
        "dq": dq,
        **strides,
        "num_turns": call.scratch_rows * call.padded // tuning.SCRATCH_TILE,
        "num_counts": call.scratch_rows * (call.padded // tuning.SCRATCH_TILE + 1),
        "lag": lag,
        "ROUNDS": dq is not None,
        "HEAD_DIM": call.head_dim if dq is not None else call.width,
    }


def _plan_postprocess(
    call: Call,
    scratch: tuple[Tensor, Tensor, Tensor],
    turns: Tensor | None,
    dq: Tensor,
    scale: float,
    extras: AttnExtras,
) -> Launch:
    num_blocks = triton.cdiv(call.seqlen_q, 64)
    tile = tuning.BACKWARD[call.width]
    arguments = {
        "sums": scratch[2],
        "turns": turns,
        "dq": dq,
        "cu_q": extras.cu_seqlens_q,
        **_strides("q", dq, call.varlen),
        "seqlen_q": call.seqlen_q,
        "padded": call.padded,
        "num_heads": call.num_heads,
        "num_blocks": num_blocks,
        "scale": scale,
        "HEAD_DIM": call.head_dim,
        "D": call.width,
        "BLOCK_M": tile.queries,
        "COLUMN_WARPGROUPS": tile.column_warpgroups,
        "VARLEN": call.varlen,
        "PDL": _overlaps(call),
    }
    options: dict[str, Any] = {"launch_pdl": True} if _overlaps(call) else {}
    options["num_warps"] = tile.postprocess_warps
    return Launch(backward_postprocess, num_blocks * call.batch * call.num_heads, arguments, **options)
