"""Training on samples without a label: the masked cross-entropy, the reported accuracy, and what is refused."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import DataConfig, RunConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.unlabeled import UNLABELED_OFFSET
from kd_accel.losses.distiller import DistillerOutput
from kd_accel.losses.logits import cross_entropy
from kd_accel.models.factory import build_model
from kd_accel.teacher.loading import load_run_teacher
from kd_accel.training.metrics import Meters
from tests.support import in_process
from tests.support.image_files import color, encoded, write_folder, write_parquet
from tests.support.launching import SMALL, losses, metrics, run, summary, train
from tests.support.models import images

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
        meters.update(output._replace(teacher_logits=logits.flip(0)), torch.tensor(labels))
        meters.count_samples(4)
    assert meters.read(meters.sums) == {"loss": 1.0, "agreement": 0.0, "ce": 0.5, "accuracy": 2 / 3}
    meters.update(output._replace(teacher_logits=logits), torch.full((4,), -1))
    meters.count_samples(4)
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


def train_divided(directory, flags):
    """Train with several numbers of processes and accumulation steps, and compare the losses. Returns those of one process."""
    for processes, accumulation in ((1, 1), (1, 4), (2, 2)):
        steps = f"--train.grad_accum_steps={accumulation}"
        train(directory / f"{processes}x{accumulation}", *flags, steps, processes=processes)
    reference = losses(directory / "1x1")
    for name in ("1x4", "2x2"):
        assert losses(directory / name) == pytest.approx(reference, rel=1e-10)
    return reference


@pytest.mark.slow
def test_the_masked_loss_does_not_depend_on_processes_and_accumulation(tmp_path, teacher_run):
    """The micro-batches have different numbers of labels, so a mean over the labels of each would differ."""
    flags = distillation(teacher_run, FLOAT64, "--train.max_steps=6")
    assert len(train_divided(tmp_path, flags)) == 6
    accuracies = [line["accuracy"] for line in metrics(tmp_path / "1x1", "train")]
    for name in ("1x4", "2x2"):
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


def test_a_column_of_which_no_training_sample_has_a_label_is_refused(tmp_path, teacher_run, monkeypatch):
    def unlabeled(split, image_size):
        content = images(split, image_size)
        return {**content, "labels": [-1] * len(content["labels"]) if split == "train" else content["labels"]}

    monkeypatch.setattr("tests.support.models.images", unlabeled)
    flags = [f"--teacher.run={teacher_run}", "--teacher.min_accuracy=null"]
    said = in_process.train(tmp_path / "run", *flags, "--data.source=import:tests.support.models:images", code=2)
    assert "data.label_column: label, but no training sample has a label; use another column or split, or null" in said


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
        (["--teacher.class_map=auto"], "teacher.class_map: has no effect (with data.label_column null"),
        (["--teacher.min_accuracy=0.5"], "teacher.min_accuracy: has no effect (with data.label_column null"),
    ],
)
def test_settings_that_need_labels_are_refused_without_them(tmp_path, flags, message):
    assert message in in_process.train(tmp_path / "run", *without_labels("runs/teacher"), *flags, code=2)


SECOND_SOURCE = ["--data.unlabeled=import:tests.support.models:unlabeled_images", "--data.unlabeled_split=val"]
LAYER = "--distill.features=mse: {weight: 0.1, layers: [layer1], args: {pca_images: 64}}"


def with_a_second_source(teacher_run, *flags):
    """Return the flags of a distillation with 24 unlabeled samples, of which 13 are in each epoch."""
    ratio = "--data.unlabeled_ratio=0.1"
    return [*SECOND_SOURCE, ratio, f"--teacher.run={teacher_run}", "--teacher.min_accuracy=null", "--distill.alpha=0.5", *flags]


def test_unlabeled_images_of_a_second_source_are_masked_in_the_cross_entropy_and_distilled(tmp_path, teacher_run):
    """The first loss of all 152 training samples, computed from its definition: one step with each of them."""
    whole = ["--data.unlabeled_ratio=null", "--train.batch_size=152", "--train.max_steps=1", "--optim.schedule=constant"]
    flags = with_a_second_source(teacher_run, *whole)
    in_process.train(tmp_path / "run", *flags)
    config, _ = parse_config(RunConfig, [*SMALL, *flags])
    data = load_data(config.data)
    ((batch,),) = data.train_loader(batch_size=152, seed=config.seed).epoch(0)
    is_labeled = batch.labels >= 0
    assert is_labeled.sum() == 128 and torch.equal(is_labeled, batch.index < UNLABELED_OFFSET)
    network = build_model(config.model.arch, num_classes=4, seed=config.seed).double()
    teacher = load_run_teacher(teacher_run).network.double().eval()
    images = {}
    for name, owner in (("student", data), ("teacher", load_run_teacher(teacher_run))):
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (owner.mean, owner.std))
        images[name] = (batch.images.double() / 255 - mean) / std
    logits, targets = network(images["student"]), teacher(images["teacher"])
    (line,) = metrics(tmp_path / "run", "train")
    labels = batch.labels[is_labeled]
    expected = functional.cross_entropy(logits[is_labeled], labels, reduction="sum") / 152
    assert line["ce"] == pytest.approx(expected.item(), abs=2e-6)
    temperature = config.distill.temperature if config.distill else 4.0
    soft = [(each / temperature).log_softmax(1) for each in (logits, targets)]
    kl = temperature**2 * functional.kl_div(*soft, log_target=True, reduction="batchmean")
    assert line["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert line["accuracy"] == pytest.approx((logits[is_labeled].argmax(1) == labels).double().mean().item())


@pytest.mark.slow
def test_a_second_source_gives_the_same_losses_for_any_processes_and_accumulation(tmp_path, teacher_run):
    flags = with_a_second_source(teacher_run, FLOAT64, "--train.max_steps=12")
    assert len(train_divided(tmp_path, flags)) == 12


@pytest.mark.slow
def test_a_cached_training_with_a_second_source_resumes_and_ends_like_a_live_one(tmp_path, teacher_run):
    """Bit for bit: live, from a cache, from a cache that two processes have built, and stopped in the second epoch."""
    flags = with_a_second_source(teacher_run, LAYER, "--data.views=2", "--train.ema_decay=0.9")
    stored = train_live_and_build(tmp_path, flags)
    in_process.train(tmp_path / "cached", *flags, *stored, "--checkpoint.stop_after_steps=13")
    in_process.train(tmp_path / "cached", *flags, *stored)
    in_process.train(tmp_path / "alone", *flags, *stored, "--teacher.run=null", "--data.num_workers=2")
    live = (tmp_path / "live/model.safetensors").read_bytes()
    for name in ("cached", "alone"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == live
        assert metrics(tmp_path / name) == metrics(tmp_path / "live")
    by_two = f"--teacher.cache.dir={tmp_path}/by_two"
    run("cache", "build", *SMALL, *flags, *stored, by_two, processes=2)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        assert (tmp_path / "by_two" / path.relative_to(tmp_path / "cache")).read_bytes() == path.read_bytes()
    # Logits from the cache, features live.
    in_process.train(tmp_path / "mixed", *flags, *stored, "--teacher.outputs=mixed")
    assert (tmp_path / "mixed/model.safetensors").read_bytes() == live


def test_the_start_has_a_line_for_the_second_source(tmp_path, teacher_run):
    said = in_process.train(tmp_path / "run", *with_a_second_source(teacher_run, "--train.max_steps=1"))
    assert "samples     128 train, 32 val, 41 test, 24 unlabeled\n" in said
    assert "unlabeled   import:tests.support.models:unlabeled_images, 13 samples in each epoch\n" in said
    assert "steps       1 in total, 8 per epoch" in said
    assert summary(tmp_path / "run")["data"]["unlabeled"]["samples"] == 24


def test_a_run_is_resumed_with_the_same_unlabeled_samples_only(tmp_path, teacher_run):
    flags = with_a_second_source(teacher_run)
    in_process.train(tmp_path / "run", *flags, "--checkpoint.stop_after_steps=2")
    refused = in_process.train(tmp_path / "run", *flags, "--data.unlabeled_ratio=0.15", code=2)
    assert "data.unlabeled_ratio: 0.1 in the run, 0.15 now" in refused
    checkpoint = in_process.train(tmp_path / "run", *flags, "--checkpoint.stop_after_steps=3")
    assert "paused" in checkpoint


def test_a_second_source_is_no_part_of_an_evaluation(tmp_path, teacher_run):
    source = [f"--data.unlabeled={folder(tmp_path / 'more')}", "--data.unlabeled_split=test", "--data.unlabeled_ratio=null"]
    in_process.train(tmp_path / "run", *with_a_second_source(teacher_run, *source, "--train.max_steps=2"))
    (tmp_path / "more").rename(tmp_path / "elsewhere")
    for flags in ((), ("--teacher=null",), ("--split=val",)):
        said = in_process.say("evaluate", tmp_path / "run", *flags)
        assert json.loads(said.splitlines()[-1])["samples"] == (32 if flags == ("--split=val",) else 41)
        assert "unlabeled" not in said


def test_a_second_source_needs_a_teacher_before_anything_is_read(tmp_path):
    said = in_process.train(tmp_path / "run", "--data.unlabeled=imagefolder:missing", code=2)
    assert "data.unlabeled: has no effect without a teacher" in said and "not found" not in said


@pytest.mark.slow
def test_an_unlabeled_image_that_becomes_unreadable_may_be_replaced(tmp_path, teacher_run):
    write_folder(tmp_path / "more", [f"{sample}.png" for sample in range(8)])
    flags = [f"--data.unlabeled=imagefolder:{tmp_path}/more", f"--teacher.run={teacher_run}", "--teacher.min_accuracy=null"]
    flags += ["--data.memory_limit_mib=1", "--data.image_size=256", "--train.batch_size=8", "--data.limit_train=24"]
    (tmp_path / "more/5.png").write_bytes(b"broken")
    said = in_process.train(tmp_path / "run", *flags, code=2)
    assert "data.unlabeled: sample 5 of the unlabeled split" in said
    assert "cannot be decoded" in said and "stopped after step" in said
    (tmp_path / "more/5.png").write_bytes(encoded(color(77)))
    in_process.train(tmp_path / "run", *flags)
    assert summary(tmp_path / "run")["steps"] == 12


def test_plan_counts_all_unlabeled_samples_for_a_cache_and_their_part_for_an_epoch(tmp_path, teacher_run, monkeypatch):
    monkeypatch.setattr("kd_accel.builders.measure._MEASURED_S", 0.001)
    flags = with_a_second_source(teacher_run, "--data.views=2", f"--run_dir={tmp_path}/run")
    planned = json.loads(in_process.say("plan", *SMALL, *flags, "--json").splitlines()[-1])
    assert planned["training"]["samples"] == 128 + 24 and planned["training"]["epoch_samples"] == 128 + 13
    assert planned["bytes"]["logits"] == 152 * 2 * 8
