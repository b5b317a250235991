"""Preparation: right, the same for any number of workers, and never half done whatever happens to it.

FAULT_KILLS=50 kills the preparations of `test_killed_at_random_moments` that often, instead of a handful of times.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.schema import DataConfig, Source
from data import DataError, PreparedData, Progress, load_tokenizer, open_prepared, prepare, prepare_tokenizer
from data.preparation import STATE
from data.shards import MANIFEST, ShardWriter, SplitInfo, TokenDataset, can_resume, token_dtype
from data.worker import text_hash
from tests.data.conftest import jsonl_config, make_texts, write_jsonl

KILLS = int(os.environ.get("FAULT_KILLS", "4"))
PREPARE = """
import sys
from pathlib import Path
import data.encode
from data import prepare
data.encode.BATCH_CHARS = 8000  # 170 batches, after each of which it may be killed
from tests.data.conftest import jsonl_config
prepared = prepare(jsonl_config(Path(sys.argv[1]), Path(sys.argv[2]), num_workers=int(sys.argv[3])))
print(prepared.content_hash)
"""


def start(corpus: Path, cache: Path, workers: int = 1) -> subprocess.Popen[str]:
    """A process that prepares `corpus` and prints the hash of its content."""
    command = [sys.executable, "-c", PREPARE, str(corpus), str(cache), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files(folder: Path) -> dict[str, str]:
    """Checksum of every file of a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def decoded(dataset: TokenDataset, prepared: PreparedData) -> list[str]:
    """The texts of a split."""
    tokenizer = load_tokenizer(prepared)
    documents = list(dataset.documents())
    assert all(tokens[0] == prepared.eos_id for tokens in documents)
    return [tokenizer.decode(tokens[1:].tolist(), skip_special_tokens=False) for tokens in documents]


def test_every_document_is_in_one_split(tiny: PreparedData, texts: list[str]) -> None:
    """In order, without the empty ones, split by the hash of their text, counted in bytes."""
    train, validation = decoded(tiny.train, tiny), decoded(tiny.validation, tiny)
    threshold = tiny.manifest.settings["holdout_threshold"]
    held = [text for text in texts if text and text_hash(text.encode()) < threshold]
    kept = [text for text in texts if text and text_hash(text.encode()) >= threshold]
    assert (train, validation) == (kept, held)
    assert 0.03 * len(texts) < len(held) < 0.2 * len(texts)
    for dataset, split in ((tiny.train, kept), (tiny.validation, held)):
        assert dataset.num_bytes == sum(len(text.encode()) for text in split)
        assert dataset.num_documents == len(split)
        assert dataset.num_tokens == dataset.document_lengths().sum() == sum(map(len, dataset.documents()))
        assert dataset.bytes_per_token == dataset.num_bytes / dataset.num_tokens
    assert all(shard.num_tokens <= 2000 for shard in tiny.train.info.shards)
    assert tiny.vocab_size == load_tokenizer(tiny).get_vocab_size() == 320


