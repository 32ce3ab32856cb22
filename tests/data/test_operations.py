"""Tests of the operations against torchvision's: equal pixels for equal choices, and equal distributions of the choices."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import autoaugment, functional, transforms, v2

from kd_accel.data import operations
from kd_accel.data.hashing import hash_words
from kd_accel.data.image_operations import OPERATION_NAMES, AugmentSpace, jitter_color

TORCHVISION_NAMES = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "saturation": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
}
# In torchvision a positive translation moves the image the other way.
MIRRORED_SIGN = ("translate_x", "translate_y")


def picture(size=32, seed=0):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    noise = generator.integers(0, 32, (size, size, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    return Image.fromarray(np.minimum(smooth.astype(int) * 7 // 8 + noise, 255).astype(np.uint8))


def words_of(operation, count, key=0):
    return hash_words((key,), np.arange(count), operation.num_words)


def torchvision_space(is_wide, bins, size):
    if is_wide:
        return autoaugment.TrivialAugmentWide(bins)._augmentation_space(bins)
    return autoaugment.RandAugment(num_magnitude_bins=bins)._augmentation_space(bins, (size, size))


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_augment_operations_are_those_of_torchvision(name, is_wide):
    assert list(TORCHVISION_NAMES) == list(OPERATION_NAMES)
    image, size, bins = picture(48), 48, 31
    space, reference = AugmentSpace(bins, is_wide), torchvision_space(is_wide, bins, size)
    assert list(reference) == list(TORCHVISION_NAMES.values())
    magnitudes, is_signed = reference[TORCHVISION_NAMES[name]]
    for magnitude in (0, 1, 9, 17, 30):
        for sign in (1, -1):
            level = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
            level *= sign * (-1 if name in MIRRORED_SIGN else 1) if is_signed else 1
            expected = autoaugment._apply_op(
                image, TORCHVISION_NAMES[name], level, interpolation=functional.InterpolationMode.NEAREST, fill=None
            )
            actual = space.apply(image, OPERATION_NAMES.index(name), magnitude, sign)
            difference = np.abs(np.asarray(actual).astype(int) - np.asarray(expected))
            if name.startswith("shear"):
                # torchvision computes the tangent of an angle in degrees, so a few coordinates are rounded to other pixels.
                assert (difference > 0).any(-1).mean() <= 0.02
            else:  # torchvision computes the levels in float32
                assert difference.max() <= 1, (magnitude, sign)
                assert (difference > 0).mean() <= 0.03


@pytest.mark.parametrize("hue", [-0.5, -0.1, 0, 0.25, 0.5])
def test_color_jitter_is_that_of_torchvision(hue):
    image, factors = picture(), {"brightness": 0.7, "contrast": 1.4, "saturation": 0.2, "hue": hue}
    ranges = {name: [factor, factor] for name, factor in factors.items()}
    functions = {
        "brightness": functional.adjust_brightness,
        "contrast": functional.adjust_contrast,
        "saturation": functional.adjust_saturation,
        "hue": functional.adjust_hue,
    }
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        expected = image
        for number in order:
            name = list(functions)[number]
            expected = functions[name](expected, factors[name]) if factors[name] else expected
        words = [order.index(number) for number in range(4)] + [1 << 63] * 4
        assert np.array_equal(np.asarray(jitter_color(image, words, ranges)), np.asarray(expected))


def test_color_jitter_uses_its_ranges():
    images = np.repeat(np.asarray(picture())[None], 400, axis=0)
    brightness = operations.ColorJitter(brightness=0.3)
    views = brightness(images, words_of(brightness, 400))
    factors = views.mean((1, 2, 3)) / images.mean((1, 2, 3))
    assert 0.69 < factors.min() < 0.72 and 1.2 < factors.max() < 1.31 and abs(factors.mean() - 1) < 0.02
    dark = operations.ColorJitter(brightness=[0.5, 0.5])
    assert np.array_equal(dark(images[:1], words_of(dark, 1))[0], np.asarray(functional.adjust_brightness(picture(), 0.5)))


def drawn_boxes(sizes, scale, ratio, count=4000):
    torch.manual_seed(0)
    image = torch.zeros(3, sizes[1], sizes[0])
    drawn = [transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)]
    return np.array([(left, top, width, height) for top, left, height, width in drawn])


@pytest.mark.parametrize("sizes", [(500, 375), (64, 64), (30, 400)])
@pytest.mark.parametrize(("scale", "ratio"), [([0.08, 1.0], [3 / 4, 4 / 3]), ([0.5, 0.9], [0.5, 3.0])])
def test_resized_crops_have_the_distribution_of_torchvision(sizes, scale, ratio):
    operation = operations.RandomResizedCrop(scale=scale, ratio=ratio)
    boxes = np.array([crop.box(*sizes) for crop in operation.crops(words_of(operation, 4000))])
    expected = drawn_boxes(sizes, scale, ratio)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes).all() and (boxes[:, 2:] > 0).all()
    for column in range(4):
        for share in (5, 25, 50, 75, 95):
            one, other = (np.percentile(each[:, column], share) for each in (boxes, expected))
            assert abs(one - other) <= 0.04 * max(sizes[column % 2], 10), (column, share, one, other)


def test_resized_crops_fall_back_to_the_center():
    operation = operations.RandomResizedCrop(scale=[1.0, 1.0], ratio=[2.0, 2.0])
    torch.manual_seed(0)
    expected = [
        transforms.RandomResizedCrop.get_params(torch.zeros(3, h, w), [1.0, 1.0], [2.0, 2.0]) for w, h in ((64, 64), (90, 20))
    ]
    boxes = [crop.box(*size) for crop, size in zip(operation.crops(words_of(operation, 2)), [(64, 64), (90, 20)], strict=True)]
    assert [list(box) for box in boxes] == [[left, top, width, height] for top, left, height, width in expected]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_resized_crops_have_the_pixels_of_torchvision(interpolation):
    """On tensors; the same interpolation of a Pillow image differs by rounding."""
    operation = operations.RandomResizedCrop(interpolation=interpolation)
    images = np.stack([np.asarray(picture(seed=seed)) for seed in range(20)])
    words = words_of(operation, 20)
    mode = functional.InterpolationMode("nearest-exact" if interpolation == "nearest" else interpolation)
    views = operation(images, words)
    for view, image, crop in zip(views, images, operation.crops(words), strict=True):
        left, top, width, height = crop.box(32, 32)
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        expected = v2.functional.resized_crop(tensor, top, left, height, width, [32, 32], mode)
        assert np.array_equal(view, expected.permute(1, 2, 0).numpy())
        if interpolation == "bilinear":
            cut = Image.fromarray(image).crop((left, top, left + width, top + height))
            assert np.abs(np.asarray(cut.resize((32, 32), Image.Resampling.BILINEAR)) - view.astype(int)).max() <= 1


def test_erased_rectangles_have_the_distribution_of_torchvision():
    operation = operations.RandomErasing(p=1.0, scale=[0.02, 0.33], ratio=[0.3, 3.3])
    boxes = operation.boxes(32, words_of(operation, 4000))
    torch.manual_seed(0)
    image = torch.zeros(3, 32, 32)
    drawn = [transforms.RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0]) for _ in range(4000)]
    expected = np.array([(left, top, width, height) for top, left, height, width, _ in drawn])
    for column in range(4):
        for share in (5, 25, 50, 75, 95):
            assert abs(np.percentile(boxes[:, column], share) - np.percentile(expected[:, column], share)) <= 1.5
    assert math.isclose(boxes[:, 2:].prod(1).mean(), expected[:, 2:].prod(1).mean(), rel_tol=0.05)


def test_erased_rectangles_have_the_color_and_the_rest_is_unchanged():
    operation = operations.RandomErasing(p=0.25, value=[255, 0, 7])
    images = np.stack([np.asarray(picture(seed=seed)) for seed in range(4)]).repeat(250, axis=0)
    words = words_of(operation, 1000)
    views = operation(images.copy(), words)
    boxes = operation.boxes(32, words)
    for view, image, (left, top, width, height) in zip(views, images, boxes.tolist(), strict=True):
        expected = image.copy()
        expected[top : top + height, left : left + width] = (255, 0, 7)
        assert np.array_equal(view, expected)
    assert 200 < (boxes[:, 2] > 0).sum() < 300


@pytest.mark.parametrize("p", [0.2, 1.0])
def test_the_share_of_mirrored_images_is_p(p):
    operation = operations.RandomHorizontalFlip(p=p)
    images = np.repeat(np.asarray(picture())[None], 2000, axis=0)
    is_mirrored = (operation(images.copy(), words_of(operation, 2000)) == images[:, :, ::-1]).all((1, 2, 3))
    assert abs(is_mirrored.mean() - p) < 0.03


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("RandomCrop", {"padding": 0}, "padding: 0 must be at least 1"),
        ("RandomCrop", {}, "padding\n.*required"),
        ("RandomCrop", {"padding": 1.5}, "padding"),
        ("RandomHorizontalFlip", {"p": 1.5}, "p: 1.5 must be above 0 and at most 1"),
        ("RandomResizedCrop", {"scale": [0.5, 0.1]}, r"scale: \[0.5, 0.1\] must be \[low, high\], above 0 and at most 1"),
        ("RandomErasing", {"value": [0, 0, 256]}, "value: .* must be three integers from 0 to 255"),
        ("RandAugment", {"magnitude": 31}, "magnitude: 31 must be at least 0 and below num_magnitude_bins"),
        ("TrivialAugmentWide", {"num_magnitude_bins": 1}, "num_magnitude_bins: 1 must be at least 2"),
        ("ColorJitter", {"hue": 0.6}, r"hue: \[-0.6, 0.6\] must be"),
        ("ColorJitter", {}, "brightness: has no effect without"),
    ],
)
def test_settings_that_are_not_valid_are_refused_by_name(name, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(operations, name)(**settings)
