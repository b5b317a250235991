"""Train the same config on 1, 2, 4, 8 ... processes of this host, and say what is left of the speed.

    python scripts/scaling.py experiment=gpt3_2b7_8k scaling.engines=[zero1,zero2,zero3]
    python scripts/scaling.py experiment=quickstart scaling.world_sizes=[1,2] scaling.steps=5

Weak scaling keeps the batch of a rank (the global batch grows with the ranks); `scaling.strong=true` keeps the global
batch. Each trial runs in fresh processes. Leaves `scaling.json` and `scaling.png` in the run folder, beside a folder
for each trial; the JSON grows with each trial, and one that fails costs its own row only. Called again, it keeps the
rows that were measured under the same conditions (`training.earlier`) on the same GPUs and runs what is missing;
`resume=never` starts anew.

GPUs of one host differ by some per cent, and W ranks go at the pace of the slowest of theirs: what W of them lack of W
times one GPU is not all lost to communication. So the trial of one process runs on as many GPUs as the largest number
of processes, at the same time, each by itself (`scaling.each_card=false`: on the first alone). With t(W) the tokens/s
of W processes, and c(i) those of GPU i alone:

    t(1)               = median of c(0) ... c(n-1)                n: the largest number of processes
    efficiency         = t(W) / (W · t(1))                        over W of the host's median GPU
    efficiency_slowest = t(W) / (W · min of c(0) ... c(W-1))      over W copies of the slowest of the W GPUs

What the second lacks of 1 is lost to communication, and to waiting for ranks that are slow at times; the first lacks
the spread of the GPUs as well. Where `scaling.world_sizes` begins with another number V, efficiency is
(t(W) / W) / (t(V) / V).

Beside each measurement stands what `training.forecast` makes of the trial on one process and of the links, which are
measured too. `scaling.forecast=[64,256,1024]` adds rows that are predicted only, for as many nodes of this kind.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import compose, end_on_ctrl_c, launch

end_on_ctrl_c(__name__)

import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table

from configs.errors import UserError
from configs.schema import Device, RunConfig, ScalingRunConfig
from training.backend import resolve_precision
from training.batch import data_ranks, resolve_batch
from training.children import Stop
from training.earlier import conditions, row_of, take_up
from training.forecast import Cluster, Job, copies, forecast
from training.link import Link, probe
from training.report import about, draw_lines, wide_console, write_json
from training.run import TOKENIZER, claim, run_folder
from training.trial import Trial, run_on_cards, run_trial, speed_and_time
from training.waterfall.work import ELEMENT_BYTES

NO_ROOM = "does not fit in memory"
PERFECT, SLOWEST = "perfect", "perfect, of the slowest GPU"
"""Lines of the picture to compare with."""
PREDICTIONS = ("predicted_step_time_s", "predicted_efficiency", "predicted_exposed_s", "bytes_per_step")
"""Fields of a row that are formed anew from all rows of a call."""
CARDS = ("efficiency_slowest", "cards_tokens_per_s", "cards_problems")
"""Fields of a row that come from trials on each GPU."""


@dataclass(frozen=True)
class Row:
    """One engine on one number of processes; medians after the warm-up, None where there is a `problem`."""

    engine: str
    world_size: int
    global_batch_size: int
    tokens_per_s: float | None
    """All processes together."""
    step_time_s: float | None
    mfu: float | None
    mfu_causal: float | None
    peak_memory_gb: float | None
    """Rank 0's; of one process on each GPU, the largest."""
    efficiency: float | None
    """Tokens/s per process relative to the engine's first row that fits."""
    efficiency_slowest: float | None = None
    """Tokens/s relative to as many copies of the slowest GPU of this row, alone; None for one process, and where the
    row's GPUs weren't all measured alone."""
    cards_tokens_per_s: dict[str, float | None] | None = None
    """One process: each GPU's own, by what CUDA_VISIBLE_DEVICES calls it, in the order of ranks; `tokens_per_s` is
    their median, as the other figures are theirs. A GPU whose trial failed has None. None where it wasn't looked at."""
    cards_problems: dict[str, str] | None = None
    """Why GPUs have no figure: `NO_ROOM`, or how the trial failed. None where they weren't looked at."""
    predicted_step_time_s: float | None = None
    """By `training.forecast`; None where the engine has no trial on one process to start from."""
    predicted_efficiency: float | None = None
    """Relative to one process."""
    predicted_exposed_s: float | None = None
    """Seconds of a step in which communication isn't hidden, as predicted."""
    bytes_per_step: float | None = None
    """What a rank sends in a step, by `training.forecast`."""
    problem: str | None = None
    """Why nothing was measured: `NO_ROOM`, or how the trial failed."""
    start_s: float | None = None
    """Seconds from the start of the trial's processes to the row of its first step; see `Trial`."""
    wall_s: float | None = None
    """Seconds from the start of the trial's processes to their end."""
    devices: list[str] | None = None
    """UUIDs of the GPUs that it was measured on, in the order of ranks; empty on a CPU."""


