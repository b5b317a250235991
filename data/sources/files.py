"""Documents of local files: plain text, JSON lines and parquet; text and JSON lines also compressed (.gz, .zst)."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from data.errors import DataError
from data.sources.base import Cursor, Reader, Source, checked_text, missing_text_key, text_of

COMPRESSED = frozenset({".gz", ".zst"})
_PROSE = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".log"}
_DATA = {".toml", ".yaml", ".yml", ".ini", ".cfg", ".json", ".sql"}
_C_LIKE = {".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".js", ".jsx", ".ts", ".tsx"}
_SCRIPTS = {".py", ".pyi", ".ipynb", ".rb", ".php", ".sh", ".lua", ".r", ".jl", ".scala", ".kt", ".swift", ".hs", ".ml"}
TEXT_SUFFIXES = frozenset(_PROSE | _DATA | _C_LIKE | _SCRIPTS)
DOCUMENT_CHARS = 64 * 1024
"""A text file is one document; a longer one is cut at blank lines or line ends into documents of at most this many
characters, so that a corpus of one file also has documents to hold out, and memory stays flat."""
READ_BYTES = 1 << 18
PARQUET_ROWS = 256


class Piece(NamedTuple):
    """A document and the share of its file that has been read with it."""

    text: str
    share: float


@dataclass(frozen=True)
class LocalFile:
    """A file of a source: where it is, and the name and state that identify it."""

    path: Path
    name: str
    size: int
    mtime_ns: int


class FileSource(Source):
    """Documents of local files, one file after the other in the order of their names."""

    kind: str
    suffixes: frozenset[str]

    def __init__(self, pattern: str, text_key: str) -> None:
        self.pattern = pattern
        self.text_key = text_key
        self.files = find_files(pattern, self.suffixes, self.kind)
        self.sizes_before = list(accumulate((file.size for file in self.files), initial=0))

    def identity(self) -> dict[str, Any]:
        """Names below what `data.path` names, sizes, times of change: a folder that moves stays the same corpus."""
        return {"source": self.kind, "num_files": len(self.files), "files": files_hash(self.files), **self.options()}

    def options(self) -> dict[str, Any]:
        """Settings that decide what is read from a file."""
        return {"text_key": self.text_key}

    def description(self) -> str:
        return f"data.path={self.pattern} ({len(self.files)} file{'s' if len(self.files) != 1 else ''})"

    def read(self, cursor: Cursor | None = None) -> FileReader:
        return FileReader(self, cursor or {})

    def num_parts(self) -> int:
        return len(self.files)

    def read_part(self, index: int) -> FileReader:
        return FileReader(self, {"file": index}, index + 1)

    @abstractmethod
    def read_file(self, path: Path, skip: int) -> Iterator[Piece]:
        """Documents of one file without the first `skip`."""


class FileReader(Reader):
    """A pass over files; the cursor is the file's index and the number of its documents already read."""

    def __init__(self, source: FileSource, cursor: Cursor, stop: int | None = None) -> None:
        """Reads up to, not including, the file `stop`; None: all."""
        self.source = source
        self.file = int(cursor.get("file", 0))
        self.document = int(cursor.get("document", 0))
        self.stop = len(source.files) if stop is None else stop
        self.share = 0.0

    def __iter__(self) -> Iterator[str]:
        while self.file < self.stop:
            path = self.source.files[self.file].path
            with _readable(path, self.source.kind):
                for piece in self.source.read_file(path, self.document):
                    self.document += 1
                    self.share = piece.share
                    yield piece.text
            self.file, self.document, self.share = self.file + 1, 0, 0.0

    def cursor(self) -> Cursor:
        return {"file": self.file, "document": self.document}

    def fraction(self) -> float | None:
        sizes = self.source.sizes_before
        if self.file == len(self.source.files):
            return 1.0
        inside = (sizes[self.file + 1] - sizes[self.file]) * self.share
        return min((sizes[self.file] + inside) / max(sizes[-1], 1), 1.0)


class TextSource(FileSource):
    """Plain text in UTF-8: a file is a document, a long one several."""

    kind = "text"
    suffixes = TEXT_SUFFIXES

    def options(self) -> dict[str, Any]:
        return {}

    def read_file(self, path: Path, skip: int) -> Iterator[Piece]:
        with open_binary(path) as (stream, share):
            documents = cut_text(decoded(stream), DOCUMENT_CHARS)
            yield from islice((Piece(text, share()) for text in documents), skip, None)


