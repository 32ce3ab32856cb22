"""What a model weighs and how long it takes, against counts by hand and a model whose time is known."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_accel.bench import runner
from kd_accel.bench.graphs import capture
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
from tests.support.launching import run

STUDENT = "import:tests.support.models:student"
TEACHER = "import:tests.support.models:teacher"
MEDIANS = ("median_ms", "p90_ms", "spread_ms")
QUICK = BenchConfig(batch_sizes=[1, 3], device="cpu", min_iterations=20, min_time_s=0.0)


class Sleeper(nn.Module):
    """Takes a known time; says in what mode it was called."""

    def __init__(self, seconds, log):
        super().__init__()
        self.seconds, self.log = seconds, log

    def forward(self, images):
        self.log.append((self.seconds, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        time.sleep(self.seconds)
        return images.sum()


@pytest.fixture(autouse=True)
def kernels():
    """What a bench sets in its process."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def second_gpu(monkeypatch):
    """(calls in their order, an input on cuda:1), with recorders in place of CUDA's devices and events: our own order alone."""
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


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def saved(tmp_path):
    """A directory with what a finished run leaves to be deployed, for images of 24 x 24 pixels."""
    directory = tmp_path / "run"
    directory.mkdir()
    card = ModelCard(TEACHER, "imagenet", {}, ["a", "b", "c", "d"], [0.5] * 3, [0.2] * 3, 24)
    save_model(directory, build_model(TEACHER, num_classes=4), card=card)
    return directory


def test_parameters_and_bytes_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(5, 2).half())
    model[0].bias.requires_grad_(False)
    parameters = (3 * 9 * 8 + 8) + 16 + 12
    assert count_parameters(model) == {"parameters": parameters, "trainable_parameters": parameters - 8}
    assert model_bytes(model) == 4 * (224 + 16) + 2 * 12 + (4 * 16 + 8)  # statistics, and the int64 count of batches


@pytest.mark.parametrize("batch", [1, 4])
def test_multiply_adds_by_hand_per_image(batch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
    assert count_macs(model, torch.randn(batch, 3, 32, 32)) == 16 * 16 * 8 * 27 + 8 * 16 * 16 * 10


def test_multiply_adds_of_a_known_network():
    model = build_model("torchvision/resnet18", num_classes=1000).eval()
    assert count_macs(model, torch.randn(1, 3, 224, 224)) == pytest.approx(1.814e9, rel=1e-3)


def test_latency_is_the_time_that_a_forward_takes():
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


def test_models_are_warm_and_take_turns():
    log = []
    models = {"slow": Sleeper(0.0002, log), "fast": Sleeper(0.0001, log)}
    measure_latency(models, {name: torch.zeros(1, 3, 4, 4) for name in models}, min_iterations=40, min_time_s=0.0)
    called = [seconds for seconds, _, _ in log]
    timed = called[-80:]
    assert called[:-80].count(0.0002) >= 20 and called[:-80].count(0.0001) >= 20
    changes = sum(before != after for before, after in zip(timed, timed[1:], strict=False))
    assert changes == 2 * 10 - 1  # ten rounds of four forwards each


def test_long_forwards_are_warm_after_fewer(monkeypatch):
    monkeypatch.setattr("kd_accel.bench.latency._LONGEST_WARM_UP_S", 0.005)
    log = []
    measure_latency({"x": Sleeper(0.002, log)}, {"x": torch.zeros(1)}, min_iterations=10, min_time_s=0.0)
    assert 2 <= len(log) - 10 <= 5


@pytest.mark.slow
def test_compiled_models_are_compiled_for_every_batch_size():
    """torch's own limit is eight compilations of a class; beyond it a model would run eagerly, without a word."""
    from torch._dynamo import config

    models = [nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)]) for layers in (1, 2, 3)]
    with config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2), torch.inference_mode():
        compile_for_latency(models, batch_sizes=3)
        answers = [model(torch.ones(batch_size, 4)) for model in models for batch_size in (1, 2, 8)]
    expected = [model.forward(torch.ones(batch_size, 4)) for model in models for batch_size in (1, 2, 8)]
    torch.testing.assert_close(answers, expected)
    assert all(model._compiled_call_impl is not None for model in models)


