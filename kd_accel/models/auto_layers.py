"""Choice of the layers that are compared (`layers: auto`): the last block of each resolution, paired from the deepest one.

Both choices depend only on the architectures and the size of the images. Blocks are the parts that repeat: residual blocks,
transformer blocks, and sequences of them. The names of modules play no role.

References:
    Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation", NeurIPS 2023 (all
    networks are divided into four parts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from kd_accel.errors import UserError
from kd_accel.models.feature_extractor import feature_maps
from kd_accel.models.projectors import Shape

_IMAGE_SIZE = 64
"""Smallest images on which resolutions are told apart: five halvings end at 2 pixels, so that the last two still differ."""
_PARTS = 4
"""Number of layers of a network of one resolution, as many as the usual network with several resolutions has."""


def auto_layers(model: nn.Module, *, image_size: int, field: str = "layers") -> list[str]:
    """Choose the layers of a network that `layers: auto` would compare with those of a network with as many.

    Args:
        model: Network; it is not changed.
        image_size: Height and width of the images, in pixels.
        field: Config key of the layers, for error messages.

    Returns:
        Names of the layers, in the order of execution. For ResNets: layer1, layer2, layer3, layer4.

    Raises:
        UserError: If the network does not accept images of this size, or no layer outputs a feature map.
    """
    depths = _depths(model, image_size, field)
    return depths.last(min(len(depths.names), _PARTS) if depths.is_uniform else len(depths.names))


def pair_layers(
    student: nn.Module, teacher: nn.Module, *, image_size: int, teacher_size: int | None = None, field: str = "layers"
) -> dict[str, str]:
    """Pair the layers of two networks as `layers: auto` does.

    The last block of each resolution is paired with that of the other network, the deepest first, until one network has no
    more. Counting from the end pairs equal resolutions of networks that divide the image equally often, and equal depths
    otherwise: layer4 with layer4 for ResNets of any stem. A network of one resolution, such as a ViT, is divided into parts of
    equal depth, as many as the other network has layers.

    Args:
        student: Student's network; it is not changed.
        teacher: Teacher's network; it is not changed.
        image_size: Height and width of the images, in pixels.
        teacher_size: Height and width of the teacher's images; None = those of the student's.
        field: Config key of the layers, for error messages.

    Returns:
        {student layer: teacher layer}, in the order of execution.

    Raises:
        UserError: If a network does not accept images of this size, or none of its layers outputs a feature map.
    """
    pair = [_depths(student, image_size, field), _depths(teacher, teacher_size or image_size, field)]
    numbers = [len(depths.names) for depths in pair]
    if all(depths.is_uniform for depths in pair):
        numbers.append(_PARTS)
    layers, teacher_layers = (depths.last(min(numbers)) for depths in pair)
    return dict(zip(layers, teacher_layers, strict=True))


@dataclass(frozen=True)
class _Depths:
    """Layers of a network from which some are chosen.

    Attributes:
        names: The last block of each resolution, or each block of a network of one resolution, in the order of execution.
        is_uniform: Whether the network has one resolution.
    """

    names: list[str]
    is_uniform: bool

    def last(self, number: int) -> list[str]:
        """Return the last `number` layers; for a network of one resolution the ends of as many equal parts."""
        total = len(self.names)
        if not self.is_uniform:
            return self.names[total - number :]
        return [self.names[-(-part * total // number) - 1] for part in range(1, number + 1)]


def _depths(model: nn.Module, image_size: int, field: str) -> _Depths:
    maps = _maps(model, image_size)
    blocks = _blocks(model, "", maps)
    names = blocks or _plain_layers(model, maps)
    if not names:
        raise UserError(
            f"{field}: auto finds no layer of {type(model).__name__} with a feature map; use another arch, or remove the loss"
        )
    by_height = {maps[name][1]: name for name in names}
    if len(by_height) == 1 and blocks:
        return _Depths([name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)], is_uniform=True)
    last = set(by_height.values())
    return _Depths([name for name in names if name in last], is_uniform=False)


def _maps(model: nn.Module, image_size: int) -> dict[str, Shape]:
    """Return the shapes of all feature maps, on larger images than those of the data if these are small and it is possible."""
    if image_size < _IMAGE_SIZE:
        try:
            return feature_maps(model, image_size=_IMAGE_SIZE)
        except UserError:
            pass  # a network for one size of images, such as a ViT
    return feature_maps(model, image_size=image_size)


def _blocks(module: nn.Module, prefix: str, maps: Mapping[str, Shape]) -> list[str]:
    """Return the names of the blocks in a module, in the order of execution.

    A block outputs a map, contains at least two layers with weights, and is not part of another block, unless that is a
    sequence of blocks or the only one.
    """
    parts = dict(_parts(module, prefix, maps))
    blocks = [name for name in maps if name in parts and _is_deep(parts[name]) and not _resizes(name, parts[name], maps)]
    if len(blocks) != 1:
        return blocks
    inner = _blocks(parts[blocks[0]], f"{blocks[0]}.", maps)
    return inner if len(inner) > 1 else blocks


def _plain_layers(model: nn.Module, maps: Mapping[str, Shape]) -> list[str]:
    """Return the layers of a network without blocks, such as VGG, in the order of execution, without those that pool."""
    parts = dict(_parts(model, "", maps))
    names = (name for name in maps if name in parts and not _resizes(name, parts[name], maps))
    return [name for name in names if "Pool" not in type(parts[name]).__name__]


def _parts(module: nn.Module, prefix: str, maps: Mapping[str, Shape]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in a module by name. The inside of a part that outputs a map is hidden unless it is a sequence."""
    for name, part in module.named_children():
        path = f"{prefix}{name}"
        yield path, part
        if path not in maps or isinstance(part, nn.Sequential):
            yield from _parts(part, f"{path}.", maps)


def _is_deep(module: nn.Module) -> bool:
    """Return whether a module contains at least two convolutions or linear layers, or others with a matrix of weights."""
    return sum(any(weight.dim() > 1 for weight in part.parameters(recurse=False)) for part in module.modules()) > 1


def _resizes(name: str, part: nn.Module, maps: Mapping[str, Shape]) -> bool:
    """Return whether a part is a sequence whose own parts output maps of different heights."""
    if not isinstance(part, nn.Sequential):
        return False
    inner = (f"{name}.{child}" for child, _ in part.named_children())
    return len({maps[path][1] for path in inner if path in maps}) > 1
