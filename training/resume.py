"""Where a run goes on from, and what the user is told about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import UserError
from configs.schema import EngineConfig, RunConfig, TrainConfig
from data import PreparedData, TokenLoader
from training import checkpoint
from training.batch import data_ranks, resolve_batch
from training.checkpoint import Manifest
from training.console import Terminal, short_path
from training.differences import Difference, compare_configs
from training.distributed import Processes
from training.engine import Engine
from training.run import RunFolder, has_saved
from training.state import TrainState

T = TypeVar("T")
MAX_DIFFERENCES = 12
"""Differing keys that are listed one by one."""
SAMPLE_KEYS = ("model.sequence_length", "data.packing")
"""They say what a sample is: with others, so many samples are another place in the corpus."""
BATCH = "train.global_batch_size"
"""Sequences a step; left out, they follow from the micro-batch and the ranks."""
DIVISION = "data.shard_tokens"
"""Where the corpus is divided into shards, by which its hash goes."""


@dataclass(frozen=True)
class Start:
    """Where a run begins, or goes on."""

    state: TrainState
    origin: Path | None = None
    """The checkpoint that the engine has the weights of. None: those it was made with."""


def resume_path(config: RunConfig, folder: RunFolder) -> Path | None:
    """What `resume` means: a folder to look for checkpoints in, or None to start anew.

    Raises `UserError` for a path that isn't there.
    """
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return folder.checkpoints
    path = Path(config.resume).expanduser()
    if not path.exists():
        raise UserError(
            f"resume={config.resume} does not exist: give a checkpoint (runs/NAME/checkpoints/step_...), "
            "a run folder, resume=auto or resume=never."
        )
    return path


def finds_checkpoint(config: RunConfig, folder: RunFolder, processes: Processes) -> bool:
    """Whether there is a checkpoint where `resume` looks, so that the run goes on from one or ends with an error: then
    nobody needs initial weights. Collective.

    Raises `UserError` as `resume_path` does.
    """
    path = resume_path(config, folder)
    return processes.broadcast(processes.is_main and path is not None and bool(checkpoint.candidates(path)))


def begins_elsewhere(config: RunConfig, folder: RunFolder) -> bool:
    """Whether `resume` names a checkpoint outside the run's own folder."""
    path = Path(config.resume).expanduser().resolve()
    return config.resume not in ("auto", "never") and folder.path.resolve() not in (path, *path.parents)


