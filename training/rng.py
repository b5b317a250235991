"""Random states: seeding, and their capture and restoration bit for bit, without pickles."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class RandomState:
    """All generators a run draws from, on one rank."""

    torch_cpu: Tensor
    """uint8 state of PyTorch's CPU generator."""
    torch_cuda: Tensor | None
    """uint8 state of the current CUDA device's generator; None without one."""
    host: dict[str, Any]
    """States of Python's and NumPy's generators as JSON values."""


def seed_all(seed: int) -> None:
    """Seed all generators alike on every rank: for the model's initial weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Give each rank a stream of its own from here on: for dropout. `step` sets a later start apart from the first."""
    sequence = np.random.SeedSequence([seed, rank, step])
    seed_all(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))


def capture() -> RandomState:
    """The state of all generators now."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    host = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],  # type: ignore[union-attr]
    }
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return RandomState(torch.get_rng_state(), cuda, host)


def restore(state: RandomState) -> None:
    """Continue all generators from `state`. A CUDA state is left out on a machine without CUDA."""
    version, numbers, gauss = state.host["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state.host["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state.torch_cpu.cpu())
    if state.torch_cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.torch_cuda.cpu())


def make_deterministic() -> None:
    """Have PyTorch use only algorithms that repeat bit for bit. Call before CUDA's first use: cuBLAS reads it then."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
