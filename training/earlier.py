"""Reports that grow over several calls of a tool: what an earlier call measured under the same conditions stays.

Conditions are the device's name, the versions, the source that a trial runs, and what the command line and the
environment say of the trials. Where they differ, or with `resume=never`, the earlier report moves to `previous/<n>/`
and the tool starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from configs.errors import UserError
from training.console import short_path
from training.run import RunFolder, move_aside

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("configs", "data", "kernels", "model", "training")
"""Packages that a trial runs, beside train.py."""
OF_THE_MACHINE = ("device", "python", "versions", "cuda")
"""Keys of `training.report.about` that a measurement depends on."""
VARIABLES = ("FLASH_ATTN_PATH", "OMP_NUM_THREADS")
"""Of the environment, which trials inherit: the path of the attention kernels, and a CPU's threads."""
NO_MATTER = ("logging.", "name=", "resume=", "run_dir=", "engine.timeout_minutes=")
"""Overrides that don't change what a trial measures."""

Row = TypeVar("Row")


def conditions(facts: Mapping[str, Any], overrides: Sequence[str], **settings: Any) -> dict[str, Any]:
    """What two measurements must have in common to stand in one table.

    Args:
        facts: `training.report.about` of this call.
        overrides: those that all trials get; their order doesn't count, but the last of a key does.
        settings: of the tool, such as steps a trial.
    """
    given = dict(text.partition("=")[::2] for text in overrides if not text.startswith(NO_MATTER))
    machine = {key: facts[key] for key in OF_THE_MACHINE}
    variables = {name: os.environ.get(name) for name in VARIABLES}
    return {
        **machine,
        "environment": variables,
        "source": source_hash(),
        "overrides": dict(sorted(given.items())),
        **settings,
    }


def source_hash() -> str:
    """A hash of everything that a trial runs and is composed from: rows of changed code are not of one table."""
    files = [path for name in SOURCES for kind in ("*.py", "*.yaml") for path in (ROOT / name).rglob(kind)]
    digest = hashlib.sha256()
    for path in sorted([*files, ROOT / "train.py"]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def take_up(
    console: Console,
    path: Path,
    now: Mapping[str, Any],
    resume: str,
    keep: Callable[[dict[str, Any]], Row | None],
) -> tuple[dict[str, Any], list[Row]]:
    """The earlier report at `path` and its rows that stay; empty where there is none, or it is of other conditions.

    A report with measured rows that don't stay moves aside, with the picture beside it, and the user is told why.

    Args:
        path: the JSON file, with `conditions` and `rows`; a row is measured if it has `tokens_per_s`.
        now: the conditions of this call.
        resume: `auto` or `never`; anything else is a `UserError`.
        keep: a measured row of the same conditions → the tool's row, or None if this call would measure another.
    """
    if resume not in ("auto", "never"):
        raise UserError(f"resume={resume}: this tool goes on in its run folder; give run_dir=PATH, or resume=never.")
    if not path.exists():
        return {}, []
    report = load(path)
    measured = [row for row in report.get("rows", []) if row.get("tokens_per_s") is not None]
    why = reason(report.get("conditions", {}), now, resume)
    kept = [] if why else [row for values in measured if (row := keep(values)) is not None]
    if why or len(kept) < len(measured):
        aside = move_aside(RunFolder(path.parent), (path.name, path.with_suffix(".png").name))
        why = why or f"{len(measured) - len(kept)} of its {len(measured)} rows are of other batches or GPUs"
        console.print(f"{path.name}: {why}; moved to {short_path(aside or path)}", markup=False, soft_wrap=True)
        report = report if kept else {}
    return report, kept


def row_of(kind: type[Row], values: Mapping[str, Any]) -> Row | None:
    """The dataclass `kind` with these values; None if it has other fields by now."""
    return kind(**values) if values.keys() == {field.name for field in fields(kind)} else None  # type: ignore[arg-type]


def load(path: Path) -> dict[str, Any]:
    """The report, or an empty one if the file holds none."""
    try:
        report = json.loads(path.read_text())
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def reason(then: Mapping[str, Any], now: Mapping[str, Any], resume: str) -> str:
    """Why nothing of a report of the conditions `then` stays; empty if it may."""
    if resume == "never":
        return "resume=never"
    if not then:
        return "its conditions are unknown"
    plain = json.loads(json.dumps(now))  # as a file gives it back
    differing = [key + inner(then.get(key), plain[key]) for key in plain if then.get(key) != plain[key]]
    return f"measured with other {', '.join(differing)}" if differing else ""


def inner(then: object, now: object) -> str:
    """` (a, b)`: the keys in which two dicts differ; empty for anything else."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        return ""
    return f" ({', '.join(key for key in {**then, **now} if then.get(key) != now.get(key))})"
