"""The command-line tools and what they show."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from configs.schema import DataConfig, Source
from data import PreparedData, Progress, prepare, prepare_tokenizer
from data.preparation import _plan, _sample
from data.progress import show_progress
from data.report import duplicates, plot_lengths
from tests.data.conftest import jsonl_config, make_texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in `folder` with a small corpus there."""
    small = ["data=jsonl", "data.path=corpus.jsonl", "data.cache_dir=cache", "data.tokenizer_vocab_size=300"]
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *small, "data.num_workers=1", *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_prepare_inspect_and_train_tokenizer(tmp_path: Path) -> None:
    """One after the other, from the command line; they leave nothing but the cache."""
    write_jsonl(tmp_path / "corpus.jsonl", [*make_texts(100), *make_texts(20)])
    trained = tool("train_tokenizer", tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "Vocabulary 300 tokens" in trained.stdout
    inspected = tool("inspect_data", tmp_path, "model.sequence_length=32")
    assert inspected.returncode == 0, inspected.stderr
    assert "Training the tokenizer" not in inspected.stderr, "the tokenizer trained before is used"
    assert "Tokenising: 100%" in inspected.stderr
    for words in ("--- sample 1 ---", "Duplicates", "Tokens per byte", "Checksums agree", "document_lengths.png"):
        assert words in inspected.stdout
    prepared = tool("prepare_data", tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    assert prepared.stderr == ""  # nothing to do
    (folder,) = (path for path in (tmp_path / "cache").glob("jsonl-*") if path.is_dir())
    assert str(Path("cache") / folder.name) in prepared.stdout
    assert (folder / "document_lengths.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "corpus.jsonl"]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("prepare_data", ["data.path=absent"], "data.path=absent: no such file or folder"),
        ("train_tokenizer", ["data.tokenizer=gpt2"], "data.tokenizer=gpt2 exists already"),
        ("inspect_data", ["data.text_key=body"], "There is: text, id."),
    ],
)
def test_errors_are_short(name: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", make_texts(20))
    result = tool(name, tmp_path, *overrides)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert len((result.stderr + result.stdout).splitlines()) < 25


def test_duplicates(tmp_path: Path) -> None:
    texts = ["one", "two", "one", "three", "one", "two"]
    config = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "cache", validation_fraction=0.0)
    assert duplicates(prepare(config).train) == (3, 6)


def test_plot_of_an_empty_split(tmp_path: Path) -> None:
    plot_lengths({"train": np.array([3, 9, 200]), "validation": np.array([], np.int64)}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_bars_on_a_terminal() -> None:
    text = io.StringIO()
    with show_progress(Console(file=text, force_terminal=True, width=160)) as progress:
        progress(Progress("wait", None, 0, 0, 0))
        progress(Progress("tokenizer", 0.5, 10, 3_000_000, 0))
        progress(Progress("tokenize", 0.0, 0, 0, 0))
        progress(Progress("tokenize", 0.25, 1234, 9_000_000, 2_500_000))
    for words in ("another process", "3.0 MB of text", "1,234 documents", "2.50 M tokens", "25%", "M tokens/s"):
        assert words in text.getvalue()


def test_no_display_where_there_is_nothing_to_do() -> None:
    for terminal in (True, False):
        text = io.StringIO()
        with show_progress(Console(file=text, force_terminal=terminal)):
            pass
        assert text.getvalue() == ""


def test_a_tokenizer_sample_is_spread_over_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less budget than text every file gives its share, and short ones leave theirs to the others."""
    for index in range(4):
        size = 20 if index == 1 else 3000
        write_jsonl(tmp_path / f"{index}.jsonl", [f"{index} " + "word " * 10] * size)
    monkeypatch.setattr("data.encode.BATCH_CHARS", 1000)
    plan = _plan(DataConfig(source=Source.jsonl, path=str(tmp_path), cache_dir=str(tmp_path / "cache")))
    counts = np.bincount([int(text[0]) for text in _sample(plan, 0, 200_000, lambda _: None)])
    assert counts[1] == 20
    assert min(counts[[0, 2, 3]]) > 900
    assert 52 * counts.sum() == pytest.approx(200_000, rel=0.1)


def test_tokenizers_of_equal_corpora_are_shared(tiny: PreparedData, tmp_path: Path) -> None:
    """Settings that don't decide the training text share one tokenizer."""
    corpus = tiny.folder.parent.parent / "tiny.jsonl"
    paths = {prepare_tokenizer(jsonl_config(corpus, tmp_path, shard_tokens=size)) for size in (500, 1000)}
    assert len(paths) == 1
    assert prepare_tokenizer(jsonl_config(corpus, tmp_path, tokenizer_vocab_size=300)) not in paths
