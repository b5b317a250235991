"""A tiny corpus: a few hundred documents of random words, with the cases that go wrong (empty, unicode, separator)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from configs.schema import DataConfig, Source
from data import PreparedData, prepare

SPECIAL_TEXTS = [
    "",
    "naïve café — 東京 🙂 \u0000 end",
    "the separator <|endoftext|> inside a text",
    "line one\r\nline two\n\n\n\tindented",
    "x",
]


def make_texts(count: int = 300, seed: int = 0) -> list[str]:
    """Texts of 1 to 120 words; every seventh one of `SPECIAL_TEXTS` with its number, or empty."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 8))) for _ in range(200)]
    texts = []
    for index in range(count):
        special = SPECIAL_TEXTS[index // 7 % len(SPECIAL_TEXTS)]
        text = " ".join(rng.choices(words, k=rng.randint(1, 120)))
        texts.append((special and f"{special} {index}") if index % 7 == 0 else text)
    return texts


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """One object a line."""
    path.write_text("".join(json.dumps({key: text, "id": index}) + "\n" for index, text in enumerate(texts)), "utf-8")
    return path


def jsonl_config(path: Path, cache: Path, **changes: object) -> DataConfig:
    """Small settings for a JSONL corpus."""
    config = DataConfig(
        source=Source.jsonl,
        path=str(path),
        cache_dir=str(cache),
        tokenizer_vocab_size=320,
        validation_fraction=0.1,
        shard_tokens=2000,
        num_workers=1,
    )
    for name, value in changes.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return config


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The documents of the tiny corpus, in order."""
    return make_texts()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> PreparedData:
    """The tiny corpus, prepared in many small shards. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("tiny")
    return prepare(jsonl_config(write_jsonl(folder / "tiny.jsonl", texts), folder / "cache"))
