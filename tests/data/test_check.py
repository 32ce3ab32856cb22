"""Check of a data set, and images that are left out (`data.on_error: skip`)."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from kd_accel.cache.compatibility import data_fields
from kd_accel.config.schema import DataConfig
from kd_accel.data.check import check_data
from kd_accel.data.datamodule import load_data
from kd_accel.data.encoded import EncodedImages
from kd_accel.errors import UserError
from tests.support import image_files

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def clean(tmp_path):
    return image_files.write_noise(tmp_path / "images", train=50, test=45)


@pytest.fixture
def folder(clean):
    """Images with one oddity of each kind."""
    (clean / "train" / "cat" / "007.png").write_bytes(b"broken")
    (clean / "train" / "dog" / "008.png").write_bytes((clean / "train" / "dog" / "008.png").read_bytes()[:60])
    (clean / "test" / "dog" / "009.png").write_bytes(b"")
    (clean / "train" / "cat" / "notes.txt").write_text("")
    Image.new("RGB", (8, 8), (3, 3, 3)).save(clean / "train" / "cat" / "011.png")
    shutil.copy(clean / "train" / "cat" / "012.png", clean / "train" / "cat" / "013.png")
    shutil.copy(clean / "train" / "cat" / "014.png", clean / "test" / "cat" / "015.png")
    return clean


def settings(folder, *, is_in_memory=False, **changes):
    limit = 4096 if is_in_memory else 1
    return DataConfig(source=f"imagefolder:{folder}", image_size=64, memory_limit_mib=limit, **changes)


@pytest.mark.parametrize("is_in_memory", [False, True])
def test_a_check_lists_every_oddity(folder, is_in_memory):
    report = check_data(settings(folder, is_in_memory=is_in_memory))
    train, test = report.splits["train"], report.splits["test"]
    assert (train.samples, list(train.unreadable), train.constant, train.repeated) == (100, [7, 58], [11], 1)
    assert (test.samples, list(test.unreadable), test.constant, test.repeated) == (90, [54], [], 0)
    assert "cat/007.png, cannot be decoded (not an image file" in train.unreadable[7]
    assert report.num_unreadable == 3 and report.used_samples == {"train": 89, "val": 9, "test": 89}
    assert sum(report.classes.values()) == 89
    text = report.as_text()
    for line in (
        "train: 100 samples, 98 readable",
        "  1 of one color: samples 11",
        "  1 repeat an earlier image of the split",
        "1 file left out (files of type .txt)",
        "1 of 89 test samples are also training samples",
    ):
        assert line in text


def test_the_statistics_are_those_of_all_readable_images(clean):
    on_demand, in_memory = (check_data(settings(clean, is_in_memory=each)).splits["train"] for each in (False, True))
    pixels = load_data(settings(clean, is_in_memory=True)).train.pixels(np.arange(100)) / 255
    for report in (on_demand, in_memory):
        assert np.allclose(report.mean, pixels.mean(axis=(0, 1, 2))) and np.allclose(report.std, pixels.std(axis=(0, 1, 2)))


def test_a_check_finds_bytes_that_changed_under_the_same_size_and_time(clean):
    load_data(settings(clean))
    assert check_data(settings(clean)).splits["train"].changed == []
    file = clean / "train" / "cat" / "004.png"
    content, state = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    report = check_data(settings(clean))
    assert report.splits["train"].changed == [4] and "  1 changed under the same size and time: samples 4" in report.as_text()
    assert check_data(settings(clean)).splits["train"].changed == []


@pytest.mark.parametrize("is_in_memory", [False, True])
def test_skipped_images_are_left_out_of_every_split_and_counted(folder, is_in_memory):
    data = load_data(settings(folder, is_in_memory=is_in_memory, on_error="skip"))
    left_out = {split: samples.tolist() for split, samples in data.left_out.items()}
    assert sorted(left_out["train"] + left_out["val"]) == [7, 58] and left_out["test"] == [54]
    for split, samples in data.splits.by_name().items():
        assert not set(samples.tolist()) & set(left_out[split])
    skipped = [notice for notice in data.notices if notice.startswith("data.on_error: skip leaves out ")]
    assert len(skipped) == sum(1 for samples in left_out.values() if samples)
    assert any("1 of 90 test samples (sample 54 of the test split" in line for line in skipped)
    data.train.pixels(data.splits.train)


def test_a_check_serves_the_trainings_after_it(folder, monkeypatch):
    check_data(settings(folder))
    config = settings(folder, on_error="skip", mean=[0.5] * 3, std=[0.5] * 3)
    monkeypatch.setattr(EncodedImages, "_read", lambda self, cell: pytest.fail("an image is read"))
    assert len(load_data(config).splits.test) == 89


def test_without_a_check_a_training_makes_its_own(folder, monkeypatch):
    config = settings(folder, on_error="skip", mean=[0.5] * 3, std=[0.5] * 3)
    first = load_data(config)
    monkeypatch.setattr(EncodedImages, "_read", lambda self, cell: pytest.fail("an image is read"))
    assert load_data(config).fingerprint_fields() == first.fingerprint_fields()


def test_the_other_samples_stay_in_their_splits(folder, clean, tmp_path):
    """The choice of the validation samples does not depend on those that are left out."""
    whole = load_data(settings(image_files.write_noise(tmp_path / "whole", train=50, test=45))).splits.by_name()
    for split, samples in load_data(settings(folder, on_error="skip")).splits.by_name().items():
        assert samples.tolist() == [sample for sample in whole[split] if sample not in ([54] if split == "test" else [7, 58])]


def test_what_is_left_out_identifies_the_data_of_a_run_and_of_a_cache(folder, clean):
    fields, data = {}, {}
    for name, on_error in (("broken", "skip"), ("restored", "stop"), ("skipping", "skip")):
        if name == "restored":
            image_files.noise(np.random.default_rng(5)).save(folder / "train" / "cat" / "007.png")
            image_files.noise(np.random.default_rng(6)).save(folder / "train" / "dog" / "008.png")
            image_files.noise(np.random.default_rng(7)).save(folder / "test" / "dog" / "009.png")
        data[name] = load_data(settings(folder, on_error=on_error))
        fields[name] = data[name].fingerprint_fields()
    assert sorted(sample for samples in fields["broken"]["left_out"].values() for sample in samples) == [7, 58]
    assert data_fields(data["broken"])["data"]["left_out"] == {"train": [7, 58], "test": [54]}
    # Without such images both values of the setting mean the same data.
    assert "left_out" not in fields["restored"] and fields["restored"] == fields["skipping"]
    assert data_fields(data["restored"]) == data_fields(data["skipping"])


def test_a_bad_test_image_does_not_change_the_data_of_a_training(clean):
    before = load_data(settings(clean, on_error="skip")).fingerprint_fields()
    (clean / "test" / "cat" / "002.png").write_bytes(b"broken")
    assert load_data(settings(clean, on_error="skip")).fingerprint_fields() == before


@pytest.mark.parametrize("is_in_memory", [False, True])
def test_data_without_a_readable_training_image_are_refused(tmp_path, is_in_memory):
    folder = image_files.write_noise(tmp_path / "images", train=50, test=1)
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match="data.on_error: skip leaves out all training samples"):
        load_data(settings(folder, is_in_memory=is_in_memory, on_error="skip"))


@pytest.mark.parametrize("is_in_memory", [False, True])
def test_by_default_an_unreadable_image_is_an_error_by_name(folder, is_in_memory):
    config = settings(folder, is_in_memory=is_in_memory)
    with pytest.raises(UserError, match=r"sample (7|58) of the train split, .*00[78].png, cannot be decoded .*; restore or r"):
        load_data(config)


def test_data_of_user_code_are_checked_too():
    report = check_data(DataConfig(source="import:tests.support.models:images", image_size=8))
    assert report.num_unreadable == 0
    assert {name: split.samples for name, split in report.splits.items()} == {"train": 160, "test": 41}
