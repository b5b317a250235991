"""Token shards: the prepared corpus on disk.

    <cache_dir>/<source>-<key>/
        manifest.json               written last; what everything below holds, with sizes and checksums
        tokenizer.json
        train/00000.tokens          token ids, little-endian uint16 (vocabularies up to 65 536) or uint32
        train/00000.documents       int64 position of each document's separator within the shard
        validation/...

A split is the concatenation of its shards; a document never straddles two. Documents are found by these positions,
never by looking for a token id. The folder appears under its name whole, by a rename, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import DataError

FORMAT = 1
"""Changes when the files or what decides their content change; part of every key."""
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")
DOCUMENT_DTYPE = "<i8"


@dataclass(frozen=True)
class ShardInfo:
    """A finished shard."""

    num_tokens: int
    num_documents: int
    tokens_sha256: str
    documents_sha256: str


@dataclass
class SplitInfo:
    """A split: its finished shards and its counts."""

    shards: list[ShardInfo] = field(default_factory=list)
    num_bytes: int = 0
    """UTF-8 bytes of the documents' text."""

    @property
    def num_tokens(self) -> int:
        """Tokens, separators included."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents that are not empty."""
        return sum(shard.num_documents for shard in self.shards)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SplitInfo:
        return cls([ShardInfo(**shard) for shard in value["shards"]], value["num_bytes"])


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus holds. It names no time, machine or path: equal preparations are equal byte for byte."""

    key: str
    source: dict[str, Any]
    """Identity of the source; of many files only the number and a hash."""
    settings: dict[str, Any]
    tokenizer_hash: str
    vocab_size: int
    eos_token: str
    eos_id: int
    dtype: str
    splits: dict[str, SplitInfo]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Writes manifest.json into `folder` and syncs it."""
        write_synced(folder / MANIFEST, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises DataError where manifest.json can't be understood."""
        try:
            value = json.loads((folder / MANIFEST).read_text("utf-8"))
            splits = {name: SplitInfo.from_json(split) for name, split in value.pop("splits").items()}
            return cls(splits=splits, **value)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(folder / MANIFEST, str(error)) from error

    @property
    def content_hash(self) -> str:
        """Hash of the tokens themselves: equal on every machine that prepared the same corpus."""
        digest = hashlib.sha256(self.tokenizer_hash.encode())
        for name in SPLITS:
            for shard in self.splits[name].shards:
                digest.update(f"{name} {shard.tokens_sha256} {shard.documents_sha256}\n".encode())
        return digest.hexdigest()


class ShardWriter:
    """Appends documents to a split, a shard after the other; can say how far it is, and go on from there.

    Files of an unfinished shard are on disk up to the last `state()`; what was written after it is cut off by `resume`.
    """

    def __init__(self, folder: Path, dtype: str, shard_tokens: int, state: dict[str, Any] | None = None) -> None:
        """`state` is what `state()` gave before a kill; None begins anew."""
        folder.mkdir(exist_ok=True)
        self.folder, self.dtype, self.shard_tokens = folder, np.dtype(dtype), shard_tokens
        self.info = SplitInfo()
        self.num_tokens = self.num_documents = 0  # of the open shard
        if state is not None:
            self.info = SplitInfo.from_json(state["finished"])
            self.num_tokens, self.num_documents = state["num_tokens"], state["num_documents"]
        sizes = self.num_tokens * self.dtype.itemsize, self.num_documents * np.dtype(DOCUMENT_DTYPE).itemsize
        self.tokens, self.documents = (_HashedFile(path, size) for path, size in zip(self._paths(), sizes, strict=True))

    def _paths(self) -> tuple[Path, Path]:
        return shard_paths(self.folder, len(self.info.shards))

    def append(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64], num_bytes: int) -> None:
        """Adds whole documents.

        Args:
            tokens: (sum of lengths,) ids in the dtype of the shards.
            lengths: (documents,) tokens of each, at most `shard_tokens`.
            num_bytes: UTF-8 bytes of their text.
        """
        ends = np.cumsum(lengths)
        first = 0
        while first < len(lengths):
            before = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, before + self.shard_tokens - self.num_tokens, side="right"))
            if last == first:
                self.close_shard()
                continue
            starts = ends[first:last] - lengths[first:last] - before + self.num_tokens
            self.tokens.write(tokens[before : int(ends[last - 1])].tobytes())
            self.documents.write(starts.astype(DOCUMENT_DTYPE).tobytes())
            self.num_tokens += int(ends[last - 1]) - before
            self.num_documents += last - first
            first = last
        self.info.num_bytes += num_bytes

    def close_shard(self) -> None:
        """Finishes the open shard and opens the next."""
        digests = self.tokens.close(), self.documents.close()
        self.info.shards.append(ShardInfo(self.num_tokens, self.num_documents, *digests))
        self.num_tokens = self.num_documents = 0
        self.tokens, self.documents = (_HashedFile(path, 0) for path in self._paths())

    def state(self) -> dict[str, Any]:
        """Syncs the files and says, in JSON values, how far they are."""
        self.tokens.sync()
        self.documents.sync()
        return {"finished": asdict(self.info), "num_tokens": self.num_tokens, "num_documents": self.num_documents}

    @property
    def total_tokens(self) -> int:
        """Tokens so far, in finished shards and the open one."""
        return self.info.num_tokens + self.num_tokens

    @property
    def total_documents(self) -> int:
        """Documents so far."""
        return self.info.num_documents + self.num_documents

    def finish(self) -> SplitInfo:
        """Finishes the last shard; an empty one is removed."""
        if self.num_tokens:
            self.close_shard()
        self.tokens.discard()
        self.documents.discard()
        sync_folder(self.folder)
        return self.info

    def close(self) -> None:
        """Closes the files as they are."""
        self.tokens.file.close()
        self.documents.file.close()


