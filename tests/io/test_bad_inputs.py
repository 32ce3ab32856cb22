"""Tests of invalid input of every kind: exit code 2, a message of one paragraph without a traceback, and unchanged files."""

import hashlib
import os
import re
import shutil
import sys

import pytest

from kd_accel.io.user_code import VARIABLE
from tests.support import bad_directories, bad_settings, launching
from tests.support.caches import flags_of
from tests.support.in_process import cache, say, train
from tests.support.launching import SMALL

KINDS = {
    "config": bad_settings.CONFIGS,
    "weights": bad_settings.FILES_OF_WEIGHTS,
    "user code": bad_settings.OWN_CODE,
    "untrusted code": bad_settings.FOREIGN,
    "run": bad_directories.RUNS,
    "checkpoint": bad_directories.CHECKPOINTS,
    "cache": bad_directories.CACHES,
    "data": bad_directories.SETS,
}
CASES = [(f"{kind}, {case[0]}", *case[1:]) for kind, cases in KINDS.items() for case in cases]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, teacher_run):
    """Return a directory with the inputs that the cases damage: `run`, `paused`, `cache` and `data`."""
    directory = tmp_path_factory.mktemp("bases")
    (directory / "data").mkdir()
    for split in ("train", "test"):
        bad_directories.table(split)(directory)
    train(directory / "paused", "--checkpoint.every_steps=2", "--checkpoint.stop_after_steps=5")
    cache("build", *flags_of(teacher_run, directory / "cache"))
    shutil.copytree(teacher_run, directory / "run")
    return directory


@pytest.fixture
def directory(bases, tmp_path, tmp_path_factory, monkeypatch):
    """Directory of a case, with a copy of the inputs; it is also the working directory."""
    shutil.copytree(bases, tmp_path / "case")
    monkeypatch.chdir(tmp_path / "case")
    monkeypatch.syspath_prepend(tmp_path / "case")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("arrow")))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path / "case"


def snapshot(directory):
    """Return {path: (mode, time, size, digest, link target)}; a directory has no time or size.

    Only regular files are opened: opening a pipe would block.
    """
    states = {}
    for path in sorted(directory.rglob("*")):
        status = os.lstat(path)
        is_file = path.is_file() and not path.is_symlink() and status.st_size < 2**28
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else None
        time_ns = None if path.is_dir() and not path.is_symlink() else status.st_mtime_ns
        link = str(path.readlink()) if path.is_symlink() else None
        states[str(path.relative_to(directory))] = (status.st_mode, time_ns, status.st_size if time_ns else None, digest, link)
    return states


def check(output, message):
    """Check that the output has one paragraph with `message`, in which `...` stands for any text."""
    assert "Traceback" not in output
    assert len(re.findall("^kd-accel: ", output, re.MULTILINE)) == 1, output
    paragraph = output[output.index("kd-accel: ") :]
    assert all(line.startswith(("kd-accel: ", "  ")) for line in paragraph.splitlines()), output
    assert len(paragraph) < 3000
    start = 0
    for part in message.split("..."):
        assert part in paragraph[start:], paragraph
        start = paragraph.index(part, start)


@pytest.mark.filterwarnings("ignore:checkpoint .* is passed over")
@pytest.mark.parametrize(("name", "prepare", "command", "message"), CASES, ids=[case[0] for case in CASES])
def test_bad_input_is_reported_in_one_paragraph_and_changes_no_file(directory, monkeypatch, name, prepare, command, message):
    if prepare is not None:
        prepare(directory)
    if name.startswith(("untrusted code", "user code")):
        monkeypatch.delenv(VARIABLE)
    before = snapshot(directory)
    output = say(*(token.replace("{p}", str(directory)) for token in command), code=2)
    check(output, message)
    assert snapshot(directory) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is not a number of processes"),
        ({"WORLD_SIZE": "1", "RANK": "-x"}, "RANK: '-x' is not a number of a process"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "the launch is incomplete"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, "gradient_accumulation_steps in the launch file"),
    ],
    ids=str,
)
def test_an_inconsistent_launch_environment_is_refused(directory, monkeypatch, changes, message):
    before = snapshot(directory)
    monkeypatch.chdir(launching.ROOT)
    done = launching.run("train", f"--run_dir={directory / 'new'}", *SMALL, code=2, **changes)
    check(done.stderr, message)
    assert snapshot(directory) == before
