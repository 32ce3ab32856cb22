"""Item h: trainings whose steps are replayed as a CUDA graph, against the same trainings without.

    float32, bf16, fp16   {variant}: after some steps, weights, buffers, optimizer and metrics must be equal in every bit
    scheduled             the same for a scheduled temperature and alpha, which both trainings read from the device
    teacher               the forward of a cache build: outputs of several batches must be equal in every bit
    waiting, capturing    a model that waits for the device, or fails during the capture, must be trained without a graph

Kernels are deterministic. On a CPU both trainings run without a graph.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.runs import SYNTHETIC, relative_difference
from benchmarks.jobs import PLAIN, Bench, Size, build_live_teacher, build_training, hybrid, open_bench, with_settings
from benchmarks.training_case import CaseBuilder, cached
from kd_accel.builders.teacher import TeacherSetup
from kd_accel.config.schema import Precision, RunConfig, Schedule
from kd_accel.teacher.graphed import GraphedTeacher
from kd_accel.training.graphed import GraphedStep
from kd_accel.training.trainer import Trainer
from kd_accel.types import TeacherOutput

_FALLING = Schedule(kind="linear", start=4.0, end=1.0, unit="step")
_DROPOUT = PLAIN.model_copy(update={"model": PLAIN.model.model_copy(update={"arch": f"{SYNTHETIC}:student_with_dropout"})})
VARIANTS = {
    "plain": PLAIN,
    "live_hybrid": hybrid(),
    "accumulated": with_settings(hybrid(), train={"grad_accum_steps": 2}),
    "adamw": with_settings(hybrid(), optim={"name": "adamw", "lr": 1e-3, "clip_norm": 1.0}, train={"ema_decay": 0.9}),
    "dropout": _DROPOUT,
}
_REFUSED = "refused"
FALLBACKS = ("waiting", "capturing")


def build(setting: Setting, precision: Precision) -> Cases:
    """Return the cases of one precision."""
    bench = open_bench(Size(setting.size(128, 4), setting.size(8, 3)), precision=precision, deterministic=True)
    directory = setting.scratch / f"graphs-{precision}"
    cases = {name: partial(compare, bench, config, directory / name) for name, config in VARIANTS.items()}
    cases["cached_hybrid"] = partial(_compare_cached, bench, directory / "cached_hybrid")
    if precision == "float32":
        scheduled = hybrid()
        assert scheduled.distill is not None
        distill = scheduled.distill.model_copy(
            update={"temperature": _FALLING, "alpha": _FALLING.model_copy(update={"start": 0.9})}
        )
        scheduled = scheduled.model_copy(update={"distill": distill})
        cases["scheduled"] = partial(compare, bench, scheduled, directory / "scheduled", reference=_REFUSED)
        cases["teacher"] = partial(_compare_teacher, bench)
        cases |= {name: partial(_fall_back, bench, name, directory / name) for name in FALLBACKS}
    return cases


def compare(
    bench: Bench, config: RunConfig, directory: Path, *, teacher: TeacherSetup | None = None, reference: str = "never"
) -> Figures:
    """Train with and without a graph, and compare all bits.

    Args:
        bench: Device, precision and images.
        config: Config of the training.
        directory: Directory of the runs.
        teacher: Teacher of the training; None = a live one, if the config has a teacher.
        reference: Training without a graph: `never`, or `refused`, whose scheduled numbers are on the device.
    """
    if teacher is None and config.teacher is not None:
        teacher = build_live_teacher(bench, config)
    trainers = {choice: _trained(bench, config, directory / choice, choice, teacher) for choice in (reference, "auto")}
    eager, graphed = (_state(trainer) for trainer in trainers.values())
    differing = [name for name in eager if not torch.equal(eager[name], graphed[name])]
    losses = [[line["loss"] for line in _lines(directory / choice)] for choice in trainers]
    replayed = _replayed(trainers["auto"])
    return {
        "ok": not differing and losses[0] == losses[1] and (replayed or bench.device.type == "cpu"),
        "replayed": replayed,
        "differing_tensors": len(differing),
        "tensors": len(eager),
        "largest_relative_difference": relative_difference(losses[1], losses[0]),
        "steps": len(losses[0]),
    }


def _compare_cached(bench: Bench, directory: Path) -> Figures:
    config = with_settings(cached(hybrid()), data={"views": 1})
    return compare(bench, config, directory, teacher=CaseBuilder(bench, directory, views=1).teacher(config))


def _compare_teacher(bench: Bench) -> Figures:
    """Compare the teacher's forward as a graph with the same forward without."""
    live = build_live_teacher(bench, hybrid()).live
    assert live is not None
    notices: list[str] = []
    graphed = GraphedTeacher(live, notices.append) if bench.device.type == "cuda" else live
    samples, differing = bench.samples, 0
    shares = [(part, 0) for part in np.split(samples, bench.size.steps)]
    for batch in bench.batches("train", shares):
        # The next call overwrites the output.
        found, expected = ([each.clone() for each in _tensors(teacher(batch))] for teacher in (graphed, live))
        differing += sum(not torch.equal(own, other) for own, other in zip(found, expected, strict=True))
    return {"ok": not differing and not notices, "differing_tensors": differing, "batches": len(shares), "notices": notices}


def _tensors(output: TeacherOutput) -> list[Tensor]:
    assert output.logits is not None
    return [output.logits, *output.features.values()]


def _fall_back(bench: Bench, name: str, directory: Path) -> Figures:
    """Train a model that cannot be captured with the default, and without a graph."""
    model = PLAIN.model.model_copy(update={"arch": f"{SYNTHETIC}:{name}_student"})
    figures = compare(bench, PLAIN.model_copy(update={"model": model}), directory)
    is_as_expected = not figures["differing_tensors"] and not figures["replayed"]
    return {**figures, "ok": is_as_expected}


def _trained(bench: Bench, config: RunConfig, directory: Path, choice: str, teacher: TeacherSetup | None) -> Trainer:
    train = {"cuda_graph": "auto" if choice == _REFUSED else choice, "epochs": 1, "log_every_steps": 1}
    torch.manual_seed(0)
    trainer = build_training(bench, with_settings(config, train=train), directory, teacher=teacher)
    if choice == _REFUSED and isinstance(trainer.step.replay, GraphedStep):
        trainer.step.replay.give_up("it is the reference")
    trainer.fit_epoch()
    return trainer


def _replayed(trainer: Trainer) -> bool:
    """Return whether the steps were replayed as a graph."""
    return isinstance(trainer.step.replay, GraphedStep) and trainer.step.replay.is_replayed


def _state(trainer: Trainer) -> dict[str, Tensor]:
    train_state = trainer.train_state
    optimizer = train_state.optimizer.state_dict()["state"]
    states = {
        "module": train_state.module.state_dict(),
        "average": train_state.average.state_dict() if train_state.average is not None else {},
        **{f"optimizer.{index}": values for index, values in optimizer.items()},
    }
    return {f"{part}.{name}": value for part, values in states.items() for name, value in values.items()}


def _lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
