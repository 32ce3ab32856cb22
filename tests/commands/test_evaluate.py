"""Evaluation of a finished run: from any directory, on other data, with another teacher or none, on the test split alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import kd_accel as kd
from kd_accel import api
from kd_accel.data import datamodule
from kd_accel.data.sources import FolderSource
from tests.support import in_process
from tests.support.caches import FEATURE
from tests.support.image_files import encoded, write_named, write_parquet
from tests.support.in_process import say
from tests.support.launching import ROOT, run, summary

LEVELS = {"dark": 30, "light": 220}


def write_photos(directory, *, splits=("train", "test"), classes=tuple(LEVELS), size=(20, 16), count=8):
    """Write an image folder whose classes a small network separates."""
    generator = np.random.default_rng(0)
    for split in splits:
        for label in classes:
            (directory / split / label).mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(-20, 20, (*size, 3)) + LEVELS.get(label, 128)
                Image.fromarray(noise.astype(np.uint8)).save(directory / split / label / f"{number}.png")


def evaluate(*argv):
    """Return the result of `kd-accel evaluate`, and all its output."""
    text = say("evaluate", *argv)
    return json.loads(text.splitlines()[-1]), text


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A directory with photos, a teacher, a cache of it and a distilled student, all trained with relative paths."""
    directory = tmp_path_factory.mktemp("project")
    write_photos(directory / "photos")
    flags = ["--data.source=imagefolder:photos", "--data.image_size=16", "--train.epochs=2", "--train.batch_size=4"]
    flags.append("--data.views=1")
    distilled = [
        "--teacher.run=teacher",
        "--teacher.outputs=cached",
        "--teacher.cache.dir=cache",
        "--teacher.min_accuracy=null",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        in_process.train("teacher", *flags, "--model.arch=import:tests.support.models:teacher", "--optim.lr=0.02")
        in_process.cache("build", *flags, *distilled, FEATURE)
        in_process.train("student", *flags, *distilled, FEATURE)
        in_process.train("alone", *flags, *distilled[1:], FEATURE)
    return directory


@pytest.mark.parametrize("name", ["teacher", "student", "alone"])
def test_a_run_is_evaluated_from_any_directory(project, monkeypatch, name):
    expected = summary(project / name)
    for place in (project, project.parent, ROOT):
        monkeypatch.chdir(place)
        result, _ = evaluate(project / name)
        assert (result["samples"], result["accuracy"]) == (16, expected["accuracy"])
        assert result.get("agreement") == expected["agreement"]
    monkeypatch.chdir(project.parent)
    relative = api.evaluate(Path("..") / project.parent.name / project.name / name)
    assert {"run": str(project / name), "split": "test", **relative} == result


def test_a_moved_run_is_evaluated(project, tmp_path):
    shutil.copytree(project / "student", tmp_path / "moved")
    assert evaluate(tmp_path / "moved")[0]["agreement"] == summary(project / "student")["agreement"]


def test_other_data_are_named_by_a_flag_or_in_python(project, tmp_path, monkeypatch):
    """The images of the classes are exchanged, so that a model which is right on the one data set is wrong on the other."""
    (tmp_path / "exchanged/test").mkdir(parents=True)
    for label, other in (("dark", "light"), ("light", "dark")):
        shutil.copytree(project / "photos/test" / label, tmp_path / "exchanged/test" / other)
    monkeypatch.chdir(tmp_path)
    own, _ = evaluate(project / "student")
    result, _ = evaluate(project / "student", "--data.source=imagefolder:exchanged")
    assert result["accuracy"] == pytest.approx(1 - own["accuracy"]) and own["accuracy"] != 0.5
    assert result["agreement"] == own["agreement"], "the agreement does not depend on the labels"
    python = api.evaluate(project / "student", **{"data.source": f"imagefolder:{tmp_path / 'exchanged'}"})
    assert python == api.evaluate(project / "student", data={"source": "imagefolder:exchanged"})
    assert {"run": str(project / "student"), "split": "test", **python} == result


def test_the_training_split_is_not_read_for_the_test_split(project, tmp_path, monkeypatch):
    shutil.copytree(project / "photos/test", tmp_path / "photos/test")
    source = f"--data.source=imagefolder:{tmp_path / 'photos'}"
    assert evaluate(project / "student", source)[0] == evaluate(project / "student")[0]
    assert "data.train_split: " in say("evaluate", project / "student", source, "--split=val", code=2)
    read = []
    original = FolderSource.read
    monkeypatch.setattr(
        FolderSource, "read", lambda self, split, **given: (read.append(split), original(self, split, **given))[1]
    )
    evaluate(project / "student")
    assert read == ["test"]
    evaluate(project / "student", "--split=val")
    assert read == ["test", "train", "test"]


def test_mean_and_std_are_those_of_the_model(project, tmp_path, monkeypatch):
    """No channel statistics are computed, which takes minutes for large data, on either split."""

    def refuse(*args, **kwargs):
        raise AssertionError("computed channel statistics")

    monkeypatch.setattr(datamodule, "channel_statistics", refuse)
    for split in ("test", "val"):
        evaluate(project / "student", f"--split={split}")
    with pytest.raises(AssertionError, match="computed channel statistics"):
        api.train(
            {"data": {"source": f"imagefolder:{project / 'photos'}"}, "tracking": {"wandb": "disabled"}}, run_dir="unused"
        )


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("dark", "light", "gray"), "not expected: 'gray'"),
        (("dark",), "missing here: 'light'"),
    ],
)
def test_a_folder_with_other_classes_is_refused(project, tmp_path, classes, message):
    write_photos(tmp_path / "photos", classes=classes)
    assert message in say("evaluate", project / "student", f"--data.source=imagefolder:{tmp_path / 'photos'}", code=2)


