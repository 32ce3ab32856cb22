"""Settings of the transforms that make a view, by torchvision's names and with its defaults, and the presets.

A field of `TransformConfig` declares a transform, which `data/operations.py` computes. `problems` of a section yields a message
for each broken rule: setting, value, rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import ModelWrapValidatorHandler, PrivateAttr, SerializerFunctionWrapHandler, model_serializer, model_validator

from kd_accel.config.section import Section

MAX_AUGMENT_OPS = 16
_MAX_ALPHA = 1000.0
_ROUNDING = 1e-9

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Factor = float | list[float]
"""Range of a random factor: [1 - x, 1 + x] for a number x, or [low, high]."""


class TransformSettings(Section):
    """Base class of the settings of one transform."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each broken rule."""
        yield from ()


class RandomCropSettings(TransformSettings):
    """Random crop of the zero-padded image (He et al., CVPR 2016).

    Args:
        padding: Zero padding on each side, in pixels.
    """

    padding: int

    def problems(self) -> Iterator[str]:
        """Yield a message for each broken rule."""
        if self.padding < 1:
            yield f"padding: {self.padding} must be at least 1, because the crop is as large as the image"


class RandomResizedCropSettings(TransformSettings):
    """Random crop of the original image, resized to the image size (Szegedy et al., CVPR 2015).

    Args:
        scale: Smallest and largest area of the crop, as a fraction of the image's area.
        ratio: Smallest and largest aspect ratio (width / height) of the crop.
        interpolation: Interpolation of the resizing.
    """

    scale: list[float] = [0.08, 1.0]
    ratio: list[float] = [3 / 4, 4 / 3]
    interpolation: Interpolation = "bilinear"

    def problems(self) -> Iterator[str]:
        """Yield a message for each broken rule."""
        yield from _range("scale", self.scale, above=0, most=1)
        yield from _range("ratio", self.ratio, above=0)


class RandomHorizontalFlipSettings(TransformSettings):
    """Mirror image, left and right exchanged.

    Args:
        p: Probability.
    """

    p: float = 0.5

    def problems(self) -> Iterator[str]:
        """Yield a message for each broken rule."""
        yield from _probability(self.p)


