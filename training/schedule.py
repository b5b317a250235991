"""Learning-rate schedules: pure functions of the step.

Step `s` counts finished optimizer steps from 0, so the first update uses `s = 0`. Warm-up rises linearly and reaches
the peak at the update after `warmup_steps` of them. The cosine and linear decays follow at once and end after
`decay_steps` updates at the final rate, which then stays; wsd stays at the peak and decays in the run's last
`decay_steps` updates, or in all after the warm-up where those are fewer. The run's last update gets the final rate in
wsd, and in the other two with `decay_steps` unset.
"""

from __future__ import annotations

import math

from configs.schema import OptimConfig, Schedule


def learning_rate(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Learning rate of the update that follows `step` finished ones, in a run of `total_steps` updates."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    if optim.schedule is Schedule.constant:
        return optim.lr
    length = decay_length(optim, total_steps)
    begin = optim.warmup_steps if optim.schedule is not Schedule.wsd else max(optim.warmup_steps, total_steps - length)
    floor = optim.lr * optim.min_lr_ratio
    progress = min(max(step - begin, 0) / max(length - 1, 1), 1.0)  # 1 at the last update of the decay
    return floor + (optim.lr - floor) * shape(optim.schedule, progress)


def decay_length(optim: OptimConfig, total_steps: int) -> int:
    """Updates of the decay: `decay_steps`, else all after the warm-up, for wsd a fifth of the run."""
    after_warmup = max(total_steps - optim.warmup_steps, 0)
    if optim.schedule is Schedule.wsd:
        wanted = math.ceil(total_steps / 5) if optim.decay_steps is None else optim.decay_steps
        return min(wanted, after_warmup)
    return after_warmup if optim.decay_steps is None else optim.decay_steps


def shape(schedule: Schedule, progress: float) -> float:
    """Share of the way from the final rate up to the peak: 1 at progress 0, 0 at progress 1.

    cosine: Loshchilov and Hutter 2017, equation 5. wsd: linear cool-down (Hägele et al. 2024, section 3).
    """
    if schedule is Schedule.cosine:
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress
