"""The tools that compare settings, on tiny runs: what they leave, and what they make of runs that don't fit."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from configs.errors import UserError
from configs.schema import Attention
from scripts import compare_attention, scaling
from tests.runs.conftest import ENVIRONMENT, ROOT, TINY
from training.link import Link
from training.run import RunFolder, claim
from training.trial import Trial, summarise

TRIAL = Trial(100.0, 0.1, 1.0, 0.5, 0.4, 2.0, 3.0, 4)


SHORT = [o for o in TINY if not o.startswith(("train.steps", "train.eval", "train.save", "train.log"))]


def run_tool(script: str, tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), "experiment=quickstart", *SHORT, *overrides]
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
        assert 1 < row["start_s"] <= row["wall_s"] < 300
        assert {"mfu", "mfu_causal"} <= row.keys()
    first, second = report["rows"]
    assert first["speedup"] == 1.0
    assert second["speedup"] == pytest.approx(second["tokens_per_s"] / first["tokens_per_s"])
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)  # same data, seed and function
    assert report["versions"]["torch"]
    assert "compare.steps=5" in report["command"]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "speed-up" in result.stdout
    assert re.search(r"sdpa, micro-batch 4: [\d,]+ tokens/s \(first step after \d+ s of \d+ s\)", result.stdout)


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


def comparison(folder: Path, *kinds: Attention) -> compare_attention.Comparison:
    return compare_attention.Comparison(Console(quiet=True), folder, kinds, steps=6, conditions={})


def micro_batches(tried: Sequence[Sequence[str]]) -> list[str]:
    return [next(o for o in t if o.startswith("train.micro_batch_size")).split("=")[1] for t in tried]


def test_largest_fitting_micro_batch_is_taken_then_recompute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[Sequence[str]] = []

    def fits(overrides: Sequence[str]) -> bool:
        return "engine.recompute=block" in overrides and "train.micro_batch_size=4" in overrides

    monkeypatch.setattr(compare_attention, "run_trial", fake_trials(fits, tried))
    overrides = ["experiment=gpt3_1b3_2k"]
    row = compare_attention.largest_fit(comparison(tmp_path), "x", overrides, Attention.standard, tmp_path)
    assert (row.micro_batch_size, row.recompute, row.fits) == (4, True, True)
    assert micro_batches(tried) == ["8", "4", "2", "1", "8", "4"]


def test_what_fits_nowhere_is_a_row_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare_attention, "run_trial", fake_trials(lambda o: "model.attention=flash" in o, []))
    work = comparison(tmp_path, Attention.standard, Attention.flash)
    compare_attention.compare(work, "gpt3_1b3_2k", ["experiment=gpt3_1b3_2k"], tmp_path)
    assert [row.fits for row in work.rows] == [False, True]
    assert work.rows[1].speedup == 1.0  # relative to the first that fits
    assert work.rows[1].paper_tflops == 196
    assert len(work.no_room) == 8


def test_speedups_are_over_standard_wherever_it_stands() -> None:
    def rows(*speeds: tuple[str, float | None]) -> list[float | None]:
        given = [
            compare_attention.Row("x", kind, 1, False, fits=speed is not None, tokens_per_s=speed)
            for kind, speed in speeds
        ]
        kinds = [Attention(kind) for kind, _ in speeds]
        return [row.speedup for row in compare_attention.arranged(given, kinds)]

    assert rows(("flash", 30.0), ("standard", 10.0)) == [3.0, 1.0]
    assert rows(("flash", 30.0), ("standard", None), ("sdpa", 15.0)) == [1.0, None, 0.5]
    assert rows(("standard", None), ("flash", None)) == [None, None]


def test_what_cannot_fit_by_far_is_not_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """2.7B at 8,192 tokens on 80 GB: scores of 32 layers are 86 GB and states 43 GB, so only recomputed blocks may."""
    tried: list[Sequence[str]] = []
    monkeypatch.setattr(compare_attention, "run_trial", fake_trials(lambda o: True, tried))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = SimpleNamespace(total_memory=85 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    overrides = ["experiment=gpt3_2b7_8k", "model.vocab_size=50257"]
    work = comparison(tmp_path)
    row = compare_attention.largest_fit(work, "x", overrides, Attention.standard, tmp_path)
    assert (row.micro_batch_size, row.recompute) == (1, True)
    assert len(tried) == 1
    row = compare_attention.largest_fit(work, "x", overrides, Attention.flash, tmp_path)
    assert (row.micro_batch_size, row.recompute) == (1, False)
    row = compare_attention.largest_fit(work, "x", [*overrides, "hardware.device=cpu"], Attention.standard, tmp_path)
    assert (row.micro_batch_size, row.recompute) == (1, False)
    memory.total_memory = 141 * 10**9
    row = compare_attention.largest_fit(work, "x", overrides, Attention.standard, tmp_path)
    assert (row.micro_batch_size, row.recompute) == (1, False)
    assert not work.no_room  # nothing was started in vain


def test_least_memory_is_states_and_scores() -> None:
    from configs import compose
    from training.memory import least_bytes

    tiny = ["model.num_layers=3", "model.num_heads=2", "model.width=32", "model.sequence_length=64"]
    tiny += ["model.vocab_size=100", "engine.precision=bf16"]
    flash = least_bytes(compose([*tiny, "model.attention=flash"]), 5)
    assert flash % 16 == 0
    scores = 5 * 2 * 64 * 64 * 2
    assert least_bytes(compose([*tiny, "model.attention=standard"]), 5) == flash + 3 * scores
    assert least_bytes(compose([*tiny, "model.attention=standard", "engine.recompute=block"]), 5) == flash + scores
    assert least_bytes(compose([*tiny, "model.attention=flash", "engine=zero3_offload"]), 5) == 0


def compared(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows after a call with made-up trials, in which recomputed blocks alone fit, and what it started."""
    from configs import compose
    from configs.schema import CompareRunConfig

    tried: list[Sequence[str]] = []
    given = ["hardware.device=cpu", *overrides]
    monkeypatch.setattr(compare_attention, "run_trial", fake_trials(lambda o: "engine.recompute=block" in o, tried))
    monkeypatch.setattr(sys, "argv", ["compare_attention.py", *given])
    config = compose([*given, f"run_dir={folder}"], "compare")
    assert isinstance(config, CompareRunConfig)
    assert compare_attention.main(config) == 0
    started = [next(o for o in t if o.startswith("name=")).removeprefix("name=") for t in tried]
    return json.loads((folder / "comparison.json").read_text())["rows"], started


