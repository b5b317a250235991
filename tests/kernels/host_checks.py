"""Checks of the host's side of a launch, on a driver that starts nothing: run by test_host.py in a process of its own.

python -m tests.kernels.host_checks [directory of another triton]
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = sys.argv[1:2]  # before anything imports triton

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import kernels  # noqa: E402
from kernels.attention import hopper, op, relaunch  # noqa: E402
from kernels.attention.dispatch import AttnExtras, AttnParams  # noqa: E402
from kernels.fake_cuda import FakeCuda, activate, install, parameter_sizes  # noqa: E402

BF16 = torch.bfloat16
OURS = re.compile(r".*[/\\](kernels[/\\]attention|triton)[/\\]")
PYTHON_CALLS = {"forward": 24, "backward": 25}
"""Most Python functions, PyTorch's aside, that a known call may run through."""
PER_ENCODING = 7
"""Functions that encode a descriptor."""


def tensors(*shape: int, count: int = 3, grad: bool = True) -> list[Tensor]:
    return [torch.zeros(shape, dtype=BF16, requires_grad=grad) for _ in range(count)]


def dense(**options: Any) -> list[Tensor]:
    given = tensors(2, 200, 4, 64)
    out = kernels.flash_attn_func(*given, **options)
    out.backward(torch.zeros_like(out))
    return [*given, out]


def one_tensor_thrice() -> list[Tensor]:
    (x,) = tensors(1, 64, 2, 128, count=1)
    kernels.flash_attn_func(x, x, x, causal=True).sum().backward()  # dO has strides of 0: copied
    return [x]


def packed() -> list[Tensor]:
    (qkv,) = tensors(1, 130, 3, 2, 64, count=1)
    kernels.flash_attn_qkvpacked_func(qkv, causal=True).sum().backward()
    return [qkv]


def varlen() -> list[Tensor]:
    given, offsets = tensors(200, 4, 64), torch.tensor([0, 70, 200], dtype=torch.int32)
    out = kernels.flash_attn_varlen_func(*given, offsets, offsets, 130, 130, causal=True)
    out.backward(torch.zeros_like(out))
    return [*given, offsets, out]


def two_pieces() -> list[Tensor]:
    """Each tensor stands in two places: two descriptors of it."""
    given = tensors(1, 130, 2, 160, grad=False)
    return [*given, *(kernels.flash_attn_func(*order, causal=True) for order in (given, given[::-1]))]


def two_pieces_backward() -> list[Tensor]:
    """As the forward's; dK and dV too have two descriptors."""
    given = tensors(1, 130, 2, 160)
    out = kernels.flash_attn_func(*given, causal=True)
    out.backward(torch.zeros_like(out))
    return [*given, out]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "dense": lambda: dense(causal=True),
    "window, deterministic": lambda: dense(window_size=(50, 0), deterministic=True),
    "one tensor": one_tensor_thrice,
    "two pieces": two_pieces,
    "two pieces, backward": two_pieces_backward,
    "packed": packed,
    "varlen": varlen,
    "portable": lambda: dense(causal=True, softcap=20.0),
}
CHAINED = ("dense", "window, deterministic", "one tensor", "two pieces, backward", "packed")
"""Cases whose backward starts all its kernels on addresses alone: dense, by the Hopper path."""


def check_that_replays_hand_over_the_same_bytes(fake: FakeCuda) -> None:
    """Every parameter of every kernel, as Triton's own launch passes it, on tensors at other addresses each time."""
    start, first_start = relaunch._Replay.start, relaunch.Launch._start
    launches: dict[relaunch._Replay, relaunch.Launch] = {}
    seen: set[bytes] = set()
    replayed: list[str] = []

    def note(self: relaunch.Launch, given: Sequence[Any]) -> None:
        first_start(self, given)
        if self._aligned is not None:
            launches[self._aligned] = self

    def both_ways(self: relaunch._Replay, stream: int, addresses: Sequence[int]) -> None:
        fake.expect(parameter_sizes(self.owner))  # of this kernel alone: another may have fewer
        first_start(launches[self], [relaunch._Start(address) for address in addresses])
        own = fake.last()
        before = fake.launches
        start(self, stream, addresses)
        assert fake.launches == before + 1
        assert fake.last() == own, f"{self.owner.name} was handed something else"
        fake.expect(())
        seen.add(own[1])
        replayed.append(self.owner.name)

    chain, chained = relaunch.Chain.start, []

    def note_chain(self: relaunch.Chain, device: int, *addresses: Sequence[int]) -> bool:
        chained.append(chain(self, device, *addresses))
        return bool(chained[-1])

    relaunch.Chain.start = note_chain  # type: ignore[method-assign]
    relaunch._Replay.start = both_ways  # type: ignore[method-assign]
    relaunch.Launch._start = note  # type: ignore[method-assign]
    try:
        kept: list[Tensor] = []
        for name, case in CASES.items():
            replayed.clear()
            seen.clear()
            chained.clear()
            for _ in range(4):
                kept += case()  # and the next one lies elsewhere
            assert len(replayed) >= 4, f"{name}: {replayed}"
            assert any(chained) == (name in CHAINED), f"{name}: {chained}"
            assert len(seen) > len(set(replayed)), f"{name}: the addresses never changed"
    finally:
        relaunch.Chain.start = chain  # type: ignore[method-assign]
        relaunch._Replay.start = start  # type: ignore[method-assign]
        relaunch.Launch._start = first_start  # type: ignore[method-assign]


