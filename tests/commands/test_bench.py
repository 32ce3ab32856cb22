"""`kd-accel bench`: lines as the figures are measured, the JSON file, and what remains after a signal or a time limit."""

import json
import signal

import pytest

from kd_accel.bench.environment import cpu_name
from kd_accel.commands.bench import _close, _print_latency
from kd_accel.config.schema import BenchConfig, ReproduceConfig
from kd_accel.models.factory import build_model
from kd_accel.models.weights import ModelCard, save_model
from tests.support.in_process import say
from tests.support.launching import run, start
from tests.support.parsing import mistakes, parse

STUDENT = "import:tests.support.models:student"
SLEEPER = "import:tests.bench.user_models:sleeper"
QUICK = ["--device=cpu", "--threads=1", "--min_iterations=20", "--min_time_s=0"]


@pytest.mark.parametrize(
    ("changes", "ending"),
    [
        ({}, "interquartile range 2.00 ms"),
        ({"graph_median_ms": 0.126}, "interquartile range 2.00 ms, CUDA graph 0.13 ms"),
        ({"graph_error": "it synchronizes"}, "2.00 ms, CUDA graph not captured (it synchronizes)"),
        ({"complete": False}, "2.00 ms, stopped after 7 forwards"),
    ],
)
def test_line_of_a_latency(capsys, changes, ending):
    figures = {"median_ms": 1.0, "p90_ms": 3.0, "spread_ms": 2.0, "iterations": 7, "graph_median_ms": None, "complete": True}
    _print_latency({"name": "net"}, {"batch_size": 1, **figures, **changes})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("net, batch    1: median 1.00 ms, p90 3.00 ms, ") and line.endswith(ending)


def test_line_of_the_environment_has_the_gpu(capsys):
    hardware = {"hardware": {"cpu": "Chip", "gpu": "Card"}, "threads": 1, "precision": "bf16", "memory_format": "contiguous"}
    _close({**hardware, "complete": True}, None)
    assert capsys.readouterr().out == "on Card, with CPU Chip, 1 thread, precision bf16, contiguous\n"


def test_run_is_measured_by_its_path(tmp_path):
    saved, out = tmp_path / "run", tmp_path / "bench.json"
    saved.mkdir()
    card = ModelCard("import:tests.support.models:teacher", "imagenet", {}, ["a", "b"], [0.5] * 3, [0.2] * 3, 24)
    save_model(saved, build_model(card.arch, num_classes=2), card=card)
    done = run("bench", f"{saved}/", f"--out={out}", "--batch_sizes=1,2", *QUICK)
    first, *latencies, where, written = done.stdout.splitlines()
    assert first.startswith(f"{saved}: 0.01 M parameters, ") and first.endswith("multiply-adds per image of 24x24")
    assert [line.partition(": median")[0] for line in latencies] == [f"{saved}, batch    1", f"{saved}, batch    2"]
    assert where == f"on CPU {cpu_name()}, 1 thread, precision float32, contiguous" and written == f"Written to {out}"
    content = json.loads(out.read_text())
    assert content["models"][0]["name"] == str(saved) and content["settings"]["batch_sizes"] == [1, 2]
    assert (content["complete"], content["stopped_by"], content["not_measured"]) == (True, None, [])


def test_missing_run_and_directory_for_the_file_are_refused(tmp_path):
    assert f"run directory '{tmp_path}/nowhere' not found" in say("bench", tmp_path / "nowhere", code=2)
    assert "is a directory; give the path of a JSON file" in say("bench", STUDENT, f"--out={tmp_path}", code=2)


