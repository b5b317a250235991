"""Multiprocessors that are left to communication."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from configs.errors import UserError
from configs.schema import EngineConfig
from training.overlap import NCCL_LIMIT, comm_sms, leave_room

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What stands in for PyTorch's choice of library, which it has with CUDA only; the choice comes last."""
    chosen = ["cublas"]

    def preferred(backend: str | None = None) -> str:
        chosen.append(backend or chosen[-1])
        return chosen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    return chosen


def limits(library: list[str]) -> tuple[int | None, str, str | None]:
    """PyTorch's limit of products, the library they go through, NCCL's limit."""
    return torch._C._get_sm_carveout_experimental(), library[-1], os.environ.get(NCCL_LIMIT)


def test_products_and_nccl_are_limited_until_undone(monkeypatch: pytest.MonkeyPatch, library: list[str]) -> None:
    monkeypatch.delenv(NCCL_LIMIT, raising=False)
    undo = leave_room(16)
    assert limits(library) == (16, "cublaslt", "16")
    undo()
    assert limits(library) == (None, "cublas", None)


def test_the_users_own_limit_of_nccl_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NCCL_LIMIT, "4")
    undo = leave_room(16)
    assert os.environ[NCCL_LIMIT] == "4"
    undo()
    assert os.environ[NCCL_LIMIT] == "4"


def test_more_than_the_gpu_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132, major=9)
    )
    assert comm_sms(EngineConfig(comm_sms=16), GPU, 2) == 16
    assert comm_sms(EngineConfig(comm_sms=0), GPU, 2) == 0
    assert comm_sms(EngineConfig(comm_sms=16), GPU, 1) == 0
    assert comm_sms(EngineConfig(comm_sms=16), CPU, 2) == 0
    with pytest.raises(UserError, match=r"engine\.comm_sms=132.*132 multiprocessors"):
        comm_sms(EngineConfig(comm_sms=132), GPU, 2)
