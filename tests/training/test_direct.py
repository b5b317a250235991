"""ZeRO-2 whose products write gradients where other ranks read them, against one that copies them, and one rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Activation, Device, Fp8, Norm, Position, Precision, Recompute, RunConfig, Toggle
from tests.peers import FilePeers
from tests.ranks import on_ranks
from tests.training.conftest import make_batch, make_engine, run_config, train
from tests.training.test_reduction import joined
from tests.training.test_stage3_compile import measured
from training import checkpoint, distributed, engine
from training.backend import may_have_peers, should_fuse_weight_gradients
from training.direct import DirectSums
from training.distributed import Processes
from training.peers import REDUCTIONS
from training.reduction import Bucket, PeerSums, in_rows
from training.state import TrainState

STEPS, SAMPLES, MICRO_BATCHES = 3, 12, 2
LLAMA = {
    "activation": Activation.swiglu,
    "norm": Norm.rmsnorm,
    "bias": False,
    "position": Position.rope,
    "tied_embeddings": False,
    "qk_norm": True,
    "num_kv_heads": 1,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt": ({}, {}),
    "llama": (LLAMA, {"recompute": Recompute.block}),
    "dropout": ({"dropout": 0.1}, {}),
    "fp8": ({}, {"fp8": Fp8.rowwise}),
    "compiled": ({}, {"compile": Toggle.on}),
    "shared": ({}, {"sequence_parallel_size": 2}),
}
"""`model.*` and `engine.*`."""
OF_RANKS = {1: ("gpt", "llama", "fp8"), 2: tuple(CASES), 3: ("gpt", "llama")}
"""What is tried on how many; of one rank the steps of some are those of "gpt"."""


def config_of(name: str, world_size: int, fuse: Toggle = Toggle.on) -> RunConfig:
    """Four blocks, so that two buckets are filled twice in a backward pass."""
    model, keys = CASES[name]
    share = keys.get("sequence_parallel_size", 1) if world_size > 1 else 1
    keys = keys | {"sequence_parallel_size": share, "fuse_weight_gradients": fuse, "bucket_size": 5000}
    takers = world_size // share
    config = run_config(2, accumulation=MICRO_BATCHES, micro=SAMPLES // MICRO_BATCHES // takers, **keys)
    for key, value in ({"num_layers": 4} | model).items():
        setattr(config.model, key, value)
    config.engine.precision = Precision.bf16
    config.optim.grad_clip = 0.0  # the norm's last digits would be in everything
    return config


def parts_of(one: engine.Engine) -> list[tuple[str, int, Any]]:
    return [(f.name, f.start, f.master.clone().numpy()) for f in one.partition.fragments()]


def course(own: Processes, name: str, fuse: Toggle, folder: Path) -> dict[str, Any]:
    """Losses and norms of some steps, with a loss that isn't finite and an evaluation between them; this rank's masters
    after the first; the last step once more by an engine that goes on from a checkpoint."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = config_of(name, own.world_size, fuse)
    one = make_engine(config, own)
    if own.world_size > 1:
        assert type(one.partition.reduction) is (PeerSums if fuse is Toggle.off else DirectSums)  # type: ignore[attr-defined]
    results = train(one, 0, 1)
    first = parts_of(one)
    plain = one.forward
    one.forward = lambda micro: plain(micro) * torch.nan  # type: ignore[method-assign]
    assert not train(one, 1, 2)[0].updated
    one.forward = plain  # type: ignore[method-assign]
    share = config.engine.sequence_parallel_size
    batches: Any = make_batch(7, config, own.rank // share, own.world_size // share).micro_batches
    evaluated = one.evaluate(batches)
    results += train(one, 1, STEPS - 1)
    frames = torch._dynamo.utils.counters["frames"]["total"]
    checkpoint.save(one, TrainState(step=STEPS - 1), folder, tokenizer_hash="")
    torch.manual_seed(1)
    results += train(one, STEPS - 1, STEPS)
    compiled_again = torch._dynamo.utils.counters["frames"]["total"] - frames
    one.close()
    other = make_engine(config, own)
    assert checkpoint.load(other, folder) is not None
    torch.manual_seed(1)
    again = train(other, STEPS - 1, STEPS)
    other.close()
    return {
        "steps": measured(results),
        "again": measured(again),
        "first": first,
        "evaluated": evaluated,
        "frames": frames,
        "compiled again": compiled_again,
    }


def courses(folder: Path) -> dict[tuple[str, Toggle], Any]:
    """On one of the ranks: each case copied and written in place; on one rank the second."""
    own = distributed.init(Device.cpu, timeout_minutes=5)
    engine.find_peers = lambda *_: FilePeers(own) if own.world_size > 1 else None  # type: ignore[assignment]
    ways = [Toggle.off, Toggle.on] if own.world_size > 1 else [Toggle.on]
    found = {
        (name, way): course(own, name, way, folder / f"{name} {way}")
        for name in OF_RANKS[own.world_size]
        for way in ways
    }
    own.barrier()
    own.close()
    return found


Found = list[dict[tuple[str, Toggle], Any]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Toggle], Any]:
    found: dict[tuple[str, Toggle], Any] = on_ranks(1, courses, tmp_path_factory.mktemp("checkpoints"))[0]
    return found


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """By rank."""
    return on_ranks(request.param, courses, tmp_path_factory.mktemp("checkpoints"))


