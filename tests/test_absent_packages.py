"""The program where wandb, datasets, matplotlib, scikit-learn, timm and git are absent, as on many GPU machines."""

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
NO_PICTURES = "figures are skipped: matplotlib is not installed"
CACHED = [
    "--distill.features.mse={weight: 0.1, layers: [layer1, layer2], args: {pca_images: 64}}",
    "--teacher.outputs=cached",
]


def run_hidden(where, argv, *, cwd=ROOT, code=0, **changes):
    """Run a real process in the hidden environment of `where`."""
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
class Chain:
    """A teacher, a cache, a student that paused on two processes and resumed on one, the benchmark and the report of both."""

    where: Path
    teacher: subprocess.CompletedProcess
    paused: subprocess.CompletedProcess
    resumed: subprocess.CompletedProcess
    reported: subprocess.CompletedProcess
    imports: set[tuple[str, str]]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
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
    return Chain(where, trained, paused, resumed, reported, imports_of_hidden(where))


def test_only_the_pictures_were_imported(chain):
    assert {(package, importer) for package, importer in chain.imports if importer.startswith("kd_accel")} == {
        ("matplotlib", "kd_accel.report.plots")
    }
    assert "wandb" not in {package for package, _ in chain.imports}


def test_a_disabled_run_is_silent_about_tracking(chain):
    assert "wandb" not in chain.teacher.stdout + chain.teacher.stderr
    assert summary(chain.where / "teacher")["commit"] is None


def test_every_start_of_a_run_that_cannot_be_tracked_has_one_notice(chain):
    for done in (chain.paused, chain.resumed):
        shown = done.stdout + done.stderr
        assert shown.count(UNTRACKED) == shown.count("wandb") == 1


def test_the_student_resumed_from_its_pause_and_the_cache(chain):
    assert "paused after step 11" in chain.paused.stdout
    assert [line["step"] for line in metrics(chain.where / "student", "train")] == list(range(1, 25))
    result = summary(chain.where / "student")
    assert result["role"] == "distilled" and result["steps"] == 24 and result["commit"] is None
    assert result["teacher_fingerprint"] is not None


def test_the_report_has_the_table_and_no_pictures(chain):
    out = chain.where / "report"
    assert {path.name for path in out.iterdir()} == {"results.md", "results.json"}
    table = (out / "results.md").read_text()
    assert table.count("(teacher)") == table.count("(distilled)") == 1
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["role"] for row in rows] == ["teacher", "distilled"] and all(row["latency_ms"] > 0 for row in rows)
    said = chain.reported.stdout + chain.reported.stderr
    assert said.count(NO_PICTURES) == said.count("matplotlib") == 1 and table in said


def test_tracking_requested_by_name_is_refused_before_the_training(tmp_path):
    run_dir = tmp_path / "run"
    argv = command("train", f"--run_dir={run_dir}", *SMALL, "--tracking.wandb=offline")
    done = run_hidden(tmp_path / "hidden", argv, code=2)
    told = "kd-accel: tracking.wandb: offline needs wandb, which is not installed; pip install wandb, or set tracking.wandb to "
    assert done.stderr == f"{told}disabled\n"
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
for source in ("digits", "parquet:images", "imagefolder:images", "hub:any/name"):
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
        (tmp_path / name).mkdir()  # a directory of this name in the working directory is not the package
    done = run_hidden(tmp_path / "hidden", [sys.executable, "-c", PROBE, *HIDDEN], cwd=tmp_path)
    digits, *others, timm, _, line = done.stdout.splitlines()
    assert digits == "data.source: digits needs scikit-learn; pip install 'kd-accel[demo]'"
    for told, source in zip(others, ("parquet:images", "imagefolder:images", "hub:any/name"), strict=True):
        assert told.startswith(f"data.source: {source} needs the package datasets (") and "pip install datasets" in told
    assert "timm/" in timm and "pip install 'kd-accel[timm]'" in timm
    recorded = json.loads(line)
    assert recorded["commit"] is None and recorded["versions"]["datasets"] is None
    assert recorded["versions"]["accelerate"]
