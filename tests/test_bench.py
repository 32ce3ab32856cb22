"""What a model weighs and how long it takes, against counts by hand and a model whose time is known."""

import json
import time

import pytest
import torch
from torch import nn

from kd_accel.bench.identity import is_measured
from kd_accel.bench.latency import compile_for_latency, measure_latency
from kd_accel.bench.named import bench_models
from kd_accel.bench.params import count_macs, count_parameters, model_bytes
from kd_accel.config import BenchConfig
from kd_accel.disk import write_json
from kd_accel.models.files import ModelCard, save_model
from kd_accel.models.zoo import build_model
from kd_accel.types import UserError
from tests.launching import run

STUDENT = "import:tests.own_models:student"
TEACHER = "import:tests.own_models:teacher"
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
        assert "host_median_ms" not in figures
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


def test_runs_and_archs_by_name(saved, tmp_path, threads):
    figures = bench_models([f"{saved}/", STUDENT], BenchConfig(**{**vars(QUICK), "threads": 1}))
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


def test_a_file_of_figures_knows_what_it_was_made_from(saved, tmp_path):
    path = tmp_path / "bench.json"
    assert not is_measured(path, [saved], QUICK)
    write_json(bench_models([str(saved)], QUICK), path)
    assert is_measured(path, [saved], QUICK)
    assert not is_measured(path, [saved], BenchConfig(**{**vars(QUICK), "batch_sizes": [1]}))
    assert not is_measured(path, [saved, saved], QUICK)
    assert not is_measured(path, [], QUICK)
    card = ModelCard(TEACHER, "imagenet", {}, ["a", "b", "c", "d"], [0.5] * 3, [0.2] * 3, 24)
    save_model(saved, build_model(TEACHER, num_classes=4, seed=1), card=card)
    assert not is_measured(path, [saved], QUICK)
    path.write_text("{")
    assert not is_measured(path, [saved], QUICK)


def test_an_image_size_of_ones_own(saved):
    small, large = (
        bench_models([str(saved)], BenchConfig(**{**vars(QUICK), "image_size": size}))["models"][0] for size in (16, 64)
    )
    assert (small["image_size"], large["image_size"]) == (16, 64)
    assert (large["macs"] - 128) == 16 * (small["macs"] - 128)
    assert large["parameters"] == small["parameters"]


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("runs/nowhere", {}, "no run directory 'runs/nowhere'"),
        ("resnet18", {}, "no run directory 'resnet18'; an arch is torchvision/NAME"),
        ("torchvision/resnet19", {}, "did you mean torchvision/resnet"),
        ("torchvision/vit_b_16", {}, "image_size: torchvision/vit_b_16 does not take images of 32x32 .*--image_size"),
        (STUDENT, {"device": "gpu0"}, "device: 'gpu0' is no device"),
        (STUDENT, {"device": "meta"}, "device: 'meta' is no device to measure on; use auto, cpu"),
        (STUDENT, {"device": "cuda:99"}, "device: cuda:99 is not there"),
        (STUDENT, {"precision": "fp16"}, "precision: fp16 needs a GPU"),
    ],
)
def test_what_cannot_be_measured_is_told(name, changes, told):
    with pytest.raises(UserError, match=told):
        bench_models([name], BenchConfig(**{**vars(QUICK), **changes}))


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
    assert "no run directory" in run("bench", tmp_path / "nowhere", code=2).stderr
    assert "is a directory; name a JSON file" in run("bench", saved, f"--out={tmp_path}", code=2).stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_events_and_the_hosts_clock_agree():
    figures = bench_models(["torchvision/resnet18"], BenchConfig(batch_sizes=[64], device="cuda", min_time_s=0.2))
    (latency,) = figures["models"][0]["latency"]
    assert 0 < latency["median_ms"] <= 1.5 * latency["host_median_ms"]
    assert figures["device"] == torch.cuda.get_device_name()
