"""Readers: every format, every cursor, and what a user reads when something is wrong."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.schema import DataConfig
from configs.schema import Source as Kind
from data import DataError
from data.sources import Source, open_sources
from data.sources.files import DOCUMENT_CHARS, cut_text
from data.sources.hub import StdlibSource
from tests.data.conftest import make_texts, write_jsonl

TEXTS = make_texts(40, seed=4)


def _zst(path: Path, data: bytes) -> Path:
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(data)
    return path


def _jsonl_bytes(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n\n" for text in texts).encode()


def _text_folder(folder: Path) -> DataConfig:
    (folder / "sub").mkdir()
    for index, text in enumerate(TEXTS):
        path = folder / ("sub" if index % 2 else ".") / f"{index:03d}.{'md' if index % 3 else 'txt'}"
        path.write_bytes(text.encode())
    (folder / "ignored.bin").write_bytes(b"\xff\xfe")
    (folder / ".hidden.txt").write_text("hidden")
    return DataConfig(source=Kind.text, path=str(folder))


def _jsonl(folder: Path) -> DataConfig:
    return DataConfig(source=Kind.jsonl, path=str(write_jsonl(folder / "a.jsonl", TEXTS)))


def _jsonl_compressed(folder: Path) -> DataConfig:
    (folder / "0.jsonl.gz").write_bytes(gzip.compress(_jsonl_bytes(TEXTS[:15])))
    _zst(folder / "1.jsonl.zst", _jsonl_bytes(TEXTS[15:30]))
    (folder / "2.json").write_bytes(_jsonl_bytes(TEXTS[30:]))
    return DataConfig(source=Kind.jsonl, path=str(folder / "*.json*"))


def _parquet(folder: Path) -> DataConfig:
    for index in range(2):
        table = pa.table({"id": list(range(20)), "body": TEXTS[20 * index : 20 * index + 20]})
        pq.write_table(table, folder / f"{index}.parquet", row_group_size=6)
    return DataConfig(source=Kind.parquet, path=str(folder), text_key="body")


def _hub(folder: Path) -> DataConfig:
    repository = folder / "repository"
    repository.mkdir()
    pq.write_table(pa.table({"text": TEXTS}), repository / "train-0.parquet", row_group_size=9)
    pq.write_table(pa.table({"text": ["held out"]}), repository / "validation-0.parquet")
    return DataConfig(
        source=Kind.hub, path=str(repository), cache_dir=str(folder / "cache"), validation_split="validation"
    )


FORMATS = [_text_folder, _jsonl, _jsonl_compressed, _parquet, _hub]


@pytest.fixture(params=FORMATS, ids=lambda make: make.__name__.strip("_"))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """The same texts in each format."""
    make: Callable[[Path], DataConfig] = request.param
    return open_sources(make(tmp_path))[0]


def test_every_text_is_read(source: Source) -> None:
    texts = list(source.read())
    if source.identity()["source"] == "text":  # files in the order of their names; empty ones hold no document
        assert sorted(texts) == sorted(filter(None, TEXTS))
    else:
        assert texts == TEXTS


def test_a_cursor_goes_on_where_it_was(source: Source) -> None:
    """After any number of documents, through JSON, also from a reader that was itself begun by a cursor."""
    texts = list(source.read())
    for count in (0, 1, 5, 6, 14, 15, 20, len(texts)):
        reader = source.read()
        head = list(islice(reader, count))
        second = source.read(json.loads(json.dumps(reader.cursor())))
        middle = list(islice(second, 3))
        tail = list(source.read(json.loads(json.dumps(second.cursor()))))
        assert head + middle + tail == texts


def test_fraction_grows_to_one(source: Source) -> None:
    reader = source.read()
    fractions = [reader.fraction() for _ in reader]
    if source.identity()["source"] == "hub":
        return  # a folder has no metadata that says how many rows there are
    known = [fraction for fraction in fractions if fraction is not None]
    assert len(known) == len(fractions)
    assert known == sorted(known)
    assert known[-1] > 0.9
    assert reader.fraction() == 1.0


def test_parts_together_are_the_source(source: Source) -> None:
    parts = [text for index in range(source.num_parts()) for text in source.read_part(index)]
    assert parts == list(source.read())


def test_hub_validation_split(tmp_path: Path) -> None:
    _, validation = open_sources(_hub(tmp_path))
    assert validation is not None
    assert list(validation.read()) == ["held out"]


def test_stdlib_is_source_code_without_tests() -> None:
    source = StdlibSource()
    texts = list(source.read())
    assert 5e6 < sum(map(len, texts)) < 30e6
    assert any("class JSONDecoder" in text for text in texts)
    assert not any("class TestCase(unittest" in text or "import idlelib" in text for text in texts)
    assert not any("LATIN SMALL LETTER" in text and "decoding_table" in text for text in texts)
    assert source.identity() == StdlibSource().identity()


def test_identity_follows_the_files_not_their_folder(tmp_path: Path) -> None:
    before = open_sources(_jsonl(tmp_path))[0].identity()
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "a.jsonl").rename(moved / "a.jsonl")
    config = DataConfig(source=Kind.jsonl, path=str(moved))
    assert open_sources(config)[0].identity() == before
    with open(moved / "a.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    assert open_sources(config)[0].identity() != before
    config.text_key = "other"
    assert open_sources(config)[0].identity()["text_key"] == "other"


def test_a_folder_may_hold_links_to_nothing_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere.txt")
    os.mkfifo(tmp_path / "c.txt")
    source = open_sources(DataConfig(source=Kind.text, path=str(tmp_path)))[0]
    assert list(source.read()) == ["text"]


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", ""])
def test_long_texts_are_cut_without_loss(separator: str) -> None:
    text = separator.join(f"{index:09d}" for index in range(30_000))
    pieces = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    documents = list(cut_text(iter(pieces), DOCUMENT_CHARS))
    assert "".join(documents) == text
    assert all(DOCUMENT_CHARS // 2 <= len(document) <= DOCUMENT_CHARS for document in documents[:-1])
    assert all(document.endswith(separator) for document in documents[:-1])


def _bad_utf8(folder: Path) -> DataConfig:
    (folder / "bad.txt").write_bytes(b"good start " * 10 + b"\xff\xfe")
    return DataConfig(source=Kind.text, path=str(folder / "bad.txt"))


def _bad_jsonl_utf8(folder: Path) -> DataConfig:
    (folder / "bad.jsonl").write_bytes(b'{"text": "\xff"}\n')
    return DataConfig(source=Kind.jsonl, path=str(folder / "bad.jsonl"))


def _truncated_gzip(folder: Path) -> DataConfig:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(_jsonl_bytes(TEXTS * 50))[:-200])
    return DataConfig(source=Kind.jsonl, path=str(folder))


def _truncated_zst(folder: Path) -> DataConfig:
    path = _zst(folder / "a.txt.zst", "".join(TEXTS * 50).encode())
    path.write_bytes(path.read_bytes()[:-100])
    return DataConfig(source=Kind.text, path=str(folder))


def _not_parquet(folder: Path) -> DataConfig:
    (folder / "a.parquet").write_text("not parquet")
    return DataConfig(source=Kind.parquet, path=str(folder))


def _not_json(folder: Path) -> DataConfig:
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    return DataConfig(source=Kind.jsonl, path=str(folder))


def _not_an_object(folder: Path) -> DataConfig:
    (folder / "a.jsonl").write_text("[1, 2]\n")
    return DataConfig(source=Kind.jsonl, path=str(folder))


def _not_text(folder: Path) -> DataConfig:
    (folder / "a.jsonl").write_text('{"text": 3}\n')
    return DataConfig(source=Kind.jsonl, path=str(folder))


def _missing_key_jsonl(folder: Path) -> DataConfig:
    return DataConfig(source=Kind.jsonl, path=str(write_jsonl(folder / "a.jsonl", TEXTS, "content")))


def _missing_key_parquet(folder: Path) -> DataConfig:
    config = _parquet(folder)
    config.text_key = "text"
    return config


def _missing_key_hub(folder: Path) -> DataConfig:
    config = _hub(folder)
    config.text_key = "body"
    return config


def _missing_split(folder: Path) -> DataConfig:
    config = _hub(folder)
    config.split = "nowhere"
    return config


def _no_path(_: Path) -> DataConfig:
    return DataConfig(source=Kind.text)


def _missing_path(folder: Path) -> DataConfig:
    return DataConfig(source=Kind.text, path=str(folder / "absent"))


def _empty_folder(folder: Path) -> DataConfig:
    (folder / "photo.png").write_bytes(b"")
    return DataConfig(source=Kind.text, path=str(folder))


def _empty_glob(folder: Path) -> DataConfig:
    return DataConfig(source=Kind.jsonl, path=str(folder / "*.jsonl"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_bad_utf8, r"bad\.txt is not UTF-8 text \(byte 0xff.*data\.path"),
        (_bad_jsonl_utf8, r"bad\.jsonl:1 is not JSON"),
        (_truncated_gzip, r"a\.jsonl\.gz can't be decompressed"),
        (_truncated_zst, r"a\.txt\.zst can't be"),
        (_not_parquet, r"a\.parquet can't be read as parquet"),
        (_not_json, r"a\.jsonl:2 is not JSON"),
        (_not_an_object, r"a\.jsonl:1 is a JSON list"),
        (_not_text, r"data\.text_key=text: .*a\.jsonl:1 holds a int, not text"),
        (_missing_key_jsonl, r"data\.text_key=text is not in .*a\.jsonl:1\. There is: content, id\."),
        (_missing_key_parquet, r"data\.text_key=text is not in .*0\.parquet\. There is: id, body\."),
        (_missing_key_hub, r"data\.text_key=body is not in data\.path=.*There is: text\."),
        (_missing_split, r"data\.path=.*split nowhere.*can't be read"),
        (_no_path, r"data\.path is not set: data=text needs a file"),
        (_missing_path, r"data\.path=.*absent: no such file or folder"),
        (_empty_folder, r"data\.path=.*the folder holds no text file; looked for .*\.txt"),
        (_empty_glob, r"data\.path=.*no file matches this glob"),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("_"),
)
def test_errors_name_the_file_and_the_key(make: Callable[[Path], DataConfig], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        list(open_sources(make(tmp_path))[0].read())


def test_the_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset that isn't there yet: an error at once, not after the client's half minute of retries."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    config = DataConfig(source=Kind.hub, path="owner/name", cache_dir=str(tmp_path))
    source, _ = open_sources(config)
    assert source.identity()["path"] == "owner/name"  # needs no network
    with pytest.raises(DataError, match=r"data\.path=owner/name .*needs the Hugging Face hub, .*can't be reached"):
        source.read()
