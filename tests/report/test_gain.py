"""The gain of distillation: its value, its standard error, and when none is shown."""

import pytest

from kd_accel.report.gain import gains
from kd_accel.report.groups import Group
from kd_accel.report.rows import Row


def group(name, role, *accuracies, arch="torchvision/resnet18", task="digits"):
    rows = [Row(f"{name}-seed{seed}", role, arch, accuracy) for seed, accuracy in enumerate(accuracies)]
    return Group(name, list(range(len(rows))), rows, f"{arch} {task}")


PLAIN = group("student", "student", 0.90, 0.91, 0.92)


def test_a_gain_has_the_standard_error_of_a_difference_of_means():
    # Deviations of 1 and 2 points over three seeds: (1/3 + 4/3) ** 0.5 = 1.29.
    (text,) = gains([PLAIN, group("kd", "distilled", 0.94, 0.96, 0.98)])
    assert text == "kd against student: a gain of 5.00 ± 1.29 points of test accuracy (standard error, 3 and 3 seeds)."


def test_a_loss_is_called_a_loss():
    (text,) = gains([PLAIN, group("kd", "distilled", 0.84, 0.86, 0.88)])
    assert text.startswith("kd against student: a loss of 5.00 ± 1.29 points")


@pytest.mark.parametrize("sign", [1, -1])
def test_within_two_standard_errors_no_gain_is_shown(sign):
    middle = 0.91 + sign * 0.0257  # 2.57 points, less than 2 * 1.291
    (text,) = gains([PLAIN, group("kd", "distilled", middle - 0.02, middle, middle + 0.02)])
    assert text.startswith(f"kd against student: no gain is shown, {100 * sign * 0.0257:+.2f} ± 1.29 points")


def test_one_seed_has_no_standard_error():
    (text,) = gains([PLAIN, group("kd", "distilled", 0.95)])
    assert text == "kd against student: +4.00 points of test accuracy; one seed, so that the standard error is unknown."


def test_only_the_same_network_and_the_same_test_samples_are_compared():
    assert gains([PLAIN, group("kd", "distilled", 0.95, task="cifar10")]) == []
    teacher, other = group("teacher", "teacher", 0.99), group("kd", "distilled", 0.95, arch="torchvision/resnet34")
    assert gains([teacher, PLAIN, other]) == gains([teacher, group("kd", "distilled", 0.95)]) == []
    assert gains([PLAIN, group("kd", "distilled", None)]) == gains([group("s", "student", None), other]) == []