def test_the_tail_is_told_where_there_are_enough_forwards():
    model = {"x": Sleeper(0.0, [])}
    figures = measure_latency(model, {"x": torch.zeros(1)}, min_iterations=1000, min_time_s=0.0)["x"]
    assert figures["iterations"] >= 1000
    assert figures["p90_ms"] <= figures["p99_ms"]


def test_the_least_time_is_filled():
    model = {"x": Sleeper(0.001, [])}
    figures = measure_latency(model, {"x": torch.zeros(1)}, min_iterations=1, min_time_s=0.2)["x"]
    assert figures["iterations"] * figures["mean_ms"] >= 0.5 * 200


def test_precision_reaches_the_forward():
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


def test_another_gpu_is_the_current_device_while_it_is_measured(second_gpu):
    calls, images = second_gpu
    figures = measure_latency({"x": lambda _: calls.append("forward")}, {"x": images}, min_iterations=10, min_time_s=0.0)["x"]
    assert (calls[0], calls[-1]) == ("enter cuda:1", "leave cuda:1")
    assert set(calls[1:-1]) == {"forward", "record", "synchronize cuda:1"}
    assert "record forward record" in " ".join(calls)
    assert figures["median_ms"] == 1.0 and figures["host_median_ms"] > 0
    assert figures["graph_median_ms"] is None and "graph_error" not in figures


def test_a_cuda_graph_is_replayed_where_asked_for(second_gpu, monkeypatch):
    calls, images = second_gpu
    monkeypatch.setattr("kd_accel.bench.latency.capture", lambda forward, device: lambda: calls.append(f"replay on {device}"))
    numbers = {"min_iterations": 10, "min_time_s": 0.0}
    figures = measure_latency({"x": lambda _: calls.append("forward")}, {"x": images}, **numbers, cuda_graph=True)["x"]
    assert figures["graph_median_ms"] == 1.0
    assert "record replay on cuda:1 record" in " ".join(calls) and calls[-1] == "leave cuda:1"
    assert "forward" not in calls[calls.index("replay on cuda:1") :]


def test_a_forward_that_cannot_be_captured_is_measured_otherwise(second_gpu, monkeypatch):
    def fail(forward, device):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("the end of the capture")  # as torch.cuda.graph leaves a failed capture

    monkeypatch.setattr("kd_accel.bench.latency.capture", fail)
    numbers = {"min_iterations": 10, "min_time_s": 0.0}
    figures = measure_latency({"x": lambda _: None}, {"x": second_gpu[1]}, **numbers, cuda_graph=True)["x"]
    assert figures["graph_median_ms"] is None
    assert figures["graph_error"] == "operation not permitted when stream is capturing"
    assert figures["median_ms"] == 1.0


def test_runs_and_archs_by_name(saved, tmp_path, threads):
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
def test_kernels_are_those_of_a_training(monkeypatch, tf32):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not tf32
    figures = bench_models([STUDENT], QUICK.model_copy(update={"tf32": tf32}))
    assert figures["cudnn_benchmark"] is torch.backends.cudnn.benchmark is True
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is tf32
    assert figures["tf32"] == {"convolutions": None, "matmul": None}
    assert runner._tf32(torch.device("cuda")) == {"convolutions": tf32, "matmul": tf32}


def test_tf32_of_convolutions_and_matrix_products_apart(monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
    assert runner._tf32(torch.device("cuda")) == {"convolutions": True, "matmul": False}
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert runner._tf32(torch.device("cuda")) == {"convolutions": False, "matmul": False}


def test_an_evaluation_has_the_kernels_of_its_training(tmp_path):
    train(tmp_path / "run", "--train.max_steps=1", "--train.tf32=false")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert '"samples": ' in say("evaluate", tmp_path / "run")
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("graph", "told"),
    [
        ({"graph_median_ms": None}, "apart)"),
        ({"graph_median_ms": 0.126}, "apart), CUDA graph 0.13 ms"),
        ({"graph_median_ms": None, "graph_error": "it waits"}, "apart), CUDA graph not captured (it waits)"),
    ],
)
def test_the_line_shows_the_graph_next_to_eager(monkeypatch, graph, told):
    monkeypatch.setattr(runner, "measure_latency", lambda *_, **__: {"0": {**dict.fromkeys(MEDIANS, 2.0), **graph}})
    line = say("bench", STUDENT, "--batch_sizes=[1]", "--device=cpu").splitlines()[0]
    assert "batch    1: median 2.00 ms, p90 2.00 ms" in line and line.endswith(told)


