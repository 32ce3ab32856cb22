"""What `plan --scale` reckons, against the same by hand, and against the page that quotes it."""

import json
import re
from pathlib import Path

import pytest

from kd_accel.commands.scale import Traffic, link_rates
from kd_accel.config import ScaleConfig
from tests.in_process import say

ROOT = Path(__file__).parent.parent
COMMAND = ["plan", "--config", "configs/imagenet/hybrid.yaml", "--scale", "configs/imagenet/nodes.yaml"]
SCALE = ScaleConfig(
    rows=1000,
    num_classes=10,
    student_images_per_s=100.0,
    teacher_images_per_s=50.0,
    decoded_images_per_s=4000.0,
    disk_gb_per_s=2.0,
    copy_gb_per_s=10.0,
    network_gb_per_s=1.0,
    processes_per_node=4,
)


@pytest.fixture
def reckoned(monkeypatch):
    monkeypatch.chdir(ROOT)
    return json.loads(say(*COMMAND, "--json").splitlines()[-1])


def test_links_by_hand():
    one_node = link_rates(SCALE, Traffic(row=10_000, copied=20_000, gradients=40_000_000), processes=4, batch_size=64)
    assert one_node == {"views": 1000.0, "copy": 500_000.0, "disk": 2e9 / 4 / 10_000}
    two_nodes = link_rates(SCALE, Traffic(row=0, copied=20_000, gradients=40_000_000), processes=8, batch_size=64)
    assert two_nodes.keys() == {"views", "copy", "network"}
    steps_per_s = 1e9 / (2 * (2 - 1) / 2 * 40_000_000)
    assert two_nodes["network"] == pytest.approx(steps_per_s * 64 / 8)


def test_imagenet_by_hand(reckoned):
    maps = 2 * 512 * 7**2  # of layer4, in float16
    assert reckoned["bytes_per_row_and_view"] == {
        "logits": 2000,
        "logits and raw features": 2000 + 4 * maps,
        "logits and projected features": 2000 + maps,
    }
    assert reckoned["bytes_per_view"]["logits"] == 2000 * 1_281_167
    assert reckoned["parameters"] == 11_689_512
    ways = {(row["processes"], row["way"]): row for row in reckoned["ways"]}
    assert len(ways) == 2 * 5
    live, raw = ways[8, "live"], ways[8, "cached logits and raw features"]
    assert live["held_up_by"] == "views" or live["images_per_s"] == pytest.approx(8 / (1 / 2500 + 1 / 2500))
    assert raw["held_up_by"] == "views" and raw["images_per_s"] == pytest.approx(10_000)
    assert raw["links"]["disk"] == pytest.approx(7e9 / 8 / (2000 + 4 * maps))
    assert raw["epoch_s"] == pytest.approx(1_281_167 / raw["images_per_s"])


def test_features_of_all_stages_by_hand(monkeypatch):
    """What docs/scaling.md says of them."""
    monkeypatch.chdir(ROOT)
    said = say(*COMMAND, "--json", "--distill.feature.taps=[layer1, layer2, layer3, layer4]").splitlines()[-1]
    row_bytes = 2000 + sum(2 * width * size**2 for size, width in {56: 64, 28: 128, 14: 256, 7: 512}.items())
    assert json.loads(said)["bytes_per_row_and_view"]["logits and projected features"] == row_bytes == 754_640
    cached = next(row for row in json.loads(said)["ways"] if row["way"] == "cached logits and projected features")
    assert cached["held_up_by"] == "disk" and int(cached["links"]["disk"]) == int(7e9 / 8 / row_bytes) == 1159


def test_the_page_quotes_what_the_command_prints(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert f"$ kd-accel {' '.join(COMMAND)}" in page
    lines = {line.strip() for line in page.splitlines()}
    printed = [line.strip() for line in say(*COMMAND).splitlines() if line.strip()]
    assert len(printed) > 10 and not [line for line in printed if line not in lines]
    for figure in re.findall(r"\d{1,3}(?:,\d{3})+ images per second", page):
        assert re.search(rf"\b{figure.split()[0].replace(',', '')}\b", " ".join(printed)), figure


def test_what_cannot_be_reckoned(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    bad = tmp_path / "nodes.yaml"
    bad.write_text("rows: 10\nnum_classes: 0\nprocesses: []\n")
    assert "disk_gb_per_s" in say(*COMMAND[:3], "--scale", bad, code=2)
    text = (ROOT / "configs/imagenet/nodes.yaml").read_text()
    bad.write_text(text.replace("num_classes: 1000", "num_classes: 0"))
    assert "num_classes: 0 must be above 0" in say(*COMMAND[:3], "--scale", bad, code=2)
    assert "teacher.arch: missing" in say("plan", "--scale", "configs/imagenet/nodes.yaml", code=2)
