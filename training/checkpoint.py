"""Checkpoints: exact, by parameter name, and safe against a kill at any moment.

    latest                             the name of the newest committed one
    step_00000500/manifest.json        progress, config; of each shard: size, checksums, parts, host random states
    step_00000500/rank_00000.safetensors
    abandoned/1/step_00000700          what a run that went back to an earlier one has left behind

Every rank writes the parts of fp32 masters and both AdamW moments that it owns, as contiguous ranges of flattened
parameters, so a checkpoint of any ZeRO stage and number of ranks loads into any other, bit for bit; only later sums
differ then by rounding. Nothing is pickled. DeepSpeed's own checkpoints are neither: they move `latest` before all
shards exist, unpickle what they load, and don't change to or from stage 3.

Commit: shards go into `step_….tmp/` and are synced; the ranks agree that all have succeeded; rank 0 writes and syncs
the manifest and the new pointer, renames the folder, and replaces `latest`. Until the rename the previous checkpoint is
the newest.

`snapshot` takes the state; `commit` writes it. `training.saver` puts a copy between them, so that `commit` can run on
another thread, with a process group of its own, while training goes on.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.messages import plain
from training import rng
from training.distributed import Processes
from training.engine import Engine
from training.optimizer import LossScale
from training.run import POINTER, next_number
from training.shards import CorruptError, ShardReader, ShardRecord, TensorRecord, checksum, write_shard
from training.state import TrainState

LOG = logging.getLogger(__name__)
FORMAT = 1
PREFIX, TEMPORARY, MANIFEST = "step_", ".tmp", "manifest.json"
ABANDONED = "abandoned"
MASTER, FIRST, SECOND = "master", "exp_avg", "exp_avg_sq"
NAME = re.compile(rf"{PREFIX}\d+")
KINDS = (MASTER, FIRST, SECOND)
T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint that couldn't be written, found or used; the message says which and why."""


@dataclass
class Shard:
    """What one rank wrote."""

    record: ShardRecord
    parts: dict[str, tuple[int, int]]
    """Parameter → first element and number of elements of its flattened values."""
    host_random: dict[str, Any]
    """Random states of Python and NumPy on that rank."""


@dataclass
class Manifest:
    """All about a checkpoint but the tensors."""

    format: int
    step: int
    created: str
    """UTC, ISO 8601."""
    state: TrainState
    config: dict[str, Any]
    tokenizer_hash: str
    world_size: int
    zero_stage: int
    precision: str
    updates: int
    """Updates AdamW has made; below `step` where steps were skipped."""
    loss_scale: LossScale
    parameters: dict[str, list[int]]
    """Name → shape, in the model's order; shared parameters once."""
    versions: dict[str, str]
    shards: list[Shard] = field(default_factory=list)
    """By rank."""


@dataclass
class Snapshot:
    """One rank's share of the state at a step, ready to be written."""

    manifest: Manifest
    tensors: dict[str, Tensor]
    parts: dict[str, tuple[int, int]]
    host_random: dict[str, Any]


@dataclass
class Loaded:
    """Where a run goes on from."""

    path: Path
    manifest: Manifest
    messages: list[str]
    """What the user should know: damaged checkpoints that were passed over, a changed number of ranks."""

    @property
    def state(self) -> TrainState:
        """Progress to go on with."""
        return self.manifest.state


# Writing


def save(
    engine: Engine,
    state: TrainState,
    folder: Path,
    *,
    tokenizer_hash: str,
    keep_last: int = 0,
    keep_every: int = 0,
) -> Path:
    """Write a checkpoint of all ranks into `folder` (`<run>/checkpoints`) and return its path. Collective.

    Then delete older ones: all but the newest `keep_last` (0: none) and those at multiples of `keep_every` (0: none).
    Raises `CheckpointError` on every rank if one can't write; what was there before stays usable.
    """
    taken = snapshot(engine, state, tokenizer_hash=tokenizer_hash)
    return commit(taken, folder, engine.processes, keep_last=keep_last, keep_every=keep_every)


