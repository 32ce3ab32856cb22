"""The benchmark: counts against values computed by hand, and latencies of modules with a known duration."""

import json
import time

import pytest
import torch
from torch import nn

from kd_accel.bench import environment
from kd_accel.bench.latency import compile_for_latency, measure_latency
from kd_accel.bench.model_stats import count_macs, count_parameters, model_bytes
from kd_accel.bench.provenance import is_measured
from kd_accel.bench.runner import bench_models
from kd_accel.config.schema import BenchConfig
from kd_accel.errors import UserError
from kd_accel.io.files import write_json
from kd_accel.models.factory import build_model
from kd_accel.models.weights import ModelCard, save_model
from tests.support.in_process import say, train

STUDENT = "import:tests.support.models:student"
TEACHER = "import:tests.support.models:teacher"
QUICK = BenchConfig(batch_sizes=[1, 3], device="cpu", min_iterations=20, min_time_s=0.0)


class Sleeper(nn.Module):
    """Module whose forward has a known duration, and logs the modes in which it runs."""

    def __init__(self, seconds, log):
        super().__init__()
        self.seconds, self.log = seconds, log

    def forward(self, images):
        self.log.append((self.seconds, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        time.sleep(self.seconds)
        return images.sum()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def saved(tmp_path):
    """Directory with the files for deployment of a finished run, for images of 24x24 pixels."""
    directory = tmp_path / "run"
    directory.mkdir()
    card = ModelCard(TEACHER, "imagenet", {}, ["a", "b", "c", "d"], [0.5] * 3, [0.2] * 3, 24)
    save_model(directory, build_model(TEACHER, num_classes=4), card=card)
    return directory


def test_parameters_and_bytes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(5, 2).half())
    model[0].bias.requires_grad_(False)
    parameters = (3 * 9 * 8 + 8) + 16 + 12
    assert count_parameters(model) == {"parameters": parameters, "trainable_parameters": parameters - 8}
    assert model_bytes(model) == 4 * (224 + 16) + 2 * 12 + (4 * 16 + 8)  # statistics, and the int64 count of batches


@pytest.mark.parametrize("batch", [1, 4])
def test_multiply_adds_per_image(batch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
    assert count_macs(model, torch.randn(batch, 3, 32, 32)) == 16 * 16 * 8 * 27 + 8 * 16 * 16 * 10


@pytest.mark.alone
def test_latency_is_the_time_of_a_forward():
    log = []
    models = {"slow": Sleeper(0.002, log), "fast": Sleeper(0.0005, log)}
    images = {name: torch.zeros(1, 3, 4, 4) for name in models}
    results = measure_latency(models, images, min_iterations=40, min_time_s=0.0)
    assert 2.0 <= results["slow"]["median_ms"] < 2.0 * 3
    assert 0.5 <= results["fast"]["median_ms"] < results["slow"]["median_ms"]
    for figures in results.values():
        assert figures["iterations"] == 40
        assert figures["median_ms"] <= figures["p90_ms"]
        assert figures["p99_ms"] is None
        assert figures["mean_ms"] > 0 and figures["std_ms"] >= 0 and figures["spread_ms"] >= 0
        assert "host_median_ms" not in figures and "graph_error" not in figures
        assert figures["graph_median_ms"] is None
    assert all(is_inference for _, is_inference, _ in log)
    assert not any(is_autocast for _, _, is_autocast in log)


def test_models_are_warmed_up_and_interleaved():
    log = []
    models = {"slow": Sleeper(0.0002, log), "fast": Sleeper(0.0001, log)}
    measure_latency(models, {name: torch.zeros(1, 3, 4, 4) for name in models}, min_iterations=40, min_time_s=0.0)
    called = [seconds for seconds, _, _ in log]
    timed = called[-80:]
    assert called[:-80].count(0.0002) >= 20 and called[:-80].count(0.0001) >= 20
    changes = sum(before != after for before, after in zip(timed, timed[1:], strict=False))
    assert changes == 2 * 10 - 1  # ten rounds of four forwards each


def test_warm_up_of_slow_forwards_is_limited_in_time(monkeypatch):
    monkeypatch.setattr("kd_accel.bench.latency._MAX_WARM_UP_S", 0.005)
    log = []
    measure_latency({"x": Sleeper(0.002, log)}, {"x": torch.zeros(1)}, min_iterations=10, min_time_s=0.0)
    assert 2 <= len(log) - 10 <= 5


@pytest.mark.slow
def test_compiled_models_are_compiled_for_every_batch_size():
    """torch compiles a class eight times at most by default; further models run eagerly, without a warning."""
    from torch._dynamo import config

    models = [nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)]) for layers in (1, 2, 3)]
    with config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2), torch.inference_mode():
        compile_for_latency(models, batch_sizes=3)
        outputs = [model(torch.ones(batch_size, 4)) for model in models for batch_size in (1, 2, 8)]
    expected = [model.forward(torch.ones(batch_size, 4)) for model in models for batch_size in (1, 2, 8)]
    torch.testing.assert_close(outputs, expected)
    assert all(model._compiled_call_impl is not None for model in models)


