"""README: length, links and figures; its commands and its Python code run unchanged on a few small images."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import kd_accel as kd
from tests.support.in_process import say
from tests.support.models import SmallNet
from tests.support.photos import CLASSES, write_photos

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return found


@pytest.fixture
def photos(request, tmp_path, monkeypatch):
    """Working directory with `photos`; the parameter is the number of training images of each class."""
    write_photos(tmp_path / "photos", train=request.param)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_is_short():
    assert len(README.split()) < 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


def test_figures_are_those_of_the_pages():
    """Means and standard deviations of experiments.md, ratios of speed.md."""
    accuracies, ratios = README.split("## What you gain")[1].split("## Commands")[0].split("Throughput")
    experiments, speed = ((ROOT / "docs" / name).read_text() for name in ("experiments.md", "speed.md"))
    for figures, page in ((accuracies, experiments), (ratios, speed)):
        for figure in re.findall(r"([\d.]+ ± [\d.]+)", figures):
            assert f"| {figure} |" in page
    assert len(re.findall("±", accuracies + ratios)) == 10


def test_every_command_is_named():
    section = README.split("## Commands")[1].split("##")[0]
    commands = re.findall(r"^  (\w+) ", say("--help"), re.MULTILINE)
    assert commands and [name for name in commands if f"`{name}" not in section] == []


def test_install_targets_exist():
    targets = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets and [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


@pytest.mark.slow
@pytest.mark.parametrize("photos", [80], indirect=True)
def test_commands_run(photos):
    """One epoch, small steps and batches and a short measurement; everything else as in the README."""
    (photos / "student.yaml").write_text(block("yaml"))
    commands = [shlex.split(line)[1:] for line in block("sh").splitlines()]
    small = {
        "train": ["--optim.lr=0.001", "--train.epochs=1", "--train.batch_size=32", "--tracking.wandb=disabled"],
        "bench": ["--batch_sizes=[1]", "--min_iterations=2", "--min_time_s=0.01", "--threads=1"],
    }
    small["cache"] = small["train"]
    distilled = ["--teacher.min_accuracy=null"]  # a ResNet-50 after one epoch of 160 photos is at chance
    printed = [say(*each, *small.get(each[0], []), *(distilled if "student.yaml" in each else [])) for each in commands]
    (teacher, student) = (json.loads((photos / "runs" / name / "summary.json").read_text()) for name in ("teacher", "student"))
    assert (teacher["role"], student["role"]) == ("teacher", "distilled")
    assert (photos / "caches/teacher/manifest.json").is_file() and (photos / "report/results.md").is_file()
    assert "teacher" in printed[-1] and "student" in printed[-1]

    prediction = kd.load_model("runs/student").predict(["photos/test/cat/00.png"])[0]
    assert prediction.label in CLASSES


@pytest.mark.slow
@pytest.mark.parametrize("photos", [48], indirect=True)
def test_python_code_runs(photos):
    torch.manual_seed(0)
    names = {"large": SmallNet(2, width=16), "small": SmallNet(2, width=8)}
    exec(compile(block("python").replace("range(10)", "range(2)"), "README.md", "exec"), names)
    assert names["cache"].num_views == 4 and names["views"].view == 1
    assert torch.isfinite(names["loss"]) and names["loss"].grad_fn is not None
    names["cache"].verify()
