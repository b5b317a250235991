"""Starting one kernel again and again on other tensors of the same shapes, dtypes and device.

Triton's own launch inspects every argument to find the compiled kernel, builds metadata for hooks that nobody set, and
encodes every descriptor anew: more host time than everything else in a call. A :class:`Launch` lets it do so once,
looks on at what it hands to its C launcher, and from then on hands over the same arguments itself, with the addresses
of the tensors at hand exchanged. A descriptor in the hardware's form depends on the tensor's address and on what a
launch holds fixed (shape, strides, dtype, box, swizzle), so it is kept by address; training uses the same addresses in
every step.

What is handed to the C launcher is no interface that Triton documents. Under another Triton than those checked, another
backend, or a launch that looks different, the kernel is started by the interface that is documented for kernels
compiled ahead (``compiled[grid](*arguments)``); so it is while a launch hook is set.
"""

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

MAX_GRID = 2**31 - 1
"""Programs of one launch (grid.x); the other grid axes stop at 65,535 and are not used."""
MAX_MAPS = 1024
"""Encoded descriptors kept for one argument of one kernel, some 300 bytes each."""
REPLAYED_TRITON = ("3.6", "3.7", "3.8", "3.9")
"""Versions whose C launcher may be called directly."""


class Launch:
    """One launch whose scalars are fixed and whose tensors change.

    Args:
        kernel: a ``triton.jit`` or ``gluon.jit`` function.
        num_programs: the grid, (num_programs,).
        arguments: name -> value of every parameter of the kernel. A tensor, or a descriptor of one, marks a place where
            later calls put theirs, which must have its shape, strides and dtype; nothing here keeps the tensor itself.
        options: ``num_warps`` and the like.

    Raises:
        ValueError: more programs than one launch holds.
    """

    __slots__ = ("_aligned", "_fixed", "_grid", "_kernel", "_options", "_places", "_variants")

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
        self._variants: dict[tuple[bool, ...], Any] = {}
        self._aligned: _Replay | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Start the kernel on the current device, which must be that of ``tensors``: one for each place, in the order
        of ``arguments``. None is passed over, so that an optional tensor may stand where there was none."""
        replay = self._aligned
        if replay is not None and not _is_hooked():
            addresses, low_bits, some = [], 0, None
            for tensor in tensors:
                if tensor is not None:
                    some, address = tensor, tensor.data_ptr()
                    addresses.append(address)
                    low_bits |= address
            if some is not None and low_bits & 15 == 0:
                replay.start(replay.stream(some.get_device()), addresses)
                return
        self._start([t for t in tensors if t is not None])

    def _start(self, tensors: Sequence[Tensor]) -> None:
        """The first start, and any that can't be replayed on 16-byte aligned pointers."""
        if self._grid[0] == 0:
            return
        variant = tuple(t.data_ptr() % 16 == 0 for t in tensors)  # Triton compiles for either
        compiled = self._variants.get(variant)
        values = [
            tensor if template is None else _describe(tensor, template)
            for tensor, template in zip(tensors, self._places.values(), strict=True)
        ]
        if compiled is None:
            arguments = {**self._fixed, **dict(zip(self._places, values, strict=True))}
            compiled = self._kernel[self._grid](**arguments, **self._options)
            if compiled is not None:  # the interpreter compiles nothing
                self._variants[variant] = compiled
                if all(variant):
                    self._aligned = _replay_of(compiled, self._grid, self._in_order(values), self._at())
            return
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        compiled[self._grid](*self._in_order(values), stream=stream)

    def _in_order(self, values: Sequence[Any]) -> list[Any]:
        arguments = {**self._fixed, **dict(zip(self._places, values, strict=True))}
        return [arguments.get(name) for name in self._kernel.arg_names]

    def _at(self) -> dict[int, Any]:
        """Position in the kernel's signature -> template, of each place."""
        return {self._kernel.arg_names.index(name): template for name, template in self._places.items()}


class _Replay:
    """What Triton handed to its C launcher once, to be handed over again on other addresses.

    Args:
        raw: the C launcher.
        head: its arguments before the stream.
        tail: those between the stream and the kernel's.
        values: the kernel's own.
        places: index in ``values`` of each place and, for a descriptor, what encodes one.
        nested: whether the launcher takes the kernel's arguments as one sequence.
    """

    __slots__ = ("_head", "_nested", "_places", "_raw", "_tail", "_values", "owner", "stream")

    def __init__(
        self,
        raw: Callable[..., Any],
        head: tuple[Any, ...],
        tail: tuple[Any, ...],
        values: list[Any],
        places: list[tuple[int, "_Maps | None"]],
        nested: bool,
        owner: CompiledKernel,
    ) -> None:
        self._raw, self._head, self._tail, self._values, self._places = raw, head, tail, values, places
        self._nested = nested
        self.stream: Callable[[int], int] = driver.active.get_current_stream
        """Index of a device -> its current stream."""
        self.owner = owner
        """Unloads the code when it goes."""

    def start(self, stream: int, addresses: Sequence[int]) -> None:
        """Start the kernel on tensors at ``addresses``, multiples of 16."""
        values = self._values.copy()
        for (at, maps), address in zip(self._places, addresses, strict=True):
            values[at] = address if maps is None else maps.get(address) or maps.encode(address)
        if self._nested:
            self._raw(*self._head, stream, *self._tail, values)
        else:
            self._raw(*self._head, stream, *self._tail, *values)


