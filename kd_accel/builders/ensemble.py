"""The side of several teachers in a training: each set up as if it were the only one, and their outputs together.

In: a config with `teachers`. Out: one setup and one source of outputs, with the logits of each teacher by name and the features
of its layers as "TEACHER/LAYER".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor, nn

from kd_accel.builders.student import build_ensemble, build_losses
from kd_accel.builders.teacher import TeacherSetup, build_teacher_setup, teacher_fingerprint
from kd_accel.config.ensemble_rules import of_teacher
from kd_accel.config.schema import RunConfig, Schedule
from kd_accel.data.datamodule import DataModule
from kd_accel.distributed import Accelerator
from kd_accel.errors import UserError
from kd_accel.io.hashing import settings_digest
from kd_accel.losses.ensemble import Ensemble
from kd_accel.training.checkpoint import Checkpoint
from kd_accel.types import Batch, StagedTeacher, TeacherOutput, TeacherSource

Value = TypeVar("Value")


@dataclass(frozen=True)
class EnsembleSetup(TeacherSetup):
    """Several teachers that are ready for a training.

    Args:
        members: Setup of each teacher by name.
    """

    members: Mapping[str, TeacherSetup] = field(default_factory=dict)

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the fitted tensors by "TEACHER/LAYER|NAME", as a checkpoint stores them."""
        return _named({name: own.saved_tensors() for name, own in self.members.items()})

    def check_unchanged(self) -> None:
        """Assert that the training has not changed a live teacher."""
        for own in self.members.values():
            own.check_unchanged()

    def close(self) -> None:
        """Remove the hooks of live teachers."""
        for own in self.members.values():
            own.close()


class EnsembleSource:
    """Outputs of several teachers for training batches, each from its own source. It is a `StagedTeacher`.

    Args:
        sources: Source of each teacher by name.
    """

    def __init__(self, sources: Mapping[str, StagedTeacher]) -> None:
        self._sources = sources
        self._counts: dict[str, int] = {}

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Return the outputs for a batch; see `finish`."""
        return self.finish(batch, self.fetch(batch))

    def fetch(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return what the sources have fetched, one after the other."""
        fetched = {name: source.fetch(batch) for name, source in self._sources.items()}
        self._counts = {name: len(own) for name, own in fetched.items()}
        return tuple(tensor for own in fetched.values() for tensor in own)

    def finish(self, batch: Batch, fetched: tuple[Tensor, ...]) -> TeacherOutput:
        """Return the logits of each teacher by name, and the features by "TEACHER/LAYER"."""
        outputs: dict[str, TeacherOutput] = {}
        for name, source in self._sources.items():
            own, fetched = fetched[: self._counts[name]], fetched[self._counts[name] :]
            outputs[name] = source.finish(batch, own)
        members = {name: output.logits for name, output in outputs.items() if output.logits is not None}
        return TeacherOutput(None, _named({name: output.features for name, output in outputs.items()}), members)


