"""Measure preparation beside the two usual ways to do it, on the same corpus with the same tokenizer.

    python -m tests.data.measure_preparation --megabytes 60 --workers 1 2

The corpus is the standard library's source files, repeated into JSONL files made for the measurement. The ways:

- `prepare`: `data.prepare`: separators, held-out split, document boundaries, checksums, synced shards.
- `map`: `datasets.map` with `tokenizers`, as their manuals show it: a batched function, its result left in the cache.
- `memmap`: as nanoGPT prepares its corpora: split, map a document at a time over processes, then write each split into
  one memory-mapped file.

Each runs in a process of its own, from start to exit. CPU seconds are user and system time of that process and all that
it started: they stay comparable where other work takes part of the machine. Memory is the highest sum of their
proportional set sizes (shared pages counted once, mapped files included), looked at ten times a second. Threads of
`tokenizers` are off, so that one worker is one core. The number of text tokens has to agree between all ways.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from configs.schema import DataConfig, Source
from data.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer

NUM_FILES = 4
VOCAB_SIZE = 16_384
HELD_OUT = 0.02
MEMMAP_PARTS = 64
SAMPLE_INTERVAL_S = 0.1


@dataclass(frozen=True)
class Result:
    """One way, measured once."""

    way: str
    workers: int
    megabytes: float
    """UTF-8 text, 10^6 bytes."""
    wall_s: float
    cpu_s: float
    """User and system time of all processes."""
    parent_cpu_s: float
    """Of these, the process that reads and writes: the part that more workers don't share."""
    peak_mb: float
    """10^6 bytes."""
    text_tokens: int
    """Tokens without separators."""


def write_corpus(folder: Path, megabytes: float) -> int:
    """JSONL files with about so much text; returns its bytes exactly."""
    from data.sources.hub import StdlibSource

    folder.mkdir()
    texts = itertools.cycle(StdlibSource().texts)
    written = 0
    for index in range(NUM_FILES):
        with open(folder / f"{index}.jsonl", "w", encoding="utf-8") as file:
            while written < megabytes * 1e6 * (index + 1) / NUM_FILES:
                text = next(texts)
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
    return written


def run_prepare(corpus: Path, tokenizer: Path, scratch: Path, workers: int) -> int:
    """This project's way; returns the number of text tokens, as the other ways do."""
    from data import prepare

    prepared = prepare(
        DataConfig(
            source=Source.jsonl,
            path=str(corpus),
            tokenizer=str(tokenizer),
            cache_dir=str(scratch),
            validation_fraction=HELD_OUT,
            num_workers=workers,
        )
    )
    splits = (prepared.train, prepared.validation)
    return sum(split.num_tokens - split.num_documents for split in splits)


def run_map(corpus: Path, tokenizer: Path, scratch: Path, workers: int) -> int:
    """`datasets.map`, batched, with `tokenizers`."""
    from datasets import load_dataset
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        encoded = encoder.encode_batch(rows["text"])
        return {"ids": [one.ids for one in encoded], "length": [len(one.ids) for one in encoded]}

    files = [str(path) for path in sorted(corpus.iterdir())]
    loaded = load_dataset("json", data_files=files, split="train", cache_dir=str(scratch))
    mapped = loaded.map(encode, batched=True, num_proc=workers, remove_columns=loaded.column_names)
    return sum(mapped["length"])


def run_memmap(corpus: Path, tokenizer: Path, scratch: Path, workers: int) -> int:
    """Split, map over processes, one memory-mapped file a split."""
    import numpy as np
    from datasets import load_dataset
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    separator = encoder.token_to_id(END_OF_TEXT)

    def encode(row: dict[str, str]) -> dict[str, Any]:
        ids = [*encoder.encode(row["text"]).ids, separator]
        return {"ids": ids, "length": len(ids)}

    files = [str(path) for path in sorted(corpus.iterdir())]
    loaded = load_dataset("json", data_files=files, num_proc=workers, split="train", cache_dir=str(scratch))
    total = 0
    for name, split in loaded.train_test_split(test_size=HELD_OUT, seed=1, shuffle=True).items():
        mapped = split.map(encode, remove_columns=split.column_names, num_proc=workers)
        size = int(np.sum(mapped["length"], dtype=np.int64))
        stream = np.memmap(scratch / f"{name}.bin", np.uint16, "w+", shape=(size,))
        filled = 0
        parts = min(MEMMAP_PARTS, len(mapped))
        for index in range(parts):
            rows = mapped.shard(parts, index, contiguous=True).with_format("numpy")
            ids = np.concatenate(rows["ids"][:])
            stream[filled : filled + len(ids)] = ids
            filled += len(ids)
        stream.flush()
        total += size - len(mapped)
    return total


