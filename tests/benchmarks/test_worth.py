"""Gain over length and labels: plan, settings, hidden labels, table, and a trial that another directory continues."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.gpu_reference_plan import as_arguments
from benchmarks.paired_runs import read_results
from benchmarks.worth import jobs, write_trial_images
from benchmarks.worth_plan import FULL, TRIAL, Group, Options, Run, cache_flags, hidden_samples, run_flags, write_unlabeled
from benchmarks.worth_results import described_gain, worth_table
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.splits import split_samples
from tests.support.launching import ROOT, environment, last_line

TRIAL_FLAGS = ["--trial", "--budget_s=780", "--out=out"]


def options_in(directory, *, trial=False):
    return Options(None if trial else directory, directory / "weights", directory, 1.0, trial)


def config_of(flags):
    return parse_config(RunConfig, as_arguments(flags))[0]


def line_of(run, accuracy):
    return json.dumps({"job": run.name, "code": 0, "accuracy": accuracy}) + "\n"


def test_rows_have_the_lengths_of_full_batches_and_share_the_middle_one():
    sizes = [(plain.steps, plain.labels) for plain, _ in FULL.rows]
    assert sizes == [(312, 10_000), (936, 10_000), (2730, 10_000), (936, 1000)]
    assert all(distilled == replace(plain, is_distilled=True) and not plain.is_distilled for plain, distilled in FULL.rows)
    assert len({run.name for run in FULL.runs}) == len(FULL.runs) == 8 * 3, "no run is trained twice"


def test_first_seed_is_trained_first_and_the_longest_runs_last():
    runs = FULL.runs
    assert [run.seed for run in runs[:8]] == [0] * 8 and 0 not in [run.seed for run in runs[8:]]
    assert [run.group.steps for run in runs[:8]] == [312] * 2 + [936] * 4 + [2730] * 2
    assert [(run.group.steps, run.seed) for run in runs[8:]] == [
        (steps, seed) for steps, groups in ((312, 2), (936, 4), (2730, 2)) for seed in (1, 2) for _ in range(groups)
    ]


@pytest.mark.parametrize("design", [FULL, TRIAL], ids=["full", "trial"])
def test_settings_of_each_run_are_valid(design, tmp_path):
    options = options_in(tmp_path, trial=design is TRIAL)
    for run in design.runs:
        config, group = config_of(run_flags(options, run)), run.group
        images = group.labels if not group.is_distilled else design.images
        steps_per_epoch = images // config.train.batch_size
        assert config.train.max_steps == group.steps and config.train.batch_size == design.batch_size
        assert 0 <= config.train.epochs * steps_per_epoch - group.steps < steps_per_epoch, "the steps end in the last epoch"
        assert config.train.eval_every_epochs == config.train.epochs and config.seed == run.seed
        assert (config.data.limit_train, config.data.views) == (group.labels, design.views if group.is_distilled else None)
        assert (config.teacher is not None) == (config.distill is not None) == group.is_distilled
        assert (config.data.unlabeled is not None) == (group.is_distilled and group.labels < design.images)
        assert config.optim.lr == (0.1 if group.is_distilled else 0.05)
        assert config.checkpoint.every_steps == 2 * (design.images // design.batch_size)
        if group.is_distilled:
            assert (config.distill.temperature, config.distill.alpha) == (4.0, 0.9)
            assert config.distill.features["mse"].args == {"direction": "both"}


def test_a_trial_leaves_given_data_alone(tmp_path):
    assert Options(tmp_path / "data", None, tmp_path / "out", 1.0, True).images == tmp_path / "out/images"
    assert Options(tmp_path / "data", None, tmp_path / "out", 1.0, False).images == tmp_path / "data"


def test_runs_with_all_labels_have_full_epochs(tmp_path):
    full = [run for run in FULL.runs if run.group.labels == FULL.images]
    epochs = {run.group.steps: config_of(run_flags(options_in(tmp_path), run)).train.epochs for run in full}
    assert epochs == {312: 4, 936: 12, 2730: 35}


def test_all_distilled_runs_read_the_cache_of_one_build(tmp_path):
    options = options_in(tmp_path)
    built = config_of(cache_flags(options))
    assert built.data.limit_train == FULL.images and built.data.unlabeled == f"parquet:{tmp_path}/unlabeled.parquet"
    for run in (run for run in FULL.runs if run.group.is_distilled):
        config = config_of(run_flags(options, run))
        assert config.teacher == built.teacher and config.distill == built.distill
        assert config.data.model_copy(update={"limit_train": FULL.images, "unlabeled": built.data.unlabeled}) == built.data


def test_a_tenth_of_the_labels_is_left(tmp_path):
    labels = np.arange(50_000) % 10
    hidden = hidden_samples(options_in(tmp_path), labels)
    assert len(np.unique(hidden)) == 9_000 == FULL.images - FULL.few_labels
    assert len(np.unique(labels[hidden])) == 10


@pytest.mark.slow
def test_images_without_labels_are_the_other_training_images(tmp_path):
    options = options_in(tmp_path, trial=True)
    write_trial_images(options.images)
    write_unlabeled(options)
    assert pq.read_schema(options.unlabeled).names == ["img"]
    few, every = (Group(TRIAL.rows[0][0].steps, labels, True) for labels in (TRIAL.few_labels, TRIAL.images))
    data = load_data(config_of(run_flags(options, Run(few, 0))).data)
    assert (data.train.labels[data.splits.train] >= 0).sum() == 4 == TRIAL.images // 10
    assert data.unlabeled.num_samples == 36 and set(data.unlabeled.labels) == {-1}
    with_all_labels = split_samples(data.train.labels, config_of(run_flags(options, Run(every, 0))).data, num_test=20)
    digests = [data.train.content_digests(data.splits.train), data.unlabeled.content_digests(np.arange(36))]
    assert set(np.concatenate(digests)) == set(data.train.content_digests(with_all_labels.train))
    assert data.epoch_samples == TRIAL.images == len(with_all_labels.train)


def test_gains_within_two_standard_errors_are_none():
    # Variances 1 and 3 of three seeds each: the standard error is (4 / 3) ** 0.5 = 1.155.
    plain = (59.0, 60.0, 61.0)
    assert described_gain(plain, (61.3, 61.3, 64.3)) == "no difference (+2.30 ± 1.15)"
    assert described_gain(plain, (61.4, 61.4, 64.4)) == "+2.40 ± 1.15"
    assert described_gain(plain, (56.6, 56.6, 59.6)) == "-2.40 ± 1.15"
    assert described_gain(plain, (56.7, 56.7, 59.7)) == "no difference (-2.30 ± 1.15)"
    assert described_gain(plain, (70.0,)) == "+10.00, spread unknown"
    assert described_gain(plain, ()) == described_gain((), plain) == "not run"


def test_table_has_no_figures_that_were_not_measured(tmp_path):
    ledger = tmp_path / "worth.jsonl"
    plain, distilled = FULL.rows[1]
    pairs = [(plain, 0, 0.5), (plain, 2, 0.52), (distilled, 0, 0.6), (distilled, 1, 0.64), (FULL.rows[3][1], 0, 0.4)]
    ledger.write_text("".join(line_of(Run(group, seed), accuracy) for group, seed, accuracy in pairs))
    with ledger.open("a") as file:
        file.write(json.dumps({"job": Run(FULL.rows[0][0], 0).name, "code": 1, "failed": True}) + "\n")
    rows = worth_table(FULL, read_results(ledger)).splitlines()[2:]
    assert rows == [
        "| 312 | 100 % | not run | not run | not run |  |  |",
        "| 936 | 100 % | 51.00 ± 1.41 | 62.00 ± 2.83 | +11.00 ± 2.24 | 50.00, 52.00 | 60.00, 64.00 |",
        "| 2,730 | 100 % | not run | not run | not run |  |  |",
        "| 936 | 10 % | not run | 40.00 | not run |  | 40.00 |",
    ]


def test_page_has_the_results_of_the_lines_next_to_it():
    page = (ROOT / "docs/experiments.md").read_text()
    assert f"\n\n{worth_table(FULL, read_results(ROOT / 'docs/worth.jsonl'))}\n\n" in page


def test_finished_runs_are_not_repeated_and_the_cache_is_built_if_a_run_needs_it(tmp_path):
    options = options_in(tmp_path)
    names = [run.name for run in FULL.runs]
    assert [job.name for job in jobs(options)] == ["cache-build", *names]
    needs = {job.name: job.needs for job in jobs(options)}
    assert all(needs[run.name] == (("cache-build",) if run.group.is_distilled else ()) for run in FULL.runs)
    plain = [run for run in FULL.runs if not run.group.is_distilled]
    options.ledger.write_text("".join(line_of(run, 0.5) for run in FULL.runs if run.group.is_distilled))
    assert [job.name for job in jobs(options)] == [run.name for run in plain]


@pytest.mark.slow
def test_stopped_trial_continues_from_its_ledger_alone(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        (directory / "out").mkdir(parents=True)
    command = [sys.executable, "-m", "benchmarks.worth", *TRIAL_FLAGS]
    process = subprocess.Popen(command, cwd=first, env=environment(PYTHONPATH=str(ROOT)), stdout=subprocess.DEVNULL)
    ends_at = time.monotonic() + 400
    try:
        while not read_results(first / "out/worth.jsonl") and process.poll() is None and time.monotonic() < ends_at:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        process.terminate()
    before = read_results(first / "out/worth.jsonl")
    (second / "out/worth.jsonl").write_bytes((first / "out/worth.jsonl").read_bytes())
    line = last_line(second, "benchmarks.worth", *TRIAL_FLAGS)
    results, names = read_results(second / "out/worth.jsonl"), {run.name for run in TRIAL.runs}
    assert 1 <= len(before) < len(names) == 4 and results.keys() == names
    assert {path.name for path in (second / "out/runs").iterdir()} == names - before.keys(), "finished runs are not repeated"
    assert line["benchmark"] == "worth" and line["notes"]["failed"] == []
    assert line["notes"]["accuracies"].keys() == {group.name for row in TRIAL.rows for group in row}
    assert all(results[run.name]["steps"] == run.group.steps for run in TRIAL.runs)
    summaries = {path.parent.name: json.loads(path.read_text()) for path in second.glob("out/runs/*/summary.json")}
    assert {name: each["steps"] for name, each in summaries.items()} == {name: 10 for name in names - before.keys()}
    assert not list(second.glob("out/runs/*/checkpoints")) and "not run" not in (second / "out/table.md").read_text()
