"""Shared by the tests of the training engine: a tiny GPT, batches, and one process group a test process."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

from configs.schema import (
    DataConfig,
    Device,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    RunConfig,
    Toggle,
    TrainConfig,
)
from model import GPT, build_model
from training import distributed
from training.backend import import_deepspeed
from training.batch import data_ranks, resolve_batch
from training.distributed import Processes
from training.engine import Engine, build_engine
from training.step import StepResult

SEQUENCE, VOCAB = 16, 61
Build = Callable[[RunConfig], Engine]


@dataclass
class Micro:
    """A micro-batch, as the loader makes it."""

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int | None = None


@dataclass
class Global:
    """A global batch, as the loader makes it."""

    micro_batches: list[Micro]
    valid_tokens: int
    next_sample: int = 0
    wait_s: float = field(default=0.0)


def run_config(stage: int = 1, *, accumulation: int = 2, micro: int = 2, **engine: object) -> RunConfig:
    """A run of a GPT with two layers of width 64."""
    model = ModelConfig(
        num_layers=2, num_heads=2, width=64, sequence_length=SEQUENCE, vocab_size=VOCAB, vocab_multiple=64
    )
    model.fused = Toggle.off
    return RunConfig(
        model=model,
        data=DataConfig(),
        # eps above the gradients that are zero but for rounding (of the keys' biases), else Adam makes them whole steps
        optim=OptimConfig(lr=1e-2, warmup_steps=0, grad_clip=1.0, weight_decay=0.1, eps=1e-4),
        train=TrainConfig(micro_batch_size=micro, accumulation_steps=accumulation),
        engine=EngineConfig(zero_stage=stage, precision=Precision.fp32, **engine),  # type: ignore[arg-type]
    )


def make_model(config: RunConfig) -> GPT:
    """The config's model with weights that depend on its seed alone."""
    torch.manual_seed(config.seed)
    return build_model(config.model)


def make_engine(config: RunConfig, processes: Processes) -> Engine:
    """An engine on a fresh model."""
    plan = resolve_batch(config.train, data_ranks(config.engine, processes.world_size))
    return build_engine(make_model(config), config, plan, processes)


def train(engine: Engine, begin: int, end: int) -> list[StepResult]:
    """Steps `begin` to `end` on their batches; results are read at the end, as late as can be."""
    config, own = engine.config, engine.processes
    share = config.engine.sequence_parallel_size
    batches = (make_batch(step, config, own.rank // share, own.world_size // share) for step in range(begin, end))
    steps = [engine.train_step(batch, config.optim.lr) for batch in batches]  # type: ignore[arg-type]
    return [step.result() for step in steps]


def make_samples(step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` samples of step `step`: tokens and targets (count, S), a different number of targets left out in each."""
    generator = torch.Generator().manual_seed(1000 + step)
    stream = torch.randint(0, VOCAB, (count, SEQUENCE + 1), generator=generator)
    targets = stream[:, 1:].clone()
    for row in range(count):
        targets[row, : row % 5] = -100
    return stream[:, :-1].contiguous(), targets


def make_batch(step: int, config: RunConfig, rank: int = 0, world_size: int = 1) -> Global:
    """This rank's part of a global batch that is the same for any number of ranks."""
    plan = resolve_batch(config.train, world_size)
    tokens, targets = make_samples(step, plan.global_batch_size)
    size, share = plan.micro_batch_size, plan.global_batch_size // world_size
    begins = range(rank * share, (rank + 1) * share, size)
    micros = [Micro(tokens[i : i + size], targets[i : i + size]) for i in begins]
    return Global(micros, int((targets >= 0).sum()))


class Reference:
    """Training in plain PyTorch: AdamW on fp32 weights, the whole global batch in one forward pass."""

    def __init__(self, config: RunConfig) -> None:
        self.config = copy.deepcopy(config)
        self.model = make_model(config)
        optim = config.optim
        decays = {"decay": optim.weight_decay, "no_decay": 0.0}
        groups = [{"params": list(ps), "weight_decay": decays[name]} for name, ps in self.model.decay_groups()]
        betas = (optim.beta1, optim.beta2)
        self.adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps)

    def step(self, step: int, lr: float, pieces: int = 1) -> tuple[float, float]:
        """One update, the batch in so many pieces; its mean loss and gradient norm."""
        tokens, targets = make_samples(step, resolve_batch(self.config.train, 1).global_batch_size)
        self.adamw.zero_grad()
        total = 0.0
        for part, goal in zip(tokens.chunk(pieces), targets.chunk(pieces), strict=True):
            loss = self.model(part, goal).sum() / (targets >= 0).sum()
            loss.backward()
            total += loss.item()
        limit = self.config.optim.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        return total, norm.item()


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of masters and moments by name (`master.…`, `exp_avg.…`, `exp_avg_sq.…`), of one process."""
    found: dict[str, torch.Tensor] = {}
    for fragment in engine.partition.fragments(owned=False):
        assert fragment.start == 0
        found[f"master.{fragment.name}"] = fragment.master.clone().view(fragment.shape)
        found[f"exp_avg.{fragment.name}"] = fragment.exp_avg.clone().view(fragment.shape)
        found[f"exp_avg_sq.{fragment.name}"] = fragment.exp_avg_sq.clone().view(fragment.shape)
    return found


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of the masters by parameter name, of one process."""
    return {name.removeprefix("master."): t for name, t in state_of(engine).items() if name.startswith("master.")}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bitwise equality of two sets of tensors."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest difference of one element."""
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """This process alone."""
    alone = distributed.init(Device.cpu)
    import_deepspeed(alone.device)
    gc.freeze()  # DeepSpeed collects garbage a dozen times for each bf16 engine
    yield alone
    gc.unfreeze()
    alone.close()


@pytest.fixture
def build(processes: Processes) -> Iterator[Build]:
    """Makes engines that are closed after the test."""
    made: list[Engine] = []

    def make(config: RunConfig) -> Engine:
        made.append(make_engine(config, processes))
        return made[-1]

    yield make
    for one in made:
        one.close()
