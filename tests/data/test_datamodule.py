"""Tests of the data module: loaders, batches, sample digests, and images on a GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kd_accel.config.schema import DataConfig
from kd_accel.data.batches import BatchLoader
from kd_accel.data.datamodule import DataModule, keep_images_on_gpu, load_data
from kd_accel.data.dataset import MemoryImages
from kd_accel.data.loader import TrainLoader
from kd_accel.data.transforms import CropFlip
from kd_accel.errors import UserError

SETTINGS = {"source": "import:tests.support.models:images", "image_size": 8, "transform": "crop_flip"}


@pytest.fixture(scope="module")
def data() -> DataModule:
    return load_data(DataConfig(**SETTINGS, views=3, view_seed=5, limit_train=24))


def plain(images, indices):
    """Return stored images as [n, 3, S, S]."""
    return torch.from_numpy(images.pixels(indices)).permute(0, 3, 1, 2)


def test_settings_reach_the_module():
    data = load_data(DataConfig(**{**SETTINGS, "transform": "none"}, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], views=7))
    assert (data.mean, data.std, data.num_views) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 1)
    data = load_data(DataConfig(**SETTINGS, views=7, view_seed=3, num_workers=2))
    assert (data.num_views, data.num_workers) == (7, 2)
    assert (data.transform.operations, data.transform.image_size) == (CropFlip(8).operations, 8)
    assert data.transform.view_seed == 3
    assert data.label_names == data.train.label_names


def test_training_batches_are_views_of_the_training_samples(data):
    loader = data.train_loader(batch_size=8, seed=4)
    batches = BatchLoader({"train": data.train}, data.transform)
    own = TrainLoader(batches, samples=data.splits.train, batch_size=8, seed=4, views=3)
    for epoch in (1, 3):
        for (batch,), (expected,) in zip(loader.epoch(epoch), own.epoch(epoch), strict=True):
            assert batch.view == epoch % 3 and torch.equal(batch.index, expected.index)
            assert torch.equal(batch.images, expected.images)
            assert torch.equal(batch.images, data.view_batch(batch.index.numpy(), batch.view).images)


def test_ranks_and_accumulation_steps_partition_each_batch(data):
    expected = [step[0].index.tolist() for step in data.train_loader(batch_size=8).epoch(0)]
    ranks = [data.train_loader(batch_size=8, rank=rank, world_size=2, grad_accum_steps=2) for rank in (0, 1)]
    steps = zip(*(loader.epoch(0) for loader in ranks), strict=True)
    assert [[i for rank in step for batch in rank for i in batch.index.tolist()] for step in steps] == expected
    with pytest.raises(UserError, match="train.batch_size: 8 must be a multiple of 3 .3 processes x 1 acc"):
        data.train_loader(batch_size=8, world_size=3)


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_batches_are_complete_and_not_augmented(data, split):
    images, indices = (data.train, data.splits.val) if split == "val" else (data.test, data.splits.test)
    shares = [list(data.eval_loader(split, batch_size=2, rank=rank, world_size=2)) for rank in (0, 1)]
    batches = [batch for share in shares for batch in share]
    assert len(indices) and torch.cat([batch.index for batch in batches]).tolist() == indices.tolist()
    assert torch.equal(torch.cat([batch.images for batch in batches]), plain(images, indices))
    assert torch.cat([batch.labels for batch in batches]).tolist() == images.labels[indices].tolist()


def test_batches_have_the_samples_and_the_view_of_their_share(data):
    train, test = data.splits.train[:3], data.splits.test[:3]
    first, second = data.batches("train", [(train, 2), (train, 0)])
    assert (first.view, second.view) == (2, 0) and not torch.equal(first.images, second.images)
    for batch in (first, second):
        assert torch.equal(batch.images, data.view_batch(train, batch.view).images)
        assert torch.equal(batch.labels, torch.from_numpy(data.train.labels[train]))
    (batch,) = data.batches("test", [(test, 0)])
    assert torch.equal(batch.images, plain(data.test, test)) and batch.index.tolist() == test.tolist()
    (batch,) = data.batches("val", [(data.splits.val, 0)])
    assert torch.equal(batch.images, plain(data.train, data.splits.val))


def test_covered_samples_have_the_digests_of_their_images(data):
    covered = data.covered_samples()
    assert list(covered) == ["train", "val", "test"]
    for split, images in (("train", data.train), ("val", data.train), ("test", data.test)):
        indices, digests = covered[split]
        assert indices.tolist() == getattr(data.splits, split).tolist()
        assert np.array_equal(digests, images.digests(indices)) and digests.dtype == np.uint64


def test_fingerprint_fields_identify_the_samples(data):
    fields = data.fingerprint_fields()
    assert fields["train_samples"] == 24 == len(data.splits.train)
    assert fields["val_samples"] == len(data.splits.val)
    assert fields["label_names"] == list(data.label_names)
    assert load_data(DataConfig(**SETTINGS, views=9, limit_train=24)).fingerprint_fields() == fields
    assert load_data(DataConfig(**SETTINGS, limit_train=23)).fingerprint_fields()["digest"] != fields["digest"]
    # No training depends on the test samples.
    fewer = load_data(DataConfig(**SETTINGS, limit_train=24, limit_test=3))
    assert fewer.fingerprint_fields() == fields and fewer.fields_of_test_split() != data.fields_of_test_split()


def test_a_sample_whose_image_may_be_replaced_still_counts_by_index_and_label(data):
    train, changed = data.splits.train, data.train.pixels(np.arange(data.train.num_samples)).copy()
    changed[train[5]] = 0
    other = replace(data, train=MemoryImages(changed, data.train.labels, data.label_names))
    assert other.fingerprint_fields() != data.fingerprint_fields()
    fields = [each.fingerprint_fields(replaceable=[int(train[5])]) for each in (data, other)]
    assert fields[0] == fields[1] and fields[0]["replaceable"] == [train[5]]
    assert other.fingerprint_fields(replaceable=[int(train[6])]) != data.fingerprint_fields(replaceable=[int(train[6])])


def test_images_stay_in_host_memory_without_a_gpu(data):
    loader = data.train_loader(batch_size=8)
    keep_images_on_gpu(loader, data, torch.device("cpu"))
    assert loader._device_images is None
