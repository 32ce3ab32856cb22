"""Differences between a cache and a request, named by the settings that decide them.

The names of fingerprint fields belong to the file format; a user changes settings. `FIELDS` maps each field to the settings
that messages name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from kd_accel.cache.spec import TensorSpec
from kd_accel.config.fields import flatten
from kd_accel.data.splits import Split
from kd_accel.io.hashing import tensors_digest
from kd_accel.io.safe_yaml import dump_yaml
from kd_accel.losses.targets import TargetFunction

LAYERS = "distill.features.NAME.layers"
MEMORY_FORMAT = "numerics.channels_last"
CONTENTS = "data.contents"
UNLABELED_SIZE = "data.unlabeled_size"
_TRANSFORM, _VIEW_SEED, _PARTNERS = "views.transform", "views.view_seed", "views.partners"
_IMAGE_SIZE = "views.image_size"
_LABELS = "data.label_names"
_CLASS_MAP = "teacher.class_map"
_UNLABELED = ("data.unlabeled", "data.unlabeled_split")
_LONGEST_VALUE = 80


@dataclass(frozen=True)
class Field:
    """Description of a fingerprint field for messages.

    Attributes:
        settings: Settings that decide the field; empty if no setting does.
        note: Explanation, if names and values are not enough.
        default: Text for a fingerprint without this field.
        values: {value: text} for values that are not values of a setting.
    """

    settings: tuple[str, ...]
    note: str = ""
    default: str = "not set"
    values: Mapping[str, str] = field(default_factory=dict)

    def text(self, value: Any) -> str:
        """Format a value of the field."""
        return self.values[value] if isinstance(value, str) and value in self.values else _text(value, default=self.default)


_LEFT_OUT = Field(("data.on_error",), "samples that cannot be decoded and are left out", default="none")

FIELDS = {
    "teacher.weights": Field(("teacher.run", "teacher.weights"), "digest of the teacher's weights and buffers"),
    "teacher.arch": Field(("teacher.run", "teacher.arch")),
    "teacher.stem": Field(("teacher.run", "teacher.stem")),
    "teacher.arch_args": Field(("teacher.run", "teacher.arch_args")),
    "teacher.mean": Field(("teacher.run", "teacher.mean")),
    "teacher.std": Field(("teacher.run", "teacher.std")),
    "teacher.image_size": Field(("teacher.image_size",), default="data.image_size"),
    "teacher.interpolation": Field(("teacher.interpolation",), "of views that are resized for the teacher", default="none"),
    "teacher.crop_pct": Field(("teacher.crop_pct",), default="1.0"),
    _CLASS_MAP: Field(("teacher.class_map",), "index of the teacher's logit for each class", default="null"),
    "numerics.precision": Field(("train.precision",)),
    MEMORY_FORMAT: Field(("train.channels_last",)),
    "numerics.compile": Field(("train.compile",)),
    "numerics.tf32": Field(("train.tf32",), "always false on CPUs, which have no TF32", default="false"),
    "numerics.cpu_kernels": Field(("train.cpu_kernels",), default="auto"),
    "numerics.conv_bn": Field(
        (LAYERS, "teacher.outputs"),
        "separate if a cached layer ends between a convolution and its BatchNorm",
        values={"fused": "BatchNorm fused into the teacher's convolutions", "separate": "BatchNorm separate"},
    ),
    _LABELS: Field(("data.source", "data.labels"), "class names"),
    "data.train_size": Field(("data.source", "data.train_split"), "number of samples of the split"),
    "data.test_size": Field(("data.source", "data.test_split"), "number of samples of the split"),
    "data.val_size": Field(
        ("data.val_split",), "number of samples of the split", default="the validation samples are training samples"
    ),
    UNLABELED_SIZE: Field(_UNLABELED, "number of samples of the source", default="null"),
    **{f"data.left_out.{split}": _LEFT_OUT for split in get_args(Split)},
    f"{CONTENTS}.train": Field(("data.source", "data.train_split")),
    f"{CONTENTS}.val": Field(("data.source", "data.train_split", "data.val_split")),
    f"{CONTENTS}.test": Field(("data.source", "data.test_split")),
    f"{CONTENTS}.unlabeled": Field(_UNLABELED),
    "pixels.version": Field((), "of kd_accel's image decoding, not a setting"),
    "pixels.background": Field(("data.background",)),
    "pixels.pixel_range": Field(("data.pixel_range",)),
    "pixels.crop_pct": Field(("data.crop_pct",)),
    _TRANSFORM: Field(("data.transform",)),
    "views.order": Field(("data.transform",), "order of the transforms", default="the usual order"),
    _PARTNERS: Field(
        ("data.limit_train", "data.val_fraction", "data.test_fraction", "data.on_error"),
        "digest of the list of the training samples, among which mixup and cutmix draw",
        default="none",
    ),
    "views.version": Field((), "of kd_accel's augmentations, not a setting"),
    _IMAGE_SIZE: Field(("data.image_size",)),
    _VIEW_SEED: Field(("data.view_seed",)),
}
"""Each field of a fingerprint by its dotted name; a field below one of these (an argument in `arch_args`) belongs to it."""

_UNKNOWN = Field((), "recorded by another version of kd_accel")


@dataclass(frozen=True)
class TargetSettings:
    """Names of the settings that decide the target function of a layer.

    Attributes:
        layers: Setting that lists the layer.
        args: Settings of the loss that compares the layer.
    """

    layers: str = "layers"
    args: tuple[str, ...] = ()

    def deciding(self, name: str) -> str:
        """Return the loss's setting of this name. Without such a setting, return all settings of the loss, or `layers`."""
        named = [setting for setting in self.args if setting.rpartition(".")[2] == name]
        return " or ".join(named or self.args or [self.layers])


