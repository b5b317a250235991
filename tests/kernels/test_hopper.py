"""The Hopper path on a CPU: which problems it takes, and its kernels' own source over a model of the machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import hopper
from kernels.attention.dispatch import AttnExtras, AttnParams, Problem
from kernels.attention.hopper import launch, pieces, tuning
from tests.kernels import hopper_emulator

NEEDS_INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="the small kernels are interpreted on a CPU")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers' device side replaced by the model; three SMs, so that tiles outnumber CTAs and the other
    way round.
    """
    monkeypatch.setattr(launch, "forward_kernel", hopper_emulator.FORWARD)
    monkeypatch.setattr(launch, "backward_kernel", hopper_emulator.BACKWARD)
    monkeypatch.setattr(launch, "backward_wide_kernel", hopper_emulator.BACKWARD_WIDE)
    monkeypatch.setattr(launch, "_num_sms", lambda _: 3)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    counter = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(launch, "_tile_counter", lambda _: counter)


@dataclass(frozen=True)
class Case:
    """Sequences of (Sq, Sk), dense if there is one length and ``batch`` of it."""

    lengths: tuple[tuple[int, int], ...]
    batch: int = 1
    varlen: bool = False
    heads: int = 2
    heads_k: int = 1
    head_dim: int = 64
    left: int = -1
    right: int = -1
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        kind = "varlen" if self.varlen else f"b{self.batch}"
        lengths = "+".join(f"{a}x{b}" for a, b in self.lengths)
        return f"{kind}-{lengths}-h{self.heads}/{self.heads_k}-d{self.head_dim}-w{self.left},{self.right}"


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Truth for one sequence, fp64: q (Sq, H, D), k, v (Sk, Hk, D) -> out (Sq, H, D), lse (H, Sq)."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = torch.einsum("qhd,khd->hqk", q, k) * scale  # (H, Sq, Sk)
    i = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    j = torch.arange(k.shape[0])[None, :]
    hidden = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    if right >= 0:
        hidden |= j > i + right
    if left >= 0:
        hidden |= j < i - left
    s = s.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - torch.where(lse == float("-inf"), 0.0, lse)[..., None])
    return torch.einsum("hqk,khd->qhd", p, v), lse


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, AttnParams, AttnExtras]:
    """q, k, v, dout in the layout of the call. Rows past the last sequence hold NaN: nobody may look at them."""
    torch.manual_seed(0)
    max_q, max_k = (max(x[i] for x in case.lengths) for i in (0, 1))
    params = AttnParams(0.05, max_q, max_k, case.right == 0, case.left, case.right)

    def rand(rows: int, heads: int) -> Tensor:
        shape = (rows, heads, case.head_dim) if case.varlen else (case.batch, rows, heads, case.head_dim)
        return torch.randn(shape).to(case.dtype)

    if not case.varlen:
        return (
            rand(max_q, case.heads), rand(max_k, case.heads_k), rand(max_k, case.heads_k), rand(max_q, case.heads),
            params, AttnExtras(),
        )  # fmt: skip
    cu = [torch.tensor([0, *(x[i] for x in case.lengths)]).cumsum(0).int() for i in (0, 1)]
    tensors = [
        rand(int(cu[i][-1]) + 5, heads)
        for i, heads in ((0, case.heads), (1, case.heads_k), (1, case.heads_k), (0, case.heads))
    ]
    for t, i in zip(tensors, (0, 1, 1, 0), strict=True):
        t[int(cu[i][-1]) :] = float("nan")
    q, k, v, dout = tensors
    return q, k, v, dout, params, AttnExtras(*cu)


def sequences(case: Case, extras: AttnExtras) -> list[tuple[Any, Any, Any]]:
    """(index into q-like tensors, index into k-like tensors, index into lse) of each sequence."""
    if not case.varlen:
        return [(b, b, b) for b in range(case.batch)]
    assert extras.cu_seqlens_q is not None
    assert extras.cu_seqlens_k is not None
    q, k = extras.cu_seqlens_q.tolist(), extras.cu_seqlens_k.tolist()
    spans = [(slice(q[b], q[b + 1]), slice(k[b], k[b + 1])) for b in range(len(case.lengths))]
    return [(rows, keys, (slice(None), rows)) for rows, keys in spans]