def test_a_file_of_figures_knows_what_it_was_made_from(saved, tmp_path):
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


def test_an_image_size_of_ones_own(saved):
    small, large = (bench_models([str(saved)], QUICK.model_copy(update={"image_size": size}))["models"][0] for size in (16, 64))
    assert (small["image_size"], large["image_size"]) == (16, 64)
    assert (large["macs"] - 128) == 16 * (small["macs"] - 128)
    assert large["parameters"] == small["parameters"]


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("runs/nowhere", {}, "run directory 'runs/nowhere' not found"),
        ("resnet18", {}, "run directory 'resnet18' not found; architectures are torchvision/NAME"),
        ("torchvision/resnet19", {}, "did you mean torchvision/resnet"),
        ("torchvision/vit_b_16", {}, "image_size: torchvision/vit_b_16 does not accept images of 32x32 .*--image_size"),
        (STUDENT, {"device": "gpu0"}, "device: 'gpu0' is not a valid device"),
        (STUDENT, {"device": "meta"}, "device: 'meta' is not a valid device; use auto, cpu"),
        (STUDENT, {"device": "cuda:99"}, "device: cuda:99 not found"),
        (STUDENT, {"precision": "fp16"}, "precision: fp16 needs a GPU"),
        (STUDENT, {"cuda_graph": True}, "cuda_graph: true needs a GPU; leave it out"),
    ],
)
def test_what_cannot_be_measured_is_told(name, changes, told):
    with pytest.raises(UserError, match=told):
        bench_models([name], QUICK.model_copy(update=changes))


def test_a_directory_without_a_whole_run(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished run"):
        bench_models([str(tmp_path / "empty")], QUICK)
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        bench_models([str(saved)], QUICK)


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*bench.json"):
        write_json({}, tmp_path / "file" / "bench.json")


@pytest.mark.slow
def test_from_the_command_line(saved, tmp_path):
    out = tmp_path / "bench.json"
    flags = ["--device=cpu", "--threads=1", "--min_iterations=20", "--min_time_s=0", "--batch_sizes=[1]"]
    done = run("bench", saved, f"--out={out}", *flags)
    assert f"{saved}: 0.01 M parameters" in done.stdout
    assert json.loads(out.read_text())["models"][0]["name"] == str(saved)
    assert f"run directory '{tmp_path}/nowhere' not found" in run("bench", tmp_path / "nowhere", code=2).stderr
    assert "is a directory; name a JSON file" in run("bench", saved, f"--out={tmp_path}", code=2).stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_events_and_the_hosts_clock_agree():
    figures = bench_models(["torchvision/resnet18"], BenchConfig(batch_sizes=[64], device="cuda", min_time_s=0.2))
    (latency,) = figures["models"][0]["latency"]
    assert 0 < latency["median_ms"] <= 1.5 * latency["host_median_ms"]
    assert figures["device"] == torch.cuda.get_device_name()


class Waiting(nn.Linear):
    def forward(self, images):
        return super().forward(images) * images.sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_on_a_gpu_a_graph_gives_what_the_forward_gives_and_is_faster(precision):
    model = build_model("torchvision/resnet18", num_classes=10).eval().cuda()
    images = torch.randn(1, 3, 32, 32, device="cuda")
    with torch.inference_mode():
        eager = model(images)
        replayed = capture(lambda: model(images), images.device)()
        torch.testing.assert_close(replayed, eager, rtol=1e-3, atol=1e-3)
    numbers = {"min_iterations": 100, "min_time_s": 0.1, "precision": precision, "cuda_graph": True}
    figures = measure_latency({"model": model}, {"model": images}, **numbers)["model"]
    assert 0 < figures["graph_median_ms"] < figures["median_ms"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_forward_that_waits_is_not_captured():
    images = torch.ones(1, 4, device="cuda")
    models = {"waiting": Waiting(4, 4).cuda(), "plain": nn.Linear(4, 4).cuda()}
    numbers = {"min_iterations": 10, "min_time_s": 0.0, "cuda_graph": True}
    figures = measure_latency(models, dict.fromkeys(models, images), **numbers)
    assert "synchronizing" in figures["waiting"]["graph_error"]
    assert figures["waiting"]["graph_median_ms"] is None and figures["plain"]["graph_median_ms"] > 0