def known_forward() -> tuple[relaunch.Launch, list[Tensor]]:
    """The launch of a forward, and tensors for it."""
    q, k, v = tensors(1, 128, 2, 64, grad=False)
    memo: dict[str, Any] = {}
    params = AttnParams(0.125, 128, 128, causal=True, window_right=0)
    out, lse = hopper.forward(q, k, v, params, AttnExtras(), memo)
    return memo["forward"].launch, [q, k, v, out, lse, torch.zeros(1, dtype=torch.int32)]


def check_that_a_descriptor_is_encoded_once(fake: FakeCuda) -> None:
    launch, given = known_forward()
    launch(*given)

    def encoded(*now: Tensor) -> int:
        before = fake.encodes
        launch(*now)
        return fake.encodes - before

    assert encoded(*given) == 0
    others = [*given[:2], torch.zeros_like(given[2]), *given[3:]]
    assert encoded(*others) == 1, "V alone lies elsewhere"
    assert encoded(*given) + encoded(*others) == 0
    relaunch.MAX_MAPS, limit = 4, relaunch.MAX_MAPS
    many = [torch.zeros_like(given[2]) for _ in range(9)]
    for v in many:
        assert encoded(*given[:2], v, *given[3:]) == 1
    assert launch._aligned is not None
    assert all(maps is None or len(maps) <= 4 for _, maps in launch._aligned._places)
    relaunch.MAX_MAPS = limit


def check_that_other_alignments_go_another_way(fake: FakeCuda) -> None:
    """What was compiled for pointers that are multiples of 16 must not be started on others."""
    launch, given = known_forward()
    lse = given[4]
    odd = torch.zeros(lse.numel() + 1)[1:].view(lse.shape)
    started: list[Any] = []
    start, relaunch._Replay.start = relaunch._Replay.start, lambda *args: started.append(args)  # type: ignore
    before = fake.launches
    launch(*given)
    assert len(started) == 1
    launch(*given[:4], odd, given[5])
    assert len(started) == 1
    assert fake.launches == before + 1
    relaunch._Replay.start = start  # type: ignore[method-assign]


def check_that_hooks_are_heard(fake: FakeCuda) -> None:
    from triton import knobs

    launch, given = known_forward()
    heard: list[Any] = []
    knobs.runtime.launch_enter_hook.add(heard.append)
    before = fake.launches
    launch(*given)
    assert len(heard) == 1
    assert fake.launches == before + 1
    knobs.runtime.launch_enter_hook.remove(heard.append)
    launch(*given)
    assert len(heard) == 1


def check_that_an_unknown_triton_launches_its_own_way(fake: FakeCuda) -> None:
    relaunch._triton_is_known.cache_clear()
    versions, relaunch.REPLAYED_TRITON = relaunch.REPLAYED_TRITON, ()
    launch, given = known_forward()
    before = fake.launches
    launch(*given)
    assert launch._aligned is None
    assert fake.launches == before + 1
    relaunch.REPLAYED_TRITON = versions
    relaunch._triton_is_known.cache_clear()


def check_that_little_python_runs(fake: FakeCuda) -> None:
    """Wall time depends on the machine; how much Python a call runs through doesn't."""
    given = tensors(1, 128, 4, 128)
    dout = torch.zeros(1, 128, 4, 128, dtype=BF16)
    ran: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and OURS.match(frame.f_code.co_filename):
            ran.append(frame.f_code.co_qualname)

    for direction, limit in PYTHON_CALLS.items():
        counts = []
        for _ in range(5):
            out = kernels.flash_attn_func(*given, causal=True)
            ran.clear()
            before = fake.encodes
            sys.setprofile(note)
            if direction == "forward":
                out = kernels.flash_attn_func(*given, causal=True)
            else:
                out.backward(dout)
            sys.setprofile(None)
            counts.append(len(ran) - PER_ENCODING * (fake.encodes - before))  # malloc chooses addresses as it likes
        print(f"{direction}: {min(counts)} Python functions")
        assert min(counts) <= limit, f"{direction}: {counts} calls, {ran}"
    assert op.known_calls


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        fake = install(Path(directory))
        activate()
        import triton

        for check in (
            check_that_replays_hand_over_the_same_bytes,
            check_that_a_descriptor_is_encoded_once,
            check_that_other_alignments_go_another_way,
            check_that_hooks_are_heard,
            check_that_an_unknown_triton_launches_its_own_way,
            check_that_little_python_runs,
        ):
            check(fake)
            print(f"{check.__name__}: ok (triton {triton.__version__})", flush=True)


if __name__ == "__main__":
    main()