class RandAugmentSettings(TransformSettings):
    """Several random operations of equal magnitude (Cubuk et al., NeurIPS 2020).

    Args:
        num_ops: Number of operations per image.
        magnitude: Magnitude of the operations, at least 0 and below num_magnitude_bins.
        num_magnitude_bins: Number of magnitudes.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31

    def problems(self) -> Iterator[str]:
        """Yield a message for each broken rule."""
        if not 1 <= self.num_ops <= MAX_AUGMENT_OPS:
            yield f"num_ops: {self.num_ops} must be at least 1 and at most {MAX_AUGMENT_OPS}"
        if self.num_magnitude_bins < 2:
            yield f"num_magnitude_bins: {self.num_magnitude_bins} must be at least 2"
        if not 0 <= self.magnitude < self.num_magnitude_bins:
            yield f"magnitude: {self.magnitude} must be at least 0 and below num_magnitude_bins"


class TrivialAugmentWideSettings(TransformSettings):
    """One random operation of random magnitude (Müller and Hutter, ICCV 2021, the wide space).

    Args:
        num_magnitude_bins: Number of magnitudes.
    """

    num_magnitude_bins: int = 31

    def problems(self) -> Iterator[str]:
        """Yield a message for each broken rule."""
        if self.num_magnitude_bins < 2:
            yield f"num_magnitude_bins: {self.num_magnitude_bins} must be at least 2"


class ColorJitterSettings(TransformSettings):
    """Random brightness, contrast, saturation and hue, in random order.

    Args:
        brightness: Range of the factor of the brightness: [1 - x, 1 + x] for a number x, or [low, high].
        contrast: Range of the factor of the contrast, as brightness.
        saturation: Range of the factor of the saturation, as brightness.
        hue: Range of the shift of the hue, in turns of the color wheel: [-x, x] for a number x up to 0.5, or [low, high].
    """

    brightness: Factor = 0.0
    contrast: Factor = 0.0
    saturation: Factor = 0.0
    hue: Factor = 0.0

    def problems(self) -> Iterator[str]:
        """Yield a message for each broken rule."""
        for setting in ("brightness", "contrast", "saturation"):
            value = getattr(self, setting)
            yield from _range(setting, [value, value] if isinstance(value, float | int) else value, least=0)
        hue = self.hue
        yield from _range("hue", [-hue, hue] if isinstance(hue, float | int) else hue, least=-0.5, most=0.5)
        if all(value in (0, [1, 1]) for value in (self.brightness, self.contrast, self.saturation)) and hue in (0, [0, 0]):
            yield "brightness: has no effect without brightness, contrast, saturation or hue; set one of them"


class RandomErasingSettings(TransformSettings):
    """Random rectangle in one color (Zhong et al., AAAI 2020).

    Args:
        p: Probability.
        scale: Smallest and largest area of the rectangle, as a fraction of the image's area.
        ratio: Smallest and largest aspect ratio (height / width) of the rectangle.
        value: Red, green and blue of the rectangle, 0 to 255.
    """

    p: float = 0.5
    scale: list[float] = [0.02, 0.33]
    ratio: list[float] = [0.3, 3.3]
    value: list[int] = [0, 0, 0]

    def problems(self) -> Iterator[str]:
        """Yield a message for each broken rule."""
        yield from _probability(self.p)
        yield from _range("scale", self.scale, above=0, most=1)
        yield from _range("ratio", self.ratio, above=0)
        if len(self.value) != 3 or not all(0 <= level <= 255 for level in self.value):
            yield f"value: {self.value} must be three integers from 0 to 255"


class MixingSettings(TransformSettings):
    """Base class of the settings of a mixture of two samples.

    Args:
        alpha: Both parameters of the Beta distribution of the weight of the first sample.
        p: Probability.
    """

    alpha: float = 1.0
    p: float = 1.0

    def problems(self) -> Iterator[str]:
        """Yield a message for each broken rule."""
        if not 0 < self.alpha <= _MAX_ALPHA:
            yield f"alpha: {self.alpha} must be above 0 and at most {_MAX_ALPHA:g}"
        yield from _probability(self.p)


class MixUpSettings(MixingSettings):
    """Weighted mean of two training samples and of their labels (Zhang et al., ICLR 2018).

    Args:
        alpha: Both parameters of the Beta distribution of the weight.
        p: Probability.
    """

    alpha: float = 0.2


class CutMixSettings(MixingSettings):
    """Random rectangle from another training sample, with its share of the label (Yun et al., ICCV 2019).

    Args:
        alpha: Both parameters of the Beta distribution of the area outside the rectangle.
        p: Probability.
    """


def mixing_problems(transforms: Mapping[str, TransformSettings]) -> Iterator[str]:
    """Yield a message for each broken rule of mixup and cutmix together with other transforms.

    Args:
        transforms: Settings by the name of the transform, in their order.
    """
    mixing = {name: settings.p for name, settings in transforms.items() if isinstance(settings, MixingSettings)}
    if mixing and list(transforms)[-len(mixing) :] != list(mixing):
        yield f"{next(iter(mixing))}: must come after all other transforms, because it mixes finished views; move it down"
    if sum(mixing.values()) > 1 + _ROUNDING:
        values = " and ".join(f"{name}.p: {p}" for name, p in mixing.items())
        yield f"{values} must sum to at most 1, because a sample is mixed in one way; set both, such as 0.5"


class TransformConfig(Section):
    """Transforms that make a view, applied in the order in which they are written.

    Args:
        random_resized_crop: Random crop of the original image, resized to the image size; the first transform if set.
        random_crop: Random crop of the zero-padded image.
        random_horizontal_flip: Mirror image, left and right exchanged.
        rand_augment: Several random operations of equal magnitude.
        trivial_augment_wide: One random operation of random magnitude.
        color_jitter: Random brightness, contrast, saturation and hue.
        random_erasing: Random rectangle in one color.
        mixup: Weighted mean of two training samples and of their labels; after all other transforms.
        cutmix: Random rectangle from another training sample, with its share of the label; after all other transforms.
    """

    random_resized_crop: RandomResizedCropSettings | None = None
    random_crop: RandomCropSettings | None = None
    random_horizontal_flip: RandomHorizontalFlipSettings | None = None
    rand_augment: RandAugmentSettings | None = None
    trivial_augment_wide: TrivialAugmentWideSettings | None = None
    color_jitter: ColorJitterSettings | None = None
    random_erasing: RandomErasingSettings | None = None
    mixup: MixUpSettings | None = None
    cutmix: CutMixSettings | None = None
    _order: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _keep_order(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        config = handler(value)
        if isinstance(value, Mapping):
            config._order = tuple(name for name in value if value[name] is not None)
        return config

    @model_serializer(mode="wrap")
    def _in_order(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content = handler(self)
        return {name: content[name] for name in self._order}

    def items(self) -> Iterator[tuple[str, TransformSettings]]:
        """Yield name and settings of each transform, in their order."""
        for name in self._order:
            yield name, getattr(self, name)

    def problems(self) -> Iterator[str]:
        """Yield a message for each broken rule."""
        for name, settings in self.items():
            yield from (f"{name}.{problem}" for problem in settings.problems())
        if self.random_resized_crop and self._order[0] != "random_resized_crop":
            yield "random_resized_crop: must be the first transform, because it cuts from the original image; move it up"
        yield from mixing_problems(dict(self.items()))


Preset = Literal["none", "crop", "crop_flip", "resized_crop_flip", "trivial_augment"]

_CROP = {"random_crop": {"padding": 4}}
_CROP_FLIP: dict[str, Any] = {**_CROP, "random_horizontal_flip": {}}
_PRESETS: Mapping[str, dict[str, Any]] = {
    "none": {},
    "crop": _CROP,
    "crop_flip": _CROP_FLIP,
    "resized_crop_flip": {"random_resized_crop": {}, "random_horizontal_flip": {}},
    "trivial_augment": {**_CROP_FLIP, "trivial_augment_wide": {}},
}
"""Transforms of the presets. `crop` is for images that must not be mirrored, such as digits."""


def transform_config(transform: Preset | TransformConfig) -> TransformConfig:
    """Return the transforms of a preset, or the transforms themselves."""
    return TransformConfig.model_validate(_PRESETS[transform]) if isinstance(transform, str) else transform


def _probability(p: float) -> Iterator[str]:
    if not 0 < p <= 1:
        yield f"p: {p} must be above 0 and at most 1"


def _range(
    setting: str, values: list[float], *, above: float | None = None, least: float | None = None, most: float | None = None
) -> Iterator[str]:
    """Yield a message unless `values` are [low, high] within the limits."""
    rule = [] if above is None else [f"above {above}"]
    rule += [] if least is None else [f"at least {least}"]
    rule += [] if most is None else [f"at most {most}"]
    is_range = len(values) == 2 and values[0] <= values[1]
    is_within = is_range and (above is None or values[0] > above) and (least is None or values[0] >= least)
    if not is_within or (most is not None and values[1] > most):
        yield f"{setting}: {values} must be [low, high], {' and '.join(rule)}"
