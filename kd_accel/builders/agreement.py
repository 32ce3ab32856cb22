"""The teacher's side of an evaluation: its outputs on a held-out split, live or from a cache."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from kd_accel.builders.ensemble import errors_of_teacher, held_out_ensemble
from kd_accel.builders.teacher import load_teacher, teacher_on_device
from kd_accel.cache.reader import find_held_out
from kd_accel.config.ensemble_rules import of_teacher
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import DataModule
from kd_accel.data.splits import HeldOutSplit
from kd_accel.distributed import Accelerator
from kd_accel.errors import UserError
from kd_accel.teacher.loading import teacher_notices
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.types import TeacherSource


def agreement_source(
    config: RunConfig, data: DataModule, split: HeldOutSplit, accelerator: Accelerator, stack: ExitStack
) -> tuple[TeacherSource | None, list[str]]:
    """Prepare the teacher's outputs on a held-out split, for the agreement of a student with its teacher.

    Args:
        config: Config of the evaluation.
        data: Its data.
        split: The held-out split.
        accelerator: Accelerator of the launch.
        stack: Stack to which a callback is added that removes the hooks of a live teacher.

    Returns:
        (source, notices). The source is None without a teacher, and if a cache without its teacher lacks the samples.

    Raises:
        UserError: If the teacher is not found or does not fit the data.
    """
    if not config.teachers:
        return _source(config, data, split, accelerator, stack)
    sources: dict[str, TeacherSource] = {}
    notices: list[str] = []
    for name, own in config.by_teacher().items():
        with errors_of_teacher(name):
            source, own_notices = _source(own, data, split, accelerator, stack)
        notices += [f"teachers.{name}: {of_teacher(notice, name)}" for notice in own_notices]
        if source is not None:
            sources[name] = source
    # The mean needs all teachers.
    return (held_out_ensemble(config, sources) if len(sources) == len(config.teachers) else None), notices


def _source(
    config: RunConfig, data: DataModule, split: HeldOutSplit, accelerator: Accelerator, stack: ExitStack
) -> tuple[TeacherSource | None, list[str]]:
    """Prepare the outputs of a single teacher; see `agreement_source`."""
    teacher = config.teacher
    if teacher is None:
        return None, []
    if teacher.is_stored:
        assert teacher.cache.dir is not None, "checked by config/validation.py"
        return find_held_out(Path(teacher.cache.dir), data, split)
    if teacher.run is not None and not (Path(teacher.run) / "model.json").is_file():
        stored = ", or with the stored outputs (--teacher.run null)" if teacher.outputs == "cached" else ""
        raise UserError(
            f"teacher.run: no finished run in {teacher.run}; name its directory (--teacher.run DIR), or evaluate without the "
            f"agreement (--teacher null){stored}"
        )
    loaded = load_teacher(config, data)
    network, normalize = teacher_on_device(config, loaded, accelerator, [])
    live = LiveTeacher(network, normalize, autocast=accelerator.autocast)
    stack.callback(live.close)
    return live, teacher_notices(loaded, data.label_names, image_size=config.data.image_size)