def on_restart(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The config of a run that its launcher starts again: `resume` says where the first start begins, and the later
    ones go on from what the run has saved since, if it has."""
    return replace(config, resume="auto") if has_saved(folder) else config


def resume(
    engine: Engine,
    config: RunConfig,
    folder: RunFolder,
    corpus: PreparedData,
    loader: TokenLoader,
    terminal: Terminal,
    *,
    drawn: bool = True,
) -> Start:
    """Load what `resume` says into the engine; where to go on, at step 0 if there is nothing. Collective.

    `drawn`: whether the engine has initial weights to begin with (`finds_checkpoint`).

    A run that begins from another's checkpoint is one of its own in wandb.

    Tells whether the corpus is another one, which checkpoints were damaged, and which keys differ from those the
    checkpoint was trained with. Where samples are others than the checkpoint's, the position is that of `loader` after
    as many tokens. Raises `CheckpointError` or `UserError` if there is something but it can't be used.
    """
    path = resume_path(config, folder)
    loaded = None if path is None else checkpoint.load(engine, path, tokenizer_hash=corpus.tokenizer_hash)
    if loaded is None:
        if config.resume not in ("auto", "never"):
            raise UserError(f"resume={config.resume}: there is no checkpoint in it. Give another path, or resume=auto.")
        if not drawn:
            raise UserError(f"resume={config.resume}: the checkpoints in {path} went while the run began. Start again.")
        return Start(TrainState(corpus_hash=corpus.content_hash))
    for message in loaded.messages:
        terminal.warn(message)
    terminal.say(f"Going on from {short_path(loaded.path)}, {loaded.state.step:,} steps done.")
    state = loaded.state
    differences: list[Difference] = []
    if state.step > 0:  # a checkpoint of step 0 is an imported model, of which nothing has to stay
        differences = compare_configs(loaded.manifest.config, config)
        differences = judged(with_batch(differences, loaded.manifest, config, engine.processes.world_size), corpus)
    report_differences(differences, loaded.path, terminal)
    if any(difference.key in SAMPLE_KEYS for difference in differences):
        state = replace(state, consumed_samples=loader.position_after(state.tokens_seen))
        report_position(loaded.state, state, config, terminal)
    if state.corpus_hash not in (None, corpus.content_hash):
        if only_divided(differences):
            terminal.say("  the corpus is in other shards, so that its hash can't be compared with the checkpoint's")
        else:
            terminal.warn(
                "the corpus differs from the one of the checkpoint: its position, "
                f"{state.consumed_samples:,} samples, now means other text"
            )
    wandb_id = None if begins_elsewhere(config, folder) else state.wandb_id
    return Start(replace(state, corpus_hash=corpus.content_hash, wandb_id=wandb_id), loaded.path)


def with_batch(differences: list[Difference], saved: Manifest, config: RunConfig, world_size: int) -> list[Difference]:
    """The same differences, but of the global batch as it comes out: where other keys decide it, it is another on other
    ranks though no key differs, and may be the same though the keys do."""
    engine = from_plain(EngineConfig, saved.config["engine"])
    train = from_plain(TrainConfig, saved.config["train"])
    before = resolve_batch(train, data_ranks(engine, saved.world_size)).global_batch_size
    now = resolve_batch(config.train, data_ranks(config.engine, world_size)).global_batch_size
    others = [difference for difference in differences if difference.key != BATCH]
    return others if before == now else [Difference(BATCH, before, now, matters=True), *others]


def from_plain(kind: type[T], values: Mapping[str, Any]) -> T:
    """A section of a checkpoint's config; keys younger than it have their defaults, as then."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in values.items() if key in known})


def judged(differences: list[Difference], corpus: PreparedData) -> list[Difference]:
    """The same differences; `data.shard_tokens` matters where a document doesn't fit into a shard, which cuts it."""

    def look(difference: Difference) -> Difference:
        if difference.key != DIVISION:
            return difference
        longest = max(int(split.document_lengths().max(initial=0)) for split in (corpus.train, corpus.validation))
        return replace(difference, matters=longest >= min(difference.saved, difference.current))

    return sorted(map(look, differences), key=lambda difference: not difference.matters)


def only_divided(differences: list[Difference]) -> bool:
    """Whether the corpus is the same text in other shards, as far as the config says."""
    of_data = {difference.key: difference.matters for difference in differences if difference.key.startswith("data.")}
    return DIVISION in of_data and not any(of_data.values())


def report_position(saved: TrainState, now: TrainState, config: RunConfig, terminal: Terminal) -> None:
    """Say where a run with other samples goes on."""
    again = "; data.shuffle orders them anew: some text of this epoch comes again, some not at all"
    terminal.warn(
        f"the {saved.tokens_seen:,} tokens seen were {saved.consumed_samples:,} samples, and count as "
        f"{now.consumed_samples:,} of the samples now{again if config.data.shuffle else ''}"
    )


def report_differences(differences: list[Difference], path: Path, terminal: Terminal) -> None:
    """Say what differs from the checkpoint at `path`; keys that change what is trained come first, as warnings."""
    for difference in differences[:MAX_DIFFERENCES]:
        text = f"{difference.key} was {difference.saved}, is {difference.current}"
        if difference.matters:
            terminal.warn(f"{text}: the run goes on differently from how it would have")
        else:
            terminal.say(f"  {text}: changes rounding, speed or output at most")
    if len(differences) > MAX_DIFFERENCES:
        more = len(differences) - MAX_DIFFERENCES
        terminal.say(f"  ... and {more} more keys: compare config.yaml with {short_path(path)}/manifest.json")