def main(config: ScalingRunConfig) -> int:
    """Run all trials, print the table, write the files. Returns 1 if a trial failed for something else than memory.

    Ctrl-C or SIGTERM end the trials only; then it returns 130 or 143.
    """
    check(config)
    with claim(run_folder(config), "auto"):  # two calls at once would overwrite each other's rows
        return scale(config, run_folder(config).path)


def scale(config: ScalingRunConfig, folder: Path) -> int:
    """`main` in a folder that is ours alone."""
    console = wide_console()
    overrides = [a for a in sys.argv[1:] if not a.startswith(("scaling.", "run_dir=", "engine=", "--"))]
    devices = devices_of(config)
    report = Report(config, folder, conditions(about([]), overrides, steps=config.scaling.steps), devices)
    keep = partial(kept, config, devices)
    earlier, report.rows = take_up(console, report.path, report.conditions, config.resume, keep)
    report.link = kept_link(earlier, devices)
    have = {(row.engine, row.world_size) for row in report.rows}
    if have:
        report.write()  # where other rows moved aside, these went along
    with Stop() as stop:
        stop.trials(partial(add_all, console, report, overrides))
        if stop.signal:
            console.print(f"{stop.signal.name}: the trials end here; the same command goes on.")
        finish(console, report, overrides, have)
    return stop.exit_code or int(any(has_failed(row) for row in report.rows))


def has_failed(row: Row) -> bool:
    """Whether a trial of the row ended for something else than memory."""
    problems = [*(row.cards_problems or {}).values(), *([row.problem] if row.problem else [])]
    return any(problem != NO_ROOM for problem in problems)


def add_all(console: Console, report: Report, overrides: list[str]) -> None:
    """The links between processes, and the rows of all trials."""
    config = report.config
    report.link = links(console, config, report.link)  # seconds; processes that can't talk fail here
    cards = cards_of(config, os.environ)
    for engine in dict.fromkeys(config.scaling.engines):
        for world_size in dict.fromkeys(config.scaling.world_sizes):
            add(console, report, overrides, engine, world_size, cards if world_size == 1 else [])


def add(
    console: Console, report: Report, overrides: list[str], engine: str, world_size: int, cards: Sequence[str]
) -> None:
    """The row of a trial, kept or measured; of one that runs on `cards`, kept if it has a figure of each."""
    old = next((row for row in report.rows if (row.engine, row.world_size) == (engine, world_size)), None)
    if old is not None:
        said = f"{engine} on {world_size}: {old.tokens_per_s:,.0f} tokens/s, kept from an earlier call"
        missing = [card for card in cards if not (old.cards_tokens_per_s or {}).get(card)]
        console.print(f"{said}; not of GPU {', '.join(missing)}, so all are measured again" if missing else said)
        if not missing:
            return
    row = measure(console, report.config, overrides, engine, world_size, report.folder, cards)
    if old is not None and row.tokens_per_s is None:
        return  # what was measured is better than nothing
    row = replace(row, devices=report.devices[: max(len(cards), world_size)])
    report.rows = arranged(report.config, [*(r for r in report.rows if r is not old), row])
    report.write()  # what is measured stays, whatever comes later