def differing_fields(
    stored_fields: Mapping[str, Any],
    fields: Mapping[str, Any],
    *,
    any_memory_format: bool = False,
    layers: Sequence[str] = (),
) -> list[str]:
    """Compare the fingerprint fields of a cache with those of a config, apart from the digests of the samples.

    Args:
        stored_fields: Fields of the cache.
        fields: Fields of the config.
        any_memory_format: Whether another memory format of the teacher's maps is accepted.
        layers: Settings that list the layers whose features are stored; empty = `distill.features.NAME.layers`.

    Returns:
        `SETTING: VALUE in the cache, VALUE now` for each difference.
    """
    stored, now = (_flat(each) for each in (stored_fields, fields))
    different = [key for key in {**stored, **now} if stored.get(key) != now.get(key)]
    # Views without a transform have no seed, and those without mixing no partners. That the others have one is listed.
    if any(key.startswith(_TRANSFORM) for key in different):
        different = [key for key in different if key not in (_VIEW_SEED, _PARTNERS) or (key in stored and key in now)]
    # Whether the teacher's images are resized follows from the size of the views.
    if _IMAGE_SIZE in different:
        different = [key for key in different if key not in ("teacher.image_size", "teacher.interpolation")]
    # A cache may hold unlabeled samples that are not requested.
    if UNLABELED_SIZE not in now:
        different = [key for key in different if key in now or key not in (UNLABELED_SIZE, "data.left_out.unlabeled")]
    if any_memory_format:
        different = [key for key in different if key != MEMORY_FORMAT]
    return [_field_line(key, stored.get(key), now.get(key), layers) for key in different]


def differing_targets(
    specs: Mapping[str, TensorSpec], targets: Mapping[str, TargetFunction], settings: Mapping[str, TargetSettings]
) -> list[str]:
    """Compare the target functions of a cache with those of a request, for the layers that both have.

    Args:
        specs: Tensors of the cache by name.
        targets: Target functions of the request by the teacher's layer, fitted or not.
        settings: Settings that decide the target functions, by the teacher's layer.

    Returns:
        `SETTING: VALUE in the cache, VALUE now (target of LAYER, ...)` for each difference.
    """
    differences = [
        (line, layer)
        for layer, target in targets.items()
        if layer in specs
        for line in _target_lines(specs[layer], target, settings[layer])
    ]
    return [f"{line} (target of {', '.join(layers)})" for line, layers in _by_line(differences).items()]


def differing_types(specs: Mapping[str, TensorSpec], requested: Mapping[str, str]) -> list[str]:
    """Compare the storage types of a cache with those of a request.

    Args:
        specs: Tensors of the cache by name.
        requested: Storage types of the request by the name of the tensor.

    Returns:
        `SETTING: VALUE in the cache, VALUE now (TENSOR, ...)` for each difference.
    """
    differences = [
        (f"teacher.cache.dtype: {specs[name].dtype} in the cache, {dtype} now", name)
        for name, dtype in requested.items()
        if name in specs and specs[name].dtype != dtype
    ]
    return [f"{line} ({', '.join(names)})" for line, names in _by_line(differences).items()]


