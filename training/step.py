"""What a step measured, and steps whose numbers are still on their way from the device.

A step may be handed to the device whole: the update reads from the device's memory what to multiply gradients by, and
whether there is an update at all. The host learns loss and norm when it has handed over the next step's forward and
backward passes, before that step's update. So the device always has work queued, and yet the host knows how all earlier
steps have ended whenever it makes an update: their number, which corrects Adam's bias, is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NORM_SLACK = 1e-6
"""Added to a norm that a limit is divided by."""


@dataclass(frozen=True)
class StepResult:
    """What one step measured; the same on all ranks."""

    loss: float
    """Mean cross-entropy over the counted tokens of the global batch, nats per token."""
    z_loss: float
    """Mean of the weighted z-loss over the same tokens."""
    grad_norm: float
    """2-norm of the gradient of loss + z_loss before clipping."""
    finite: bool
    """False: the loss or a gradient is NaN or infinite on some rank, and the weights are what they were. An fp16
    overflow that a smaller loss scale cures isn't counted as such."""
    updated: bool
    """Whether the weights were updated."""


class HostCopy:
    """A small tensor's values at this point of its device's work, fetched without waiting."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._values.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    @property
    def is_here(self) -> bool:
        """Whether `read` waits for nothing."""
        return self._event is None or self._event.query()

    def read(self) -> list[float]:
        """The values, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values


class Step:
    """A step that the host is done with, though the device may not be."""

    def __init__(self, outcome: StepResult | HostCopy, read: Callable[[list[float]], StepResult] | None = None) -> None:
        """`outcome`: the result, or the numbers on their way of which `read` makes it; it is called once."""
        self._outcome = outcome
        self._read = read

    @property
    def known(self) -> bool:
        """Whether the result has been read; the same on all ranks, since they read at the same places."""
        return isinstance(self._outcome, StepResult)

    @property
    def is_here(self) -> bool:
        """Whether `result` waits for nothing; not agreed over ranks."""
        return isinstance(self._outcome, StepResult) or self._outcome.is_here

    def result(self) -> StepResult:
        """What the step measured, once the device has come to its update."""
        if not isinstance(self._outcome, StepResult):
            assert self._read is not None
            self._outcome = self._read(self._outcome.read())
        return self._outcome


def clip_factor(norm: float, limit: float) -> float:
    """What to multiply gradients of this norm by so that it is at most `limit`; 1 if it is or if `limit` is 0."""
    if limit <= 0 or not math.isfinite(norm):
        return 1.0
    return min(1.0, limit / (norm + NORM_SLACK))


def clip_factor_on_device(report: Tensor, limit: float) -> Tensor:
    """`clip_factor` of a step, fp32 (1,), on the report's device and bit for bit; NaN if the step isn't finite.

    report: fp64 (3,): two losses and the squared norm.
    """
    zero_or_nan = (report - report).sum()
    factor = torch.ones_like(report[2:])
    if limit > 0:  # a quotient of two tensors: with a number PyTorch multiplies by its rounded reciprocal
        factor = (factor * limit / (report[2:].sqrt() + NORM_SLACK)).clamp_(max=1.0)
    return (factor + zero_or_nan).float()
