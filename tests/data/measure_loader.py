"""Measure the loader as eight ranks of one machine use it, on two cores.

    python -m tests.data.measure_loader

A corpus of random tokens with document lengths as on the web (log-normal, median 490 tokens) is made for the
measurement. Eight processes, all on the same two cores, each load one rank's share of the same global batches: 512
sequences of 1,024 tokens, micro-batches of 16, as 8 GPUs at 4 M tokens/s take them for GPT-2 124M. Each way is measured
twice:

- `paced`: each rank takes a global batch when the last is used up at that speed, every 131 ms. `wait` is what training
  would wait for data, as a share of the time, of the rank that waits most; `late` is the longest single wait. `cores`
  is the CPU time of all eight over the time.
- `free`: as fast as it goes. The speed by the clock, and by CPU time: what two cores would give that have nothing else
  to do.

Batches stay in host memory: copying them through pinned memory to a GPU is not measured here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from configs.schema import Packing
from data.loader import TokenLoader
from data.packing import pack_dataset
from data.shards import ShardWriter, SplitInfo, TokenDataset
from tests.data.measure_preparation import cpu_model

RANKS, CORES = 8, 2
SEQUENCE_LENGTH, GLOBAL_BATCH, MICRO_BATCH = 1024, 512, 16
GOAL_TOKENS_PER_S = 4e6
VOCAB_SIZE, DTYPE, SHARD_TOKENS = 50_257, "<u2", 100_000_000
WAYS: dict[str, dict[str, object]] = {
    "concatenate": {},
    "concatenate, document mask": {"document_mask": True},
    "best fit": {"packing": Packing.best_fit},
    "best fit, document mask": {"packing": Packing.best_fit, "document_mask": True},
}


@dataclass(frozen=True)
class Result:
    """One rank, or all together."""

    tokens: int
    """Of the global batches, over all ranks."""
    wall_s: float
    cpu_s: float
    wait_s: float
    """Time that training would have waited."""
    late_s: float
    """The longest wait for one batch."""


def write_corpus(folder: Path, num_tokens: int) -> SplitInfo:
    """Shards of random tokens."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, DTYPE, SHARD_TOKENS)
    while writer.total_tokens < num_tokens:
        lengths = np.minimum(rng.lognormal(6.2, 1.1, 10_000).astype(np.int64) + 2, SHARD_TOKENS)
        writer.append(rng.integers(0, VOCAB_SIZE, lengths.sum(), np.uint16), lengths, 0)
    return writer.finish()


def run_rank(dataset: TokenDataset, way: str, rank: int, seconds: float, pace_s: float, begin_at: float) -> Result:
    """Take batches for so long; every `pace_s` seconds, or as fast as they come where it is 0."""
    loader = TokenLoader(
        dataset,
        sequence_length=SEQUENCE_LENGTH,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        rank=rank,
        world_size=RANKS,
        seed=1,
        **WAYS[way],  # type: ignore[arg-type]
    )
    waits: list[float] = []
    with closing(loader.batches()) as batches:
        next(batches)
        time.sleep(max(begin_at - time.time(), 0))  # all ranks are there
        begin, cpu = time.perf_counter(), time.process_time()
        due = begin + pace_s
        while time.perf_counter() - begin < seconds:
            time.sleep(max(due - time.perf_counter(), 0))
            waits.append(next(batches).wait_s)
            due = max(due, time.perf_counter() - waits[-1]) + pace_s
        wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    return Result(len(waits) * GLOBAL_BATCH * SEQUENCE_LENGTH, wall_s, cpu_s, sum(waits), max(waits))


def measure(corpus: Path, way: str, seconds: float, pace_s: float) -> Result:
    """All ranks at once, in processes of their own."""
    begin_at = time.time() + 25
    command = [sys.executable, "-m", "tests.data.measure_loader", "--corpus", str(corpus), "--way", way]
    command += ["--seconds", str(seconds), "--pace", str(pace_s), "--begin-at", str(begin_at)]
    processes = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(RANKS)
    ]
    ranks = [Result(**json.loads(process.communicate()[0])) for process in processes]
    wall_s = max(rank.wall_s for rank in ranks)
    return Result(
        sum(rank.tokens for rank in ranks) // RANKS,
        wall_s,
        sum(rank.cpu_s for rank in ranks),
        max(rank.wait_s for rank in ranks),
        max(rank.late_s for rank in ranks),
    )


def line(way: str, paced: Result, free: Result) -> str:
    """A row of the table."""
    return (
        f"| {way} | {paced.tokens / paced.wall_s / 1e6:.2f} | {paced.wait_s / paced.wall_s:.2%} "
        f"| {paced.late_s * 1e3:.0f} | {paced.cpu_s / paced.wall_s:.2f} | {free.tokens / free.wall_s / 1e6:.1f} "
        f"| {CORES * free.tokens / free.cpu_s / 1e6:.1f} |"
    )


def main() -> None:
    """Measures all ways and prints a table."""
    parser = argparse.ArgumentParser(description="The loader of eight ranks on two cores.")
    parser.add_argument("--tokens", type=int, default=400_000_000, help="of the corpus")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    for name, kind in (("corpus", Path), ("way", str), ("rank", int), ("pace", float), ("begin-at", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)  # of a rank
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rank is not None:
        info = SplitInfo.from_json(json.loads((arguments.corpus / "info.json").read_text()))
        dataset = TokenDataset(arguments.corpus, info, DTYPE)
        settings = arguments.way, arguments.rank, arguments.seconds, arguments.pace, arguments.begin_at
        print(json.dumps(asdict(run_rank(dataset, *settings))))
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    pace_s = GLOBAL_BATCH * SEQUENCE_LENGTH / GOAL_TOKENS_PER_S
    rows = []
    with tempfile.TemporaryDirectory(prefix="measure_") as folder:
        info = write_corpus(Path(folder), arguments.tokens)
        (Path(folder) / "info.json").write_text(json.dumps(asdict(info)))
        begin = time.process_time()
        packing = pack_dataset(TokenDataset(Path(folder), info, DTYPE), SEQUENCE_LENGTH)
        print(
            f"best fit of {info.num_documents:,} documents, {info.num_tokens:,} tokens: "
            f"{time.process_time() - begin:.2f} CPU s, {packing.padding:.4%} padding\n",
            flush=True,
        )
        for way in arguments.ways:
            paced, free = (measure(Path(folder), way, arguments.seconds, pace) for pace in (pace_s, 0.0))
            rows.append(line(way, paced, free))
            print(rows[-1], flush=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "torch"))
    print(
        "\n| way | paced, M tokens/s | wait | late, ms | cores | free, M tokens/s | by CPU time, on 2 cores |\n"
        "|---|---:|---:|---:|---:|---:|---:|\n" + "\n".join(rows)
    )
    print(f"\n{cpu_model()}, {CORES} cores; Python {platform.python_version()}, {versions}")


if __name__ == "__main__":
    main()
