"""Tests of mixup and cutmix: pure functions of the view, partners among the training samples, equal on each device."""

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import kd_accel as kd
from kd_accel.config.schema import DataConfig
from kd_accel.data import transforms
from kd_accel.data.datamodule import images_on, load_data
from kd_accel.data.dataset import MemoryImages
from kd_accel.data.mixing import beta_quantiles
from kd_accel.data.transforms import CutMix, MixUp, ViewTransform
from tests.support.image_files import write_noise

SIZE, CLASSES = 8, 5
TRAINING = np.arange(3, 90, 2)
CROP_FLIP = (transforms.RandomCrop(padding=1), transforms.RandomHorizontalFlip())
TRANSFORMS = {
    "mixup": (MixUp(alpha=1.0),),
    "cutmix": (CutMix(),),
    "crop_mixup": (*CROP_FLIP, MixUp()),
    "crop_cutmix": (*CROP_FLIP, CutMix(p=0.5)),
    "crop_erasing_both": (*CROP_FLIP, transforms.RandomErasing(value=[1, 2, 3]), MixUp(p=0.4), CutMix(p=0.3)),
    "resized_cutmix": (transforms.RandomResizedCrop(), CutMix()),
    "both_turned": (CutMix(p=0.3), MixUp(alpha=0.8, p=0.7)),
}
ON_DEVICE = [name for name in TRANSFORMS if name != "resized_cutmix"]


@pytest.fixture(scope="module")
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (100, SIZE, SIZE, 3), dtype=np.uint8)
    return MemoryImages(pixels, np.arange(100) % CLASSES, list("abcde"))


def transform(name, samples=TRAINING, **settings):
    return ViewTransform(TRANSFORMS[name], SIZE, **settings).with_partners(samples)


def unmixed(views):
    return ViewTransform(views.unmixed, SIZE, views.view_seed)


def made(views, images, samples, view):
    """Return pixels and labels."""
    return views.view(images, samples, view), views.labels(images, samples, view)


@pytest.mark.parametrize(
    ("alpha", "cdf"),
    [
        (1.0, lambda x: x),
        (0.5, lambda x: 2 / math.pi * np.arcsin(np.sqrt(x))),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
        (3.0, lambda x: x**3 * (10 - 15 * x + 6 * x**2)),
    ],
)
def test_quantiles_of_known_distributions(alpha, cdf):
    """A quantile is the nearest multiple of 2**-16: the limits of its rounding enclose the probability."""
    quantiles = beta_quantiles(alpha).astype(np.float64)
    shares, half = (np.arange(4096) + 0.5) / 4096, 0.5 / 65536
    below, above = (cdf(np.clip(quantiles + side, 0, 1)) for side in (-half, half))
    assert (below <= shares + 1e-12).all() and (shares <= above + 1e-12).all()


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.2, 0.7, 1.0, 5.0, 100.0, 1000.0])
def test_quantiles_are_symmetric_and_those_of_numpys_sampler(alpha):
    quantiles = beta_quantiles(alpha)
    assert quantiles.dtype == np.float32 and len(quantiles) == 4096
    assert (np.diff(quantiles) >= 0).all() and np.array_equal(quantiles, 1 - quantiles[::-1])
    assert np.array_equal(quantiles * 65536, np.rint(quantiles * 65536))
    drawn = np.sort(np.random.default_rng(0).beta(alpha, alpha, 100_000))
    # The largest difference of the cumulative shares (Kolmogorov and Smirnov) at limits between the roundings.
    limits = (np.arange(0, 65536, 7) + 0.5) / 65536
    shares = (np.searchsorted(each, limits) / len(each) for each in (quantiles, drawn))
    assert np.abs(np.subtract(*shares)).max() < 0.006