def test_p99_is_reported_with_enough_iterations():
    model = {"x": Sleeper(0.0, [])}
    figures = measure_latency(model, {"x": torch.zeros(1)}, min_iterations=1000, min_time_s=0.0)["x"]
    assert figures["iterations"] >= 1000
    assert figures["p90_ms"] <= figures["p99_ms"]


def test_minimum_time_is_reached():
    model = {"x": Sleeper(0.001, [])}
    figures = measure_latency(model, {"x": torch.zeros(1)}, min_iterations=1, min_time_s=0.2)["x"]
    assert figures["iterations"] * figures["mean_ms"] >= 0.5 * 200


def test_forward_runs_under_autocast():
    log = []
    measure_latency({"x": Sleeper(0.0, log)}, {"x": torch.zeros(1)}, min_iterations=1, min_time_s=0.0, precision="bf16")
    assert all(is_autocast for _, _, is_autocast in log)


def test_autocast_is_entered_once_per_forward(monkeypatch):
    entered, log = [], []

    class Counted(torch.autocast):
        def __enter__(self):
            entered.append(self.fast_dtype)
            return super().__enter__()

    monkeypatch.setattr(torch, "autocast", Counted)
    models = {"one": Sleeper(0.0, log), "two": Sleeper(0.0, log)}
    images = {name: torch.zeros(1) for name in models}
    measure_latency(models, images, min_iterations=10, min_time_s=0.0, precision="bf16")
    assert entered == [torch.bfloat16] * len(log) and len(log) >= 2 * 30


def test_runs_and_architectures_by_name(saved, tmp_path, threads):
    figures = bench_models([f"{saved}/", STUDENT], QUICK.model_copy(update={"threads": 1}))
    assert (figures["device"], figures["dtype"], figures["threads"]) == ("cpu", "float32", 1)
    assert figures["versions"]["torch"] == torch.__version__
    teacher, student = figures["models"]
    assert (teacher["name"], teacher["arch"], teacher["image_size"]) == (str(saved), TEACHER, 24)
    assert (student["name"], student["arch"], student["image_size"]) == (STUDENT, STUDENT, 32)
    assert student["parameters"] == (27 * 8 + 8) + (72 * 16 + 16) + (16 * 10 + 10)
    assert student["macs"] == 8 * 8 * 8 * 27 + 2 * 2 * 16 * 72 + 160
    assert teacher["parameters"] == (27 * 16 + 16) + 32 + (144 * 32 + 32) + 64 + (32 * 4 + 4)
    for entry in (teacher, student):
        assert [latency["batch_size"] for latency in entry["latency"]] == [1, 3]
        assert all(latency["median_ms"] > 0 and latency["iterations"] == 20 for latency in entry["latency"])
    path = tmp_path / "deep/er/bench.json"
    write_json(figures, path)
    assert json.loads(path.read_text()) == figures
    assert [entry.name for entry in path.parent.iterdir()] == ["bench.json"]