class JsonlSource(FileSource):
    """JSON lines: an object a line, its text under `data.text_key`."""

    kind = "jsonl"
    suffixes = frozenset({".jsonl", ".ndjson", ".json"})

    def read_file(self, path: Path, skip: int) -> Iterator[Piece]:
        with open_binary(path) as (stream, share):
            lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
            for number, line in islice(lines, skip, None):
                yield Piece(self._text(line, f"{path}:{number}"), share())

    def _text(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:  # a UnicodeDecodeError is one, too
            raise DataError(f"{where} is not JSON ({error}); data=jsonl reads one object a line.") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is a JSON {type(record).__name__}; data=jsonl reads one object a line.")
        return text_of(record, self.text_key, where)


class ParquetSource(FileSource):
    """Parquet: a row is a document, its text in the column `data.text_key`."""

    kind = "parquet"
    suffixes = frozenset({".parquet", ".pq"})

    def read_file(self, path: Path, skip: int) -> Iterator[Piece]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            if self.text_key not in file.schema_arrow.names:
                raise missing_text_key(self.text_key, file.schema_arrow.names, str(path))
            row = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if row + num_rows <= skip:  # read before: not even decompressed
                    row += num_rows
                    continue
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[self.text_key]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        if row > skip:
                            text = checked_text(value, self.text_key, f"{path}, row {row}")
                            yield Piece(text, row / file.metadata.num_rows)


def find_files(pattern: str, suffixes: frozenset[str], kind: str) -> list[LocalFile]:
    """Files that `data.path` names, sorted by name: a file itself, all files of a folder and its subfolders that have
    one of `suffixes` and are not hidden, or all files that a glob (`**` for any depth) matches.

    Raises DataError where there are none, with what was looked for.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return [_local_file(path, path.parent)]
    if path.is_dir():
        paths = [file for file in _walk(path) if _plain_suffix(file) in suffixes]
        looked_for = " ".join(sorted(suffixes))
        root, problem = path, f"the folder holds no {kind} file; looked for {looked_for} (also .gz, .zst)."
    elif glob.has_magic(str(path)):
        paths = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
        root = Path(os.path.commonpath([file.parent for file in paths])) if paths else path
        problem = f"no file matches this glob (looked from {Path.cwd()})."
    else:
        raise DataError(
            f"data.path={pattern}: no such file or folder (looked for {path.absolute()}). "
            f"data={kind} takes a file, a folder or a glob."
        )
    if not paths:
        raise DataError(f"data.path={pattern}: {problem}")
    return sorted((_local_file(file, root) for file in paths), key=lambda file: file.name)


def files_hash(files: Iterable[LocalFile]) -> str:
    """sha256 of names, sizes and times of change."""
    lines = (f"{file.name}\0{file.size}\0{file.mtime_ns}\n" for file in files)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def folder_files(root: Path) -> list[LocalFile]:
    """All files of a folder and its subfolders that are not hidden, sorted by name."""
    return sorted((_local_file(path, root) for path in _walk(root)), key=lambda file: file.name)


def _local_file(path: Path, root: Path) -> LocalFile:
    status = path.stat()
    return LocalFile(path, path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # no link to nothing, and no pipe, which would wait


def _plain_suffix(path: Path) -> str:
    """Suffix in lower case, without that of a compression: `.jsonl` of `a.jsonl.zst`."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


@contextmanager
def open_binary(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], float]]]:
    """A stream of the file's decompressed bytes, and a function that says which share of the file has been read."""
    size = max(path.stat().st_size, 1)
    with open(path, "rb") as raw:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            stream: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        elif suffix == ".zst":
            import pyarrow as pa  # has zstd built in; the standard library gets it in Python 3.14

            stream = cast(IO[bytes], io.BufferedReader(cast(Any, pa.CompressedInputStream(raw, "zstd")), READ_BYTES))
        else:
            stream = raw
        yield stream, lambda: min(raw.tell() / size, 1.0)


def decoded(stream: IO[bytes]) -> Iterator[str]:
    """Text of a UTF-8 stream in pieces, without its byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while data := stream.read(READ_BYTES):
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def cut_text(pieces: Iterator[str], limit: int) -> Iterator[str]:
    """Documents of at most `limit` characters whose concatenation is that of `pieces`; cut after the last blank line
    in the second half of the limit, else after the last line end, else at the limit."""
    text = ""
    for piece in pieces:
        text += piece
        start = 0
        while len(text) - start > limit:
            end = start + limit
            for separator in ("\n\n", "\n", " "):
                found = text.rfind(separator, start + limit // 2, end)
                if found >= 0:
                    end = found + len(separator)
                    break
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Turns what reading a broken file raises into a DataError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{path} is not UTF-8 text (byte 0x{byte:02x}: {error.reason}). Convert it, or leave it out with a glob in "
            "data.path."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} can't be decompressed, it is damaged or incomplete ({error}).") from error
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        raise DataError(f"{path} can't be read as {kind}: {error}") from error