@pytest.mark.parametrize(
    ("alpha", "digest"),
    [(0.2, "0f731709769819af"), (0.8, "d00dbe80141a6531"), (1.0, "6da5e7f8e47d9bf3"), (40.0, "3fdb2edf2603a75a")],
)
def test_golden_quantiles(alpha, digest):
    """Other weights require a new VIEWS_VERSION."""
    assert hashlib.sha256(beta_quantiles(alpha).tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", TRANSFORMS)
def test_mixed_views_do_not_depend_on_order_batch_or_global_generators(images, name):
    views = transform(name)
    pixels, labels = made(views, images, TRAINING, 3)
    torch.manual_seed(1)
    np.random.seed(1)
    shuffled = np.random.permutation(len(TRAINING))
    for part in (shuffled, shuffled[:1], shuffled[5:11]):
        own_pixels, own_labels = made(views, images, TRAINING[part], 3)
        assert np.array_equal(own_pixels, pixels[part]) and np.array_equal(own_labels, labels[part])
    assert pixels.shape == (len(TRAINING), SIZE, SIZE, 3) and labels.shape == (len(TRAINING), CLASSES)
    is_float = any(isinstance(each, MixUp) for each in views.operations)
    assert (pixels.dtype, labels.dtype) == (np.float32 if is_float else np.uint8, np.float32)
    for other in (views.view(images, TRAINING, 4), transform(name, view_seed=1).view(images, TRAINING, 3)):
        assert not np.array_equal(other, pixels)


def channels_last_images(images):
    """Return the same images, read into the other memory format."""

    class ChannelsLast(MemoryImages):
        def pixels(self, samples):
            return np.ascontiguousarray(super().pixels(samples))

    return ChannelsLast(images.pixels(np.arange(100)), images.labels, images.label_names)


GOLDEN = {
    "mixup": "9b11171818ab2da8",
    "cutmix": "01682c48761667c6",
    "crop_mixup": "b566edb948b5e0bd",
    "crop_cutmix": "94f112180d664b53",
    "crop_erasing_both": "1f7b7e2906cce900",
    "resized_cutmix": "3ba81f1755e5e2df",
    "both_turned": "5771804d96e90017",
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_golden_values(images, name):
    """Other pixels or labels require a new VIEWS_VERSION."""
    for own in (images, channels_last_images(images)):
        pixels, labels = made(transform(name, view_seed=5), own, TRAINING, 2)
        assert hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_mixed_view_is_the_mixture_of_two_views_of_the_same_number(images, name):
    """Pixels and labels, against the definition in float64; they are exact."""
    views = transform(name, view_seed=3)
    mix, (pixels, labels) = views.mix(TRAINING, 2), made(views, images, TRAINING, 2)
    own, partners = (unmixed(views).view(images, samples, 2).astype(np.float64) for samples in (TRAINING, mix.partners))
    kinds = set()
    for row, (left, top, width, height) in enumerate(mix.boxes.tolist()):
        opacity = np.full((SIZE, SIZE, 1), float(mix.opacity[row]))
        opacity[top : top + height, left : left + width] = 0
        assert np.array_equal(pixels[row], own[row] * opacity + partners[row] * (1 - opacity))
        share = opacity.mean()
        expected = np.zeros(CLASSES)
        np.add.at(expected, images.labels[[TRAINING[row], mix.partners[row]]], [share, 1 - share])
        assert np.abs(labels[row] - expected).max() < 1e-7
        kinds.add("cutmix" if width * height else "mixup" if mix.opacity[row] < 1 else "none")
        if share == 1:
            assert mix.partners[row] == TRAINING[row]
    assert (labels.sum(1) == 1).all()
    wanted = {type(each).__name__.lower() for each in views.mixing}
    assert wanted <= kinds


def test_partners_are_uniform_among_the_training_samples():
    samples = np.arange(10, 10_010)
    views = ViewTransform((MixUp(alpha=1.0),), SIZE).with_partners(TRAINING)
    mix = views.mix(samples, 0)
    partners = mix.partners[mix.mixed]
    assert len(partners) > 9_990 and set(partners) == set(TRAINING)
    assert np.bincount(partners)[TRAINING].std() < 1.5 * math.sqrt(len(partners) / len(TRAINING))
    assert not np.array_equal(partners, views.mix(samples, 1).partners[mix.mixed])


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.5), (0.2, 0.3), (1.0, None), (None, 0.1)])
def test_each_transform_is_chosen_with_its_probability(first, second):
    mixing = [kind(alpha=1.0, p=p) for kind, p in ((MixUp, first), (CutMix, second)) if p is not None]
    mix = ViewTransform(tuple(mixing), 64).with_partners(TRAINING).mix(np.arange(8000), 0)
    is_cut = mix.boxes[:, 2:].prod(1) > 0
    assert abs((mix.opacity < 1).mean() - (first or 0)) < 0.02
    # A rectangle may be empty, less often than one in fifty.
    assert -0.02 < is_cut.mean() - (second or 0) < 0.015
    assert not (is_cut & (mix.opacity < 1)).any()


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_rectangles_have_the_distribution_of_torchvision(alpha):
    mix = ViewTransform((CutMix(alpha=alpha),), 32).with_partners(TRAINING).mix(np.arange(4000), 0)
    torch.manual_seed(0)
    cutmix = v2.CutMix(alpha=alpha, num_classes=CLASSES)
    drawn = [cutmix.make_params([torch.zeros(3, 32, 32)]) for _ in range(4000)]
    boxes = np.array([each["box"] for each in drawn])
    boxes[:, 2:] -= boxes[:, :2]
    weights = np.array([each["lam_adjusted"] for each in drawn])
    for column in range(4):
        for share in (5, 25, 50, 75, 95):
            assert abs(np.percentile(mix.boxes[:, column], share) - np.percentile(boxes[:, column], share)) <= 2
    for share in (5, 25, 50, 75, 95):
        assert abs(np.percentile(mix.weights, share) - np.percentile(weights, share)) <= 0.04


