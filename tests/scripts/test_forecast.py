"""`scripts/forecast.py`: predictions for clusters that aren't there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import compose
from configs.errors import UserError
from configs.schema import ForecastRunConfig
from scripts import forecast
from tests.runs.conftest import ENVIRONMENT, ROOT


def config_of(*overrides: str) -> ForecastRunConfig:
    config = compose(["experiment=gpt3_2b7_8k", "forecast.tokens_per_s=24690", *overrides], "forecast")
    assert isinstance(config, ForecastRunConfig)
    return config


def test_tool_leaves_rows(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "forecast.py"), "experiment=gpt3_2b7_8k", f"run_dir={tmp_path}"]
    command += ["train.global_batch_size=8", "forecast.tokens_per_s=24690", "forecast.world_sizes=[1,8,1024]"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "forecast.json").read_text())
    zero1 = [row for row in report["rows"] if row["engine"] == "zero1"]
    assert [row["world_size"] for row in zero1] == [1, 8, 1024]
    assert zero1[0]["tokens_per_s"] == pytest.approx(24690)
    assert zero1[0]["efficiency"] > zero1[1]["efficiency"] > zero1[2]["efficiency"]
    assert report["cluster"]["tokens_per_s"] == 24690
    assert len(report["rows"]) == 9


def test_strong_scaling_ends_where_the_batch_does() -> None:
    config = config_of("train.global_batch_size=128", "forecast.strong=true")
    engine = compose(["engine=zero1"]).engine
    rows = [forecast.row_of(config, "zero1", engine, size) for size in (8, 128, 256)]
    assert [row.accumulation_steps for row in rows] == [16, 1, 0]
    assert rows[2].efficiency is None
    assert {row.global_batch_size for row in rows} == {128}


def test_sequence_parallel_ranks_share_a_batch() -> None:
    config = config_of("train.global_batch_size=4")
    engine = compose(["engine.sequence_parallel_size=2"]).engine
    row = forecast.row_of(config, "zero1", engine, 8)
    assert (row.global_batch_size, row.accumulation_steps) == (16, 4)


def test_memory_alone_needs_no_speed() -> None:
    config = config_of("forecast.tokens_per_s=0", "forecast.memory_gb=85", "engine=zero3")
    forecast.check(config)
    row = forecast.row_of(config, "zero3", config.engine, 4)
    assert row.step_time_s is None
    assert row.memory_gb == pytest.approx(37.1, abs=0.4)  # 37.52 on H200, a chunk of logits more (test_memory.py)
    assert row.largest_micro_batch is not None
    assert row.largest_micro_batch > 1
    headings = [str(column.header) for column in forecast.table_of([row], config).columns]
    assert headings == ["engine", "devices", "M tokens,\nall", "micro-\nbatches", "checkpoint,\nGB", "memory,\nGB",
                        "largest micro-\nbatch, 85 GB"]  # fmt: skip


def test_what_does_not_fit_is_said() -> None:
    config = config_of("forecast.memory_gb=40")
    row = forecast.row_of(config, "zero1", compose(["engine=zero1"]).engine, 1)
    assert (row.memory_gb, row.largest_micro_batch) == (pytest.approx(70.6, abs=0.5), None)
    assert "none" in [cell for column in forecast.table_of([row], config).columns for cell in column.cells]


@pytest.mark.parametrize("override", ["tokens_per_s=-1", "memory_gb=0", "node_size=0", "link_gb_per_s=0"])
def test_impossible_rates_are_refused(override: str) -> None:
    with pytest.raises(UserError, match=rf"forecast\.{override}"):
        forecast.check(config_of(f"forecast.{override}"))
