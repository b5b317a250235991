"""`train.profile_steps`: profile some steps of a run, and write its waterfall into the run folder.

    waterfall.json    every part of a step: time, rate, share of what is lost; remedies
    waterfall.png     the same as a picture
    ranks.png         with several ranks: a step of each, when it computed and when it communicated
    trace.json.gz     the profile itself, for chrome://tracing or ui.perfetto.dev

The steps come late enough that kernels are compiled and the meter has steps to compare with. One more step warms the
profiler up, then the device is waited for, so that the window of the profiled steps begins and ends with an idle device
and holds all of their work. What isn't training is marked and left out. Profiled steps are slower: none of the run's
metrics counts them. Every rank profiles itself, so that none is slower than the others; the files but ranks.png are of
rank 0.

Annotations around the optimizer and the backward pass are put on when the profiler starts and taken off when it stops,
so that a run without a profile has none.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import training.engine as engine_module
from configs.schema import ModelConfig, RunConfig
from model import resolve_attention
from training.backend import DTYPES, should_compile
from training.batch import BatchPlan
from training.engine import Engine
from training.hardware import Peak
from training.metrics import ThroughputMeter
from training.report import about, write_json
from training.run import RunFolder
from training.waterfall import Report, Setting, TraceError, Unprofiled, account, build_report, read_trace
from training.waterfall.lanes import Lanes, draw_lanes, lanes_of
from training.waterfall.show import draw
from training.waterfall.trace import BACKWARD, DATA_WAIT, EXCLUDED, OPTIMIZER, WINDOW, Trace

LOG = logging.getLogger(__name__)
SETTLED_STEPS: Final = 10
"""Steps of this process before the profiler starts, where the run is long enough."""
LEAST_SETTLED_STEPS: Final = 3
"""Fewer won't do: two compile and allocate, one is there to compare with."""
STUCK_S: Final = 10.0
"""A run that ends with an unfinished profile gives the device this time for the steps that it was handed, seconds."""
REPORT, PICTURE, RANKS, TRACE = "waterfall.json", "waterfall.png", "ranks.png", "trace.json.gz"


class StepProfiler:
    """Profiles steps of a run; does nothing where `train.profile_steps` is 0.

    before each step: begin_step()
    around the wait for its batch: waiting()
    after each step: end_step()        a report on rank 0 once the last profiled step is done
    around what isn't training: excluded()
    at the end: close()
    """

    def __init__(
        self,
        config: RunConfig,
        model: ModelConfig,
        plan: BatchPlan,
        engine: Engine,
        peak: Peak,
        folder: RunFolder,
        meter: ThroughputMeter,
        steps_left: int,
    ) -> None:
        """`model`: the config's, with its vocabulary; `steps_left`: steps that this process is going to make."""
        self.engine, self.folder, self.meter = engine, folder.path, meter
        self.setting = setting_of(config, model, plan, engine, peak)
        self.num_steps = config.train.profile_steps
        self.settled = min(SETTLED_STEPS, steps_left - self.num_steps - 1)
        self.done = 0
        self.running = False
        """From the profiler's start to its end: these steps are not to be counted in the run's metrics."""
        self._unprofiled: Unprofiled | None = None
        self._cleanup = ExitStack()
        self._window = ExitStack()

    @property
    def problem(self) -> str:
        """Why there won't be a profile though one is asked for; empty if there will."""
        if self.num_steps == 0 or self.settled >= LEAST_SETTLED_STEPS:
            return ""
        needed = LEAST_SETTLED_STEPS + 1 + self.num_steps
        left = self.settled + self.num_steps + 1
        return (
            f"train.profile_steps={self.num_steps} needs {needed} steps, and {left} are left to do: there will be no "
            "profile; raise train.steps."
        )

    @property
    def is_due(self) -> bool:
        """Whether `begin_step` does something now."""
        return self.num_steps > 0 and not self.problem and self.done - self.settled in (0, 1)

    def begin_step(self) -> None:
        """Before a step's batch is asked for: start the profiler, or open the window, if it is time."""
        if not self.is_due:
            return
        if self.done == self.settled:
            self._start()
        else:
            self._synchronize()
            self._window.enter_context(record_function(WINDOW))

    def end_step(self) -> Report | None:
        """After a step: on rank 0 the report if it was the last one to profile. Collective if it was.

        Raises `TraceError` if nothing was recorded.
        """
        self.done += 1
        if not self.running or self.done < self.settled + 1 + self.num_steps:
            return None
        self._synchronize()
        self._window.close()
        return self._finish()

    def waiting(self) -> AbstractContextManager[Any]:
        """Around the wait for a batch."""
        return record_function(DATA_WAIT) if self.running else nullcontext()

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Around what isn't training; while profiling, the device has finished before and after."""
        if not self.running:
            yield
            return
        self._synchronize()
        with record_function(EXCLUDED):
            yield
            self._synchronize()

    def close(self) -> None:
        """Stop a profile that isn't finished; nothing is written. Returns within `STUCK_S` whatever the device does."""
        self._window.close()
        self._cleanup.close()
        self.running = False

    def _start(self) -> None:
        self.meter.report()  # so that the total below has every step so far
        total = self.meter.total()
        if total is not None:
            self._unprofiled = Unprofiled(total.num_steps, total.step_time_median_s, total.mfu, total.mfu_causal)
        activities = [ProfilerActivity.CPU]
        if self.setting.on_device:
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)
        self.profiler.start()
        self._cleanup.callback(self._stop)
        self._cleanup.enter_context(annotated(self.engine, "update", OPTIMIZER))
        for function in ("gradient_squares", "clip_factor_on_device"):
            self._cleanup.enter_context(annotated(engine_module, function, OPTIMIZER))
        self._cleanup.enter_context(annotated(self.engine.deepspeed, "backward", BACKWARD))
        self.running = True

    def _stop(self) -> None:
        """Stop the profiler, which waits for the device: not for one that is stuck, as where a peer of a collective is
        gone, or has failed. Then the profiler is left as it is, since the process is about to end."""
        if returns_within(STUCK_S, self._synchronize):
            self.profiler.stop()
        else:
            LOG.warning(f"the device has failed, or is not done in {STUCK_S:g} s: the profile is given up")

    def _finish(self) -> Report | None:
        self._cleanup.close()
        self.running = False
        own = self.engine.processes
        try:
            recorded = self._recorded()
            ranks = [one for one in own.gather(None if isinstance(recorded, Exception) else recorded[1]) if one]
            if isinstance(recorded, Exception):
                raise recorded
            if not own.is_main:
                return None
            trace = recorded[0]
            accounted = account(trace, on_device=self.setting.on_device)
            report = build_report(accounted, self.num_steps, self.setting, self._unprofiled)
            write_report(report, self.folder, ranks)
        finally:
            self.meter.start()
        return report

    def _recorded(self) -> tuple[Trace, Lanes] | TraceError | OSError:
        """The profile, read back; or why there is none, to be raised when the other ranks don't wait any more."""
        own = self.engine.processes
        try:
            with tempfile.TemporaryDirectory() as scratch:
                path = (self.folder if own.is_main else Path(scratch)) / TRACE
                self.profiler.export_chrome_trace(str(path))
                del self.profiler  # its events take memory
                trace = read_trace(path)
            return trace, lanes_of(trace, own.rank, on_device=self.setting.on_device)
        except (TraceError, OSError) as error:
            return error

    def _synchronize(self) -> None:
        if self.setting.on_device:
            torch.cuda.synchronize(self.engine.device)