@pytest.mark.parametrize("tf32", [True, False])
def test_benchmark_uses_the_kernels_of_a_training(monkeypatch, tf32):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not tf32
    figures = bench_models([STUDENT], QUICK.model_copy(update={"tf32": tf32}))
    assert figures["cudnn_benchmark"] is torch.backends.cudnn.benchmark is True
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is tf32
    assert figures["tf32"] == {"convolutions": None, "matmul": None}
    assert environment._tf32(torch.device("cuda")) == {"convolutions": tf32, "matmul": tf32}


def test_tf32_is_reported_separately_for_convolutions_and_matrix_products(monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
    assert environment._tf32(torch.device("cuda")) == {"convolutions": True, "matmul": False}
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert environment._tf32(torch.device("cuda")) == {"convolutions": False, "matmul": False}


def test_evaluation_uses_the_kernels_of_its_training(tmp_path):
    train(tmp_path / "run", "--train.max_steps=1", "--train.tf32=false")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert '"samples": ' in say("evaluate", tmp_path / "run")
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_bench_file_identifies_runs_models_and_settings(saved, tmp_path):
    path = tmp_path / "bench.json"
    assert not is_measured(path, [saved], QUICK)
    write_json(bench_models([str(saved)], QUICK), path)
    assert is_measured(path, [saved], QUICK)
    assert not is_measured(path, [saved], QUICK.model_copy(update={"batch_sizes": [1]}))
    assert not is_measured(path, [saved, saved], QUICK)
    assert not is_measured(path, [], QUICK)
    card = ModelCard(TEACHER, "imagenet", {}, ["a", "b", "c", "d"], [0.5] * 3, [0.2] * 3, 24)
    save_model(saved, build_model(TEACHER, num_classes=4, seed=1), card=card)
    assert not is_measured(path, [saved], QUICK)
    path.write_text("{")
    assert not is_measured(path, [saved], QUICK)


def test_image_size_replaces_that_of_the_run(saved):
    small, large = (bench_models([str(saved)], QUICK.model_copy(update={"image_size": size}))["models"][0] for size in (16, 64))
    assert (small["image_size"], large["image_size"]) == (16, 64)
    assert (large["macs"] - 128) == 16 * (small["macs"] - 128)
    assert large["parameters"] == small["parameters"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("runs/nowhere", {}, "run directory 'runs/nowhere' not found"),
        ("resnet18", {}, "run directory 'resnet18' not found; give a run directory, or an architecture as torchvision/"),
        ("torchvision/resnet19", {}, "did you mean torchvision/resnet"),
        (
            "torchvision/vit_b_16",
            {},
            "image_size: torchvision/vit_b_16 does not accept images of 32x32 .*; set another --image_size",
        ),
        (STUDENT, {"device": "gpu0"}, "device: 'gpu0' is not a valid device"),
        (STUDENT, {"device": "meta"}, "device: 'meta' is not a valid device; use auto, cpu"),
        (STUDENT, {"device": "cuda:99"}, "device: cuda:99 not found"),
        (STUDENT, {"batch_sizes": [10**9]}, "^batch_sizes: 1000000000 images of 32x32 do not fit in memory; lower batch_sizes"),
        (STUDENT, {"image_size": 10**7}, "^batch_sizes: 1 images of 10000000x10000000 do not fit in memory; .* or image_size"),
        (STUDENT, {"precision": "fp16"}, "precision: fp16 needs a GPU"),
        (STUDENT, {"cuda_graph": True}, "cuda_graph: true needs a GPU; leave it out"),
    ],
)
def test_invalid_models_and_settings_are_refused(name, changes, message):
    with pytest.raises(UserError, match=message):
        bench_models([name], QUICK.model_copy(update=changes))


def test_unfinished_or_damaged_run_is_refused(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished run"):
        bench_models([str(tmp_path / "empty")], QUICK)
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        bench_models([str(saved)], QUICK)


def test_unwritable_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*bench.json"):
        write_json({}, tmp_path / "file" / "bench.json")
