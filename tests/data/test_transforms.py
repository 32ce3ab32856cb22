"""Tests of the views: pure functions of (view_seed, view, index), equal on each device, with golden values."""

import hashlib
import json

import numpy as np
import pytest
import torch

from kd_accel.config.transform_schema import transform_config
from kd_accel.data import transforms
from kd_accel.data.hashing import hash_words, hashed_order
from kd_accel.data.transforms import VIEWS_VERSION, ViewTransform, operations_of

TRANSFORMS = {
    "none": [],
    "crop": [transforms.RandomCrop(padding=4)],
    "flip": [transforms.RandomHorizontalFlip()],
    "crop_flip": [transforms.RandomCrop(padding=4), transforms.RandomHorizontalFlip()],
    "flip_crop": [transforms.RandomHorizontalFlip(p=0.3), transforms.RandomCrop(padding=2)],
    "resized_crop": [transforms.RandomResizedCrop()],
    "rand_augment": [transforms.RandAugment()],
    "trivial_augment": [transforms.TrivialAugmentWide()],
    "color_jitter": [transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)],
    "erasing": [transforms.RandomErasing()],
    "crop_flip_erasing": [
        transforms.RandomCrop(padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.RandomErasing(p=0.7, value=[1, 2, 3]),
    ],
    "erasing_crop": [transforms.RandomErasing(), transforms.RandomCrop(padding=4)],
    "all": [
        transforms.RandomResizedCrop(interpolation="bicubic"),
        transforms.RandomHorizontalFlip(),
        transforms.RandAugment(num_ops=3),
        transforms.ColorJitter(hue=[-0.1, 0.2]),
        transforms.RandomCrop(padding=1),
        transforms.RandomErasing(p=0.25, value=[255, 0, 0]),
    ],
}
ON_DEVICE = ["none", "crop", "flip", "crop_flip", "flip_crop", "erasing", "crop_flip_erasing"]
SAMPLES = np.arange(100, 164)


def pixels(samples=SAMPLES):
    """Return images uint8 [n, 32, 32, 3] that depend only on their sample index."""
    across, down = np.meshgrid(np.arange(32), np.arange(32))
    images = [
        np.stack([across * 7 + sample, down * 5 + 3 * sample, across * down + sample], axis=-1) % 256 for sample in samples
    ]
    return np.stack(images).astype(np.uint8)


def transform(name, size=32, **settings):
    return ViewTransform(tuple(TRANSFORMS[name]), size, **settings)


