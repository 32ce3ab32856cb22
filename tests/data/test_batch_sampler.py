"""`EpochBatchSampler`: the batches of the training loader on each process, also balanced ones, and wrong arguments."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import kd_accel as kd

SIZE = 12
IMAGES = np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def digits():
    return kd.ImageDataset("digits", limit_train=40, limit_test=30)


def wrapped(pairs):
    return kd.ImageDataset(list(pairs), image_size=SIZE, val_fraction=0.0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_sampled_batches_equal_those_of_the_training_loader(digits, world_size):
    views = kd.ViewDataset(digits, kd.transforms.Crop(32), num_views=2, view_seed=3)
    visited = []
    for rank in range(world_size):
        split = {"batch_size": 12, "seed": 4, "rank": rank, "world_size": world_size}
        sampler, expected = kd.EpochBatchSampler(views, **split), views.module.train_loader(**split)
        loader = DataLoader(views, batch_sampler=sampler)
        assert len(loader) == len(sampler) == expected.steps_per_epoch == 3
        for epoch in range(3):
            sampler.set_epoch(epoch)
            views.set_epoch(epoch)
            for batch, (own,) in zip(loader, expected.epoch(epoch), strict=True):
                assert torch.equal(batch["index"], own.index) and torch.equal(batch["label"], own.labels)
                assert torch.equal(batch["image"], own.images) and batch["view"].unique().tolist() == [own.view]
                visited.append((epoch, *batch["index"].tolist()))
    orders = [{index for at, *indices in visited if at == epoch for index in indices} for epoch in range(3)]
    assert [len(order) for order in orders] == [36, 36, 36] and orders[0] != orders[1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: 0 must be a positive multiple of world_size"),
        ({"batch_size": 41}, ValueError, "batch_size: 41 is more than the 40 training samples"),
        ({"world_size": 3}, ValueError, r"batch_size: 8 must be a positive multiple of world_size \(3\)"),
        ({"rank": 1}, ValueError, r"rank: 1 must be at least 0 and below world_size \(1\)"),
        ({"views": [1]}, TypeError, "views: must be a ViewDataset, not list"),
    ],
)
def test_invalid_arguments_of_a_sampler_are_refused(digits, arguments, error, message):
    views = kd.ViewDataset(digits, kd.transforms.Crop(32))
    with pytest.raises(error, match=message):
        kd.EpochBatchSampler(**{"views": views, "batch_size": 8, **arguments})


def test_balanced_batches_equal_those_of_a_run():
    labels = [0] * 12 + [1] * 4
    data = wrapped(list(zip(IMAGES[:16], labels, strict=True)))
    views = kd.ViewDataset(data, kd.transforms.CropFlip(SIZE))
    sampler = kd.EpochBatchSampler(views, batch_size=8, is_balanced=True)
    expected = views.module.train_loader(batch_size=8, is_balanced=True)
    drawn = []
    for positions, (batch,) in zip(sampler, expected.epoch(0), strict=True):
        assert views.module.training_samples[positions].tolist() == batch.index.tolist()
        drawn += batch.labels.tolist()
    assert sorted(drawn) == [0] * 8 + [1] * 8
    even = kd.ViewDataset(wrapped(list(zip(IMAGES[:4], [0, 1, 0, 1], strict=True))), kd.transforms.CropFlip(SIZE))
    with pytest.raises(ValueError, match="is_balanced: True has no effect"):
        kd.EpochBatchSampler(even, batch_size=2, is_balanced=True)
