"""Checkpoints in one process: exact, across ZeRO stages, and with files damaged, missing or not writable."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from configs.messages import plain
from configs.schema import MixtureSource, Packing, Precision, RunConfig, Source
from model import build_model, init
from tests.training.conftest import equal, make_engine, make_model, masters, run_config, state_of, train
from training import checkpoint, rng, shards
from training.backend import DTYPES
from training.batch import resolve_batch
from training.checkpoint import CheckpointError
from training.differences import ABSENT, compare_configs
from training.distributed import Processes
from training.engine import Engine, build_engine
from training.optimizer import fp16_scale
from training.resume import resume
from training.run import RunFolder
from training.saver import Saver
from training.state import TrainState

LAYOUTS: list[tuple[int, dict[str, bool]]] = [
    (0, {}),
    (1, {}),
    (2, {}),
    (3, {}),
    (1, {"offload_optimizer": True}),
    (3, {"offload_optimizer": True, "offload_params": True}),
]
Build = Callable[..., Engine]


@pytest.fixture
def build(processes: Processes) -> Iterator[Build]:
    """Makes engines (stage, precision) that are closed after the test."""
    made: list[Engine] = []

    def make(stage: int = 1, precision: str = "fp32", **engine: Any) -> Engine:
        config = run_config(stage, accumulation=2, micro=2, **engine)
        config.engine.precision = Precision(precision)
        config.model.dropout = 0.1  # so that random states matter
        rng.seed_all(3)
        made.append(make_engine(config, processes))
        return made[-1]

    yield make
    for one in made:
        one.close()


def save(one: Engine, folder: Path, step: int, **keys: int) -> Path:
    return checkpoint.save(one, TrainState(step=step, consumed_samples=4 * step), folder, tokenizer_hash="abc", **keys)


@pytest.mark.parametrize(("stage", "offload"), LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bitwise(build: Build, tmp_path: Path, stage: int, offload: dict[str, bool], precision: str) -> None:
    one = build(stage, precision, **offload)
    train(one, 0, 3)
    save(one, tmp_path, 3)
    results, state = train(one, 3, 6), state_of(one)
    other = build(stage, precision, **offload)
    torch.rand(7)  # another place in the random stream
    loaded = checkpoint.load(other, tmp_path)
    assert loaded is not None
    assert loaded.state == TrainState(step=3, consumed_samples=12)
    assert not loaded.messages
    assert train(other, 3, 6) == results
    assert equal(state_of(other), state)


@pytest.mark.parametrize(("stage", "offload"), LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_replaces_all_of_weights_that_were_not_drawn(
    build: Build,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stage: int,
    offload: dict[str, bool],
    precision: str,
) -> None:
    """NaN everywhere before: in masters, moments and the model's own weights none is left."""
    one = build(stage, precision, **offload)
    train(one, 0, 3)
    save(one, tmp_path, 3)
    expected, state = logits(one.module.eval()), state_of(one)
    results = train(one, 3, 6)
    with torch.device("meta"):
        model = build_model(one.config.model)
    plain = torch.nn.Module.to_empty

    def to_empty(self: torch.nn.Module, **keys: Any) -> torch.nn.Module:
        for parameter in (made := plain(self, **keys)).parameters(recurse=False):
            parameter.data.fill_(torch.nan)
        return made

    monkeypatch.setattr(torch.nn.Module, "to_empty", to_empty)
    monkeypatch.setattr(init, "normal_", lambda *_: pytest.fail("weights are drawn"))
    other = build_engine(model, one.config, resolve_batch(one.config.train, 1), processes, draw=False)
    try:
        assert all(weight.isnan().all() for weight in masters(other).values())
        assert checkpoint.load(other, tmp_path) is not None
        assert equal(state_of(other), state)
        assert torch.equal(logits(other.module.eval()), expected)
        assert train(other, 3, 6) == results
    finally:
        other.close()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What the model's own weights say, (61, S, 61)."""
    tokens = torch.arange(61 * 16).view(61, 16) % 61
    out: torch.Tensor = model(tokens)
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_stage_into_any_other(build: Build, tmp_path: Path, precision: str) -> None:
    """Masters, moments and step count arrive bit for bit, and the weights are the masters rounded."""
    engines = [build(stage, precision, **offload) for stage, offload in LAYOUTS]
    sources = []
    for number, one in enumerate(engines):
        train(one, 0, 2)
        save(one, tmp_path / str(number), 2)
        sources.append(state_of(one))
    for other, number in itertools.product(engines, range(len(sources))):
        checkpoint.load(other, tmp_path / str(number))
        assert equal(state_of(other), sources[number])
        assert other.partition.updates == 2
        rounded = make_model(other.config).to(DTYPES[Precision(precision)])
        checkpoint.load_weights(rounded, tmp_path / str(number) / "step_00000002")
        rounded.eval()
        other.module.eval()
        assert torch.equal(logits(other.deepspeed), logits(rounded))
        assert train(other, 2, 3)[0].updated