@pytest.mark.parametrize("name", ON_DEVICE)
def test_views_on_a_device_equal_those_in_host_memory(images, name):
    views = transform(name)
    assert views.supports_device
    mix, expected = views.mix(TRAINING, 3), views.view(images, TRAINING, 3)
    own, partners = (
        views.on_device(torch.from_numpy(images.pixels(samples)).permute(0, 3, 1, 2), samples, 3)
        for samples in (TRAINING, mix.partners)
    )
    on_device = mix.on_device(own, partners).permute(0, 2, 3, 1).numpy()
    assert on_device.dtype == expected.dtype and np.array_equal(on_device, expected)


def test_a_resized_crop_is_not_made_on_a_device():
    assert not transform("resized_cutmix").supports_device


def test_products_of_weights_and_pixels_are_exact_in_float32():
    """So that a device may fuse multiplications and additions."""
    weights, levels = np.arange(65537) / 65536, np.array([0, 1, 127, 254, 255])
    for level in levels:
        for other in levels:
            exact = weights * level + (1 - weights) * other
            assert np.array_equal(exact.astype(np.float32), exact)


@pytest.mark.parametrize("name", ["mixup", "cutmix", "crop_erasing_both"])
def test_samples_without_a_label_give_rows_of_zeros(images, name):
    labels = np.where(np.arange(100) % 4 == 1, -1, images.labels)
    unlabeled = MemoryImages(images.pixels(np.arange(100)), labels, images.label_names)
    views = transform(name)
    mix, shares = views.mix(TRAINING, 0), views.labels(unlabeled, TRAINING, 0)
    lacks = ((labels[TRAINING] < 0) & (mix.weights > 0)) | ((labels[mix.partners] < 0) & (mix.weights < 1))
    assert 0 < lacks.sum() < len(lacks)
    assert (shares[lacks] == 0).all() and (shares[~lacks].sum(1) == 1).all()


SETTINGS = {"source": "import:tests.support.models:images", "image_size": SIZE, "views": 3, "val_fraction": 0.2}
BOTH = {"random_crop": {"padding": 1}, "mixup": {"p": 0.4}, "cutmix": {"p": 0.6}}


def data_of(transform=BOTH, **settings):
    return load_data(DataConfig(**{**SETTINGS, "transform": transform, **settings}))


@pytest.mark.parametrize(
    "settings", [{}, {"limit_train": 40}, {"val_fraction": 0.5}, {"test_fraction": 0.25, "val_split": None}]
)
def test_a_partner_is_a_training_sample_of_the_run(settings):
    """Never a validation or test sample, nor one that is left out: with other images of those the views are the same."""
    data = data_of({"mixup": {"alpha": 1.0, "p": 0.5}, "cutmix": {"p": 0.5}}, **settings)
    train = data.splits.train
    for view in range(20):
        assert np.isin(data.transform.mix(train, view).partners, train).all()
    black = data.train.pixels(np.arange(data.train.num_samples)).copy()
    black[np.setdiff1d(np.arange(len(black)), train)] = 0
    other = replace(data, train=MemoryImages(black, data.train.labels, data.label_names))
    assert len(train) < len(black)
    for view in range(3):
        assert torch.equal(data.view_batch(train, view).images, other.view_batch(train, view).images)


