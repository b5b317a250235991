"""Whole runs on a GPU: flash kernels in bf16, exact resume, ZeRO-3 on two."""

import signal
from pathlib import Path

import pytest
import torch

from tests.runs.conftest import Runs, losses, rows
from tests.runs.test_resume import assert_equal_runs

pytestmark = pytest.mark.gpu
COMPILED = (
    "hardware.device=cuda",
    "model.head_dim=32",
    "model.width=64",
    "model.sequence_length=256",
    "train.steps=20",
)
GPU = (*COMPILED, "engine.compile=off")  # compiling takes longer than all else in these runs


def test_default_is_bf16_flash_and_compiled(runs: Runs, tmp_path: Path) -> None:
    result = runs.run(*COMPILED, f"run_dir={tmp_path / 'run'}")
    assert "flash attention, bf16" in result.stdout
    lines = rows(tmp_path / "run")
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert 0 < lines[-1]["perf/mfu_causal"] < 1


def test_flash_and_standard_attention_train_alike(runs: Runs, tmp_path: Path) -> None:
    for kind in ("flash", "standard", "sdpa", "cudnn"):
        runs.run(*GPU, f"model.attention={kind}", f"run_dir={tmp_path / kind}")
    reference = losses(tmp_path / "standard")
    for kind in ("flash", "sdpa", "cudnn"):
        for step, (loss, _) in losses(tmp_path / kind).items():
            assert loss == pytest.approx(reference[step][0], rel=5e-3), (kind, step)


@pytest.mark.parametrize("options", [COMPILED, (*GPU, "model.dropout=0.1", "model=llama"), GPU])
def test_killed_deterministic_run_goes_on_bit_for_bit(runs: Runs, tmp_path: Path, options: tuple[str, ...]) -> None:
    settings = [*options, "deterministic=true"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.run(*settings, f"run_dir={whole}")
    runs.interrupt(lambda: len(rows(killed)) >= 9, signal.SIGKILL, *settings, f"run_dir={killed}")
    assert len(rows(killed)) < 20, "the run was over before it was killed"
    runs.run(*settings, f"run_dir={killed}")
    assert_equal_runs(whole, killed)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_two_gpus_train_as_one(runs: Runs, tmp_path: Path, engine: str) -> None:
    runs.run(*GPU, f"run_dir={tmp_path / 'one'}")
    runs.run(*GPU, f"engine={engine}", f"run_dir={tmp_path / 'two'}", processes=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    for step, (loss, _) in one.items():
        assert two[step][0] == pytest.approx(loss, rel=5e-3), step


def test_a_model_that_does_not_fit_says_so(runs: Runs, tmp_path: Path) -> None:
    too_many = "train.global_batch_size=1048576"
    result = runs.run(*GPU, too_many, "data.prefetch=0", "train.steps=1", f"run_dir={tmp_path / 'run'}", code=3)
    assert "train.micro_batch_size" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
