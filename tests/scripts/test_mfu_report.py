"""Profiles of real tiny runs, by the tool and by `train.profile_steps`: what they leave, and that the parts add up."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs.conftest import ENVIRONMENT, ROOT, TINY


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


def run(script: str, cache: Path, folder: Path, *overrides: str) -> str:
    command = [sys.executable, str(ROOT / script), *TINY, f"data.cache_dir={cache}", f"run_dir={folder}", *overrides]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_files(folder: Path, num_steps: int) -> dict[str, Any]:
    assert (folder / "waterfall.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "trace.json.gz").read_bytes().startswith(b"\x1f\x8b")
    report: dict[str, Any] = json.loads((folder / "waterfall.json").read_text())
    parts = {part["category"]: part for part in report["parts"]}
    assert sum(part["time_s"] for part in report["parts"]) == pytest.approx(report["step_time_s"], rel=0.03)
    assert sum(part["gap_share"] for part in report["parts"]) == pytest.approx(1)
    expected = {
        "matmul",
        "attention_forward",
        "attention_backward",
        "norms",
        "activations",
        "loss",
        "optimizer",
        "host",
    }
    assert expected <= parts.keys()
    assert all(parts[kind]["tflops"] > 0 for kind in ("matmul", "attention_forward", "attention_backward"))
    assert report["unknown"] == {}
    assert report["steps"] == num_steps
    assert report["tokens_per_step"] == 4 * 32
    assert report["unprofiled"]["step_time_s"] > 0
    assert 1 <= len(report["remedies"]) <= 3
    assert report["versions"]["torch"]
    return report


def test_tool_reports_and_leaves_files(cache: Path, tmp_path: Path) -> None:
    output = run("scripts/mfu_report.py", cache, tmp_path, "train.profile_steps=3")
    report = check_files(tmp_path, 3)
    assert "train.profile_steps=3" in report["command"]
    assert report["command"].startswith("python scripts/mfu_report.py")
    assert 0 < report["floor"]["share"] < 1
    assert report["floor"]["step_time_s"] < report["step_time_s"]
    for words in ("Floor: a step of", "matrix products", "host: Python", "Remedy 1", "Without the profiler"):
        assert words in output, output
    assert not (tmp_path / "profiled" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, 2), (signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=lambda value: str(value)
)
def test_a_signal_ends_it_with_nothing_to_start_again_for(
    cache: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """A job script requeues on 75 and 138: the report would begin anew and meet its time limit again."""
    settings = [*TINY, f"data.cache_dir={cache}", f"run_dir={tmp_path}", "train.steps=9999", "train.profile_steps=3000"]
    metrics = tmp_path / "profiled" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/mfu_report.py"), *settings],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 120
    while not metrics.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    assert f"{number.name} came before the profiled steps were done" in err
    assert "no checkpoint is written" in out
    assert "Traceback" not in out + err
    assert not (tmp_path / "waterfall.json").exists()


def test_train_profiles_in_the_midst_of_a_run(cache: Path, tmp_path: Path) -> None:
    """Steps 6 and 7 of 8 are profiled, with a checkpoint after step 6 that is no part of them."""
    output = run("train.py", cache, tmp_path, "train.profile_steps=2")
    report = check_files(tmp_path, 2)
    assert report["unprofiled"]["num_steps"] == 3  # steps 3 to 5: two warm up
    assert "2 steps profiled" in output
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    timed = [row["step"] for row in rows if "perf/mfu" in row]
    assert timed == [3, 4, 5]  # profiled steps count for no metric
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert (tmp_path / "checkpoints" / "step_00000008").exists()
    kinds = {event["name"] for event in trace(tmp_path)["traceEvents"]}
    assert {"flashtrain::profiled", "flashtrain::data_wait", "flashtrain::excluded", "flashtrain::optimizer"} <= kinds


def trace(folder: Path) -> dict[str, Any]:
    import gzip

    found: dict[str, Any] = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    return found
