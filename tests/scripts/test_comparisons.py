"""The tools that compare settings, on tiny runs: what they leave, and what they make of runs that don't fit."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.errors import UserError
from configs.schema import Attention
from scripts import compare_attention, scaling
from tests.runs.conftest import ENVIRONMENT, ROOT, TINY
from training.trial import Trial, summarise

TRIAL = Trial(100.0, 0.1, 1.0, 0.5, 0.4, 2.0, 3.0, 4)


def run_tool(script: str, tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    settings = [o for o in TINY if not o.startswith(("train.steps", "train.eval", "train.save", "train.log"))]
    command = [sys.executable, str(ROOT / "scripts" / script), "experiment=quickstart", *settings, *overrides]
    command += [f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'out'}"]
    result = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_compare_attention_leaves_rows_and_a_picture(tmp_path: Path) -> None:
    result = run_tool("compare_attention.py", tmp_path, "compare.attention=[standard,sdpa]", "compare.steps=5")
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["attention"] for row in report["rows"]] == ["standard", "sdpa"]
    for row in report["rows"]:
        assert row["tokens_per_s"] > 0
        assert row["peak_memory_gb"] > 0
        assert row["loss"] > 0
        assert {"mfu", "mfu_causal"} <= row.keys()
    first, second = report["rows"]
    assert first["speedup"] == 1.0
    assert second["speedup"] == pytest.approx(second["tokens_per_s"] / first["tokens_per_s"])
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)  # same data, seed and function
    assert report["versions"]["torch"]
    assert "compare.steps=5" in report["command"]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "speed-up" in result.stdout


def test_scaling_leaves_rows_and_a_picture(tmp_path: Path) -> None:
    run_tool("scaling.py", tmp_path, "scaling.world_sizes=[1,2]", "scaling.steps=5", "scaling.forecast=[16]")
    report = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert [(row["engine"], row["world_size"], row["global_batch_size"]) for row in report["rows"]] == [
        ("zero1", 1, 4),
        ("zero1", 2, 8),
        ("zero1", 16, 64),
    ]
    first, second, third = report["rows"]
    assert first["efficiency"] == 1.0
    assert second["efficiency"] == pytest.approx(second["tokens_per_s"] / 2 / first["tokens_per_s"])
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert report["link"]["world_size"] == 2
    assert report["link"]["gb_per_s"] > 0
    assert third["tokens_per_s"] is None  # predicted only
    efficiencies = [row["predicted_efficiency"] for row in report["rows"]]
    assert efficiencies[0] == 1.0
    assert efficiencies == sorted(efficiencies, reverse=True)
    sent = [row["bytes_per_step"] for row in report["rows"]]
    assert sent == pytest.approx([0, sent[2] * (1 / 2) / (15 / 16), sent[2]])


def fake_trials(fits: Callable[[Sequence[str]], bool], tried: list[Sequence[str]]) -> Callable[..., Trial | None]:
    def run(overrides: Sequence[str], run_dir: Path, **_: Any) -> Trial | None:
        tried.append(overrides)
        return TRIAL if fits(overrides) else None

    return run


def test_largest_fitting_micro_batch_is_taken_then_recompute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[Sequence[str]] = []

    def fits(overrides: Sequence[str]) -> bool:
        return "engine.recompute=block" in overrides and "train.micro_batch_size=4" in overrides

    monkeypatch.setattr(compare_attention, "run_trial", fake_trials(fits, tried))
    overrides = ["experiment=gpt3_1b3_2k"]
    row = compare_attention.largest_fit(Console(quiet=True), "x", overrides, Attention.standard, 6, tmp_path)
    assert (row.micro_batch_size, row.recompute, row.fits) == (4, True, True)
    sizes = [next(o for o in t if o.startswith("train.micro_batch_size")).split("=")[1] for t in tried]
    assert sizes == ["8", "4", "2", "1", "8", "4"]


def test_what_fits_nowhere_is_a_row_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare_attention, "run_trial", fake_trials(lambda o: "model.attention=flash" in o, []))
    kinds = [Attention.standard, Attention.flash]
    rows = compare_attention.compare(Console(quiet=True), "gpt3_1b3_2k", ["experiment=gpt3_1b3_2k"], kinds, 6, tmp_path)
    assert [row.fits for row in rows] == [False, True]
    assert rows[1].speedup == 1.0  # relative to the first that fits
    assert rows[1].paper_tflops == 196


def test_paper_settings_compose() -> None:
    from configs import compose

    settings = dict(compare_attention.paper_settings(["experiment=quickstart", "optim.lr=1e-4"]))
    assert list(settings) == ["gpt3_1b3_2k", "gpt3_1b3_8k", "gpt3_2b7_2k", "gpt3_2b7_8k"]
    for overrides in settings.values():
        config = compose(overrides)
        assert config.train.global_batch_size is not None
        assert config.train.global_batch_size * config.model.sequence_length == 65_536
        assert config.optim.lr == 1e-4


def test_failed_trial_shows_the_end_of_its_output(tmp_path: Path) -> None:
    from training.trial import run_trial

    with pytest.raises(UserError, match=r"Did you mean 'train\.steps'"):
        run_trial(["train.stepz=3"], tmp_path / "trial", steps=3)


def test_what_torchrun_says_of_a_failure_does_not_hide_it() -> None:
    from training.trial import end_of

    said = "step 1/9\nerror: Step 2 has a non-finite loss\n"
    launcher = "W1124 18:08:11.946000 15 /lib/torch/distributed/elastic/multiprocessing/api.py:1028] Sending\n"
    assert end_of(said + launcher + "  exitcode  : 2\n" * 30) == said.rstrip()
    assert end_of(launcher + "no rank said anything").endswith("no rank said anything")


def test_a_failed_trial_costs_its_own_row_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from configs import compose
    from configs.schema import ScalingRunConfig

    def trial(overrides: Sequence[str], run_dir: Path, **_: Any) -> Trial | None:
        if run_dir.name == "zero2_1":
            raise UserError("it failed")
        return None if run_dir.name == "zero3_1" else TRIAL

    monkeypatch.setattr(scaling, "run_trial", trial)
    engines = "scaling.engines=[zero1,zero2,zero3]"
    settings = ["experiment=quickstart", "scaling.world_sizes=[1]", engines, f"run_dir={tmp_path}"]
    config = compose(settings, "scaling")
    assert isinstance(config, ScalingRunConfig)
    assert scaling.main(config) == 1
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [(row["tokens_per_s"], row["problem"]) for row in rows] == [
        (100.0, None),
        (None, "it failed"),
        (None, scaling.NO_ROOM),
    ]


def test_summary_leaves_the_warm_up_out() -> None:
    rows = [
        {"step": s, "train/loss": 9.0 - s, "perf/tokens_per_s": float(s), "perf/step_time_s": 1.0, "perf/mfu": 0.1 * s}
        | {"perf/peak_memory_gb": 7.0 - s}
        for s in range(1, 7)
    ]
    trial = summarise(rows, steps=6)
    assert (trial.tokens_per_s, trial.num_steps, trial.loss, trial.peak_memory_gb) == (4.5, 4, 3.0, 6.0)
    assert trial.mfu_causal is None


def test_scaling_refuses_an_engine_that_is_not_there(tmp_path: Path) -> None:
    from configs import compose
    from configs.schema import ScalingRunConfig

    config = compose(["scaling.engines=[zero9]"], "scaling")
    assert isinstance(config, ScalingRunConfig)
    with pytest.raises(UserError, match="zero9"):
        scaling.check(config)
    alone = replace(config.scaling, engines=["zero1"], world_sizes=[1], forecast=[64])
    with pytest.raises(UserError, match=r"scaling\.forecast needs"):
        scaling.check(replace(config, scaling=alone))
    with pytest.raises(UserError, match="world_sizes"):
        scaling.check(replace(config, scaling=replace(config.scaling, engines=["zero1"], world_sizes=[])))
