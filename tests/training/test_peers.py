"""`engine.copy_engines`: gradients and weights read from the memory of other ranks, against messages between them."""

from __future__ import annotations

import enum
import gc
import io
import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import nn

from configs.errors import UserError
from configs.schema import Device, EngineConfig, Precision, Recompute, RunConfig, Toggle
from tests.peers import FilePeers
from tests.ranks import on_ranks
from tests.training.conftest import make_batch, make_engine, run_config, train
from tests.training.test_reduction import MICRO_BATCHES, SHAPES, gradient, joined
from tests.training.test_stage3_compile import keep_nothing, measured
from training import checkpoint, distributed, engine, metrics, peers
from training.backend import should_be_lean
from training.console import report_error
from training.distributed import Processes
from training.gathers import PeerGathers
from training.lean_zero import LeanStage2, LeanStage3
from training.mean_kernel import BLOCK, CPU_BLOCK, add_mean_, launch
from training.peers import REDUCTIONS, UPDATES, Peers, explain, find_peers
from training.reduction import PeerSums, in_rows
from training.state import TrainState

STEPS = 4


def reduced(bucket_size: int) -> list[Any]:
    """The parts of the sums that one of the ranks has after three micro-batches with gradients of all parameters."""
    own = distributed.init(Device.cpu, timeout_minutes=0.5)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES]
    shards = {p: torch.zeros(-(-p.numel() // own.world_size)) for p in parameters}
    neighbours = FilePeers(own)
    one = PeerSums(shards, None, bucket_size, None, neighbours)
    for micro in range(MICRO_BATCHES):
        terms = [(p * gradient(own.rank, micro, index)).sum() for index, p in enumerate(parameters)]
        torch.stack(terms).sum().backward()
        one.finish()
        assert all(p.grad is None for p in parameters)
    assert set(neighbours.barriers) == {peers.REDUCTIONS}
    own.close()
    return [shard.numpy() for shard in shards.values()]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("bucket_size", [1, 24, 10_000])
def test_sums_over_ranks_and_micro_batches(ranks: int, bucket_size: int) -> None:
    found = on_ranks(ranks, reduced, bucket_size)
    for index in range(len(SHAPES)):
        terms = [gradient(rank, micro, index).float() for rank in range(ranks) for micro in range(MICRO_BATCHES)]
        expected = in_rows(torch.stack(terms).sum(0) / ranks, ranks)
        for rank in range(ranks):
            torch.testing.assert_close(torch.from_numpy(found[rank][index]), expected[rank], rtol=1e-6, atol=1e-5)


def config_of(stage: int, recompute: Recompute = Recompute.none) -> RunConfig:
    config = run_config(stage, accumulation=2, micro=2, bucket_size=5000)
    config.engine.precision, config.engine.recompute = Precision.bf16, recompute
    config.engine.fuse_weight_gradients = Toggle.off  # else not what messages bring: test_direct.py
    config.optim.grad_clip = 0.0  # the norm's last digits would be in everything
    return config


def course(own: Processes, stage: int, recompute: Recompute, neighbours: Peers | None, folder: Path) -> dict[str, Any]:
    """Losses and norms of some steps, and of the last once more by an engine that goes on from a checkpoint; what an
    evaluation between them finds; the masters that this rank ends with."""
    engine.find_peers = lambda *_: neighbours  # type: ignore[assignment]
    config = config_of(stage, recompute)
    one = make_engine(config, own)
    results = train(one, 0, STEPS - 1)
    checkpoint.save(one, TrainState(step=STEPS - 1), folder, tokenizer_hash="")
    evaluated = one.evaluate(make_batch(7, config, own.rank, own.world_size).micro_batches)
    results += train(one, STEPS - 1, STEPS)
    parts = [(f.name, f.start, f.master.clone().numpy()) for f in one.partition.fragments()]
    one.close()
    other = make_engine(config, own)
    assert checkpoint.load(other, folder) is not None
    again = train(other, STEPS - 1, STEPS)
    assert isinstance(one.partition, LeanStage3 if stage == 3 else LeanStage2)
    other.close()
    return {"steps": measured(results), "again": measured(again), "parts": parts, "evaluated": evaluated}


CASES = {"zero2": (2, Recompute.none), "zero3": (3, Recompute.none), "recomputed": (3, Recompute.block)}


def courses(folder: Path) -> dict[tuple[str, bool], Any]:
    """On one of the ranks: each case by messages and by peers."""
    own = distributed.init(Device.cpu, timeout_minutes=2)
    found = {}
    for name, case in CASES.items():
        for with_peers in (False, True):
            keep_nothing(prefetch=20_000)
            neighbours = FilePeers(own) if with_peers else None
            found[name, with_peers] = course(own, *case, neighbours, folder / f"{name} {with_peers}")
            if neighbours is not None:
                found[name, with_peers]["barriers"] = neighbours.barriers
                found[name, with_peers]["tensors"] = neighbours.count
    own.close()
    return found


@pytest.fixture(scope="module", params=[2, 3])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[tuple[str, bool], Any]]:
    """By rank."""
    return on_ranks(request.param, courses, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", CASES)
def test_trains_as_by_messages(found: list[dict[tuple[str, bool], Any]], name: str) -> None:
    """Of two ranks to the bit; of three by the order of sums."""
    near = 0.0 if len(found) == 2 else 1e-2  # a weight in bf16 that is rounded the other way shows in all
    (messages, peer) = ([rank[name, way] for rank in found] for way in (False, True))
    for theirs, ours in zip(messages, peer, strict=True):
        for (loss, norm), (expected, expected_norm) in zip(ours["steps"], theirs["steps"], strict=True):
            assert loss == pytest.approx(expected, rel=near, abs=0)
            assert norm == pytest.approx(expected_norm, rel=near + 1e-6)
        assert ours["evaluated"] == pytest.approx(theirs["evaluated"], rel=near, abs=0)
    left, right = (joined([rank["parts"] for rank in way]) for way in (messages, peer))
    for key, expected in left.items():
        torch.testing.assert_close(right[key], expected, rtol=near, atol=near)


@pytest.mark.parametrize("name", CASES)
def test_resume_is_exact(found: list[dict[tuple[str, bool], Any]], name: str) -> None:
    for rank in found:
        assert rank[name, True]["again"] == rank[name, True]["steps"][-1:]


@pytest.mark.parametrize("name", CASES)
def test_ranks_meet_around_each_update(found: list[dict[tuple[str, bool], Any]], name: str) -> None:
    """At stage 3: once after the shards have moved, and twice for each update, or checkpoint that is read. At stage 2
    no rank writes what others read but buckets."""
    for rank in found:
        barriers = rank[name, True]["barriers"]
        engines, writes = 2, STEPS + 2  # the second engine reads a checkpoint and steps once
        assert barriers.count(UPDATES) == (0 if name == "zero2" else engines + 2 * writes)
        assert barriers.count(REDUCTIONS) > 0
        assert rank[name, True]["tensors"] == engines * (1 if name == "zero2" else 2)


def test_gathers_of_parameters_that_are_there_or_on_their_way() -> None:
    """DeepSpeed asks for none of these: an error of ours."""

    class Status(enum.Enum):
        NOT_AVAILABLE, INFLIGHT, AVAILABLE = range(3)

    gathers = object.__new__(PeerGathers)
    for status in (Status.INFLIGHT, Status.AVAILABLE):
        parameter = SimpleNamespace(ds_status=status, ds_persist=False, ds_summary=lambda: "of which it tells")
        with pytest.raises(RuntimeError, match="of which it tells"):
            gathers.gather([parameter])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("size", [1, 1000, 70_001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mean_kernel(ranks: int, rank: int, size: int, dtype: torch.dtype) -> None:
    """On a GPU, else in Triton's interpreter: the kernel, and what CPUs do instead. Rows begin anywhere."""
    device, block = ("cuda", BLOCK) if torch.cuda.is_available() else ("cpu", CPU_BLOCK)
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(ranks, size + 3, generator=generator).to(dtype)
    own = rows[rank, 1 : size + 1]
    others = rows[[at for at in range(ranks) if at != rank]][:, 1 : size + 1]
    expected = torch.randn(size, generator=generator)
    total, plain = expected.clone(), expected.clone()
    total = total.to(device)
    launch(total, own.to(device), others.to(device), rank, block)
    add_mean_(plain, own, others, rank)
    expected += rows[:, 1 : size + 1].double().mean(0).float()
    torch.testing.assert_close(total.cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-6)


def gpus(stage: int = 3, **changes: Any) -> RunConfig:
    config = config_of(stage)
    for key, value in changes.items():
        setattr(config.engine, key, value)
    return config


class Others:
    """Two ranks, one of which is here."""

    world_size, rank, device, timeout = 2, 0, torch.device("cuda", 0), timedelta(minutes=1)

    def __init__(self, *hosts: str) -> None:
        self.hosts = hosts

    def gather(self, value: Any) -> list[Any]:
        return [(host, value[1]) for host in self.hosts]


@pytest.mark.parametrize(
    ("config", "own", "cause"),
    [
        (gpus(1), Others("a", "a"), "engine.zero_stage=2 with engine.lean_zero2, or 3 .*, given 1"),
        (gpus(3, lean_zero3=Toggle.off), Others("a", "a"), "or 3 with engine.lean_zero3, given 3 without"),
        (gpus(3, precision=Precision.fp32), Others("a", "a"), "engine.precision=bf16 or fp16, given fp32"),
        (gpus(3), Others("a", "b"), "all GPUs on one host, given 2"),
    ],
)
def test_where_it_is_possible(
    config: RunConfig, own: Any, cause: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` says once why not, at stages where one could expect it; `on` refuses; `off` asks nobody."""
    monkeypatch.setattr(torch.version, "hip", None)
    lean, precision = should_be_lean(config.engine), config.engine.precision
    with caplog.at_level("INFO"):
        assert find_peers(config.engine, precision, own, lean) is None
    assert len(caplog.records) == lean
    assert not lean or re.search(f"engine.copy_engines: off, it needs .*{cause}", caplog.text)
    config.engine.copy_engines = Toggle.on
    with pytest.raises(UserError, match=rf"engine\.copy_engines=on: needs .*{cause}.* or use .*auto or off"):
        find_peers(config.engine, precision, own, lean)
    config.engine.copy_engines = Toggle.off
    own.hosts = ()
    assert find_peers(config.engine, precision, own, lean) is None
    assert len(caplog.records) == lean


def test_gpus_that_cannot_read_each_other(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch says when the memory is to be mapped."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("no peer access\nat some line")

    monkeypatch.setattr(peers, "SymmetricPeers", refuse)
    config, own = gpus(), cast("Any", Others("a", "a"))
    with caplog.at_level("INFO"):
        assert find_peers(config.engine, Precision.bf16, own, True) is None
    assert "off, it needs GPUs that read each other's memory; PyTorch says: no peer access" in caplog.text
    config.engine.copy_engines = Toggle.on
    with pytest.raises(UserError, match="needs GPUs that read each other's memory"):
        find_peers(config.engine, Precision.bf16, own, True)


def test_shared_memory_counts_while_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the peak of a run, which PyTorch's allocator doesn't know it of."""

    class Owner:
        pass

    owner, device = Owner(), torch.device("cpu")
    peers._count(owner, torch.empty(1000, dtype=torch.bfloat16))
    peers._count(owner, torch.empty(10, dtype=torch.float32))
    assert peers.shared_bytes(device) == 2040
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 10**9)
    monkeypatch.setattr(metrics, "shared_bytes", lambda _: peers.shared_bytes(device))
    assert metrics.peak_memory_gb(torch.device("cuda", 0)) == pytest.approx(1.00000204)
    del owner
    gc.collect()
    assert peers.shared_bytes(device) == 0


def test_a_barrier_that_gave_up_is_explained_beside_the_error(tmp_path: Path) -> None:
    """CUDA's words stay first; where no GPU waits for another, nothing is added."""
    said = "CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later"

    def told(text: str, world_size: int = 2, copy_engines: Toggle = Toggle.auto) -> str:
        error = RuntimeError(text)
        explain(error, EngineConfig(copy_engines=copy_engines, timeout_minutes=5), world_size)
        screen = io.StringIO()
        assert report_error(error, Console(file=screen, width=400), tmp_path / "run.log") == 1
        return screen.getvalue()

    whole = told(said)
    assert whole.startswith("error: RuntimeError: CUDA error: unspecified launch failure")
    assert "another rank has died or hangs" in whole
    assert "engine.timeout_minutes=5" in whole
    for other in (told(said, world_size=1), told(said, copy_engines=Toggle.off), told("CUDA error: out of luck")):
        assert "another rank" not in other
