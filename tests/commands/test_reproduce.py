"""`kd-accel reproduce`: a chain of runs in real processes."""

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.support.launching import SMALL, run, summary

BENCH = {"batch_sizes": [1], "threads": 1, "min_iterations": 20, "min_time_s": 0.01}


def write_chain(directory, runs, *, bench=BENCH):
    """Write the config files of a chain. runs: settings by run name, added to those of a small training."""
    flags = [flag[2:].split("=", 1) for flag in SMALL]
    small = {}
    for key, value in flags:
        section, name = key.split(".")
        small.setdefault(section, {})[name] = yaml.safe_load(value)
    files = [directory / f"{name}.yaml" for name in runs]
    for file, (name, more) in zip(files, runs.items(), strict=True):
        file.write_text(yaml.safe_dump({**small, "run_dir": str(directory / name), "name": name, **more}))
    chain = {"runs": [str(file) for file in files], "launch": "launch/cpu2.yaml", "report_dir": str(directory / "report")}
    (directory / "chain.yaml").write_text(yaml.safe_dump({**chain, "bench": bench}))
    return directory / "chain.yaml"


@pytest.mark.slow
def test_completed_steps_of_a_chain_are_skipped(tmp_path):
    cached = {"run": str(tmp_path / "teacher"), "outputs": "cached", "cache": {"dir": str(tmp_path / "cache")}}
    runs = {"teacher": {"role": "teacher"}, "student": {"teacher": cached}}
    chain = write_chain(tmp_path, runs)
    flags = ["--train.epochs=1", "--data.views=2"]
    first = run("reproduce", "--config", chain, "--allow_import", "--", *flags, KD_ACCEL_ALLOW_IMPORT="")
    assert "4 of 4 files to write" in first.stdout
    assert "| student (distilled) | import:tests.support.models:student |" in first.stdout
    assert summary(tmp_path / "student")["world_size"] == 2
    assert summary(tmp_path / "student")["steps"] == 8
    before = (tmp_path / "student/model.safetensors").stat().st_mtime_ns, (tmp_path / "report/bench.json").stat().st_mtime_ns
    second = run("reproduce", "--config", chain, "--", *flags)
    assert second.stdout.count("finished already") == 2
    again = (tmp_path / "student/model.safetensors").stat().st_mtime_ns, (tmp_path / "report/bench.json").stat().st_mtime_ns
    assert again == before
    wrong = run("reproduce", "--config", chain, "--", "--train.epoch=1", code=2)
    assert wrong.stderr.startswith("kd-accel: after --: --train.epoch: no such setting; did you mean --train.epochs?")
    assert len(wrong.stderr.splitlines()) == 1


def test_launch_file_that_is_not_valid_is_refused(tmp_path):
    (tmp_path / "launch.yaml").write_text("a: [")
    done = run("reproduce", "--config", write_chain(tmp_path, {"first": {}}), f"--launch={tmp_path / 'launch.yaml'}", code=2)
    assert done.stderr.startswith(f"kd-accel: launch: {tmp_path / 'launch.yaml'} is not valid YAML (line 1")
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


@pytest.mark.faults
def test_chain_is_measured_again_if_its_bench_or_runs_change(tmp_path):
    runs = {"first": {}, "second": {"seed": 1}}
    flags = ["--launch=launch/gpu1.yaml", "--", "--train.max_steps=1"]  # one process, on a CPU if no GPU is found
    run("reproduce", "--config", write_chain(tmp_path, {"first": {}}), *flags)
    figures = tmp_path / "report/bench.json"
    os.utime(figures, (2e9, 2e9))  # newer than any run
    run("reproduce", "--config", write_chain(tmp_path, runs), *flags)
    assert [Path(entry["name"]).name for entry in json.loads(figures.read_text())["models"]] == ["first", "second"]
    os.utime(figures, (2e9, 2e9))
    changed = write_chain(tmp_path, runs, bench={**BENCH, "batch_sizes": [1, 2]})
    run("reproduce", "--config", changed, *flags)
    for entry in json.loads(figures.read_text())["models"]:
        assert [latency["batch_size"] for latency in entry["latency"]] == [1, 2]
