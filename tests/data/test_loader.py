"""Tests of the loaders: sample order on any number of processes, one visit per sample, and untouched global generators."""

import random

import numpy as np
import pytest
import torch

from kd_accel.data import datamodule
from kd_accel.data.batches import BatchLoader
from kd_accel.data.datamodule import DataModule
from kd_accel.data.decode import Decoder
from kd_accel.data.loader import EvalLoader, TrainLoader, epoch_order
from kd_accel.data.sources import MemoryImages
from kd_accel.data.splits import SplitSamples, channel_statistics
from kd_accel.data.transforms import CropFlip
from kd_accel.errors import UserError


def image_set(samples=100, size=8):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (samples, size, size, 3), dtype=np.uint8)
    return MemoryImages(images, np.arange(samples) % 5, list("abcde"))


def batch_loader(images=None, num_workers=0):
    images = images or image_set()
    by_split = {"train": images, "val": images, "test": images}
    return BatchLoader(by_split, CropFlip(8, padding=1), num_workers=num_workers)


def loader(images=None, samples=None, num_workers=0, **settings):
    samples = np.arange(10, 90) if samples is None else samples
    return TrainLoader(batch_loader(images, num_workers), samples=samples, **{"batch_size": 16, **settings})


def indices_of(batches):
    return [batch.index.tolist() for batch in batches]


@pytest.mark.parametrize(("world_size", "accum"), [(1, 4), (2, 2), (4, 1), (2, 1)])
def test_a_step_has_the_same_samples_for_any_number_of_processes(world_size, accum):
    expected = [step[0].index.tolist() for step in loader().epoch(3)]
    shares = [loader(rank=rank, world_size=world_size, grad_accum_steps=accum) for rank in range(world_size)]
    steps = zip(*(share.epoch(3) for share in shares), strict=True)
    assert [sum((indices for rank in ranks for indices in indices_of(rank)), []) for ranks in steps] == expected


def test_an_epoch_can_start_at_any_step():
    steps = [indices_of(step) for step in loader().epoch(2)]
    assert len(steps) == 5
    assert [indices_of(step) for step in loader().epoch(2, start_step=3)] == steps[3:]
    assert list(loader().epoch(2, start_step=5)) == []


def test_the_order_is_a_function_of_seed_and_epoch():
    samples = np.arange(50)
    orders = {(seed, epoch): tuple(epoch_order(samples, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert all(sorted(order) == list(samples) for order in orders.values())


def test_the_view_is_the_epoch_modulo_the_number_of_views():
    views = [next(loader(views=2).epoch(epoch))[0].view for epoch in range(4)]
    assert views == [0, 1, 0, 1]
    assert [next(loader().epoch(epoch))[0].view for epoch in range(3)] == [0, 1, 2]


def test_a_batch_contains_the_view_of_its_samples():
    images = image_set()
    batch = next(loader(images).epoch(1))[0]
    samples = batch.index.numpy()
    expected = CropFlip(8, padding=1)(images.pixels(samples), samples, 1)
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), expected)
    assert np.array_equal(batch.labels.numpy(), images.labels[samples])
    assert batch.images.is_contiguous()


def test_workers_and_stored_images_give_the_same_batches():
    images = image_set()
    samples = np.arange(10, 90)
    stored = torch.from_numpy(images.pixels(samples)).permute(0, 3, 1, 2)
    with_stored = loader(images)
    with_stored.keep_images(stored)
    plain, workers, device = (
        list(own.epoch(1, start_step=2)) for own in (loader(images), loader(images, num_workers=2), with_stored)
    )
    for one, two, three in zip(plain, workers, device, strict=True):
        for other in (two[0], three[0]):
            assert torch.equal(one[0].images, other.images)
            assert torch.equal(one[0].index, other.index)
            assert torch.equal(one[0].labels, other.labels)


class Encoded(MemoryImages):
    """Image set that is decoded on demand."""

    is_in_memory = False


@pytest.mark.parametrize("kind", [MemoryImages, Encoded])
def test_images_copied_to_a_device_are_those_of_the_samples(kind, monkeypatch):
    monkeypatch.setattr(datamodule, "_COPIED_SAMPLES", 7)
    own = image_set()
    samples = np.arange(10, 90)
    images = kind(own.pixels(np.arange(100)), own.labels, own.label_names)
    splits = SplitSamples(samples, samples[:0], samples[:0])
    transform = CropFlip(8, padding=1)
    data = DataModule(images, images, images, splits, [0.5] * 3, [0.5] * 3, transform, num_workers=1, decoder=Decoder(8))
    copied = datamodule.images_on(torch.device("cpu"), data)
    assert copied.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(copied.permute(0, 2, 3, 1).numpy(), images.pixels(samples))


@pytest.mark.parametrize(("needed_mib", "fits"), [(100, True), (101, False)])
def test_images_fit_on_a_gpu_in_half_of_its_free_memory(monkeypatch, needed_mib, fits):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (200 * 2**20, 80 * 2**30))
    assert datamodule.fits_on_gpu(needed_mib * 2**20, torch.device("cuda")) == fits


def test_loaders_do_not_use_global_generators():
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    for workers in (0, 1):
        list(loader(num_workers=workers).epoch(0))
        list(EvalLoader(batch_loader(num_workers=workers), "test", samples=np.arange(9), batch_size=4))
    assert states() == before


class Unreadable(MemoryImages):
    """Image set whose samples cannot be decoded."""

    def pixels(self, samples):
        raise UserError(f"data.source: sample {samples[0]} cannot be decoded; fix or remove the image")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_a_user_error_with_and_without_workers(workers):
    images = Unreadable(np.zeros((40, 8, 8, 3), dtype=np.uint8), np.zeros(40, dtype=np.int64), ["a"])
    for batches in (
        loader(images, np.arange(40), num_workers=workers).epoch(0),
        EvalLoader(batch_loader(images, workers), "val", samples=np.arange(9), batch_size=4),
    ):
        with pytest.raises(UserError) as raised:
            list(batches)
        assert str(raised.value).startswith("data.source: sample")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_uses_each_sample_once(world_size):
    samples = np.array([3, 1, 4, 15, 9])
    settings = {"samples": samples, "batch_size": 2, "world_size": world_size}
    shares = [EvalLoader(batch_loader(), "test", rank=rank, **settings) for rank in range(world_size)]
    assert sum((batch.index.tolist() for share in shares for batch in share), []) == samples.tolist()
    assert all(len(list(share)) == len(share) for share in shares)


def test_batch_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="16 must be a multiple of 3 .3 processes x 1 acc"):
        loader(world_size=3)
    with pytest.raises(UserError, match="16 is more than the 10 training samples"):
        loader(samples=np.arange(10))


def test_channel_statistics_equal_those_of_all_pixels():
    images, samples = image_set(), np.arange(20, 70)
    mean, std = channel_statistics(images, samples)
    values = images.pixels(samples).reshape(-1, 3) / 255
    assert mean == pytest.approx(values.mean(0).tolist(), rel=1e-12)
    assert std == pytest.approx(values.std(0).tolist(), rel=1e-9)
