"""Settings that may change when a run is resumed, and settings that may not, each with the reason.

A setting may change if the weights and the results in summary.json stay the same, except for the rounding of an evaluation with
batches of another size. A new setting of `RunConfig` must be added to one of the two tables
(tests/training/test_resume_settings.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd_accel.config.fields import as_one_teacher, flatten
from kd_accel.config.paths import moved_paths

_BY_REASON_ACCEPTED = {
    "a label or a path, of no effect on the training": "name run_dir role",
    "the batches are the same in any number of workers, decoded once or on demand": "data.num_workers data.memory_limit_mib",
    "a path; the teacher is identified by its fingerprint": "teacher.run teacher.weights",
    "a part of the teacher's fingerprint; a training from a cache alone sets none of them": (
        "teacher.arch teacher.stem teacher.arch_args teacher.mean teacher.std teacher.class_map "
        "teacher.image_size teacher.interpolation teacher.crop_pct"
    ),
    "a path; the cache is identified by its contents": "teacher.cache.dir",
    "the layout of a new cache; that which is read is identified": "teacher.cache.shard_mib teacher.cache.batch_size",
    "no sample's output in evaluation mode depends on its batch, except by rounding": "train.eval_batch_size",
    "a line of metrics divides its sums by its own number of samples": "train.log_every_steps",
    "a timeout": "train.timeout_s",
    "the samples that are left out are part of the data's fingerprint": "data.on_error",
    # summary.json describes the test split, so that these may change only as long as it does not exist.
    "no training depends on the test split": "data.test_split data.limit_test",
    "a check before the first step": "teacher.min_accuracy",
    "a checkpoint is a copy of the state, at any step": (
        "checkpoint.every_epochs checkpoint.every_steps checkpoint.keep checkpoint.resume checkpoint.stop_after_steps"
    ),
    "a tracker receives copies of the metrics": (
        "tracking.wandb tracking.project tracking.entity tracking.group tracking.tags tracking.dir tracking.log_model "
        "tracking.tensorboard tracking.timeout_s"
    ),
    "a profiler records steps without changing them": "profile",
}

_BY_REASON_REFUSED = {
    "initial weights, order of the samples, dropout": "seed data.sampling",
    # The fingerprint of the data is that of the training split, and of 512 of its images.
    "the images and labels": (
        "data.source data.image_column data.label_column data.labels data.train_split data.val_split "
        "data.image_size data.val_fraction data.test_fraction data.limit_train "
        "data.unlabeled data.unlabeled_split data.unlabeled_ratio"
    ),
    "the pixels of a view and their normalization": (
        "data.transform data.views data.view_seed data.mean data.std data.background data.pixel_range data.crop_pct"
    ),
    # The initial weights are not used again, but config.yaml must describe where the training began.
    "the network and its initial weights": "model.arch model.stem model.weights model.arch_args model.freeze",
    # Live and stored outputs are equal only for some storage types, devices and shapes of batches.
    "the outputs of the teacher": "teacher.outputs teacher.cache.dtype",
    "the loss": (
        "distill.temperature distill.alpha distill.label_weight distill.logits.loss distill.logits.args "
        "distill.features.NAME.loss distill.features.NAME.weight distill.features.NAME.layers distill.features.NAME.args "
        "distill.features.NAME.teacher distill.ensemble.mean distill.ensemble.confidence teachers.NAME.weight "
        "train.label_smoothing train.class_weights"
    ),
    "the updates of the weights": (
        "optim.name optim.lr optim.momentum optim.nesterov optim.betas optim.weight_decay optim.norm_bias_weight_decay "
        "optim.schedule optim.warmup_fraction optim.step_epochs optim.step_gamma optim.clip_norm train.batch_size "
        "train.ema_decay"
    ),
    # Learning rate and loss weights are functions of the share of the steps that is done.
    "the length of the schedules": "train.epochs train.max_steps",
    "BatchNorm's batches": "train.grad_accum_steps train.sync_batchnorm",
    # Faster or slower kernels add in another order, and training amplifies a difference in the last bit.
    "the kernels, hence the rounding of every step": (
        "train.precision train.compile train.cuda_graph train.channels_last train.cpu_kernels train.deterministic train.tf32"
    ),
    # summary.json has the best accuracy of all evaluations.
    "the epochs of which the best validation accuracy is reported": (
        "train.eval_every_epochs train.early_stopping_epochs checkpoint.keep_best"
    ),
}

ACCEPTED: Mapping[str, str] = {name: reason for reason, names in _BY_REASON_ACCEPTED.items() for name in names.split()}
"""Settings that may change, by dotted name: why the results stay the same. `teacher` stands for each of several, too."""

OF_RESULTS = frozenset({"data.test_split", "data.limit_test"})
"""Settings among those of `ACCEPTED` that may not change once the run is finished."""

_BEFORE: Mapping[str, Any] = {
    "train.cuda_graph": "auto",
    "teachers": {},
    "distill.ensemble.mean": "probabilities",
    "distill.ensemble.confidence": False,
    "data.sampling": "uniform",
    "model.freeze": [],
    "optim.norm_bias_weight_decay": True,
    "train.class_weights": None,
    "train.early_stopping_epochs": None,
    "checkpoint.keep_best": False,
    "tracking.log_model": False,
    "tracking.tensorboard": False,
}
"""Settings that runs of earlier versions lack, with the values that describe those runs."""

REFUSED: Mapping[str, str] = {name: reason for reason, names in _BY_REASON_REFUSED.items() for name in names.split()}
"""Settings that may not change, by dotted name (NAME is that of a feature loss): what depends on them."""


def setting_changes(stored: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, str]:
    """Describe the settings that differ between a run and its resumption.

    Args:
        stored: Nested settings of the run.
        present: Nested settings of the resumption.

    Returns:
        "NAME: OLD in the run, NEW now" by dotted name.
    """
    before, now = flatten(stored), flatten(present)
    before = {name: value for name, value in _BEFORE.items() if name in now} | before
    return {
        name: f"{name}: {before.get(name)!r} in the run, {now.get(name)!r} now"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    }


def refused_changes(stored: Mapping[str, Any], present: Mapping[str, Any], *, is_finished: bool) -> dict[str, str]:
    """Describe the settings that differ and may not. A path may change if the directory or file was moved.

    Args:
        stored: Nested settings of the run, with absolute paths.
        present: Nested settings of the present command, with absolute paths.
        is_finished: Whether the run is finished.

    Returns:
        "NAME: OLD in the run, NEW now" by dotted name.
    """
    accepted, moved = ACCEPTED.keys() - (OF_RESULTS if is_finished else frozenset()), moved_paths(stored, present)
    changes = setting_changes(stored, present)
    return {name: text for name, text in changes.items() if name not in moved and as_one_teacher(name) not in accepted}
