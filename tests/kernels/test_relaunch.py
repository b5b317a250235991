"""Launches whose tensors change: on a kernel that only notes what it is given."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import op
from kernels.attention.relaunch import MAX_GRID, Launch


class Descriptor:
    """Fields like those of Triton's, checked once."""

    checked = 0

    def __init__(self, base: Tensor, rows: int) -> None:
        type(self).checked += 1
        self.base, self.rows = base, rows


class Kernel:
    """Notes what is compiled and what is started."""

    arg_names = ("x", "n", "desc", "maybe", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []
        self.started: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def first(**arguments: Any) -> Any:
            self.compiled.append(arguments)
            return {grid: lambda *arguments, stream: self.started.append(arguments)}

        return first


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    class Active:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 7)

    monkeypatch.setattr("kernels.attention.relaunch.driver", type("Driver", (), {"active": Active}))
    return Kernel()


def launch_of(kernel: Kernel, maybe: Tensor | None = None) -> Launch:
    x = torch.zeros(4)
    return Launch(kernel, 3, {"x": x, "desc": Descriptor(x, 64), "n": 5, "maybe": maybe, "BLOCK": 16}, num_warps=4)


def test_second_start_only_exchanges_the_tensors(kernel: Kernel) -> None:
    launch = launch_of(kernel)
    checked = Descriptor.checked
    tensors = [torch.zeros(4) for _ in range(4)]
    launch(tensors[0], tensors[1])
    launch(tensors[2], tensors[3])
    assert len(kernel.compiled) == 1
    assert kernel.compiled[0]["num_warps"] == 4
    assert kernel.compiled[0]["x"] is tensors[0]
    (started,) = kernel.started
    assert started[0] is tensors[2]
    assert started[1] == 5
    assert started[2].base is tensors[3]
    assert started[2].rows == 64
    assert started[3:] == (None, 16)
    assert Descriptor.checked == checked, "a descriptor of known geometry was checked again"


def test_pointers_of_another_alignment_are_compiled_for(kernel: Kernel) -> None:
    launch = launch_of(kernel)
    aligned, odd = torch.zeros(8), torch.zeros(8)[1:]
    for x in (aligned, odd, aligned, odd):
        launch(x, aligned)
    assert [a["x"].data_ptr() % 16 for a in kernel.compiled] == [0, 4]
    assert len(kernel.started) == 2


def test_an_absent_tensor_is_passed_over(kernel: Kernel) -> None:
    x = torch.zeros(4)
    without, given = launch_of(kernel), launch_of(kernel, maybe=torch.zeros(1))
    for _ in range(2):
        without(x, x, None)
        given(x, x, x)
    assert [a[3] for a in kernel.started] == [None, x]


def test_tensors_are_not_kept(kernel: Kernel) -> None:
    x = torch.zeros(4)
    launch = Launch(kernel, 1, {"x": x, "n": 1, "desc": Descriptor(x, 1), "maybe": None, "BLOCK": 1})
    launch(x, x)
    kernel.compiled.clear()
    dead = weakref.ref(x)
    del x
    gc.collect()
    assert dead() is None


def test_sizes_of_the_grid(kernel: Kernel) -> None:
    Launch(kernel, 0, {"x": torch.zeros(1)})(torch.zeros(1))
    assert not kernel.compiled
    with pytest.raises(ValueError, match="split the batch"):
        Launch(kernel, MAX_GRID + 1, {})


def test_calls_are_known_by_all_that_their_launch_depends_on() -> None:
    """A change of shape, strides, dtype, alignment, scalars or an optional tensor is another call."""
    base = torch.zeros(2, 9, 2, 8)
    others = [
        base[:, :8],
        base.transpose(1, 2).contiguous().transpose(1, 2),
        base.double(),
        torch.zeros(2 * 9 * 2 * 8 + 1)[1:].view_as(base),
    ]
    keys = {op.key_of((t, None), (1, False)) for t in (base, *others)}
    keys |= {op.key_of((base, None), (2, False)), op.key_of((base, base), (1, False))}
    assert len(keys) == len(others) + 3
    assert op.key_of((base.clone(), None), (1, False)) in keys
