"""`kd-accel plan`: estimate of the cost of a live and of a cached teacher on this machine, from a short measurement."""

from __future__ import annotations

import json
from typing import Any

from kd_accel.builders.ensemble import errors_of_teacher, teachers_at_hand
from kd_accel.builders.labels import unlabeled_class_names
from kd_accel.builders.measure import estimate_costs
from kd_accel.cache.estimate import estimate_text
from kd_accel.config.data_schema import has_transform
from kd_accel.config.schema import RunConfig
from kd_accel.distributed import leave_processes, start_processes
from kd_accel.errors import UserError
from kd_accel.models.inference import choose_kernels


def run_plan(config: RunConfig, *, as_json: bool) -> None:
    """Print the cost of a live and of a cached teacher, and a recommendation; of several teachers, each as if alone.

    Args:
        config: Config of a distillation.
        as_json: Whether the result is printed as JSON.

    Raises:
        UserError: If the config has no teacher, or its data or a model is not found.
    """
    if not config.has_teacher:
        raise UserError("teacher: not set, so there is nothing to plan; use the config of a distillation")
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    accelerator = start_processes(config.train.precision, seed=config.seed, timeout_s=config.train.timeout_s)
    results: dict[str, dict[str, Any]] = {}
    for name, own in teachers_at_hand(config.by_teacher()).items():
        with errors_of_teacher(name):
            results[name] = estimate_costs(own, accelerator, class_names=unlabeled_class_names(config))
    text = "\n\n".join(
        f"teachers.{name}:\n{estimate_text(each)}" if name else estimate_text(each) for name, each in results.items()
    )
    if config.data.views is None and has_transform(config.data):
        text += "\ndata.views is null (new views in each epoch): counted as one view for each epoch"
    accelerator.print(json.dumps(results.get("", results)) if as_json else text)
    leave_processes(accelerator)
