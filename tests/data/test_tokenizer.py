"""Tokenizers: lossless, deterministic, found by file, folder or name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data import DataError, PreparedData, load_tokenizer
from data.tokenizer import END_OF_TEXT, fetch_tokenizer, inspect_tokenizer, tokenizer_identity, train_tokenizer
from data.worker import encode_batch, load
from tests.data.conftest import make_texts


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
