"""ONNX Runtime as a column of the benchmark: figures next to those of PyTorch, and reasons where it has none."""

import time

import pytest
import torch

from kd_accel.bench import onnx
from kd_accel.bench.runner import bench_models
from kd_accel.config.schema import BenchConfig
from kd_accel.deploy.onnx_network import OnnxNetwork
from kd_accel.errors import UserError
from tests.support.in_process import say

SMALL = "import:tests.support.models:student"
OTHER = "import:tests.support.models:teacher"
QUICK = BenchConfig(batch_sizes=[1, 3], device="cpu", min_iterations=20, min_time_s=0.0, onnx=True)
FIELDS = {"onnxruntime_median_ms", "onnxruntime_p90_ms", "onnxruntime_spread_ms"}


def test_column_has_the_time_of_its_own_forward(monkeypatch):
    """A function of a known duration stands for ONNX Runtime, of which only the first of two models has one."""
    sizes = []

    def replaced(network, images, *, arch, threads):
        if arch == OTHER:
            raise UserError("export: has an operator without counterpart")
        assert threads == torch.get_num_threads() and images.shape == (20, 3, 32, 32)
        return OnnxNetwork(lambda batch: (sizes.append(len(batch)), time.sleep(0.008), network(batch))[2])

    monkeypatch.setattr(onnx, "onnx_network", replaced)
    first, second = bench_models([SMALL, OTHER], QUICK)["models"]
    assert set(sizes) == {1, 3}
    for latency, other in zip(first["latency"], second["latency"], strict=True):
        assert latency["onnxruntime_median_ms"] >= 8 > latency["median_ms"] and latency.keys() >= FIELDS
        assert other["onnxruntime_median_ms"] is None and other["median_ms"] > 0
        assert other["onnxruntime_error"] == "export: has an operator without counterpart"


def test_without_the_setting_nothing_is_exported(monkeypatch):
    monkeypatch.setattr(onnx, "onnx_network", None)
    figures = bench_models([SMALL], QUICK.model_copy(update={"onnx": False}))
    assert not [key for latency in figures["models"][0]["latency"] for key in latency if "onnx" in key]
    assert "onnxruntime" not in figures["versions"]


def test_each_exported_network_gets_the_images_of_its_module():
    column = onnx.OnnxColumn()
    column.models = {"1/onnx": OnnxNetwork(torch.flatten)}
    images = {"0": torch.rand(2, 3, 4, 4), "1": torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)}
    given = column.images(images)
    assert list(given) == ["1/onnx"] and torch.equal(given["1/onnx"], images["1"]) and given["1/onnx"].is_contiguous()


def test_other_precision_is_refused():
    with pytest.raises(UserError, match="onnx: true is timed in float32, unlike precision bf16"):
        bench_models([SMALL], QUICK.model_copy(update={"precision": "bf16"}))


@pytest.mark.slow
def test_command_prints_the_latency_of_onnx_runtime(tmp_path):
    flags = ["--device=cpu", "--threads=1", "--min_iterations=20", "--min_time_s=0.0", "--batch_sizes=[1]", "--onnx=true"]
    before = torch.get_num_threads()
    said = say("bench", SMALL, *flags, f"--out={tmp_path / 'bench.json'}")
    torch.set_num_threads(before)
    assert ", ONNX Runtime 0." in said and '"onnxruntime"' in (tmp_path / "bench.json").read_text()
