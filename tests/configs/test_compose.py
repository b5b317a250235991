"""Composition: every shipped option works, every wrong one is named."""

import ast
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import (
    compose,
    override,
    overrides_last,
    schema,
    strip_launcher_flags,
    sweep_exit_code,
    sweep_folder,
)
from configs.errors import UserError
from configs.messages import plain, schema_keys

ROOT = Path(__file__).parents[2]
OPTIONS = [
    (group.name, option.stem)
    for group in sorted((ROOT / "configs").iterdir())
    if group.is_dir() and group.name != "__pycache__"
    for option in sorted(group.glob("*.yaml"))
]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    config = compose([f"{group}={option}"])
    assert isinstance(config, schema.RunConfig)
    if group == "experiment":
        assert config.name == option


def test_shipped_experiments_are_all_there() -> None:
    names = {option for group, option in OPTIONS if group == "experiment"}
    gpt3 = {
        f"gpt3_{size}_{length}"
        for size, length in itertools.product(("125m", "1b3", "2b7", "6b7", "13b"), ("2k", "8k"))
    }
    assert names >= {"quickstart", "gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1b5"} | gpt3
    assert {name for name in names if name.startswith("llama_")} >= {"llama_150m", "llama_7b"}


def test_the_readmes_resume_is_one_that_its_config_makes() -> None:
    """The run is long enough to be killed there, and has saved where it goes on."""
    commands = re.findall(r"train\.py (.* run_dir=runs/big .*?) *# .*? ([\d,]+)\b", (ROOT / "README.md").read_text())
    (first, killed), (again, saved) = ((given.split(), int(step.replace(",", ""))) for given, step in commands)
    train = compose(first).train
    assert train == compose(again).train
    assert killed < train.steps
    assert saved == killed // train.save_every * train.save_every


def test_overrides_win_over_experiments() -> None:
    config = compose(["experiment=gpt2_124m", "model=llama", "data=stdlib", "train.steps=7", "engine=zero2"])
    assert config.model.position is schema.Position.rope
    assert config.data.source is schema.Source.stdlib
    assert config.engine.zero_stage == 2
    assert config.train.steps == 7
    assert config.model.num_layers == 12  # the experiment's sizes stay


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "'train.stepz'. Did you mean 'train.steps'"),
        ("steps=3", "Did you mean 'train.steps'"),
        ("modle=llama", "Did you mean 'model'"),
        ("experment=gpt2_124m", "Did you mean 'experiment'"),
        ("+train.stepz=3", "'train.stepz'"),
        ("+new.key=3", "'new.key'"),
        ("train.steps=many", "'train.steps': Value 'many'"),
        ("seed=null", "'seed': it cannot be null"),
        ("model.attention=flsh", "[auto, flash, flash1, sdpa, cudnn, standard]"),
        ("experiment=gpt2", "There is no experiment 'gpt2'"),
        ("engine=zero4", "zero3_offload"),
        ("train=3", "'train'"),
        ("optim=null", "Config group override"),
        ("train.steps=[1", "can't be read"),
    ],
)
def test_errors_name_the_key_and_are_short(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([override])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 10


def test_command_line_errors_have_no_traceback() -> None:
    result = subprocess.run(
        [sys.executable, "train.py", "train.stepz=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"},
        check=False,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr + result.stdout
    assert "Did you mean 'train.steps'" in result.stderr
    assert len((result.stderr + result.stdout).splitlines()) <= 25


def test_launcher_flags_are_stripped() -> None:
    assert strip_launcher_flags(["--local_rank=1", "train.steps=2"]) == ["train.steps=2"]
    assert strip_launcher_flags(["--local_rank", "1", "a=b"]) == ["a=b"]
    assert strip_launcher_flags(["--local-rank=0", "--cfg", "job"]) == ["--cfg", "job"]
    assert strip_launcher_flags(["--multirun", "seed=1,2"]) == ["--multirun", "seed=1,2"]


def test_flags_and_overrides_may_be_mixed() -> None:
    given = ["seed=1", "--cfg", "job", "train.steps=2", "--resolve"]
    assert overrides_last(given) == ["--cfg", "job", "--resolve", "seed=1", "train.steps=2"]


def test_sweep_jobs_have_folders_of_their_own() -> None:
    argv = ["--multirun", "seed=1,2", "optim.lr=1e-3", "model=gpt,llama"]
    jobs = [["seed=1", "optim.lr=1e-3", "model=gpt"], ["seed=2", "optim.lr=1e-3", "model=llama"]]
    folders = [str(sweep_folder(compose([]), argv, job, number)) for number, job in enumerate(jobs)]
    assert folders == ["runs/quickstart/0_seed-1_model-gpt", "runs/quickstart/1_seed-2_model-llama"]


@pytest.mark.parametrize("value", ["plain/path_1.txt", "with space", "a=b,c", "it's", "[x]", "back\\slash", "end\\'"])
def test_quoted_overrides_arrive_as_they_are(value: str) -> None:
    assert compose([override("run_dir", value)]).run_dir == value


def test_every_field_is_documented() -> None:
    tree = ast.parse((ROOT / "configs/schema.py").read_text())
    sections = {"model", "data", "optim", "train", "engine", "hardware", "logging", "compare", "scaling", "forecast"}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        assert ast.get_docstring(node), node.name
        for field, after in itertools.pairwise([*node.body, None]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                if node.name.endswith("RunConfig") and field.target.id in sections:
                    continue
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{field.target.id} has no docstring"


def test_every_key_is_read_somewhere() -> None:
    rooms = ("model", "data", "training", "kernels", "scripts")
    sources = [path.read_text() for room in rooms for path in (ROOT / room).rglob("*.py")]
    code = "\n".join([*sources, (ROOT / "train.py").read_text()])
    unread = [key for key in schema_keys(schema.RunConfig) if not re.search(rf"\.{key.rsplit('.', 1)[-1]}\b", code)]
    assert not unread, f"keys that nothing reads: {unread}"


def test_plain_values_survive_json() -> None:
    config = compose(["logging.tags=[a,b]"])
    tree = plain(config)
    assert isinstance(tree, dict)
    assert tree["model"]["attention"] == "auto"
    assert tree["logging"]["tags"] == ["a", "b"]
    assert type(tree["model"]["attention"]) is str


@pytest.mark.parametrize(("codes", "code"), [([], 0), ([0, 0], 0), ([0, 75], 75), ([0, -9], 137), ([2, -15, 0], 143)])
def test_a_sweep_fails_where_a_job_is_killed(codes: list[int], code: int) -> None:
    assert sweep_exit_code(codes) == code
