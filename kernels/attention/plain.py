"""Which calls need nothing of PyTorch's dispatcher but to be handed on, and how such a call is recognised."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_guards: Any = torch._C._dynamo.guards
_num_function_modes, _is_profiled = torch._C._len_torch_function_stack, torch.autograd._profiler_enabled
_included_keys = torch._C._dispatch_tls_local_include_set


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether an operator called now on ``tensors``, the first of them present, would come to our kernels and nothing
    else: no mode, no autocast, no transform, no profiler that wants to hear of operators, no tensor that only looks
    like one, and a single device."""
    if is_heard():
        return False
    dispatch_keys = torch._C._dispatch_keys
    first = tensors[0]
    assert first is not None
    index, keys = first.get_device(), _plain_keys(first.is_cuda)
    if not _excluded_as_usual(keys, torch._C._dispatch_tls_local_exclude_set().raw_repr()):
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in PLAIN_TYPES or tensor.get_device() != index or dispatch_keys(tensor).raw_repr() != keys
        ):
            return False
    return True


class Alike:
    """Recognises tensors that differ from earlier ones in nothing but their addresses, where they are as plain: same
    types, shapes, strides, dtypes, device, ``requires_grad``, dispatch keys and alignment to 16 bytes.

    torch.compile guards its graphs with the same check (torch 2.11 to 2.14). It is one call of C++, for less than what
    asking one tensor for its geometry costs in Python.

    Args:
        tensors: the earlier ones, which must be plain; none of them is kept.
    """

    __slots__ = ("_aligned", "_check", "_distinct", "_number", "_repeats")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._number = len(tensors)
        self._aligned = [t.data_ptr() & 15 == 0 for t in tensors]
        places: dict[int, list[int]] = {}
        for at, tensor in enumerate(tensors):
            places.setdefault(id(tensor), []).append(at)
        self._distinct = [same[0] for same in places.values()]
        self._repeats = [(same[0], at) for same in places.values() for at in same[1:]]
        """First and other places of a tensor that stands in several, which the check would take for a difference."""
        distinct = [tensors[at] for at in self._distinct]
        guards = _guards.TensorGuards(*distinct, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        self._check = guards.check

    def __call__(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are such, in a thread where nothing `is_heard`."""
        if len(tensors) != self._number:
            return False
        if self._repeats:
            if not all(tensors[first] is tensors[at] for first, at in self._repeats):
                return False
            if not self._check(*[tensors[at] for at in self._distinct]):
                return False
        elif not self._check(*tensors):
            return False
        return [t.data_ptr() & 15 == 0 for t in tensors] == self._aligned


def is_heard() -> bool:
    """Whether a mode, a transform or a profiler hears of what is called now."""
    return bool(_num_function_modes() or _is_profiled() or _included_keys().raw_repr() != _usual_keys()[0])


@functools.cache
def _usual_keys() -> tuple[int, int]:
    """Dispatch keys that a thread includes and excludes while nothing was switched on or off in it."""
    found: list[tuple[int, int]] = []

    def look() -> None:
        include, exclude = _included_keys(), torch._C._dispatch_tls_local_exclude_set()
        found.append((include.raw_repr(), exclude.raw_repr()))

    thread = threading.Thread(target=look)  # a new one: this one may be within anything
    thread.start()
    thread.join()
    return found[0]


@functools.cache
def _excluded_as_usual(keys: int, excluded: int) -> bool:
    """Whether a thread that excludes the dispatch keys ``excluded`` leaves the same of a tensor's ``keys`` as one where
    nothing was switched on or off. Others don't matter: torch 2.11 excludes `Named` within the nodes of autograd."""
    key_set = torch._C.DispatchKeySet.from_raw_repr
    usual = _usual_keys()
    dispatched = key_set(keys) | key_set(usual[0])
    left, usually = dispatched - key_set(excluded), dispatched - key_set(usual[1])
    return bool(left == usually)


@functools.cache
def _plain_keys(cuda: bool) -> int:
    """Dispatch keys of a tensor that is nothing special, of a GPU or of the CPU. Called where `_usual_keys` hold."""
    return torch._C._dispatch_keys(torch.empty(0, device="cuda" if cuda else "cpu")).raw_repr()
