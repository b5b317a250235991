"""Room for communication that runs beside computation (`engine.comm_sms`).

A matrix product on Hopper starts one program a multiprocessor, and each goes through its share of the tiles. Where
NCCL's kernels hold some of them, as many programs wait until the others have ended: the product takes up to twice as
long, and NCCL waits for products in its turn. So products are told to leave a number of multiprocessors free, and NCCL
to take no more than these.

Both are settings of the process, and neither changes a result but for the order in which a product adds.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch

from configs.errors import UserError
from configs.schema import EngineConfig

NCCL_LIMIT = "NCCL_MAX_CTAS"
"""NCCL's own variable. What the user has set in it stays."""


def comm_sms(config: EngineConfig, device: torch.device, world_size: int) -> int:
    """Multiprocessors that communication gets to itself; 0: none. Raises `UserError` for more than there are."""
    wanted = config.comm_sms
    if wanted == 0 or device.type != "cuda" or world_size == 1:
        return 0
    if wanted is None:
        return 0
    available = torch.cuda.get_device_properties(device).multi_processor_count
    if wanted >= available:
        raise UserError(
            f"engine.comm_sms={wanted}: the GPU has {available} multiprocessors, and computation needs some; give "
            "fewer, 0 for none, or null"
        )
    return wanted


def leave_room(sms: int) -> Callable[[], None]:
    """Have products of this process leave `sms` multiprocessors free and NCCL take no more; returns what undoes it.

    To be called before the first collective. Products go through cuBLASLt from then on, which knows the limit in every
    version of PyTorch that has one.
    """
    before = (torch._C._get_sm_carveout_experimental(), torch.backends.cuda.preferred_blas_library())
    limited = NCCL_LIMIT not in os.environ
    if limited:
        os.environ[NCCL_LIMIT] = str(sms)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the limit is experimental
        torch._C._set_sm_carveout_experimental(sms)
    torch.backends.cuda.preferred_blas_library("cublaslt")

    def undo() -> None:
        torch._C._set_sm_carveout_experimental(before[0])
        torch.backends.cuda.preferred_blas_library(before[1])
        if limited:
            os.environ.pop(NCCL_LIMIT, None)

    return undo