class Chain:
    """Launches that follow one another. Once each has been started, all of them start on addresses alone: hooks and
    stream are asked for once, and memory that only they use needs no tensors."""

    __slots__ = ("_launches", "_replays")

    def __init__(self, *launches: Launch) -> None:
        self._launches = launches
        self._replays: list[_Replay] = []

    def start(self, device: int, *addresses: Sequence[int]) -> bool:
        """Start each launch on its ``addresses``, one for each place and multiples of 16, on the current stream of the
        current device, whose index is ``device`` (-1: CPU). False, and nothing started, if they must be called."""
        if _is_hooked():
            return False
        replays = self._replays
        if not replays:
            replays = [launch._aligned for launch in self._launches if launch._aligned is not None]
            if len(replays) < len(self._launches):
                return False
            self._replays = replays
        stream = replays[0].stream(device)
        for replay, places in zip(replays, addresses, strict=True):
            replay.start(stream, places)
        return True


class _Maps(dict[int, Any]):
    """Address -> encoded descriptor, for one argument of one compiled kernel."""

    __slots__ = ("_encode", "_template")

    def __init__(self, template: tuple[type, dict[str, Any]], encode: Callable[[Any], Any]) -> None:
        super().__init__()
        self._template, self._encode = template, encode

    def encode(self, address: int) -> Any:
        """Encode and keep the descriptor of a tensor that starts at ``address``."""
        if len(self) >= MAX_MAPS:
            self.clear()
        self[address] = encoded = self._encode(_describe(_Start(address), self._template))
        return encoded


class _Start:
    """Where a tensor starts, all of it that its descriptor needs to know."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _replay_of(compiled: Any, grid: tuple[int, ...], arguments: list[Any], places: dict[int, Any]) -> _Replay | None:
    """How to start ``compiled`` directly, found by looking on while Triton prepares a start on ``arguments``; None if
    it doesn't look as expected. ``places``: index in ``arguments`` -> None for a tensor, or a descriptor's template."""
    if not (isinstance(compiled, CompiledKernel) and _triton_is_known()):
        return None
    launcher = compiled.run
    backend = sys.modules[type(launcher).__module__]
    if backend.__name__ != "triton.backends.nvidia.driver" or _needs_more(launcher):
        return None
    metas = compiled.metadata.tensordesc_meta or ()
    descriptors = [at for at in sorted(places) if places[at] is not None]
    if len(metas) != len(descriptors):
        return None  # the descriptors were taken apart
    stand_ins = {at: object() for at in places if places[at] is None}  # one tensor may stand in two places
    seen: list[tuple[Any, ...]] = []
    probe = copy.copy(launcher)
    probe.launch = backend.wrap_handle_tensordesc(lambda *args: seen.append(args), dict(compiled.src.signature), metas)
    told = [stand_ins.get(at, value) for at, value in enumerate(arguments)]
    probe(*grid, 0, compiled.function, compiled.packed_metadata, None, None, None, *told)
    (handed,) = seen
    raw = inspect.getclosurevars(launcher.launch).nonlocals["launcher"] if descriptors else launcher.launch
    nested = not hasattr(backend, "_BASE_ARGS_FORMAT_LEN")  # up to 3.6 the kernel's arguments follow one by one
    first = -1 if nested else backend._BASE_ARGS_FORMAT_LEN
    values = list(handed[-1] if nested else handed[first:])
    maps = [at for at, value in enumerate(values) if type(value).__name__ == "PyCUtensorMap"]
    if len(maps) != len(descriptors):
        return None
    found: dict[int, tuple[int, _Maps | None]] = {}
    for at, index, meta in zip(descriptors, maps, metas, strict=True):
        known = _Maps(places[at], functools.partial(_encode, backend.make_tensordesc_arg, meta))
        known[arguments[at].base.data_ptr()] = values[index]
        found[at] = index, known
    for at, stand_in in stand_ins.items():
        found[at] = next(i for i, value in enumerate(values) if value is stand_in), None
    for index, _ in found.values():
        values[index] = None  # no address of the first tensors is kept
    return _Replay(raw, handed[:3], handed[4:first], values, [found[at] for at in places], nested, compiled)


def _encode(make: Callable[..., Sequence[Any]], meta: Any, descriptor: Any) -> Any:
    """The hardware's form of ``descriptor`` alone, made by Triton's ``make_tensordesc_arg``."""
    others = (None,) * (make.__code__.co_argcount - 2)  # 3.8 added one that other backends use
    return make(descriptor, meta, *others)[0]


@functools.cache
def _triton_is_known() -> bool:
    try:
        return version("triton").split("+")[0].rsplit(".", 1)[0] in REPLAYED_TRITON
    except PackageNotFoundError:
        return False


def _needs_more(launcher: Any) -> bool:
    """Whether ``launcher`` does more at each start than hand over arguments: scratch memory, instrumentation."""
    scratch = launcher.global_scratch_size or launcher.profile_scratch_size
    return bool(scratch) or vars(launcher).get("gsan_enabled", False)


def _is_hooked() -> bool:
    """Whether a launch hook does anything: a chain of none, the usual state, doesn't."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    try:
        return bool(before.calls or after.calls)
    except AttributeError:  # a function or None in place of a chain
        return before is not None or after is not None


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or isinstance(getattr(value, "base", None), Tensor)


def _template(value: Any) -> tuple[type, dict[str, Any]] | None:
    """Class and fields of a descriptor, its tensor left out; None for a tensor."""
    if isinstance(value, Tensor):
        return None
    return type(value), {name: x for name, x in vars(value).items() if name != "base"}


def _describe(tensor: Tensor | _Start, template: tuple[type, dict[str, Any]]) -> Any:
    """A descriptor like the one ``template`` was made from, of another tensor; its fields were checked then."""
    kind, fields = template
    descriptor: Any = object.__new__(kind)
    vars(descriptor).update(fields, base=tensor)
    return descriptor
