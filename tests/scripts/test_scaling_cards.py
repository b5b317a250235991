"""One process on each GPU at the same time (`scripts/scaling.py`): where the trials run, and what is made of them.

There is no GPU here. Trials are a stand-in for train.py that says which GPU it was given, or train.py itself on a CPU.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from configs import compose
from configs.errors import UserError
from configs.schema import CompareRunConfig, Device, ForecastRunConfig, RunConfig, ScalingRunConfig
from scripts import compare_attention, forecast, scaling
from tests.runs.conftest import ENVIRONMENT
from tests.scripts.test_comparisons import SHORT, TRIAL
from training import children, trial
from training.link import Link
from training.trial import Trial, run_on_cards

STAND_IN = """
import json, os, re, signal, sys, time
from pathlib import Path

card, root = os.environ["CUDA_VISIBLE_DEVICES"], Path(__file__).parent
folder = Path(re.search(r"run_dir=[\\"']?([^\\"']+)", sys.argv[-1])[1])

def ended(*_):
    (root / f"ended_{card}").write_text(str(time.time()))
    time.sleep(1)
    sys.exit(1)

signal.signal(signal.SIGTERM, ended)
(root / f"here_{card}").touch()
deadline = time.monotonic() + 60
while len(list(root.glob("here_*"))) < 3 and time.monotonic() < deadline:  # all are under way at the same time
    time.sleep(0.01)
if time.monotonic() >= deadline or card == "broken":
    sys.exit("this one failed")
if card == "full":
    sys.exit("torch.OutOfMemoryError: CUDA out of memory")