def test_comparison_goes_on_where_it_was_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = "compare.settings=[gpt3_2b7_8k]", "compare.settings=[gpt3_1b3_8k,gpt3_2b7_8k]"
    rows, started = compared(monkeypatch, tmp_path, "compare.paper=true", one, "compare.attention=[flash]")
    assert started == ["gpt3_2b7_8k-flash"] * 2  # without and with recompute
    rows, started = compared(monkeypatch, tmp_path, "compare.paper=true", two, "compare.attention=[standard,flash]")
    assert started == [*["gpt3_1b3_8k-standard"] * 3, *["gpt3_1b3_8k-flash"] * 3, *["gpt3_2b7_8k-standard"] * 2]
    assert [(r["setting"], r["attention"]) for r in rows] == [
        ("gpt3_1b3_8k", "standard"),
        ("gpt3_1b3_8k", "flash"),
        ("gpt3_2b7_8k", "standard"),
        ("gpt3_2b7_8k", "flash"),
    ]
    said = capsys.readouterr().out
    assert "gpt3_2b7_8k flash: 100 tokens/s, kept from an earlier call" in said
    assert "Kept from earlier calls: gpt3_2b7_8k flash" in said
    rows, started = compared(monkeypatch, tmp_path, "compare.paper=true", one, "compare.attention=[flash]")
    assert started == []
    assert len(rows) == 4  # what this call did not ask for stays, too
    report = json.loads((tmp_path / "comparison.json").read_text())
    report["rows"].pop()  # as if the call had ended before the rung that fits
    (tmp_path / "comparison.json").write_text(json.dumps(report))
    rows, started = compared(monkeypatch, tmp_path, "compare.paper=true", one, "compare.attention=[flash]")
    assert started == ["gpt3_2b7_8k-flash"]


def test_comparison_of_other_conditions_starts_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = ("compare.paper=true", "compare.settings=[gpt3_2b7_8k]", "compare.attention=[flash]")
    compared(monkeypatch, tmp_path, *paper)
    changes = {
        "optim.lr=1e-5": "measured with other overrides (optim.lr)",
        "compare.steps=9": "measured with other overrides (optim.lr), steps",
        "resume=never": "resume=never",
    }
    for number, (change, why) in enumerate(changes.items()):
        rows, started = compared(monkeypatch, tmp_path, *paper, change)
        assert len(started) == 2
        assert len(rows) == 1
        assert f"comparison.json: {why}; moved to" in capsys.readouterr().out
        assert (tmp_path / "previous" / str(number + 1) / "comparison.json").exists()
    compared(monkeypatch, tmp_path, *paper)
    monkeypatch.setenv("FLASH_ATTN_PATH", "portable")  # trials inherit it
    assert len(compared(monkeypatch, tmp_path, *paper)[1]) == 2
    assert "other environment (FLASH_ATTN_PATH)" in capsys.readouterr().out
    monkeypatch.setattr("training.earlier.source_hash", lambda: "changed")
    rows, started = compared(monkeypatch, tmp_path, *paper)
    assert len(started) == 2
    assert "other source" in capsys.readouterr().out
    with pytest.raises(UserError, match="resume=elsewhere"):
        compared(monkeypatch, tmp_path, *paper, "resume=elsewhere")


