"""Every instant of the profiled steps, given to exactly one category.

Of what runs at the same time on several streams, computation owns the instant before communication, and that before
copies: communication counts where nothing hides it. Where nothing runs, the device waits: for data, if the training
thread does; else for the host, until the next event has been launched; from then on it is idle. On a CPU the training
thread itself is the device, each operator owns its time outside the operators it calls, and what no operator owns is
the host's: Python, dispatch, autograd.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from training.waterfall.names import OPERATORS, Category, classify_kernel, classify_operator
from training.waterfall.trace import DATA_WAIT, EXCLUDED, MEMORY, Thread, Trace, TraceError

_EXCLUDED, _COMPUTE, _COMMUNICATION, _COPY = range(4)
_GAP_NAMES = {Category.data_wait: "waiting for a batch", Category.host: "host", Category.idle: "launched, not running"}


@dataclass(frozen=True, slots=True)
class Span:
    """Something that runs from start to end, on any stream."""

    start_ns: int
    end_ns: int
    priority: int
    category: Category | None
    """None: not part of a step."""
    name: str
    launched_ns: int | None = None


@dataclass
class Account:
    """Nanoseconds of all profiled steps together."""

    on_device: bool
    """Whether a GPU's events were accounted for, or a CPU's operators."""
    total_ns: int = 0
    """Wall time of the steps; the sum of `times`, exactly."""
    times: dict[Category, int] = field(default_factory=lambda: defaultdict(int))
    names: dict[Category, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    """The same by name of kernel or operator."""
    unknown: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Of `other`, by name."""
    communication_ns: int = 0
    """Time in which communication ran, hidden or not."""
    bytes_copied: int = 0
    """What copies and fills moved."""

    def add(self, category: Category, name: str, nanoseconds: int) -> None:
        self.times[category] += nanoseconds
        self.names[category][name] += nanoseconds
        self.total_ns += nanoseconds

    @property
    def hidden_communication_ns(self) -> int:
        """Communication beside computation."""
        return self.communication_ns - self.times[Category.communication]


def account(trace: Trace, *, on_device: bool) -> Account:
    """Account for the profiled steps of a GPU or, with `on_device` False, of a CPU.

    Raises `TraceError` if a GPU's trace has no event of it.
    """
    if on_device and not trace.device:
        raise TraceError(
            "The profile has no GPU events: CUPTI is not available to this process "
            "(another profiler runs, or it lacks the permission)."
        )
    result = Account(on_device)
    spans = _device_spans(trace, result) if on_device else _host_spans(trace.training)
    excluded = [Span(e.start_ns, e.end_ns, _EXCLUDED, None, EXCLUDED) for e in trace.training.named(EXCLUDED)]
    window = trace.window.start_ns, trace.window.end_ns
    stretches = list(sweep([*spans, *excluded], *window))
    waits = [(e.start_ns, e.end_ns) for e in trace.training.named(DATA_WAIT)]
    following: list[Span | None] = [after[2] for _, after in pairwise(stretches)] + [None]
    for (start, end, owner), after in zip(stretches, following, strict=True):
        if owner is None:
            for category, nanoseconds in _gap(start, end, after, waits, on_device):
                result.add(category, _GAP_NAMES[category], nanoseconds)
        elif owner.category is not None:
            result.add(owner.category, owner.name, end - start)
    communication = [s for s in spans if s.category is Category.communication]
    result.communication_ns = sum(
        end - start for start, end, owner in sweep([*communication, *excluded], *window) if owner and owner.category
    )
    for name, nanoseconds in result.names[Category.other].items():
        result.unknown[name] = nanoseconds
    return result


def _device_spans(trace: Trace, result: Account) -> list[Span]:
    spans = []
    for event in trace.device:
        category = classify_kernel(event.name, event.kind, event.stack) or Category.other
        priority = _COMPUTE
        if category is Category.communication:
            priority = _COMMUNICATION
        elif event.kind == MEMORY:
            priority = _COPY
        if trace.window.start_ns <= event.start_ns < trace.window.end_ns and event.kind == MEMORY:
            result.bytes_copied += event.num_bytes
        spans.append(Span(event.start_ns, event.end_ns, priority, category, event.name, event.launched_ns))
    return spans


def _host_spans(thread: Thread) -> list[Span]:
    spans = []
    for start, end, index in thread.own_times():
        stack = thread.stack(index)
        category = classify_operator(stack) or Category.other
        if category is not Category.host:
            spans.append(Span(start, end, _COMPUTE, category, _operator_name(stack)))
    return spans


def _operator_name(stack: tuple[str, ...]) -> str:
    """The innermost operator that isn't a mere view: `aten::empty` inside a product is part of the product."""
    return next((name for name in stack if name in OPERATORS), stack[0])


def sweep(spans: Sequence[Span], start: int, end: int) -> Iterator[tuple[int, int, Span | None]]:
    """Disjoint stretches that fill `start` to `end`, each with the span that owns it, or None.

    The lowest priority number owns; among equals the span that began first, until it ends.
    """
    queue = sorted((s for s in spans if s.end_ns > start), key=lambda s: s.start_ns)
    running: list[tuple[int, int, int]] = []  # priority, start, place in the queue
    now, arrived = start, 0
    while now < end:
        while arrived < len(queue) and queue[arrived].start_ns <= now:
            heapq.heappush(running, (queue[arrived].priority, queue[arrived].start_ns, arrived))
            arrived += 1
        while running and queue[running[0][2]].end_ns <= now:
            heapq.heappop(running)
        owner = queue[running[0][2]] if running else None
        until = min(end, queue[arrived].start_ns) if arrived < len(queue) else end
        if owner is not None:
            until = min(until, owner.end_ns)
        yield now, until, owner
        now = until


def _gap(
    start: int, end: int, following: Span | None, waits: Sequence[tuple[int, int]], on_device: bool
) -> Iterator[tuple[Category, int]]:
    """Why nothing ran from `start` to `end`, where `following` ran next."""
    launched = end
    if on_device and following is not None and following.launched_ns is not None:
        launched = min(max(following.launched_ns, start), end)
    waited = sum(max(0, min(stop, launched) - max(begin, start)) for begin, stop in waits)
    parts = {
        Category.data_wait: waited,
        Category.host: launched - start - waited,
        Category.idle: end - launched,
    }
    yield from ((category, nanoseconds) for category, nanoseconds in parts.items() if nanoseconds)
