"""Where metrics go: metrics.jsonl in the run folder, and wandb.

**metrics.jsonl** is the run's own record: one JSON object a logged step, flushed at once. After a resume the lines past
the resumed step are dropped, so that the file is the history of one run, as if nothing had happened in between.

**wandb** is a guest: it is imported here only, tells the user nothing itself, and can't stop a run. With
`logging.wandb=auto` it is online if there is a key and its server answers within `logging.wandb_timeout_s`, and offline
otherwise. If it fails later, it is switched off and the run goes on. wandb drops what arrives with a smaller internal
step than it has seen, which is what a run does that goes back to a checkpoint. So our step is a metric of its own that
all others are plotted against, and wandb's internal step only ever grows.
"""

from __future__ import annotations

import contextlib
import errno
import html
import json
import logging
import math
import netrc
import os
import platform
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final, cast

import torch

from configs.errors import UserError
from configs.messages import plain
from configs.schema import LoggingConfig, RunConfig, WandbMode
from data.cpus import available_cpus
from training.run import RunFolder

STEP: Final = "step"
"""Optimizer steps done when the line was logged; the x axis of everything."""
FINISH_TIMEOUT_S: Final = 60.0
"""How long the end of a run waits for uploads to wandb; what is left can be uploaded with `wandb sync`."""

_LOG = logging.getLogger(__name__)
_VERSIONS = ("torch", "triton", "deepspeed", "transformers", "tokenizers", "datasets", "wandb")


def system_info(world_size: int = 1) -> dict[str, Any]:
    """Versions, devices and command of this process, for wandb's config and the log."""
    info: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            info[package] = metadata.version(package)
    info |= {"host": socket.gethostname(), "cpus": available_cpus(), "world_size": world_size, "command": sys.argv[:]}
    if torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        info["cuda"] = torch.version.cuda or torch.version.hip
    return info


class MetricsFile:
    """metrics.jsonl: one object a step, ordered by step, each with `step`.

    Args:
        path: the file; made if it isn't there.
        resume_step: lines of later steps are dropped. 0: the file begins empty.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        rows = [row for row in read_metrics(path) if row[STEP] <= resume_step]
        partial = path.with_suffix(".jsonl.tmp")
        with open(partial, "w") as file:
            file.writelines(_json_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        self._path = path
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - open for the whole run
        self._last: dict[str, Any] = rows[-1] if rows else {STEP: -1}
        size = self._file.seek(0, os.SEEK_END)
        self._last_offset = size - len(_json_line(rows[-1])) if rows else size  # ASCII: characters are bytes
        self._unwritten: list[str] = []
        """Lines that the disk had no room for; the file ends before them."""
        self._refused = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of `step`, to its line if that is the last one. Raises ValueError for an earlier step.

        Lines that can't be written are kept, and written with a later one: a disk that is full for a while costs none,
        and whether the run ends is for its checkpoints to decide.
        """
        if step < self._last[STEP]:
            raise ValueError(f"step {step} comes after step {self._last[STEP]} in {self._file.name}")
        if step == self._last[STEP]:
            self._last |= metrics
            if self._unwritten:
                self._unwritten.pop()
            else:
                self._file.truncate(self._last_offset)
        else:
            self._last = {STEP: step, **metrics}
        self._unwritten.append(_json_line(self._last))
        self._write_out()

    def _write_out(self) -> None:
        """Add the lines that are not in the file yet: all of them, or none."""
        data = "".join(self._unwritten).encode()
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            if not self._refused:
                _LOG.warning(f"{self._path} can't be written: {error.strerror}. Its rows are kept until it can.")
            self._refused = True
            return
        self._last_offset = end + len(data) - len(self._unwritten[-1])
        self._unwritten.clear()

    def close(self) -> None:
        """Write to disk and close."""
        if self._unwritten:
            self._write_out()
        if self._unwritten:
            _LOG.warning(f"{self._path} lacks its last {len(self._unwritten)} rows: there was no room for them.")
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first; none if there is no file.

    A line that a crash cut short is left out, with a warning unless it is the last one.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get(STEP), int):
            rows.append(row)
        elif number < len(lines):
            _LOG.warning(f"{path}:{number} is not a line of metrics and is left out")
    return rows


