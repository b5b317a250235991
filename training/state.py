"""What must survive a crash, besides weights, optimizer moments and random states."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainState:
    """Progress of a run. Plain JSON values only: the checkpoint writes it into its manifest as it stands."""

    step: int = 0
    """Finished steps, skipped ones included: the schedule's argument, and the number in the checkpoint's name."""
    consumed_samples: int = 0
    """Position in the data: global samples that finished steps have read, over all epochs."""
    tokens_seen: int = 0
    """Counted tokens of those samples."""
    skipped_steps: int = 0
    """Steps whose update was left out because the loss or a gradient wasn't finite."""
    last_loss: float | None = None
    """Training loss of the last finished step, nats per token. None: no step yet."""
    best_validation_loss: float | None = None
    """Lowest validation loss so far, nats per token. None: no evaluation yet."""
    wandb_id: str | None = None
    """wandb's run, which a resumed run goes on in. None: wandb is off."""
    corpus_hash: str | None = None
    """Hash of the prepared tokens that `consumed_samples` is a position in. None: no step yet."""