def kind_of(name: str) -> str:
    """Of a parameter."""
    if "norm" in name or not name.startswith("blocks."):
        return "other"
    return "bias" if name.endswith("bias") else "matrix"


def test_first_step_is_that_of_copied_gradients(found: Found, alone: dict[tuple[str, Toggle], Any]) -> None:
    """Of matrices to the bit. Biases' gradients are no longer rounded at each micro-batch: of two ranks, where nothing
    else rounds otherwise, they are those of one, and far from the copied ones."""
    for name in OF_RANKS[len(found)]:
        copied, direct = (joined([rank[name, way]["first"] for rank in found]) for way in (Toggle.off, Toggle.on))
        assert copied.keys() == direct.keys()
        for key, expected in copied.items():
            if kind_of(key) == "matrix":
                assert torch.equal(direct[key], expected), (name, key)
            elif kind_of(key) == "other":
                torch.testing.assert_close(direct[key], expected, rtol=0, atol=1e-6, msg=f"{name}, {key}")
        if len(found) == 2 and name in OF_RANKS[1]:
            one = joined([alone[name, Toggle.on]["first"]])
            biases = [key for key in direct if kind_of(key) == "bias"]
            for key in biases:
                torch.testing.assert_close(direct[key], one[key], rtol=0, atol=1e-6, msg=f"{name}, {key}")
            assert not biases or max((copied[key] - one[key]).abs().max() for key in biases) > 1e-4


def test_trains_as_copied_gradients_and_as_one_rank(found: Found, alone: dict[tuple[str, Toggle], Any]) -> None:
    """One rank's second step is the last that three are held against: what the rounding of a third becomes in Adam's
    first updates is in the third's norm, however gradients travel."""
    for name in OF_RANKS[len(found)]:
        expected = [found[0][name, Toggle.off]["steps"]]
        if name != "dropout":  # of which ranks draw their own
            one = alone[name if name in OF_RANKS[1] else "gpt", Toggle.on]["steps"]
            expected.append(one if len(found) == 2 else one[:2])
        for rank in found:
            ours = rank[name, Toggle.on]
            for theirs in expected:
                for (loss, norm), (their_loss, their_norm) in zip(ours["steps"], theirs, strict=False):
                    assert loss == pytest.approx(their_loss, rel=3e-3), name
                    assert norm == pytest.approx(their_norm, rel=3e-2), name
            assert ours["evaluated"] == pytest.approx(rank[name, Toggle.off]["evaluated"], rel=3e-3), name


def test_resume_is_exact_and_compiles_nothing_new(found: Found) -> None:
    for rank in found:
        for name in OF_RANKS[len(found)]:
            ours = rank[name, Toggle.on]
            assert ours["again"] == ours["steps"][-1:], name
            assert ours["compiled again"] == 0, name
            assert ours["frames"] == (2 if name == "compiled" else 0), name  # to train and to evaluate, of four blocks


