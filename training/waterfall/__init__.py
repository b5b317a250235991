"""Where the time of a training step goes: from a profiler's trace to a waterfall between 100 % MFU and what is reached.

    trace     events of device and host, from torch.profiler's chrome trace
    names     kernel or operator -> category
    timeline  every instant of the profiled steps -> exactly one category
    work      the FLOPs and least bytes that a category's share of a step takes
    report    time, rate and share of the gap of each category
    remedies  which config keys would win most of it back
    show      a table, a picture
    lanes     a step on every rank: computation and communication side by side

`training.profile` records the trace in a run.
"""

from training.waterfall.report import Report, Setting, Unprofiled, build_report
from training.waterfall.timeline import account
from training.waterfall.trace import TraceError, read_trace

__all__ = ["Report", "Setting", "TraceError", "Unprofiled", "account", "build_report", "read_trace"]