def test_the_split_does_not_depend_on_the_order(tiny: PreparedData, texts: list[str], tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(texts, len(texts))
    again = prepare(jsonl_config(write_jsonl(tmp_path / "b.jsonl", shuffled), tmp_path / "cache"))
    assert sorted(decoded(again.validation, again)) == sorted(decoded(tiny.validation, tiny))


def test_any_number_of_workers_writes_the_same_bytes(tiny: PreparedData, texts: list[str], tmp_path: Path) -> None:
    corpus = tiny.folder.parent.parent / "tiny.jsonl"
    for workers in (2, 3):
        again = prepare(jsonl_config(corpus, tmp_path / str(workers), num_workers=workers))
        assert files(again.folder) == files(tiny.folder)
        assert again.corpus_key == tiny.corpus_key


def test_the_second_call_works_from_the_cache(
    tiny: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tiny.folder.parent.parent / "tiny.jsonl"
    cache = Path(shutil.copytree(tiny.folder.parent, tmp_path / "cache"))
    monkeypatch.setattr("data.preparation._build", lambda *_: pytest.fail("prepared again"))
    assert prepare(jsonl_config(corpus, cache)).corpus_key == tiny.corpus_key
    others = [{"shard_tokens": 1999}, {"tokenizer_vocab_size": 321}, {"validation_fraction": 0.2}, {"max_documents": 9}]
    for change in others:
        with pytest.raises(pytest.fail.Exception, match="prepared again"):
            prepare(jsonl_config(corpus, cache, **change))
    prepare(jsonl_config(corpus, cache, num_workers=7, shuffle=False, prefetch=0))  # they decide no token


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, str]]:
    """A corpus that takes seconds, its folder as an undisturbed preparation leaves it, and its content hash."""
    folder = tmp_path_factory.mktemp("big")
    texts = [text for seed in range(3) for text in make_texts(1500, seed)]
    corpus = write_jsonl(folder / "big.jsonl", texts)
    prepared = prepare(jsonl_config(corpus, folder / "cache", num_workers=2))
    yield corpus, prepared.folder, prepared.content_hash
    shutil.rmtree(folder)


def kill_tree_and_wait(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the parent alone; its workers have to end by themselves."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "processes that tokenise outlived the one that started them"


def test_killed_at_random_moments(big: tuple[Path, Path, str], tmp_path: Path) -> None:
    """kill -9 again and again, then a run to the end: the same bytes, and nothing unfinished under the final name.

    The tokenizer is removed each time, so that its training is hit as well, and so is a corpus that got finished.
    """
    corpus, reference, content_hash = big
    cache = tmp_path / "cache"
    rng = random.Random(0)
    kills, stages = 0, set()
    while kills < KILLS:
        shutil.rmtree(cache / "tokenizers", ignore_errors=True)
        shutil.rmtree(cache / reference.name, ignore_errors=True)
        for lock in cache.glob("*.lock"):
            lock.unlink()
        process = start(corpus, cache)
        while process.poll() is None and not list(cache.glob("*.lock")):
            time.sleep(0.01)  # imports
        try:
            process.wait(timeout=rng.uniform(0, 1.2))
        except subprocess.TimeoutExpired:
            kills += 1
        kill_tree_and_wait(process)
        stages.add("tokenize" if list(cache.glob("*.partial")) else "tokenizer")
        for folder in cache.glob("jsonl-*"):
            if folder.is_dir() and folder.suffix != ".partial":
                open_prepared(folder, verify=True)
                stages.add("done")
    assert KILLS < 50 or stages >= {"tokenizer", "tokenize"}, f"every kill hit the same stage: {stages}"
    process = start(corpus, cache, workers=2)
    output, errors = process.communicate(timeout=120)
    assert output.strip() == content_hash, errors
    assert files(cache / reference.name) == files(reference)
    assert not list(cache.glob("*.partial"))


def test_finished_shards_are_not_redone(big: tuple[Path, Path, str], tmp_path: Path) -> None:
    """Killed when some shards are finished: the next run leaves their files alone, and reads on after them."""
    corpus, reference, _ = big
    cache = tmp_path / "cache"
    partial = cache / f"{reference.name}.partial"
    process = start(corpus, cache)
    deadline = time.monotonic() + 60
    while not (partial / STATE).is_file() or len(_finished(partial)) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)  # so that the state does not move between looking and killing
    state = json.loads((partial / STATE).read_text())
    kill_tree_and_wait(process)
    shards = [partial / "train" / f"{index:05d}.tokens" for index in range(len(_finished(partial)))]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in shards]
    seen: list[Progress] = []
    prepared = prepare(jsonl_config(corpus, cache), seen.append)
    after = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(prepared.folder.glob("train/*.tokens"))]
    assert after[: len(before)] == before
    assert files(prepared.folder) == files(reference)
    first = next(progress for progress in seen if progress.stage == "tokenize")
    done = sum(shard["num_tokens"] for shard in state["writers"]["train"]["finished"]["shards"])
    assert first.tokens >= done > 0, "the display begins with what was done before"


