"""`train.profile_steps` with two ranks: each profiles itself, and their lanes meet in one picture."""

import json
from pathlib import Path

from tests.runs.conftest import Runs


def test_every_rank_is_in_the_picture(runs: Runs, tmp_path: Path) -> None:
    runs.forked("engine=zero3", "train.profile_steps=2", "engine.sequence_parallel_size=2", f"run_dir={tmp_path}",
             "train.eval_every=0", "train.save_every=0", processes=2)  # fmt: skip
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "waterfall.png").exists()
    report = json.loads((tmp_path / "waterfall.json").read_text())
    assert [lanes["rank"] for lanes in report["ranks"]] == [0, 1]
    for lanes in report["ranks"]:
        assert 0 < lanes["compute_s"] < lanes["step_time_s"]
        assert 0 < lanes["communication_s"] < lanes["step_time_s"]
        assert 0 <= lanes["hidden_s"] <= min(lanes["communication_s"], lanes["compute_s"])
    assert report["tokens_per_step"] == 4 * 32 / 2  # of a rank: it has half of each sample