def test_two_calls_at_once_need_two_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paper = ("compare.paper=true", "compare.settings=[gpt3_2b7_8k]", "compare.attention=[flash]")
    with claim(RunFolder(tmp_path), "auto"):
        with pytest.raises(UserError, match=r"give run_dir=PATH"):
            compared(monkeypatch, tmp_path, *paper)
        with pytest.raises(UserError, match=r"give run_dir=PATH"):
            scaled(monkeypatch, tmp_path)
    assert compared(monkeypatch, tmp_path, *paper)[1]


def test_settings_that_are_not_the_papers_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gpt3_13b_2k; possible are gpt3_1b3_2k, gpt3_1b3_8k"):
        compared(monkeypatch, tmp_path, "compare.paper=true", "compare.settings=[gpt3_13b_2k]")
    with pytest.raises(UserError, match="give --paper too"):
        compared(monkeypatch, tmp_path, "compare.settings=[gpt3_1b3_2k]")


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

    folder, seen = tmp_path / "trial", set[int]()
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"Did you mean 'train\.steps'"):
        run_trial(["train.stepz=3"], folder, steps=3, on_step=seen.add)
    assert seen == {0}  # steps of an earlier trial in the folder are none of this one
    assert (folder / "previous" / "1" / "metrics.jsonl").exists()


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


def scaled(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> tuple[dict[str, Any], list[str]]:
    """The report after a call with made-up trials and links, and what it started; engine zero3 fails."""
    from configs import compose
    from configs.schema import ScalingRunConfig

    tried: list[str] = []

    def trial(overrides: Sequence[str], run_dir: Path, *, world_size: int, **_: Any) -> Trial | None:
        tried.append(run_dir.name)
        if run_dir.name.startswith("zero3"):
            raise UserError("it failed")
        return replace(TRIAL, tokens_per_s=90.0 * world_size + 10)

    def probe(world_size: int, device: Any) -> Link:
        tried.append(f"link {world_size}")
        return Link(world_size, 10.0, 5.0)

    given = ["model.vocab_size=300", "hardware.device=cpu", *overrides]
    monkeypatch.setattr(scaling, "run_trial", trial)
    monkeypatch.setattr(scaling, "probe", probe)
    monkeypatch.setattr(sys, "argv", ["scaling.py", *given])
    config = compose([*given, f"run_dir={folder}"], "scaling")
    assert isinstance(config, ScalingRunConfig)
    scaling.main(config)
    return json.loads((folder / "scaling.json").read_text()), tried


def test_scaling_goes_on_where_it_was_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, started = scaled(monkeypatch, tmp_path, "scaling.world_sizes=[1,2]")
    assert started == ["link 2", "zero1_1", "zero1_2"]
    report, started = scaled(monkeypatch, tmp_path, "scaling.world_sizes=[1,2,4]", "scaling.engines=[zero1,zero3]")
    assert started == ["link 4", "zero1_4", "zero3_1", "zero3_2", "zero3_4"]
    said = capsys.readouterr().out
    assert "zero1 on 2: 190 tokens/s, kept from an earlier call" in said
    assert "Kept from earlier calls: zero1 on 1, zero1 on 2" in said
    rows = report["rows"]
    assert [(r["engine"], r["world_size"]) for r in rows] == [(e, w) for e in ("zero1", "zero3") for w in (1, 2, 4)]
    assert [r["efficiency"] for r in rows[:3]] == pytest.approx([1.0, 0.95, 0.925])
    assert [r["predicted_efficiency"] for r in rows[:3]] == sorted(r["predicted_efficiency"] for r in rows[:3])[::-1]
    report, started = scaled(monkeypatch, tmp_path, "scaling.world_sizes=[1,2]", "scaling.engines=[zero1,zero3]")
    assert started == ["zero3_1", "zero3_2"]  # what failed is run anew; four links do for two
    assert report["link"]["world_size"] == 4
    assert [r["world_size"] for r in report["rows"] if r["engine"] == "zero1"] == [1, 2, 4]


def test_ctrl_c_ends_the_trials_and_leaves_the_rows(tmp_path: Path) -> None:
    """In the second trial, of two ranks: the first one's row is reported, and no process is left."""
    settings = ["scaling.world_sizes=[1,2]", "scaling.steps=300", f"data.cache_dir={tmp_path / 'cache'}"]
    settings += ["experiment=quickstart", *SHORT, f"run_dir={tmp_path / 'out'}"]
    command = [sys.executable, str(ROOT / "scripts" / "scaling.py"), *settings]
    metrics = tmp_path / "out" / "zero1_2" / "metrics.jsonl"
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=-1, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 240
        while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(started := processes_of(tmp_path)) >= 4  # the tool, torchrun, two ranks
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # an impatient user changes nothing
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "SIGINT: the trials end here; the same command goes on." in output
    assert "Weak scaling" in output
    report = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert [(row["engine"], row["world_size"]) for row in report["rows"]] == [("zero1", 1)]
    assert (tmp_path / "out" / "scaling.png").exists()
    assert not [process for process in started if process.is_running()]
    assert not processes_of(tmp_path)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those whose command line names the folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())]