def table(directory, labels, *, label_type=None, label_column="label", splits=("train", "test")):
    directory.mkdir()
    generator = np.random.default_rng(1)
    for split in splits:
        pixels = generator.integers(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8)
        images = [encoded(Image.fromarray(image)) for image in pixels]
        write_parquet(directory, split, images, labels, "image", label_column, label_type)
    return f"--data.source=parquet:{directory}"


def test_labels_of_a_table_are_matched_by_their_names(project, tmp_path):
    source = table(tmp_path / "strings", ["light", "dark", "light", "light"], splits=["test"])
    assert evaluate(project / "teacher", source)[0]["samples"] == 4
    unknown = table(tmp_path / "unknown", ["light", "night"], splits=["test"])
    text = say("evaluate", project / "teacher", unknown, code=2)
    assert "labels that are not classes of the model: 'night'; evaluate on data with the classes 'dark', 'light'" in text
    numbers = table(tmp_path / "numbers", [0, 1, 1], splits=["test"])
    assert "labels that are not classes of the model: '0', '1'" in say("evaluate", project / "teacher", numbers, code=2)


@pytest.mark.parametrize(("labels", "rule"), [([0, 2, 1, 2] * 4, "keep"), ([70, 300, 5, 300] * 4, "remap")])
def test_numbered_classes_need_no_training_split(tmp_path, labels, rule):
    both = table(tmp_path / "both", labels)
    shared = [both, "--data.image_size=16", f"--data.labels={rule}", "--train.max_steps=2", "--train.batch_size=4"]
    in_process.train(tmp_path / "run", *shared)
    shutil.copytree(tmp_path / "both", tmp_path / "copy")
    (tmp_path / "copy/train-00000-of-00001.parquet").unlink()
    expected = evaluate(tmp_path / "run")[0]
    assert evaluate(tmp_path / "run", f"--data.source=parquet:{tmp_path / 'copy'}")[0] == expected
    assert expected["accuracy"] == summary(tmp_path / "run")["accuracy"]


def test_other_classes_of_a_source_that_is_read_completely_are_named(project, tmp_path):
    write_photos(tmp_path / "photos", classes=("dark", "gray"))
    text = say("evaluate", project / "teacher", f"--data.source=imagefolder:{tmp_path / 'photos'}", "--split=val", code=2)
    assert "the classes differ from those in model.json (missing in the data: 'light'; not in the model: 'gray')" in text