def can_resume(folder: Path, dtype: str, state: dict[str, Any]) -> bool:
    """Whether the files that `ShardWriter.state` speaks of are all there, at least as long as it says."""
    info = SplitInfo.from_json(state["finished"])
    counts = [(shard.num_tokens, shard.num_documents) for shard in info.shards]
    counts.append((state["num_tokens"], state["num_documents"]))
    for index, (num_tokens, num_documents) in enumerate(counts):
        sizes = num_tokens * np.dtype(dtype).itemsize, num_documents * np.dtype(DOCUMENT_DTYPE).itemsize
        for path, size in zip(shard_paths(folder, index), sizes, strict=True):
            if not path.is_file() or path.stat().st_size < size:
                return False
    return True


class _HashedFile:
    """A file that only grows, with the sha256 of what is in it."""

    def __init__(self, path: Path, size: int) -> None:
        """Opens `path` with its first `size` bytes kept and the rest cut off."""
        self.path = path
        self.digest = hashlib.sha256()
        self.file = open(path, "r+b" if size else "w+b")  # noqa: SIM115 - open as long as the shard is
        self.file.truncate(size)
        while data := self.file.read(1 << 20):
            self.digest.update(data)

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> str:
        self.sync()
        self.file.close()
        return self.digest.hexdigest()

    def discard(self) -> None:
        self.file.close()
        self.path.unlink()