class HeldOutEnsemble:
    """Combined logits of several teachers for held-out batches, at temperature 1 and with equal weights in all samples.

    Args:
        sources: Source of each teacher by name.
        ensemble: Combination of their logits.
        weights: Weight of each teacher.
    """

    def __init__(self, sources: Mapping[str, TeacherSource], ensemble: Ensemble, weights: Mapping[str, float]) -> None:
        self._sources, self._ensemble, self._weights = sources, ensemble, weights

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Return the combined logits [B, C] for a batch on the device, and those of each teacher."""
        members: dict[str, Tensor] = {}
        for name, source in self._sources.items():
            logits = source(batch).logits
            assert logits is not None, "each source has logits for held-out samples"
            members[name] = logits
        return TeacherOutput(self._ensemble(members, self._weights, temperature=1.0), members=members)


def held_out_ensemble(config: RunConfig, sources: Mapping[str, TeacherSource]) -> HeldOutEnsemble:
    """Build the source for a held-out split, in which a scheduled weight counts with its first value.

    Args:
        config: Config with several teachers.
        sources: Source of each teacher by name.
    """
    ensemble = build_ensemble(config)
    assert ensemble is not None, "called for several teachers"
    weights = {name: own.weight for name, own in config.teachers.items()}
    first = {name: weight.start if isinstance(weight, Schedule) else weight for name, weight in weights.items()}
    if not any(first.values()):
        first = dict.fromkeys(first, 1.0)
    return HeldOutEnsemble(sources, ensemble, first)


def build_ensemble_setup(
    config: RunConfig, data: DataModule, network: nn.Module, *, accelerator: Accelerator, checkpoint: Checkpoint | None
) -> EnsembleSetup:
    """Load the teachers, build their targets, and prepare the source of their outputs.

    Args:
        config: Config of the run, with several teachers.
        data: Data of the run.
        network: Network of the student.
        accelerator: Accelerator of the launch.
        checkpoint: Checkpoint to resume from.

    Raises:
        UserError: If a teacher, its cache or the data do not fit together; the message names the teacher.
    """
    members: dict[str, TeacherSetup] = {}
    for name, own in config.by_teacher().items():
        saved = None if checkpoint is None else _of_member(checkpoint, name)
        with errors_of_teacher(name):
            members[name] = build_teacher_setup(
                own, data, network, build_losses(own), accelerator=accelerator, checkpoint=saved
            )
    caches = {name: own.cache for name, own in members.items() if own.cache is not None}
    return EnsembleSetup(
        source=EnsembleSource({name: _staged(own.source) for name, own in members.items()}),
        held_out=lambda split: held_out_ensemble(config, {name: own.held_out(split) for name, own in members.items()}),
        fingerprint=_common_fingerprint({name: own.fingerprint for name, own in members.items()}),
        target_shapes=_named({name: own.target_shapes for name, own in members.items()}),
        cache=settings_digest(caches) if caches else None,
        explained=_named({name: own.explained for name, own in members.items()}),
        notices=[f"teachers.{name}: {of_teacher(notice, name)}" for name, own in members.items() for notice in own.notices],
        members=members,
    )


def fingerprint_of_teachers(config: RunConfig, data: DataModule) -> str | None:
    """Return the fingerprint of the teacher, or of all teachers; None without a teacher, or if one has none.

    Raises:
        UserError: If a teacher is not found or does not fit the data.
    """
    found: dict[str, str] = {}
    for name, own in config.by_teacher().items():
        with errors_of_teacher(name):
            fingerprint = teacher_fingerprint(own, data)
        if fingerprint is None:
            return None
        found[name] = fingerprint
    return _common_fingerprint(found) if found else None


def teachers_at_hand(configs: Mapping[str, RunConfig]) -> Mapping[str, RunConfig]:
    """Return the configs whose teacher can run, by name; all of them if none can, so that a command can say so.

    Of several teachers, one that cannot run keeps the cache that it has.
    """
    return {name: own for name, own in configs.items() if own.teacher and not own.teacher.is_stored} or configs


@contextmanager
def errors_of_teacher(name: str) -> Iterator[None]:
    """Name the settings of one of several teachers in the messages of errors. name: its name; empty for a single one."""
    try:
        yield
    except UserError as error:
        if not name or type(error) is not UserError:
            raise
        raise UserError(of_teacher(str(error), name)) from error.__cause__


def _common_fingerprint(fingerprints: Mapping[str, str]) -> str:
    """Return the fingerprint of a single teacher (name ""), or the digest of those of several."""
    return fingerprints[""] if "" in fingerprints else settings_digest(dict(fingerprints))


def _named(of_members: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    """Return {"TEACHER/KEY": value} for the mapping {key: value} of each teacher."""
    return {f"{name}/{key}": value for name, own in of_members.items() for key, value in own.items()}


def _of_member(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Return a checkpoint with the fitted targets of one teacher, under the names that it has alone."""

    def own(of_all: Mapping[str, Value]) -> dict[str, Value]:
        return {key.removeprefix(f"{name}/"): value for key, value in of_all.items() if key.startswith(f"{name}/")}

    tensors = {**checkpoint.tensors, "targets": own(checkpoint.tensors.get("targets", {}))}
    return replace(checkpoint, tensors=tensors, state={**checkpoint.state, "explained": own(checkpoint.state["explained"])})


def _staged(source: TeacherSource) -> StagedTeacher:
    assert isinstance(source, StagedTeacher), "sources of build_teacher_setup have two parts"
    return source
