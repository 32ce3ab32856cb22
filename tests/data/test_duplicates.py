"""Duplicates across splits, and images under two labels, each counted in one line of the notices."""

import shutil

import numpy as np
import pytest

from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.dataset import MemoryImages
from kd_accel.data.duplicates import Part, conflicts, leak_notices, repeated, shared_samples
from tests.support import image_files


def images(contents, labels=None):
    """Return images of one color each; equal numbers are equal images."""
    pixels = np.zeros((len(contents), 2, 2, 3), dtype=np.uint8)
    pixels += np.array(contents, dtype=np.uint8)[:, None, None, None]
    labels = np.zeros(len(contents), dtype=np.int64) if labels is None else np.array(labels)
    return Part(MemoryImages(pixels, labels, ["cat", "dog"]), np.arange(len(contents)))


def test_duplicates_are_found_by_content_whatever_their_label():
    train = images([1, 2, 3, 3, 4], [0, 1, 0, 1, 0])
    assert shared_samples(images([9, 3, 1], [1, 0, 1]), train) == [(1, 2), (2, 0)]
    assert shared_samples(images([9, 8]), train) == [] == shared_samples(images([]), train)
    assert (repeated(train), repeated(images([5, 5, 5]))) == (1, 2)
    assert conflicts(train) == [(2, 3)]


def test_an_image_under_three_labels_counts_once_and_unlabeled_images_not_at_all():
    assert len(conflicts(images([7, 7, 7], [0, 1, 2]))) == 1
    assert conflicts(images([7, 7, 7], [0, -1, 0])) == []


def test_only_the_given_samples_are_compared():
    part = images([1, 2, 3, 3], [0, 0, 0, 1])
    assert shared_samples(Part(part.images, np.array([3])), Part(part.images, np.array([0, 1]))) == []
    assert shared_samples(Part(part.images, np.array([3])), Part(part.images, np.array([0, 2]))) == [(3, 2)]


def test_each_kind_of_leak_is_one_line():
    train = images([1, 2, 3, 3], [0, 0, 0, 1])
    lines = leak_notices({"train": train, "val": images([2, 8]), "test": images([1, 3, 7])})
    assert lines == [
        "data: 2 of 3 test samples and 1 of 2 validation samples are also training samples (the same image: test sample 0 = "
        "training sample 0, test sample 1 = training sample 2), so that the accuracy on them is too high",
        "data: 1 image of the training samples occurs under two labels (samples 2 and 3: 'cat' and 'dog')",
    ]
    assert leak_notices({"train": images([1, 2]), "val": images([3]), "test": images([4])}) == []


@pytest.mark.parametrize("memory_limit_mib", [1, 4096])
def test_leaks_of_an_image_folder_are_notices(tmp_path, memory_limit_mib):
    """The same lines in memory and on demand."""
    folder = image_files.write_noise(tmp_path, train=50, test=45)
    shutil.copy(folder / "train" / "cat" / "003.png", folder / "test" / "dog" / "004.png")
    shutil.copy(folder / "train" / "cat" / "005.png", folder / "train" / "dog" / "006.png")
    config = DataConfig(
        source=f"imagefolder:{folder}", image_size=64, memory_limit_mib=memory_limit_mib, val_fraction=0.0, limit_test=None
    )
    data = load_data(config)
    assert data.test.is_in_memory == (memory_limit_mib > 1)
    leak, conflict = data.notices
    assert leak.startswith("data: 1 of 90 test samples are also training samples (the same image: test sample 49 = train")
    assert conflict == "data: 1 image of the training samples occurs under two labels (samples 5 and 56: 'cat' and 'dog')"


def test_data_without_duplicates_have_no_notice():
    assert load_data(DataConfig(source="import:tests.support.models:images", image_size=8)).notices == []
