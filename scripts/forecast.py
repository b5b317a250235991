"""What GPUs would need and do, on paper: no device, no processes, no data.

    python scripts/forecast.py experiment=gpt3_13b_2k forecast.memory_gb=85 forecast.world_sizes=[2,4,8]
    python scripts/forecast.py experiment=gpt3_2b7_8k forecast.tokens_per_s=24690 forecast.world_sizes=[8,64,1024]

The peak of a device's memory is counted by `training.memory`; with `forecast.memory_gb` the largest micro-batch that
fits stands beside it. From the measured speed of one device (`scripts/scaling.py`, or a run's own metrics) and the
rates of its links, `training.forecast` predicts a step for each engine and number of devices. Weak scaling keeps a
rank's batch; with `forecast.strong=true` the global batch stays, and what a device has left to do shrinks until there
is no micro-batch for each. Leaves `forecast.json` in the run folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import compose, end_on_ctrl_c, launch

end_on_ctrl_c(__name__)

from rich.table import Table

from configs.errors import UserError
from configs.schema import EngineConfig, ForecastRunConfig, Precision
from training.batch import data_ranks, resolve_batch
from training.forecast import Cluster, Job, checkpoint_bytes, copies, forecast
from training.memory import RESERVED_BYTES, largest_micro_batch, step_memory
from training.report import about, wide_console, write_json
from training.run import run_folder
from training.waterfall.work import ELEMENT_BYTES


@dataclass(frozen=True)
class Row:
    """One engine on one number of devices; None where the batch isn't enough for so many."""

    engine: str
    world_size: int
    global_batch_size: int
    global_batch_tokens: int
    accumulation_steps: int
    gigabytes_per_step: float | None
    """10^9 bytes that a device sends, and receives, in a step."""
    communication_s: float | None
    exposed_s: float | None
    step_time_s: float | None
    tokens_per_s: float | None
    """All devices together."""
    efficiency: float | None
    """Relative to one device alone."""
    checkpoint_gb_per_rank: float
    """10^9 bytes that a device's share of a checkpoint takes."""
    memory_gb: float | None
    """10^9 bytes of a device's memory at the peak of a step; None for what `training.memory` doesn't cover."""
    largest_micro_batch: int | None
    """Sequences, by `forecast.memory_gb`; None without it, where nothing fits, and where the memory isn't known."""


def main(config: ForecastRunConfig) -> int:
    """Predict, print, write."""
    check(config)
    overrides = [a for a in sys.argv[1:] if not a.startswith(("forecast.", "run_dir=", "engine=", "--"))]
    rows = [
        row_of(config, name, compose([*overrides, f"engine={name}"]).engine, size)
        for name in config.forecast.engines
        for size in config.forecast.world_sizes
    ]
    console = wide_console()
    console.print(table_of(rows, config))
    path = run_folder(config).path / "forecast.json"
    facts = about(["scripts/forecast.py", *sys.argv[1:]])
    write_json(path, {**facts, "cluster": asdict(cluster_of(config)), "rows": [asdict(row) for row in rows]})
    console.print(str(path), soft_wrap=True)
    return 0


def check(config: ForecastRunConfig) -> None:
    """Raise `UserError` for what a forecast can't start from."""
    given = config.forecast
    if given.tokens_per_s < 0:
        raise UserError(f"forecast.tokens_per_s={given.tokens_per_s:g}: give what was measured, or 0 for memory alone.")
    positive = {
        "memory_gb": 1.0 if given.memory_gb is None else given.memory_gb,
        "node_size": given.node_size,
        "link_gb_per_s": given.link_gb_per_s,
        "network_gb_per_s": given.network_gb_per_s,
    }
    for key, value in positive.items():
        if not value > 0:
            raise UserError(f"forecast.{key}={value:g}: has to be above 0.")
    if not given.engines:
        raise UserError("forecast.engines=[]: give options of engine= to predict, such as zero1, or leave it out.")
    if not given.world_sizes or min(given.world_sizes) < 1:
        raise UserError(f"forecast.world_sizes={given.world_sizes}: give numbers of devices from 1 on.")


