"""Hydra's and OmegaConf's errors in the words of this project: the key, what was given, what is possible."""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from configs.errors import UserError


def schema_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all leaves of a dataclass, in order."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from schema_keys(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def leaf_keys(tree: object, prefix: str = "") -> Iterator[str]:
    """Dotted names of all leaves of nested dicts; an empty dict counts as a leaf."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaf_keys(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix


def config_error(error: Exception, folder: Path, schema: type) -> UserError:
    """Turn a composition error into a `UserError` of a few lines."""
    text = "\n".join(str(e) for e in _chain(error))
    return UserError(_missing_option(text, folder) or _unknown_key(text, schema) or _wrong_value(text) or _plain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _closest(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if not close:  # a right leaf under a wrong section: `steps` or `optim.steps` for `train.steps`
        leaf = word.rsplit(".", 1)[-1]
        close = [w for w in words if w.rsplit(".", 1)[-1] == leaf][:1]
    return f" Did you mean '{close[0]}'?" if close else ""


def _missing_option(text: str, folder: Path) -> str | None:
    if re.search(r"Could not (?:find|load) 'hydra/launcher/submitit_slurm'", text):
        return "hydra/launcher=slurm needs the package hydra-submitit-launcher: pip install -e '.[slurm]'"
    match = re.search(r"Could not (?:find|load) '([\w-]+)/([^']+)'", text)
    if not match or not (folder / match[1]).is_dir():
        return None
    group, option = match.groups()
    options = sorted(path.stem for path in (folder / group).glob("*.yaml"))
    listing = textwrap.fill(", ".join(options), width=100, initial_indent="  ", subsequent_indent="  ")
    return f"There is no {group} '{option}'.{_closest(option, options)}\nPossible are:\n{listing}"


def _unknown_key(text: str, schema: type) -> str | None:
    match = re.search(r"Key '[^']*' not in '[^']*'\s+full_key: (\S+)", text) or (
        re.search(r"Could not override '([^']+)'", text)
        if "is not in struct" in text or "No match in the defaults list" in text
        else None
    )
    if not match:
        return None
    return unknown_key(match[1].split("@")[0], schema)


def unknown_key(key: str, schema: type) -> str:
    """The message for a key that the schema does not have."""
    keys = list(schema_keys(schema))
    groups = ["experiment", *dict.fromkeys(k.split(".")[0] for k in keys if "." in k)]
    if key in groups:
        example = next((f" or one key ({k}=)" for k in keys if k.startswith(key + ".")), "")
        return f"'{key}' is a group of keys: give one of its options ({key}=NAME){example}."
    hint = _closest(key, [*groups, *keys])
    return f"Unknown key '{key}'.{hint} All keys: --cfg job; their meaning: configs/schema.py."


def _wrong_value(text: str) -> str | None:
    key = re.search(r"full_key: (\S+)", text)
    if not key:
        return None
    noise = ("Error merging override", " ")
    reason = next((line for line in text.splitlines() if line and not line.startswith(noise)), "wrong type")
    return f"Wrong value for '{key[1]}': {'it cannot be null' if 'is not Optional' in reason else reason}"


def _plain(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("See https")]
    return "The command line or a config file can't be read: " + "\n".join(lines[:12])


def plain(value: Any) -> Any:
    """Dataclasses, mappings, enums and lists as plain JSON and YAML values: `config.yaml`, wandb, checkpoints."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value