def _json_line(row: Mapping[str, Any]) -> str:
    """One line of ASCII; NaN and infinity, which JSON doesn't have, become null."""
    finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class RunLogger:
    """The record of a run on rank 0.

    Args:
        folder: the run's folder.
        config: the resolved config; goes to wandb whole.
        resume_step: the step of the checkpoint that the run goes on from. 0: a new run.
        wandb_id: the wandb run of that checkpoint. None: a new one.
        info: more for wandb's config, such as `system_info()`, parameter counts, the peak.
        enabled: True on rank 0. Elsewhere nothing is opened and every method does nothing.

    Raises:
        UserError: `logging.wandb=online`, and there is no key or the server can't be reached.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        *,
        resume_step: int = 0,
        wandb_id: str | None = None,
        info: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ) -> None:
        self.wandb_id: str | None = wandb_id
        """The wandb run, for the checkpoint; on ranks other than 0 what was given."""
        self.wandb_note = ""
        """Where wandb's data go, in one line for the user."""
        self._metrics: MetricsFile | None = None
        self._wandb: _WandbRun | None = None
        if not enabled:
            return
        self._metrics = MetricsFile(folder.metrics, resume_step)
        self._wandb, self.wandb_note = _start_wandb(folder, config, resume_step, wandb_id, info or {})
        if self._wandb is not None:
            self.wandb_id = self._wandb.id

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Record `metrics` (keys of `training.metrics`) of `step`; None is left out. Steps don't go back.

        A second call for the same step adds to the same line.
        """
        known = {key: value for key, value in metrics.items() if value is not None}
        if self._metrics is not None:
            self._metrics.write(step, known)
        if self._wandb is not None:
            self._wandb.log(step, known)

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        """Show a sampled text (`text` goes on from `prompt`) in wandb under `samples/text`."""
        if self._wandb is not None:
            body = f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>"
            self._wandb.log_media(step, "samples/text", lambda wandb: wandb.Html(body, data_is_not_path=True))

    def log_image(self, step: int, key: str, path: Path) -> None:
        """Show a picture file, such as curves.png, in wandb under `key`."""
        if self._wandb is not None:
            self._wandb.log_media(step, key, lambda wandb: wandb.Image(str(path)))

    def finish(self, exit_code: int = 0) -> None:
        """Close the file and end the wandb run, waiting at most `FINISH_TIMEOUT_S` for uploads. Can be called twice."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._wandb is not None:
            self._wandb.finish(exit_code)
            self._wandb = None


