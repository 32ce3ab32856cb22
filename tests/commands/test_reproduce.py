"""`kd-accel reproduce`: a chain of runs in real processes."""

import json
import os
from pathlib import Path

import pytest
import yaml

from kd_accel.commands import reproduce
from kd_accel.config.schema import ReproduceConfig
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
def test_completed_steps_of_a_chain_are_skipped_and_its_seeds_share_launches(tmp_path):
    cached = {"run": str(tmp_path / "teacher"), "outputs": "cached", "cache": {"dir": str(tmp_path / "cache")}}
    runs = {"teacher": {"role": "teacher"}, "student": {"teacher": cached}}
    chain = write_chain(tmp_path, runs)
    flags = ["--train.epochs=1", "--data.views=2"]
    first = run("reproduce", "--config", chain, "--num_seeds=2", "--allow_import", "--", *flags, KD_ACCEL_ALLOW_IMPORT="")
    steps = [line for line in first.stdout.splitlines() if line.startswith("== ")]
    what = ["training of teacher", "cache of student", "training of student, seeds 0,1", "bench", "report"]
    assert steps == [f"== {number} of 5: {each}" for number, each in enumerate(what, 1)]
    assert "4 of 4 files to write" in first.stdout
    assert "| **student**, mean ± standard deviation (n = 2) | import:tests.support.models:student |" in first.stdout
    students = [tmp_path / f"student-seed{seed}" for seed in (0, 1)]
    assert [summary(student)["world_size"] for student in students] == [2, 2]
    assert [summary(student)["steps"] for student in students] == [8, 8]
    assert len({(student / "model.safetensors").read_bytes() for student in students}) == 2, "each seed trains another network"
    assert not (tmp_path / "student").exists() and not (tmp_path / "teacher-seed0").exists()
    report, bench = (json.loads((tmp_path / "report" / name).read_text()) for name in ("results.json", "bench.json"))
    assert [Path(entry["name"]).name for entry in bench["models"]] == ["teacher"], "the student has the same architecture"
    assert len(report["rows"]) == 3 and report["rows"][1]["latency_ms"] == report["rows"][2]["latency_ms"] > 0
    files = [students[1] / "model.safetensors", tmp_path / "report/bench.json"]
    before = [file.stat().st_mtime_ns for file in files]
    second = run("reproduce", "--config", chain, "--num_seeds=2", "--", *flags)
    assert second.stdout.count("finished already") == 3
    assert [file.stat().st_mtime_ns for file in files] == before
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
    runs = {"first": {}, "second": {"model": {"arch": "import:tests.support.models:teacher"}}}
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


@pytest.mark.parametrize("weights", ["teacher", "teacher/model.safetensors"])
def test_a_run_from_whose_weights_another_one_starts_is_trained_once(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch.yaml").write_text("{}")
    (tmp_path / "teacher.yaml").write_text("{run_dir: teacher, name: t}")
    (tmp_path / "student.yaml").write_text(yaml.safe_dump({"run_dir": "student", "model": {"weights": weights}}))
    chain = ReproduceConfig(runs=["teacher.yaml", "student.yaml"], launch="launch.yaml", report_dir="report", num_seeds=2)
    plan = [(training.file, list(training.seeds)) for training in reproduce._checked_trainings(chain, [])]
    assert plan == [("teacher.yaml", []), ("student.yaml", [0, 1])]


@pytest.mark.parametrize("teacher", [{"run": "{root}/teacher"}, {"weights": "{root}/teacher/model.safetensors", "arch": "x"}])
def test_a_teacher_of_the_chain_is_trained_once(tmp_path, monkeypatch, teacher):
    """The plan of the steps, with the teacher named by an absolute path, or by its weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch.yaml").write_text("{}")
    (tmp_path / "teacher.yaml").write_text("{role: teacher, run_dir: teacher, name: t}")
    own = {name: value.format(root=tmp_path) for name, value in teacher.items()}
    own |= {"arch": "torchvision/resnet18", "mean": [0.5] * 3, "std": [0.5] * 3} if "weights" in own else {}
    (tmp_path / "student.yaml").write_text(yaml.safe_dump({"run_dir": "student", "name": "s", "teacher": own}))
    chain = ReproduceConfig(runs=["teacher.yaml", "student.yaml"], launch="launch.yaml", report_dir="report", num_seeds=2)
    plan = [(training.file, list(training.seeds)) for training in reproduce._checked_trainings(chain, [])]
    assert plan == [("teacher.yaml", []), ("student.yaml", [0, 1])]


def test_students_that_read_the_same_outputs_need_one_build(tmp_path, monkeypatch):
    """The plan of the steps: the second student reads the cache of the first one, the third one another layer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch.yaml").write_text("{}")
    teacher = {"run": "teacher", "outputs": "cached", "cache": {"dir": "cache"}}
    for name, distill in (("a", {"temperature": 2.0}), ("b", {"alpha": 0.5}), ("c", {"features": {"mse": {"layers": ["l"]}}})):
        content = {"run_dir": name, "name": name, "data": {"views": 2}, "teacher": teacher, "distill": distill}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    chain = ReproduceConfig(runs=["a.yaml", "b.yaml", "c.yaml"], launch="launch.yaml", report_dir="report")
    steps = reproduce._steps(reproduce._checked_trainings(chain, []), "launch.yaml", [])
    assert [step.what for step in steps] == [
        "cache of a",
        "training of a",
        "training of b",
        "cache of c",
        "training of c",
    ]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/summary.json").write_text("{}")
    steps = reproduce._steps(reproduce._checked_trainings(chain, []), "launch.yaml", [])
    assert [step.what for step in steps][:3] == ["training of a", "cache of b", "training of b"], (
        "a finished run builds nothing"
    )
