"""`kd-accel data check`, and a training and a cache that leave out what it has found."""

import json
import os
import shutil

import pytest

from kd_accel.data.encoded import EncodedImages
from tests.support import image_files
from tests.support.in_process import cache, say, train
from tests.support.launching import summary

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def folder(tmp_path):
    folder = image_files.write_noise(tmp_path / "images", train=50, test=45)
    (folder / "train" / "cat" / "007.png").write_bytes(b"broken")
    (folder / "test" / "dog" / "009.png").write_bytes(b"broken")
    shutil.copy(folder / "train" / "cat" / "014.png", folder / "test" / "cat" / "015.png")
    return folder


def flags(folder):
    return [f"--data.source=imagefolder:{folder}", "--data.image_size=64", "--data.memory_limit_mib=1"]


def test_a_check_names_what_it_finds_and_exits_with_2(folder):
    output = say("data", "check", *flags(folder), code=2)
    assert "train: 100 samples, 99 readable\n  sample 7 of the train split" in output
    assert f"{folder}/test/dog/009.png, cannot be decoded (not an image file of a supported format)" in output
    assert "1 of 89 test samples are also training samples" in output
    assert "kd-accel: data.source: 2 of 190 images cannot be decoded; restore or remove them, or set data.on_error" in output


def test_a_check_of_clean_data_exits_with_0(tmp_path):
    folder = image_files.write_noise(tmp_path / "clean", train=3, test=2)
    output = say("data", "check", f"--data.source=imagefolder:{folder}")
    assert output.startswith("train: 6 samples, 6 readable\n") and "samples of a training: 5 train, 1 val, 4 test" in output


def test_a_check_as_json(folder):
    first, _ = say("data", "check", *flags(folder), "--json", code=2).splitlines()
    content = json.loads(first)
    assert content["num_unreadable"] == 2 and list(content["splits"]["test"]["unreadable"]) == ["54"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chekc"], "data 'chekc' is not a command; did you mean check"),
        (["check", "--data.source=imagefolder:nowhere"], "data.source: directory 'nowhere' not found"),
        (["check", "--data.on_error=ignore"], "data.on_error"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    assert message in say("data", *arguments, code=2)


def test_help():
    assert "check" in say("data") and "--data.on_error" in say("data", "check", "--help")


def test_a_training_skips_what_a_check_has_found(folder, tmp_path):
    assert "sample 7 of the train split" in train(tmp_path / "stopped", *flags(folder), code=2)
    output = train(tmp_path / "run", *flags(folder), "--data.on_error=skip", "--train.epochs=1")
    assert output.count("data.on_error: skip leaves out 1 of ") == 2
    data = summary(tmp_path / "run")["data"]
    assert data["test"]["samples"] == 89 and data["train_samples"] + data["val_samples"] == 99
    assert data["left_out"] == {"val": [7]}


def test_a_file_that_goes_bad_is_a_difference_by_name(folder, tmp_path):
    skip = [*flags(folder), "--data.on_error=skip"]
    train(tmp_path / "run", *skip, "--checkpoint.stop_after_steps=2")
    (folder / "train" / "dog" / "011.png").write_bytes(b"broken")
    output = train(tmp_path / "run", *skip, code=2)
    assert "was trained on other data (" in output
    assert "left_out: {'val': [7]} in the run, {'train': [61], 'val': [7]} now" in output


def test_a_cache_of_a_data_set_with_skipped_images(folder, tmp_path):
    """It serves the same selection alone; another one is refused by the setting."""
    cached = ["--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path}/cache", "--teacher.cache.dtype=float32"]
    train(tmp_path / "teacher", *flags(folder), "--data.on_error=skip", "--train.epochs=1")
    teacher = [f"--teacher.run={tmp_path}/teacher", "--teacher.min_accuracy=null", "--data.views=1"]
    arguments = [*flags(folder), *teacher, *cached]
    cache("build", *arguments, "--data.on_error=skip")
    train(tmp_path / "student", *arguments, "--data.on_error=skip", "--train.epochs=1")
    image_files.color(3).save(folder / "train" / "cat" / "007.png")
    output = train(tmp_path / "other", *arguments, "--data.on_error=skip", code=2)
    assert "data.on_error: [7] in the cache, none now (samples that cannot be decoded and are left out)" in output


def test_a_verification_reads_every_image_again_and_names_what_has_changed(folder, tmp_path, monkeypatch):
    reads, read = [], EncodedImages._read
    monkeypatch.setattr(EncodedImages, "_read", lambda self, cell: (reads.append(cell), read(self, cell))[1])
    train(tmp_path / "teacher", *flags(folder), "--data.on_error=skip", "--train.epochs=1")
    arguments = [*flags(folder), f"--teacher.run={tmp_path}/teacher", "--teacher.min_accuracy=null", "--data.views=1"]
    arguments += ["--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path}/cache", "--data.on_error=skip"]
    cache("build", *arguments)
    reads.clear()
    cache("verify", *arguments)
    assert {cell["path"] for cell in reads} == {str(file) for file in folder.rglob("*.png")}
    file = folder / "train" / "cat" / "004.png"
    content, state = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert "was built from other data: data.source or data.train_split: 1 of " in cache("verify", *arguments, code=2)


def test_a_check_counts_the_labeled_samples_of_each_class():
    output = say("data", "check", "--data.source=import:tests.support.models:partly_labeled_images", "--data.val_fraction=0")
    assert "4 classes: least 'green' (17), most 'red' (18) training samples" in output
    assert "91 of 160 samples of the train split have no label" in output


def test_a_check_of_data_without_labels_has_the_classes_of_the_teacher(teacher_run):
    flags = ["--data.source=import:tests.support.models:unlabeled_images", "--data.label_column=null", "--data.image_size=8"]
    output = say("data", "check", *flags, f"--teacher.run={teacher_run}", "--distill.label_weight=0")
    assert "4 classes: " in output and "; without any: 4" in output
