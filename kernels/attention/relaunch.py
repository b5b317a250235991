"""Starting one kernel again and again on other tensors of the same shapes, dtypes and device.

Triton's own launch inspects every argument to find the compiled kernel, and checks a descriptor's fields, in Python:
more host time than everything else in a call. A :class:`Launch` lets it do so once. After that it only exchanges the
tensors and starts the compiled kernel, by the interface that Triton documents for kernels compiled ahead
(``compiled[grid](*arguments)``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

MAX_GRID = 2**31 - 1
"""Programs of one launch (grid.x); the other grid axes stop at 65,535 and are not used."""


class Launch:
    """One launch whose scalars are fixed and whose tensors change.

    Args:
        kernel: a ``triton.jit`` or ``gluon.jit`` function.
        num_programs: the grid, (num_programs,).
        arguments: name -> value of every parameter of the kernel. A tensor, or a descriptor of one, marks a place where
            later calls put theirs; nothing here keeps the tensor itself.
        options: ``num_warps`` and the like.

    Raises:
        ValueError: more programs than one launch holds.
    """

    __slots__ = ("_compiled", "_fixed", "_grid", "_kernel", "_options", "_places")

    def __init__(self, kernel: Any, num_programs: int, arguments: Mapping[str, Any], **options: Any) -> None:
        if num_programs > MAX_GRID:
            raise ValueError(
                f"attention needs {num_programs:,} programs, one launch holds {MAX_GRID:,}: split the batch"
            )
        self._kernel = kernel
        self._grid = (num_programs, 1, 1)
        self._options = options
        self._fixed = {name: value for name, value in arguments.items() if not _has_tensor(value)}
        self._places = {name: _template(value) for name, value in arguments.items() if _has_tensor(value)}
        self._compiled: dict[int, tuple[Any, list[Any], list[int]]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Start the kernel on the device of ``tensors``: one for each place, in the order of ``arguments``. None is
        passed over, so that an optional tensor may stand where there was none."""
        if self._grid[0] == 0:
            return
        given = [t for t in tensors if t is not None]
        device = given[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current device: make it the tensors'
                self._start(given)
        else:
            self._start(given)

    def _start(self, tensors: Sequence[Tensor]) -> None:
        variant = 0  # Triton compiles for pointers that are multiples of 16 and for others
        values = []
        for tensor, template in zip(tensors, self._places.values(), strict=True):
            variant = variant * 2 + (tensor.data_ptr() % 16 == 0)
            values.append(tensor if template is None else _describe(tensor, template))
        ready = self._compiled.get(variant)
        if ready is None:
            arguments = {**self._fixed, **dict(zip(self._places, values, strict=True))}
            compiled = self._kernel[self._grid](**arguments, **self._options)
            if compiled is not None:  # the interpreter compiles nothing
                self._remember(variant, compiled)
            return
        run, arguments_in_order, places = ready
        arguments_in_order = arguments_in_order.copy()
        for place, value in zip(places, values, strict=True):
            arguments_in_order[place] = value
        active = driver.active
        run(*arguments_in_order, stream=active.get_current_stream(active.get_current_device()))

    def _remember(self, variant: int, compiled: Any) -> None:
        names = self._kernel.arg_names
        in_order = [self._fixed.get(name) for name in names]
        self._compiled[variant] = (compiled[self._grid], in_order, [names.index(name) for name in self._places])


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or isinstance(getattr(value, "base", None), Tensor)


def _template(value: Any) -> tuple[type, dict[str, Any]] | None:
    """Class and fields of a descriptor, its tensor left out; None for a tensor."""
    if isinstance(value, Tensor):
        return None
    return type(value), {name: x for name, x in vars(value).items() if name != "base"}


def _describe(tensor: Tensor, template: tuple[type, dict[str, Any]]) -> Any:
    """A descriptor like the one ``template`` was made from, of another tensor; its fields were checked then."""
    kind, fields = template
    descriptor: Any = object.__new__(kind)
    vars(descriptor).update(fields, base=tensor)
    return descriptor