def cluster_of(config: ForecastRunConfig) -> Cluster:
    """The section `forecast` as the model of a step takes it."""
    given = config.forecast
    return Cluster(given.tokens_per_s, given.link_gb_per_s, given.network_gb_per_s, given.node_size, given.latency_us)


def row_of(config: ForecastRunConfig, name: str, engine: EngineConfig, world_size: int) -> Row:
    """One prediction."""
    ranks = data_ranks(engine, world_size)
    plan = resolve_batch(config.train, data_ranks(engine, engine.sequence_parallel_size))
    batch = plan.global_batch_size if config.forecast.strong else plan.global_batch_size * ranks
    micro = plan.micro_batch_size
    steps = batch // ranks // micro
    model = config.model
    model.vocab_size = model.vocab_size or config.forecast.vocab_size
    element = ELEMENT_BYTES[engine.precision if engine.precision is not Precision.auto else Precision.bf16]
    copied = copies(engine, element, world_size, config.forecast.node_size)
    job = Job(model, engine, element, micro, max(steps, 1), world_size, engine.overlap_comm, copied)
    tokens, share = batch * model.sequence_length, checkpoint_bytes(job) / world_size / 1e9
    needed = memory_of(config, job)
    if steps < 1 or batch % (ranks * micro) or not config.forecast.tokens_per_s:
        return Row(name, world_size, batch, tokens, steps, None, None, None, None, None, None, share, *needed)
    found = forecast(job, cluster_of(config))
    rate = tokens / found.step_time_s
    sent = found.traffic.total / 1e9
    times = (found.communication_s, found.exposed_s, found.step_time_s)
    return Row(name, world_size, batch, tokens, steps, sent, *times, rate, found.efficiency, share, *needed)


def memory_of(config: ForecastRunConfig, job: Job) -> tuple[float | None, int | None]:
    """10^9 bytes at the peak of a step, and the largest micro-batch by `forecast.memory_gb`."""
    if job.element_bytes != 2:
        return None, None
    peak = step_memory(job.model, job.engine, job.micro_batch_size, job.world_size, copied=job.copied)
    if peak is None:
        return None, None
    given = config.forecast.memory_gb
    room = 0.0 if given is None else given * 1e9 - RESERVED_BYTES
    return peak.total / 1e9, largest_micro_batch(job.model, job.engine, job.world_size, room, copied=job.copied)


def table_of(rows: Sequence[Row], config: ForecastRunConfig) -> Table:
    """The rows for a terminal: memory, and times where a speed is given."""
    given = config.forecast
    micro = resolve_batch(config.train, 1).micro_batch_size
    scaling = "strong" if given.strong else "weak"
    table = Table(title=f"{config.name}, micro-batches of {micro}, {scaling} scaling, predicted for each device")
    timed = ("GB\nsent", "sending", "exposed", "step", "tokens/s,\nall", "effi-\nciency") if given.tokens_per_s else ()
    fitted = () if given.memory_gb is None else (f"largest micro-\nbatch, {given.memory_gb:g} GB",)
    headings = ("engine", "devices", "M tokens,\nall", "micro-\nbatches", *timed, "checkpoint,\nGB",
                "memory,\nGB", *fitted)  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "engine" else "right")

    def text(value: float | None, pattern: str, scale: float = 1) -> str:
        return "-" if value is None else pattern.format(value * scale)

    for row in rows:
        times = (
            text(row.gigabytes_per_step, "{:,.1f}"),
            text(row.communication_s, "{:,.0f} ms", 1e3),
            text(row.exposed_s, "{:,.0f} ms", 1e3),
            text(row.step_time_s, "{:,.0f} ms", 1e3),
            text(row.tokens_per_s, "{:,.0f}"),
            text(row.efficiency, "{:.1%}"),
        )
        largest = "none" if row.memory_gb is not None and row.largest_micro_batch is None else None
        table.add_row(
            row.engine,
            str(row.world_size),
            f"{row.global_batch_tokens / 1e6:,.2f}",
            str(row.accumulation_steps),
            *(times if timed else ()),
            f"{row.checkpoint_gb_per_rank:.3f}",
            text(row.memory_gb, "{:,.1f}"),
            *((largest or text(row.largest_micro_batch, "{:,}"),) if fitted else ()),
        )
    return table


if __name__ == "__main__":
    launch(main, "forecast")
