"""Checkpoint shards: safetensors files written in one pass, synced, with a checksum for each tensor.

The format is safetensors' (8 bytes header length, JSON header, raw little-endian data), so any of its readers opens a
shard. Ours differs in what a checkpoint needs: one tensor at a time in memory, a checksum taken while writing, a
file that is on the disk when `write_shard` returns, and reads that verify what they read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

DTYPES = {"F32": torch.float32, "U8": torch.uint8}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class CorruptError(Exception):
    """A file of a checkpoint is missing, cut short, or not what was written."""


@dataclass(frozen=True)
class TensorRecord:
    """Where a tensor lies in its file, and what its bytes hash to."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""
    checksum: str


@dataclass(frozen=True)
class ShardRecord:
    """A shard file as it was written."""

    file: str
    size: int
    """Bytes."""
    header_checksum: str
    tensors: dict[str, TensorRecord]


def checksum(data: bytes | memoryview) -> str:
    """128-bit XXH3 of the bytes: finds damage at memory speed; no protection against intent."""
    return xxhash.xxh3_128_hexdigest(data)


def write_shard(path: Path, tensors: Mapping[str, Tensor], progress: Callable[[], None] | None = None) -> ShardRecord:
    """Write fp32 and uint8 tensors, from any device, and wait until they are on the disk. Raises `OSError`.

    `progress` is called after each tensor.
    """
    header = shard_header(tensors)
    records: dict[str, TensorRecord] = {}
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors.items():
            data = raw_bytes(tensor)
            records[name] = TensorRecord(
                CODES[tensor.dtype], tuple(tensor.shape), file.tell(), data.nbytes, checksum(data)
            )
            file.write(data)
            if progress is not None:
                progress()
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return ShardRecord(path.name, size, checksum(header), records)


def shard_header(tensors: Mapping[str, Tensor]) -> bytes:
    """Length and JSON header, padded with spaces to a multiple of 8 bytes so that data are aligned."""
    entries: dict[str, dict[str, object]] = {}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, copied to the CPU if they aren't there."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).numpy()).cast("B")


class ShardReader:
    """Reads tensors of one shard, verifying each."""

    def __init__(self, folder: Path, record: ShardRecord) -> None:
        self.path = folder / record.file
        self.record = record
        self.file: BinaryIO | None = None

    def check_size(self) -> None:
        """Raise `CorruptError` if the file isn't there or has another size."""
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise CorruptError(f"{self.path.name} can't be opened: {error.strerror}") from error
        if size != self.record.size:
            raise CorruptError(f"{self.path.name} has {size:,} bytes, should have {self.record.size:,}")

    def open(self) -> BinaryIO:
        """The open file, its header verified."""
        if self.file is None:
            try:
                self.file = self.path.open("rb")
                length = int.from_bytes(self.file.read(8), "little")
                self.file.seek(0)
                header = self.file.read(8 + min(length, self.record.size))
            except OSError as error:
                raise CorruptError(f"{self.path.name} can't be read: {error.strerror}") from error
            if checksum(header) != self.record.header_checksum:
                raise CorruptError(f"{self.path.name}: the header isn't what was written")
        return self.file

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU. Raises `CorruptError` if its bytes aren't those that were written."""
        record = self.record.tensors.get(name)
        if record is None:
            raise CorruptError(f"{self.path.name} has no {name}")
        tensor = torch.empty(record.shape, dtype=DTYPES[record.dtype])
        data = raw_bytes(tensor)  # shares the tensor's memory
        file = self.open()
        try:
            file.seek(record.offset)
            got = file.readinto(data)  # type: ignore[attr-defined]
        except OSError as error:
            raise CorruptError(f"{self.path.name} can't be read: {error.strerror}") from error
        if got != record.size or checksum(data) != record.checksum:
            raise CorruptError(f"{self.path.name}: {name} isn't what was written")
        return tensor

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()
            self.file = None