def test_precision_may_change(build: Build, tmp_path: Path) -> None:
    one = build(1, "bf16")
    train(one, 0, 2)
    save(one, tmp_path, 2)
    other = build(2, "fp32")
    checkpoint.load(other, tmp_path)
    assert equal(state_of(other), state_of(one))


@pytest.fixture
def saved(build: Build, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with good checkpoints of steps 1 and 2, and the state of step 1."""
    one = build()
    train(one, 0, 1)
    save(one, tmp_path, 1)
    state = state_of(one)
    train(one, 1, 2)
    save(one, tmp_path, 2)
    return tmp_path, state


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


SHARD, MANIFEST = "rank_00000.safetensors", "manifest.json"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (lambda c: (c / SHARD).unlink(), rf"{SHARD} can't be opened: No such file"),
    "shard truncated": (lambda c: truncate(c / SHARD), rf"{SHARD} has [\d,]+ bytes, should have"),
    "header": (lambda c: flip_bit(c / SHARD, 20), rf"{SHARD}: the header isn't what was written"),
    "header length": (lambda c: flip_bit(c / SHARD, 0), rf"{SHARD}: the header isn't what was written"),
    "a tensor": (lambda c: flip_bit(c / SHARD, 300_000), rf"{SHARD}: \S+ isn't what was written"),
    "random state": (lambda c: flip_bit(c / SHARD, -5), rf"{SHARD}: random.torch_cpu isn't what was written"),
    "manifest missing": (lambda c: (c / MANIFEST).unlink(), rf"{MANIFEST} can't be read"),
    "manifest truncated": (lambda c: truncate(c / MANIFEST), rf"{MANIFEST} isn't what was written"),
    "manifest empty": (lambda c: (c / MANIFEST).write_text(""), rf"{MANIFEST} isn't what was written"),
    "manifest changed": (
        lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text().replace('"step": 2', '"step": 3')),
        rf"{MANIFEST} isn't what was written",
    ),
    "shard of another step": (
        lambda c: shutil.copy(c.with_name("step_00000001") / SHARD, c / SHARD),
        rf"{SHARD}: \S+ isn't what was written",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_falls_back_to_the_previous_one(
    build: Build, saved: tuple[Path, dict[str, torch.Tensor]], damage: str
) -> None:
    folder, state = saved
    spoil, message = DAMAGE[damage]
    spoil(folder / "step_00000002")
    one = build()
    loaded = checkpoint.load(one, folder)
    assert loaded is not None
    assert loaded.path == folder / "step_00000001"
    assert loaded.state.step == 1
    assert equal(state_of(one), state)
    (told,) = loaded.messages
    assert re.search(rf"step_00000002 is damaged and was passed over \(rank 0: {message}", told)
    with pytest.raises(CheckpointError, match=message):  # no fallback from a path that names one checkpoint
        checkpoint.load(one, folder / "step_00000002")


def test_every_byte_of_a_checkpoint_is_checked(build: Build, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = saved
    target = folder / "step_00000002"
    one = build()
    draw = random.Random(1)
    for file in (target / SHARD, target / MANIFEST):
        good = file.read_bytes()
        for position in draw.sample(range(len(good)), 25):
            if file.name == MANIFEST and good[position : position + 1].isspace():
                continue  # between JSON values
            flip_bit(file, position)
            loaded = checkpoint.load(one, folder)
            assert loaded is not None
            assert loaded.path.name == "step_00000001", f"{file.name}: byte {position}"
            file.write_bytes(good)


def test_nothing_usable_is_an_error_and_nothing_at_all_is_not(
    build: Build, saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _ = saved
    one = build()
    for found in checkpoint.candidates(folder):
        truncate(found / SHARD)
    with pytest.raises(CheckpointError, match=r"(?s)no usable checkpoint.*step_00000002.*step_00000001.*resume=never"):
        checkpoint.load(one, folder)
    assert checkpoint.load(one, tmp_path / "empty") is None


def test_run_folders_and_the_pointer(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, _ = saved
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("step_00000001", "step_00000002", "latest"):
        shutil.move(folder / name, run / "checkpoints" / name)
    assert [c.name for c in checkpoint.candidates(run)] == ["step_00000002", "step_00000001"]
    assert checkpoint.find_checkpoint(run).name == "step_00000002"
    # A run went back to step 1 and saved there: its own checkpoints come before those of the branch it left.
    (run / "checkpoints" / "latest").write_text("step_00000001\n")
    assert [c.name for c in checkpoint.candidates(run)] == ["step_00000001", "step_00000002"]
    # A pointer to nothing doesn't matter.
    (run / "checkpoints" / "latest").write_text("step_00000009\n")
    assert checkpoint.find_checkpoint(run).name == "step_00000002"
    # Where the one it names is gone, one of its own branch comes before later ones of another.
    shutil.move(run / "checkpoints" / "step_00000002", run / "checkpoints" / "step_00000004")
    (run / "checkpoints" / "latest").write_text("step_00000003\n")
    assert [c.name for c in checkpoint.candidates(run)] == ["step_00000001", "step_00000004"]
    # A run may have any name.
    for name in ("step_by_step", "step_7"):
        run = run.rename(tmp_path / name)
        assert checkpoint.find_checkpoint(run).name == "step_00000001"
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        checkpoint.find_checkpoint(folder / "nowhere")


def test_another_model_or_tokenizer(build: Build, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = saved
    config = run_config(1)
    config.model.width = 128
    with pytest.raises(CheckpointError, match=r"another model: \d+ parameters differ, first embedding\.weight"):
        checkpoint.load_weights(make_model(config), folder / "step_00000002")
    one = build()
    with pytest.raises(CheckpointError, match=r"another tokenizer \(abc, now def\)"):
        checkpoint.load(one, folder, tokenizer_hash="def")
    assert checkpoint.load(one, folder, tokenizer_hash="abc") is not None


def test_wandbs_run_stays_with_its_folder(build: Build, tmp_path: Path) -> None:
    """A run that begins from another's checkpoint must not write into that one's curves."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    one = build()
    checkpoint.save(one, TrainState(step=1, wandb_id="abcd1234"), first.checkpoints, tokenizer_hash="abc")
    corpus: Any = SimpleNamespace(tokenizer_hash="abc", content_hash="def")
    loader: Any = None
    terminal: Any = SimpleNamespace(warn=lambda text: None, say=lambda text: None)
    one.config.resume = str(first.path)
    assert resume(one, one.config, second, corpus, loader, terminal).state.wandb_id is None
    assert resume(one, one.config, first, corpus, loader, terminal).state.wandb_id == "abcd1234"


def test_saving_what_is_already_there(build: Build, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = saved
    truncate(folder / "step_00000002" / SHARD)
    one = build()
    checkpoint.load(one, folder)
    train(one, 1, 2)
    save(one, folder, 2)
    loaded = checkpoint.load(one, folder)
    assert loaded is not None
    assert loaded.state.step == 2
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000001", "step_00000002"]


# Writing


def test_full_disk_keeps_the_previous_one(
    build: Build, saved: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own ENOSPC, from /dev/full, in the middle of a save."""
    folder, _ = saved
    one = build()
    plain = checkpoint.prepare

    def prepare(temporary: Path) -> None:
        plain(temporary)
        (temporary / SHARD).symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "prepare", prepare)
        with pytest.raises(
            CheckpointError,
            match=r"(?s)step_00000003 was not written, earlier.*rank 0: No space left on device \(.*00000",
        ):
            save(one, folder, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000001", "step_00000002"]
    loaded = checkpoint.load(one, folder)
    assert loaded is not None
    assert loaded.state.step == 2
    save(one, folder, 3)


@pytest.mark.parametrize("place", ["write_share", "publish"])
def test_a_defect_leaves_no_half_checkpoint(
    build: Build, saved: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """One on rank 0, which goes on as it is: the folder may be as large as a checkpoint, and no save may follow."""
    folder, _ = saved
    one = build()

    def fail(*_: object) -> None:
        assert (folder / "step_00000003.tmp").is_dir()
        raise TypeError("no such tensor")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, place, fail)
        with pytest.raises(TypeError, match="no such tensor"):
            save(one, folder, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000001", "step_00000002"]
    save(one, folder, 3)
    assert checkpoint.find_checkpoint(folder).name == "step_00000003"


def test_write_that_fails_in_the_middle(build: Build, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """A real limit on the size of files: a part of the shard is on the disk when the write fails."""
    folder, _ = saved
    one = build()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="was not written") as error:
            save(one, folder, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in str(error.value)
    assert [c.name for c in checkpoint.candidates(folder)] == ["step_00000002", "step_00000001"]
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("moment", ["manifest.json", "latest"])
def test_small_files_that_fail(
    build: Build, saved: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder, _ = saved
    one = build()
    plain = checkpoint.write_synced

    def write_synced(path: Path, text: str) -> None:
        if path.name.startswith(moment):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        plain(path, text)

    monkeypatch.setattr(checkpoint, "write_synced", write_synced)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(one, folder, 3)
    assert [c.name for c in checkpoint.checkpoints(folder)] == ["step_00000002", "step_00000001"]


def test_what_is_kept(build: Build, tmp_path: Path) -> None:
    one = build()
    (tmp_path / "step_00000001.tmp").mkdir()
    (tmp_path / "step_00000099.old.tmp").mkdir()
    for step in range(1, 8):
        save(one, tmp_path, step, keep_last=2, keep_every=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest", "step_00000003", "step_00000006", "step_00000007",
    ]  # fmt: skip
    save(one, tmp_path, 8, keep_last=0)
    assert len(checkpoint.checkpoints(tmp_path)) == 4
    save(one, tmp_path, 2, keep_last=1)  # steps after it, of another branch, aren't its to delete
    assert [checkpoint.step_of(c) for c in checkpoint.checkpoints(tmp_path)] == [8, 7, 6, 3, 2]
    assert (tmp_path / "latest").read_text() == "step_00000002\n"


def full(path: Path, text: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_what_a_run_that_goes_back_leaves_behind(build: Build, tmp_path: Path) -> None:
    """Neither counts for `keep_last` nor is ever gone on from; and a save that fails moves nothing."""
    one = build()
    for step in (2, 3, 4, 6):
        save(one, tmp_path, step)
    elsewhere = save(one, tmp_path / "other", 3)
    assert [c.name[-1] for c in checkpoint.left_behind(tmp_path, tmp_path / "step_00000002")] == ["6", "4", "3"]
    assert checkpoint.left_behind(tmp_path, tmp_path / "step_00000006") == []
    assert len(checkpoint.left_behind(tmp_path, elsewhere)) == len(checkpoint.left_behind(tmp_path, None)) == 4
    copied = shutil.copytree(tmp_path / "step_00000003", tmp_path / "best")  # under a name of the user's
    assert [c.name[-1] for c in checkpoint.left_behind(tmp_path, copied)] == ["6", "4"]
    behind = checkpoint.left_behind(tmp_path, tmp_path / "step_00000002")
    saver = Saver(one, tmp_path, tokenizer_hash="abc", keep_last=2, abandoned=behind, asynchronous=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_synced", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            saver.save(TrainState(step=5))
    assert len(checkpoint.checkpoints(tmp_path)) == 4
    for step in (5, 7):
        saver.save(TrainState(step=step))
        assert [c.name[-1] for c in checkpoint.candidates(tmp_path)] == {5: ["5", "2"], 7: ["7", "5"]}[step]
    saver.close()
    assert [c.name[-1] for c in checkpoint.candidates(tmp_path / "abandoned" / "1")] == ["6", "4", "3"]
    again = checkpoint.left_behind(tmp_path, tmp_path / "step_00000005")
    taken = checkpoint.snapshot(one, TrainState(step=6), tokenizer_hash="abc")
    checkpoint.commit(taken, tmp_path, one.processes, abandoned=again)
    assert [c.name for c in (tmp_path / "abandoned" / "2").iterdir()] == ["step_00000007"]


def test_a_kill_while_they_are_moved_leaves_what_was_gone_on_from(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build()
    for step in (2, 3, 4):
        save(one, tmp_path, step)

    def kill(abandoned: list[Path]) -> None:
        move_aside(abandoned)
        raise KeyboardInterrupt

    move_aside = checkpoint.move_aside
    monkeypatch.setattr(checkpoint, "move_aside", kill)
    taken = checkpoint.snapshot(one, TrainState(step=9), tokenizer_hash="abc")
    behind = checkpoint.left_behind(tmp_path, tmp_path / "step_00000002")
    with pytest.raises(KeyboardInterrupt):
        checkpoint.commit(taken, tmp_path, one.processes, keep_last=1, abandoned=behind)
    assert [c.name for c in checkpoint.candidates(tmp_path)] == ["step_00000002"]


# Contents


def test_an_old_one_that_cannot_be_deleted_ends_nothing(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS while somebody reads it: neither the save that replaces it fails, nor any later one."""
    remove = shutil.rmtree

    def busy(path: Path, **options: Any) -> None:
        if ".old" in path.name:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        remove(path, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    one = build()
    for step in (1, 2, 3):
        save(one, tmp_path, step, keep_last=1)
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["step_00000003"]
    assert "step_00000001.old.tmp can't be deleted: Directory not empty" in caplog.text


def test_files_are_safetensors_and_json(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, state = saved
    target = folder / "step_00000001"
    assert sorted(path.name for path in target.iterdir()) == [MANIFEST, SHARD]
    json.loads((target / MANIFEST).read_text())
    with safe_open(str(target / SHARD), "pt") as reader:
        for name, tensor in state.items():
            assert torch.equal(reader.get_tensor(name), tensor.flatten())


def test_no_code_unpickles() -> None:
    root = Path(checkpoint.__file__).parent
    for path in root.glob("*.py"):
        text = path.read_text()
        assert "torch.load" not in text, path
        assert "torch.save" not in text, path
        assert "import pickle" not in text, path


def test_consolidated_weights(build: Build, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, state = saved
    found = dict(checkpoint.consolidated_weights(folder / "step_00000001"))
    expected = {n.removeprefix("master."): t for n, t in state.items() if n.startswith("master.")}
    assert equal(found, expected)
    model = make_model(run_config(1))
    checkpoint.load_weights(model, folder / "step_00000001")
    assert equal({n: p.detach() for n, p in model.named_parameters()}, expected)
    assert [*found] == [n for n, _ in model.named_parameters()]
    flip_bit(folder / "step_00000001" / SHARD, 300_000)
    with pytest.raises(CheckpointError, match="is damaged"):
        list(checkpoint.consolidated_weights(folder / "step_00000001"))


def test_manifest_says_what_was_trained(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    manifest = checkpoint.read_manifest(saved[0] / "step_00000002")
    assert (manifest.step, manifest.updates, manifest.world_size, manifest.zero_stage) == (2, 2, 1, 1)
    assert manifest.config["optim"]["lr"] == 1e-2
    assert manifest.versions["torch"] == torch.__version__
    assert checkpoint.saved_config(saved[0] / "step_00000002") == manifest.config
    config = run_config(1, accumulation=2, micro=2)
    config.model.dropout = 0.1
    assert compare_configs(manifest.config, config) == []


def test_skipped_steps_and_loss_scale_survive(build: Build, tmp_path: Path) -> None:
    one = build(0, "fp16")
    train(one, 0, 1)
    one.loss_scale.scale, one.loss_scale.calm_steps = 512.0, 17
    checkpoint.save(one, TrainState(step=4, skipped_steps=3), tmp_path, tokenizer_hash="abc")
    other = build(0, "fp16")
    checkpoint.load(other, tmp_path)
    assert (other.loss_scale.scale, other.loss_scale.calm_steps, other.skipped) == (512.0, 17, 3)
    assert other.partition.updates == 1


def test_a_loss_scale_that_is_set_on_resuming_is_used(build: Build, tmp_path: Path) -> None:
    """Fixed where it was dynamic, or another number, or dynamic again: as the config says, and as is said of it."""
    for before, now in ((0.0, 128.0), (128.0, 64.0), (64.0, 0.0)):
        one, other = (build(0, "fp16", loss_scale=scale) for scale in (before, now))
        saved = save(one, tmp_path, 1)
        assert checkpoint.load(other, saved) is not None
        assert other.loss_scale == fp16_scale(now)


def test_shard_file_round_trip(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "empty": torch.empty(0),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "view": torch.randn(4, 6)[:, ::2],
    }
    record = shards.write_shard(tmp_path / "x.safetensors", tensors)
    reader = shards.ShardReader(tmp_path, record)
    reader.check_size()
    with safe_open(str(tmp_path / "x.safetensors"), "pt") as library:
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name), tensor)
            assert torch.equal(library.get_tensor(name), tensor)
    reader.close()


def test_random_states_round_trip() -> None:
    rng.seed_all(11)
    random.gauss(0, 1)
    np.random.standard_normal()  # leaves half a pair cached
    state = rng.capture()
    state.host = json.loads(json.dumps(state.host))

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.standard_normal(), torch.rand(()).item()]

    first = draw()
    draw()
    rng.restore(state)
    assert draw() == first


def test_ranks_draw_differently() -> None:
    draws = set()
    for rank, step in itertools.product(range(3), range(3)):
        rng.seed_rank(5, rank, step)
        draws.add((torch.rand(()).item(), random.random(), np.random.random()))
    assert len(draws) == 9


def test_differences() -> None:
    saved_config, current = run_config(1), run_config(3)
    assert compare_configs(saved_config, saved_config) == []
    current.optim.lr = 5e-4
    current.logging.project = "other"
    found = compare_configs(saved_config, current)
    assert [(d.key, d.saved, d.current, d.matters) for d in found] == [
        ("optim.lr", 1e-2, 5e-4, True),
        ("engine.zero_stage", 1, 3, False),
        ("logging.project", "flashtrain", "other", False),
    ]
    (gone,) = compare_configs({"model": {"old": 1}}, {"model": {}})
    assert (gone.key, gone.saved, gone.current, gone.matters) == ("model.old", 1, ABSENT, True)


def test_a_key_younger_than_the_checkpoint_was_at_its_default() -> None:
    saved = plain(run_config(1))
    del saved["data"]["packing"], saved["data"]["mixture"]
    current = run_config(1)
    assert compare_configs(saved, current) == []
    current.data.packing = Packing.best_fit
    (found,) = compare_configs(saved, current)
    assert (found.key, found.saved, found.current, found.matters) == ("data.packing", "concatenate", "best_fit", True)


def test_the_source_of_a_mixture_that_an_earlier_version_saved() -> None:
    """It was the default, which `data=mixture` left as it was; a change of what is mixed is told, or to one source."""
    current = run_config(1)
    current.data.source, current.data.mixture = Source.mixture, [MixtureSource("own", 2.0)]
    saved = plain(current)
    saved["data"]["source"] = "stdlib"
    assert compare_configs(saved, current) == []
    current.data.mixture[0].weight = 3.0
    assert [d.key for d in compare_configs(saved, current)] == ["data.mixture.own.weight"]
    assert "data.source" in [d.key for d in compare_configs(run_config(1), current)]
    assert "data.source" in [d.key for d in compare_configs(current, run_config(1))]


def test_every_harmless_key_exists() -> None:
    from training.differences import HARMLESS, flat

    keys = flat(plain(RunConfig()))
    for name in HARMLESS:
        assert any(key == name or (name.endswith(".") and key.startswith(name)) for key in keys), name


def test_masters_are_fp32_in_every_precision(build: Build) -> None:
    for stage in range(4):
        assert {t.dtype for t in masters(build(stage, "bf16")).values()} == {torch.float32}
