"""Tokenising in several processes with the order kept."""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from data.cpus import available_cpus
from data.errors import DataError
from data.sources import Cursor, Reader
from data.tokenizer import TokenizerInfo
from data.worker import OF_THE_PARENT

BATCH_CHARS = 1 << 18
BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Batch:
    """Consecutive documents of a source."""

    texts: list[str]
    cursor: Cursor
    """Where the next batch begins."""
    fraction: float | None
    """Share of the source read so far."""


@dataclass(frozen=True)
class Encoded:
    """The documents of a batch that are not empty, tokenised, in their order."""

    batch: Batch
    tokens: npt.NDArray[Any]
    """(total,) uint16 or uint32; a separator before each document."""
    lengths: npt.NDArray[np.int64]
    """(documents,) tokens of each."""
    num_bytes: npt.NDArray[np.int64]
    """(documents,) UTF-8 bytes of the text of each."""
    hashes: npt.NDArray[np.uint64]
    """(documents,) hash of the text of each."""


def batches(reader: Reader, max_documents: int | None) -> Iterator[Batch]:
    """The reader's documents (the first `max_documents`) in batches of about `BATCH_CHARS` characters.

    Lone surrogates, which JSON can express and UTF-8 can't, become question marks.
    """
    texts: list[str] = []
    chars = 0
    for count, text in enumerate(_limited(reader, max_documents), 1):
        texts.append(text if text.isascii() else text.encode("utf-8", "replace").decode())
        chars += len(text)
        if chars >= BATCH_CHARS or count % BATCH_DOCUMENTS == 0:
            yield Batch(texts, reader.cursor(), reader.fraction())
            texts, chars = [], 0
    if texts:
        yield Batch(texts, reader.cursor(), reader.fraction())


def _limited(reader: Reader, max_documents: int | None) -> Iterator[str]:
    if max_documents is None:
        yield from reader
    elif max_documents > 0:
        for count, text in enumerate(reader, 1):
            yield text
            if count == max_documents:
                return


class Encoder:
    """A pool of worker processes; a context manager, because it has to end them."""

    def __init__(self, tokenizer: Path, info: TokenizerInfo, dtype: str, max_tokens: int, num_workers: int) -> None:
        """`num_workers` 0 stands for one a CPU that this process may keep busy."""
        self.dtype = dtype
        self.num_workers = num_workers or available_cpus()
        self._stack = contextlib.ExitStack()
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._arguments = [str(tokenizer), str(info.eos_id), dtype, str(max_tokens)]

    def __enter__(self) -> Encoder:
        for _ in range(self.num_workers):
            self._idle.put(self._stack.enter_context(_Worker(self._arguments)))
        # One thread a worker, which only waits for its pipe.
        self._threads = self._stack.enter_context(ThreadPoolExecutor(self.num_workers, "encode"))
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._stack.close()

    def encode(self, source: Iterator[Batch]) -> Iterator[Encoded]:
        """Batches tokenised in parallel, in the order they came; a few a worker are under way at any time."""
        pending: deque[Future[Encoded]] = deque()
        for batch in source:
            pending.append(self._threads.submit(self._encode, batch))
            if len(pending) > 3 * self.num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _encode(self, batch: Batch) -> Encoded:
        worker = self._idle.get()
        try:
            tokens, lengths, num_bytes, hashes = worker.ask(batch.texts)
        finally:
            self._idle.put(worker)
        return Encoded(
            batch,
            np.frombuffer(tokens, self.dtype),
            np.array(lengths, np.int64),
            np.array(num_bytes, np.int64),
            np.array(hashes, np.uint64),
        )


class _Worker:
    """One process of `data/worker.py` and the pipes to it."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def __enter__(self) -> _Worker:
        self.log = tempfile.TemporaryFile()
        # -P: the folder of worker.py is no place to import from, its modules carry names of common packages.
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), *self.arguments]
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_PARENT)  # until it ignores them
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died; its error has been raised where it was asked
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.log.close()

    def ask(self, texts: list[str]) -> Any:
        """The answer of `data.worker.encode_batch`. Raises DataError with the process's last words if it died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump(texts, self.process.stdin, pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            code = self.process.wait()
            self.log.seek(0)
            lines = self.log.read().decode("utf-8", "replace").strip().splitlines()
            reason = lines[-1] if lines else "killed, perhaps for want of memory"
            raise DataError(
                f"A process that tokenises ended with code {code} ({reason}). "
                "What was finished is kept: run again, with a smaller data.num_workers if memory was short."
            ) from error