def test_images_decoded_on_demand_give_the_same_views(tmp_path):
    """Also next to a file that cannot be decoded, which is left out and never a partner."""
    write_noise(tmp_path, train=12, test=2)
    (tmp_path / "train/cat/003.png").write_bytes(b"damaged")
    settings = {"source": f"imagefolder:{tmp_path}", "mean": [0.5] * 3, "std": [0.2] * 3, "on_error": "skip"}
    held, read = (data_of(**settings, memory_limit_mib=limit) for limit in (4096, 0))
    assert held.train.is_in_memory and not read.train.is_in_memory
    lost = sum(len(samples) for split, samples in read.left_out.items() if split != "test")
    assert lost == 1
    for view in range(5):
        one, other = (data.view_batch(data.splits.train, view) for data in (held, read))
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_workers_and_a_device_give_the_same_batches():
    data = data_of()
    on_device, workers = data.train_loader(batch_size=16), data_of(num_workers=2).train_loader(batch_size=16)
    on_device.keep_images(images_on(torch.device("cpu"), data))
    steps = zip(data.train_loader(batch_size=16).epoch(1), workers.epoch(1), on_device.epoch(1), strict=True)
    for (batch,), *others in steps:
        assert batch.images.dtype == batch.labels.dtype == torch.float32 and batch.labels.shape == (16, 4)
        assert torch.equal(batch.images, data.view_batch(batch.index.numpy(), 1).images)
        for (other,) in others:
            assert all(torch.equal(getattr(batch, name), getattr(other, name)) for name in ("images", "labels", "index"))
    ranks = [data.train_loader(batch_size=16, rank=rank, world_size=2).epoch(2) for rank in (0, 1)]
    for (batch,), (one,), (two,) in zip(data.train_loader(batch_size=16).epoch(2), *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([one.images, two.images]))
        assert torch.equal(batch.labels, torch.cat([one.labels, two.labels]))


def test_batches_that_are_not_augmented_keep_class_indices():
    data = data_of()
    (held_out,) = data.batches("test", [(data.splits.test, 0)])
    (plain,) = data.batch_loader.load("train", [(data.splits.train, 0)], is_augmented=False)
    for batch in (held_out, plain):
        assert (batch.images.dtype, batch.labels.dtype, batch.labels.ndim) == (torch.uint8, torch.int64, 1)


def test_items_of_a_view_dataset_are_mixed():
    data = kd.ImageDataset(SETTINGS["source"], image_size=SIZE, val_fraction=0.2)
    compose = transforms.Compose([*CROP_FLIP, MixUp(alpha=0.4, p=0.5), CutMix(p=0.5)], image_size=SIZE)
    views = kd.ViewDataset(data, compose, num_views=2, view_seed=7)
    views.set_view(1)
    items = next(iter(DataLoader(views, batch_size=len(views))))
    expected = views.module.view_batch(views.module.splits.train, 1)
    assert torch.equal(items["image"], expected.images) and torch.equal(items["label"], expected.labels)
    assert items["label"].shape == (128, 4)
    with pytest.raises(ValueError, match="operations: mixup and cutmix need the images of other samples; use `view`"):
        compose(np.zeros((1, SIZE, SIZE, 3), dtype=np.uint8), np.zeros(1, dtype=np.int64), 0)


def test_the_fingerprint_has_a_digest_of_the_training_samples():
    fields = data_of().transform.fingerprint_fields()
    assert list(fields) == ["transform", "version", "image_size", "partners", "view_seed"]
    assert fields["version"] == 2
    assert data_of().transform.fingerprint_fields() == fields
    assert data_of(limit_train=100).transform.fingerprint_fields()["partners"] != fields["partners"]
    assert "partners" not in data_of("crop_flip").transform.fingerprint_fields()
    restored = ViewTransform.from_fingerprint(json.loads(json.dumps(fields, sort_keys=True)))
    assert restored == data_of().transform and restored.partners is None


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        (
            [MixUp(), CutMix(p=0.5)],
            "mixup.p: 1.0 and cutmix.p: 0.5 must sum to at most 1",
        ),
        ([MixUp(), transforms.RandomErasing()], "mixup: must come after all other transforms"),
        ([CutMix(p=0.5), transforms.RandomErasing(), MixUp(p=0.5)], "cutmix: must come after all other transforms"),
        ([MixUp(), MixUp()], "mixup occurs twice"),
    ],
)
def test_transforms_that_do_not_fit_together_are_refused(operations, message):
    with pytest.raises(ValueError, match=f"operations: {message}"):
        transforms.Compose(operations, image_size=SIZE)


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": -1.0}, {"alpha": math.inf}, {"alpha": math.nan}, {"p": 0.0}])
@pytest.mark.parametrize("kind", [MixUp, CutMix])
def test_settings_that_are_not_valid_are_refused_by_name(kind, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: .* must be above 0 and at most"):
        kind(**settings)
