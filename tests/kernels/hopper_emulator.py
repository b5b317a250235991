"""Runs the Hopper path's Gluon kernels on a CPU: their own Python source, over a model of the machine.

Triton's interpreter does not know Gluon. Here a kernel's functions run as ordinary Python over torch tensors:
every partition of a CTA is a thread, shared memory is a tensor, mbarriers have phases, arrivals and
outstanding bytes, named barriers count threads, CTAs start in order and as many run at a time as
`resident` says, and the copy engine computes addresses modulo 2^64 and cuts
at each dimension's bound. So what the tests see is the real tile ranges, masks, barrier protocol and
descriptors; a protocol that hangs on hardware hangs here, and is reported. An asynchronous product is NaN until a
wait covers it, and its shared operands must not have changed by then. Not modelled: layouts, the two warpgroups of
one partition, and races between partitions that a barrier should have ordered but that Python threads do not hit.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.attention.hopper import gluon_backward, gluon_backward_wide, gluon_forward, pieces, rings, sums, tiles

HANG_S = 60.0
WARP_THREADS = 32
resident = 1
"""CTAs in flight at a time: they start in the order of their ids, the next when one ends. With several, the copy
engine's reductions are delayed at random."""
start_order: Callable[[int], Iterable[int]] = range
"""Number of CTAs -> their ids in the order in which they start."""