def snapshot(engine: Engine, state: TrainState, *, tokenizer_hash: str) -> Snapshot:
    """This rank's share of the state; masters and moments are live views, which the next update changes."""
    engine.settle()
    tensors: dict[str, Tensor] = {}
    parts: dict[str, tuple[int, int]] = {}
    for fragment in engine.partition.fragments(owned=True):
        parts[fragment.name] = (fragment.start, fragment.master.numel())
        for kind, tensor in zip(KINDS, (fragment.master, fragment.exp_avg, fragment.exp_avg_sq), strict=True):
            tensors[f"{kind}.{fragment.name}"] = tensor
    random = rng.capture()
    tensors["random.torch_cpu"] = random.torch_cpu
    if random.torch_cuda is not None:
        tensors["random.torch_cuda"] = random.torch_cuda
    return Snapshot(describe(engine, state, tokenizer_hash), tensors, parts, random.host)


def describe(engine: Engine, state: TrainState, tokenizer_hash: str) -> Manifest:
    """The manifest of a checkpoint taken now, without its shards."""
    return Manifest(
        format=FORMAT,
        step=state.step,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        state=TrainState(**asdict(state)),
        config=plain(engine.config),
        tokenizer_hash=tokenizer_hash,
        world_size=engine.processes.world_size,
        zero_stage=engine.config.engine.zero_stage,
        precision=engine.precision.value,
        updates=engine.partition.updates,
        loss_scale=LossScale(**engine.loss_scale.to_json()),
        parameters={name: list(shape) for name, shape in engine.shapes.items()},
        versions={"python": platform.python_version()} | installed("torch", "deepspeed", "flashtrain"),
    )


def installed(*packages: str) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit(
    taken: Snapshot,
    folder: Path,
    processes: Processes,
    *,
    keep_last: int = 0,
    keep_every: int = 0,
    abandoned: Sequence[Path] = (),
    progress: Callable[[], None] | None = None,
) -> Path:
    """Write a snapshot and make it the newest checkpoint of `folder`. Collective over `processes.control`.

    `abandoned` are moved aside before, as soon as nothing more can keep this one from its place. `progress` is called
    after each tensor that is written.
    """
    target = folder / f"{PREFIX}{taken.manifest.step:08d}"
    temporary = folder / (target.name + TEMPORARY)
    on_main = processes.is_main
    try:
        agree(processes, lambda: prepare(temporary) if on_main else None)
        shards = agree(processes, lambda: write_share(taken, temporary, processes.rank, progress))
        taken.manifest.shards = shards
        agree(processes, lambda: publish(taken.manifest, temporary, target, abandoned) if on_main else None)
    except Exception as error:
        if on_main:
            shutil.rmtree(temporary, ignore_errors=True)  # nothing more can be done; the next save removes it
        if not isinstance(error, CheckpointError):
            raise  # a defect here, or a rank that is gone
        raise CheckpointError(f"checkpoint {target} was not written, earlier ones are as they were: {error}") from error
    agree(processes, lambda: rotate(folder, taken.manifest.step, keep_last, keep_every) if on_main else None)
    return target


