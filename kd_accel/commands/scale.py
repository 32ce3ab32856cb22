"""`kd-accel plan --scale`: bytes, times and the narrowest link for machines and data that are not here.

Arithmetic alone, from the shapes of the networks and the rates that the file of --scale gives. A link's rate is the number of
images per second at which it would be full, for one GPU. The student runs at the smallest of them or at its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from kd_accel.commands.plan import kind_of, row_bytes
from kd_accel.commands.teacher import pair_taps
from kd_accel.config import RunConfig, ScaleConfig
from kd_accel.disk import readable_size
from kd_accel.models.zoo import build_model
from kd_accel.types import UserError

_GB = 1e9


@dataclass(frozen=True)
class Traffic:
    """Bytes that one image moves, and one step. row: from disk. copied: to the GPU. gradients: of the whole student."""

    row: int
    copied: int
    gradients: int


def link_rates(scale: ScaleConfig, traffic: Traffic, *, processes: int, batch_size: int) -> dict[str, float]:
    """Images per second for each GPU at which each link is full.

    Between nodes gradients are summed in a ring: each node sends and receives 2 (n - 1) / n of them in a step.
    """
    on_a_node = min(processes, scale.processes_per_node)
    nodes = -(-processes // scale.processes_per_node)
    rates = {
        "views": scale.decoded_images_per_s / on_a_node,
        "copy": scale.copy_gb_per_s * _GB / traffic.copied,
    }
    if traffic.row:
        rates["disk"] = scale.disk_gb_per_s * _GB / on_a_node / traffic.row
    if nodes > 1:
        exchanged = 2 * (nodes - 1) / nodes * traffic.gradients
        rates["network"] = scale.network_gb_per_s * _GB / exchanged * batch_size / processes
    return rates


def reckon(config: RunConfig, scale: ScaleConfig, kinds: dict[str, int], parameters: int) -> list[dict[str, Any]]:
    """A row for each number of processes and each way of teaching. kinds: bytes of a row and view by what a cache keeps."""
    pixels = 3 * config.data.image_size**2
    student_s, teacher_s = 1 / scale.student_images_per_s, 1 / scale.teacher_images_per_s
    ways = {"plain": (student_s, 0), "live": (student_s + teacher_s, 0)} | {
        f"cached {kind}": (student_s, size) for kind, size in kinds.items()
    }
    found = []
    for processes in scale.processes:
        for way, (compute_s, row) in ways.items():
            traffic = Traffic(row, pixels + row, 4 * parameters)
            links = link_rates(scale, traffic, processes=processes, batch_size=config.train.batch_size)
            narrowest = min(links, key=lambda name: links[name])
            rate = min(1 / compute_s, links[narrowest])
            found.append(
                {
                    "processes": processes,
                    "way": way,
                    "images_per_s": rate * processes,
                    "epoch_s": scale.rows / rate / processes,
                    "held_up_by": narrowest if links[narrowest] < 1 / compute_s else "compute",
                    "links": links,
                }
            )
    return found


def run_scale(config: RunConfig, scale: ScaleConfig, *, as_json: bool) -> None:
    """Print what both ways would cost there. Raises UserError for a config without a teacher's architecture."""
    if config.teacher is None or config.teacher.arch is None:
        raise UserError("teacher.arch: missing; --scale reckons from the architecture of the teacher, not from a run of it")
    student = _network(config.model.arch, config.model, scale)
    teacher = _network(config.teacher.arch, config.teacher, scale)
    pairs = pair_taps(config, student, teacher)
    dtype = config.teacher.dtype or "float16"
    kinds = row_bytes(scale.num_classes, pairs, dtype)
    parameters = sum(weight.numel() for weight in student.parameters())
    result = {
        "scale": asdict(scale),
        "dtype": dtype,
        "bytes_per_row_and_view": kinds,
        "bytes_per_view": {kind: size * scale.rows for kind, size in kinds.items()},
        "build_s_per_view": {str(count): scale.rows / count / scale.teacher_images_per_s for count in scale.processes},
        "parameters": parameters,
        "this_config": kind_of(config, pairs),
        "ways": reckon(config, scale, kinds, parameters),
    }
    print(json.dumps(result) if as_json else _described(result, scale))


def _network(arch: str, settings: Any, scale: ScaleConfig) -> nn.Module:
    return build_model(arch, num_classes=scale.num_classes, stem=settings.stem, arch_args=settings.arch_args)


def _described(result: dict[str, Any], scale: ScaleConfig) -> str:
    lines = [f"{scale.rows} rows, {scale.num_classes} classes. In {result['dtype']} a cache takes"]
    for kind, size in result["bytes_per_row_and_view"].items():
        marker = " <- this config" if kind == result["this_config"] else ""
        lines.append(f"  {kind:30} {size:>9} bytes per row and view, {readable_size(size * scale.rows):>10} a view{marker}")
    built = ", ".join(f"{seconds / 60:.1f} min on {count}" for count, seconds in result["build_s_per_view"].items())
    lines += [f"the teacher's forward for one view: {built} GPUs", ""]
    header = (
        f"{'GPUs':>4}  {'way':37} {'images/s':>9} {'epoch':>9}  {'held up by':10}  images/s per GPU at which a link is full"
    )
    lines.append(header)
    for row in result["ways"]:
        links = ", ".join(f"{name} {rate:.0f}" for name, rate in sorted(row["links"].items(), key=lambda item: item[1]))
        lines.append(
            f"{row['processes']:>4}  {row['way']:37} {row['images_per_s']:>9.0f} {row['epoch_s']:>7.0f} s  "
            f"{row['held_up_by']:10}  {links}"
        )
    return "\n".join(lines)
