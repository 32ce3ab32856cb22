"""Comparison of the methods: settings, choice on validation, differences, and a trial that is stopped and continued."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import methods_table
from benchmarks.gpu_reference_plan import as_arguments
from benchmarks.methods import EPOCHS, Options, run_flags
from benchmarks.methods_results import (
    Row,
    chosen_factor,
    described_difference,
    pooled_deviation,
    read_row,
    results_table,
    run_name,
)
from benchmarks.methods_table import (
    FACTORS,
    METHODS,
    Method,
    chosen_methods,
    features_of_cache,
    missing_methods,
    settings_table,
)
from benchmarks.paired_runs import read_results
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.losses.registry import build_loss, names
from tests.support.launching import ROOT, environment, last_line

BY_NAME = {method.name: method for method in METHODS}
TRIAL = ["--trial", "--budget_s=780", "--out=out"]
KINDS = {"rkd": BY_NAME["rkd"], "plain": BY_NAME["plain"], "kl": BY_NAME["kl"], "sp": BY_NAME["sp"]}


def write_run(ledger, name, *, test, validation=0.5):
    """Add the line of a finished run."""
    with ledger.open("a") as file:
        file.write(json.dumps({"job": name, "code": 0, "accuracy": test, "accuracy_best_val": validation}) + "\n")


def row(name, *accuracies):
    return Row(BY_NAME[name], 1.0, 1, accuracies)


def test_each_registered_loss_has_a_method(monkeypatch):
    assert missing_methods() == [] and len(BY_NAME) == len(METHODS)
    monkeypatch.setattr(methods_table, "METHODS", METHODS[:-1])
    assert missing_methods() == [METHODS[-1].loss]


def test_seeds_of_the_methods():
    several = {method.name for method in METHODS if len(method.seeds) == 3}
    assert several == {"plain", "kl", "dkd", "dist", "kl-standardized", "mse", "rkd"}
    assert all(method.seeds in ((0,), (0, 1, 2)) for method in METHODS)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_settings_of_a_run_are_valid(method, tmp_path):
    options = Options(tmp_path, tmp_path / "weights", tmp_path, 1.0, trial=False, methods=(), cost=False, repeats=1)
    assert method.factors == (FACTORS if method.layers else (1.0,))
    for factor in method.factors:
        config, _ = parse_config(RunConfig, as_arguments(run_flags(options, method, factor)))
        # 78 full batches of 128 in 10,000 images.
        assert config.train.epochs * (config.data.limit_train // config.train.batch_size) == 624
        assert config.data.views == EPOCHS == config.train.eval_every_epochs and config.optim.lr == 0.05
        assert (config.teacher is None) == (method.loss is None)
        if config.distill is None:
            continue
        assert config.distill.label_weight == method.label_weight and (config.distill.logits is None) == bool(method.layers)
        if method.layers:
            (feature,) = config.distill.features.values()
            assert (feature.loss, feature.weight) == (method.loss, pytest.approx(factor * method.weight))
        else:
            assert (config.distill.logits.loss, config.distill.alpha) == (method.loss, method.weight)
        build_loss("features" if method.layers else "logits", method.loss, method.args, field="distill")


def test_cache_serves_all_feature_losses():
    features = features_of_cache()
    assert {settings["loss"] for settings in features.values()} == set(names("features"))
    assert all(settings["layers"] == dict(BY_NAME[name].layers) for name, settings in features.items())


def test_names_of_methods_are_checked():
    assert [method.name for method in chosen_methods(["sp", "plain"])] == ["plain", "sp"]
    with pytest.raises(ValueError, match="ghost: not found among the methods"):
        chosen_methods(["plain", "ghost"])


def test_page_has_the_settings():
    assert settings_table() in (ROOT / "docs/methods.md").read_text()


def test_page_has_the_results_of_the_lines_next_to_it():
    results = read_results(ROOT / "docs/methods.jsonl")
    page = (ROOT / "docs/methods.md").read_text()
    assert results and results_table([read_row(method, results) for method in METHODS], {}) in page


def test_weight_is_chosen_on_validation_images(tmp_path):
    method, ledger = BY_NAME["rkd"], tmp_path / "methods.jsonl"
    assert chosen_factor(method, read_results(ledger)) == (1.0, 0)
    ledger.write_text('{"job": "cache-build", "code": 0}\n{"job": "rkd-x10-seed0", "code": 1, "failed": true}\n')
    for factor, test, validation in ((1.0, 0.9, 0.60), (0.1, 0.5, 0.61), (10.0, 0.8, 0.61)):
        write_run(ledger, run_name(method, factor, 0), test=test, validation=validation)
    assert chosen_factor(method, read_results(ledger)) == (0.1, 3), "the first of equals, regardless of the test images"
    write_run(ledger, run_name(method, 0.1, 2), test=0.7)
    write_run(ledger, run_name(method, 1.0, 1), test=0.99)
    assert read_row(method, read_results(ledger)).accuracies == (50.0, 70.0), "seeds of the chosen weight alone"


def test_differences_within_two_standard_errors_are_none():
    groups = [(60.0, 61.0, 62.0), (50.0, 50.0, 53.0), (70.0,)]
    deviation = pooled_deviation(groups)
    assert deviation == pytest.approx(2**0.5), "variances 1 and 3, two degrees of freedom each"
    assert pooled_deviation([(1.0,), ()]) is None
    # Two standard errors: 2 * 2**0.5 * (2 / 3)**0.5 = 2.31 for three seeds each, 3.27 for three and one.
    plain = row("plain", 60.0, 61.0, 62.0)
    assert described_difference(row("kl", 63.2, 63.2, 63.2), plain, deviation) == "no difference (+2.20)"
    assert described_difference(row("kl", 63.4, 63.4, 63.4), plain, deviation) == "+2.40"
    assert described_difference(row("sp", 57.8), plain, deviation) == "no difference (-3.20)"
    assert described_difference(row("sp", 57.7), plain, deviation) == "-3.30"
    assert described_difference(row("sp", 57.7), plain, None) == "-3.30, spread unknown"
    assert described_difference(row("sp"), plain, deviation) == "not run" and described_difference(plain, plain, 1.0) == ""


def test_table_has_no_figures_that_were_not_measured():
    rows = [row("plain", 60.0, 62.0), row("kl", 70.0), row("rkd")]
    table = results_table(rows, {"plain/kl": {"median": 0.98765, "error": 0.01234}}).splitlines()
    assert table[2] == "| plain |  | 61.00 | 1.41 | 60.00, 62.00 |  | -9.00 | 0.988 ± 0.012 |"
    assert table[3] == "| kl | 0.9 | 70.00 |  | 70.00 | +9.00 |  | 1 |"
    assert table[4] == "| rkd | 1 (not tuned) | not run |  |  | not run | not run | not run |"
    assert table[-1] == "Pooled standard deviation: 1.41 points."


def jobs_in(out):
    lines = [json.loads(line) for line in (out / "methods.jsonl").read_text().splitlines()]
    return [line["job"] for line in lines]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """Return (directory, closing line) of a trial with three methods."""
    directory = tmp_path_factory.mktemp("methods")
    return directory, last_line(directory, "benchmarks.methods", *TRIAL)


@pytest.mark.slow
def test_trial_runs_each_method_with_its_weights_and_seeds(trial):
    directory, line = trial
    runs = directory / "out/runs"
    expected = {run_name(KINDS[name], 1.0, seed) for name in ("plain", "kl") for seed in (0, 1, 2)}
    factor, tried = chosen_factor(KINDS["rkd"], read_results(directory / "out/methods.jsonl"))
    expected |= {run_name(KINDS["rkd"], each, 0) for each in FACTORS} | {
        run_name(KINDS["rkd"], factor, seed) for seed in (1, 2)
    }
    assert {path.name for path in runs.iterdir()} == expected and tried == 3
    assert sorted(jobs_in(directory / "out")) == sorted(["cache-build", *expected])
    assert line["benchmark"] == "methods" and {"commit", "hardware", "versions"} <= line.keys()
    assert line["notes"]["failed"] == [] and line["notes"]["weights"] == {"rkd": factor * 1.0}
    assert {name: len(values) for name, values in line["notes"]["accuracies"].items()} == {"plain": 3, "kl": 3, "rkd": 3}
    assert not list(runs.glob("*/checkpoints")), "checkpoints of finished runs are removed"
    assert "not run" not in (directory / "out/table.md").read_text().replace("| not run |\n", "|\n"), "all but the costs"


@pytest.mark.slow
def test_finished_runs_are_not_repeated_and_their_lines_are_enough(trial):
    directory, line = trial
    before = jobs_in(directory / "out")
    shutil.rmtree(directory / "out/runs")
    again = last_line(directory, "benchmarks.methods", *TRIAL)
    assert again["notes"] == line["notes"] and jobs_in(directory / "out") == [*before, "cache-build"]


@pytest.mark.slow
def test_cost_of_a_step_of_every_method(trial):
    directory, _ = trial
    command = [sys.executable, "-m", "benchmarks.methods", *TRIAL, "--cost", "--repeats=2"]
    variables = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=directory, env=variables, capture_output=True, text=True, timeout=840, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = json.loads((directory / "out/cost.json").read_text())
    assert line["benchmark"] == "methods-cost" and line["unit"] == "ms" and min(line["medians"].values()) > 0
    assert line["medians"].keys() == BY_NAME.keys()
    assert line["ratios"].keys() == {f"{name}/kl" for name in BY_NAME if name != "kl"} == line["by_turn"].keys()
    (cell,) = (text for text in (directory / "out/table.md").read_text().splitlines() if text.startswith("| sp |"))
    assert f"{line['by_turn']['sp/kl']['median']:.3f} ± " in cell


@pytest.mark.slow
def test_stopped_comparison_continues(tmp_path):
    command = [sys.executable, "-m", "benchmarks.methods", *TRIAL, "--methods", "plain"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), stdout=subprocess.DEVNULL)
    ends_at = time.monotonic() + 200
    while not list(tmp_path.glob("out/runs/*/summary.json")) and time.monotonic() < ends_at:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finished = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*/summary.json")}
    assert 1 <= len(finished) < 3
    line = last_line(tmp_path, "benchmarks.methods", *TRIAL, "--methods", "plain")
    assert len(line["notes"]["accuracies"]["plain"]) == 3 and line["notes"]["failed"] == []
    kept = {name: (tmp_path / "out/runs" / name / "summary.json").stat().st_mtime_ns for name in finished}
    assert kept == finished, "finished runs are not trained again"


@pytest.mark.slow
def test_data_are_required_outside_of_a_trial(tmp_path):
    command = [sys.executable, "-m", "benchmarks.methods"]
    variables = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--data and --teacher are required without --trial" in done.stderr
    assert not list(tmp_path.iterdir())


def test_method_without_a_teacher_has_no_objective():
    assert Method("plain", "labels alone").distill() is None
