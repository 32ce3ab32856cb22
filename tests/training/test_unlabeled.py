"""Training on samples without a label: the masked cross-entropy, the reported accuracy, and what is refused."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import DataConfig, RunConfig
from kd_accel.data.datamodule import load_data
from kd_accel.losses.distiller import DistillerOutput
from kd_accel.losses.logits import cross_entropy
from kd_accel.models.factory import build_model
from kd_accel.training.metrics import Meters
from tests.support import in_process
from tests.support.image_files import color, encoded, write_folder, write_parquet
from tests.support.launching import SMALL, losses, metrics, summary, train

PARTLY = "--data.source=import:tests.support.models:partly_labeled_images"
FLOAT64 = "--model.arch=import:tests.support.models:student_float64"


def distillation(teacher_run, *flags):
    return [PARTLY, f"--teacher.run={teacher_run}", "--teacher.min_accuracy=null", "--distill.alpha=0.5", *flags]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_sample_without_a_label_counts_as_zero_in_the_cross_entropy(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    labels, kept = torch.tensor([1, -1, 3, -1, -1, 0]), [0, 2, 5]
    value = cross_entropy(logits, labels, label_smoothing=smoothing, has_unlabeled=True)
    (gradient,) = torch.autograd.grad(value, logits)
    expected = functional.cross_entropy(logits[kept], labels[kept], label_smoothing=smoothing) * 3 / 6
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-12, atol=0)
    assert not gradient[[1, 3, 4]].any()
    assert cross_entropy(logits, torch.full((6,), -1), has_unlabeled=True).item() == 0


def test_the_training_accuracy_is_that_of_the_labeled_samples():
    logits = functional.one_hot(torch.tensor([0, 1, 2, 3]), 4).double()
    output = DistillerOutput(torch.tensor(1.0), {"ce": torch.tensor(0.5)}, logits)
    meters = Meters(torch.device("cpu"), terms=["ce"], has_teacher=True, has_unlabeled=True)
    for labels in ([0, -1, 3, -1], [-1, -1, -1, 3]):
        meters.update(output, torch.tensor(labels), teacher_logits=logits.flip(0))
    assert meters.read(meters.sums) == {"loss": 1.0, "agreement": 0.0, "ce": 0.5, "accuracy": 2 / 3}
    meters.update(output, torch.full((4,), -1), teacher_logits=logits)
    assert meters.read(meters.sums) == {"loss": 1.0, "agreement": 1.0}


@pytest.mark.slow
def test_the_first_loss_has_the_cross_entropy_of_the_labeled_samples(tmp_path, teacher_run):
    """On the others, only the teacher is learned from."""
    flags = distillation(teacher_run, "--train.max_steps=1", "--optim.schedule=constant")
    in_process.train(tmp_path / "run", *flags)
    config, _ = parse_config(RunConfig, [*SMALL, *flags])
    data = load_data(config.data)
    ((batch,), *_) = data.train_loader(batch_size=16, seed=config.seed).epoch(0)
    network = build_model(config.model.arch, num_classes=4, seed=config.seed).double()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (data.mean, data.std))
    log = network((batch.images.double() / 255 - mean) / std).log_softmax(1)
    is_labeled = batch.labels >= 0
    assert 0 < is_labeled.sum() < 16
    (line,) = metrics(tmp_path / "run", "train")
    expected = -log[is_labeled].gather(1, batch.labels[is_labeled][:, None]).sum() / 16
    assert line["ce"] == pytest.approx(expected.item(), abs=2e-6)
    assert line["loss"] == pytest.approx(0.5 * line["ce"] + 0.5 * line["kl"], abs=2e-6)
    accuracy = (log[is_labeled].argmax(1) == batch.labels[is_labeled]).double().mean().item()
    assert line["accuracy"] == pytest.approx(accuracy)


@pytest.mark.slow
def test_the_masked_loss_does_not_depend_on_processes_and_accumulation(tmp_path, teacher_run):
    """The micro-batches have different numbers of labels, so a mean over the labels of each would differ."""
    flags = distillation(teacher_run, FLOAT64, "--train.max_steps=6")
    for processes, accumulation in ((1, 1), (1, 4), (2, 2)):
        steps = f"--train.grad_accum_steps={accumulation}"
        train(tmp_path / f"{processes}x{accumulation}", *flags, steps, processes=processes)
    reference = losses(tmp_path / "1x1")
    assert len(reference) == 6
    accuracies = [line["accuracy"] for line in metrics(tmp_path / "1x1", "train")]
    for name in ("1x4", "2x2"):
        assert losses(tmp_path / name) == pytest.approx(reference, rel=1e-10)
        assert [line["accuracy"] for line in metrics(tmp_path / name, "train")] == pytest.approx(accuracies)


def test_validation_samples_are_drawn_among_the_labeled_ones(tmp_path):
    config, _ = parse_config(RunConfig, [*SMALL, PARTLY, "--data.val_fraction=0.2"])
    data = load_data(config.data)
    labels = data.train.labels
    assert (labels >= 0).sum() == 69 and len(data.splits.val) == round(0.2 * 69) and (labels[data.splits.val] >= 0).all()
    assert np.array_equal(data.unlabeled_samples, np.flatnonzero(labels < 0))
    assert data.notices == [
        "data.source: 91 of 160 samples of the train split have no label (null or -1); they are trained with the teacher "
        "alone, and not drawn for validation"
    ]


def test_samples_without_a_label_need_a_teacher(tmp_path):
    said = in_process.train(tmp_path / "run", PARTLY, code=2)
    assert "91 of 146 training samples have no label" in said and "needs a teacher; set teacher.run" in said
    assert "sample 3 of the train split" in said
    assert not (tmp_path / "run").exists()


def test_held_out_samples_need_a_label(tmp_path, monkeypatch):
    def images(split, image_size):
        labels = {"train": [0, 1, 1], "test": [0, 1, -1]}[split]
        return {"images": np.zeros((3, 8, 8, 3), dtype=np.uint8), "labels": labels}

    monkeypatch.setattr("tests.support.models.images", images)
    said = in_process.train(tmp_path / "run", code=2)
    assert "data.label_column: 1 of 3 samples of the test split have no label (null or -1; the first is sample 2)" in said


def train_live_and_build(tmp_path, flags):
    """Train with the live teacher, and build a cache. Returns the flags that use it."""
    stored = ["--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path}/cache", "--teacher.cache.dtype=float32"]
    in_process.train(tmp_path / "live", *flags)
    in_process.cache("build", *flags, *stored)
    return stored


@pytest.mark.slow
def test_a_cached_training_with_unlabeled_samples_resumes_and_ends_like_a_live_one(tmp_path, teacher_run):
    flags = distillation(teacher_run, "--data.views=2")
    stored = train_live_and_build(tmp_path, flags)
    in_process.train(tmp_path / "cached", *flags, *stored, "--checkpoint.stop_after_steps=5")
    in_process.train(tmp_path / "cached", *flags, *stored)
    assert losses(tmp_path / "cached") == losses(tmp_path / "live")
    assert metrics(tmp_path / "cached", "test") == metrics(tmp_path / "live", "test")


def without_labels(teacher_run, *flags):
    source = "--data.source=import:tests.support.models:unlabeled_images"
    return [source, "--data.label_column=null", f"--teacher.run={teacher_run}", "--distill.label_weight=0", *flags]


@pytest.mark.slow
def test_without_a_label_column_the_teacher_alone_is_learned_and_its_agreement_reported(tmp_path, teacher_run):
    feature = "--distill.features.mse={weight: 1.0, layers: [layer1], args: {pca_images: 64}}"
    said = in_process.train(tmp_path / "run", *without_labels(teacher_run, feature))
    assert "data.label_column: null, so that the training learns from the teacher alone" in said
    assert "test agreement " in said and "accuracy" not in said.partition("null, so that")[0]
    for line in metrics(tmp_path / "run"):
        assert "agreement" in line and not {"accuracy", "ce"} & line.keys()
    assert [line["split"] for line in metrics(tmp_path / "run")].count("val") == 3
    for line in metrics(tmp_path / "run", "train"):
        assert line["loss"] == pytest.approx(0.5 * line["kl"] + line["features/mse"], rel=1e-5)
    result = summary(tmp_path / "run")
    assert (result["accuracy"], result["accuracy_best_val"], result["teacher_accuracy"]) == (None, None, None)
    assert result["agreement"] == metrics(tmp_path / "run", "test")[0]["agreement"] > 0.5
    assert result["data"]["label_names"] == ["red", "green", "blue", "olive"]
    evaluated = json.loads(in_process.say("evaluate", tmp_path / "run").splitlines()[-1])
    assert evaluated["agreement"] == result["agreement"] and "accuracy" not in evaluated
    # The trained model has the classes of its teacher, and is measured on labeled data.
    labeled = ["--data.source=import:tests.support.models:images", "--data.label_column=label"]
    assert 0 < json.loads(in_process.say("evaluate", tmp_path / "run", *labeled).splitlines()[-1])["accuracy"] <= 1
    in_process.say("report", tmp_path / "run", "--out", tmp_path / "report")


@pytest.mark.slow
def test_a_cached_training_without_labels_ends_like_a_live_one(tmp_path, teacher_run):
    flags = without_labels(teacher_run, "--data.views=2")
    stored = train_live_and_build(tmp_path, flags)
    in_process.train(tmp_path / "cached", *flags, *stored)
    in_process.train(tmp_path / "alone", *flags, *stored, "--teacher.run=null")
    assert losses(tmp_path / "cached") == losses(tmp_path / "live") == losses(tmp_path / "alone")


def parquet(directory):
    for split in ("train", "test"):
        write_parquet(directory, split, [encoded(color(sample)) for sample in range(4)], ["x"] * 4)
    return f"parquet:{directory}"


def folder(directory):
    write_folder(
        directory, [*(f"train/a/{sample}.png" for sample in range(4)), *(f"test/b/{sample}.png" for sample in range(4))]
    )
    return f"imagefolder:{directory}"


def csv(directory):
    write_folder(directory, [f"{sample}.png" for sample in range(4)])
    for split in ("train", "test"):
        rows = "".join(f"{sample}.png\n" for sample in range(4))
        (directory / f"{split}.csv").write_text(f"img\n{rows}")
    return f"csv:{directory}"


@pytest.mark.parametrize("write", [parquet, folder, csv])
def test_sources_are_read_without_their_labels(tmp_path, write):
    columns = {} if write is folder else {"image_column": "img"}
    config = DataConfig(source=write(tmp_path), label_column=None, image_size=16, val_fraction=0.25, **columns)
    data = load_data(config, class_names=["cat", "dog"])
    assert data.label_names == ("cat", "dog")
    assert [len(samples) for samples in data.splits.by_name().values()] == [3, 1, 4]
    assert set(data.train.labels) | set(data.test.labels) == {-1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher=null", "--distill=null"], "data.label_column: null means that no labels are read, which needs a teacher"),
        (
            ["--distill.label_weight=null"],
            "distill.label_weight: the cross-entropy has a weight, but with data.label_column null",
        ),
        (["--distill.label_weight=0.1"], "distill.label_weight: the cross-entropy has a weight"),
        (["--data.labels=remap"], "data.labels: has no effect with data.label_column null"),
        (["--teacher.class_map=auto"], "teacher.class_map: has no effect with data.label_column null"),
        (["--teacher.min_accuracy=0.5"], "teacher.min_accuracy: has no effect with data.label_column null"),
    ],
)
def test_settings_that_need_labels_are_refused_without_them(tmp_path, flags, message):
    assert message in in_process.train(tmp_path / "run", *without_labels("runs/teacher"), *flags, code=2)