def agree(processes: Processes, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank; all ranks' results, or on every rank the error of those that failed.

    One that isn't of a disk is a defect, and goes on as it is where it happened; the others wait for no result.
    """
    result, problem, defect = None, None, None
    try:
        result = action()
    except OSError as error:
        problem = f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait in the collective
        problem, defect = f"{type(error).__name__}: {error}", error
    outcomes = processes.gather((result, problem))
    if defect is not None:
        raise defect
    problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text is not None]
    if problems:
        raise CheckpointError("; ".join(problems))
    return [outcome for outcome, _ in outcomes]  # type: ignore[misc]


def prepare(temporary: Path) -> None:
    """An empty folder to write into; what interrupted saves have left beside it goes."""
    remove_temporary(temporary.parent)
    temporary.mkdir(parents=True)


def remove_temporary(folder: Path) -> None:
    """Delete folders of saves and deletions that were interrupted."""
    for stale in folder.glob(f"{PREFIX}*{TEMPORARY}"):
        delete(stale)


def delete(doomed: Path) -> None:
    """Delete a folder that counts as no checkpoint, or say that it stays: that is no reason to end a run. NFS keeps a
    folder as long as another process reads a file of it."""
    try:
        shutil.rmtree(doomed)
    except OSError as error:
        LOG.warning(f"{doomed} can't be deleted: {error.strerror or error}")


def write_share(taken: Snapshot, temporary: Path, rank: int, progress: Callable[[], None] | None = None) -> Shard:
    """Write this rank's shard."""
    path = temporary / f"rank_{rank:05d}.safetensors"
    try:
        return Shard(write_shard(path, taken.tensors, progress), taken.parts, taken.host_random)
    except OSError as error:  # a failed write doesn't know its file
        raise OSError(error.errno, error.strerror, str(path)) from error


def publish(manifest: Manifest, temporary: Path, target: Path, abandoned: Sequence[Path] = ()) -> None:
    """Write the manifest and the new pointer; once both are on the disk, rename the folder and move the pointer.

    Nothing that takes time or room comes between these two: a checkpoint later than the one that the pointer names is
    one of a branch that was given up. Those known as such go before: a kill in between leaves the pointer to one that
    is gone, so that the run goes on from the older ones, those of its own branch.
    """
    write_synced(temporary / MANIFEST, encode(manifest))
    sync_folder(temporary)
    pointer = target.parent / (POINTER + TEMPORARY)
    write_synced(pointer, target.name + "\n")
    move_aside(abandoned)
    if target.exists():  # saved at this step before
        discard(target)
    temporary.rename(target)
    pointer.replace(target.parent / POINTER)
    sync_folder(target.parent)


def move_aside(abandoned: Sequence[Path]) -> None:
    """Move checkpoints into `abandoned/<n>/` beside them, the next free number: what is kept is no more counted by
    them, nor does a run go on from them unless it is told to."""
    if not abandoned:
        return
    place = abandoned[0].parent / ABANDONED
    target = place / str(next_number(place))
    target.mkdir(parents=True)
    for checkpoint in abandoned:
        checkpoint.rename(target / checkpoint.name)
    names = ", ".join(checkpoint.name for checkpoint in sorted(abandoned))
    LOG.warning(
        f"{names}: not of what this run goes on from, so moved to {target}. resume=PATH goes back to them; delete them "
        "if nobody will."
    )


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; interrupted, it leaves a folder that doesn't count as one."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.old{TEMPORARY}")
    checkpoint.rename(doomed)
    delete(doomed)


def rotate(folder: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Delete checkpoints up to `step` but the newest `keep_last` and the multiples of `keep_every`."""
    if keep_last == 0:
        return
    past = sorted((c for c in checkpoints(folder) if step_of(c) <= step), key=step_of)
    for checkpoint in past[:-keep_last]:
        if keep_every == 0 or step_of(checkpoint) % keep_every != 0:
            discard(checkpoint)


def write_synced(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# The manifest as JSON


def encode(manifest: Manifest) -> str:
    """JSON text with a checksum over its content."""
    body = asdict(manifest)
    return json.dumps({"checksum": checksum(canonical(body)), "manifest": body}, indent=1)


def canonical(body: Any) -> bytes:
    """The one spelling of JSON values that checksums are taken of."""
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint. Raises `CorruptError` if it is missing, damaged, or of a newer format."""
    try:
        outer = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        body, noted = outer["manifest"], outer["checksum"]
    except OSError as error:
        raise CorruptError(f"{MANIFEST} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{MANIFEST} isn't what was written: {error}") from error
    if checksum(canonical(body)) != noted:
        raise CorruptError(f"{MANIFEST} isn't what was written")
    if body["format"] != FORMAT:
        raise CorruptError(f"{MANIFEST} has format {body['format']}, this version reads {FORMAT}")
    body["state"] = TrainState(**body["state"])
    body["loss_scale"] = LossScale(**body["loss_scale"])
    body["shards"] = [decode_shard(shard) for shard in body["shards"]]
    return Manifest(**body)


def decode_shard(body: Mapping[str, Any]) -> Shard:
    """A shard's entry of the manifest."""
    record = body["record"]
    tensors = {
        name: TensorRecord(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in record["tensors"].items()
    }
    parts = {name: (start, length) for name, (start, length) in body["parts"].items()}
    return Shard(ShardRecord(**{**record, "tensors": tensors}), parts, body["host_random"])


# Finding


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints of a folder, newest step first."""
    return sorted(filter(is_committed, folder.glob(f"{PREFIX}*")), key=step_of, reverse=True)


def is_committed(path: Path) -> bool:
    """Whether it is a folder with the name of a committed checkpoint."""
    return NAME.fullmatch(path.name) is not None and path.is_dir()


def left_behind(folder: Path, origin: Path | None) -> list[Path]:
    """Checkpoints of `folder` (`<run>/checkpoints`) that aren't among those that lead to `origin`, from which a run
    goes on there: later ones, or all where it lies elsewhere or there is none."""
    if origin is None or origin.resolve().parent != folder.resolve():
        return checkpoints(folder)
    step = read_manifest(origin).step
    return [found for found in checkpoints(folder) if step_of(found) > step]


def candidates(path: Path) -> list[Path]:
    """Checkpoints to try for `path` (a checkpoint, a `checkpoints` folder or a run folder), best first.

    Of a folder: the one `latest` names, the older ones, and at last any with a later step, which a run that went back
    to an earlier checkpoint has left behind.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if folder == path and ((path / MANIFEST).exists() or is_committed(path)):
        return [path]
    found = checkpoints(folder)
    pointer = folder / POINTER
    named = folder / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None
    if named is None or not NAME.fullmatch(named.name):
        return found
    newest = step_of(named)  # also where it is gone
    return [*(c for c in found if step_of(c) <= newest), *(c for c in found if step_of(c) > newest)]


# Loading


def load(engine: Engine, path: Path, *, tokenizer_hash: str | None = None) -> Loaded | None:
    """Put the newest usable checkpoint of `path` into the engine and restore random states. Collective.

    `path` is a run folder, its `checkpoints` folder, or one checkpoint. None: there is no checkpoint at all. A damaged
    one is passed over for the next, with a message. Every rank checks the manifest, the size of all files, and the
    checksums of what it reads.

    Raises `CheckpointError` on every rank if all are damaged, or if one is of another model or tokenizer.
    """
    engine.settle()
    processes = engine.processes
    found = processes.broadcast(candidates(path) if processes.is_main else [])
    messages: list[str] = []
    for checkpoint in found:
        manifest, trouble = None, None
        try:
            manifest = read_into(engine, checkpoint, tokenizer_hash)
        except (CorruptError, CheckpointError) as error:
            trouble = error
        troubles = [(rank, t) for rank, t in enumerate(processes.gather(trouble)) if t is not None]
        mismatch = next((t for _, t in troubles if isinstance(t, CheckpointError)), None)
        if mismatch is not None:
            raise mismatch
        if not troubles:
            assert manifest is not None
            return Loaded(checkpoint, manifest, messages + finish(engine, manifest, checkpoint))
        rank, first = troubles[0]
        messages.append(f"checkpoint {checkpoint} is damaged and was passed over (rank {rank}: {first})")
        LOG.warning(messages[-1])
    if found:
        raise CheckpointError(
            "no usable checkpoint:\n  " + "\n  ".join(messages) + "\nrestore one, or start anew with resume=never"
        )
    return None


def read_into(engine: Engine, checkpoint: Path, tokenizer_hash: str | None) -> Manifest:
    """Read this rank's masters and moments. Local; leaves the engine half-read if it raises."""
    manifest = read_manifest(checkpoint)
    check_model(engine.shapes, manifest, checkpoint)
    if tokenizer_hash is not None and tokenizer_hash != manifest.tokenizer_hash:
        raise CheckpointError(
            f"checkpoint {checkpoint} was trained with another tokenizer ({manifest.tokenizer_hash[:12]}, now "
            f"{tokenizer_hash[:12]}): restore data.* as in its config.yaml, or start anew with resume=never"
        )
    with Parts(checkpoint, manifest) as parts:
        for fragment in engine.partition.fragments(owned=False):
            for kind, tensor in zip(KINDS, (fragment.master, fragment.exp_avg, fragment.exp_avg_sq), strict=True):
                parts.read(kind, fragment.name, fragment.start, tensor)
        saved = random_state(parts, manifest, engine.processes.rank)
    engine.partition.updates = manifest.updates
    if saved is not None:
        rng.restore(saved)
    return manifest


def random_state(parts: Parts, manifest: Manifest, rank: int) -> rng.RandomState | None:
    """The random states this rank had; None if there was no such rank."""
    if rank >= manifest.world_size:
        return None
    reader, shard = parts.readers[rank], manifest.shards[rank]
    cuda = reader.read("random.torch_cuda") if "random.torch_cuda" in shard.record.tensors else None
    return rng.RandomState(reader.read("random.torch_cpu"), cuda, shard.host_random)


def finish(engine: Engine, manifest: Manifest, checkpoint: Path) -> list[str]:
    """Complete a load that succeeded on all ranks; what to tell about it."""
    engine.partition.refresh()
    if engine.precision.value == manifest.precision and engine.loss_scale.dynamic and manifest.loss_scale.dynamic:
        engine.loss_scale = LossScale(**manifest.loss_scale.to_json())  # a fixed one is the config's
    engine.skipped = manifest.state.skipped_steps
    ranks = engine.processes.world_size
    if engine.processes.rank >= manifest.world_size:
        rng.seed_rank(engine.config.seed, engine.processes.rank, manifest.step)
    if ranks == manifest.world_size:
        return []
    return [
        f"{checkpoint.name} was written by {manifest.world_size} ranks, now {ranks}: with the same global batch equal "
        "up to rounding and dropout"
    ]


def check_model(shapes: Mapping[str, tuple[int, ...]], manifest: Manifest, checkpoint: Path) -> None:
    """Raise `CheckpointError` if the checkpoint is of another model."""
    ours = {name: list(shape) for name, shape in shapes.items()}
    if ours == manifest.parameters:
        return
    wrong = [n for n in {**manifest.parameters, **ours} if ours.get(n) != manifest.parameters.get(n)]
    if not wrong:  # only their order differs
        return
    name = wrong[0]
    raise CheckpointError(
        f"checkpoint {checkpoint} is of another model: {len(wrong)} parameters differ, first {name}: "
        f"{manifest.parameters.get(name, 'absent')} there, {ours.get(name, 'absent')} here; "
        "restore model.* as in its config.yaml, or start anew with resume=never"
    )


class Parts:
    """Reads ranges of a checkpoint's flattened parameters, whichever ranks wrote them."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        """Raises `CorruptError` if a shard isn't there or has another size."""
        self.readers = [ShardReader(checkpoint, shard.record) for shard in manifest.shards]
        self.places: dict[str, list[tuple[int, int, ShardReader]]] = {}
        for reader, shard in zip(self.readers, manifest.shards, strict=True):
            reader.check_size()
            for name, (start, length) in shard.parts.items():
                self.places.setdefault(name, []).append((start, length, reader))

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill `out` (n,), on any device, with elements `start` to `start + n` of a master or moment."""
        missing = out.numel()
        for begin, length, reader in self.places.get(name, []):
            low, high = max(start, begin), min(start + out.numel(), begin + length)
            if low < high:
                part = reader.read(f"{kind}.{name}")  # whole: its checksum is
                out[low - start : high - start].copy_(part[low - begin : high - begin])
                missing -= high - low
        if missing:
            raise CorruptError(f"{missing:,} elements of {kind}.{name} are in no shard")

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self.readers:
            reader.close()


# Weights alone, for export, evaluation and sampling


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` (a checkpoint, its folder or a run folder) means. Raises `CheckpointError` if none."""
    found = candidates(path) if path.is_dir() else []
    if not found:
        raise CheckpointError(f"{path}: no checkpoint there; give a run folder or one of its checkpoints/{PREFIX}*")
    return found[0]


def consolidated_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and whole fp32 tensor of each parameter, one in memory at a time, verified; shared parameters once.

    Raises `CheckpointError` if the checkpoint is damaged.
    """
    try:
        manifest = read_manifest(checkpoint)
        with Parts(checkpoint, manifest) as parts:
            for name, shape in manifest.parameters.items():
                weight = torch.empty(shape, dtype=torch.float32)
                parts.read(MASTER, name, 0, weight.view(-1))
                yield name, weight
    except CorruptError as error:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {error}") from error


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copy a checkpoint's weights into a model, in the model's dtype and device. Raises `CheckpointError`."""
    parameters = dict(model.named_parameters())
    try:
        manifest = read_manifest(checkpoint)
    except CorruptError as error:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {error}") from error
    check_model({name: tuple(parameter.shape) for name, parameter in parameters.items()}, manifest, checkpoint)
    for name, weight in consolidated_weights(checkpoint):
        parameters[name].copy_(weight)


def saved_config(checkpoint: Path) -> dict[str, Any]:
    """The config a checkpoint was trained with, as nested JSON values. Raises `CheckpointError` if it is damaged."""
    try:
        return read_manifest(checkpoint).config
    except CorruptError as error:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {error}") from error


__all__ = [
    "CheckpointError",
    "Loaded",
    "Manifest",
    "Snapshot",
    "TrainState",
    "candidates",
    "commit",
    "consolidated_weights",
    "find_checkpoint",
    "left_behind",
    "load",
    "load_weights",
    "read_manifest",
    "save",
    "saved_config",
    "snapshot",
]