MATRICES, VECTORS, TABLE, BLOCKS = ((7, 5), (6, 2)), ((4,), (1,)), (61, 3), 5


class Bring(torch.autograd.Function):
    """x to x; backward does what a layer does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, bring: Callable[[], Tensor | None]) -> Tensor:
        ctx.bring = bring
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        return d_x, ctx.bring(), None


class Late(DirectSums):
    """What is sent is sent as late as can be: when it is waited for. What was read from is spoilt at once."""

    def __init__(self, *arguments: Any) -> None:
        self.queue: deque[tuple[Bucket, Callable[[], None]]] = deque()
        super().__init__(*arguments)

    def launch(self, bucket: Bucket, send: Callable[[], None]) -> None:
        self.queue.append((bucket, send))

    def send_next(self) -> None:
        bucket, send = self.queue.popleft()
        send()
        if any(bucket is one for one in self.block_buckets):  # but for the zeros after gradients
            for block in range(BLOCKS):
                for parameter in self.matrices[block] if self.bucket_of(block) is bucket else ():
                    self.places[parameter].fill_(torch.nan)
        else:
            bucket.memory.fill_(torch.nan)

    def await_room(self, bucket: Bucket) -> None:
        while any(waiting is bucket for waiting, _ in self.queue):
            self.send_next()

    def await_all(self) -> None:
        while self.queue:
            self.send_next()


def integers(shape: tuple[int, ...], rank: int, micro: int, index: int) -> Tensor:
    """Their sums are exact, the vectors' only in fp32."""
    generator = torch.Generator().manual_seed(1000 * rank + 100 * micro + index)
    scale = 1 if len(shape) > 1 else 1001
    return torch.randint(-64, 64, shape, generator=generator).float() * scale


def shapes() -> list[tuple[int, ...]]:
    return [*(MATRICES + VECTORS) * BLOCKS, TABLE]