CASES = [
    Case(((128, 128),), right=0),
    Case(((200, 330),), batch=2, heads=4, heads_k=2),  # ragged, more keys than queries, more tiles than CTAs
    Case(((330, 200),), right=0),  # rows that see no key
    Case(((70, 520),), right=0, head_dim=128, heads=3, heads_k=3),  # more key blocks than stages
    Case(((260, 260),), left=70, right=0),
    Case(((150, 400),), left=60, right=100),
    Case(((300, 129),), left=40, heads=1),
    Case(((65, 127),), right=0, dtype=torch.float16, head_dim=40),  # head dim narrower than the tile
    Case(((1, 1),), right=0, head_dim=80),
    Case(((100, 100), (0, 30), (300, 300), (30, 0), (1, 1), (129, 64)), varlen=True, right=0),
    Case(((257, 100), (3, 500), (128, 128)), varlen=True, heads=4, heads_k=2),
    Case(((200, 260), (90, 90)), varlen=True, left=50, right=0, head_dim=128),
]
# The kernel for head dims above 128, whose blocks are 64 keys.
CASES += [
    Case(((128, 128),), right=0, head_dim=256),
    Case(((200, 330),), batch=2, heads=4, heads_k=2, head_dim=192),
    Case(((330, 200),), right=0, head_dim=160),  # rows that see no key
    Case(((300, 129),), left=40, heads=1, head_dim=256),
    Case(((150, 400),), left=60, right=100, head_dim=224, dtype=torch.float16),
    Case(((1, 1),), right=0, head_dim=136),
    Case(((65, 127),), heads=3, heads_k=1, head_dim=256, dtype=torch.float16),
    Case(((100, 100), (0, 30), (300, 300), (30, 0), (1, 1), (129, 64)), varlen=True, right=0, head_dim=256),
    Case(((257, 100), (3, 500)), varlen=True, heads=4, heads_k=2, left=100, right=0, head_dim=192),
]
# Head dims in pieces of 128 and 64 columns; the tensor's bound cuts the second one, or not.
CASES += [
    Case(((200, 330),), batch=2, heads=4, heads_k=2, head_dim=136),
    Case(((70, 300),), right=0, head_dim=192, heads=3, heads_k=3, dtype=torch.float16),  # more key blocks than stages
    Case(((150, 200),), left=60, right=40, head_dim=160),
    Case(((100, 100), (0, 30), (300, 300), (30, 0), (1, 1), (129, 64)), varlen=True, right=0, head_dim=192),
]
# Limits that fall on, just before and just after the edges of 64 queries and 128 keys.
WINDOWS = [(0, 0), (1, 0), (62, -1), (-1, 62), (63, 63), (64, 64), (126, 126), (127, 127), (128, 128), (129, -1)]
EDGES = [Case(((256, 256),), heads=1, left=a, right=b, dtype=torch.float16) for a, b in WINDOWS]  # one entry shows


VARIANTS: dict[str, dict[str, Any]] = {
    "adding": {"first_stores": False},
    "plain": {"named": False, "pairs": False, "kv_registers": False},
    "named": {"named": True, "q_stages": 3, "do_stages": 3},
    "pairs": {"pairs": True, "named": True},
    "pairs, K and V in registers": {"pairs": True, "kv_registers": True, "named": False},
}
"""Backward tiles that are not shipped, or not with every Triton."""
EDGE_VARIANTS = ("plain",)
"""Those whose ranges of queries and keys are not the shipped tile's: 64 queries where it has pairs of them."""


def variant_tile(variant: str, width: int) -> tuning.BackwardTile | tuning.WideBackwardTile:
    """The backward's tile at this padded head dim; the shipped one where the variant says nothing of it."""
    tile = tuning.BACKWARD[width]
    if width == 64 or (width == 128 and variant in ("named", "adding")):
        plain = tile if variant == "adding" else tuning.BackwardTile(2, 2)
        return replace(plain, **VARIANTS[variant])
    return tile


def variants_of(cases: list[Case], *variants: str) -> list[Any]:
    """Parameters (variant, case) of the cases whose tile a variant changes: with the shipped tile, a case is a test of
    its own."""
    pairs = [(variant, case) for variant in variants for case in cases]
    widths = [tuning.padded_head_dim(case.head_dim, tuning.BACKWARD) for _, case in pairs]
    changed = [p for p, width in zip(pairs, widths, strict=True) if variant_tile(p[0], width) != tuning.BACKWARD[width]]
    return [pytest.param(variant, case, id=f"{case}-{variant}") for variant, case in changed]


