"""Schedules of temperature and loss weights against their formulas."""

import math

import pytest

from kd_accel.config.schema import DistillConfig, OptimConfig, Schedule
from kd_accel.training.schedules import TrainingSchedule, schedule_value


def values(schedule, *, epochs=10, steps_per_epoch=5):
    """Return the value at the beginning of each epoch."""
    totals = {"total_epochs": epochs, "total_steps": epochs * steps_per_epoch}
    return [schedule_value(schedule, epoch=epoch, step=epoch * steps_per_epoch, **totals) for epoch in range(epochs)]


@pytest.mark.parametrize("schedule", [0.7, Schedule(start=0.7, kind="constant")])
def test_constant(schedule):
    assert values(schedule) == [0.7] * 10


def test_exponential_decays_to_its_floor():
    decayed = values(Schedule(start=0.5, floor=0.3, decay=0.95), epochs=12)
    assert decayed == pytest.approx([max(0.3, 0.5 * 0.95**epoch) for epoch in range(12)])
    assert decayed[0] == 0.5 and decayed[-1] == 0.3


def test_linear_ends_in_the_last_epoch_or_after_its_length():
    assert values(Schedule(start=1, end=0, kind="linear")) == pytest.approx([1 - epoch / 9 for epoch in range(10)])
    assert values(Schedule(start=1, end=0, kind="linear", length=5)) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0])
    assert values(Schedule(start=1, end=0, kind="linear"), epochs=1) == [1]


def test_cosine():
    quarter = math.cos(math.pi / 4)
    assert values(Schedule(start=4, end=2, kind="cosine"), epochs=5) == pytest.approx([4, 3 + quarter, 3, 3 - quarter, 2])


def test_the_unit_may_be_a_step():
    by_step = values(Schedule(start=1, floor=0, decay=0.9, unit="step"))
    assert by_step == pytest.approx([0.9 ** (5 * epoch) for epoch in range(10)])


def test_a_cut_epoch_counts_as_an_epoch():
    """Twelve steps of five an epoch are three epochs; the linear schedule ends in the third."""
    distill = DistillConfig(temperature=Schedule(start=4, end=2, kind="linear"), alpha=0.5)
    schedule = TrainingSchedule(OptimConfig(), steps_per_epoch=5, total_steps=12, distill=distill)
    weights = [schedule.weights_at(step // 5, step) for step in range(12)]
    assert [each.temperature for each in weights] == [4.0] * 5 + [3.0] * 5 + [2.0] * 2
    assert {each.alpha for each in weights} == {0.5}
    assert schedule.logged(weights[5]) == {"temperature": 3.0, "alpha": 0.5}


def falling(**settings):
    return Schedule(**{"start": 1, "kind": "linear", "end": 0, **settings})


@pytest.mark.parametrize(
    ("teachers", "step"),
    [
        ({"a": falling(), "b": falling(start=0, end=1)}, None),
        ({"a": falling(unit="step", length=8), "b": falling(start=0, end=1)}, 8),
        ({"a": falling(unit="step", length=12), "b": falling(start=0, end=1)}, None),
        ({"a": Schedule(start=1, floor=0, decay=0.05, unit="step"), "b": Schedule(start=1, floor=0, decay=0.05)}, None),
        ({name: Schedule(start=1, floor=0, decay=0.05, unit="step") for name in "ab"}, 24),
        ({"a": 1.0, "b": falling()}, None),
        ({}, None),
    ],
)
def test_steps_at_which_all_teachers_weigh_nothing(teachers, step):
    """Ten steps an epoch for three epochs: 0.05 ** 24 is below 1e-30, and three epochs are 0.05 ** 2."""
    schedule = TrainingSchedule(OptimConfig(), 10, 30, distill=DistillConfig(), teachers=teachers)
    assert schedule.step_without_teacher() == step
    features_alone = DistillConfig(logits=None, label_weight=1)
    assert TrainingSchedule(OptimConfig(), 10, 30, distill=features_alone, teachers=teachers).step_without_teacher() is None
