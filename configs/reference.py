"""docs/configuration.md, made of the schema and the YAML tree: `python -m configs.reference > docs/configuration.md`.

`tests/configs/test_reference.py` fails where the page is not what this makes of the code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from configs import CONFIG_FOLDER, SECTIONS, schema
from configs.messages import plain

INTRODUCTION = """\
# Configuration

Every key that `train.py` and the tools in `scripts/` accept. This page is made of `configs/schema.py` and the YAML
files beside it by `python -m configs.reference > docs/configuration.md`; a test fails where they differ. Change the
schema, not the page.

    python train.py optim.lr=1e-3 train.steps=2000        # single keys
    python train.py experiment=llama_1b engine=zero3      # options of groups: YAML files that set several keys
    python train.py --cfg job experiment=llama_1b         # print the composed config, train nothing
    python train.py --multirun seed=1,2,3                 # a sweep

The options of groups are read first, then the experiment, then single keys from the command line: the last one wins.
An experiment may choose options itself; one that the command line names takes the place of its choice, and the
experiment's single keys still hold. The column "default" is the schema's. The default experiment, `quickstart`, and the
default options change some of it: `--cfg job` shows what a run really gets, and so does `config.yaml` in its folder.
`null` is no value; lists are written `[a,b]` (`'...=[a,b]'` in zsh); text with spaces, commas or brackets needs quotes
inside the shell's: `'train.sample_prompt="a, b"'`.

A key that doesn't exist, a value of the wrong type, and keys that contradict each other are errors that name the key
and the remedy, before anything is built; all contradictions are listed at once. `HYDRA_FULL_ERROR=1` shows a traceback.
"""
NOTES = {
    schema.ModelConfig: "The kernels in another model: [attention.md](attention.md).",
    schema.DataConfig: "How a corpus becomes tokens: [data.md](data.md).",
    schema.MixtureSource: "How sources are mixed: [data.md](data.md#mixtures).",
    schema.TrainConfig: "Checkpoints: [checkpoints.md](checkpoints.md). Profiles: [waterfall.md](waterfall.md).",
    schema.EngineConfig: "What each stage sends, and what it costs: [scaling.md](scaling.md).",
    schema.LoggingConfig: "Metrics and wandb: [runs.md](runs.md).",
    schema.HardwareConfig: "What the peak is for: [mfu.md](mfu.md).",
}
ENVIRONMENT = """\
## Environment

| variable | meaning |
|---|---|
| `FLASH_ATTN_PATH` | `auto` (default), `hopper` or `portable`: the attention kernels to take \
([attention.md](attention.md#paths)) |
| `HYDRA_FULL_ERROR` | 1: a traceback instead of a short message for a wrong config |
| `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT` | set by `torchrun` and `deepspeed`; under `srun` \
they are made of SLURM's; without any a run has one process |
| `WANDB_MODE` | wandb's own; holds where `logging.wandb=auto` |
| `WANDB_API_KEY`, `HF_TOKEN`, `HF_HOME` | read by wandb and the Hugging Face libraries, as ever |
"""


def page() -> str:
    """The whole of docs/configuration.md."""
    documents = _field_documents()
    sections = dict(found for kind in SECTIONS.values() for found in _sections(kind))
    parts = [INTRODUCTION, _groups(), _section("The run", "", schema.RunConfig, documents)]
    for name, kind in sections.items():
        parts.append(_section(f"`{name}`", f"{name}.", kind, documents))
        if kind is schema.DataConfig:
            parts.append(_section("An entry of `data.mixture`", "", schema.MixtureSource, documents))
    return "\n".join([*parts, _enumerations(), ENVIRONMENT]).rstrip() + "\n"


def _section(title: str, prefix: str, kind: type, documents: dict[tuple[str, str], str]) -> str:
    about = [_line(inspect.getdoc(kind) or ""), NOTES.get(kind, "")]
    return "\n".join([f"## {title}", "", " ".join(filter(None, about)), "", *_table(kind, prefix, documents), ""])


def _sections(kind: type) -> list[tuple[str, type]]:
    hints = typing.get_type_hints(kind)
    return [(f.name, hints[f.name]) for f in dataclasses.fields(kind) if dataclasses.is_dataclass(hints[f.name])]


def _table(kind: type, prefix: str, documents: dict[tuple[str, str], str]) -> Iterator[str]:
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        values, default = _values(hints[field.name]), _yaml(getattr(kind(), field.name))
        meaning = _cell(documents[kind.__name__, field.name])
        yield f"| `{prefix}{field.name}` | {values} | `{default}` | {meaning} |"


def _values(hint: object) -> str:
    """What may be given, in words: the values of an enumeration, else the type."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return ", ".join("`null`" if a is type(None) else _values(a) for a in arguments)
    if typing.get_origin(hint) is list:
        return f"list of {_values(arguments[0])}"
    assert isinstance(hint, type)
    if issubclass(hint, Enum):
        return ", ".join(f"`{value.value}`" for value in hint)
    if dataclasses.is_dataclass(hint):
        return "entries"
    return {int: "integer", float: "number", bool: "`true`, `false`", str: "text"}[hint]


def _yaml(value: object) -> str:
    """A default as it is written in YAML and on the command line."""
    value = plain(value)
    if isinstance(value, list):
        return f"[{','.join(map(_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return '"' + value.replace("\n", "\\n") + '"' if isinstance(value, str) and not value.strip() else str(value)


def _line(text: str) -> str:
    """One line, with YAML's names for Python's values."""
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}(?=:| or )", yaml, text)
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _field_documents() -> dict[tuple[str, str], str]:
    """(class, field) -> the string below the field."""
    classes = [node for node in ast.parse(Path(schema.__file__).read_text()).body if isinstance(node, ast.ClassDef)]
    return {
        (node.name, field.target.id): str(after.value.value)
        for node in classes
        for field, after in itertools.pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


def _groups() -> str:
    lines = ["## Groups", "", "| group=option | what it is, by the comment on top of its file |", "|---|---|"]
    for folder in sorted(path for path in CONFIG_FOLDER.iterdir() if any(path.glob("*.yaml"))):
        for option in sorted(folder.glob("*.yaml")):
            lines.append(f"| `{folder.name}={option.stem}` | {_cell(_comment(option))} |")
    return "\n".join([*lines, ""])


def _comment(file: Path) -> str:
    """The comment at the top of a YAML file, without Hydra's package line."""
    lines = []
    for line in file.read_text().splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    return " ".join(lines)


def _enumerations() -> str:
    lines = ["## Values", "", "What some values mean, beyond what their keys say:", ""]
    for kind in vars(schema).values():
        if isinstance(kind, type) and issubclass(kind, Enum) and kind.__module__ == schema.__name__:
            about = _line(inspect.getdoc(kind) or "")
            if any(f"`{value.value}`" in about for value in kind):
                lines.append(f"- {_values(kind)}: {about}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.stdout.write(page())