WAYS = {"prepare": run_prepare, "map": run_map, "memmap": run_memmap}


def run_way(arguments: argparse.Namespace) -> None:
    """In the measured process: do the work, write what only this process knows."""
    tokens = WAYS[arguments.way](arguments.corpus, arguments.tokenizer, arguments.scratch, arguments.workers[0])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    answer = {"text_tokens": tokens, "parent_cpu_s": usage.ru_utime + usage.ru_stime}
    (arguments.scratch / "answer.json").write_text(json.dumps(answer))


class PeakMemory:
    """Samples the proportional set size of a process and all that it started, until told to stop."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            total = 0
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # the root has ended
                for process in [self._root, *self._root.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # a worker has ended
                        total += process.memory_full_info().pss
            self.peak = max(self.peak, total)

    def stop(self) -> int:
        """The peak in bytes."""
        self._stop.set()
        self._thread.join()
        return self.peak


def measure(way: str, workers: int, corpus: Path, num_bytes: int, tokenizer: Path) -> Result:
    """Run one way in a fresh process with a fresh cache."""
    with tempfile.TemporaryDirectory(prefix="measure_") as scratch:
        command = [sys.executable, "-m", "tests.data.measure_preparation", "--way", way, "--workers", str(workers)]
        command += ["--corpus", str(corpus), "--tokenizer", str(tokenizer), "--scratch", scratch]
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HOME": scratch,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=environment)
        memory = PeakMemory(process.pid)
        code = process.wait()
        wall_s = time.perf_counter() - begin
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        peak = memory.stop()
        if code:
            raise SystemExit(f"{way} ended with code {code}")
        answer = json.loads((Path(scratch) / "answer.json").read_text())
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Result(way, workers, num_bytes / 1e6, wall_s, cpu_s, peak_mb=peak / 1e6, **answer)


def table(results: list[Result]) -> str:
    """The best of the repetitions of each way, in Markdown."""
    lines = [
        "| way | workers | text, MB | wall, s | MB/s | CPU, s | MB per CPU s | parent's CPU, s | memory, MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key in dict.fromkeys((r.megabytes, r.workers, r.way) for r in results):
        group = [r for r in results if (r.megabytes, r.workers, r.way) == key]
        wall, cpu, parent = (min(getattr(r, name) for r in group) for name in ("wall_s", "cpu_s", "parent_cpu_s"))
        size, workers, way = key
        lines.append(
            f"| `{way}` | {workers} | {size:.1f} | {wall:.1f} | {size / wall:.2f} | {cpu:.1f} | {size / cpu:.2f} "
            f"| {parent:.1f} | {max(r.peak_mb for r in group):.0f} |"
        )
    return "\n".join(lines)


def cpu_model() -> str:
    """The processor's name, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measures all ways and prints a table."""
    parser = argparse.ArgumentParser(description="Preparation beside datasets.map and a nanoGPT-style script.")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[60.0], help="sizes of the corpus")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=1, help="the table has the best of so many")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    for name in ("--way", "--corpus", "--tokenizer", "--scratch"):  # of the measured process
        parser.add_argument(name, type=str if name == "--way" else Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run_way(arguments)
        return
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="measure_") as folder:
        for size in arguments.megabytes:
            corpus = Path(folder) / f"corpus_{size:g}"
            num_bytes = write_corpus(corpus, size)
            tokenizer = Path(folder) / "tokenizer.json"
            if not tokenizer.is_file():
                files = sorted(corpus.iterdir())
                texts = (json.loads(line)["text"] for line in files[0].open(encoding="utf-8"))
                save_tokenizer(train_tokenizer(texts, VOCAB_SIZE), tokenizer)
            for _, workers, way in itertools.product(range(arguments.repeat), arguments.workers, arguments.ways):
                results.append(measure(way, workers, corpus, num_bytes, tokenizer))
                print(json.dumps(asdict(results[-1])), flush=True)
            counts = {r.text_tokens for r in results if r.megabytes == num_bytes / 1e6}
            assert len(counts) == 1, f"the ways disagree on the number of tokens: {counts}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("datasets", "tokenizers", "numpy"))
    print(
        f"\n{table(results)}\n\n{cpu_model()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"
    )


if __name__ == "__main__":
    main()