def finish(console: Console, report: Report, overrides: list[str], kept: Collection[tuple[str, int]]) -> None:
    """Predictions, the table and the files; `kept` are the (engine, processes) of earlier calls."""
    config, picture = report.config, report.folder / "scaling.png"
    if report.link is not None:
        report.rows = predict(config, overrides, report.rows, report.link, report.folder)
    console.print(table_of(report.rows, config.scaling.strong, kept))
    report.write()
    draw(report.rows, picture, f"{kind_of(config)} scaling of {config.name}, {about([])['device']}")
    console.print(f"{report.path}\n{picture}", soft_wrap=True)


def kept(config: ScalingRunConfig, devices: Sequence[str], values: dict[str, Any]) -> Row | None:
    """An earlier row without its predictions; None if this call would train it with another batch or on others than
    the first of `devices`."""
    later = dict.fromkeys(CARDS)  # a report from before they were measured lacks these
    row = row_of(Row, {**later, **values, **dict.fromkeys(PREDICTIONS)})
    if row is None or not agree(row.devices, devices):
        return None
    try:
        same = row.global_batch_size == global_batch(config, row.world_size)
    except UserError:  # no batch at all
        same = False
    return row if same else None


def kept_link(earlier: Mapping[str, Any], devices: Sequence[str]) -> Link | None:
    """An earlier report's links, if they are between the first of `devices`."""
    if not earlier.get("link"):
        return None
    link = Link(**earlier["link"])
    then = earlier.get("devices")
    return link if agree(then and then[: link.world_size], devices) else None


def agree(then: Sequence[str] | None, now: Sequence[str]) -> bool:
    """Whether GPUs of an earlier call are the first of this call's, as far as it has as many; None: nobody knows."""
    return then is not None and bool(then) == bool(now) and all(a == b for a, b in zip(then, now, strict=False))


def arranged(config: ScalingRunConfig, rows: Sequence[Row]) -> list[Row]:
    """The rows as `scaling` lists engines and numbers of processes, others of earlier calls last; with efficiencies."""
    engines, sizes = config.scaling.engines, config.scaling.world_sizes

    def place(row: Row) -> tuple[int, str, int, int]:
        named = row.engine in engines
        size = sizes.index(row.world_size) if row.world_size in sizes else len(sizes)
        return (engines.index(row.engine) if named else len(engines), row.engine, size, row.world_size)

    result: list[Row] = []
    for row in sorted(rows, key=place):
        alike = (r for r in [*result, row] if r.engine == row.engine and r.tokens_per_s)
        reference = next(alike, None)
        if reference is not None and reference.tokens_per_s and row.tokens_per_s:
            base = reference.tokens_per_s / reference.world_size
            row = replace(row, efficiency=row.tokens_per_s / row.world_size / base)
        result.append(replace(row, efficiency_slowest=efficiency_slowest(row, rows)))
    return result


def efficiency_slowest(row: Row, rows: Sequence[Row]) -> float | None:
    """A row's tokens/s over those of as many copies of the slowest of its GPUs, which are the first of those that the
    engine's trial of one process ran on; None as `Row` says."""
    alone = next((r for r in rows if r.engine == row.engine and r.world_size == 1), None)
    if row.world_size == 1 or alone is None or not row.tokens_per_s:
        return None
    slowest = slowest_of(alone, row.world_size)
    return slowest and row.tokens_per_s / (row.world_size * slowest)


