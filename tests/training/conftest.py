"""Shared by the tests of the training engine: a tiny GPT, batches, and one process group a test process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
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
from training.batch import resolve_batch
from training.distributed import Processes
from training.engine import Engine, build_engine

SEQUENCE, VOCAB = 16, 61


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
        optim=OptimConfig(lr=1e-2, warmup_steps=0, grad_clip=1.0, weight_decay=0.1),
        train=TrainConfig(micro_batch_size=micro, accumulation_steps=accumulation),
        engine=EngineConfig(zero_stage=stage, precision=Precision.fp32, **engine),  # type: ignore[arg-type]
    )


def make_model(config: RunConfig) -> GPT:
    """The config's model with weights that depend on its seed alone."""
    torch.manual_seed(config.seed)
    return build_model(config.model)


def make_engine(config: RunConfig, processes: Processes) -> Engine:
    """An engine on a fresh model."""
    plan = resolve_batch(config.train, processes.world_size)
    return build_engine(make_model(config), config, plan, processes)


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

    def step(self, step: int, lr: float) -> tuple[float, float]:
        """One update; its mean loss and gradient norm."""
        tokens, targets = make_samples(step, resolve_batch(self.config.train, 1).global_batch_size)
        loss = self.model(tokens, targets).sum() / (targets >= 0).sum()
        self.adamw.zero_grad()
        loss.backward()
        limit = self.config.optim.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        return loss.item(), norm.item()


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole fp32 masters by name; only where this rank holds all of them."""
    found: dict[str, torch.Tensor] = {}
    for fragment in engine.partition.fragments(owned=False):
        flat = found.setdefault(fragment.name, torch.full(fragment.shape, torch.nan)).view(-1)
        flat[fragment.start : fragment.start + fragment.master.numel()] = fragment.master
    return found


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """This process alone."""
    alone = distributed.init(Device.cpu)
    yield alone
    alone.close()
