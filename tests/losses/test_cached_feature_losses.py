"""Equality of students trained with each feature loss from a cache and with the live teacher, bit for bit (CPU)."""

import pytest

from kd_accel.cache.manifest import read_spec
from tests.support.feature_losses import NAMES
from tests.support.in_process import cache, train
from tests.support.launching import metrics

SHAPES = {"at": (1, 8, 8), "crd": (16, 1, 1), "pkt": (16, 1, 1), "rkd": (16, 1, 1)}
"""Shape of the stored target of layer1, whose map is (16, 8, 8), where it is not the map itself."""
WEIGHTS = {"mgd": 0.001, "rkd": 0.01}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SHAPES else pytest.mark.slow) for name in NAMES])
def test_cached_equals_live(tmp_path, teacher_run, name):
    common = [
        f"--teacher.run={teacher_run}",
        f"--distill.features={{{name}: {{weight: {WEIGHTS.get(name, 1.0)}, layers: [layer1, layer2]}}}}",
        "--data.views=2",
        "--train.max_steps=10",  # of 8 in an epoch: both views
    ]
    use = ["--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path / 'cache'}", "--teacher.cache.dtype=float32"]
    train(tmp_path / "live", *common)
    cache("build", *common, *use)
    assert read_spec(tmp_path / "cache").tensors["layer1"].shape == SHAPES.get(name, (16, 8, 8))
    train(tmp_path / "cached", *common, *use)
    live, cached = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("live", "cached"))
    assert cached == live and metrics(tmp_path / "cached") == metrics(tmp_path / "live")
    assert all(line[f"features/{name}"] > 0 for line in metrics(tmp_path / "live", "train"))
