"""The program without wandb, datasets, matplotlib, scikit-learn, timm and git, which many GPU machines do not have."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.hidden_packages import HIDDEN, hidden_environment, imports_of_hidden
from tests.support.launching import ROOT, SMALL, command, metrics, summary

pytestmark = pytest.mark.slow

UNTRACKED = "wandb is not installed; metrics go to metrics.jsonl only"
NO_FIGURES = "no figures are drawn, because matplotlib is not installed; pip install matplotlib"
CACHED = [
    "--distill.features.mse={weight: 0.1, layers: [layer1, layer2], args: {pca_images: 64}}",
    "--teacher.outputs=cached",
]


def run_hidden(where, argv, *, cwd=ROOT, code=0, **changes):
    """Run a real process without the hidden packages, in the environment of `hidden_environment(where)`."""
    done = subprocess.run(
        list(map(str, argv)),
        cwd=cwd,
        env=hidden_environment(where, **changes),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


@dataclass
class Workflow:
    """Teacher, cache, student that pauses on two processes and resumes on one, benchmark and report of both."""

    where: Path
    teacher: subprocess.CompletedProcess
    paused: subprocess.CompletedProcess
    resumed: subprocess.CompletedProcess
    reported: subprocess.CompletedProcess
    imports: set[tuple[str, str]]


@pytest.fixture(scope="module")
def workflow(tmp_path_factory):
    where = tmp_path_factory.mktemp("hidden")
    teacher, student, cache, bench, out = (where / name for name in ("teacher", "student", "cache", "bench.json", "report"))
    flags = [*CACHED, f"--teacher.run={teacher}", f"--teacher.cache.dir={cache}", "--data.views=2"]
    training = ["train", f"--run_dir={student}", *SMALL, *flags, "--tracking.wandb=auto"]

    def program(*argv, processes=1, **changes):
        return run_hidden(where, command(*argv, processes=processes), **changes)

    trained = program(
        "train", f"--run_dir={teacher}", *SMALL, "--role=teacher", "--model.arch=import:tests.support.models:teacher"
    )
    program("cache", "build", *SMALL, *flags)
    paused = program(*training, "--checkpoint.stop_after_steps=11", processes=2)
    resumed = program(*training, WANDB_MODE="online", WANDB_API_KEY="0" * 40)
    quick = ["--batch_sizes=[1]", "--image_size=32", "--min_iterations=2", "--min_time_s=0.01", "--threads=1"]
    program("bench", teacher, student, f"--out={bench}", *quick)
    out.mkdir()
    for name in ("learning_curves.png", "accuracy_latency.png"):
        (out / name).write_text("of an earlier report")
    reported = program("report", teacher, student, f"--out={out}", f"--bench={bench}")
    return Workflow(where, trained, paused, resumed, reported, imports_of_hidden(where))


def test_only_plots_import_a_hidden_package(workflow):
    assert {(package, importer) for package, importer in workflow.imports if importer.startswith("kd_accel")} == {
        ("matplotlib", "kd_accel.report.plots")
    }
    assert "wandb" not in {package for package, _ in workflow.imports}


def test_run_with_disabled_tracking_does_not_mention_wandb(workflow):
    assert "wandb" not in workflow.teacher.stdout + workflow.teacher.stderr
    assert summary(workflow.where / "teacher")["commit"] is None


def test_each_start_prints_one_notice_about_missing_wandb(workflow):
    for done in (workflow.paused, workflow.resumed):
        shown = done.stdout + done.stderr
        assert shown.count(UNTRACKED) == shown.count("wandb") == 1


def test_student_resumes_after_a_pause(workflow):
    assert "paused after step 11" in workflow.paused.stdout
    assert [line["step"] for line in metrics(workflow.where / "student", "train")] == list(range(1, 25))
    result = summary(workflow.where / "student")
    assert result["role"] == "distilled" and result["steps"] == 24 and result["commit"] is None
    assert result["teacher_fingerprint"] is not None


def test_report_has_the_table_and_no_figures(workflow):
    out = workflow.where / "report"
    assert {path.name for path in out.iterdir()} == {"results.md", "results.json", "index.html"}
    table = (out / "results.md").read_text()
    assert table.count("(teacher)") == table.count("(distilled)") == 1
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["role"] for row in rows] == ["teacher", "distilled"] and all(row["latency_ms"] > 0 for row in rows)
    output = workflow.reported.stdout + workflow.reported.stderr
    assert output.count(NO_FIGURES) == 1 and output.count("matplotlib") == 2 and table in output


def test_explicit_tracking_without_wandb_is_refused_before_the_training(tmp_path):
    run_dir = tmp_path / "run"
    argv = command("train", f"--run_dir={run_dir}", *SMALL, "--tracking.wandb=offline")
    done = run_hidden(tmp_path / "hidden", argv, code=2)
    message = (
        "kd-accel: tracking.wandb: offline needs wandb, which is not installed; pip install wandb, or set tracking.wandb to "
    )
    assert done.stderr == f"{message}disabled\n"
    assert not run_dir.exists()


PROBE = """
import importlib.metadata, importlib.util, sys
from kd_accel.config.schema import DataConfig
from kd_accel.data.sources import load_splits
from kd_accel.models.factory import build_model
from kd_accel.errors import UserError
from benchmarks.harness import Result, finish

for package in sys.argv[1:]:
    assert importlib.util.find_spec(package) is None, package
for source in ("digits", "parquet:images", "hub:any/name"):
    try:
        load_splits(DataConfig(source=source))
    except UserError as error:
        print(error)
try:
    build_model("timm/resnet18", num_classes=2)
except UserError as error:
    print(error)
finish(Result.of_repeats("probe", {"case": [1.0]}, notes={}))
"""


def test_sources_networks_and_benchmarks_without_their_packages(tmp_path):
    for name in ("datasets", "wandb", "images"):
        # A directory with the name of a package in the working directory must not be taken for the package.
        (tmp_path / name).mkdir()
    done = run_hidden(tmp_path / "hidden", [sys.executable, "-c", PROBE, *HIDDEN], cwd=tmp_path)
    digits, *hub_sources, timm, _, line = done.stdout.splitlines()
    assert digits == "data.source: digits needs scikit-learn; pip install 'kd-accel[demo]'"
    for message, source in zip(hub_sources, ("parquet:images", "hub:any/name"), strict=True):
        assert message.startswith(f"data.source: {source} needs the package datasets (") and "pip install datasets" in message
    assert "timm/" in timm and "pip install 'kd-accel[timm]'" in timm
    recorded = json.loads(line)
    assert recorded["commit"] is None and recorded["versions"]["datasets"] is None
    assert recorded["versions"]["accelerate"]
