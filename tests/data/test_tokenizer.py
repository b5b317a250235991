"""Tokenizers: lossless, deterministic, found by file, folder or name, whole whatever kills their training.

FAULT_KILLS=50 kills the training of `test_killed_while_training` that often, instead of a handful of times.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data import DataError, PreparedData, load_tokenizer, prepare, prepare_tokenizer
from data.tokenizer import END_OF_TEXT, fetch_tokenizer, inspect_tokenizer, tokenizer_identity, train_tokenizer
from data.worker import encode_batch, load
from tests.data.conftest import jsonl_config, make_texts, write_jsonl

KILLS = int(os.environ.get("FAULT_KILLS", "4"))


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_every_text_survives(tiny: PreparedData, text: str) -> None:
    """Encoded as the shards are, decoded as samples are."""
    tokens, lengths, _, _ = encode_batch(load(str(tiny.tokenizer_path)), [text], tiny.eos_id, "<u2", 10**6)
    ids = list(memoryview(tokens).cast("H"))
    assert ids.count(tiny.eos_id) == len(lengths) == (1 if text else 0)
    assert load_tokenizer(tiny).decode(ids[1:], skip_special_tokens=False) == text


def test_a_separator_in_the_text_is_text(tiny: PreparedData) -> None:
    tokens, lengths, _, _ = encode_batch(load(str(tiny.tokenizer_path)), [END_OF_TEXT], tiny.eos_id, "<u2", 10**6)
    assert lengths[0] > 2
    assert list(memoryview(tokens).cast("H")).count(tiny.eos_id) == 1


def test_long_documents_are_encoded_in_pieces_without_loss(tiny: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.worker.PIECE_CHARS", 100)
    text = "\n".join(make_texts(20, seed=9)) + "é" * 350
    tokens, lengths, num_bytes, _ = encode_batch(load(str(tiny.tokenizer_path)), [text], tiny.eos_id, "<u2", 10**6)
    assert len(lengths) == 1
    assert num_bytes == [len(text.encode())]
    ids = list(memoryview(tokens).cast("H"))
    assert load_tokenizer(tiny).decode(ids[1:], skip_special_tokens=False) == text


def test_little_text_is_encoded_at_a_time(tiny: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoding takes 80 times its text in memory; one document may be a gigabyte."""
    monkeypatch.setattr("data.worker.PIECE_CHARS", 100)
    texts = ["", "\n".join(make_texts(20, seed=9)), *make_texts(30), "", "x"]
    tokenizer, calls = load(str(tiny.tokenizer_path)), []

    class Counting:
        """The tokenizer, which notes how much text it is given."""

        def encode_batch_fast(self, pieces: list[str], add_special_tokens: bool) -> list[Any]:
            calls.append(sum(map(len, pieces)))
            return tokenizer.encode_batch_fast(pieces, add_special_tokens=add_special_tokens)

    counting: Any = Counting()
    tokens, lengths, _, _ = encode_batch(counting, texts, tiny.eos_id, "<u2", 10**6)
    assert max(calls) <= 100
    assert len(calls) < len(texts) + sum(map(len, texts)) // 50, "short texts go together"
    documents = np.split(np.frombuffer(tokens, "<u2"), np.cumsum(lengths)[:-1])
    decoded = [tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False) for ids in documents]
    assert decoded == [text for text in texts if text]


def test_documents_longer_than_a_shard_become_several(tiny: PreparedData) -> None:
    text = "abc " * 500
    tokens, lengths, num_bytes, hashes = encode_batch(load(str(tiny.tokenizer_path)), [text], tiny.eos_id, "<u2", 50)
    assert max(lengths) == 50
    assert len(lengths) > 1
    assert sum(num_bytes) == len(text)
    assert len(set(hashes)) == 1  # all of it in the same split
    ids = [token for token in memoryview(tokens).cast("H") if token != tiny.eos_id]
    assert load_tokenizer(tiny).decode(ids) == text


def test_training_is_deterministic_with_and_without_threads() -> None:
    """Also over processes, whose hash seeds differ."""
    code = (
        "import hashlib; from data.tokenizer import train_tokenizer; from tests.data.conftest import make_texts;"
        "print(hashlib.sha256(train_tokenizer(make_texts(), 400).to_str().encode()).hexdigest())"
    )
    hashes = set()
    for parallel in ("false", "true"):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": parallel}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        hashes.add(result.stdout)
    assert len(hashes) == 1