class _WandbRun:
    """A wandb run that fails quietly: the first error switches it off, with one warning."""

    def __init__(self, run: Any, folder: Path, resume_step: int) -> None:
        self.id: str = run.id
        self._run: Any = run
        self._state = folder / "last_step.json"  # survives a kill; wandb's own counter starts anew when offline
        self._internal_step = max(resume_step or -1, self._read_state(), int(run.step or 0) - 1)
        self._last_logged: int | None = None
        self._guard(self._define_axes)

    def _define_axes(self) -> None:
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._guard(lambda: self._log(step, values))

    def log_media(self, step: int, key: str, make: Callable[[Any], Any]) -> None:
        import wandb

        self._guard(lambda: self._log(step, {key: make(wandb)}))

    def finish(self, exit_code: int) -> None:
        """End the run; a server that doesn't answer is left behind after `FINISH_TIMEOUT_S`."""
        run, self._run = self._run, None
        if run is None:
            return
        failures: list[str] = []
        thread = _in_thread(lambda: run.finish(exit_code=exit_code), failures)
        thread.join(FINISH_TIMEOUT_S + 5)
        if thread.is_alive():
            failures.append(f"still uploading after {FINISH_TIMEOUT_S:.0f} s; `wandb sync` uploads the rest")
        if failures:
            _LOG.warning(f"wandb: {failures[0]}")

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        # Equal to our step in a run that never went back; what is logged twice for a step shares its row.
        internal = max(step, self._internal_step + (step != self._last_logged))
        self._run.log({STEP: step, **values}, step=internal)
        if internal != self._internal_step:
            self._internal_step = internal
            self._state.write_text(json.dumps({"id": self.id, "internal_step": internal}))
        self._last_logged = step

    def _read_state(self) -> int:
        try:
            state = json.loads(self._state.read_text())
        except (OSError, json.JSONDecodeError):  # a new run, or a kill while it was written
            return -1
        return int(state["internal_step"]) if state.get("id") == self.id else -1

    def _guard(self, action: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever happens in wandb, the run goes on
            self._run = None
            _LOG.warning(f"wandb failed and is off from now on; metrics.jsonl goes on: {_one_line(error)}")
            _LOG.info("wandb's failure", exc_info=True)


def _start_wandb(
    folder: RunFolder, config: RunConfig, resume_step: int, wandb_id: str | None, info: Mapping[str, Any]
) -> tuple[_WandbRun | None, str]:
    """Begin or go on with a wandb run: (run, note for the user)."""
    mode = _wanted_mode(config.logging)
    if mode is WandbMode.disabled:
        return None, ""
    started = time.monotonic()
    reason = ""
    if mode is not WandbMode.offline:
        reason = _why_not_online(config.logging.wandb_timeout_s / 2)
        left_s = config.logging.wandb_timeout_s - (time.monotonic() - started)
        if not reason:
            run, reason = _init("online", folder, config, wandb_id, info, max(left_s, 1.0))
            if run is not None:
                return _WandbRun(run, folder.wandb, resume_step), f"online: {run.url}"
        if mode is WandbMode.online:
            raise UserError(f"logging.wandb=online, but {reason}. logging.wandb=auto would go on offline.")
    run, failure = _init("offline", folder, config, wandb_id, info, config.logging.wandb_timeout_s)
    if run is None:
        _LOG.warning(f"wandb is off: {failure}")
        return None, f"off: {failure}"
    because = f" ({reason})" if reason else ""
    upload = f"wandb sync {Path(os.path.relpath(folder.wandb)) / f'offline-run-*-{run.id}'}"
    return _WandbRun(run, folder.wandb, resume_step), f"offline{because}; to upload: {upload}"


def _wanted_mode(config: LoggingConfig) -> WandbMode:
    """The config's mode; with `auto`, wandb's own WANDB_MODE if it is set to one."""
    if config.wandb is WandbMode.auto:
        with contextlib.suppress(ValueError):  # "shared" and the like: decide ourselves
            return WandbMode(os.environ.get("WANDB_MODE", "auto"))
    return config.wandb


def _why_not_online(timeout_s: float) -> str:
    """Empty if wandb has a key and its server answers within `timeout_s`; else the reason."""
    try:
        import wandb

        base_url = str(wandb.setup().settings.base_url)
    except Exception as error:  # noqa: BLE001 - a broken installation of wandb is a reason to be offline
        return f"wandb doesn't start: {_one_line(error)}"
    if not _has_key(base_url):
        return "no API key; `wandb login` sets one"
    return _why_unreachable(base_url, timeout_s)


def _has_key(base_url: str) -> bool:
    """Whether wandb will find credentials without asking: in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlsplit(base_url).hostname or ""
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for file in files:
        with contextlib.suppress(OSError, netrc.NetrcParseError):  # no such file, or not one that wandb could read
            if netrc.netrc(os.path.expanduser(file)).authenticators(host) is not None:
                return True
    return False


def _why_unreachable(url: str, timeout_s: float) -> str:
    """Empty if `url` gives any HTTP answer (through the proxy of the environment, if any) in time; else the reason.

    In a thread, since looking up a name can block for longer than any timeout of a socket. The socket's is longer than
    ours, so that silence is always told by the same words.
    """
    failures: list[str] = []

    def ask() -> None:
        with contextlib.suppress(urllib.error.HTTPError):  # an answer, whatever it says
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=2 * timeout_s + 1).close()

    thread = _in_thread(ask, failures)
    thread.join(timeout_s)
    if thread.is_alive():
        return f"{url} doesn't answer within {timeout_s:g} s"
    return f"{url} can't be reached: {failures[0]}" if failures else ""


def _in_thread(action: Callable[[], object], failures: list[str]) -> threading.Thread:
    """Run `action` in a daemon thread; what it raises is added to `failures`."""

    def guarded() -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - handed over as text, the caller decides
            failures.append(_one_line(error))

    thread = threading.Thread(target=guarded, daemon=True, name="wandb-helper")
    thread.start()
    return thread


def _init(
    mode: str, folder: RunFolder, config: RunConfig, wandb_id: str | None, info: Mapping[str, Any], timeout_s: float
) -> tuple[Any, str]:
    """`wandb.init` that takes no longer than `timeout_s`, about: (run, "") or (None, reason)."""
    runs: list[Any] = []
    failures: list[str] = []
    given_up = threading.Event()

    def init() -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True, init_timeout=timeout_s)
        if "finish_timeout" in wandb.Settings.model_fields:  # newer versions: bounds wandb's exit hook too
            settings.finish_timeout = FINISH_TIMEOUT_S
        run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder.path),
            id=wandb_id,
            resume="allow" if mode == "online" else None,  # means nothing offline; `wandb sync` joins runs by their id
            name=config.name,
            project=config.logging.project,
            entity=config.logging.entity,
            group=config.logging.group,
            tags=list(config.logging.tags),
            config={**cast(dict[str, Any], plain(config)), "system": dict(info)},
            settings=settings,
            reinit="finish_previous",
        )
        if given_up.is_set():
            run.finish(exit_code=1)
        runs.append(run)

    thread = _in_thread(init, failures)
    thread.join(timeout_s + 3)
    given_up.set()
    if runs:
        return runs[0], ""
    return None, failures[0] if failures else f"wandb doesn't start within {timeout_s:.0f} s"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
