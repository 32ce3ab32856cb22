"""Benchmarks with small settings, from start to end: cases, ratios and the closing line of JSON. Speeds are not tested."""

import json
import math

import pytest

from benchmarks.harness import Result, finish, training_rates, turn_ratio
from tests.support.launching import last_line

SMALL = ["--repeats=1", "--batch_size=4", "--steps=1"]
SUITES = {
    "training-quick": (["benchmarks.training", "--suite=quick", "--rounds=2"], ["plain/bare"]),
    "training-all": (
        ["benchmarks.training", "--rounds=1", "--processes=1"],
        [
            *("plain/bare", "cached_logits/plain", "cached_hybrid/plain", "live_hybrid/limit", "live_logits/limit_live_logits"),
            *(
                "cached_logits/limit_cached_logits",
                "cached_hybrid/limit_cached_hybrid",
                "limit_cached_hybrid/limit_cached_logits",
            ),
            *(f"cached_hybrid_{direction}/plain" for direction in ("student_to_teacher", "teacher_to_student")),
            *(f"live_hybrid_{direction}/live_hybrid" for direction in ("student_to_teacher", "teacher_to_student")),
        ],
    ),
    "input": (["benchmarks.input"], ["loader/v2", "loader/with_transform", "loader/gather", "loader/student"]),
    "cache-io": (
        ["benchmarks.cache_io", "--samples=300", "--file_samples=20"],
        ["reader/index_select", "reader/files", "build/forward"],
    ),
}


@pytest.fixture
def drifting():
    """Return a result whose cases differ by a factor of 2 in most turns, on a machine whose speed drifts."""
    result = Result.of_repeats("drift", {"slow": [30.0, 10.0, 20.0, 1.0], "fast": [60.0, 20.0, 50.0, 2.0]}, notes={})
    result.add_ratio("slow", "fast")
    return result


def test_ratio_by_turn_is_robust_against_drift(drifting):
    assert drifting.ratios == {"slow/fast": 15 / 35}
    assert drifting.by_turn["slow/fast"]["median"] == 0.5 and 0 < drifting.by_turn["slow/fast"]["error"] < 0.05
    assert turn_ratio([1.0], [2.0]) == {"median": 0.5, "error": None}


def test_printed_lines_name_quantity_and_unit(drifting, tmp_path, capsys):
    finish(drifting, out_dir=tmp_path)
    slow, fast, ratio, _ = capsys.readouterr().out.splitlines()
    assert slow.split(None, 1) == ["slow", "median         15 images/s, interquartile range 161.7 %"]
    assert fast.startswith("fast ") and "median         35 images/s" in fast
    assert ratio.split(None, 1) == ["slow/fast", "ratio 0.429, by turn 0.500 +/- 0.035"]