def test_classes_in_another_order_are_refused(project, tmp_path):
    write_named(tmp_path, train=["light", "dark"], test=["light", "dark"])
    text = say("evaluate", project / "teacher", f"--data.source=parquet:{tmp_path}", "--data.image_column=img", code=2)
    assert "(class 0 is 'light' in the data and 'dark' in the model)" in text


def test_settings_of_the_run_without_effect_on_other_data_are_left_out(project, tmp_path):
    flags = [
        table(tmp_path / "data", ["dark", "light"] * 4),
        "--data.image_size=16",
        "--train.max_steps=2",
        "--train.batch_size=4",
    ]
    renamed = tmp_path / "data/test-00000-of-00001.parquet"
    renamed.rename(tmp_path / "data/held-00000-of-00001.parquet")
    in_process.train(tmp_path / "run", *flags, "--data.test_split=held")
    write_photos(tmp_path / "photos", splits=["held"])
    assert evaluate(tmp_path / "run", f"--data.source=imagefolder:{tmp_path / 'photos'}")[0]["samples"] == 16
    text = say("evaluate", tmp_path / "run", "--data.source=digits", "--data.test_split=test2", code=2)
    assert "data.test_split: has no effect (with source digits); leave it out (on the command line)" in text


def test_columns_and_splits_of_the_run_without_effect_on_a_folder_are_left_out(tmp_path):
    """Only reading the folder shows that these settings have no effect."""
    own = [
        table(tmp_path / "data", ["dark", "light"] * 8, label_column="kind"),
        "--data.label_column=kind",
        "--data.val_fraction=0.25",
    ]
    in_process.train(tmp_path / "run", *own, "--data.image_size=16", "--train.max_steps=2", "--train.batch_size=4")
    write_photos(tmp_path / "photos", splits=["train", "val", "test"])
    folder = f"--data.source=imagefolder:{tmp_path / 'photos'}"
    assert [evaluate(tmp_path / "run", folder, f"--split={split}")[0]["samples"] for split in ("test", "val")] == [16, 16]
    text = say("evaluate", tmp_path / "run", folder, "--data.label_column=other", code=2)
    assert "data.label_column: has no effect" in text and "its class folders are the labels); leave it out" in text


def test_agreement_on_images_without_labels(project, tmp_path):
    """The weight of the labels, which a training without labels must take away, does not matter here."""
    alone = evaluate(project / "student", "--data.label_column", "null")[0]
    assert alone["agreement"] == evaluate(project / "student")[0]["agreement"] and "accuracy" not in alone
    assert (
        evaluate(project / "student", "--data.label_column=null", f"--teacher.run={project / 'student'}")[0]["agreement"] == 1
    )


def test_the_teacher_can_be_left_out_or_replaced(project, tmp_path):
    shutil.copytree(project / "student", tmp_path / "student")
    own, _ = evaluate(project / "student")
    without, _ = evaluate(project / "student", "--teacher", "null")
    assert without == {name: value for name, value in own.items() if name != "agreement"}
    assert api.evaluate(project / "student", teacher=None) == {k: v for k, v in without.items() if k not in ("run", "split")}
    other, _ = evaluate(project / "student", f"--teacher.run={project / 'student'}")
    assert other["agreement"] == 1.0
    text = say("evaluate", project / "student", "--teacher.run=nowhere", code=2)
    assert "(--teacher.run DIR)" in text and "(--teacher null)" in text and "(--teacher.run null)" in text
    stored, _ = evaluate(project / "student", "--teacher.run=null")
    assert stored["agreement"] == own["agreement"]


def test_the_header_has_the_stated_accuracy_of_the_teacher(project):
    stated = f" ({100 * summary(project / 'teacher')['accuracy']:.2f} % in its own run)"
    assert f"teacher     {project / 'teacher'}{stated}" in evaluate(project / "student")[1].splitlines()
    assert "teacher     not at hand" in evaluate(project / "alone")[1].splitlines()


def test_a_plain_run_gets_an_agreement_with_a_named_teacher(project):
    result, _ = evaluate(project / "teacher", f"--teacher.run={project / 'student'}")
    assert 0 <= result["agreement"] <= 1 and "agreement" not in evaluate(project / "teacher")[0]