def test_sigint_keeps_what_was_measured(tmp_path):
    out = tmp_path / "bench.json"
    process = start("bench", SLEEPER, STUDENT, f"--out={out}", "--batch_sizes=[1, 3000, 9]", *QUICK)
    # These lines are printed before the forward of 3,000 images ends, which takes three seconds.
    lines = [process.stdout.readline() for _ in range(4)]
    assert [line.partition(": ")[0] for line in lines] == [SLEEPER, STUDENT, f"{SLEEPER}, batch    1", f"{STUDENT}, batch    1"]
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    missing = f"{SLEEPER} at batch 3000, 9; {STUDENT} at batch 3000, 9"
    assert printed.splitlines()[1:] == [f"incomplete, stopped by SIGINT; not measured: {missing}", f"Written to {out}"]
    assert errors == "kd-accel: stopped by SIGINT; files written so far are complete\n"
    content = json.loads(out.read_text())
    assert (content["complete"], content["stopped_by"]) == (False, "SIGINT")
    assert content["not_measured"] == [{"name": name, "batch_sizes": [3000, 9]} for name in (SLEEPER, STUDENT)]
    assert [[each["batch_size"] for each in entry["latency"]] for entry in content["models"]] == [[1], [1]]


def test_time_limit_leaves_a_file_and_succeeds(tmp_path):
    out = tmp_path / "bench.json"
    printed = say("bench", STUDENT, f"--out={out}", "--batch_sizes=8", "--time_limit_s=0.000001", *QUICK)
    assert f"incomplete, stopped by time_limit_s; not measured: {STUDENT} at batch 8\n" in printed
    assert json.loads(out.read_text())["models"][0]["macs"] > 0


def test_mistake_before_the_first_latency_keeps_an_earlier_file(tmp_path):
    out = tmp_path / "bench.json"
    out.write_text("earlier")
    refusal = say("bench", STUDENT, "import:tests.bench.user_models:for_8x8", f"--out={out}", *QUICK, code=2)
    assert "for_8x8 does not accept images of 32x32" in refusal
    assert out.read_text() == "earlier"
    assert "Written to" in say("bench", STUDENT, f"--out={out}", "--batch_sizes=1,1000000000", *QUICK, code=2)
    assert json.loads(out.read_text())["stopped_by"] == "error"


@pytest.mark.parametrize(
    ("text", "expected"), [("1", [1]), ("1,32", [1, 32]), ("1, 32", [1, 32]), ("[1, 32]", [1, 32]), ("[7]", [7])]
)
def test_batch_sizes_are_numbers_or_one_number(tmp_path, text, expected):
    chain = ["--runs=[a.yaml]", "--launch=x", "--report_dir=y"]
    (tmp_path / "bench.yaml").write_text(f"batch_sizes: {text}\n")
    assert parse("--batch_sizes", text, config_class=BenchConfig).batch_sizes == expected
    assert parse("--config", f"{tmp_path}/bench.yaml", config_class=BenchConfig).batch_sizes == expected
    assert parse(*chain, "--bench.batch_sizes", text, config_class=ReproduceConfig).bench.batch_sizes == expected


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--batch_sizes=[]", "batch_sizes: [] must list at least one number, each at least 1"),
        ("--batch_sizes=0", "batch_sizes: [0] must list at least one number, each at least 1"),
        ("--batch_sizes=4,0", "batch_sizes: [4, 0] must list at least one number, each at least 1"),
        ("--batch_sizes=1,32,1", "batch_sizes: [1, 32, 1] must list each number once; remove repeated numbers"),
        ("--batch_sizes=1;2", "batch_sizes: must be a list (of each item: an integer), not '1;2'"),
        ("--batch_sizes=true", "batch_sizes: must be a list (of each item: an integer), not True"),
        ("--batch_sizes=1.5", "batch_sizes: must be a list (of each item: an integer), not 1.5"),
        ("--time_limit_s=0", "time_limit_s: 0.0 must be above 0, or null"),
        ("--time_limit_s=-1.5", "time_limit_s: -1.5 must be above 0, or null"),
    ],
)
def test_settings_that_are_not_valid_are_refused(flag, message):
    assert message in mistakes(flag, config_class=BenchConfig)
