"""Shipped chains: a distilled student is the teacher of the next one (assistant, born-again), and a student of two teachers."""

import json
from functools import partial
from pathlib import Path

import pytest
import yaml

import kd_accel as kd
from kd_accel.commands import reproduce
from kd_accel.io.hashing import settings_digest
from tests.support.in_process import say
from tests.support.launching import ROOT, metrics, python, summary

FEW_STEPS = ["--train.max_steps=4", "--train.batch_size=8", "--data.views=1", "--data.limit_train=64", "--data.limit_test=40"]
ONE_PROCESS = "--launch=launch/gpu1.yaml"  # on a CPU if no GPU is found
QUICK_BENCH = ["--bench.min_iterations=2", "--bench.min_time_s=0.01", "--bench.batch_sizes=[1]"]
ARCHS = {
    "assistant": ["torchvision/resnet50", "torchvision/resnet18", "torchvision/shufflenet_v2_x0_5"],
    "born_again": ["torchvision/resnet18"] * 3,
}
ROLES = {"assistant": ["teacher", "distilled", "distilled"], "born_again": ["student", "distilled", "distilled"]}


def run_shipped(name, tmp_path, run):
    """Run a shipped chain with few steps per training, by a function of the arguments of the command line.

    Returns:
        The run directories in their order, and the report directory.
    """
    chain = f"configs/digits/{name}/reproduce.yaml"
    settings = yaml.safe_load((ROOT / chain).read_text())
    runs = []
    for file in settings["runs"]:
        content = yaml.safe_load((ROOT / file).read_text())
        for teacher in [content["teacher"]] if "teacher" in content else content.get("teachers", {}).values():
            teacher["min_accuracy"] = None  # four steps leave a network at chance
        runs.append(tmp_path / content["run_dir"])
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(yaml.safe_dump(content))
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    run("reproduce", ROOT / chain, ONE_PROCESS, *QUICK_BENCH, "--", *FEW_STEPS)
    return runs, tmp_path / settings["report_dir"]


@pytest.fixture
def in_this_process(tmp_path, monkeypatch):
    """Function that runs a chain with each of its steps in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "_run", lambda step: say(*step.arguments))
    return say


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHS)
def test_each_stage_is_distilled_from_the_model_of_the_stage_before(name, tmp_path, in_this_process):
    runs, report_dir = run_shipped(name, tmp_path, in_this_process)
    summaries = [summary(run) for run in runs]
    assert [each["arch"] for each in summaries] == ARCHS[name] and summaries[0]["teacher_fingerprint"] is None
    for before, run, each in zip(runs, runs[1:], summaries[1:], strict=False):
        fingerprint = kd.Teacher.from_run(before).fingerprint
        assert each["teacher_fingerprint"] == fingerprint
        assert each["teacher_accuracy"] == pytest.approx(summary(before)["accuracy"], abs=0.03)
        teacher = yaml.safe_load((run / "config.yaml").read_text())["teacher"]
        assert (teacher["run"], teacher["outputs"]) == (str(before), "cached")
        assert json.loads((tmp_path / teacher["cache"]["dir"] / "spec.json").read_text())["samples"]["train"] == 64
    assert len({each["teacher_fingerprint"] for each in summaries}) == 3
    rows = json.loads((report_dir / "results.json").read_text())["rows"]
    assert [(row["name"], row["role"]) for row in rows] == [
        *zip([each["name"] for each in summaries], ROLES[name], strict=True)
    ]
    assert all(row["latency_ms"] > 0 and row["accuracy"] is not None for row in rows)
    sizes = [row["parameters"] for row in rows]
    assert sizes == sorted(sizes, reverse=True) and (name == "born_again") == (len(set(sizes)) == 1)


@pytest.mark.slow
def test_a_student_learns_from_two_teachers_with_two_caches(tmp_path):
    runs, report_dir = run_shipped("two_teachers", tmp_path, partial(python, "-m", "kd_accel", cwd=tmp_path))
    first, second, student = [summary(run) for run in runs]
    fingerprints = {name: kd.Teacher.from_run(run).fingerprint for name, run in zip(("first", "second"), runs[:2], strict=True)}
    assert student["teacher_fingerprint"] == settings_digest(fingerprints)
    teachers = yaml.safe_load((runs[2] / "config.yaml").read_text())["teachers"]
    stored = {name: json.loads((Path(own["cache"]["dir"]) / "spec.json").read_text()) for name, own in teachers.items()}
    assert [sorted(spec["tensors"]) for spec in stored.values()] == [["layer4", "logits"]] * 2
    assert {name: spec["fingerprint_fields"]["teacher"]["arch"] for name, spec in stored.items()} == {
        "first": first["arch"],
        "second": second["arch"],
    }
    last = metrics(runs[2], "train")[-1]
    assert {"kl", "features/first", "features/second", "teachers/first/weight", "agreement"} < set(last)
    rows = json.loads((report_dir / "results.json").read_text())["rows"]
    assert [row["role"] for row in rows] == ["teacher", "teacher", "distilled"]


@pytest.mark.parametrize("name", ARCHS)
def test_a_chain_names_the_run_before_as_its_teacher(name):
    files = yaml.safe_load((ROOT / f"configs/digits/{name}/reproduce.yaml").read_text())["runs"]
    first, *others = [yaml.safe_load((ROOT / file).read_text()) for file in files]
    for before, content in zip([first, *others], others, strict=False):
        assert content["teacher"]["run"] == before["run_dir"]
    caches = {content["teacher"]["cache"]["dir"] for content in others}
    assert len(caches) == len(others), "each stage has a cache of its own teacher"
    if name == "born_again":
        assert [content.get("seed", 0) for content in (first, *others)] == [0, 1, 2]
        assert all(content["model"] == first["model"] for content in others)
