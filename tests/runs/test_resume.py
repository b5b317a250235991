"""Interrupted and uninterrupted runs are equal, bit for bit, from the first step to the last."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from configs.schema import ModelConfig
from model.flops import flops_per_token
from tests.data.conftest import make_texts, write_jsonl
from tests.runs.conftest import Runs, losses, rows
from training.checkpoint import checkpoints, consolidated_weights, find_checkpoint, step_of


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return dict(consolidated_weights(find_checkpoint(run_dir)))


def assert_equal_runs(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


@pytest.mark.parametrize(("engine", "processes"), [("zero0", 1), ("zero2", 1), ("zero0", 2), ("zero2", 2)])
def test_killed_run_goes_on_bit_for_bit(runs: Runs, tmp_path: Path, engine: str, processes: int) -> None:
    settings = [f"engine={engine}", "model.dropout=0.1", "train.steps=12"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.forked(*settings, f"run_dir={whole}", processes=processes)
    runs.forked(*settings, f"run_dir={killed}", processes=processes, kill_after_rows=5)
    result = runs.forked(*settings, f"run_dir={killed}", processes=processes)
    assert "Going on from" in result.stdout
    assert_equal_runs(whole, killed)


def test_packed_documents_go_on_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    """Samples with padding, and with the documents masked from each other; two ranks where there was one."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_texts(40))
    settings = ["data=jsonl", f"data.path={corpus}", "data.packing=best_fit", "data.document_mask=true"]
    settings += ["model.sequence_length=128", "optim.schedule=constant", "train.steps=12"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = runs.forked(*settings, f"run_dir={whole}")
    assert "% padding" in result.stdout
    last = rows(whole)[-1]
    assert last["data/tokens_seen"] < 12 * 4 * 128
    model = ModelConfig(num_layers=1, num_heads=2, width=32, sequence_length=128, vocab_size=300)
    flops = flops_per_token(model)
    share = last["perf/mfu_causal"] / last["perf/mfu"]
    assert flops.matmul / flops.megatron < share < 0.97 * flops.causal / flops.megatron, "keys of other documents"
    runs.forked(*settings, f"run_dir={killed}", kill_after_rows=5)
    runs.forked(*settings, f"run_dir={killed}")
    assert_equal_runs(whole, killed)
    runs.forked(*settings, f"run_dir={tmp_path / 'two'}", processes=2)
    for one, two in zip(rows(whole), rows(tmp_path / "two"), strict=True):
        assert one["data/tokens_seen"] == two["data/tokens_seen"]
        assert one["train/loss"] == pytest.approx(two["train/loss"], rel=2e-5)


def test_stop_and_go_on_across_an_epoch(runs: Runs, tmp_path: Path) -> None:
    """The corpus ends in the middle of a step, and the run is extended before and after that."""
    settings = ["data.max_documents=4", "model.sequence_length=128", "train.global_batch_size=16"]
    settings += ["optim.schedule=constant", "train.eval_every=0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs.forked(*settings, f"run_dir={whole}", "train.steps=24")
    epochs = [row["data/epoch"] for row in rows(whole)]
    assert epochs[-1] > 1.2, "the test's corpus is too long for its steps"
    turn = next(i for i, epoch in enumerate(epochs) if epoch > 1)
    for steps in (turn, turn + 1, 24):
        runs.forked(*settings, f"run_dir={parts}", f"train.steps={steps}")
    assert_equal_runs(whole, parts)


def test_sigterm_saves_and_the_next_start_goes_on(runs: Runs, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    runs.forked(f"run_dir={whole}", "train.steps=40", "train.save_every=1000")
    output = runs.interrupt(
        lambda: len(rows(stopped)) >= 3, signal.SIGTERM, f"run_dir={stopped}", "train.steps=40", "train.save_every=1000"
    )
    assert runs.last_code == 0, output
    assert "SIGTERM" in output
    assert "Stopped by SIGTERM" in output
    done = len(rows(stopped))
    assert find_checkpoint(stopped).name == f"step_{done:08d}"
    assert done < 40, "the run was over before the signal"
    runs.forked(f"run_dir={stopped}", "train.steps=40", "train.save_every=1000")
    assert_equal_runs(whole, stopped)


def test_damaged_checkpoint_is_passed_over(runs: Runs, tmp_path: Path) -> None:
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    runs.forked(f"run_dir={whole}")
    runs.forked(f"run_dir={damaged}")
    file = next(find_checkpoint(damaged).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result = runs.forked(f"run_dir={damaged}")
    assert "damaged" in result.stdout
    assert file.name in result.stdout
    assert "step_00000006" in result.stdout
    assert_equal_runs(whole, damaged)


def test_resume_never_starts_anew_and_keeps_the_old_run(runs: Runs, tmp_path: Path) -> None:
    runs.forked(f"run_dir={tmp_path / 'run'}", "train.steps=4")
    result = runs.forked(f"run_dir={tmp_path / 'run'}", "train.steps=4", "resume=never")
    assert "Going on" not in result.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "run" / "previous" / "1")


def test_a_record_without_checkpoints_is_kept(runs: Runs, tmp_path: Path) -> None:
    """Its checkpoints were deleted, to make room: the same command starts anew, and costs no history."""
    runs.forked(f"run_dir={tmp_path}", "train.steps=4")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    result = runs.forked(f"run_dir={tmp_path}", "train.steps=2")
    assert "there is no checkpoint to go on from: the run starts anew, earlier metrics are in" in result.stdout
    assert (tmp_path / "previous" / "1" / "metrics.jsonl").read_bytes() == before
    assert list(losses(tmp_path)) == [1, 2]
    assert "starts anew" not in runs.forked(f"run_dir={tmp_path}", "train.steps=3").stdout
    assert list(losses(tmp_path)) == [1, 2, 3]


def test_resume_from_another_run(runs: Runs, tmp_path: Path) -> None:
    first, second, whole = tmp_path / "first", tmp_path / "second", tmp_path / "whole"
    runs.forked(f"run_dir={first}", "train.steps=6", "optim.schedule=constant")
    runs.forked(f"run_dir={second}", f"resume={first}", "optim.schedule=constant")
    runs.forked(f"run_dir={whole}", "optim.schedule=constant")
    after = {step: loss for step, loss in losses(whole).items() if step > 6}
    assert losses(second) == after
    result = runs.forked(f"run_dir={whole}", f"resume={first}", "optim.schedule=constant")
    assert "is another run, earlier metrics are in" in " ".join(result.stdout.split())
    assert losses(whole) == after, "of the run that was there nothing"
    assert list(losses(whole / "previous" / "1")) == list(range(1, 9))


def test_going_back_leaves_the_later_checkpoints_aside(runs: Runs, tmp_path: Path) -> None:
    """They don't count for `keep_last`: of the steps done anew the newest two are kept, and of the others all."""
    runs.forked(f"run_dir={tmp_path}", "train.keep_last=0")
    back = [f"run_dir={tmp_path}", f"resume={tmp_path / 'checkpoints' / 'step_00000003'}", "train.keep_last=2"]
    result = runs.forked(*back, "train.save_every=1", "train.steps=5", "optim.schedule=constant")
    assert "step_00000006, step_00000008: not of what this run goes on from" in " ".join(result.stdout.split())
    assert [step_of(c) for c in checkpoints(tmp_path / "checkpoints")] == [5, 4]
    assert [step_of(c) for c in checkpoints(tmp_path / "checkpoints" / "abandoned" / "1")] == [8, 6]
    runs.forked(f"run_dir={tmp_path}", "train.save_every=0", "train.steps=9")
    assert list(losses(tmp_path)) == list(range(1, 10)), "gone on from step 5"
    other = runs.forked(f"run_dir={tmp_path}", f"resume={tmp_path / 'checkpoints/abandoned/1'}", "train.steps=9")
    assert "abandoned/1/step_00000008, 8 steps done" in other.stdout.replace("\n", "")
    assert [step_of(c) for c in checkpoints(tmp_path / "checkpoints")] == [9]
    assert [step_of(c) for c in checkpoints(tmp_path / "checkpoints" / "abandoned" / "2")] == [5, 4]


def test_longer_samples_go_on_where_the_shorter_ones_were(runs: Runs, tmp_path: Path) -> None:
    """A step takes as much of the corpus as it has tokens, before and after."""
    settings = [f"run_dir={tmp_path}", "model.position=rope", "optim.schedule=constant"]
    runs.run(*settings, "train.steps=4")
    result = runs.run(*settings, "model.sequence_length=128", "train.steps=6")
    assert "the 512 tokens seen were 16 samples, and count as 4 of the samples now" in result.stdout.replace("\n", " ")
    seen = [(row["data/tokens_seen"], row["data/epoch"]) for row in rows(tmp_path)]
    assert [tokens for tokens, _ in seen] == [128, 256, 384, 512, 1024, 1536]
    for tokens, epoch in seen:
        assert epoch / tokens == pytest.approx(seen[0][1] / seen[0][0], rel=1e-3)


def test_a_job_that_is_queued_again_goes_on_from_its_own_checkpoint(runs: Runs, tmp_path: Path) -> None:
    """And not from the other run's, where it began: that may be gone."""
    first, second, whole = tmp_path / "first", tmp_path / "second", tmp_path / "whole"
    steady = "optim.schedule=constant"
    runs.run(f"run_dir={first}", "train.steps=2", steady)
    job = {"SLURM_JOB_ID": "7"}
    runs.run(f"run_dir={second}", f"resume={first}", "train.steps=4", steady, environment=job)
    shutil.rmtree(first)
    again = runs.run(f"run_dir={second}", f"resume={first}", steady, environment=job | {"SLURM_RESTART_COUNT": "1"})
    assert "second/checkpoints/step_00000004, 4 steps done" in again.stdout.replace("\n", "")
    runs.run(f"run_dir={whole}", steady)
    assert losses(second) == {step: loss for step, loss in losses(whole).items() if step > 2}


def test_a_mixture_of_other_weights_goes_on(runs: Runs, tmp_path: Path) -> None:
    """Losses and epochs by source, and their mean, are logged; other weights on resuming are a warning."""
    big = write_jsonl(tmp_path / "big.jsonl", make_texts(160, seed=1))
    small = write_jsonl(tmp_path / "small.jsonl", make_texts(60, seed=2))

    def train(steps: int, weight: float) -> str:
        sources = f"{{name: big, weight: {weight}, source: jsonl, path: {big}}}"
        sources += f", {{name: small, weight: 1.0, source: jsonl, path: {small}}}"
        settings = ("data=mixture", f"data.mixture=[{sources}]", f"run_dir={tmp_path / 'run'}")
        return runs.forked(*settings, f"train.steps={steps}").stdout

    assert "big: 75.00% of them" in train(4, 3.0)
    last = rows(tmp_path / "run")[-1]
    assert last["val/loss"] == pytest.approx(0.75 * last["val/loss/big"] + 0.25 * last["val/loss/small"])
    assert last["val/loss/big"] != last["val/loss/small"]
    assert last["data/epoch/big"] > 0
    again = train(6, 1.0)
    assert "data.mixture.big.weight was 3.0, is 1.0: the run goes on differently" in " ".join(again.split())
    assert "val/loss/small" in again


def test_changed_keys_are_reported(runs: Runs, tmp_path: Path) -> None:
    runs.forked(f"run_dir={tmp_path}", "train.steps=3")
    result = runs.forked(f"run_dir={tmp_path}", "train.steps=4", "optim.lr=1e-4", "train.log_every=2")
    assert "optim.lr was 0.003, is 0.0001: the run goes on differently" in result.stdout
    assert "train.log_every was 1, is 2: changes rounding, speed or output at most" in result.stdout


def test_a_batch_that_follows_from_the_ranks_is_reported(runs: Runs, tmp_path: Path) -> None:
    """No key differs, and yet a step takes half of what it took; with other keys it is the same again."""
    free = [f"run_dir={tmp_path}", "train.global_batch_size=null"]
    runs.forked(*free, "train.micro_batch_size=2", "train.steps=2", processes=2)
    told = "train.global_batch_size was 4, is 2: the run goes on differently"
    assert told in runs.forked(*free, "train.micro_batch_size=2", "train.steps=2").stdout
    same = runs.forked(f"run_dir={tmp_path}", "train.global_batch_size=4", "train.steps=2").stdout
    assert "Going on from" in same
    assert "goes on differently" not in same


def test_a_start_that_fails_leaves_the_config_that_it_is_told_to_restore(runs: Runs, tmp_path: Path) -> None:
    runs.forked(f"run_dir={tmp_path}", "train.steps=1")
    before = (tmp_path / "config.yaml").read_bytes()
    result = runs.forked(f"run_dir={tmp_path}", "train.steps=2", "model.width=64", code=2)
    assert "restore model.* as in its config.yaml" in " ".join(result.stderr.split())
    assert (tmp_path / "config.yaml").read_bytes() == before
    runs.forked(f"run_dir={tmp_path}", "train.steps=2")
    assert "  steps: 2" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("first", "second"),
    [(("zero1", 2), ("zero1", 1)), (("zero2", 1), ("zero3", 2)), (("zero3", 2), ("zero1", 1))],
    ids=lambda value: f"{value[0]}x{value[1]}",
)
def test_other_stages_and_ranks_go_on(
    runs: Runs, tmp_path: Path, first: tuple[str, int], second: tuple[str, int]
) -> None:
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    steady = "optim.schedule=constant"
    runs.forked(f"run_dir={whole}", steady)
    runs.forked(f"run_dir={changed}", steady, "train.steps=4", f"engine={first[0]}", processes=first[1])
    runs.forked(f"run_dir={changed}", steady, f"engine={second[0]}", processes=second[1])
    for step, (loss, norm) in losses(whole).items():
        assert losses(changed)[step] == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3))


@pytest.mark.skipif("FAULT_KILLS" not in os.environ, reason="minutes on two cores: make soak")
@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_eight_ranks_go_on_as_two_and_two_as_eight(runs: Runs, tmp_path: Path, engine: str) -> None:
    """Whole runs, with the loader; tests/training/test_resume_engine.py does it without, in seconds."""
    settings = [f"engine={engine}", "train.global_batch_size=8", "optim.schedule=constant"]
    runs.forked(*settings, f"run_dir={tmp_path / 'whole'}", processes=2)
    for before, after in ((8, 2), (2, 8)):
        folder = tmp_path / f"from_{before}"
        runs.forked(*settings, f"run_dir={folder}", "train.steps=4", processes=before)
        runs.forked(*settings, f"run_dir={folder}", processes=after)
        for step, expected in losses(tmp_path / "whole").items():
            assert losses(folder)[step] == pytest.approx(expected, rel=1e-5), step


def test_two_runs_in_one_folder_are_refused(runs: Runs, tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = runs.forked(f"run_dir={folder}", code=2)
    assert "Another run" in result.stderr
    shutil.rmtree(folder)
