"""Cross-field checks: each problem is found, named and has a remedy; all are reported at once."""

import re

import pytest
import torch

from configs import compose
from configs.errors import UserError
from training.validate import find_problems, validate

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.steps=0"], ["train.steps is 0", "at least 1"]),
        (["optim.lr=0"], ["optim.lr"]),
        (["optim.beta2=1.0"], ["optim.beta2"]),
        (["optim.min_lr_ratio=2"], ["optim.min_lr_ratio"]),
        (["optim.schedule=constant", "optim.decay_steps=3"], ["optim.decay_steps", "constant"]),
        (["optim.decay_steps=-5"], ["optim.decay_steps is -5", "at least 1"]),
        (["data.max_documents=0"], ["data.max_documents is 0", "at least 1"]),
        (["data=text"], ["data.path is not set"]),
        (["data.mixture=[{name: A}]"], ["data.mixture[0].name is 'A'", "lower-case"]),
        (["data=mixture", "data.mixture=[]"], ["data.mixture is empty", "list what to mix"]),
        (["data.path=x"], ["data=stdlib does not read"]),
        (["data.validation_fraction=0"], ["train.eval_every", "data.validation_fraction"]),
        (["engine.zero_stage=4"], ["engine.zero_stage=4", "possible"]),
        (["engine.offload_params=true"], ["engine.zero_stage=3"]),
        (["engine=zero0", "engine.offload_optimizer=true"], ["engine.offload_optimizer"]),
        (["engine.sequence_parallel_size=0"], ["engine.sequence_parallel_size is 0", "at least 1"]),
        (["engine.sequence_parallel_size=2"], ["engine.sequence_parallel_size=2 does not divide 1 rank", "use 1"]),
        (["engine.sequence_parallel_size=5"], ["engine.sequence_parallel_size=5", "model.num_heads=", "use one of 1"]),
        (["engine.precision=bf16", "engine.loss_scale=128"], ["engine.loss_scale"]),
        (["train.global_batch_size=16", "train.micro_batch_size=3"], ["train.global_batch_size", "train.micro_batch"]),
        (["model.num_heads=3"], ["model.num_heads"]),
        (["hardware.peak_tflops=-1"], ["hardware.peak_tflops"]),
        (
            ["engine.fp8=rowwise", "engine.precision=fp32"],
            ["engine.fp8=rowwise", "engine.precision=bf16", "given fp32"],
        ),
        (["engine.fp8=rowwise", "model.mlp_width=100"], ["engine.fp8", "model.mlp_width is 100", "multiples of 16"]),
        ([f"seed={2**63}"], ["seed is 9223372036854775808", "below"]),
        (["name="], ["name is empty", "runs/NAME"]),
        (["engine=zero2", "engine.lean_zero3=on"], ["engine.lean_zero3=on", "engine.zero_stage=3", "auto or off"]),
        (["engine=zero3", "engine.lean_zero2=on"], ["engine.lean_zero2=on", "engine.zero_stage=2", "auto or off"]),
        (["engine=zero2", "optim.fused_step=on"], ["optim.fused_step=on", "zero_stage=0, or 1 to 3", "auto or off"]),
    ],
)
def test_problem_is_named(overrides: list[str], words: list[str]) -> None:
    problems = list(find_problems(compose(overrides), world_size=1))
    assert any(all(word in problem for word in words) for problem in problems), problems


@pytest.mark.parametrize(
    ("overrides", "world_size", "wrong"),
    [
        (["engine=zero3"], 1, False),
        (["engine=zero3"], 2, True),
        (["engine=zero3", "engine.lean_zero3=off"], 1, True),
        (["engine=zero2"], 1, False),
        (["engine=zero2"], 2, True),
        (["engine=zero2", "engine.lean_zero2=off"], 1, True),
        (["engine=zero1"], 2, False),
        (["engine=zero1", "engine.precision=fp32"], 2, True),
    ],
)
def test_fused_weight_gradients_depend_on_ranks(overrides: list[str], world_size: int, wrong: bool) -> None:
    """Said before a corpus is prepared, not when the engine is built."""
    given = ["engine.precision=bf16", *overrides, "engine.fuse_weight_gradients=on"]
    problems = list(find_problems(compose(given), world_size))
    assert len(problems) == wrong
    assert all(re.match(r"engine\.fuse_weight_gradients=on: .*=auto or off", problem) for problem in problems)


def test_a_toggle_that_others_ask_for_is_named_once() -> None:
    given = ["engine=zero3", "engine.precision=bf16", "engine.offload_params=true", "optim.fused_step=on"]
    problems = list(find_problems(compose([*given, "engine.lean_zero3=on"]), world_size=1))
    assert [p.split(":")[0] for p in problems] == ["engine.lean_zero3=on"]


@CPU_ONLY
@pytest.mark.parametrize(
    "override", ["hardware.device=cuda", "model.attention=flash", "model.attention=flash1", "engine.precision=fp16"]
)
def test_what_needs_a_gpu_says_so(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it, kernels run on a CPU
    problems = list(find_problems(compose([override]), world_size=1))
    assert [p for p in problems if override.split("=")[0] in p and re.search("GPU|CUDA|fp16 units", p)], problems


def test_all_problems_come_together() -> None:
    config = compose(["train.steps=0", "engine.zero_stage=9", "data=jsonl"])
    with pytest.raises(UserError) as caught:
        validate(config, world_size=1)
    text = str(caught.value)
    for key in ("train.steps", "engine.zero_stage", "data.path"):
        assert key in text
    assert len(text.splitlines()) <= 25


def test_a_run_shorter_than_its_warm_up_is_allowed() -> None:
    validate(compose(["train.steps=5"]), world_size=1)


def test_a_mixture_says_itself_where_its_text_and_its_validation_are() -> None:
    """Whatever kind of source the section it is in is of."""
    entry = "{name: a, source: hub, path: o/n, validation_split: test}"
    given = ["data=jsonl", "data.validation_fraction=0"]
    assert list(find_problems(compose([*given, f"data.mixture=[{entry}]"]), 1)) == []
    (problem,) = find_problems(compose([*given, f"data.mixture=[{entry}, {{name: b}}]"]), 1)
    assert "needs a validation split" in problem


def test_default_config_is_valid() -> None:
    for world_size in (1, 2, 4):
        validate(compose([]), world_size)
