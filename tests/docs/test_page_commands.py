"""Commands and code of the pages: they run in the order of the page, on few small images, or are marked with what they need.

A fenced block is a file if it has the title of a file, commands if its language is `sh`, and code if it is `python`. Commands
that a test cannot run have a title that begins with "Needs".
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn

from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from tests.support.in_process import say
from tests.support.launching import ROOT, environment
from tests.support.photos import CLASSES, write_images, write_photos

PAGES = sorted((ROOT / "docs").rglob("*.md"))
NEEDS = {"a GPU", "GPUs", "a cluster", "the network", "a terminal", "a browser", "CIFAR-10"}
ELSEWHERE = {
    "kd-accel reproduce configs/digits/assistant/reproduce.yaml": ("tests/commands/test_chains.py", '"assistant"'),
    "kd-accel reproduce configs/digits/born_again/reproduce.yaml": ("tests/commands/test_chains.py", '"born_again"'),
    "python -m benchmarks.launches": ("tests/benchmarks/test_launches.py", '"benchmarks.launches"'),
    "kd-accel sweep student.yaml": ("tests/docs/test_sweep_page.py", "test_the_command_is_accepted"),
}
"""Beginning of a command, the file of the test that runs it, and a text in this file."""
NOT_PARSED = (
    *("pip install ", "hf upload ", "wandb leet ", "tensorboard ", "python -m benchmarks."),
    "kd-accel train configs/cifar10_short/CONFIG ",
)
"""Beginnings of commands of other programs, and of a pattern of commands."""
OWN_TESTS = {"sweep.md", "data.md"}
"""Pages whose code other tests run."""
PHOTOS_RUNS = ["teacher", "student", "distilled"]
GIVEN = {
    **dict.fromkeys(("data.md", "deploy.md", "report.md", "start.md"), PHOTOS_RUNS),
    **dict.fromkeys(("profile.md", "tracking.md", "tutorials/own_model.md"), ["teacher"]),
    **dict.fromkeys(("concepts/cache.md", "tutorials/own_loss.md", "tutorials/own_loop.md"), ["digits/teacher"]),
}
"""Finished runs on which a page builds."""

RUN = {"train.epochs": 1, "train.eval_every_epochs": 1, "train.batch_size": 16, "optim.lr": 0.001, "tracking.wandb": "disabled"}
DIGITS = {"data.limit_train": 120, "data.limit_test": 40}
STUDENT = {
    "name": "student",
    "data": {"source": "imagefolder:photos", "image_size": 32, "views": 2},
    "model": {"arch": "torchvision/resnet18"},
    "optim": {"lr": 0.001},
    "train": {"epochs": 1, "batch_size": 16},
}
DISTILLED = {**STUDENT, "name": "distilled", "teacher": {"run": "runs/teacher", "min_accuracy": None}}
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def blocks(page):
    """Return (language, title, text) of each fenced block of a page."""
    return BLOCK.findall(page.read_text())


def commands(text):
    """Return the commands of a block, without comments."""
    return [line for line in re.sub(r"\s+#.*$", "", text, flags=re.MULTILINE).splitlines() if line]


def name(page):
    return str(page.relative_to(ROOT / "docs"))


def is_run(page):
    """Return whether a page has commands or code that no other test runs."""
    lines = [line for language, title, text in blocks(page) if language == "sh" and not title for line in commands(text)]
    has_code = any(language == "python" and not title for language, title, _ in blocks(page))
    return name(page) not in OWN_TESTS and (has_code or any(not line.startswith(tuple(ELSEWHERE)) for line in lines))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_in_fenced_blocks_with_known_marks(page):
    text = BLOCK.sub("", page.read_text())
    assert "```" not in text, "a fence of another form"
    assert re.findall(r"^ {4,}(?:kd-accel|accelerate|python|pip|make) .*", text, re.MULTILINE) == []
    marks = {title.removeprefix("Needs ") for language, title, _ in blocks(page) if language == "sh" and title}
    assert marks <= NEEDS


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_marked_commands_have_valid_settings(page, tmp_path):
    """A command that is not run is parsed: its files exist, and each setting is valid."""
    for language, title, text in blocks(page):
        if language == "yaml" and title:
            (tmp_path / title).write_text(text)
    lines = [line for language, title, text in blocks(page) if language == "sh" and title for line in commands(text)]
    assert [line for line in lines if not is_valid(line, tmp_path)] == []


def is_valid(line, directory):
    """Return whether a command is a training or a build with valid settings, or one of another program."""
    assert all((ROOT / file).is_file() for file in re.findall(r"--config_file (\S+)", line))
    found = re.search(r"(?:kd[-_]accel (?:train|cache build)|slurm\.sbatch) ([^']*)", line)
    if line.startswith(NOT_PARSED) or found is None:
        return line.startswith(NOT_PARSED)
    words = [word for word in shlex.split(found[1]) if word != "--allow_import"]
    files = [
        next(path for path in (ROOT / word, directory / word) if path.is_file()) for word in words if word.endswith(".yaml")
    ]
    flags = [word for word in words if not word.endswith(".yaml")]
    config, _ = parse_config(RunConfig, [*(f"--config={file}" for file in files), *flags])
    return bool(files) and config.name != ""


def test_commands_that_other_tests_run_are_on_a_page():
    pages = "\n".join(page.read_text() for page in PAGES)
    for command, (file, text) in ELSEWHERE.items():
        assert f"\n{command}" in pages and text in (ROOT / file).read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Directory with images, configs and links to the repository, and a directory with runs on these images."""
    directory = tmp_path_factory.mktemp("pages")
    write_photos(directory / "photos", train=24, test=12)
    write_images(directory / "more", 16)
    write_images(directory / "new", 4)
    shutil.copy(directory / "new/00.png", directory / "cat.jpg")
    kind = Features({"image": ImageColumn(), "kind": ClassLabel(names=list(CLASSES))})
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted((directory / "new").iterdir())]
    (directory / "new_files").mkdir()
    for split in ("train", "val", "test"):
        rows = Dataset.from_dict({"image": cells, "kind": [0, 1, 0, 1]}, features=kind)
        rows.to_parquet(directory / f"new_files/{split}.parquet")
    for linked in ("configs", "launch", "examples", "kd_accel"):
        (directory / linked).symlink_to(ROOT / linked)
    return directory