def returns_within(seconds: float, wait: Callable[[], None]) -> bool:
    """Whether `wait`, called on a thread of its own, returns in time and without an error. Else the thread stays in it,
    or has ended with the error, which is logged: whoever asks has a first error to tell."""
    returned = threading.Event()

    def call() -> None:
        try:
            wait()
        except Exception as error:
            LOG.info("waiting for the device", exc_info=error)
        else:
            returned.set()

    thread = threading.Thread(target=call, name="wait-for-device", daemon=True)
    thread.start()
    thread.join(seconds)
    return returned.is_set()


def setting_of(config: RunConfig, model: ModelConfig, plan: BatchPlan, engine: Engine, peak: Peak) -> Setting:
    """What a report says was profiled."""
    device = engine.device
    return Setting(
        config=replace(config, model=model),
        plan=plan,
        precision=engine.precision,
        attention=resolve_attention(model, device, DTYPES[engine.precision]),
        compiled=should_compile(config.engine, device),
        world_size=engine.processes.world_size,
        on_device=device.type == "cuda",
        peak_tflops=peak.tflops,
        peak_source=f"{peak.source}: {peak.note}",
        device_name=peak.device_name,
        memory_gb_per_s=memory_bandwidth(device),
    )


def memory_bandwidth(device: torch.device) -> float | None:
    """10^9 bytes a second of a GPU's memory: two transfers a clock on every line of its bus. None where the driver or
    this PyTorch doesn't say, and on a CPU.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if not hasattr(properties, "memory_clock_rate"):
        return None
    found: float = 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8 / 1e9  # kHz, bits
    return found or None


@contextmanager
def annotated(owner: Any, name: str, annotation: str) -> Iterator[None]:
    """While inside, calls of `owner.name` are recorded under `annotation`. `owner` is a module or an instance."""
    original, own = getattr(owner, name), name in vars(owner)

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(annotation):
            return original(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def write_report(report: Report, folder: Path, ranks: Sequence[Lanes] = ()) -> None:
    """`waterfall.json`, `waterfall.png` and, of several ranks, `ranks.png` in `folder`."""
    facts = about([program(), *sys.argv[1:]])
    write_json(folder / REPORT, {**facts, **report.to_json(), "ranks": [lanes.to_json() for lanes in ranks]})
    draw(report, folder / PICTURE)
    if len(ranks) > 1:
        setting = report.setting
        title = f"{setting.config.name}, ZeRO-{setting.config.engine.zero_stage}, {setting.device_name}"
        draw_lanes(ranks, folder / RANKS, f"{title}, {facts['date']}")


def program() -> str:
    """The script that runs, from the repository's root."""
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    return str(script.relative_to(root)) if script.is_relative_to(root) else script.name


__all__ = ["PICTURE", "REPORT", "TRACE", "StepProfiler", "TraceError", "annotated", "write_report"]
