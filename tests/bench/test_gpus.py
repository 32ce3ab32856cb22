"""Latency on GPUs: the order of calls on a fake device, and on a real one events and CUDA graphs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_accel.bench.latency import measure_latency
from kd_accel.bench.runner import bench_models
from kd_accel.config.schema import BenchConfig
from kd_accel.models.cuda_graphs import capture
from kd_accel.models.factory import build_model


@pytest.fixture
def second_gpu(monkeypatch):
    """Fake GPU cuda:1: a log of calls and an input. It tests the order of calls, not CUDA itself."""
    calls = []

    class Device:
        def __init__(self, device):
            self.device = str(device)

        def __enter__(self):
            calls.append(f"enter {self.device}")

        def __exit__(self, *args):
            calls.append(f"leave {self.device}")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def elapsed_time(self, end):
            return 1.0

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(f"synchronize {device}"))
    return calls, SimpleNamespace(device=torch.device("cuda:1"))


def test_measured_gpu_is_the_current_device(second_gpu):
    calls, images = second_gpu
    figures = measure_latency({"x": lambda _: calls.append("forward")}, {"x": images}, min_iterations=10, min_time_s=0.0)["x"]
    assert (calls[0], calls[-1]) == ("enter cuda:1", "leave cuda:1")
    assert set(calls[1:-1]) == {"forward", "record", "synchronize cuda:1"}
    assert "record forward record" in " ".join(calls)
    assert figures["median_ms"] == 1.0 and figures["host_median_ms"] > 0
    assert figures["graph_median_ms"] is None and "graph_error" not in figures


def test_cuda_graph_is_replayed_when_enabled(second_gpu, monkeypatch):
    calls, images = second_gpu
    monkeypatch.setattr("kd_accel.bench.latency.capture", lambda forward, device: lambda: calls.append(f"replay on {device}"))
    limits = {"min_iterations": 10, "min_time_s": 0.0}
    figures = measure_latency({"x": lambda _: calls.append("forward")}, {"x": images}, **limits, cuda_graph=True)["x"]
    assert figures["graph_median_ms"] == 1.0
    assert "record replay on cuda:1 record" in " ".join(calls) and calls[-1] == "leave cuda:1"
    assert "forward" not in calls[calls.index("replay on cuda:1") :]


def test_failed_capture_is_reported_with_the_eager_latency(second_gpu, monkeypatch):
    def fail(forward, device):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            # torch.cuda.graph raises a second error at the end of a failed capture.
            raise RuntimeError("the end of the capture")

    monkeypatch.setattr("kd_accel.bench.latency.capture", fail)
    limits = {"min_iterations": 10, "min_time_s": 0.0}
    figures = measure_latency({"x": lambda _: None}, {"x": second_gpu[1]}, **limits, cuda_graph=True)["x"]
    assert figures["graph_median_ms"] is None
    assert figures["graph_error"] == "operation not permitted when stream is capturing"
    assert figures["median_ms"] == 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
def test_gpu_events_agree_with_the_host_clock():
    figures = bench_models(["torchvision/resnet18"], BenchConfig(batch_sizes=[64], device="cuda", min_time_s=0.2))
    (latency,) = figures["models"][0]["latency"]
    assert 0 < latency["median_ms"] <= 1.5 * latency["host_median_ms"]
    assert figures["device"] == torch.cuda.get_device_name()


class Synchronizing(nn.Linear):
    """Layer whose forward reads a value back from the device."""

    def forward(self, images):
        return super().forward(images) * images.sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_gpu_graph_equals_the_forward_and_is_faster(precision):
    model = build_model("torchvision/resnet18", num_classes=10).eval().cuda()
    images = torch.randn(1, 3, 32, 32, device="cuda")
    with torch.inference_mode():
        eager = model(images)
        replayed = capture(lambda: model(images), images.device)()
        torch.testing.assert_close(replayed, eager, rtol=1e-3, atol=1e-3)
    settings = {"min_iterations": 100, "min_time_s": 0.1, "precision": precision, "cuda_graph": True}
    figures = measure_latency({"model": model}, {"model": images}, **settings)["model"]
    assert 0 < figures["graph_median_ms"] < figures["median_ms"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
def test_gpu_forward_that_synchronizes_is_not_captured():
    images = torch.ones(1, 4, device="cuda")
    models = {"synchronizing": Synchronizing(4, 4).cuda(), "plain": nn.Linear(4, 4).cuda()}
    settings = {"min_iterations": 10, "min_time_s": 0.0, "cuda_graph": True}
    figures = measure_latency(models, dict.fromkeys(models, images), **settings)
    assert "synchronizing" in figures["synchronizing"]["graph_error"]
    assert figures["synchronizing"]["graph_median_ms"] is None and figures["plain"]["graph_median_ms"] > 0
