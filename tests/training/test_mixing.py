"""Trainings on samples mixed by mixup and cutmix: their loss and metrics, processes, resume, caches, and what is refused."""

import pytest
import torch
from torch.nn import functional

from kd_accel.builders.student import build_losses
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import load_data
from kd_accel.errors import UserError
from kd_accel.losses.distiller import DistillerOutput
from kd_accel.models.factory import build_model
from kd_accel.training.metrics import Meters
from tests.support import in_process
from tests.support.caches import FEATURE
from tests.support.launching import SMALL, losses, metrics, summary, train
from tests.support.resuming import EVERYTHING, assert_same_run

CROP = "random_crop: {padding: 4}, random_horizontal_flip: {}"
TRANSFORMS = {
    "mixup": f"--data.transform={{{CROP}, mixup: {{}}}}",
    "cutmix": f"--data.transform={{{CROP}, cutmix: {{}}}}",
    "both": f"--data.transform={{{CROP}, mixup: {{alpha: 0.8, p: 0.4}}, cutmix: {{p: 0.4}}}}",
}
MIXING = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
BOTH = TRANSFORMS["both"]
FLOAT64 = "--model.arch=import:tests.support.models:student_float64"
PARTLY = "--data.source=import:tests.support.models:partly_labeled_images"
TRUE_CLASS = "import:tests.support.losses:TrueClass"
STOP_AT = 11
"""A step in the middle of an epoch of 8 steps."""


def distillation(teacher_run, transform, *flags):
    return [transform, f"--teacher.run={teacher_run}", "--distill.alpha=0.5", *flags]


def meters(**settings):
    return Meters(torch.device("cpu"), terms=["ce"], has_mixed_labels=True, **settings)


def test_no_accuracy_is_measured_with_mixed_labels():
    logits = functional.one_hot(torch.tensor([0, 1, 2, 3]), 4).double()
    output, mixed = DistillerOutput(torch.tensor(1.0), {"ce": torch.tensor(0.5)}, logits), torch.full((4, 4), 0.25)
    plain, distilled = meters(), meters(has_teacher=True)
    plain.update(output, mixed)
    distilled.update(output._replace(teacher_logits=logits), mixed)
    for each in (plain, distilled):
        each.count_samples(4)
    assert plain.read(plain.sums) == {"loss": 1.0, "ce": 0.5}
    assert distilled.read(distilled.sums) == {"loss": 1.0, "ce": 0.5, "agreement": 1.0}


def test_no_cross_entropy_is_reported_without_a_mixed_label():
    output = DistillerOutput(torch.tensor(1.0), {"ce": torch.tensor(0.5)}, torch.eye(4))
    measured = meters(has_unlabeled=True)
    measured.update(output, torch.zeros(4, 4))
    measured.count_samples(4)
    assert measured.read(measured.sums) == {"loss": 1.0}
    for labels in (torch.zeros(4, 4), torch.eye(4)):
        measured.update(output, labels)
        measured.count_samples(4)
    assert measured.read(measured.sums) == {"loss": 1.0, "ce": 0.5}


def losses_of(transform, *flags):
    config, _ = parse_config(RunConfig, [*SMALL, *distillation("runs/teacher", transform), *flags])
    return build_losses(config)


@pytest.mark.parametrize(
    ("section", "flags"),
    [
        ("logits", [f"--distill.logits.loss={TRUE_CLASS}Loss"]),
        ("features.own", [f"--distill.features.own={{loss: '{TRUE_CLASS}FeatureLoss', layers: [layer1]}}"]),
    ],
)
def test_a_loss_that_needs_the_class_is_refused(section, flags):
    losses_of("--data.transform=crop", *flags)
    with pytest.raises(UserError) as refused:
        losses_of(BOTH, *flags)
    both = "data.transform.mixup and data.transform.cutmix"
    rule = (
        f"needs the one true class of each sample, which samples of {both} do not have; remove {both}, or choose another loss"
    )
    assert str(refused.value).startswith(f"distill.{section}: {TRUE_CLASS}") and rule in str(refused.value)
    with pytest.raises(UserError, match="which samples of data.transform.cutmix do not have"):
        losses_of(TRANSFORMS["cutmix"], *flags)


@pytest.mark.slow
def test_a_run_with_such_a_loss_leaves_no_directory(tmp_path):
    flags = distillation("runs/teacher", BOTH, f"--distill.logits.loss={TRUE_CLASS}Loss")
    assert "needs the one true class" in in_process.train(tmp_path / "run", *flags, code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRANSFORMS, "partly labeled"])