def slowest_of(alone: Row, number: int) -> float | None:
    """Tokens/s of the slowest among the first `number` GPUs, each by itself; None if one of them has no figure."""
    speeds = list((alone.cards_tokens_per_s or {}).values())[:number]
    known = [speed for speed in speeds if speed]
    return min(known) if len(known) == number else None


def cards_of(config: ScalingRunConfig, environment: Mapping[str, str]) -> list[str]:
    """The GPUs that the trial of one process runs on at the same time, as CUDA_VISIBLE_DEVICES calls them.

    Those that the largest number of processes takes, in the order of ranks. Empty where there is but one, on a CPU or
    with `scaling.each_card=false`: then it runs once, as any trial.
    """
    if not config.scaling.each_card or config.hardware.device is Device.cpu or not torch.cuda.is_available():
        return []
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    cards = [name.strip() for name in names][: min(max(config.scaling.world_sizes), torch.cuda.device_count())]
    return cards if len(cards) > 1 else []


def devices_of(config: ScalingRunConfig) -> list[str]:
    """UUIDs of all GPUs that this call sees, in the order of ranks; empty on a CPU.

    CUDA_VISIBLE_DEVICES may call other GPUs by the same names: on another host, or after another order was set.
    """
    if config.hardware.device is Device.cpu or not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def links(console: Console, config: ScalingRunConfig, earlier: Link | None) -> Link | None:
    """The links between the largest number of processes, an earlier call's if it had as many; None if it is one."""
    largest = max(config.scaling.world_sizes)
    if earlier is not None and earlier.world_size >= largest:
        return earlier
    if largest == 1:
        return None
    with console.status(f"links between {largest}"):
        return probe(largest, config.hardware.device)


@dataclass
class Report:
    """`scaling.json`."""

    config: ScalingRunConfig
    folder: Path
    conditions: dict[str, Any]
    devices: list[str]
    """See `devices_of`."""
    rows: list[Row] = field(default_factory=list)
    link: Link | None = None

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.folder / "scaling.json"

    def write(self) -> None:
        """Write it with the rows so far."""
        facts = about(["scripts/scaling.py", *sys.argv[1:]])
        facts |= {"scaling": kind_of(self.config).lower(), "conditions": self.conditions, "devices": self.devices}
        facts |= {"link": self.link and asdict(self.link), "rows": [asdict(row) for row in self.rows]}
        write_json(self.path, facts)


def kind_of(config: ScalingRunConfig) -> str:
    """`Strong` or `Weak`."""
    return "Strong" if config.scaling.strong else "Weak"


def check(config: ScalingRunConfig) -> None:
    """Raise `UserError` for nothing to measure, for engines that don't exist and for more processes than GPUs."""
    if not config.scaling.engines:
        raise UserError("scaling.engines=[]: give options of engine= to measure, such as zero1, or leave it out.")
    for engine in config.scaling.engines:
        compose([f"engine={engine}"])
    if config.scaling.forecast and (1 not in config.scaling.world_sizes or len(config.scaling.world_sizes) < 2):
        raise UserError(
            "scaling.forecast needs trials on one process, for its speed, and on several, for their links: "
            f"scaling.world_sizes={config.scaling.world_sizes} has not both."
        )
    if not config.scaling.world_sizes or min(config.scaling.world_sizes) < 1:
        raise UserError(f"scaling.world_sizes={config.scaling.world_sizes}: give numbers of processes from 1 on.")
    for size in config.scaling.forecast:
        ranks, batch = data_ranks(config.engine, size), global_batch(config, size)
        if batch % ranks:  # strong scaling: trials of such sizes cost their own row, a forecast all that were measured
            raise UserError(
                f"scaling.forecast={config.scaling.forecast}: {size} processes can't share {batch} sequences a step; "
                "give fewer processes, or a larger train.global_batch_size."
            )
    on_gpu = torch.cuda.is_available() and config.hardware.device is not Device.cpu
    if on_gpu and max(config.scaling.world_sizes) > torch.cuda.device_count():
        raise UserError(
            f"scaling.world_sizes={config.scaling.world_sizes}: this host has {torch.cuda.device_count()} GPUs; "
            "give fewer processes."
        )


