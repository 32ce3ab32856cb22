"""Comparison of a training that was stopped and resumed with a training that was never stopped."""

from tests.support.launching import metrics, summary

EVERYTHING = [
    "--model.arch=import:tests.support.models:student_with_everything",
    "--optim.nesterov=true",
    "--train.ema_decay=0.9",
    "--train.max_steps=20",
    "--train.log_every_steps=3",
    "--data.views=2",
]
"""Flags of a training with BatchNorm, dropout, momentum, a moving average, and lines of metrics that span the stop.

An epoch has 8 steps.
"""


def assert_same_run(one, other):
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert metrics(one) == metrics(other)
    assert summary(one) == {**summary(other), "name": summary(one)["name"], "commit": summary(one)["commit"]}