time.sleep(60 if card.startswith("waits") else 2 if card == "30" else 0)
rows = [{"step": step, "perf/tokens_per_s": float(card), "perf/step_time_s": 0.1, "perf/peak_memory_gb": 2.0,
         "train/loss": float(os.environ["OMP_NUM_THREADS"])} for step in range(1, 7)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
"""Waits until three of it are there; its speed is the name of its GPU, and its loss its number of threads. GPU 30 takes
2 s longer than the others."""


def on_cards(folder: Path, *cards: str, **options: Any) -> dict[str, Trial | UserError | None]:
    """Run the stand-in, on a GPU of each name."""
    (folder / "train.py").write_text(STAND_IN)
    return run_on_cards([], {card: folder / f"run_{card}" for card in cards}, steps=6, **options)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that `train.py` is taken from."""
    monkeypatch.setattr(trial, "ROOT", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def test_trials_run_at_the_same_time_each_on_its_own_gpu(stand_in: Path) -> None:
    seen: list[int] = []
    found = on_cards(stand_in, "70", "30", "50", on_step=seen.append)
    assert [t.tokens_per_s for t in found.values() if isinstance(t, Trial)] == [70.0, 30.0, 50.0]
    assert list(found) == ["70", "30", "50"]
    assert seen[-1] == 6
    assert seen.count(6) < 5  # for 2 s the others are done and one is not
    for outcome in found.values():
        assert isinstance(outcome, Trial)
        assert outcome.loss == 1.0  # as many threads as torchrun gives to a rank
        assert outcome.start_s is not None
        assert outcome.wall_s is not None
        assert 0 < outcome.start_s <= outcome.wall_s < 60


def test_threads_that_the_user_sets_stay(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = on_cards(stand_in, "70", "30", "50")
    assert [t.loss for t in found.values() if isinstance(t, Trial)] == [3.0] * 3


def test_a_gpu_that_fails_leaves_the_others_alone(stand_in: Path) -> None:
    found = on_cards(stand_in, "broken", "full", "50")
    assert isinstance(found["broken"], UserError)
    assert "exit code 1" in str(found["broken"])
    assert "this one failed" in str(found["broken"])
    assert found["full"] is None
    assert isinstance(found["50"], Trial)


def test_what_ends_the_call_ends_all_trials_at_once(stand_in: Path) -> None:
    """Each takes a second to end: one after the other they would hear of it a second apart."""
    started: list[psutil.Process] = []
    others = children.family(os.getpid())  # of other tests, such as compilers' workers

    def interrupt(steps: int) -> None:
        if len(list(stand_in.glob("here_*"))) == 3:
            started.extend(one for one in children.family(os.getpid()) if one not in others)
            raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        on_cards(stand_in, "waits", "waits2", "waits3", on_step=interrupt)
    assert time.monotonic() - begin < 50  # sooner than they would have ended
    assert len(started) == 3
    assert not any(map(children.is_alive, started))
    heard = [float(path.read_text()) for path in stand_in.glob("ended_*")]
    assert len(heard) == 3
    assert max(heard) - min(heard) < 0.8


def test_two_that_start_at_once_share_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """train.py itself, on a CPU, with an empty cache: one prepares tokenizer and corpus, both train on them."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("OMP_NUM_THREADS", "WANDB_API_KEY"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    given = ["experiment=quickstart", *SHORT, f"data.cache_dir={tmp_path / 'cache'}"]
    found = run_on_cards(given, {card: tmp_path / f"run_{card}" for card in "01"}, steps=5)
    first, second = found.values()
    assert isinstance(first, Trial), first
    assert isinstance(second, Trial), second
    assert first.loss == second.loss
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 1
    assert len(list((tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json"))) == 1
    assert not list((tmp_path / "cache").glob("*.partial"))


def gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A host of so many, for those who ask torch.cuda for no more than their number and bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    identify(monkeypatch, *range(number))


def identify(monkeypatch: pytest.MonkeyPatch, *physical: int) -> None:
    """The GPUs of the host that are visible, in this order."""
    there = [SimpleNamespace(uuid=f"uuid-{number}") for number in physical]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: there[index])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(there))


def settings(*overrides: str) -> ScalingRunConfig:
    config = compose([*overrides], "scaling")
    assert isinstance(config, ScalingRunConfig)
    return config


def test_which_gpus_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the largest trial, by the names that the user's CUDA_VISIBLE_DEVICES gives them."""
    four = settings("scaling.world_sizes=[1,4,2]")
    assert scaling.cards_of(four, {}) == []  # a CPU
    gpus(monkeypatch, 8)
    assert scaling.cards_of(four, {}) == ["0", "1", "2", "3"]
    assert scaling.cards_of(four, {"CUDA_VISIBLE_DEVICES": "7,5,GPU-aa, 2,1,0"}) == ["7", "5", "GPU-aa", "2"]
    assert scaling.cards_of(settings("scaling.world_sizes=[1]"), {}) == []
    assert scaling.cards_of(settings("scaling.each_card=false"), {}) == []
    assert scaling.cards_of(settings("hardware.device=cpu"), {}) == []
    gpus(monkeypatch, 2)
    assert scaling.cards_of(four, {"CUDA_VISIBLE_DEVICES": "6,4,-1,5"}) == ["6", "4"]  # CUDA's list ends at -1


class Host:
    """`scaling.main` on a made-up host; `speeds` are tokens/s by GPU, 0 of one that doesn't fit, negative: it fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, **speeds: float) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.speeds = {name.removeprefix("gpu"): speed for name, speed in speeds.items()}
        self.tried: list[str] = []
        self.probed: list[int] = []
        gpus(monkeypatch, len(speeds))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(scaling, "about", lambda command: {**ABOUT, "command": " ".join(command)})
        monkeypatch.setattr(scaling, "probe", self.probe)
        monkeypatch.setattr(scaling, "run_trial", self.run_trial)
        monkeypatch.setattr(scaling, "run_on_cards", self.run_on_cards)
        monkeypatch.setattr(scaling, "draw_lines", self.draw_lines)

    def probe(self, world_size: int, device: Device) -> Link:
        self.probed.append(world_size)
        return Link(world_size, 300.0, 10.0)

    def run_trial(self, overrides: Sequence[str], run_dir: Path, *, world_size: int, **_: Any) -> Trial:
        self.tried.append(run_dir.name)
        return replace(TRIAL, tokens_per_s=80.0 * world_size)

    def run_on_cards(
        self, overrides: Sequence[str], run_dirs: Mapping[str, Path], **_: Any
    ) -> dict[str, Trial | UserError | None]:
        self.tried += [f"{path.name} on {card}" for card, path in run_dirs.items()]
        found: dict[str, Trial | UserError | None] = {}
        for card in run_dirs:
            speed = self.speeds[card]
            mine = replace(TRIAL, tokens_per_s=speed, step_time_s=400 / max(speed, 1), peak_memory_gb=speed / 10)
            found[card] = replace(mine, start_s=9.0, wall_s=speed) if speed > 0 else None if speed == 0 else BROKEN
        return found

    def draw_lines(self, path: Path, lines: Mapping[str, Any], **options: Any) -> None:
        self.lines, self.dashed = lines, options["dashed"]

    def call(self, *overrides: str) -> tuple[dict[int, dict[str, Any]], list[str], int]:
        """The rows by number of processes, what was started, and the exit code."""
        self.tried.clear()
        given = ["model.vocab_size=300", *overrides]
        self.monkeypatch.setattr(sys, "argv", ["scaling.py", *given])
        code = scaling.main(settings(*given, f"run_dir={self.folder}"))
        rows = json.loads((self.folder / "scaling.json").read_text())["rows"]
        return {row["world_size"]: row for row in rows}, list(self.tried), code


ABOUT: dict[str, Any] = {"device": "GPU", "device_count": 4, "python": "3", "versions": {}, "cuda": "13"}
BROKEN = UserError("it failed")
SIZES = "scaling.world_sizes=[1,2,4]"


def test_the_row_of_one_process_is_the_median_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host(monkeypatch, tmp_path, gpu0=100, gpu1=98, gpu2=80, gpu3=90)
    rows, started, code = host.call(SIZES, "scaling.forecast=[64]")
    assert code == 0
    assert started == [*(f"zero1_1_card_{i} on {i}" for i in range(4)), "zero1_2", "zero1_4"]
    one = rows[1]
    assert one["tokens_per_s"] == 94  # of 80, 90, 98, 100
    assert one["step_time_s"] == pytest.approx((400 / 98 + 400 / 90) / 2)
    assert (one["peak_memory_gb"], one["start_s"], one["wall_s"]) == (10.0, 9.0, 100.0)
    assert one["cards_tokens_per_s"] == {"0": 100, "1": 98, "2": 80, "3": 90}
    assert one["cards_problems"] == {}
    assert [rows[size]["efficiency"] for size in (1, 2, 4)] == pytest.approx([1, 160 / 188, 320 / 376])
    assert one["efficiency_slowest"] is None
    assert rows[2]["efficiency_slowest"] == pytest.approx(160 / (2 * 98))  # the slowest of its own two
    assert rows[4]["efficiency_slowest"] == pytest.approx(320 / (4 * 80))
    assert rows[64]["efficiency_slowest"] is None
    assert rows[1]["predicted_step_time_s"] == pytest.approx(tokens(rows[1]) / 94)  # the forecast starts from it
    said = capsys.readouterr().out
    assert "zero1 on 1: 94 tokens/s (first step after 9 s of 100 s), the median of 4 GPUs from 80 to 100" in said
    assert "(80 to 100)" in said
    assert "of slowest" in said
    assert "81.6%" in said
    assert host.lines["perfect"] == [(1, 94), (2, 188), (4, 376), (64, 64 * 94)]
    assert host.lines[scaling.SLOWEST] == [(1, 100), (2, 196), (4, 320)]
    assert set(host.dashed) < host.lines.keys()


def tokens(row: Mapping[str, Any]) -> int:
    """Of a step."""
    return int(row["global_batch_size"]) * settings().model.sequence_length


def test_a_gpu_without_a_figure_costs_that_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host(monkeypatch, tmp_path, gpu0=100, gpu1=90, gpu2=-1, gpu3=0)
    rows, _, code = host.call(SIZES)
    assert code == 1
    assert rows[1]["tokens_per_s"] == 95
    assert rows[1]["problem"] is None
    assert rows[1]["cards_tokens_per_s"] == {"0": 100, "1": 90, "2": None, "3": None}
    assert rows[1]["cards_problems"] == {"2": "it failed", "3": scaling.NO_ROOM}
    assert rows[2]["efficiency_slowest"] == pytest.approx(160 / 180)
    assert rows[4]["efficiency_slowest"] is None  # two of its GPUs are unknown
    assert rows[4]["efficiency"] == pytest.approx(320 / 380)
    assert "zero1 on 1, GPU 2: it failed" in capsys.readouterr().out
    host.speeds["2"] = 70
    rows, started, code = host.call(SIZES)  # what failed runs anew
    assert len(started) == 4
    assert code == 0  # memory is no failure
    assert rows[1]["tokens_per_s"] == 90
    host.speeds |= dict.fromkeys("0123", -1)
    rows, started, code = host.call(SIZES)
    assert len(started) == 4
    assert rows[1]["tokens_per_s"] == 90  # what was measured is better than nothing


def test_where_no_gpu_has_a_figure_the_row_has_the_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, _, code = Host(monkeypatch, tmp_path, gpu0=0, gpu1=0).call("scaling.world_sizes=[1,2]")
    assert (rows[1]["tokens_per_s"], rows[1]["problem"], code) == (None, scaling.NO_ROOM, 0)
    assert rows[2]["efficiency"] == 1.0  # the first that fits
    rows, _, code = Host(monkeypatch, tmp_path, gpu0=-1, gpu1=0).call("scaling.world_sizes=[1,2]")
    assert (rows[1]["problem"], code) == ("it failed", 1)


def test_figures_of_gpus_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host(monkeypatch, tmp_path, gpu0=100, gpu1=90, gpu2=80, gpu3=70)
    first, *_ = host.call("scaling.world_sizes=[1,2]")
    again, started, _ = host.call("scaling.world_sizes=[1,2]")
    assert started == []
    assert again == first
    rows, started, _ = host.call(SIZES)
    assert started == [*(f"zero1_1_card_{i} on {i}" for i in range(4)), "zero1_4"]
    assert "kept from an earlier call; not of GPU 2, 3, so all are measured again" in capsys.readouterr().out
    rows, started, _ = host.call("scaling.world_sizes=[1,2]")
    assert started == []
    assert len(rows[1]["cards_tokens_per_s"]) == 4  # more than asked for


def test_rows_of_other_gpus_are_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank r runs on the r-th that is visible: the first two stay in the second call, the first in the third."""
    host = Host(monkeypatch, tmp_path, gpu0=100, gpu1=90, gpu2=80, gpu3=70)
    calls = "scaling.each_card=false", SIZES
    rows, *_ = host.call(*calls)
    assert rows[2]["devices"] == ["uuid-0", "uuid-1"]
    assert host.call(*calls)[1] == []
    identify(monkeypatch, 0, 1, 3, 2)
    rows, started, _ = host.call(*calls)
    assert started == ["zero1_4"]
    assert "1 of its 3 rows are of other batches or GPUs; moved to" in capsys.readouterr().out
    assert rows[4]["devices"] == ["uuid-0", "uuid-1", "uuid-3", "uuid-2"]
    identify(monkeypatch, 0, 2, 1, 3)
    assert host.call("scaling.each_card=false", "scaling.world_sizes=[1,2]")[1] == ["zero1_2"]
    identify(monkeypatch, 2, 0)  # 4 processes there are none any more, and none of 1 and 2 on these
    rows, started, _ = host.call("scaling.each_card=false", "scaling.world_sizes=[1,2]")
    assert started == ["zero1_1", "zero1_2"]
    assert set(rows) == {1, 2}
    assert host.probed == [4, 4, 2, 2]  # links are between the same GPUs


def test_each_gpus_own_figure_is_of_that_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where CUDA_VISIBLE_DEVICES calls another by its name, as on another host."""
    host = Host(monkeypatch, tmp_path, gpu0=100, gpu1=90)
    rows, *_ = host.call("scaling.world_sizes=[1,2]")
    assert rows[1]["devices"] == ["uuid-0", "uuid-1"]
    identify(monkeypatch, 0, 7)
    _, started, _ = host.call("scaling.world_sizes=[1,2]")
    assert started == ["zero1_1_card_0 on 0", "zero1_1_card_1 on 1", "zero1_2"]


def test_one_trial_alone_if_the_user_wants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = Host(monkeypatch, tmp_path, gpu0=100, gpu1=90)
    rows, started, _ = host.call("scaling.world_sizes=[1,2]", "scaling.each_card=false")
    assert started == ["zero1_1", "zero1_2"]
    assert rows[1]["cards_tokens_per_s"] is None
    assert rows[2]["efficiency_slowest"] is None
    assert scaling.SLOWEST not in host.lines


def test_reports_from_before_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They know nothing of GPUs by themselves."""
    host = Host(monkeypatch, tmp_path, gpu0=100, gpu1=90)
    host.call("scaling.world_sizes=[1,2]", "scaling.each_card=false")
    report = json.loads((tmp_path / "scaling.json").read_text())
    for row in report["rows"]:
        for name in ("cards_tokens_per_s", "cards_problems", "efficiency_slowest"):
            del row[name]
    (tmp_path / "scaling.json").write_text(json.dumps(report))
    rows, started, _ = host.call("scaling.world_sizes=[1,2]", "scaling.each_card=false")
    assert started == []
    assert rows[2]["efficiency"] == 1.0
    rows, started, _ = host.call("scaling.world_sizes=[1,2]")
    assert started == ["zero1_1_card_0 on 0", "zero1_1_card_1 on 1"]
    assert rows[2]["efficiency_slowest"] == pytest.approx(160 / 180)


def test_the_picture_has_both_lines(tmp_path: Path) -> None:
    row = scaling.Row("zero1", 1, 8, 100.0, *[None] * 5)
    rows = [replace(row, cards_tokens_per_s={"0": 110.0, "1": 90.0}), replace(row, world_size=2, tokens_per_s=170.0)]
    scaling.draw(rows, tmp_path / "x.png", "x")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("tool", "key"),
    [
        ("scaling", "scaling.engines"),
        ("scaling", "scaling.world_sizes"),
        ("compare", "compare.attention"),
        ("forecast", "forecast.engines"),
    ],
)
def test_an_empty_list_is_an_error(tool: str, key: str) -> None:
    given = ["forecast.tokens_per_s=1"] if tool == "forecast" else []
    config = compose([*given, f"{key}=[]"], tool)
    with pytest.raises(UserError, match=rf"{key}=\[\]: give"):
        check(config)


def check(config: RunConfig) -> None:
    """As the tool of this config does before it starts anything."""
    if isinstance(config, ScalingRunConfig):
        scaling.check(config)
    elif isinstance(config, CompareRunConfig):
        compare_attention.check(config)
    elif isinstance(config, ForecastRunConfig):
        forecast.check(config)