def measure(
    console: Console,
    config: ScalingRunConfig,
    overrides: list[str],
    engine: str,
    world_size: int,
    folder: Path,
    cards: Sequence[str] = (),
) -> Row:
    """One trial, or one on each of `cards` at the same time; its efficiency comes with the other rows."""
    steps = config.scaling.steps
    batch = global_batch(config, world_size)
    label = f"{engine} on {world_size}"
    sizes = [f"train.global_batch_size={batch}", *micro_batch(config, world_size)]
    given = [*overrides, *sizes, f"engine={engine}", f"logging.group=scaling-{config.name}"]
    nothing = Row(engine, world_size, batch, *[None] * 6)
    name = f"{engine}_{world_size}"
    with console.status(label) as status:
        on_step = partial(show_step, status, label, steps)
        if cards:
            folders = {card: folder / f"{name}_card_{rank}" for rank, card in enumerate(cards)}
            row = row_of_cards(nothing, run_on_cards(given, folders, steps=steps, on_step=on_step))
        else:
            try:
                trial = run_trial(given, folder / name, steps=steps, world_size=world_size, on_step=on_step)
                row = replace(nothing, problem=NO_ROOM) if trial is None else row_of_trial(nothing, trial)
            except UserError as error:
                row = replace(nothing, problem=str(error))
    report_row(console, row)
    return row


def report_row(console: Console, row: Row) -> None:
    """What came out of a trial, in a line, and one for each GPU that has no figure."""
    label = f"{row.engine} on {row.world_size}"
    if row.tokens_per_s is None:
        console.print(f"{label}: {row.problem}", markup=False, soft_wrap=True)
        return
    said = speed_and_time(row.tokens_per_s, row.start_s, row.wall_s)
    console.print(f"{label}: {said}{of_cards(row)}", soft_wrap=True)
    for card, problem in (row.cards_problems or {}).items():
        console.print(f"{label}, GPU {card}: {problem}", markup=False, soft_wrap=True)


def of_cards(row: Row) -> str:
    """`, the median of 4 GPUs from 24,100 to 24,900`; empty where one was measured."""
    speeds = [speed for speed in (row.cards_tokens_per_s or {}).values() if speed]
    return f", the median of {len(speeds)} GPUs from {min(speeds):,.0f} to {max(speeds):,.0f}" if speeds else ""


def row_of_trial(row: Row, trial: Trial) -> Row:
    """The row with what a trial measured."""
    return replace(
        row,
        tokens_per_s=trial.tokens_per_s,
        step_time_s=trial.step_time_s,
        mfu=trial.mfu,
        mfu_causal=trial.mfu_causal,
        peak_memory_gb=trial.peak_memory_gb,
        start_s=trial.start_s,
        wall_s=trial.wall_s,
    )


