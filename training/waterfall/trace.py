"""Events of a profile, from the chrome trace that `torch.profiler` exports.

Three kinds matter. Device events (kernels, copies, fills) say what ran when. Host events (operators, annotations) nest
on each thread, and say what a thread was at. Launch events (`cudaLaunchKernel` ...) tie both together: a device event
carries the correlation id of the call that launched it, and that call lies inside the host events that caused it.

Times are integer nanoseconds on the profiler's clock, so that sums are exact.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError

WINDOW = "flashtrain::profiled"
"""Annotation around the profiled steps, on the training thread."""
DATA_WAIT = "flashtrain::data_wait"
"""Annotation around waiting for a batch."""
EXCLUDED = "flashtrain::excluded"
"""Annotation around what isn't training: evaluation, checkpoints, logging. The device is idle at both its ends."""
OPTIMIZER = "flashtrain::optimizer"
"""Annotation around the gradient's norm, clipping and the update."""
BACKWARD = "flashtrain::backward"
"""Annotation around the backward pass and what the engine does to gradients after it."""

GLOO = "gloo:"
"""Begin of the names of what gloo does, on threads of its own."""

KERNEL, MEMORY = "kernel", "memory"
_DEVICE_KINDS = {"kernel": KERNEL, "gpu_memcpy": MEMORY, "gpu_memset": MEMORY}
_HOST_KINDS = ("cpu_op", "user_annotation")
_LAUNCH_KINDS = ("cuda_runtime", "cuda_driver")


class TraceError(UserError):
    """A trace that can't be accounted for."""


@dataclass(frozen=True, slots=True)
class HostEvent:
    """An operator or annotation on a thread."""

    name: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """A kernel, copy or fill on a stream."""

    name: str
    kind: str
    """`KERNEL` or `MEMORY`."""
    start_ns: int
    end_ns: int
    launched_ns: int | None
    """When the host launched it; None if the trace doesn't say."""
    stack: tuple[str, ...]
    """Names of the host events around its launch, innermost first."""
    num_bytes: int
    """What a copy or fill moved; 0 for a kernel."""


class Thread:
    """Host events of one thread, which nest."""

    def __init__(self, events: Iterable[HostEvent]) -> None:
        self.events = sorted(events, key=lambda e: (e.start_ns, -e.end_ns))
        self._starts = [e.start_ns for e in self.events]
        self._parents = self._find_parents()

    def _find_parents(self) -> list[int]:
        """Index of the event around each, -1 for none."""
        parents, open_events = [], list[int]()
        for index, event in enumerate(self.events):
            while open_events and self.events[open_events[-1]].end_ns <= event.start_ns:
                open_events.pop()
            parents.append(open_events[-1] if open_events else -1)
            open_events.append(index)
        return parents

    def index_at(self, time_ns: int) -> int:
        """The innermost event at that time, -1 for none."""
        index = bisect_right(self._starts, time_ns) - 1
        while index >= 0 and self.events[index].end_ns <= time_ns:
            index = self._parents[index]
        return index

    def stack(self, index: int) -> tuple[str, ...]:
        """Names from event `index` outwards."""
        names = []
        while index >= 0:
            names.append(self.events[index].name)
            index = self._parents[index]
        return tuple(names)

    def named(self, name: str) -> list[HostEvent]:
        """Events of that name, in time."""
        return [event for event in self.events if event.name == name]

    def own_times(self) -> Iterator[tuple[int, int, int]]:
        """Disjoint (start, end, index): the time of each event outside the events that it contains."""
        open_events, cursor = list[int](), 0
        for index, event in enumerate(self.events):
            while open_events and self.events[open_events[-1]].end_ns <= event.start_ns:
                done = open_events.pop()
                yield from _stretch(cursor, self.events[done].end_ns, done)
                cursor = max(cursor, self.events[done].end_ns)
            if open_events:
                yield from _stretch(cursor, event.start_ns, open_events[-1])
            open_events.append(index)
            cursor = max(cursor, event.start_ns)
        while open_events:
            done = open_events.pop()
            yield from _stretch(cursor, self.events[done].end_ns, done)
            cursor = max(cursor, self.events[done].end_ns)


def _stretch(start: int, end: int, index: int) -> Iterator[tuple[int, int, int]]:
    if end > start:
        yield start, end, index


@dataclass(frozen=True)
class Trace:
    """What was recorded."""

    training: Thread
    """Host events of the thread that trains."""
    window: HostEvent
    """The profiled steps."""
    device: list[DeviceEvent] = field(default_factory=list)
    """Events of the GPU; empty for a CPU."""
    collectives: list[HostEvent] = field(default_factory=list)
    """What gloo's threads did."""


def read_trace(path: Path) -> Trace:
    """Read a chrome trace, plain or .gz. Raises `TraceError` if it has no profiled steps in it."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    return parse_trace(json.loads(content)["traceEvents"])


def parse_trace(records: Iterable[dict[str, Any]]) -> Trace:
    """The records of a chrome trace (`ph`, `cat`, `name`, `ts` and `dur` in microseconds, `tid`, `args`)."""
    hosts: dict[Any, list[HostEvent]] = defaultdict(list)
    launches: dict[int, tuple[Any, int]] = {}  # correlation -> thread, start
    operators: dict[int, tuple[Any, int]] = {}  # external id -> thread, start
    device: list[dict[str, Any]] = []
    for record in records:
        if record.get("ph") != "X":
            continue
        kind, arguments = record.get("cat"), record.get("args", {})
        if kind in _HOST_KINDS:
            start, end = _times(record)
            hosts[record["tid"]].append(HostEvent(record["name"], start, end))
            if kind == "cpu_op" and "External id" in arguments:
                operators[arguments["External id"]] = (record["tid"], start)
        elif kind in _LAUNCH_KINDS and "correlation" in arguments:
            launches[arguments["correlation"]] = (record["tid"], _times(record)[0])
        elif kind in _DEVICE_KINDS:
            device.append(record)
    threads = {tid: Thread(events) for tid, events in hosts.items()}
    training = [thread for thread in threads.values() if thread.named(WINDOW)]
    if len(training) != 1 or len(training[0].named(WINDOW)) != 1:
        raise TraceError(f"The trace has {len(training)} threads with profiled steps ({WINDOW}), not 1.")
    events = [_device_event(record, threads, launches, operators) for record in device]
    collectives = [event for found in hosts.values() for event in found if event.name.startswith(GLOO)]
    return Trace(training[0], training[0].named(WINDOW)[0], events, collectives)


def _times(record: dict[str, Any]) -> tuple[int, int]:
    """Begin and end in nanoseconds; the end is rounded as a point of time, so that neighbours don't overlap."""
    return round(record["ts"] * 1e3), round((record["ts"] + record.get("dur", 0)) * 1e3)


def _device_event(
    record: dict[str, Any],
    threads: dict[Any, Thread],
    launches: dict[int, tuple[Any, int]],
    operators: dict[int, tuple[Any, int]],
) -> DeviceEvent:
    arguments = record.get("args", {})
    launch = launches.get(arguments.get("correlation", -1))
    stack: tuple[str, ...] = ()
    for place in (launch, operators.get(arguments.get("External id", -1))):
        if place is not None and place[0] in threads and not stack:
            thread = threads[place[0]]
            stack = thread.stack(thread.index_at(place[1]))
    start, end = _times(record)
    kind = _DEVICE_KINDS[record["cat"]]
    launched = None if launch is None else launch[1]
    return DeviceEvent(record["name"], kind, start, end, launched, stack, int(arguments.get("bytes", 0)))