def settings_of_samples(split: Split) -> str:
    """Return the settings that decide which samples a split has."""
    if split == "unlabeled":
        return " or ".join(_UNLABELED)
    return "data.limit_test or data.test_fraction" if split == "test" else "data.limit_train or data.val_fraction"


def settings_of_contents(split: Split) -> str:
    """Return the settings that decide the images and labels of a split."""
    return " or ".join(FIELDS[f"{CONTENTS}.{split}"].settings)


def describe_target(description: Mapping[str, Any]) -> str:
    """Format the description of a target function, as `pca(channels=8, images=64)`."""
    settings = ", ".join(f"{key}={value}" for key, value in description.items() if key != "name")
    return f"{description.get('name')}({settings})" if settings else str(description.get("name"))


def describe_views(fields: Mapping[str, Any]) -> str:
    """Format the fingerprint fields of the views by the names of their settings, as `image_size=32, view_seed=0`."""
    names = {key: FIELDS.get(f"views.{key}", _UNKNOWN).settings for key in fields}
    kept = {key: value for key, value in fields.items() if names[key] and f"views.{key}" != _PARTNERS}
    return ", ".join(f"{names[key][0].rpartition('.')[2]}={_text(value)}" for key, value in kept.items())


def find_field(key: str) -> tuple[Field, str]:
    """Find the field to which a dotted name belongs.

    Returns:
        (field, rest of the name below it with a leading dot, or the empty string).
    """
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        found = FIELDS.get(".".join(parts[:end]))
        if found is not None:
            return found, "".join(f".{part}" for part in parts[end:])
    return _UNKNOWN, ""


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields by their dotted names, without the digests of the samples and without empty groups."""
    flat = flatten(dict(fields))
    return {key: value for key, value in flat.items() if not key.startswith(f"{CONTENTS}.") and value != {}}


def _field_line(key: str, stored: Any, now: Any, layers: Sequence[str]) -> str:
    found, rest = find_field(key)
    names = [name for setting in found.settings for name in (layers if setting == LAYERS and layers else (setting,))]
    if key in (_LABELS, _CLASS_MAP) and isinstance(stored, list) and isinstance(now, list):
        values = _differing_classes(stored, now)
    else:
        values = (found.text(stored), found.text(now))
    note = f" ({found.note})" if found.note else ""
    if not names:
        return f"{key.rpartition('.')[2]}{note}: {values[0]} in the cache, {values[1]} now"
    name = " or ".join(name if name == "teacher.run" else f"{name}{rest}" for name in names)
    return f"{name}: {values[0]} in the cache, {values[1]} now{note}"


def _differing_classes(stored: Sequence[Any], now: Sequence[Any]) -> tuple[str, str]:
    if len(stored) != len(now):
        return f"{len(stored)} classes", str(len(now))
    index = next(index for index, pair in enumerate(zip(stored, now, strict=True)) if pair[0] != pair[1])
    return f"class {index} is {_text(stored[index])}", _text(now[index])


def _target_lines(spec: TensorSpec, target: TargetFunction, settings: TargetSettings) -> list[str]:
    stored, now = spec.target or {}, target.description()
    if stored.get("name") != now["name"]:
        return [f"{settings.deciding('direction')}: {stored.get('name')} in the cache, {now['name']} now"]
    if stored != now:
        return [
            f"{_name_of(key, settings)}: {_text(stored.get(key))} in the cache, {_text(now.get(key))} now"
            for key in {**stored, **now}
            if key not in stored or key not in now or stored[key] != now[key]
        ]
    digest = tensors_digest(target.tensors()) if target.tensors() else spec.target_digest
    if digest == spec.target_digest:
        return []
    return [f"{settings.layers}: other fitted tensors, digest {spec.target_digest} in the cache, {digest} now"]


def _name_of(key: str, settings: TargetSettings) -> str:
    """Return the settings that decide an entry of the description of a PCA, which has the width of the student's layer."""
    if key == "channels" and settings.args:
        return f"model.arch or {settings.layers} (channels of the student's layer)"
    setting = "pca_images" if key == "images" else key
    name = settings.deciding(setting)
    return name if name.endswith(f".{setting}") else f"{name} ({key})"


def _by_line(differences: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Group the names of tensors by the line that they share."""
    lines: dict[str, list[str]] = {}
    for line, name in differences:
        lines.setdefault(line, []).append(name)
    return lines


def _text(value: Any, *, default: str = "not set") -> str:
    """Format a value as a config file writes it; `default` for None."""
    if value is None:
        return default
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = dump_yaml(value, in_one_line=True).strip() if isinstance(value, Mapping) else text
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