def test_scaling_keeps_no_row_of_another_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("scaling.world_sizes=[1,2]", "train.global_batch_size=8")
    scaled(monkeypatch, tmp_path, *sizes)
    report, started = scaled(monkeypatch, tmp_path, *sizes, "scaling.strong=true")
    assert started == ["zero1_2"]  # on one process it is the same
    assert [r["global_batch_size"] for r in report["rows"]] == [8, 8]
    assert "1 of its 2 rows are of other batches or GPUs; moved to" in capsys.readouterr().out
    aside = json.loads((tmp_path / "previous" / "1" / "scaling.json").read_text())
    assert [r["global_batch_size"] for r in aside["rows"]] == [8, 16]
    _, started = scaled(monkeypatch, tmp_path, *sizes, "scaling.strong=true", "logging.project=x", "resume=never")
    assert started == ["link 2", "zero1_1", "zero1_2"]
    _, started = scaled(monkeypatch, tmp_path, *sizes, "scaling.strong=true", "logging.project=y")
    assert started == []
    (tmp_path / "scaling.json").write_text("{ half a rep")
    _, started = scaled(monkeypatch, tmp_path, *sizes, "scaling.strong=true")
    assert started == ["link 2", "zero1_1", "zero1_2"]


def test_summary_leaves_the_warm_up_out() -> None:
    rows = [
        {"step": s, "train/loss": 9.0 - s, "perf/tokens_per_s": float(s), "perf/step_time_s": 1.0, "perf/mfu": 0.1 * s}
        | {"perf/peak_memory_gb": 7.0 - s}
        for s in range(1, 7)
    ]
    trial = summarise(rows, steps=6)
    assert (trial.tokens_per_s, trial.num_steps, trial.loss, trial.peak_memory_gb) == (4.5, 4, 3.0, 6.0)
    assert trial.mfu_causal is None


def test_an_engine_or_number_named_twice_is_tried_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second trial of what failed had no speed to say."""
    twice = ("scaling.engines=[zero3,zero1,zero3]", "scaling.world_sizes=[1,1]")
    report, started = scaled(monkeypatch, tmp_path, *twice)
    assert started == ["zero3_1", "zero1_1"]
    assert [row["engine"] for row in report["rows"]] == ["zero3", "zero1"]


def test_more_processes_than_sequences_have_no_prediction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their trial fails, which costs their own row: a step of no micro-batch can't be divided among them."""
    sizes = ("train.global_batch_size=4", "scaling.world_sizes=[1,2,8]", "scaling.strong=true")
    report, _ = scaled(monkeypatch, tmp_path, *sizes, "scaling.engines=[zero2]")
    assert [row["predicted_efficiency"] is None for row in report["rows"]] == [False, False, True]


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


def test_scaling_refuses_to_forecast_more_ranks_than_sequences() -> None:
    """Before the trials, not when they are done."""
    from configs import compose
    from configs.schema import ScalingRunConfig

    given = ["train.global_batch_size=16", "scaling.world_sizes=[1,2]", "scaling.forecast=[16,64]"]
    for strong in (True, False):
        config = compose([*given, f"scaling.strong={str(strong).lower()}"], "scaling")
        assert isinstance(config, ScalingRunConfig)
        with pytest.raises(UserError, match="64 processes can't share 16") if strong else nullcontext():
            scaling.check(config)