def test_a_cache_without_its_teacher_has_no_agreement_on_other_samples(project, tmp_path):
    write_photos(tmp_path / "photos", splits=["test"], count=9)
    result, text = evaluate(project / "alone", f"--data.source=imagefolder:{tmp_path / 'photos'}")
    assert "agreement" not in result and result["samples"] == 18
    assert f"teacher.cache.dir: no agreement, because the cache in {project / 'cache'} holds other outputs: " in text
    assert " of 18 test samples are not those of the cache" in text
    limited, _ = evaluate(project / "alone", "--data.limit_test=5")
    assert limited["samples"] == 5 and limited["agreement"] >= 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--optim.lr=0.1"],
            "--optim.lr: has no effect on an evaluation (only data, teacher, teachers, train.eval_batch_size and",
        ),
        (["--data.mean=[0.5, 0.5, 0.5]"], "--data.mean: has no effect on an evaluation (model.json determines it)"),
        (["--data.views=3"], "--data.views: has no effect on an evaluation (held-out samples are not augmented)"),
        (["--data.suorce=digits"], "--data.suorce: no such setting; did you mean --data.source?"),
        (["--splt=val"], "--splt: no such option; did you mean --split?"),
        (["--dataset=digits"], "--dataset: no such setting; did you mean --data.source?"),
        (["--data.limit_test=many"], "data.limit_test: must be an integer or null, not 'many' (on the command line)"),
        (["--data.limit_test=0"], "data.limit_test: 0 must be at least 1 (on the command line)"),
        (["--data.source=photos"], "data.source: 'photos' must be digits or start with one of"),
    ],
)
def test_wrong_settings_are_refused_as_in_a_training(project, flags, message):
    assert message in say("evaluate", project / "teacher", *flags, code=2)
    assert "2 mistakes" in say("evaluate", project / "teacher", *flags, "--train.epochs=1", code=2)


def test_wrong_settings_are_refused_in_python(project):
    with pytest.raises(kd.UserError, match=r"data.suorce: no such setting"):
        api.evaluate(project / "teacher", **{"data.suorce": "digits"})
    with pytest.raises(kd.UserError, match=r"optim.lr: has no effect on an evaluation"):
        api.evaluate(project / "teacher", optim={"lr": 0.1})
    with pytest.raises(kd.UserError, match=r"absent/config.yaml: is missing: no finished run in this directory"):
        api.evaluate("absent")


def test_help_lists_the_settings_of_an_evaluation_only(capsys):
    text = say("evaluate", "--help")
    for name in ("data.source", "data.test_split", "teacher.run", "teacher.cache.dir", "train.eval_batch_size"):
        assert f"  --{name} " in text
    for name in ("optim.lr", "data.mean", "data.transform", "model.arch", "train.epochs", "teacher.cache.dtype", "config"):
        assert f"--{name} " not in text, name
    assert "losses (" not in text and "optim:" not in text


@pytest.mark.slow
def test_two_processes_evaluate_other_data_alike(project, tmp_path):
    """The shares have 5 and 4 samples, so that with this batch size the batches are the same, and with them all kernels."""
    write_photos(tmp_path / "photos", splits=["test"], count=5)
    argv = ["evaluate", project / "student", f"--data.source=imagefolder:{tmp_path / 'photos'}", "--train.eval_batch_size=5"]
    files = {count: tmp_path / f"{count}.parquet" for count in (1, 2)}
    done = {count: run(*argv, "--data.limit_test=9", f"--out={file}", processes=count).stdout for count, file in files.items()}
    one, two = (json.loads(text.splitlines()[-1]) for text in done.values())
    assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=1e-6)
    assert one == two and one["samples"] == 9 == sum(of_class["samples"] for of_class in one["per_class"].values())
    tables = [pq.read_table(file) for file in files.values()]
    assert tables[0] == tables[1] and len(set(tables[0]["path"].to_pylist())) == 9
    assert tables[0]["index"].to_pylist() == sorted(tables[0]["index"].to_pylist())
    assert [len(text.splitlines()) for text in done.values()] == [1, 1]
