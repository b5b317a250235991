"""Learning-rate schedules against values worked out by hand."""

import math

import pytest

from configs.schema import OptimConfig, Schedule
from training.schedule import learning_rate


def rates(total: int, **keys: object) -> list[float]:
    optim = OptimConfig(lr=1.0, **{"min_lr_ratio": 0.1, "warmup_steps": 0, **keys})  # type: ignore[arg-type]
    return [learning_rate(step, optim, total) for step in range(total)]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_warmup_rises_linearly_and_reaches_the_peak(schedule: Schedule) -> None:
    assert rates(20, schedule=schedule, warmup_steps=3)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("schedule", [Schedule.cosine, Schedule.linear, Schedule.wsd])
def test_last_update_gets_the_final_rate(schedule: Schedule) -> None:
    values = rates(50, schedule=schedule, warmup_steps=5)
    assert values[-1] == pytest.approx(0.1)
    assert values[5:] == sorted(values[5:], reverse=True)
    assert max(values) == values[5] == 1.0


def test_cosine() -> None:
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert rates(5, schedule=Schedule.cosine) == pytest.approx([1.0, quarter, 0.55, 1.1 - quarter, 0.1])


def test_linear_with_a_decay_shorter_than_the_run() -> None:
    assert rates(6, schedule=Schedule.linear, decay_steps=4) == pytest.approx([1.0, 0.7, 0.4, 0.1, 0.1, 0.1])


def test_wsd_decays_at_the_end() -> None:
    assert rates(20, schedule=Schedule.wsd, warmup_steps=1)[1:16] == [1.0] * 15
    assert rates(20, schedule=Schedule.wsd)[-4:] == pytest.approx([1.0, 0.7, 0.4, 0.1])
    assert rates(6, schedule=Schedule.wsd, decay_steps=2)[-3:] == pytest.approx([1.0, 1.0, 0.1])


def test_wsd_ends_at_the_final_rate_where_the_run_is_shorter_than_its_decay() -> None:
    assert rates(6, schedule=Schedule.wsd, warmup_steps=2, decay_steps=50)[2:] == pytest.approx([1.0, 0.7, 0.4, 0.1])


def test_constant_stays_at_the_peak() -> None:
    assert rates(9, schedule=Schedule.constant, warmup_steps=2)[2:] == [1.0] * 7


def test_warmup_longer_than_the_run() -> None:
    values = rates(4, schedule=Schedule.cosine, warmup_steps=9)
    assert values == pytest.approx([0.1, 0.2, 0.3, 0.4])