class TokenDataset:
    """The tokens of a split, memory-mapped: one stream of `num_tokens` ids, cut into documents."""

    def __init__(self, folder: Path, info: SplitInfo, dtype: str, vocab_size: int | None = None) -> None:
        """Maps the shards of `folder`. Raises DataError naming the file where a size differs from the manifest.

        vocab_size: ids are below this, which `read` checks. None: as many as the dtype has.
        """
        self.info, self.dtype = info, np.dtype(dtype)
        self.vocab_size = vocab_size if vocab_size is not None else 1 << 8 * self.dtype.itemsize
        self._paths = [shard_paths(folder, index) for index in range(len(info.shards))]
        self._tokens: list[npt.NDArray[Any]] = []
        self._documents: list[npt.NDArray[np.int64]] = []
        for (tokens, documents), shard in zip(self._paths, info.shards, strict=True):
            self._tokens.append(_map(tokens, self.dtype, shard.num_tokens))
            self._documents.append(_map(documents, np.dtype(DOCUMENT_DTYPE), shard.num_documents))
        self._count()

    def _count(self) -> None:
        info = self.info
        self.num_tokens, self.num_documents, self.num_bytes = info.num_tokens, info.num_documents, info.num_bytes
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in info.shards)])  # (shards + 1,) first token of each
        self._firsts: list[int] = self._starts.tolist()

    def extend(self, other: TokenDataset) -> None:
        """Lays the tokens of `other`, of the same dtype and vocabulary, behind those that are here. Copies nothing."""
        assert other.dtype == self.dtype, f"{other.dtype} behind {self.dtype}"
        self.info = SplitInfo([*self.info.shards, *other.info.shards], self.info.num_bytes + other.info.num_bytes)
        self._paths += other._paths
        self._tokens += other._tokens
        self._documents += other._documents
        self._count()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, separators counted as tokens; nats per token / ln 2 / this = bits per byte."""
        return self.num_bytes / max(self.num_tokens, 1)

    def read(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
        """(n, length) token ids in the dtype of the shards: row i is the stream from `starts[i]` on.

        Raises DataError for an id that the vocabulary doesn't have: a GPU would stop at it without saying where.
        """
        rows = np.empty((len(starts), length), self.dtype)
        for row, start in zip(rows, starts.tolist(), strict=True):
            shard, done = bisect_right(self._firsts, start) - 1, 0
            while done < length:
                begin = start + done - self._firsts[shard]
                part = self._tokens[shard][begin : begin + length - done]
                row[done : done + len(part)] = part
                done += len(part)
                shard += 1
        if rows.size and int(rows.max()) >= self.vocab_size:
            raise self._foreign_id(starts[int((rows >= self.vocab_size).any(axis=1).argmax())])
        return rows

    def _foreign_id(self, start: np.int64) -> DataError:
        """The error for a row from `start` on that holds an id past the vocabulary."""
        path = self._paths[bisect_right(self._firsts, int(start)) - 1][0]
        return damaged(path, f"it holds ids from {self.vocab_size} on, which its vocabulary doesn't have")

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Positions in the stream, sorted, of the documents that begin in [start, stop)."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        found = []
        for shard in range(first, last):
            base, documents = self._starts[shard], self._documents[shard]
            begin, end = np.searchsorted(documents, [start - base, stop - base])
            found.append(documents[begin:end] + base)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def documents(self, first: int = 0, stop: int | None = None) -> Iterator[npt.NDArray[Any]]:
        """Token ids of the documents `first` to `stop` (all by default), one array each, separator included."""
        index = 0
        for tokens, starts in zip(self._tokens, self._documents, strict=True):
            ends = np.append(starts[1:], len(tokens))
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                if stop is not None and index >= stop:
                    return
                if index >= first:
                    yield tokens[start:end]
                index += 1

    def document_lengths(self) -> npt.NDArray[np.int64]:
        """(num_documents,) tokens of each document, separator included."""
        pairs = zip(self._tokens, self._documents, strict=True)
        lengths = [np.diff(starts, append=len(tokens)) for tokens, starts in pairs]
        return np.concatenate(lengths) if lengths else np.empty(0, np.int64)

    def verify(self) -> None:
        """Compares the checksums of all files. Raises DataError naming the first that differs."""
        for paths, shard in zip(self._paths, self.info.shards, strict=True):
            expected = shard.tokens_sha256, shard.documents_sha256
            for path, digest in zip(paths, expected, strict=True):
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise damaged(path, "its checksum differs from the manifest")


def shard_paths(folder: Path, index: int) -> tuple[Path, Path]:
    """Files of a shard: its tokens and its documents."""
    return folder / f"{index:05d}.tokens", folder / f"{index:05d}.documents"


def token_dtype(vocab_size: int) -> str:
    """The smallest unsigned type that holds every id below `vocab_size`, little-endian."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def damaged(path: Path, problem: str) -> DataError:
    """The error for a prepared corpus that is not what its manifest says."""
    return DataError(f"Prepared corpus: {path}: {problem}. Delete the folder {_root(path)} to prepare it again.")


def _root(path: Path) -> Path:
    return path.parent.parent if path.parent.name in SPLITS else path.parent


def _map(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise damaged(path, "missing") from error
    if size != count * dtype.itemsize:
        raise damaged(path, f"{size} bytes instead of {count * dtype.itemsize}")
    # A plain view: slicing a memmap object costs ten times that of an array.
    return np.asarray(np.memmap(path, dtype, "r")) if count else np.empty(0, dtype)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file through a temporary one, synced, so that it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