def row_of_cards(row: Row, outcomes: Mapping[str, Trial | UserError | None]) -> Row:
    """The row of one process from its trials on several GPUs, by name.

    Speeds are medians over those that were measured, memory is the largest, and the times until the first step and
    until the end are those of the last GPU. Where none was measured the row has the first one's `problem`.
    """
    trials = {card: outcome for card, outcome in outcomes.items() if isinstance(outcome, Trial)}
    problems = {card: str(outcome or NO_ROOM) for card, outcome in outcomes.items() if card not in trials}
    if not trials:
        return replace(row, problem=next(iter(problems.values())))
    found = list(trials.values())

    def median(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    return replace(
        row,
        tokens_per_s=median([trial.tokens_per_s for trial in found]),
        step_time_s=median([trial.step_time_s for trial in found]),
        mfu=median([trial.mfu for trial in found]),
        mfu_causal=median([trial.mfu_causal for trial in found]),
        peak_memory_gb=max(trial.peak_memory_gb for trial in found),
        start_s=max((trial.start_s for trial in found if trial.start_s is not None), default=None),
        wall_s=max((trial.wall_s for trial in found if trial.wall_s is not None), default=None),
        cards_tokens_per_s={card: trials[card].tokens_per_s if card in trials else None for card in outcomes},
        cards_problems=problems,
    )


def predict(config: ScalingRunConfig, overrides: list[str], rows: Sequence[Row], link: Link, folder: Path) -> list[Row]:
    """The rows with their predictions, and those of `scaling.forecast`."""
    result: list[Row] = []
    for engine in dict.fromkeys(row.engine for row in rows):
        measured = [row for row in rows if row.engine == engine]
        alone = next((row.tokens_per_s for row in measured if row.world_size == 1 and row.tokens_per_s), None)
        if alone is None:
            result += measured
            continue
        settings = compose([*overrides, f"engine={engine}"])
        settings.model.vocab_size = settings.model.vocab_size or vocabulary_of(folder)
        network = config.scaling.network_gb_per_s or link.gb_per_s
        cluster = Cluster(alone, link.gb_per_s, network, link.world_size, link.latency_us)
        further = [Row(engine, size, global_batch(config, size), *[None] * 6) for size in config.scaling.forecast]
        result += [predicted(config, settings, row, cluster) for row in [*measured, *further]]
    return result


def predicted(config: ScalingRunConfig, settings: RunConfig, row: Row, cluster: Cluster) -> Row:
    """The row with what the forecast says of it; as it is where its batch can't be shared among so many."""
    ranks, micro = data_ranks(settings.engine, row.world_size), micro_batch_size(config, row.world_size)
    if row.global_batch_size < ranks or row.global_batch_size % (ranks * micro):
        return row
    on_gpu = torch.cuda.is_available() and config.hardware.device is not Device.cpu
    precision = resolve_precision(settings.engine.precision, torch.device("cuda" if on_gpu else "cpu"))
    element_bytes = ELEMENT_BYTES[precision]
    job = Job(
        model=settings.model,
        engine=settings.engine,
        element_bytes=element_bytes,
        micro_batch_size=micro,
        accumulation_steps=row.global_batch_size // ranks // micro,
        world_size=row.world_size,
        overlapped=settings.engine.overlap_comm and on_gpu,
        copied=on_gpu and copies(settings.engine, element_bytes, row.world_size, cluster.node_size),
    )
    found = forecast(job, cluster)
    return replace(
        row,
        predicted_step_time_s=found.step_time_s,
        predicted_efficiency=found.efficiency,
        predicted_exposed_s=found.exposed_s,
        bytes_per_step=found.traffic.total,
    )


def vocabulary_of(folder: Path) -> int:
    """Tokens of the vocabulary that the trials in `folder` took from their corpus, which all of them share."""
    from tokenizers import Tokenizer

    found = next(folder.glob(f"*/{TOKENIZER}"), None)
    if found is None:
        raise UserError(f"No trial's {TOKENIZER} lies in {folder}, which predictions need: give model.vocab_size.")
    return int(Tokenizer.from_file(str(found)).get_vocab_size())


def show_step(status: Status, label: str, steps: int, done: int) -> None:
    """Progress of a trial on the terminal."""
    status.update(f"{label}: {done} of {steps} steps")


def global_batch(config: ScalingRunConfig, world_size: int) -> int:
    """Sequences a step: what the config says for its first number of processes, times the growth if that is wanted."""
    first = config.scaling.world_sizes[0]
    size = resolve_batch(config.train, data_ranks(config.engine, first)).global_batch_size
    if config.scaling.strong:
        return size
    if size * world_size % first:
        raise UserError(f"{size} sequences on {first} processes can't be scaled to {world_size}: change the batch.")
    return size * world_size // first


def micro_batch(config: ScalingRunConfig, world_size: int) -> list[str]:
    """Batch keys of a trial; accumulation follows from the rest."""
    return [f"train.micro_batch_size={micro_batch_size(config, world_size)}", "train.accumulation_steps=null"]


def micro_batch_size(config: ScalingRunConfig, world_size: int) -> int:
    """Sequences: those of the first number of processes, so that the matrix products stay the same."""
    first = data_ranks(config.engine, config.scaling.world_sizes[0])
    micro = resolve_batch(config.train, first).micro_batch_size
    share = global_batch(config, world_size) // data_ranks(config.engine, world_size)
    while share % micro:  # strong scaling can leave less than a micro-batch to a rank
        micro -= 1
    return micro


def table_of(rows: Sequence[Row], strong: bool, kept: Collection[tuple[str, int]] = ()) -> Table:
    """The rows for a terminal; `kept` are the (engine, processes) of earlier calls."""
    old = [f"{row.engine} on {row.world_size}" for row in rows if (row.engine, row.world_size) in kept]
    title = f"{'Strong' if strong else 'Weak'} scaling (medians; MFU counts attention in full / causally)"
    caption = f"Kept from earlier calls: {', '.join(old)}" if old else None
    table = Table(title=title, caption=caption, caption_justify="left")
    by_card = any(row.cards_tokens_per_s for row in rows)
    speed = "tokens/s\n(slowest to\nfastest GPU)" if by_card else "tokens/s"
    efficiencies = ("efficiency", "of slowest") if by_card else ("efficiency",)
    for heading in ("engine", "processes", "batch", speed, "step", "MFU", "memory", *efficiencies, "predicted"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")

    def text(value: float | None, pattern: str) -> str:
        return "-" if value is None else pattern.format(value)

    for row in rows:
        table.add_row(
            row.engine,
            str(row.world_size),
            str(row.global_batch_size),
            text(row.tokens_per_s, "{:,.0f}") + extremes(row),
            text(row.step_time_s and row.step_time_s * 1e3, "{:,.1f} ms"),
            f"{text(row.mfu, '{:.1%}')} / {text(row.mfu_causal, '{:.1%}')}",
            text(row.peak_memory_gb, "{:.2f} GB"),
            text(row.efficiency, "{:.1%}"),
            *([text(row.efficiency_slowest, "{:.1%}")] if by_card else []),
            predicted_text(row),
        )
    return table


def extremes(row: Row) -> str:
    """A line of `(24,100 to 24,900)`: the slowest and the fastest GPU by itself; empty where one was measured."""
    speeds = [speed for speed in (row.cards_tokens_per_s or {}).values() if speed]
    return f"\n({min(speeds):,.0f} to {max(speeds):,.0f})" if speeds else ""


def predicted_text(row: Row) -> str:
    """`123.4 ms, 97.1%`."""
    if row.predicted_step_time_s is None:
        return "-"
    return f"{row.predicted_step_time_s * 1e3:,.1f} ms, {row.predicted_efficiency:.1%}"


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Tokens/s over the number of processes, one line an engine, and what perfect scaling of the first would be: over
    its first row, and over the slowest of as many GPUs."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.tokens_per_s:
            lines.setdefault(row.engine, []).append((row.world_size, row.tokens_per_s))
    first = next(iter(lines), None)
    sizes: list[Any] = sorted({row.world_size for row in rows})
    if first is not None:
        size, speed = lines[first][0]
        lines[PERFECT] = [(s, s * speed / size) for s in sizes]
        alone = next((row for row in rows if row.engine == first and row.world_size == 1), None)
        slowest = [(s, s * rate) for s in sizes if alone is not None and (rate := slowest_of(alone, s))]
        if slowest:
            lines[SLOWEST] = slowest
    lines = {name: sorted(points) for name, points in lines.items()}
    dashed = (PERFECT, SLOWEST)
    draw_lines(path, lines, xticks=sizes, xlabel="processes", ylabel="tokens/s", title=title, dashed=dashed)


if __name__ == "__main__":
    launch(main, "scaling")