def test_signals_to_the_whole_group_are_the_parents(big: tuple[Path, Path, str], tmp_path: Path) -> None:
    """A terminal, torchrun and SLURM send them to the processes that tokenise as well. What they mean the run decides:
    it stops, or asks for a requeue, which an error of a worker would forestall."""
    corpus, reference, content_hash = big
    process = start(corpus, tmp_path, workers=2)
    while not (tmp_path / f"{reference.name}.partial" / STATE).is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)  # by now a worker has answered
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            worker.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert output.strip() == content_hash, errors


def _finished(partial: Path) -> list[object]:
    shards: list[object] = json.loads((partial / STATE).read_text())["writers"]["train"]["finished"]["shards"]
    return shards


def test_a_lost_partial_file_means_beginning_anew(big: tuple[Path, Path, str], tmp_path: Path) -> None:
    """A state that speaks of more than is on disk is not believed."""
    writer = ShardWriter(tmp_path / "split", "<u2", 100)
    writer.append(np.arange(150, dtype="<u2"), np.array([90, 60]), 10)
    state = writer.state()
    writer.close()
    assert can_resume(tmp_path / "split", "<u2", state)
    with open(tmp_path / "split" / "00001.tokens", "r+b") as file:
        file.truncate(119)
    assert not can_resume(tmp_path / "split", "<u2", state)
    (tmp_path / "split" / "00000.documents").unlink()
    assert not can_resume(tmp_path / "split", "<u2", state)


def test_going_on_leaves_the_tokenizer_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill, or a disk that others fill, while it is written again must not cost what was finished: the file that is
    there stays until another is whole."""
    config = jsonl_config(write_jsonl(tmp_path / "a.jsonl", make_texts(60)), tmp_path / "cache")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data.preparation._check_splits", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    (partial,) = (tmp_path / "cache").glob("*.partial")
    assert (partial / STATE).is_file()
    there = partial / "tokenizer.json"
    there.write_text(there.read_text() + "\n")
    os.link(there, tmp_path / "kept")
    before = (tmp_path / "kept").read_bytes()
    prepare(config)
    assert (tmp_path / "kept").read_bytes() == before


def test_a_writer_goes_on_where_its_state_was(tmp_path: Path) -> None:
    """What was written after the state is cut off; the shards equal those of a writer that was never stopped."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(1, 40, 20) for _ in range(12)]
    straight = ShardWriter(tmp_path / "straight", "<u4", 300)
    stopped = ShardWriter(tmp_path / "stopped", "<u4", 300)
    for index, lengths in enumerate(batches):
        tokens = np.arange(lengths.sum(), dtype="<u4") + 1000 * index
        straight.append(tokens, lengths, 7)
        state = json.loads(json.dumps(stopped.state()))
        stopped.append(tokens + 5, lengths[::-1], 3)  # lost in a kill
        stopped.close()
        stopped = ShardWriter(tmp_path / "stopped", "<u4", 300, state)
        stopped.append(tokens, lengths, 7)
    info = straight.finish()
    assert stopped.finish() == info
    for name in sorted(path.name for path in (tmp_path / "straight").iterdir()):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    TokenDataset(tmp_path / "stopped", info, "<u4").verify()
    assert info.num_tokens == sum(lengths.sum() for lengths in batches)