@pytest.fixture(scope="module")
def runs(world):
    """Directory with finished runs; the configs of students are next to it."""
    before = Path.cwd()
    os.chdir(world)
    try:
        Path("student.yaml").write_text(yaml.safe_dump(STUDENT))
        Path("distilled.yaml").write_text(yaml.safe_dump(DISTILLED))
        quiet = ["--tracking.wandb=disabled"]
        say("train", "student.yaml", "--name=teacher", "--role=teacher", "--run_dir=finished/teacher", *quiet)
        say("train", "student.yaml", "--run_dir=finished/student", *quiet)
        say("train", "distilled.yaml", "--run_dir=finished/distilled", "--teacher.run=finished/teacher", *quiet)
        digits = [f"--{setting}={value}" for setting, value in {**RUN, **DIGITS}.items()]
        small = ["--model.arch=torchvision/resnet18", "--run_dir=finished/digits/teacher"]
        say("train", "configs/digits/teacher.yaml", *digits, *small)
    finally:
        os.chdir(before)
    return world / "finished"


@pytest.fixture
def desk(world, tmp_path, monkeypatch):
    """Working directory of a page, whose modules are imported from it alone."""
    for path in world.iterdir():
        if path.name not in ("finished", "student.yaml", "distilled.yaml", "new_files"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = [title.removesuffix(".py") for page in PAGES for _, title, _ in blocks(page) if title.endswith(".py")]
    for module in own:
        sys.modules.pop(module, None)
    yield tmp_path
    for module in own:
        sys.modules.pop(module, None)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if is_run(page)], ids=name)
def test_commands_and_code_run(page, desk, request):
    if name(page) in GIVEN:
        give(request.getfixturevalue("runs"), GIVEN[name(page)], desk)
    names, count = {}, 0
    for language, title, text in blocks(page):
        if language in ("python", "yaml") and title:
            (desk / title).write_text(text)
        elif language == "python":
            exec(compile(text, str(page), "exec"), names)
            count += 1
        elif language == "sh" and not title:
            count += sum(run(line) for line in commands(text))
    assert count > 0


@pytest.mark.slow
def test_commands_of_the_data_page_run(desk, world, runs):
    give(runs, PHOTOS_RUNS, desk)
    (desk / "new").unlink()
    (desk / "new").symlink_to(world / "new_files")
    lines = [line for language, title, text in blocks(ROOT / "docs/data.md") if language == "sh" for line in commands(text)]
    assert len(lines) == 3 and all(run(line) for line in lines)


def give(runs, names, desk):
    """Copy runs and the configs of students to the directory of a page."""
    for run_name in names:
        shutil.copytree(runs / run_name, desk / "runs" / run_name)
    for file in ("student.yaml", "distilled.yaml"):
        shutil.copy(runs.parent / file, desk)


def run(line):
    """Run a command at small size, and return whether it was run; False if another test runs it."""
    if any(line.startswith(command) for command in ELSEWHERE):
        return False
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "kd-accel":
        say(*words[1:], *sized(words[1:]))
    else:
        run_program(words)
    return True


def run_program(words):
    """Run a launch of Accelerate, or `cmp`."""
    more = []
    if words[:2] == ["accelerate", "launch"]:
        words = [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
        more = sized(words[words.index("kd_accel") + 1 :]) if "kd_accel" in words else ["--limit_train=128"]
    variables = environment(PYTHONPATH=os.pathsep.join((str(ROOT), str(Path.cwd()))))
    done = subprocess.run([*words, *more], env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def sized(words):
    """Return flags that make a command small: one epoch of few images; a teacher may then be at chance."""
    flags = {}
    if words[0] in ("train", "cache", "plan"):
        flags = {**RUN, **(DIGITS if any("digits" in word for word in words) else {"data.image_size": 32})}
        if any(word.startswith("--tracking.") for word in words):
            del flags["tracking.wandb"]
        files = [Path(word) for word in words if word.endswith(".yaml")]
        has_teacher = "--teacher" not in words and any("teacher:" in file.read_text() for file in files)
        flags |= {"teacher.min_accuracy": "null"} if has_teacher else {}
    if words[0] == "bench":
        flags = {"batch_sizes": "[1]", "min_iterations": 2, "min_time_s": 0.01, "threads": 1}
    return [f"--{setting}={value}" for setting, value in flags.items()]
