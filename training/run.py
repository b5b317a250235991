"""A run's folder: what lies in it, who may write to it, and what becomes of an earlier run there.

runs/<name>/
  config.yaml      the resolved config
  metrics.jsonl    one object per logged step
  curves.png       loss and MFU
  tokenizer.json   what text became tokens by, and in tokenizer_config.json the separator of documents
  checkpoints/     step_XXXXXXXX/, the pointer `latest`, and what a run that went back has left in abandoned/N/
  wandb/           wandb's own files
  run.log          everything that libraries said, and tracebacks
  .start           the launcher's first start of the run; see `is_restart`
  previous/N/      what `resume=never` found here and moved aside, and the record of a run whose checkpoints are gone
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from configs.errors import UserError
from configs.messages import plain
from configs.schema import RunConfig

LOG = logging.getLogger(__name__)
TOKENIZER = "tokenizer.json"
POINTER = "latest"
"""In `checkpoints`: names the newest one."""
WATERFALL = ("waterfall.json", "waterfall.png", "ranks.png", "trace.json.gz")
RECORD = ("metrics.jsonl", "curves.png", *WATERFALL)
"""What of it tells of the steps that were done."""
OURS = ("config.yaml", *RECORD, TOKENIZER, "tokenizer_config.json", "checkpoints", "wandb", "run.log")
"""What a run writes; anything else in the folder is the user's and stays."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def new_config(self) -> Path:
        """The config of a start that has not yet gone on from what is here."""
        return self.path / "config.yaml.tmp"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def start(self) -> Path:
        """The launcher's names for the first of the starts that it makes of a run; see `is_restart`."""
        return self.path / ".start"


def run_folder(config: RunConfig) -> RunFolder:
    """The folder that `run_dir` or `name` says, as an absolute path."""
    return RunFolder(Path(config.run_dir or Path("runs") / config.name).expanduser().resolve())


@contextmanager
def claim(folder: RunFolder, resume: str, start: Mapping[str, str] | None = None) -> Iterator[bool]:
    """Make the folder and hold it against other processes; with `resume=never` move an earlier run aside first.

    `start`: `training.distributed.start_of`. Gives whether a launcher starts again the run that is here: then it isn't
    an earlier one. Only the first rank calls this. Raises `UserError` where the folder can't be written or another run
    holds it.
    """
    with writing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = open(folder.path / ".lock", "a+b", buffering=0)  # noqa: SIM115 - held for the whole run
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().decode().strip() or "unknown"
            raise UserError(
                f"Another run (process {owner}) is writing to {folder.path}: wait for it, or give run_dir=PATH."
            ) from None
        except OSError as error:  # Lustre without its mount option `flock`, and some of user space
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            LOG.warning(f"{folder.path} has no locks ({error.strerror}): nothing keeps a second run out of it")
        again = is_restart(folder, start or {})
        with writing(folder.path):
            lock.truncate(0)
            lock.write(str(os.getpid()).encode())
            if resume == "never" and not again:
                move_aside(folder)
            if not again:
                folder.start.write_text(json.dumps({**(start or {}), POINTER: pointer_state(folder)}))
        yield again


def is_restart(folder: RunFolder, start: Mapping[str, str]) -> bool:
    """Whether the launcher of `start` has started the run in the folder before: the same torchrun, or the same SLURM
    job before it was queued again."""
    try:
        first = json.loads(folder.start.read_text())
    except (OSError, ValueError):  # no start yet, or a kill while it was noted
        return False
    if "torchrun" in start and start["torchrun"] == first.get("torchrun"):
        return True
    same_job = "slurm_job" in start and start["slurm_job"] == first.get("slurm_job")
    return same_job and start["slurm_restarts"] != first.get("slurm_restarts")


def has_saved(folder: RunFolder) -> bool:
    """Whether the run of a launcher that starts it again has saved since the first of these starts."""
    first = json.loads(folder.start.read_text())
    return pointer_state(folder) not in (None, first.get(POINTER))


def pointer_state(folder: RunFolder) -> str | None:
    """Which file the pointer is and what it says, to be compared: its age alone would be wrong once a clock is set."""
    pointer = folder.checkpoints / POINTER
    if not pointer.is_file():
        return None
    status = pointer.stat()
    return f"{pointer.read_text().strip()} {status.st_ino} {status.st_mtime_ns}"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what a disk or its permissions refuse into a `UserError` that names `folder`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"run_dir {folder} can't be written: {error.strerror}. Give run_dir=PATH.") from error


def move_aside(folder: RunFolder, names: Sequence[str] = OURS) -> Path | None:
    """Move what an earlier run wrote into `previous/<n>/`, the next free number. Returns that folder, or None."""
    found = [folder.path / name for name in names if (folder.path / name).exists()]
    if not found:
        return None
    target = folder.path / "previous" / str(next_number(folder.path / "previous"))
    target.mkdir(parents=True)
    for path in found:
        path.rename(target / path.name)
    return target


def next_number(folder: Path) -> int:
    """The number after the highest that is the name of something in the folder; 1 where there is none."""
    return 1 + max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def write_config(folder: RunFolder, config: RunConfig) -> None:
    """Write the resolved config, for `keep_config` to put in place; where the run will save, see now that it can."""
    with writing(folder.path):
        folder.new_config.write_text(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
    if config.train.save_every:
        with writing(folder.checkpoints):
            folder.checkpoints.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder.checkpoints) as probe:
                probe.write(b"checkpoint")
                probe.flush()


def keep_config(folder: RunFolder) -> None:
    """From here on config.yaml is that of this start. Until it has gone on from what is here, it is that of what is
    here: where the two don't fit, it says what to restore."""
    with writing(folder.path):
        folder.new_config.replace(folder.config)