def sums_of_steps(kind: type[DirectSums]) -> list[list[Any]]:
    """What one of the ranks has of the sums after each step of three micro-batches. A layer in five gives its gradient
    to autograd; the last step begins after one that was given up."""
    own = distributed.init(Device.cpu, timeout_minutes=0.5)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes()]
    per_block = len(MATRICES) + len(VECTORS)
    blocks = [parameters[per_block * block : per_block * block + len(MATRICES)] for block in range(BLOCKS)]
    shards = {p: torch.zeros(-(-p.numel() // own.world_size)) for p in parameters}
    last = [False]
    one = kind(shards, None, 24, None, FilePeers(own), blocks, lambda: last[0])
    found = []

    def bring(index: int, micro: int) -> Tensor | None:
        given, place = integers(shapes()[index], own.rank, micro, index), one.places.get(parameters[index])
        if place is None or index % 5 == 4:
            return given.bfloat16()
        place.copy_(given) if place.dim() > 1 else place.add_(given)
        return None

    def backward(micro: int) -> None:
        x = torch.zeros((), requires_grad=True)
        for index, parameter in enumerate(parameters):
            x = Bring.apply(x, parameter, lambda index=index: bring(index, micro))  # type: ignore[no-untyped-call]
        x.backward()
        one.finish()

    for step in range(3):
        if step == 2:
            backward(0)
            one.forget()
            for shard in shards.values():
                shard.zero_()
        for micro in range(3):
            last[0] = micro == 2
            backward(3 * step + micro)
        assert all(p.grad is None for p in parameters)
        found.append([shard.clone().numpy() for shard in shards.values()])
        last[0] = False
        for shard in shards.values():  # as a step does
            shard.zero_()
    assert set(one.peers.barriers) == {REDUCTIONS}  # type: ignore[attr-defined]
    own.close()
    return found


@pytest.mark.parametrize("kind", [DirectSums, Late])
@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_over_ranks_and_micro_batches(ranks: int, kind: type[DirectSums]) -> None:
    """Of shapes that ranks divide or don't; however late the others read."""
    found = on_ranks(ranks, sums_of_steps, kind)
    for step in range(3):
        for index, shape in enumerate(shapes()):
            micros = range(3 * step, 3 * step + 3)
            terms = [integers(shape, rank, micro, index) for rank in range(ranks) for micro in micros]
            if index % 5 == 4 and len(shape) == 1:  # autograd's are rounded
                terms = [term.bfloat16().float() for term in terms]
            expected = in_rows(torch.stack(terms).sum(0) / ranks, ranks)
            for rank in range(ranks):
                got = torch.from_numpy(found[rank][step][index])
                torch.testing.assert_close(got, expected[rank], rtol=1e-6, atol=1e-5)


def norms_of_a_step() -> dict[Toggle, Any]:
    """By `model.fused_norms`: how many biases norms sum, and this rank's part of the gradients of a batch."""
    own = distributed.init(Device.cpu, timeout_minutes=5)
    engine.find_peers = lambda *_: FilePeers(own)  # type: ignore[assignment]
    found = {}
    for norms in (Toggle.off, Toggle.on):
        config = run_config(2, accumulation=2, micro=1, fuse_weight_gradients=Toggle.on)
        config.engine.precision, config.model.fused_norms = Precision.bf16, norms
        one = make_engine(config, own)
        layers = [layer for block in one.module.blocks for layer in (block.attention.proj, block.mlp.down)]
        apart = sum(layer.bias_sum is None for layer in layers)  # type: ignore[attr-defined]
        one.accumulate(make_batch(0, config, own.rank, own.world_size))  # type: ignore[arg-type]
        reduction: Any = one.partition.reduction  # type: ignore[attr-defined]
        names = {parameter: name for name, parameter in one.module.named_parameters()}
        found[norms] = apart, {names[p]: shard.clone().numpy() for p, shard in reduction.shards.items()}
        one.close()
    own.close()
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels in Triton's interpreter; on GPUs see test_gpus.py")
def test_norms_sum_biases() -> None:
    for rank in on_ranks(2, norms_of_a_step):
        (apart, expected), (inside, got) = rank[Toggle.off], rank[Toggle.on]
        assert (apart, inside) == (0, 4)
        for name, total in got.items():  # Triton's interpreter cuts bf16 off
            assert abs(total).max() > 0, name
            assert abs(total - expected[name]).max() <= 0.1 * abs(expected[name]).max(), name


def test_where_it_is_possible() -> None:
    """With peers at stage 2; said before a run where it depends on the GPUs only."""
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    config = run_config(2, fuse_weight_gradients=Toggle.on).engine
    assert may_have_peers(config, Precision.bf16, cuda, 2)
    assert not may_have_peers(config, Precision.bf16, cuda, 1)
    assert not may_have_peers(config, Precision.bf16, cpu, 2)
    assert not may_have_peers(config, Precision.fp32, cuda, 2)
    assert not may_have_peers(run_config(2, copy_engines=Toggle.off).engine, Precision.bf16, cuda, 2)
    assert should_fuse_weight_gradients(config, Precision.bf16, 2, with_peers=True)
    config.fuse_weight_gradients = Toggle.auto
    assert not should_fuse_weight_gradients(config, Precision.bf16, 2, with_peers=True)
    for stage, precision, peers in ((2, Precision.bf16, False), (2, Precision.fp16, True), (3, Precision.bf16, True)):
        config.zero_stage, config.fuse_weight_gradients = stage, Toggle.on
        with pytest.raises(UserError, match=r"fuse_weight_gradients=on: needs .*on several 2 .*copy_engines"):
            should_fuse_weight_gradients(config, precision, 2, peers)
        config.fuse_weight_gradients = Toggle.auto
        assert not should_fuse_weight_gradients(config, precision, 2, peers)


def test_blocks_that_differ() -> None:
    one = object.__new__(DirectSums)
    one.matrices = [[nn.Parameter(torch.zeros(2, 2))], [nn.Parameter(torch.zeros(2, 3))]]
    with pytest.raises(ValueError, match="different shapes"):
        one.plan()