def use_variant(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (64, 128):
        monkeypatch.setitem(tuning.BACKWARD, width, variant_tile(variant, width))


@NEEDS_INTERPRETER
@pytest.mark.parametrize(("variant", "case"), [*variants_of(CASES, *VARIANTS), *variants_of(EDGES, *EDGE_VARIANTS)])
def test_backward_variants_match_the_formula(
    case: Case, variant: str, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_variant(variant, monkeypatch)
    test_emulated_kernels_match_the_formula(case, emulated, monkeypatch)


@NEEDS_INTERPRETER
@pytest.mark.parametrize("case", [*CASES, *EDGES], ids=str)
def test_emulated_kernels_match_the_formula(case: Case, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Scratch that nobody wrote must not matter: a pair's second half may lie past the last query.
    scratch = launch._scratch
    monkeypatch.setattr(launch, "_scratch", lambda *args: tuple(t.fill_(float("nan")) for t in scratch(*args)))
    q, k, v, dout, params, extras = inputs(case)
    out, lse = hopper.forward(q, k, v, params, extras, {})
    dlse = torch.randn(lse.shape)
    grads = [torch.full(t.shape, float("nan"), dtype=t.dtype) for t in (q, k, v)]
    hopper.backward(dout, q, k, v, out, lse, dlse, *grads, params, extras, {})
    tolerance = 0.03 if case.dtype == torch.bfloat16 else 0.006
    for rows, keys, stats in sequences(case, extras):
        exact = [t[i].double().requires_grad_() for t, i in ((q, rows), (k, keys), (v, keys))]
        true_out, true_lse = reference(*exact, params.softmax_scale, case.left, case.right)
        torch.testing.assert_close(lse[stats].double(), true_lse, atol=1e-3, rtol=0)
        torch.testing.assert_close(out[rows].double(), true_out, atol=tolerance, rtol=tolerance)
        seen = true_lse > float("-inf")
        loss = (true_out * dout[rows].double()).sum() + (true_lse * dlse[stats].double())[seen].sum()
        true_grads = torch.autograd.grad(loss, exact)
        for name, grad, i, true in zip("qkv", grads, (rows, keys, keys), true_grads, strict=True):
            limit = tolerance * max(1.0, float(true.abs().max()) if true.numel() else 0.0)
            torch.testing.assert_close(grad[i].double(), true, atol=limit, rtol=0, msg=lambda m, n=name: f"d{n}: {m}")
    if case.varlen:
        assert extras.cu_seqlens_q is not None
        tail = int(extras.cu_seqlens_q[-1])
        assert bool((out[tail:] == 0).all())
        assert bool((lse[:, tail:] == float("-inf")).all())
    assert int(launch._tile_counter(q.device)) == 0, "the counter must be left as it was found"


FORWARD_VARIANTS: dict[str, tuning.ForwardTile] = {
    **tuning.FORWARD_CANDIDATES[64],
    **{f"{name}, 128": tile for name, tile in tuning.FORWARD_CANDIDATES[128].items()},
    "a tile ahead, one Q buffer": tuning.FORWARD_CANDIDATES[256]["ahead"],
    "narrow": replace(tuning.FORWARD[64], named_kv=False, overlap=True, pingpong=True),
    "one stage, O in Q's buffer": replace(tuning.FORWARD[128], named_kv=False, own_o=False, stages=1),
    "three stages, no turns, a tile at a time": replace(tuning.FORWARD[128], stages=3, ahead=False, pingpong=False),
    "no overlap, turns": replace(tuning.FORWARD[128], named_kv=False, ahead=False, overlap=False),
    "tall, a tile at a time": replace(tuning.FORWARD_LONG[64], ahead=False),
}
"""Forward tiles for every case, whichever of them is chosen for it."""
RANGES = {(t.block_m, t.block_n, t.trim, t.ahead, t.overlap): v for v, t in reversed(FORWARD_VARIANTS.items())}
"""One variant of each shape of tile and each way to go through its key blocks: window edges meet nothing else of it."""
FORWARD_CASES = [(v, case) for v in FORWARD_VARIANTS for case in CASES if case.head_dim <= 128]
FORWARD_CASES += [(v, case) for v in RANGES.values() for case in EDGES]


def check_forward(case: Case) -> None:
    """Out and LSE against the formula, and the counter as it was found."""
    q, k, v, _, params, extras = inputs(case)
    out, lse = hopper.forward(q, k, v, params, extras, {})
    tolerance = 0.02 if case.dtype == torch.bfloat16 else 0.004
    for rows, keys, stats in sequences(case, extras):
        true_out, true_lse = reference(
            *(t[i].double() for t, i in ((q, rows), (k, keys), (v, keys))), params.softmax_scale, case.left, case.right
        )
        torch.testing.assert_close(lse[stats].double(), true_lse, atol=1e-3, rtol=0)
        torch.testing.assert_close(out[rows].double(), true_out, atol=tolerance, rtol=tolerance)
    assert int(launch._tile_counter(q.device)) == 0


@NEEDS_INTERPRETER
@pytest.mark.parametrize(("variant", "case"), FORWARD_CASES, ids=str)
def test_forward_variants_match_the_formula(
    case: Case, variant: str, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "forward_tile", lambda *_: FORWARD_VARIANTS[variant])
    check_forward(case)


@NEEDS_INTERPRETER
@pytest.mark.parametrize("name", tuning.FORWARD_CANDIDATES[192])
@pytest.mark.parametrize("case", [case for case in CASES if 128 < case.head_dim <= 192], ids=str)
def test_head_dim_in_two_pieces(case: Case, name: str, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "forward_tile", lambda *_: tuning.FORWARD_CANDIDATES[192][name])
    check_forward(case)


@NEEDS_INTERPRETER
@pytest.mark.parametrize("right", [-1, 0])
def test_rings_of_two_pieces(right: int, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for tile in tuning.FORWARD_CANDIDATES[192].values():
        monkeypatch.setattr(tuning, "forward_tile", lambda *_, tile=tile: tile)
        for blocks in (1, 2, 3, 4):
            check_forward(Case(((256, tile.block_n * blocks),), heads=5, head_dim=192, right=right))


@NEEDS_INTERPRETER
@pytest.mark.parametrize("wrong", ["columns", "waits"])
def test_a_piece_left_out_is_seen(wrong: str, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pieces read from the first column, and a wait that leaves a piece of S under way."""
    if wrong == "columns":
        monkeypatch.setattr(pieces, "PIECE", type(pieces.PIECE)(0))
    else:
        wait = hopper_emulator.Products.wait
        monkeypatch.setattr(hopper_emulator.Products, "wait", lambda self, n, deps: wait(self, n + (n == 2), deps))
    with pytest.raises((AssertionError, RuntimeError)):
        check_forward(Case(((100, 200),), head_dim=192))


def test_padded_head_dims_and_their_pieces() -> None:
    """Pieces are powers of two, the first of them PIECE wide."""
    for head_dim, want in ((8, 64), (64, 64), (72, 128), (128, 128), (136, 192), (192, 192), (200, 256), (256, 256)):
        for tiles in (tuning.FORWARD, tuning.BACKWARD):
            assert tuning.padded_head_dim(head_dim, tiles) == want
    assert tuning.PIECES.keys() == tuning.FORWARD.keys() == tuning.BACKWARD.keys()
    for width, widths in tuning.PIECES.items():
        assert sum(widths) == width
        assert all(columns & (columns - 1) == 0 for columns in widths)
        assert len(widths) == 1 or widths[0] == pieces.PIECE.value


@NEEDS_INTERPRETER
@pytest.mark.parametrize("variant", FORWARD_VARIANTS)
def test_rings_of_forward_variants(variant: str, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 2, 3, stages and stages + 1 key blocks, over several tiles per CTA."""
    tile = FORWARD_VARIANTS[variant]
    monkeypatch.setattr(tuning, "forward_tile", lambda *_: tile)
    for blocks in sorted({1, 2, 3, tile.stages, tile.stages + 1}):
        keys = tile.block_n * blocks
        for right in (-1, 0):
            check_forward(Case(((256, keys),), heads=5, right=right))
            check_forward(Case(((keys, keys),), heads=5, right=right))


def test_registers_and_barriers_of_forward_tiles() -> None:
    assert tuning.FORWARD[128].options() == {}, "one CTA: Triton's own choice"
    assert tuning.FORWARD[64].options() == {"maxnreg": 80}
    with pytest.raises(ValueError, match="variant of ahead"):
        replace(tuning.FORWARD[256], one_q=True)
    with pytest.raises(ValueError, match="rings of 3"):
        replace(tuning.FORWARD[128], stages=4)
    with pytest.raises(ValueError, match="rings of 2"):
        replace(tuning.FORWARD_LONG[64], stages=3, named_kv=True)
    with pytest.raises(ValueError, match=r"64512 registers.*has 32768"):
        replace(tuning.FORWARD[64], consumer_regs=240)


def test_which_forward_tile() -> None:
    for width, keys, left, right, want in (
        (64, 2048, False, True, tuning.FORWARD[64]),
        (64, 2049, False, True, tuning.FORWARD_LONG[64]),
        (64, 512, False, False, tuning.FORWARD_LONG[64]),
        (64, 512, True, True, tuning.FORWARD[64]),
        (128, 512, False, True, tuning.FORWARD[128]),
        (128, 16384, False, True, tuning.FORWARD[128]),
        (128, 512, False, False, tuning.FORWARD_LONG[128]),
        (128, 512, True, False, tuning.FORWARD[128]),
        (192, 8192, False, False, tuning.FORWARD[192]),
        (256, 512, False, False, tuning.FORWARD[256]),
        (256, 512, False, True, tuning.FORWARD_LONG[256]),
        (256, 512, True, True, tuning.FORWARD[256]),
    ):
        assert tuning.forward_tile(width, keys, left, right) is want


@NEEDS_INTERPRETER
@pytest.mark.parametrize("key_blocks", [1, 2, 3, 4, 5])
def test_every_ring_phase(key_blocks: int, emulated: None) -> None:
    """1, 2, 3, stages and stages + 1 key blocks for rings of 2 and of 3, over several tiles per CTA."""
    for head_dim in (64, 128):
        case = Case(((256, 128 * key_blocks),), heads=4, heads_k=4, head_dim=head_dim)
        q, k, v, _, params, extras = inputs(case)
        out, lse = hopper.forward(q, k, v, params, extras, {})
        true_out, true_lse = reference(*(t[0].double() for t in (q, k, v)), params.softmax_scale, -1, -1)
        torch.testing.assert_close(out[0].double(), true_out, atol=0.02, rtol=0.02)
        torch.testing.assert_close(lse[0].double(), true_lse, atol=1e-3, rtol=0)


@NEEDS_INTERPRETER
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_three_warpgroups_and_shared_output_buffer(
    stages: int, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for own_o, block_m in ((False, 128), (True, 192)):
        tile = tuning.ForwardTile(block_m, 64, stages, 160, own_o, pingpong=True)
        monkeypatch.setattr(tuning, "forward_tile", lambda *_, tile=tile: tile)
        case = Case(((500, 300),), heads=3, heads_k=1, right=0)
        q, k, v, _, params, extras = inputs(case)
        out, _ = hopper.forward(q, k, v, params, extras, {})
        true_out, _ = reference(*(t[0].double() for t in (q, k, v)), params.softmax_scale, -1, 0)
        torch.testing.assert_close(out[0].double(), true_out, atol=0.02, rtol=0.02)


@NEEDS_INTERPRETER
@pytest.mark.parametrize("stages", [(1, 1), (2, 2), (3, 1), (2, 3)])
def test_backward_rings(stages: tuple[int, int], emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every depth of the rings, to the bit: the sums are formed in the same order."""
    case = Case(((500, 140),), heads=6, heads_k=2, right=0)
    q, k, v, dout, params, extras = inputs(case)
    out, lse = hopper.forward(q, k, v, params, extras, {})

    def gradients() -> list[Tensor]:
        grads = [torch.empty_like(t) for t in (q, k, v)]
        hopper.backward(dout, q, k, v, out, lse, None, *grads, params, extras, {})
        return grads

    monkeypatch.setitem(tuning.BACKWARD, 64, tuning.BackwardTile(2, 2))
    want = gradients()
    monkeypatch.setitem(tuning.BACKWARD, 64, tuning.BackwardTile(*stages))
    for a, b in zip(gradients(), want, strict=True):
        assert torch.equal(a, b)


@NEEDS_INTERPRETER
@pytest.mark.parametrize("head_dim", [192, 256])
@pytest.mark.parametrize("tile", [(2, 2, 32, 2), (1, 1, 64, 1), (2, 1, 64, 3), (3, 2, 32, 3)], ids=str)
def test_wide_backward_rings(
    tile: tuple[int, int, int, int], head_dim: int, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every depth of the rings and both sizes of dQ's pieces give the same bits."""
    case = Case(((300, 140),), heads=4, heads_k=2, right=0, head_dim=head_dim)
    q, k, v, dout, params, extras = inputs(case)
    out, lse = hopper.forward(q, k, v, params, extras, {})

    def gradients() -> list[Tensor]:
        grads = [torch.empty_like(t) for t in (q, k, v)]
        hopper.backward(dout, q, k, v, out, lse, None, *grads, params, extras, {})
        return grads

    want = gradients()
    for lookahead in (False, True) if tile[0] > 1 else (False,):
        monkeypatch.setitem(tuning.BACKWARD, head_dim, tuning.WideBackwardTile(*tile, lookahead))
        for a, b in zip(gradients(), want, strict=True):
            assert torch.equal(a, b)


@NEEDS_INTERPRETER
@pytest.mark.parametrize("wrong", ["columns", "waits"])
def test_a_piece_left_out_of_the_backward_is_seen(wrong: str, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the forward, in all three gradients; of the waits, those that leave the last piece under way."""
    q, k, v, dout, params, extras = inputs(Case(((150, 100),), head_dim=192))
    out, lse = hopper.forward(q, k, v, params, extras, {})
    want, got = ([torch.empty_like(t) for t in (q, k, v)] for _ in range(2))
    hopper.backward(dout, q, k, v, out, lse, None, *want, params, extras, {})
    if wrong == "columns":
        monkeypatch.setattr(pieces, "PIECE", type(pieces.PIECE)(0))
    else:
        wait = hopper_emulator.Products.wait
        monkeypatch.setattr(hopper_emulator.Products, "wait", lambda self, n, deps: wait(self, n + 1, deps))
    try:
        hopper.backward(dout, q, k, v, out, lse, None, *got, params, extras, {})
    except RuntimeError as error:
        assert "overwritten while a product read it" in str(error)  # noqa: PT017 - one of two ways to be seen
    else:
        assert not any(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def fixed_order_case(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """A backward in fixed order, to be repeated."""
    q, k, v, dout, params, extras = inputs(case)
    params = replace(params, deterministic=True)
    out, lse = hopper.forward(q, k, v, params, extras, {})

    def gradients() -> tuple[Tensor, ...]:
        grads = [torch.full(t.shape, 7.0, dtype=t.dtype) for t in (q, k, v)]  # varlen: rows of no sequence keep it
        hopper.backward(dout, q, k, v, out, lse, None, *grads, params, extras, {})
        return tuple(grads)

    return gradients


@NEEDS_INTERPRETER
@pytest.mark.parametrize("stages", [(2, 1), (2, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("named", [False, True])
def test_rings_of_query_pairs(
    stages: tuple[int, int], named: bool, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dK and dV to the bit as with 64 queries at a time, and a hang is reported if a ring is too short."""
    case = Case(((500, 140),), heads=6, heads_k=2, right=0)
    q, k, v, dout, params, extras = inputs(case)
    out, lse = hopper.forward(q, k, v, params, extras, {})
    grads = [[torch.empty_like(t) for t in (q, k, v)] for _ in range(2)]
    hopper.backward(dout, q, k, v, out, lse, None, *grads[0], params, extras, {})
    tile = tuning.BackwardTile(*stages, named=named, pairs=True)
    monkeypatch.setitem(tuning.BACKWARD, 64, tile)
    hopper.backward(dout, q, k, v, out, lse, None, *grads[1], params, extras, {})
    torch.testing.assert_close(grads[1][0], grads[0][0], atol=0.02, rtol=0.02)
    assert all(torch.equal(a, b) for a, b in zip(grads[1][1:], grads[0][1:], strict=True))


FIXED_ORDER = [
    Case(((330, 700),)),
    Case(((700, 700),), heads=2, heads_k=1, right=0),
    Case(((500, 300),), right=0),  # rows that see no key
    Case(((600, 600),), left=130, right=0),
    Case(((400, 700),), left=0, right=200),
    Case(((500, 500),), left=64),
    Case(((100, 300), (0, 30), (300, 300), (30, 0), (129, 264)), varlen=True, right=0),
    Case(((257, 600), (3, 500)), varlen=True, left=100, right=0),
    Case(((330, 400),), head_dim=256),
    Case(((400, 400),), right=0, head_dim=192),
    Case(((300, 300),), left=70, right=0, head_dim=256),
    Case(((100, 300), (0, 30), (129, 264)), varlen=True, right=0, head_dim=160),
]


@NEEDS_INTERPRETER
@pytest.mark.parametrize("case", FIXED_ORDER, ids=str)
def test_deterministic_sums_in_ascending_order(case: Case, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one CTA at a time nobody waits for a later one (that would hang); with several and random delays the key
    blocks still add in ascending order, which gives the same bits; and it is the right sum."""
    gradients = fixed_order_case(case)
    monkeypatch.setattr(hopper_emulator, "HANG_S", 20.0)
    want = gradients()
    order = sorted(hopper_emulator.reductions)  # CTAs ascend with key blocks
    for resident in (2, 5):
        monkeypatch.setattr(hopper_emulator, "resident", resident)
        got = gradients()
        seen = sorted(hopper_emulator.reductions, key=lambda entry: entry[0])  # stable: keeps each block's order
        assert seen == order
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    q, k, v, dout, params, extras = inputs(case)
    out, lse = hopper.forward(q, k, v, params, extras, {})
    plain = [torch.empty_like(t) for t in (q, k, v)]
    hopper.backward(dout, q, k, v, out, lse, None, *plain, params, extras, {})
    for rows, keys, _ in sequences(case, extras):
        for a, b, i in zip(want, plain, (rows, keys, keys), strict=True):
            torch.testing.assert_close(a[i], b[i], atol=0.02, rtol=0.02)


@NEEDS_INTERPRETER
@pytest.mark.parametrize(("variant", "case"), variants_of(FIXED_ORDER, "named", "pairs"))
def test_fixed_order_of_backward_variants(
    case: Case, variant: str, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_variant(variant, monkeypatch)
    test_first_key_block_stores(case, emulated, monkeypatch)
    monkeypatch.setattr(hopper_emulator, "resident", 1)
    test_deterministic_sums_in_ascending_order(case, emulated, monkeypatch)


@NEEDS_INTERPRETER
@pytest.mark.parametrize("case", FIXED_ORDER, ids=str)
def test_first_key_block_stores(case: Case, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that were never zeroed: the first key block comes before the others, and nobody looks at what none wrote."""
    q, k, v, dout, params, extras = inputs(case)
    out, lse = hopper.forward(q, k, v, params, extras, {})
    plain, stored = ([torch.empty_like(t) for t in (q, k, v)] for _ in range(2))
    for first_stores, grads in ((False, plain), (True, None)):
        for width in set(tuning.BACKWARD) - {128}:
            monkeypatch.setitem(tuning.BACKWARD, width, replace(tuning.BACKWARD[width], first_stores=first_stores))
        if grads is not None:
            hopper.backward(dout, q, k, v, out, lse, None, *grads, params, extras, {})
    monkeypatch.setattr(hopper_emulator, "HANG_S", 20.0)
    scratch = launch._scratch
    monkeypatch.setattr(launch, "_scratch", lambda *args: tuple(t.fill_(float("nan")) for t in scratch(*args)))
    for resident in (1, 5):
        monkeypatch.setattr(hopper_emulator, "resident", resident)
        hopper.backward(dout, q, k, v, out, lse, None, *stored, params, extras, {})
        for rows, keys, _ in sequences(case, extras):
            for a, b, i in zip(stored, plain, (rows, keys, keys), strict=True):
                torch.testing.assert_close(a[i], b[i], atol=0.02, rtol=0.02)


@NEEDS_INTERPRETER
def test_the_fixed_order_needs_the_turns(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting, CTAs that run at once add in another order: the test above can fail."""
    monkeypatch.setattr(hopper_emulator.Cta, "poll", lambda *_: None)
    monkeypatch.setattr(hopper_emulator, "resident", 5)
    gradients = fixed_order_case(Case(((330, 700),)))
    gradients()
    assert sorted(hopper_emulator.reductions, key=lambda entry: entry[0]) != sorted(hopper_emulator.reductions)


@NEEDS_INTERPRETER
def test_waiting_for_a_cta_that_has_not_started_is_reported(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above head dim 128 the protocol relies on the order in which CTAs start: in the opposite order it hangs, and the
    model sees it."""
    monkeypatch.setattr(hopper_emulator, "HANG_S", 0.5)
    monkeypatch.setattr(hopper_emulator, "start_order", lambda programs: reversed(range(programs)))
    with pytest.raises(TimeoutError, match="waits for turn"):
        fixed_order_case(Case(((64, 300),), heads=1, head_dim=256))()


def test_impossible_wide_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="q_stages"):
        tuning.WideBackwardTile(1, 2, 32, 2, lookahead=True)
    with pytest.raises(ValueError, match="dq_columns"):
        tuning.WideBackwardTile(2, 2, 128, 1)
    with pytest.raises(ValueError, match="in eights"):
        tuning.WideBackwardTile(2, 2, 32, 2, queries_regs=100)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q_stages": 1, "pairs": True}, "q_stages"),
        ({"kv_registers": True}, "pairs"),
        ({"named": True, "do_stages": 4}, "named"),
    ],
)
def test_impossible_backward_tiles_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tuning.BackwardTile(**({"q_stages": 2, "do_stages": 2} | change))


def test_more_queries_at_head_dim_128_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuning.BACKWARD, 128, replace(tuning.BACKWARD[128], pairs=True))
    q, k, v, dout, params, extras = inputs(Case(((100, 100),), head_dim=128))
    with pytest.raises(ValueError, match="head dims up to 64"):
        launch._plan_backward(
            dout, q, k, v, q, torch.empty(1, 2, 100), None, q, torch.empty_like(k), torch.empty_like(v), params, extras
        )


@NEEDS_INTERPRETER
def test_strided_inputs_and_packed_gradients(emulated: None) -> None:
    """q, k, v and their gradients are slices of packed tensors; the neighbours of a slice stay untouched."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 140, 3, 2, 64).to(torch.bfloat16)
    q, k, v = qkv.unbind(2)
    params, extras = AttnParams(0.125, 140, 140, True, -1, 0), AttnExtras()
    out, lse = hopper.forward(q, k, v, params, extras, {})
    dout = torch.randn(out.shape).to(torch.bfloat16)
    packed = torch.full((2, 140, 4, 2, 64), 7.0, dtype=torch.bfloat16)
    hopper.backward(dout, q, k, v, out, lse, None, *packed.unbind(2)[:3], params, extras, {})
    assert bool((packed[:, :, 3] == 7.0).all())
    plain = [torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3)]
    contiguous = [t.contiguous() for t in (q, k, v)]
    assert torch.equal(out, hopper.forward(*contiguous, params, extras, {})[0])
    hopper.backward(dout, *contiguous, out, lse, None, *plain, params, extras, {})
    for a, b in zip(packed.unbind(2)[:3], plain, strict=True):
        assert torch.equal(a, b)


@NEEDS_INTERPRETER
def test_gradients_only_where_wanted(emulated: None) -> None:
    case = Case(((130, 130),), right=0)
    q, k, v, dout, params, extras = inputs(case)
    out, lse = hopper.forward(q, k, v, params, extras, {})
    full = [torch.empty_like(t) for t in (q, k, v)]
    hopper.backward(dout, q, k, v, out, lse, None, *full, params, extras, {})
    only_q = torch.empty_like(q)
    hopper.backward(dout, q, k, v, out, lse, None, only_q, None, None, params, extras, {})
    only_kv = [torch.empty_like(t) for t in (k, v)]
    hopper.backward(dout, q, k, v, out, lse, None, None, *only_kv, params, extras, {})
    for a, b in zip(full, (only_q, *only_kv), strict=True):
        assert torch.equal(a, b)


@NEEDS_INTERPRETER
def test_a_broken_protocol_is_reported(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model must see a hang: a producer that never announces its bytes leaves the consumers waiting."""
    monkeypatch.setattr(hopper_emulator, "HANG_S", 0.5)
    monkeypatch.setattr(hopper_emulator.Barrier, "init", lambda self, count: setattr(self, "pending", 99))
    case = Case(((64, 64),))
    q, k, v, _, params, extras = inputs(case)
    with pytest.raises(TimeoutError, match="hang"):
        hopper.forward(q, k, v, params, extras, {})


@NEEDS_INTERPRETER
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wait_for_too_few_products_is_seen(variant: str, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    use_variant(variant, monkeypatch)
    q, k, v, dout, params, extras = inputs(Case(((130, 130),), right=0))
    out, lse = hopper.forward(q, k, v, params, extras, {})
    monkeypatch.setattr(hopper_emulator, "HANG_S", 5.0)  # a CTA that waits for its turn does not see another one fail
    wait = hopper_emulator.Products.wait
    monkeypatch.setattr(hopper_emulator.Products, "wait", lambda self, n, deps: wait(self, n + 1, deps))
    grads = [torch.empty_like(t) for t in (q, k, v)]
    try:
        hopper.backward(dout, q, k, v, out, lse, None, *grads, params, extras, {})
    except RuntimeError as error:
        assert "overwritten while a product read it" in str(error)  # noqa: PT017 - one of two ways to be seen
    else:
        assert all(bool(grad.isnan().any()) for grad in grads)


PROBLEM = Problem(
    direction="forward", dtype=torch.bfloat16, batch=2, seqlen_q=512, seqlen_k=512, num_heads=8, num_heads_k=2,
    head_dim=128, params=AttnParams(0.1, 512, 512, True, -1, 0), capability=(9, 0),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"varlen": True}, None),
        ({"head_dim": 256}, None),
        ({"head_dim": 256, "direction": "backward"}, None),
        ({"head_dim": 264, "direction": "backward"}, "head dim"),
        ({"head_dim": 59}, "head dim"),
        ({"capability": (8, 0)}, "9.0"),
        ({"capability": (10, 0)}, "9.0"),
        ({"capability": None}, "9.0"),
        ({"dtype": torch.float32}, "bf16"),
        ({"alibi": True}, "ALiBi"),
        ({"aligned": False}, "aligned"),
        ({"params": replace(PROBLEM.params, softcap=30.0)}, "softcap"),
        ({"params": replace(PROBLEM.params, dropout_p=0.1)}, "dropout"),
        ({"params": replace(PROBLEM.params, softmax_scale=-0.1)}, "softmax_scale"),
        ({"params": replace(PROBLEM.params, deterministic=True), "direction": "backward"}, None),
    ],
)
def test_supports(change: dict[str, Any], reason: str | None) -> None:
    answer = hopper.supports(replace(PROBLEM, **change))
    assert (answer is None) == (reason is None), answer
    assert reason is None or reason in str(answer)


def test_overlapping_kernels_are_dense_and_launched_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels wait for their predecessors (PDL) exactly where they may start early, and varlen never does."""
    monkeypatch.setattr(launch, "_num_sms", lambda _: 3)
    monkeypatch.setitem(tuning.BACKWARD, 64, replace(tuning.BACKWARD[64], pdl=True))
    for case, overlaps in ((Case(((100, 128),)), True), (Case(((100, 100),), varlen=True), False)):
        q, k, v, dout, params, extras = inputs(case)
        lse = torch.empty(q.shape[1], q.shape[0]) if case.varlen else torch.empty(q.shape[0], q.shape[2], q.shape[1])
        plan = launch._plan_backward(dout, q, k, v, q, lse, None, q, k, v, params, extras)
        assert plan.postprocess is not None
        assert [p._fixed["PDL"] for p in (plan.preprocess, plan.main, plan.postprocess)] == [overlaps] * 3
        assert [bool(p._options.get("launch_pdl")) for p in (plan.main, plan.postprocess)] == [overlaps] * 2
        assert "launch_pdl" not in plan.preprocess._options, "what ran before the backward has ended when it starts"
    q, k, v, dout, params, extras = inputs(CASES[0])
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1])
    plan = launch._plan_backward(dout, q, k, v, q, lse, None, q, k, v, params, extras)
    assert plan.postprocess is None
    assert [p._fixed["PDL"] for p in (plan.preprocess, plan.main)] == [True] * 2
    assert plan.main._options["launch_pdl"]


@pytest.mark.parametrize(
    ("left", "right", "stores", "section"),
    [(1023, 0, True, 13), (500, 523, True, 13), (4096, 0, False, 3), (1023, -1, False, 2), (-1, 0, False, 2)],
)
def test_windows_are_planned_as_short_rows(
    left: int, right: int, stores: bool, section: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a query sees few keys of many, first key blocks store dQ, and many heads are walked side by side."""
    monkeypatch.setattr(launch, "_num_sms", lambda _: 132)
    q = torch.empty(1, 16384, 16, 128, dtype=torch.bfloat16, device="meta")
    params = AttnParams(0.1, 16384, 16384, False, left, right)
    lse = torch.empty(1, 16, 16384, device="meta")
    plan = launch._plan_backward(q, q, q, q, q, lse, None, q, q, q, params, AttnExtras())
    assert plan.main._fixed["FIRST_STORES"] == stores
    assert plan.main._fixed["section"] == section


def test_unaddressable_tensors() -> None:
    base = torch.randn(4, 40, 2, 64).to(torch.bfloat16)
    assert launch.addressable(base)
    assert launch.addressable(base[:, ::2])
    assert not launch.addressable(base.flatten()[1:-63].view(-1)[: 39 * 128].view(1, 39, 2, 64)), "2 bytes off"
    assert not launch.addressable(base[:1].expand(4, -1, -1, -1)), "stride 0"
    assert not launch.addressable(torch.randn(1, 8, 2, 60).to(torch.bfloat16)), "rows of 120 bytes"
    assert launch.addressable(base[:1]), "the stride of a dimension of size 1 does not matter"


def test_unknown_triton_falls_back_with_one_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hopper, "version", lambda _: "4.0.0")
    hopper._triton_problem.cache_clear()
    try:
        answers = [hopper.supports(PROBLEM) for _ in range(3)]
    finally:
        hopper._triton_problem.cache_clear()
    assert all(answer is not None and "4.0.0" in answer for answer in answers)
    assert len(caplog.records) == 1
