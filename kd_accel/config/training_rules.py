"""Rules of the training options: frozen modules, class weights, sampling, and what depends on the validation samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kd_accel.config.loss_weights import labels_without_weight
from kd_accel.config.rules import WithoutEffect, at_least, no_effect
from kd_accel.config.schema import RunConfig, TrainConfig


def training_option_problems(config: RunConfig) -> Iterator[str]:
    """Yield a message for each training option that is wrong or has no effect."""
    if config.optim.weight_decay == 0:
        yield from no_effect(config.optim, "optim", ("norm_bias_weight_decay",), because="with optim.weight_decay 0")
    if repeated := sorted({name for name in config.model.freeze if config.model.freeze.count(name) > 1}):
        yield f"model.freeze: {', '.join(repeated)} is listed more than once; list each module once"
    yield from _class_weights(config)
    if config.data.label_column is None:
        yield from no_effect(config.data, "data", ("sampling",), because="with data.label_column null no sample has a class")
    yield from _selection(config)


def _class_weights(config: RunConfig) -> Iterator[str]:
    weights = config.train.class_weights
    if weights is None:
        return
    if cause := labels_without_weight(config):
        message = f"train.class_weights: has no effect ({cause}: the labels have no weight at any step); leave it out"
        yield WithoutEffect(message)
    if weights == "balanced":
        return
    values = list(weights.values()) if isinstance(weights, dict) else list(weights)
    if not all(math.isfinite(value) and value >= 0 for value in values):
        yield f"train.class_weights: {weights} must be at least 0 each"
    elif all(value == 1 for value in values):
        message = f"train.class_weights: {weights} has no effect (each weight is 1); use null, balanced, or other weights"
        yield WithoutEffect(message)


def _selection(config: RunConfig) -> Iterator[str]:
    """Check the options that depend on the evaluations on the validation samples."""
    train = config.train
    yield from at_least(train, "train", 1, "early_stopping_epochs")
    if config.data.val_fraction == 0:
        because = "with data.val_fraction 0 nothing is evaluated"
        yield from no_effect(train, "train", ("early_stopping_epochs",), because=because)
        yield from no_effect(config.checkpoint, "checkpoint", ("keep_best",), because=because)
        return
    earliest = earliest_stop(train)
    if earliest is not None and earliest >= train.epochs:
        yield WithoutEffect(
            f"train.early_stopping_epochs: {train.early_stopping_epochs} has no effect (the training could end after epoch "
            f"{earliest} at the earliest, and train.epochs is {train.epochs}); lower it, or leave it out"
        )


def earliest_stop(train: TrainConfig) -> int | None:
    """Return the epoch after which early stopping can end a training at the earliest; None without early stopping."""
    patience, every = train.early_stopping_epochs, train.eval_every_epochs
    if patience is None or patience < 1 or every < 1:
        return None
    # The first evaluation is the best one so far, and the training can end at a later one.
    return every * (1 + math.ceil(patience / every))