def test_rates_are_those_of_complete_training_lines(tmp_path):
    assert training_rates(tmp_path) == []
    lines = [{"split": "train", "images_per_second": 5.0}, {"split": "val", "images_per_second": 9.0}, {"split": "train"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"split": "train", "images_per_sec')
    assert training_rates(tmp_path) == [5.0]


@pytest.mark.faults
def test_model_cost(tmp_path):
    flags = ["--batch_sizes=1", "--modes=eager", "--iterations=2", "--min_time_s=0.01"]
    line = last_line(tmp_path, "benchmarks.model_cost", *flags)
    models = [case.split("/")[0] for case in line["medians"]]
    assert len(models) == 4 and list(line["notes"]) == [*models, "agreement"]
    assert line["notes"]["agreement"]["1"] == line["by_turn"]["latency/torch_benchmark"]
    assert line["notes"]["resnet50-imagenet"]["parameters"] == 23_528_522
    assert line["ratios"].keys() == {"latency/torch_benchmark"}


@pytest.mark.slow
def test_cpu_kernels(tmp_path):
    networks, variants = ("student", "teacher"), ("", "_torch", "_channels_last")
    cases = ["teacher_apart", *(network + variant for network in networks for variant in variants)]
    line = last_line(tmp_path, "benchmarks.cpu_kernels", *SMALL, "--cases", *cases)
    assert line["medians"].keys() == set(cases)
    assert line["ratios"].keys() == {
        "student/student_torch",
        "student_channels_last/student_torch",
        *("teacher/teacher_torch", "teacher_channels_last/teacher_torch", "teacher_torch/teacher_apart"),
    }


@pytest.mark.slow
def test_sweep(tmp_path):
    line = last_line(tmp_path, "benchmarks.sweep", "--students=2", "--epochs=1", "--batch_size=4", "--steps=1")
    assert line["medians"].keys() == {"plain", "cached", "live", "build"}
    assert line["ratios"].keys() == {"sweep/plain", "live/plain"}


@pytest.mark.faults
def test_processes(tmp_path):
    line = last_line(tmp_path, "benchmarks.processes", "--repeats=1", "--batch_size=8", "--steps=8")
    assert line["medians"].keys() == {"one", "two_processes", "bare_one", "bare_two"}
    assert line["ratios"].keys() == {"two_processes/one", "bare_two/bare_one"}


@pytest.mark.slow
def test_peers_without_an_environment_of_torchdistill(tmp_path):
    (tmp_path / "file").write_text("no directory can be made here")
    line = last_line(tmp_path, "benchmarks.peers", f"--environment={tmp_path / 'file'}", "--rounds=1", *SMALL)
    assert line["medians"].keys() == {"live", "live_up", "cached", "common_loop", "limit"}
    assert line["ratios"].keys() == {"cached/common_loop"} and line["notes"]["torchdistill"] is None


@pytest.mark.faults
def test_growth(tmp_path):
    flags = ["--repeats=1", "--batch_size=32", "--steps=1", "--cases", "base", "views_2", "classes_100", "layers_1"]
    line = last_line(tmp_path, "benchmarks.growth", *flags)
    bytes_of = {name: figures["sample_bytes"] for name, figures in line["notes"].items()}
    assert bytes_of == {"base": 15_380, "views_2": 15_380, "classes_100": 15_380 + 180, "layers_1": 20 + 1024}
    assert line["medians"].keys() == {f"{name}/{time}" for name in bytes_of for time in ("build_us", "train_us")}
    assert min(line["medians"].values()) > 0 and all(figures["train_mib"] > 100 for figures in line["notes"].values())


@pytest.mark.faults
def test_startup(tmp_path):
    line = last_line(tmp_path, "benchmarks.startup", "--repeats=1", "--processes=1", "--batch_size=8")
    medians = line["medians"]
    assert medians.keys() == {"program", "libraries"} and min(medians.values()) > 0.5
    assert line["notes"]["own_s"] == pytest.approx(medians["program"] - medians["libraries"])


@pytest.mark.faults
def test_second_start(tmp_path):
    line = last_line(tmp_path, "benchmarks.second_start", "--repeats=1", "--batch_size=8", "--samples", "20", "40")
    medians = line["medians"]
    assert medians.keys() == {"samples_20", "samples_40"} and min(medians.values()) > 0.5
    assert line["notes"]["difference_s"] == pytest.approx(medians["samples_40"] - medians["samples_20"])
    assert line["notes"]["processor_s"].keys() == medians.keys() and min(line["notes"]["processor_s"].values()) > 0.5


@pytest.mark.faults
def test_training_in_two_processes(tmp_path):
    flags = ["--suite=cached", "--processes=2", "--rounds=1", *SMALL]
    line = last_line(tmp_path, "benchmarks.training", *flags)
    assert list(line["ratios"]) == [
        "cached_logits@2/plain@2",
        "cached_hybrid@2/plain@2",
        "live_hybrid@2/limit@2",
        "limit_cached_hybrid@2/limit_cached_logits@2",
    ]
    shares = line["notes"]["shares"]
    assert shares.keys() == {"plain@2", "cached_logits@2", "cached_hybrid@2", "live_hybrid@2"}
    for case, parts in shares.items():
        assert parts.pop("step_ms") > 0
        assert sum(parts.values()) == pytest.approx(1, abs=0.01)
        assert parts["teacher"] > 0.05 if case == "live_hybrid@2" else parts["backward"] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.faults) if name == "training-all" else name for name in SUITES]
)
def test_closing_line_has_all_ratios(name, tmp_path):
    (module, *flags), ratios = SUITES[name]
    line = last_line(tmp_path, module, *flags, *SMALL)
    assert line["benchmark"] == name
    assert {"commit", "hardware", "versions"} <= line.keys()
    assert list(line["ratios"]) == ratios
    cases = {case for ratio in ratios for case in ratio.split("/")}
    assert line["medians"].keys() == line["spread"].keys() == cases
    assert all(math.isfinite(rate) and rate > 0 for rate in [*line["medians"].values(), *line["ratios"].values()])
    for ratio in ratios:
        numerator, denominator = ratio.split("/")
        assert line["ratios"][ratio] == pytest.approx(line["medians"][numerator] / line["medians"][denominator])
    assert not list(tmp_path.glob("tmp*")), "temporary files are removed"
    (dated,) = (tmp_path / "runs" / "benchmarks").iterdir()
    assert dated.name.endswith(f"-{name}.json") and json.loads(dated.read_text()) == line