def test_processes_at_once(big: tuple[Path, Path, str], tmp_path: Path) -> None:
    """Two processes ask for the same corpus: one prepares it, both get it."""
    corpus, reference, content_hash = big
    processes = [start(corpus, tmp_path / "cache") for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [output.strip() for output, _ in results] == [content_hash] * 2, results
    assert files(tmp_path / "cache" / reference.name) == files(reference)


def test_a_worker_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed by the system: a message and no hang; the next call goes on."""
    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(3000))
    config = jsonl_config(corpus, tmp_path / "cache")
    monkeypatch.setattr("data.preparation.REPORT_INTERVAL_S", 0.0)

    def kill_workers(progress: Progress) -> None:
        if progress.stage == "tokenize" and progress.tokens > 0:
            for child in psutil.Process().children():
                if "worker.py" in " ".join(child.cmdline()):
                    child.kill()

    with pytest.raises(DataError, match=r"process that tokenises ended with code -9 .*What was finished is kept"):
        prepare(config, kill_workers)
    assert prepare(config).train.num_documents > 2000


@pytest.fixture
def copy(tiny: PreparedData, tmp_path: Path) -> Path:
    """A copy of the tiny corpus that a test may damage."""
    return Path(shutil.copytree(tiny.folder, tmp_path / tiny.folder.name))


@pytest.mark.parametrize("name", ["train/00001.tokens", "validation/00000.documents"])
def test_a_truncated_shard_is_found_on_opening(copy: Path, name: str) -> None:
    with open(copy / name, "r+b") as file:
        file.truncate(8)
    with pytest.raises(DataError, match=rf"{name}: 8 bytes instead of \d+\. Delete the folder {copy}"):
        open_prepared(copy)


@pytest.mark.parametrize("name", ["train/00002.tokens", "train/00000.documents", "validation/00000.tokens"])
def test_a_flipped_bit_is_found_by_verifying(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    open_prepared(copy)  # sizes are right
    with pytest.raises(DataError, match=f"{name}: its checksum differs"):
        open_prepared(copy, verify=True)


def test_a_missing_shard_and_a_broken_manifest(copy: Path, tiny: PreparedData) -> None:
    (copy / "train" / "00000.tokens").unlink()
    with pytest.raises(DataError, match=r"00000\.tokens: missing"):
        open_prepared(copy)
    (copy / MANIFEST).write_text((copy / MANIFEST).read_text()[:-20])
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_prepared(copy)
    (copy / MANIFEST).unlink()
    config = jsonl_config(tiny.folder.parent.parent / "tiny.jsonl", copy.parent)
    with pytest.raises(DataError, match=r"manifest\.json: missing\. Delete the folder"):
        prepare(config)


def test_ids_past_the_vocabulary(copy: Path) -> None:
    """Found where they are read, in training and in evaluation: a GPU would stop without saying where."""
    path = copy / "train" / "00001.tokens"
    sound = open_prepared(copy).train
    start = sound.info.shards[0].num_tokens
    assert sound.read(np.array([0, start - 3]), 6).max() < sound.vocab_size
    data = bytearray(path.read_bytes())
    data[4:6] = b"\xff\xff"
    path.write_bytes(data)
    damaged = open_prepared(copy).train
    damaged.read(np.array([0, start - 4]), 6)  # ends before it
    with pytest.raises(DataError, match=rf"{path}.*ids from {sound.vocab_size} on.*Delete the folder {copy}"):
        damaged.read(np.array([0, start]), 6)


@pytest.mark.parametrize("dtype", ["<u4", "float", "nonsense"])
def test_a_manifest_of_another_dtype(copy: Path, dtype: str) -> None:
    (copy / MANIFEST).write_text((copy / MANIFEST).read_text().replace('"<u2"', f'"{dtype}"'))
    with pytest.raises(DataError, match=rf"manifest\.json: dtype {dtype} for a vocabulary of \d+"):
        open_prepared(copy)


def test_a_tokenizer_that_is_not_the_corpus_s(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copy / "tokenizer.json"
    definition = json.loads(path.read_text())
    load_tokenizer(open_prepared(copy))
    assert not caplog.records
    model = definition["model"]
    other = definition | {"model": model | {"merges": model["merges"][::-1]}}
    path.write_text(json.dumps(other))
    load_tokenizer(open_prepared(copy))
    assert "is not the tokenizer that the corpus was prepared with" in caplog.text
    last = max(model["vocab"], key=model["vocab"].get)
    smaller = {token: number for token, number in model["vocab"].items() if token != last}
    path.write_text(json.dumps(definition | {"model": model | {"vocab": smaller, "merges": model["merges"][:-1]}}))
    with pytest.raises(DataError, match=r"tokenizer\.json: it has another vocabulary"):
        load_tokenizer(open_prepared(copy))
    path.write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: .*Delete the folder"):
        load_tokenizer(open_prepared(copy))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_token_dtype(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype
    assert np.iinfo(np.dtype(dtype)).max >= vocab_size - 1


def test_a_large_vocabulary_takes_uint32(tiny: PreparedData, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.add_tokens([f"token number {index}" for index in range(70_000)])
    tokenizer.save(str(tmp_path / "large.json"))
    text = "token number 69999 and token number 123"
    corpus = write_jsonl(tmp_path / "a.jsonl", [text, "another text", "a third"])
    config = jsonl_config(corpus, tmp_path / "cache", tokenizer=str(tmp_path / "large.json"), validation_fraction=0.0)
    prepared = prepare(config)
    assert prepared.manifest.dtype == "<u4"
    assert max(int(tokens.max()) for tokens in prepared.train.documents()) > 65_536
    assert decoded(prepared.train, prepared)[0].replace(" ", "") == text.replace(" ", "")


def test_max_documents(tiny: PreparedData, texts: list[str], tmp_path: Path) -> None:
    corpus = tiny.folder.parent.parent / "tiny.jsonl"
    prepared = prepare(jsonl_config(corpus, tmp_path, max_documents=50))
    split = decoded(prepared.train, prepared) + decoded(prepared.validation, prepared)
    assert sorted(split) == sorted(filter(None, texts[:50]))


def test_small_corpora_hold_out_at_least_one_document(tmp_path: Path) -> None:
    """Two per cent of three documents is none: the one with the smallest hash is held out."""
    corpus = write_jsonl(tmp_path / "a.jsonl", ["one text", "another text", "a third"])
    for fraction in (0.001, 0.999):
        prepared = prepare(jsonl_config(corpus, tmp_path, validation_fraction=fraction))
        assert prepared.validation.num_documents >= 1
        assert prepared.train.num_documents >= 1
        assert prepared.train.num_documents + prepared.validation.num_documents == 3
    assert prepare(jsonl_config(corpus, tmp_path, validation_fraction=0.0)).validation.num_tokens == 0


def test_a_validation_split_of_its_own(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    train, validation = make_texts(100, 1), make_texts(30, 2)
    pq.write_table(pa.table({"text": train}), repository / "train-0.parquet")
    pq.write_table(pa.table({"text": validation}), repository / "validation-0.parquet")
    config = DataConfig(
        source=Source.hub,
        path=str(repository),
        validation_split="validation",
        cache_dir=str(tmp_path / "cache"),
        tokenizer_vocab_size=300,
        num_workers=1,
    )
    prepared = prepare(config)
    assert decoded(prepared.train, prepared) == list(filter(None, train))
    assert decoded(prepared.validation, prepared) == list(filter(None, validation))


def test_lone_surrogates_become_question_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "left \\ud800 right"}\n{"text": "fine"}\n')
    prepared = prepare(jsonl_config(path, tmp_path / "cache", validation_fraction=0.0))
    assert decoded(prepared.train, prepared) == ["left ? right", "fine"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "holds no text: it has no documents"),
        (["", "", ""], "holds no text: all of its 3 documents are empty"),
        (["only one", ""], "a single document, so that none can be held out"),
        (["twice", "twice"], "a single document, so that none can be held out"),
    ],
)
def test_corpora_without_enough_text(texts: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prepare(jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "cache"))
    assert "data.path=" in str(caught.value)


def test_no_text_and_no_validation(tmp_path: Path) -> None:
    config = jsonl_config(write_jsonl(tmp_path / "a.jsonl", ["", ""]), tmp_path / "cache", validation_fraction=0.0)
    with pytest.raises(DataError, match="holds no text: all of its 2 documents are empty"):
        prepare(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_fraction": 1.0}, r"data\.validation_fraction=1\.0 must be in \[0, 1\)"),
        ({"shard_tokens": 1}, r"data\.shard_tokens=1"),
        ({"tokenizer_vocab_size": 100}, r"data\.tokenizer_vocab_size=100"),
    ],
)
def test_settings_that_can_not_be(change: dict[str, object], message: str, tmp_path: Path) -> None:
    config = jsonl_config(write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "cache", **change)
    with pytest.raises(DataError, match=message):
        prepare(config)


def test_a_cache_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir=.*can't be written"):
        prepare(jsonl_config(write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "cache"))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a disk without space, raised where shards are written."""
    import errno

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = jsonl_config(write_jsonl(tmp_path / "a.jsonl", make_texts(50)), tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("data.shards._HashedFile.write", full)
        with pytest.raises(DataError, match=r"data\.cache_dir=.*no space left"):
            prepare(config)
    assert prepare(config).train.num_documents > 0


def test_the_tokenizer_alone_is_the_one_of_the_corpus(tiny: PreparedData, tmp_path: Path) -> None:
    """And it knows nothing of the held-out documents."""
    corpus = tiny.folder.parent.parent / "tiny.jsonl"
    path = prepare_tokenizer(jsonl_config(corpus, tmp_path / "cache"))
    assert path.read_bytes() == tiny.tokenizer_path.read_bytes()
    kept = write_jsonl(tmp_path / "kept.jsonl", decoded(tiny.train, tiny))
    without = prepare_tokenizer(jsonl_config(kept, tmp_path / "cache", validation_fraction=0.0))
    assert without.read_bytes() == path.read_bytes()


def test_progress_is_told(tiny: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.preparation.REPORT_INTERVAL_S", 0.0)
    seen: list[Progress] = []
    prepared = prepare(jsonl_config(tiny.folder.parent.parent / "tiny.jsonl", tmp_path), seen.append)
    assert [stage for stage, _ in _groups(seen)] == ["tokenizer", "tokenize"]
    last = seen[-1]
    assert last.fraction == 1.0
    assert last.tokens == prepared.train.num_tokens + prepared.validation.num_tokens
    assert last.num_bytes == prepared.train.num_bytes + prepared.validation.num_bytes


def _groups(seen: list[Progress]) -> list[tuple[str, int]]:
    groups: list[tuple[str, int]] = []
    for progress in seen:
        if not groups or groups[-1][0] != progress.stage:
            groups.append((progress.stage, 0))
    return groups


def test_nothing_is_left_behind(tiny: PreparedData) -> None:
    """The cache holds the corpus, the tokenizer and locks; no worker is alive."""
    names = sorted(path.name for path in tiny.folder.parent.iterdir())
    assert names == sorted([tiny.folder.name, f"{tiny.folder.name}.lock", "tokenizers"])
    assert sorted(path.name for path in tiny.folder.iterdir()) == [
        "manifest.json",
        "tokenizer.json",
        "train",
        "validation",
    ]
    assert not [child for child in psutil.Process().children() if "worker.py" in " ".join(child.cmdline())]


def test_split_info_counts() -> None:
    assert (SplitInfo().num_tokens, SplitInfo().num_documents) == (0, 0)


def test_the_loader_imports_no_dataset_library() -> None:
    """Ranks that only read shards start fast: `import data` brings in neither datasets nor pyarrow."""
    code = "import sys, data; print([name for name in ('datasets', 'pyarrow', 'transformers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.strip() == "[]"