def test_the_first_loss_is_that_of_the_mixed_labels(tmp_path, teacher_run, name):
    """A sample counts as 0 in the cross-entropy if it or its partner has no label."""
    partly = [PARTLY, "--teacher.min_accuracy=null"] if name == "partly labeled" else []
    flags = [*distillation(teacher_run, TRANSFORMS.get(name, BOTH), *partly), "--train.label_smoothing=0.1"]
    said = in_process.train(tmp_path / "run", *flags, "--train.max_steps=1")
    config, _ = parse_config(RunConfig, [*SMALL, *flags])
    data = load_data(config.data)
    ((batch,), *_) = data.train_loader(batch_size=16, seed=config.seed).epoch(0)
    labels, is_labeled = batch.labels, batch.labels.sum(1, keepdim=True)
    assert labels.shape == (16, 4) and ((labels > 0).sum(1) == 2).any() and (is_labeled == 0).any() == bool(partly)
    network = build_model(config.model.arch, num_classes=4, seed=config.seed).double()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (data.mean, data.std))
    log = network((batch.images.double() / 255 - mean) / std).log_softmax(1)
    (line,) = metrics(tmp_path / "run", "train")
    assert line["ce"] == pytest.approx(-((0.9 * labels + 0.1 / 4 * is_labeled) * log).sum().item() / 16, abs=2e-6)
    assert line["loss"] == pytest.approx(0.5 * line["ce"] + 0.5 * line["kl"], abs=2e-6)
    assert "accuracy" not in line and "agreement" in line
    assert "accuracy" in metrics(tmp_path / "run", "val")[0] and "test accuracy" in said
    in_process.say("report", tmp_path / "run", "--out", tmp_path / "report")


@pytest.mark.slow
@MIXING
def test_processes_and_accumulation_train_the_same(tmp_path, teacher_run, transform):
    flags = distillation(teacher_run, transform, FLOAT64, "--train.max_steps=6")
    in_process.train(tmp_path / "one", *flags)
    train(tmp_path / "parts", *flags, "--train.grad_accum_steps=2", processes=2)
    assert len(losses(tmp_path / "one")) == 6
    for one, parts in zip(*(metrics(tmp_path / name, "train") for name in ("one", "parts")), strict=True):
        assert one.pop("split") == parts.pop("split")
        assert parts == pytest.approx(one, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("mixup", 1), ("cutmix", 1), ("both", 1), ("both", 2)])
def test_a_training_that_is_resumed_within_an_epoch_equals_one_that_is_not(tmp_path, distilled, name, processes):
    flags = [*EVERYTHING, *distilled, TRANSFORMS[name]]
    train(tmp_path / "straight", *flags, processes=processes)
    train(tmp_path / "stopped", *flags, f"--checkpoint.stop_after_steps={STOP_AT}", processes=processes)
    train(tmp_path / "stopped", *flags, "--checkpoint.resume=must", processes=processes)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.slow
@MIXING
def test_a_cached_training_equals_a_live_one(tmp_path, teacher_run, transform):
    flags = distillation(teacher_run, transform, FEATURE, "--data.views=2")
    stored = ["--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path}/cache", "--teacher.cache.dtype=float32"]
    in_process.train(tmp_path / "live", *flags)
    in_process.cache("build", *flags, *stored)
    assert "every byte matches" in in_process.cache("verify", *flags, *stored)
    in_process.train(tmp_path / "cached", *flags, *stored, "--data.num_workers=1", "--checkpoint.stop_after_steps=11")
    in_process.train(tmp_path / "cached", *flags, *stored, "--data.num_workers=1")
    assert_same_run(tmp_path / "live", tmp_path / "cached")
    in_process.train(tmp_path / "alone", *flags, *stored, "--teacher.run=null")
    assert losses(tmp_path / "alone") == losses(tmp_path / "live")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag", ["--train.precision=bf16", "--train.compile=true", "--train.ema_decay=0.9", "--data.num_workers=2"]
)
def test_other_settings_of_a_training_work_with_mixing(tmp_path, teacher_run, flag):
    in_process.train(tmp_path / "run", *distillation(teacher_run, BOTH, FEATURE, flag))
    assert summary(tmp_path / "run")["accuracy"] > 0.5


@pytest.mark.slow
def test_a_plain_training_needs_no_teacher(tmp_path):
    in_process.train(tmp_path / "run", BOTH)
    assert all({"loss", "ce"} <= line.keys() and "accuracy" not in line for line in metrics(tmp_path / "run", "train"))
    assert summary(tmp_path / "run")["accuracy"] > 0.5


@pytest.mark.slow
def test_without_a_label_column_the_teacher_alone_is_learned(tmp_path, teacher_run):
    source = ["--data.source=import:tests.support.models:unlabeled_images", "--data.label_column=null"]
    in_process.train(tmp_path / "run", *distillation(teacher_run, BOTH, *source, "--distill.label_weight=0"))
    for line in metrics(tmp_path / "run"):
        assert "agreement" in line and not {"accuracy", "ce"} & line.keys()
    assert summary(tmp_path / "run")["agreement"] > 0.5


@pytest.mark.slow
def test_the_cost_is_estimated(teacher_run):
    assert "recommend" in in_process.say("plan", *SMALL, *distillation(teacher_run, BOTH, "--data.views=2"))
