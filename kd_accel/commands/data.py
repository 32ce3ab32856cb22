"""`kd-accel data check`: every image is decoded once, and what is wrong or unusual is listed."""

from __future__ import annotations

import json

from kd_accel.builders.labels import unlabeled_class_names
from kd_accel.config.schema import RunConfig
from kd_accel.data.check import check_data
from kd_accel.distributed import leave_processes, peers_needed, start_processes
from kd_accel.errors import UserError


def run_data_check(config: RunConfig, *, as_json: bool) -> None:
    """Check the data of a config and print the report.

    Args:
        config: Config of a run; its data settings are used, and its teacher for the classes of data without labels.
        as_json: Whether the report is printed as JSON.

    Raises:
        UserError: If an image cannot be decoded, after the report.
    """
    accelerator = start_processes("float32", timeout_s=config.train.timeout_s)
    with peers_needed(accelerator, lambda: "during the check of the data"):
        report = check_data(config.data, accelerator, class_names=unlabeled_class_names(config))
    accelerator.print(json.dumps(report.as_values()) if as_json else report.as_text())
    leave_processes(accelerator)
    if report.num_unreadable:
        samples = sum(split.samples for split in report.splits.values())
        unreadable = [name for name, split in report.splits.items() if split.unreadable]
        source = "data.unlabeled" if unreadable == ["unlabeled"] else "data.source"
        raise UserError(
            f"{source}: {report.num_unreadable} of {samples} images cannot be decoded; restore or remove them, or set "
            "data.on_error to skip, which leaves them out"
        )