class Int(int):
    """A device integer: ``//`` and ``%`` truncate towards zero, as on the GPU and unlike in Python."""

    def to(self, _: Any) -> Int:
        return self

    def __floordiv__(self, other: int) -> Int:
        quotient = abs(int(self)) // abs(int(other))
        return Int(quotient if (self >= 0) == (other >= 0) else -quotient)

    def __mod__(self, other: int) -> Int:
        return Int(int(self) - int(self // other) * int(other))


def _closed_under(name: str) -> Callable[..., Any]:
    method = getattr(int, name)

    def operation(self: Int, *args: Any) -> Any:
        result = method(self, *args)
        return Int(result) if isinstance(result, int) else result

    return operation


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "and", "xor", "neg"):
    setattr(Int, f"__{_name}__", _closed_under(f"__{_name}__"))


class Value(Tensor):
    """A register tensor: torch's, with the few members that Gluon spells differently. Layouts do not exist."""

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:  # type: ignore[override]
        return self.view(dtype) if bitcast else super().to(dtype)


def value(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Value)


class Barrier:
    """An mbarrier: a phase completes when nothing is left to arrive, threads or bytes."""

    def __init__(self, cta: Cta) -> None:
        self.cta, self.phase, self.count, self.pending, self.bytes = cta, 0, 0, 0, 0
        self.used = False

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def change(self, arrivals: int, extra_bytes: int) -> None:
        self.used = True
        with self.cta.changed:
            self.pending -= arrivals
            self.bytes += extra_bytes
            if self.pending < 0:
                raise RuntimeError("more arrivals at an mbarrier than its count: two phases overlap")
            if self.pending == 0 and self.bytes == 0:
                self.phase ^= 1
                self.pending = self.count
            self.cta.changed.notify_all()

    def wait(self, phase: int) -> None:
        self.used = True
        self.cta.wait_for(lambda: self.phase != int(phase), "an mbarrier")


class Shared:
    """Shared memory: a view of a tensor."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def index(self, i: int) -> Shared:
        return Shared(self.data[int(i)])

    def reshape(self, shape: tuple[int, ...]) -> Shared:
        return Shared(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.data.narrow(dim, int(start), int(length)))

    def load(self, _: Any) -> Tensor:
        return value(self.data.clone())

    def store(self, x: Tensor) -> None:
        assert x.dtype == self.data.dtype, (x.dtype, self.data.dtype)
        self.data.copy_(x)


class Barriers:
    """A shared array of mbarriers."""

    def __init__(self, cta: Cta, count: int) -> None:
        self.barriers = [Barrier(cta) for _ in range(count)]
        cta.barriers.append(self)

    @property
    def used(self) -> bool:
        return any(barrier.used for barrier in self.barriers)

    def index(self, i: int) -> Barrier:
        return self.barriers[int(i)]


def _memory_behind(tensor: Tensor) -> Tensor:
    """All memory from where ``tensor`` starts, in its elements."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage[tensor.storage_offset() :]


class Pointer:
    """A pointer into a tensor's elements."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + other)

    def to(self, dtype: torch.dtype, bitcast: bool) -> Pointer:
        """A pointer to words of 32 bits at the same place."""
        assert bitcast
        assert self.tensor.element_size() == 2
        assert int(self.offset) % 2 == 0, "a word that is not aligned"
        flat = self.flat()
        return Pointer(flat[: len(flat) // 2 * 2].view(dtype), self.offset // 2)

    def flat(self) -> Tensor:
        return _memory_behind(self.tensor)


class Descriptor:
    """What the copy engine makes of a ``TensorDescriptor``."""

    def __init__(self, host: Any) -> None:
        self.host, self.dtype, self.layout = host, host.base.dtype, host.layout
        block_bytes = int(np.prod(host.block_shape)) * host.base.element_size()
        self.block_type = SimpleNamespace(nbytes=block_bytes, shape=list(host.block_shape))

    def place(self, coords: list[int]) -> tuple[Tensor, Tensor]:
        """(element offsets from the base, whether in bounds) for each element of the block at ``coords``."""
        host, size = self.host, self.host.base.element_size()
        inside, address = np.ones((), bool), np.zeros((), np.uint64)
        for axis, (c, n, stride, length) in enumerate(
            zip(coords, host.block_shape, host.strides, host.shape, strict=True)
        ):
            assert -(2**31) <= int(c) < 2**31, f"coordinate {c} does not fit in 32 bits"
            assert stride * size < 2**40 or stride == 1, "stride too long for the copy engine"
            index = np.arange(int(c), int(c) + n, dtype=np.int64)
            index = index.reshape([-1 if a == axis else 1 for a in range(len(coords))])
            inside = inside & (index >= 0) & (index < length)
            address = address + index.astype(np.uint64) * np.uint64(stride * size)  # wraps modulo 2^64
        offset = address.view(np.int64) // size
        return torch.from_numpy(np.where(inside, offset, 0)), torch.from_numpy(inside.copy())

    def elements(self) -> Tensor:
        """The memory behind the base address, in elements."""
        return _memory_behind(self.host.base)


class Cta:
    """One thread block: its partitions, barriers and the ``gl`` namespace they see."""

    def __init__(self, program: int, programs: int, num_warps: int) -> None:
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.named: dict[int, list[int]] = defaultdict(lambda: [0, 0])  # id -> [threads arrived, generation]
        self.local = threading.local()
        self.barriers: list[Barriers] = []
        self.program, self.programs, self.num_warps = program, programs, num_warps

    def wait_for(self, ready: Callable[[], bool], what: str) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: ready() or self.failure is not None, HANG_S):
                raise TimeoutError(f"hang: {self.local.name} waits for {what}")
        if self.failure is not None:
            raise RuntimeError("another partition failed")

    def poll(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for something that another CTA changes."""
        deadline = time.monotonic() + HANG_S
        while not ready():
            if self.failure is not None:
                raise RuntimeError("another partition failed")
            if time.monotonic() > deadline:
                raise TimeoutError(f"hang: {self.local.name} of CTA {self.program} waits for {what}")
            time.sleep(1e-4)

    def named_barrier(self, number: int, threads: int, wait: bool) -> None:
        with self.changed:
            state = self.named[number]
            generation = state[1]
            state[0] += self.local.warps * WARP_THREADS
            if state[0] > threads:
                raise RuntimeError(f"named barrier {number}: more than {threads} threads arrived")
            if state[0] == threads:
                state[0], state[1] = 0, generation + 1
                self.changed.notify_all()
        if wait:
            self.wait_for(lambda: state[1] != generation, f"named barrier {number}")

    def specialize(self, partitions: list[Any], worker_warps: list[int], _: Any) -> None:
        """Run the partitions in threads; the first failure, or a hang, is raised here."""

        def run(function: Any, args: tuple[Any, ...], warps: int, name: str) -> None:
            self.local.warps, self.local.name = warps, name
            try:
                function(*args)
            except BaseException as error:  # noqa: BLE001 - handed to the test's thread
                with self.changed:
                    self.failure = self.failure or error
                    self.changed.notify_all()

        warps = [self.num_warps, *worker_warps]
        threads = [
            threading.Thread(target=run, args=(f, args, n, f"partition {i} ({f.__name__})"), daemon=True)
            for i, ((f, args), n) in enumerate(zip(partitions, warps, strict=True))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure


def _scalar_or_tensor(scalar: Callable[..., Any], tensor: Callable[..., Tensor]) -> Callable[[Any, Any], Any]:
    def apply(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return tensor(*(x if isinstance(x, Tensor) else torch.tensor(int(x)) for x in (a, b)))
        return Int(scalar(a, b))

    return apply


def _load(pointer: Pointer) -> Int:
    return Int(pointer.flat()[int(pointer.offset)])


def _store(pointer: Pointer, x: Any, mask: Tensor | None = None) -> None:
    if not isinstance(pointer.offset, Tensor):
        pointer.flat()[int(pointer.offset)] = x
        return
    keep = torch.ones_like(pointer.offset, dtype=torch.bool) if mask is None else mask
    pointer.flat()[pointer.offset[keep].as_subclass(Tensor)] = x[keep].as_subclass(Tensor)


def _atomic_add(pointer: Pointer, x: int, sem: str = "acq_rel") -> Int:
    with _memory:
        old = _load(pointer)
        _store(pointer, int(old) + x)
    return old


class Products:
    """The tensor cores as one partition sees them: products complete in order, and when they are waited for."""

    def __init__(self) -> None:
        self.queue: list[tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]] = []

    def mma(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Tensor:
        left = a.data if isinstance(a, Shared) else a
        product = left.as_subclass(Tensor).float() @ b.data.float()
        assert product.shape == acc.shape
        if use_acc:
            product = getattr(acc, "unwaited", acc).as_subclass(Tensor) + product
        if not is_async:
            return value(product)
        result: Any = value(torch.full_like(product, float("nan")))
        result.unwaited = product  # what another product may add to at once
        reads = [(x.data, x.data.clone()) for x in (a, b) if isinstance(x, Shared)]
        self.queue.append((result, product, reads))
        return result

    def wait(self, in_flight: int, deps: tuple[Any, ...]) -> Any:
        while len(self.queue) > in_flight:
            result, product, reads = self.queue.pop(0)
            for data, before in reads:
                if not torch.equal(data.contiguous().view(torch.int16), before.contiguous().view(torch.int16)):
                    raise RuntimeError("an operand was overwritten while a product read it")
            result.copy_(product)
        return deps[0] if len(deps) == 1 else deps


def _pack_pairs(even: Tensor, odd: Tensor, dtype: torch.dtype) -> Tensor:
    low, high = (x.as_subclass(Tensor).to(dtype).view(torch.int16).to(torch.int32) for x in (even, odd))
    return value((high << 16) | (low & 0xFFFF))


_memory = threading.Lock()
reductions: list[tuple[int, int]] = []
"""(first coordinate, tile) of every addition to dQ sums, or store, of the last launch, in the order in which memory saw
them."""


def _namespace(cta: Cta) -> dict[str, Any]:
    """What the kernels' modules import, over the model."""

    def allocate(dtype: torch.dtype, shape: list[int], _: Any) -> Any:
        if dtype == torch.int64:
            return Barriers(cta, shape[0])
        fill = float("nan") if dtype.is_floating_point else 0  # uninitialised shared memory must not matter
        return Shared(torch.full([int(n) for n in shape], fill, dtype=dtype))

    def tma_load(desc: Descriptor, coords: list[int], barrier: Barrier, tile: Shared) -> None:
        offset, inside = desc.place(coords)
        data = torch.where(inside, desc.elements()[offset], torch.zeros((), dtype=desc.dtype))
        assert list(tile.data.shape) == desc.block_type.shape, (tile.data.shape, desc.block_type.shape)
        tile.data.copy_(data)
        barrier.change(0, -desc.block_type.nbytes)

    def tma_store(desc: Descriptor, coords: list[int], tile: Shared) -> None:
        offset, inside = desc.place(coords)
        if len(coords) == 2:  # dQ sums
            delay()
            reductions.append((int(coords[0]), int(cta.local.tile)))
        desc.elements()[offset[inside]] = tile.data[inside]

    def tma_reduce_add(desc: Descriptor, coords: list[int], tile: Shared) -> None:
        offset, inside = desc.place(coords)
        delay()
        with _memory:
            desc.elements()[offset[inside]] += tile.data[inside]
            reductions.append((int(coords[0]), int(cta.local.tile)))

    def delay() -> None:
        if resident > 1:
            time.sleep(random.random() * 5e-3)

    def pass_turn(turn: Pointer) -> None:
        with _memory:
            _store(turn, int(_load(turn)) + 1)

    def products() -> Products:
        if not hasattr(cta.local, "products"):
            cta.local.products = Products()
        return cta.local.products

    gl = SimpleNamespace(
        bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32,
        int16=torch.int16, int32=torch.int32, int64=torch.int64, constexpr=None,
        program_id=lambda _: Int(cta.program), num_programs=lambda _: Int(cta.programs),
        load=_load, store=_store, atomic_add=_atomic_add, static_range=range, static_assert=lambda _: None,
        cdiv=lambda a, b: Int(a + b - 1) // b,
        minimum=_scalar_or_tensor(min, torch.minimum), maximum=_scalar_or_tensor(max, torch.maximum),
        arange=lambda a, b, _: value(torch.arange(a, b, dtype=torch.int32)),
        zeros=lambda shape, dtype, _: value(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, x, dtype, _: value(torch.full(shape, x, dtype=dtype)),
        expand_dims=lambda x, axis: x.unsqueeze(axis), where=torch.where, exp2=torch.exp2, log2=torch.log2,
        max=lambda x, axis: Int(x.max()) if x.dtype == torch.int32 else value(x.amax(axis)),
        sum=lambda x, axis: value(x.sum(axis)), convert_layout=lambda x, *_, **__: x,
        split=lambda x: (x[..., 0], x[..., 1]), join=lambda a, b: torch.stack((a, b), -1),
        pointer_type=lambda dtype: dtype, to_tensor=Int,
        allocate_shared_memory=allocate, warp_specialize=cta.specialize,
        NVMMADistributedLayout=lambda *_: None, DotOperandLayout=lambda *_: None, SliceLayout=lambda *_: None,
        BlockedLayout=lambda *_: None, SwizzledSharedLayout=lambda *_: None,
        NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *_: None),
    )  # fmt: skip
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda bar, count: bar.init(count),
        expect=lambda bar, nbytes: bar.change(1, nbytes),
        arrive=lambda bar, count: bar.change(count, 0),
        wait=lambda bar, phase: bar.wait(phase),
    )
    return {
        "gl": gl, "mbarrier": mbarrier, "tma": SimpleNamespace(store_wait=lambda _: None), "range": _device_range,
        "tma_load": tma_load, "tma_store": tma_store, "tma_reduce_add": tma_reduce_add,
        "warpgroup_mma": lambda *args, **kwargs: products().mma(*args, **kwargs),
        "warpgroup_mma_wait": lambda n, deps: products().wait(n, deps), "fence_async_shared": lambda: None,
        "partition_barrier": lambda: None,
        "pack_pairs": _pack_pairs,
        "wait_count": lambda counter, n: cta.poll(lambda: int(_load(counter)) >= int(n), f"{int(n)} key blocks"),
        "pass_turn": pass_turn, "wait_previous_kernel": lambda: None, "opaque_zero": lambda: Int(0),
        "wait_turn": lambda turn, rank: cta.poll(lambda: int(_load(turn)) >= int(rank), f"turn {int(rank)}"),
        "named_barrier_sync": lambda i, n: cta.named_barrier(i, n, True),
        "named_barrier_arrive": lambda i, n: cta.named_barrier(i, n, False),
        "ring_barrier_sync": lambda i, n: cta.named_barrier(int(i), n, True),
        "ring_barrier_arrive": lambda i, n: cta.named_barrier(int(i), n, False),
    }  # fmt: skip


def _device_range(*args: int) -> Any:
    return map(Int, range(*map(int, args)))


def _noting_tiles(decode: Callable[..., Any], cta: Cta) -> Callable[..., Any]:
    """``decode_tile`` that also notes the tile that the partition is at."""

    def decode_tile(t: int, *args: Any) -> Any:
        cta.local.tile = t
        return decode(t, *args)

    return decode_tile


def _rebind(module: Any, names: dict[str, Any]) -> dict[str, Any]:
    """The module's compiled functions as plain Python functions whose globals are ``names`` and the module's
    constants and named tuples.
    """
    scope = dict(names)
    for name, item in vars(module).items():
        if hasattr(item, "fn") and item.fn.__module__ == module.__name__:
            scope[name] = FunctionType(item.fn.__code__, scope, name, item.fn.__defaults__)
        elif type(item).__name__ == "constexpr":
            scope.setdefault(name, item.value)
        elif isinstance(item, type) and issubclass(item, tuple) and item.__module__ == module.__name__:
            scope[name] = item
    return scope


def _argument(x: Any) -> Any:
    if isinstance(x, bool) or x is None or isinstance(x, float):
        return x
    if isinstance(x, int):
        return Int(x)
    if isinstance(x, Tensor):
        return Pointer(x)
    return Descriptor(x) if hasattr(x, "block_shape") else x


class EmulatedKernel:
    """Stands for a compiled kernel, ``kernel[grid](**arguments)``, which uses device functions of ``libraries``."""

    def __init__(self, module: Any, name: str, *libraries: Any) -> None:
        self.module, self.name, self.libraries = module, name, (tiles, rings, pieces, sums, *libraries)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(
            *,
            num_warps: int,
            enable_fp_fusion: bool,
            launch_pdl: bool = False,
            maxnreg: int | None = None,
            **kwargs: Any,
        ) -> None:
            args = {key: _argument(x) for key, x in kwargs.items()}
            reductions.clear()

            def run(program: int) -> list[bool]:
                cta = Cta(program, grid[0], num_warps)
                names = _namespace(cta)
                for library in self.libraries:
                    names |= {k: v for k, v in _rebind(library, names).items() if callable(v) or k.isupper()}
                    if library is tiles:
                        names["decode_tile"] = _noting_tiles(names["decode_tile"], cta)
                _rebind(self.module, names)[self.name](**args)
                return [barriers.used for barriers in cta.barriers]

            with ThreadPoolExecutor(resident) as multiprocessors:
                used = list(multiprocessors.map(run, start_order(grid[0])))
            idle = [number for number, by_cta in enumerate(zip(*used, strict=True)) if not any(by_cta)]
            if idle and any(map(any, used)):
                raise AssertionError(f"mbarriers number {idle} are used by nobody: see rings.make_barrier")

        return launch


FORWARD = EmulatedKernel(gluon_forward, "forward_kernel")
BACKWARD = EmulatedKernel(gluon_backward, "backward_kernel")
BACKWARD_WIDE = EmulatedKernel(gluon_backward_wide, "backward_wide_kernel", gluon_backward)