@pytest.mark.slow
def test_killed_while_training(tmp_path: Path) -> None:
    """kill -9 at random moments; whatever the next start finds, it ends with the tokenizer of an undisturbed one."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [text for seed in range(4) for text in make_texts(2500, seed)])
    calm = start_training(corpus, tmp_path / "calm")
    begin = wait_for_lock(calm, tmp_path / "calm")
    expected = calm.communicate(timeout=120)[0]
    seconds = time.monotonic() - begin
    rng = random.Random(3)
    kills, finished = 0, 0
    while kills < KILLS:
        cache = tmp_path / f"killed_{finished}"
        process = start_training(corpus, cache)
        wait_for_lock(process, cache)
        try:
            process.wait(timeout=rng.uniform(0, 1.05 * seconds))
        except subprocess.TimeoutExpired:
            kills += 1
            process.kill()
        process.communicate()
        for path in cache.glob("tokenizers/*/tokenizer.json"):  # there whole or not at all
            assert f"{hash_of(path)}\n" == expected
            finished += 1
    cache = tmp_path / f"killed_{finished}"
    leftover = cache / "tokenizers" / next((tmp_path / "calm").glob("tokenizers/*/")).name / "tokenizer.json.1.tmp"
    leftover.parent.mkdir(parents=True, exist_ok=True)
    leftover.write_text("{")  # of a kill in the short time of writing
    output, errors = start_training(corpus, cache).communicate(timeout=120)
    assert output == expected, errors
    assert sorted(path.name for path in leftover.parent.iterdir()) == ["separator.json", "tokenizer.json"]


def start_training(corpus: Path, cache: Path) -> subprocess.Popen[str]:
    """A process that trains a tokenizer and prints the hash of its file."""
    code = (
        "import sys; from pathlib import Path; from data import prepare_tokenizer;"
        "from tests.data.conftest import jsonl_config; from tests.data.test_tokenizer import hash_of;"
        "config = jsonl_config(Path(sys.argv[1]), Path(sys.argv[2]), tokenizer_vocab_size=3000);"
        "print(hash_of(prepare_tokenizer(config)))"
    )
    command = [sys.executable, "-c", code, str(corpus), str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lock(process: subprocess.Popen[str], cache: Path) -> float:
    """Return when the imports are over and the work begins; the time then."""
    while process.poll() is None and not list(cache.glob("tokenizers/*.lock")):
        time.sleep(0.005)
    return time.monotonic()


def hash_of(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_vocabulary_size() -> None:
    trained = inspect_tokenizer(train_tokenizer(make_texts(), 400))
    assert trained.vocab_size == 400
    assert inspect_tokenizer(train_tokenizer(["a"], 400)).vocab_size == 257  # nothing to merge
    with pytest.raises(DataError, match=r"data\.tokenizer_vocab_size=256"):
        train_tokenizer(["a"], 256)


def test_by_file_and_by_folder(tiny: PreparedData, tmp_path: Path) -> None:
    by_file, separator = fetch_tokenizer(str(tiny.tokenizer_path), tmp_path)
    assert separator is None
    assert inspect_tokenizer(by_file).hash == tiny.tokenizer_hash
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    by_file.add_special_tokens(["<end>"])
    by_file.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    by_folder, separator = fetch_tokenizer(str(folder), tmp_path)
    info = inspect_tokenizer(by_folder, separator)
    assert (info.eos_token, info.eos_id, info.vocab_size) == ("<end>", tiny.vocab_size, tiny.vocab_size + 1)
    assert tokenizer_identity(str(folder)) != tokenizer_identity(str(tiny.tokenizer_path))


def test_another_separator_is_another_corpus(tiny: PreparedData, tmp_path: Path) -> None:
    """Of the same tokenizer.json: documents begin with another token."""
    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(40))
    tokenizer, _ = fetch_tokenizer(str(tiny.tokenizer_path), tmp_path)
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = jsonl_config(corpus, tmp_path / "cache", tokenizer=str(tmp_path / "tokenizer.json"))
    assert prepare(config).manifest.eos_token == END_OF_TEXT
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    other = prepare(config)
    assert (other.manifest.eos_token, other.eos_id) == ("<end>", tiny.vocab_size)
    assert all(tokens[0] == other.eos_id for tokens in other.train.documents())
    by_path, separator = fetch_tokenizer(str(prepare_tokenizer(config)), tmp_path)  # as of a run that has no copy
    assert inspect_tokenizer(by_path, separator).eos_token == "<end>"


@pytest.mark.parametrize("content", ["{ half", "[1]", '{"eos_token": {}}', '{"eos_token": 7}'])
def test_what_is_wrong_with_its_config(tiny: PreparedData, tmp_path: Path, content: str) -> None:
    shutil.copy(tiny.tokenizer_path, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=r"data\.tokenizer: .*tokenizer_config\.json"):
        fetch_tokenizer(str(tmp_path), tmp_path)


def test_what_is_wrong_with_a_tokenizer(tiny: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(DataError, match=r"data\.tokenizer=.*broken\.json.* is not a tokenizer\.json"):
        fetch_tokenizer(str(broken), tmp_path)
    for name in ("absent.json", "./absent", "/a/b/c", str(tmp_path)):
        with pytest.raises(DataError, match=r"data\.tokenizer=.*no such file.*hub name such as gpt2"):
            tokenizer_identity(name)
    without = Tokenizer.from_str(tiny.tokenizer_path.read_text("utf-8").replace(END_OF_TEXT, "<strange>"))
    with pytest.raises(DataError, match=r"no token that separates documents; looked for <\|endoftext\|>"):
        inspect_tokenizer(without)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert tokenizer_identity("gpt2") == {"hub": "gpt2"}
    with pytest.raises(DataError, match=r"data\.tokenizer=gpt2 .*hub.*can't be reached"):
        fetch_tokenizer("gpt2", tmp_path)
