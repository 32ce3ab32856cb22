"""Arithmetic of docs/scaling.md: every number of its estimate for ImageNet-1k follows from the rates that the page assumes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision

from kd_accel.config.parsing import load_config_file
from kd_accel.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/scaling.md").read_text().split("## ImageNet-1k on 8 and on 64 GPUs")[1]
CONFIG = load_config_file(RunConfig, ROOT / "configs/imagenet/hybrid.yaml")
LAYERS = CONFIG.distill.features["mse"].layers
ALL_LAYERS = ["layer1", "layer2", "layer3", "layer4"]


def tables() -> list[list[list[str]]]:
    """Return the cells of the page's tables, without their two lines of header."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", PAGE, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]] for block in blocks]


ASSUMED, STORED, RESULTS = tables()
IMAGES, CLASSES, ON_A_NODE, STUDENT, TEACHER, DECODED, DISK, COPY, NETWORK = (
    float(value.replace(",", "")) for _, value in ASSUMED
)


def network(arch: str, layers: list[str]) -> tuple[int, list[torch.Size]]:
    """Return the number of parameters and the shapes [D, H, W] of the layers of a torchvision network at 224 pixels."""
    shapes: list[torch.Size] = []
    size = CONFIG.data.image_size
    with torch.device("meta"):
        model = torchvision.models.get_model(arch.removeprefix("torchvision/"), num_classes=int(CLASSES)).eval()
        for layer in layers:
            model.get_submodule(layer).register_forward_hook(lambda module, args, output: shapes.append(output.shape[1:]))
        model(torch.zeros(1, 3, size, size))
    return sum(weight.numel() for weight in model.parameters()), shapes


def stored_bytes(layers: list[str]) -> dict[str, int]:
    """Return the bytes of an image and view in float16 by the contents of a cache; projected is to the student's channels."""
    student, teacher = network(CONFIG.model.arch, layers)[1], network(CONFIG.teacher.arch, layers)[1]
    logits = 2 * int(CLASSES)
    return {
        "logits": logits,
        "logits and raw features": logits + sum(2 * shape.numel() for shape in teacher),
        "logits and projected features": logits
        + sum(2 * own[0] * shape[1:].numel() for own, shape in zip(student, teacher, strict=True)),
    }


def rates(gpus: int, stored: int, *, is_live: bool) -> dict[str, float]:
    """Return the images per second and GPU of each part by the formulas of the page."""
    nodes = -(-gpus // int(ON_A_NODE))
    found = {
        "compute": 1 / (1 / STUDENT + 1 / TEACHER) if is_live else STUDENT,
        "views": DECODED / ON_A_NODE,
        "copy": COPY * 1e9 / (3 * CONFIG.data.image_size**2 + stored),
    }
    if stored:
        found["disk"] = DISK * 1e9 / ON_A_NODE / stored
    if nodes > 1:
        exchanged = 4 * network(CONFIG.model.arch, [])[0] * 2 * (nodes - 1) / nodes
        found["network"] = NETWORK * 1e9 / exchanged * CONFIG.train.batch_size / gpus
    return found


def row(gpus: int, teacher_output: str, stored: int) -> list[str]:
    """Return the cells of one row of the results."""
    found = {name: round(rate) for name, rate in rates(gpus, stored, is_live=teacher_output == "live").items()}
    columns = ("compute", "views", "disk", "copy", "network")
    least = min(found.values())
    limits = ", ".join(name for name in columns if found.get(name) == least)
    cells = [f"{found[name]:,}" if name in found else "" for name in columns]
    return [str(gpus), teacher_output, f"{least * gpus:,}", f"{IMAGES / least / gpus:.0f}", limits, *cells]


def test_bytes_of_a_cache():
    stored = stored_bytes(LAYERS)
    assert stored == {"logits": 2000, "logits and raw features": 202_704, "logits and projected features": 52_176}
    expected = [[name, f"{size:,}", f"{size * IMAGES / 2**30:.1f}"] for name, size in stored.items()]
    assert [[name.removesuffix(" (this config)"), *cells] for name, *cells in STORED] == expected


def test_every_number_of_the_results():
    cases = {"none (plain training)": 0, "live": 0}
    cases |= {f"cached {name}": size for name, size in stored_bytes(LAYERS).items()}
    assert [row(gpus, teacher_output, stored) for gpus in (8, 64) for teacher_output, stored in cases.items()] == RESULTS


def test_rates_equal_those_computed_by_hand():
    maps = 2 * 512 * 7**2
    found = rates(64, 2000 + maps, is_live=True)
    assert found["compute"] == pytest.approx(1250) and found["views"] == 1250
    assert found["disk"] == pytest.approx(7e9 / 8 / 52_176)
    assert found["copy"] == pytest.approx(25e9 / (150_528 + 52_176))
    assert found["network"] == pytest.approx(12.5e9 / (2 * 7 / 8 * 4 * 11_689_512) * 16)
    assert rates(8, 0, is_live=False).keys() == {"compute", "views", "copy"}


def test_numbers_in_the_text():
    all_stages = stored_bytes(ALL_LAYERS)["logits and projected features"]
    found = rates(64, all_stages, is_live=False)
    numbers = [
        f"takes {(stored_bytes(['layer4'])['logits and projected features'] - 2 * CLASSES) / 1e3:.0f} kB an image and view",
        f"All four stages take {all_stages / 1e3:.0f} kB, {all_stages / 15_380:.0f} times the {15_380 / 1e3:.0f} kB",
        f"{all_stages * IMAGES / 2**30:.0f} GiB a view",
        f"the same drive then feeds each GPU {found['disk']:,.0f} images per second",
        f"the CPUs decode {found['views']:,.0f} images per second and GPU",
        f"{4 * network(CONFIG.model.arch, [])[0] / 1e6:.1f} MB of gradients",
        f"the network allows {found['network']:,.0f} images per second and GPU",
        f"At {CONFIG.train.batch_size // 64} images per GPU and step",
        f"takes {IMAGES / 8 / TEACHER:.0f} s on 8 GPUs and {IMAGES / 64 / TEACHER:.0f} s on 64",
    ]
    page = " ".join(PAGE.split())
    assert [number for number in numbers if number not in page] == []
