"""Design of benchmarks.worth: lengths, labels, seeds, and the settings of each run.

A row of the table is a length and a share of the labels. It has two groups of runs, plain and distilled, with the same steps. A
plain run with a part of the labels has fewer images and more epochs; a distilled one also reads the other images, as unlabeled
ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_reference_plan import as_arguments
from benchmarks.paired_runs import CONFIGS, PairedOptions
from kd_accel.config.data_schema import DataConfig
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.data.splits import split_samples


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Args:
        steps: Optimizer steps.
        labels: Number of labeled images.
        is_distilled: Whether the student learns from the teacher.
    """

    steps: int
    labels: int
    is_distilled: bool

    @property
    def kind(self) -> str:
        """Return "plain" or "distilled"."""
        return "distilled" if self.is_distilled else "plain"

    @property
    def name(self) -> str:
        """Return the name of the group."""
        return f"{self.kind}-steps{self.steps}-labels{self.labels}"


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        group: Settings of the training.
        seed: Seed of the training.
    """

    group: Group
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the run, which is also that of its directory."""
        return f"{self.group.name}-seed{self.seed}"

    @property
    def about(self) -> dict[str, Any]:
        """Return the settings that are recorded together with the accuracies."""
        return {"kind": self.group.kind, "steps": self.group.steps, "labels": self.group.labels, "seed": self.seed}


@dataclass(frozen=True)
class Design:
    """Sizes of the experiment.

    Args:
        images: Number of training images.
        few_labels: Number of labeled images in the row with few labels.
        batch_size: Images of a step.
        epochs: Lengths in epochs of all images, ascending; few labels are tried at the middle one.
        views: Views of each image, used in turn.
        seeds: Seeds of each group of runs.
    """

    images: int
    few_labels: int
    batch_size: int
    epochs: tuple[int, ...]
    views: int
    seeds: tuple[int, ...]

    @property
    def rows(self) -> list[tuple[Group, Group]]:
        """Return the plain and the distilled group of each row: the lengths with all labels, then few labels."""
        steps = [each * (self.images // self.batch_size) for each in self.epochs]
        sizes = [*((each, self.images) for each in steps), (steps[len(steps) // 2], self.few_labels)]
        return [(Group(steps, labels, False), Group(steps, labels, True)) for steps, labels in sizes]

    @property
    def runs(self) -> list[Run]:
        """Return all runs in their order: the first seed, shortest first, then the other seeds, the longest runs last."""
        runs = [Run(group, seed) for seed in self.seeds for row in self.rows for group in row]
        return sorted(runs, key=lambda run: (run.seed != self.seeds[0], run.group.steps, run.seed))


FULL = Design(images=10_000, few_labels=1_000, batch_size=128, epochs=(4, 12, 35), views=8, seeds=(0, 1, 2))
TRIAL = Design(images=40, few_labels=4, batch_size=4, epochs=(1,), views=1, seeds=(0,))


@dataclass(frozen=True)
class Options(PairedOptions):
    """Arguments of the command line."""

    @property
    def ledger(self) -> Path:
        """Return the file with a line for each finished run, from which the experiment continues."""
        return self.out / "worth.jsonl"

    @property
    def design(self) -> Design:
        """Return the sizes of the experiment."""
        return TRIAL if self.trial else FULL

    @property
    def images(self) -> Path:
        """Return the directory of the Parquet files; a trial writes its own."""
        return self.data if self.data and not self.trial else self.out / "images"

    @property
    def unlabeled(self) -> Path:
        """Return the Parquet file of the images whose labels are hidden."""
        return self.out / "unlabeled.parquet"


def run_flags(options: Options, run: Run) -> dict[str, Any]:
    """Return the settings of a training, without name and directory.

    Args:
        options: Arguments of the command line.
        run: The training.
    """
    design, group = options.design, run.group
    images = design.images if group.is_distilled else group.labels
    epochs = math.ceil(group.steps / (images // design.batch_size))
    flags = {
        **_data_flags(options, group.labels),
        "config": str(CONFIGS / ("hybrid.yaml" if group.is_distilled else "student.yaml")),
        "train.batch_size": design.batch_size,
        "train.epochs": epochs,
        "train.max_steps": group.steps,
        "train.eval_every_epochs": epochs,
        "checkpoint.every_epochs": None,
        "checkpoint.every_steps": 2 * (design.images // design.batch_size),
        "checkpoint.keep": 1,
        "tracking.wandb": "disabled",
        "seed": run.seed,
    }
    if not group.is_distilled:
        # Without a cache a new view in each epoch costs nothing.
        return {**flags, "data.views": None}
    has_hidden = group.labels < design.images
    return {**flags, **options.teacher_flags, **(_unlabeled_flags(options) if has_hidden else {})}


def cache_flags(options: Options) -> dict[str, Any]:
    """Return the settings of the cache that all distilled runs read: all labeled images, and the others once more unlabeled."""
    flags = {**_data_flags(options, options.design.images), "config": str(CONFIGS / "hybrid.yaml")}
    return {**flags, **options.teacher_flags, **_unlabeled_flags(options)}


def _data_flags(options: Options, labels: int) -> dict[str, Any]:
    return {"data.source": f"parquet:{options.images}", "data.limit_train": labels, "data.views": options.design.views}


def _unlabeled_flags(options: Options) -> dict[str, Any]:
    return {"data.unlabeled": f"parquet:{options.unlabeled}"}


def write_unlabeled(options: Options) -> None:
    """Write the training images whose labels are hidden, without their labels."""
    import pyarrow.parquet as pq

    table = pq.read_table([str(path) for path in sorted(options.images.glob("train*.parquet"))])
    hidden = table.select(["img"]).take(hidden_samples(options, np.array(table["label"], np.int64)))
    partial = options.unlabeled.with_suffix(".partial")
    # The metadata of `datasets` describe the columns of the complete table.
    pq.write_table(hidden.replace_schema_metadata(None), partial)
    partial.replace(options.unlabeled)


def hidden_samples(options: Options, labels: np.ndarray) -> np.ndarray:
    """Return the training samples that are not labeled in the runs with few labels, int64, ascending.

    Args:
        options: Arguments of the command line.
        labels: Labels of the source's training split, int64 [N].
    """
    design = options.design
    many, few = (split_samples(labels, _data_config(options, each)).train for each in (design.images, design.few_labels))
    return np.setdiff1d(many, few, assume_unique=True)


def _data_config(options: Options, labels: int) -> DataConfig:
    flags = {**_data_flags(options, labels), "config": str(CONFIGS / "student.yaml")}
    return parse_config(RunConfig, as_arguments(flags))[0].data
