"""The Hopper backward that makes dQ of its sums itself, on a CPU: its own source over a model of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.attention import hopper
from kernels.attention.hopper import launch, tuning
from tests.kernels import hopper_emulator
from tests.kernels.test_hopper import NEEDS_INTERPRETER, Case, emulated, inputs

__all__ = ["emulated"]  # a fixture

# fp16: Triton's interpreter, which runs the kernel that this is held against, cuts off bf16 where it should round.
CASES = [
    Case(((1, 1),)),
    Case(((300, 300),), right=0),
    Case(((384, 384),), batch=2, heads=4, heads_k=2),
    Case(((500, 500),), batch=2, heads=6, heads_k=3, right=0, head_dim=128),  # more CTAs than the lag
    Case(((200, 200),), batch=3, heads=3, heads_k=3, head_dim=40),  # columns that nobody has
    Case(((300, 300),), heads=2, heads_k=1, right=70, head_dim=96),
    Case(((129, 129),), batch=5, heads=1, right=0, head_dim=128),
]
CASES = [replace(case, dtype=torch.float16) for case in CASES]


def gradients_of(case: Case, packed: bool = False) -> Callable[..., list[Tensor]]:
    """A backward in fixed order of sums, with other fields of the tile, into memory that held NaN. ``packed``: dQ is
    one of three beside one another, between which nothing may be written."""
    q, k, v, dout, params, extras = inputs(case)
    params = replace(params, deterministic=True)
    out, lse = hopper.forward(q, k, v, params, extras, {})

    def gradients(**fields: bool | int) -> list[Tensor]:
        dk, dv = (torch.full(t.shape, float("nan"), dtype=t.dtype) for t in (k, v))
        triple = torch.full((*q.shape[:2], 3, *q.shape[2:]), float("nan"), dtype=q.dtype)
        dq = triple[:, :, 1] if packed else torch.full(q.shape, float("nan"), dtype=q.dtype)
        tiles = tuning.BACKWARD
        with pytest.MonkeyPatch.context() as patch:
            for width in (64, 128):
                patch.setitem(tiles, width, replace(tiles[width], **fields))
            memo: dict[str, launch.BackwardPlan] = {}
            hopper.backward(dout, q, k, v, out, lse, None, dq, dk, dv, params, extras, memo)
        assert (memo["backward"].postprocess is None) == (fields.get("rounds_keys") != 0)
        assert bool(triple[:, :, ::2].isnan().all())
        return [dq, dk, dv]

    return gradients


@NEEDS_INTERPRETER
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_as_a_kernel_of_its_own(case: Case, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many CTAs run at once and however far behind the rounding is; sums that nobody wrote hold NaN."""
    gradients = gradients_of(case)
    want = gradients(rounds_keys=0)
    assert not any(bool(t.isnan().any()) for t in want)
    scratch = launch._scratch
    monkeypatch.setattr(launch, "_scratch", lambda *args: tuple(t.fill_(float("nan")) for t in scratch(*args)))
    monkeypatch.setattr(hopper_emulator, "HANG_S", 20.0)
    for resident, lag_sms in ((1, 1), (1, 0), (5, 1), (5, 0)):
        monkeypatch.setattr(hopper_emulator, "resident", resident)
        got = gradients(lag_sms=lag_sms)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@NEEDS_INTERPRETER
@pytest.mark.parametrize("first_stores", [False, True])
def test_sums_in_any_order(first_stores: bool, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, dout, params, extras = inputs(Case(((400, 400),), batch=2, heads=4, heads_k=2, right=0))
    out, lse = hopper.forward(q, k, v, params, extras, {})
    want, got = ([torch.empty_like(t) for t in (q, k, v)] for _ in range(2))
    for rounds_keys, grads in ((0, want), (400, got)):
        tile = replace(tuning.BACKWARD[64], rounds_keys=rounds_keys, first_stores=first_stores)
        monkeypatch.setitem(tuning.BACKWARD, 64, tile)
        monkeypatch.setattr(hopper_emulator, "resident", 5 if rounds_keys else 1)
        hopper.backward(dout, q, k, v, out, lse, None, *grads, params, extras, {})
    torch.testing.assert_close(got[0], want[0], atol=0.02, rtol=0.02)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))


@NEEDS_INTERPRETER
def test_into_packed_gradients(emulated: None) -> None:
    case = Case(((200, 200),), batch=2, heads=2, heads_k=2, right=0, head_dim=128, dtype=torch.float16)
    want, got = gradients_of(case)(rounds_keys=0), gradients_of(case, packed=True)()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@NEEDS_INTERPRETER
def test_without_waiting_it_is_seen(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: heads rounded before all their key blocks have added."""
    gradients = gradients_of(Case(((384, 384),), batch=4, heads=2, heads_k=2, dtype=torch.float16))
    want = gradients()
    poll = hopper_emulator.Cta.poll

    def impatient(self: hopper_emulator.Cta, ready: Callable[[], bool], what: str) -> None:
        if "key blocks" not in what:
            poll(self, ready, what)

    monkeypatch.setattr(hopper_emulator.Cta, "poll", impatient)
    monkeypatch.setattr(hopper_emulator, "resident", 5)
    assert not torch.equal(gradients(lag_sms=0)[0], want[0])


@NEEDS_INTERPRETER
def test_a_barrier_that_nobody_uses_is_seen(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is given to others, over whom a GPU that switches between processes writes it again."""
    gradients = gradients_of(CASES[1])
    gradients()
    first = property(lambda self: self.barriers[0].cta.barriers[0] is not self)
    monkeypatch.setattr(hopper_emulator.Barriers, "used", first)
    with pytest.raises(AssertionError, match="used by nobody"):
        gradients()


def test_who_rounds() -> None:
    """Only calls all of whose queries see a key and are shared out as the keys are, into words that are aligned."""
    tile = tuning.BACKWARD[128]
    square = Case(((256, 256),), heads=4, heads_k=2, head_dim=128, right=0)

    def rounds(case: Case, dq: Tensor | None = None) -> bool:
        q, k, _, _, params, extras = inputs(case)
        call = launch.Call.of(q, k, params, extras, tuning.BACKWARD)
        return launch._rounds(call, params, tile, torch.empty_like(q) if dq is None else dq)

    assert rounds(square)
    assert rounds(replace(square, right=-1))
    assert rounds(replace(square, lengths=((4096, 4096),)))
    assert not rounds(replace(square, lengths=((4097, 4097),)))
    assert not rounds(replace(square, left=100))
    assert not rounds(replace(square, lengths=((256, 300),)))
    assert not rounds(replace(square, varlen=True))
    assert not rounds(replace(square, head_dim=111))
    assert not rounds(square, torch.empty(1, 256, 4, 129, dtype=torch.bfloat16)[..., 1:])
    q, k, _, _, params, extras = inputs(replace(square, head_dim=256))
    call = launch.Call.of(q, k, params, extras, tuning.BACKWARD)
    assert not launch._rounds(call, params, tuning.BACKWARD[256], q)
