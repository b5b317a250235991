"""curves.png from the metrics of ordinary, short, resumed and troubled runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from training import metrics as m
from training.logging import MetricsFile
from training.plot import plot_curves, series, smoothed


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def long_run(num_steps: int = 1000) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(10, num_steps + 1, 10):
        row: dict[str, Any] = {
            "step": step,
            m.TRAIN_LOSS: 3 + 5 * math.exp(-step / 100),
            m.MFU: 0.4,
            m.MFU_CAUSAL: 0.35,
        }
        if step % 250 == 0:
            row[m.VAL_LOSS] = row[m.TRAIN_LOSS] + 0.2
        rows.append(row)
    return rows


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def remember(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


def labels(figure: Figure, index: int) -> list[str]:
    legend = figure.axes[index].get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_long_run(tmp_path: Path, figures: list[Figure]) -> None:
    write(tmp_path / "metrics.jsonl", long_run())
    output = tmp_path / "curves.png"
    assert plot_curves(tmp_path / "metrics.jsonl", output, "a title") == output
    image = imread(output)
    assert image.shape[0] > 500
    assert image.shape[1] > 800
    (figure,) = figures
    loss, mfu = figure.axes
    assert loss.get_ylabel() == "loss, nats per token"
    assert mfu.get_ylabel() == "MFU, % of peak"
    assert mfu.get_xlabel() == "optimizer step"
    assert labels(figure, 0) == ["training: 3.000 (line: running median)", "validation: 3.200 (best 3.200)"]
    assert labels(figure, 1) == ["attention in full: 40.0 %", "attention causally: 35.0 %"]
    validation = loss.get_lines()[-1]
    assert list(np.asarray(validation.get_xdata())) == [250, 500, 750, 1000]
    assert np.asarray(validation.get_ydata())[0] == pytest.approx(3 + 5 * math.exp(-2.5) + 0.2)
    assert np.asarray(mfu.get_lines()[0].get_ydata()) == pytest.approx(40.0)
    assert list(tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, m.TRAIN_LOSS: 8.0}],
        [{"step": 0, m.VAL_LOSS: 8.0}],
        [{"step": 1, m.TRAIN_LOSS: 8.0}, {"step": 2, m.TRAIN_LOSS: None}, {"step": 3, m.TRAIN_LOSS: 7.0, m.MFU: 0.1}],
        [{"step": step, m.TRAIN_LOSS: 5.0} for step in range(1, 40)],
    ],
    ids=["one step", "validation only", "a hole", "a constant"],
)
def test_short_and_odd_runs(tmp_path: Path, rows: list[dict[str, Any]], recwarn: pytest.WarningsRecorder) -> None:
    write(tmp_path / "metrics.jsonl", rows)
    assert plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png") is not None
    assert imread(tmp_path / "curves.png").std() > 0.01  # not blank
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "optim/lr": 0.1}\n'], ids=["no file", "empty", "no loss"])
def test_nothing_to_draw_writes_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png") is None
    assert not (tmp_path / "curves.png").exists()


def test_resumed_run_is_one_line(tmp_path: Path, figures: list[Figure]) -> None:
    path = tmp_path / "metrics.jsonl"
    for resume_step, end in ((0, 20), (10, 15)):
        file = MetricsFile(path, resume_step)
        for step in range(resume_step + 1, end + 1):
            file.write(step, {m.TRAIN_LOSS: 5.0 - step / 10})
        file.close()
    plot_curves(path, tmp_path / "curves.png")
    (line,) = figures[0].axes[0].get_lines()
    assert list(np.asarray(line.get_xdata())) == list(range(1, 16))


def test_a_spike_does_not_flatten_the_curve(tmp_path: Path, figures: list[Figure]) -> None:
    rows = long_run()
    rows[50][m.TRAIN_LOSS] = 500.0
    write(tmp_path / "metrics.jsonl", rows)
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    low, high = figures[0].axes[0].get_ylim()
    assert low < 3.0
    assert 7.5 < high < 12  # the first loss is in, the spike is cut


def test_smoothing_neither_lags_nor_jumps() -> None:
    steps = list(range(0, 1000, 10))
    values = [10 - step / 200 for step in steps]
    at, line = smoothed(steps, values, width=11)
    assert at == steps
    assert line == pytest.approx(values)  # a straight line stays where it is, up to both ends
    values[50] = 1000.0
    assert max(smoothed(steps, values, width=11)[1]) <= 10.0
    assert len(smoothed(list(range(100_000)), [1.0] * 100_000, width=2500)[0]) == 400


def test_series_skips_what_is_not_a_number() -> None:
    rows = [{"step": 1, "x": 1}, {"step": 2}, {"step": 3, "x": None}, {"step": 4, "x": 2.5}]
    assert series(rows, "x") == ([1, 4], [1.0, 2.5])