def channels_first(images):
    """Return the same array with channels-first strides, as `MemoryImages` stores images."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_views_do_not_depend_on_order_batch_or_global_generators(name):
    views = transform(name)
    expected = views(pixels(), SAMPLES, 3)
    torch.manual_seed(1)
    np.random.seed(1)
    shuffled = np.random.permutation(len(SAMPLES))
    assert np.array_equal(views(pixels(SAMPLES[shuffled]), SAMPLES[shuffled], 3), expected[shuffled])
    assert np.array_equal(views(pixels(SAMPLES[7:8]), SAMPLES[7:8], 3), expected[7:8])
    assert expected.shape == (64, 32, 32, 3)
    assert expected.dtype == np.uint8


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "none"])
def test_views_depend_on_view_seed_and_sample(name):
    images = np.repeat(pixels(SAMPLES[:1]), 64, axis=0)
    views = transform(name)(images, SAMPLES, 0)
    assert len({view.tobytes() for view in views}) >= (2 if name == "flip" else 10)
    assert not np.array_equal(views, transform(name)(images, SAMPLES, 1))
    assert not np.array_equal(views, transform(name, view_seed=1)(images, SAMPLES, 0))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_views_are_copies(name):
    for images in (pixels(), channels_first(pixels())):
        before = images.copy()
        transform(name)(images, SAMPLES, 0)[:] = 0
        assert np.array_equal(images, before)


@pytest.mark.parametrize("order", [("crop",), ("flip",), ("crop", "flip"), ("flip", "crop"), ()])
@pytest.mark.parametrize("size", [1, 8, 32])
def test_crops_keep_the_memory_format_and_follow_the_hash_words(order, size):
    padding, p = 4, 0.3
    images = np.random.default_rng(size).integers(0, 256, (64, size, size, 3), dtype=np.uint8)
    known = {"crop": transforms.RandomCrop(padding=padding), "flip": transforms.RandomHorizontalFlip(p=p)}
    function = ViewTransform(tuple(known[name] for name in order), size)
    crop_words, flip_words = (hash_words((11, 0, 3, key), SAMPLES, count).tolist() for key, count in ((1, 2), (2, 1)))
    expected = []
    for image, crop_word, flip_word in zip(images, crop_words, flip_words, strict=True):
        top, left = ((word >> 32) % (2 * padding + 1) for word in crop_word)
        view = image
        for name in order:
            if name == "crop":
                border = np.pad(view, ((padding, padding), (padding, padding), (0, 0)))
                view = border[top : top + size, left : left + size]
            elif (flip_word[0] >> 11) / 2**53 < p:
                view = view[:, ::-1]
        expected.append(view)
    last, first = function(images, SAMPLES, 3), function(channels_first(images), SAMPLES, 3)
    assert last.flags.c_contiguous
    assert first.transpose(0, 3, 1, 2).flags.c_contiguous
    assert np.array_equal(last, expected)
    assert np.array_equal(first, expected)


def test_an_operation_draws_the_same_words_next_to_others():
    """So that a transform can be added without other crops: an ablation compares equal views."""
    both = ViewTransform((transforms.RandomErasing(p=1.0), transforms.RandomHorizontalFlip(p=1.0)), 32)
    alone = ViewTransform((transforms.RandomErasing(p=1.0),), 32)
    assert np.array_equal(both(pixels(), SAMPLES, 1), alone(pixels(), SAMPLES, 1)[:, :, ::-1])


GOLDEN = {
    "none": "f2bdea2aa852099d",
    "crop": "d239dc14e2e568ef",
    "flip": "f9168e749b0e6fa0",
    "crop_flip": "b3642e81218f828a",
    "flip_crop": "9f4e3aba51fb301c",
    "resized_crop": "ea2386178bfb5977",
    "rand_augment": "67f3aa36714c8771",
    "trivial_augment": "fc1f5e7c12805b24",
    "color_jitter": "b55241ff8a5b9dc4",
    "erasing": "7f512d25995f56bb",
    "crop_flip_erasing": "4d8dbd7f2cf209e8",
    "erasing_crop": "dd2244ee3e4dff8d",
    "all": "196cd5123aa86bf5",
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_golden_values(name):
    """Other pixels require a new VIEWS_VERSION: a cached teacher output is valid only for the pixels it was computed on."""
    assert VIEWS_VERSION == 2
    for images in (pixels(), channels_first(pixels())):
        views = transform(name, view_seed=5)(images, SAMPLES, 2)
        assert hashlib.sha256(views.tobytes()).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_views_on_a_device_equal_those_in_host_memory(name):
    views = transform(name)
    assert views.supports_device == (name in ON_DEVICE)
    if views.supports_device:
        stored = torch.from_numpy(pixels()).permute(0, 3, 1, 2)
        on_device = views.on_device(stored, SAMPLES, 3)
        assert np.array_equal(on_device.permute(0, 2, 3, 1).numpy(), views(pixels(), SAMPLES, 3))
        assert on_device.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(views.on_device(stored.contiguous(), SAMPLES, 3), on_device)
        assert stored.data_ptr() != on_device.data_ptr() and torch.equal(stored, torch.from_numpy(pixels()).permute(0, 3, 1, 2))


def test_crops_have_all_offsets_with_equal_probability():
    image = np.arange(1, 32 * 32 + 1).reshape(32, 32, 1).repeat(3, axis=2).astype(np.uint8)
    samples = np.arange(4000)
    views = ViewTransform((transforms.RandomCrop(padding=2),), 32)(np.repeat(image[None], len(samples), axis=0), samples, 0)
    border = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    crops = {border[top : top + 32, left : left + 32].tobytes(): (top, left) for top in range(5) for left in range(5)}
    counts = np.bincount([5 * crops[view.tobytes()][0] + crops[view.tobytes()][1] for view in views], minlength=25)
    assert counts.min() > 100
    assert counts.max() < 230


def test_presets_are_the_operations_of_their_names():
    assert operations_of(transform_config("crop_flip")) == transforms.CropFlip(32).operations
    assert operations_of(transform_config("none")) == transforms.Identity(32).operations == ()
    names = [type(operation).__name__ for operation in operations_of(transform_config("trivial_augment"))]
    assert names == ["RandomCrop", "RandomHorizontalFlip", "TrivialAugmentWide"]
    names = [type(operation).__name__ for operation in operations_of(transform_config("resized_crop_flip"))]
    assert names == ["RandomResizedCrop", "RandomHorizontalFlip"]


def test_fingerprint_fields_are_the_settings_with_an_effect():
    fields = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.RandomCrop(padding=4)], image_size=32)
    assert fields.fingerprint_fields() == {
        "transform": {"random_horizontal_flip": {"p": 0.5}, "random_crop": {"padding": 4}},
        "version": 2,
        "image_size": 32,
        "view_seed": 0,
        "order": ["random_horizontal_flip", "random_crop"],
    }
    identity = ViewTransform((), 32, view_seed=1)
    assert identity.fingerprint_fields() == {"transform": {}, "version": 2, "image_size": 32}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_restored_from_its_fingerprint_fields(name):
    views = transform(name, view_seed=0 if name == "none" else 3)
    stored = json.loads(json.dumps(views.fingerprint_fields(), sort_keys=True))
    assert ViewTransform.from_fingerprint(stored) == views


def test_operations_that_do_not_fit_together_are_refused():
    flip, resized = transforms.RandomHorizontalFlip(), transforms.RandomResizedCrop()
    with pytest.raises(ValueError, match="random_horizontal_flip occurs twice"):
        transforms.Compose([flip, flip], image_size=32)
    with pytest.raises(ValueError, match="random_resized_crop must be the first"):
        transforms.Compose([flip, resized], image_size=32)


def test_hash_words_are_uniform_and_different_for_each_key():
    words = hash_words((1, 2), np.arange(20000), 2)
    bits = (words[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean((0, 1)) - 0.5).max() < 0.02
    assert abs(np.corrcoef(words[:, 0] >> np.uint64(11), words[:, 1] >> np.uint64(11))[0, 1]) < 0.03
    assert not np.array_equal(words, hash_words((2, 1), np.arange(20000), 2))
    assert not np.array_equal(words, hash_words((3,), np.arange(20000), 2))
    assert np.array_equal(hash_words((1, 2), np.array([7]), 1), hash_words((1, 2), np.arange(20000), 1)[7:8])


def test_a_hashed_order_is_a_permutation():
    order = hashed_order((1,), np.arange(1000))
    assert sorted(order) == list(range(1000))
    assert not np.array_equal(order, np.arange(1000))
