"""Check of a data set: every image is read and decoded once, and what is wrong or unusual is listed.

Input: the data settings. Output: a `DataReport` as text or plain values. The unreadable samples and the digests are kept in the
inventory, so that a training with `data.on_error: skip` needs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import build_module
from kd_accel.data.dataset import ImageSet
from kd_accel.data.duplicates import Part, repeated
from kd_accel.data.inventory import Checked, Inventory, mean_and_std
from kd_accel.data.passes import Peers
from kd_accel.data.sources import load_splits, load_unlabeled
from kd_accel.distributed import Accelerator

_SHOWN = 10


@dataclass(frozen=True)
class SplitReport:
    """Findings in one split of the source.

    Attributes:
        samples: Number of samples in the source split.
        unreadable: Reason by the index of each sample that cannot be read or decoded.
        constant: Indices of the images of one color.
        repeated: Number of samples whose image occurred before in the split.
        changed: Indices of the images that have other bytes than at an earlier start, under the same size and time.
        mean: Channel means over the readable images, in 0..1.
        std: Channel standard deviations, in 0..1.
    """

    samples: int
    unreadable: Mapping[int, str]
    constant: list[int]
    repeated: int
    changed: list[int]
    mean: list[float]
    std: list[float]

    def lines(self, split: str) -> list[str]:
        """Return the findings as lines of text. split: name of the split."""
        num_readable = self.samples - len(self.unreadable)
        lines = [f"{split}: {self.samples} samples, {num_readable} readable"]
        lines += [f"  {reason}" for reason in self.unreadable.values()]
        if self.changed:
            lines.append(f"  {len(self.changed)} changed under the same size and time: samples {_listed(self.changed)}")
        if self.constant:
            lines.append(f"  {len(self.constant)} of one color: samples {_listed(self.constant)}")
        if self.repeated:
            lines.append(f"  {self.repeated} repeat an earlier image of the split")
        return [*lines, f"  mean {_numbers(self.mean)}, standard deviation {_numbers(self.std)}"]


@dataclass(frozen=True)
class DataReport:
    """Findings in a data set.

    Attributes:
        splits: Findings by split of the source.
        used_samples: Number of samples of train, val and test that a training would use.
        classes: Number of training samples by class name.
        notices: Lines about files that are left out, and about duplicates across splits, as at the start of a training.
    """

    splits: Mapping[str, SplitReport]
    used_samples: Mapping[str, int]
    classes: Mapping[str, int]
    notices: Sequence[str]

    @property
    def num_unreadable(self) -> int:
        """Number of samples that cannot be read or decoded, over all splits."""
        return sum(len(split.unreadable) for split in self.splits.values())

    def as_values(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**asdict(self), "num_unreadable": self.num_unreadable}

    def as_text(self) -> str:
        """Return the report as lines of text."""
        by_size = sorted(self.classes, key=lambda name: self.classes[name])
        least, most = by_size[0], by_size[-1]
        empty = [name for name in by_size if not self.classes[name]]
        classes = f"{len(self.classes)} classes: least {least!a} ({self.classes[least]}), most {most!a} ({self.classes[most]})"
        used = ", ".join(f"{count} {split}" for split, count in self.used_samples.items())
        return "\n".join(
            [
                *(line for name, split in self.splits.items() for line in split.lines(name)),
                f"samples of a training: {used}",
                f"{classes} training samples" + (f"; without any: {len(empty)}" if empty else ""),
                *self.notices,
            ]
        )


def check_data(
    config: DataConfig, accelerator: Accelerator | None = None, *, class_names: Sequence[str] | None = None
) -> DataReport:
    """Read and decode every image, regardless of what earlier starts have kept.

    Args:
        config: The data settings; `on_error` is ignored.
        accelerator: Accelerator of a launch whose ranks all call this function, and share its work; None = this process alone.
        class_names: Class names of data without labels (`data.label_column: null`).

    Raises:
        UserError: If the source cannot be read, does not match the settings, or has no readable training image.
    """
    config = config.model_copy(update={"on_error": "skip"})
    inventory = Inventory("skip", config.num_workers, Peers(accelerator))
    train, val, test = load_splits(config, class_names)
    unlabeled = load_unlabeled(config, train.label_names)
    by_name = {"train": train, "val": val, "test": test, "unlabeled": unlabeled}
    sets = {name: images for name, images in by_name.items() if images is not None and (name == "train" or images is not train)}
    reports = {}
    for name, images in sets.items():
        before = inventory.kept_contents(images)
        checked = inventory.check(images)
        inventory.take(images)
        reports[name] = _split_report(images, checked, before)
    data = build_module(train, val, test, config, inventory, unlabeled=unlabeled)
    labels = data.train.labels[data.splits.train]
    counts = np.bincount(labels[labels >= 0], minlength=len(data.label_names))
    return DataReport(
        reports,
        {name: len(samples) for name, samples in data.splits.by_name().items()},
        dict(zip(data.label_names, counts.tolist(), strict=True)),
        replace(data, left_out={}).notices,
    )


def _split_report(images: ImageSet, checked: Checked, before: np.ndarray | None) -> SplitReport:
    contents = checked.digests.contents
    changed = np.zeros(0, np.int64) if before is None else np.flatnonzero(before != contents)
    mean, std = mean_and_std(checked.counts) if checked.counts.any() else (np.zeros(3), np.zeros(3))
    return SplitReport(
        samples=images.num_samples,
        unreadable=checked.unreadable,
        constant=checked.constant.tolist(),
        repeated=repeated(Part(images, np.arange(images.num_samples))),
        changed=changed.tolist(),
        mean=mean.tolist(),
        std=std.tolist(),
    )


def _listed(samples: Sequence[int]) -> str:
    shown = ", ".join(map(str, samples[:_SHOWN]))
    return shown if len(samples) <= _SHOWN else f"{shown}, ..."


def _numbers(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.4f}' for value in values)}]"
