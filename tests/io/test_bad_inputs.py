"""Bad input of every kind: exit code 2, one paragraph, no traceback, nothing written, and every file as it was."""

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
    "own code": bad_settings.OWN_CODE,
    "foreign code": bad_settings.FOREIGN,
    "run": bad_directories.RUNS,
    "checkpoint": bad_directories.CHECKPOINTS,
    "cache": bad_directories.CACHES,
    "data": bad_directories.SETS,
}
TABLE = [(f"{kind}, {case[0]}", *case[1:]) for kind, cases in KINDS.items() for case in cases]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, teacher_run):
    """What a case may have damaged, by the name under which it stands there."""
    directory = tmp_path_factory.mktemp("bases")
    (directory / "data").mkdir()
    for split in ("train", "test"):
        bad_directories.table(split)(directory)
    train(directory / "paused", "--checkpoint.every_steps=2", "--checkpoint.stop_after_steps=5")
    cache("build", *flags_of(teacher_run, directory / "cache"))
    shutil.copytree(teacher_run, directory / "run")
    return directory


@pytest.fixture
def place(bases, tmp_path, tmp_path_factory, monkeypatch):
    """The directory of a case, which is the working directory too."""
    shutil.copytree(bases, tmp_path / "case")
    monkeypatch.chdir(tmp_path / "case")
    monkeypatch.syspath_prepend(tmp_path / "case")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("arrow")))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path / "case"


def standing(place):
    """{path: what can be told of it without opening a pipe}; the time of a directory does not count, its names do."""
    found = {}
    for path in sorted(place.rglob("*")):
        status = os.lstat(path)
        is_file = path.is_file() and not path.is_symlink() and status.st_size < 2**28
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else None
        when = None if path.is_dir() and not path.is_symlink() else status.st_mtime_ns
        link = str(path.readlink()) if path.is_symlink() else None
        found[str(path.relative_to(place))] = (status.st_mode, when, status.st_size if when else None, digest, link)
    return found


def check(text, said):
    assert "Traceback" not in text
    assert len(re.findall("^kd-accel: ", text, re.MULTILINE)) == 1, text
    paragraph = text[text.index("kd-accel: ") :]
    assert all(line.startswith(("kd-accel: ", "  ")) for line in paragraph.splitlines()), text
    assert len(paragraph) < 3000
    at = 0
    for part in said.split("..."):
        assert part in paragraph[at:], paragraph
        at = paragraph.index(part, at)


@pytest.mark.filterwarnings("ignore:checkpoint .* is passed over")
@pytest.mark.parametrize(("what", "prepare", "command", "said"), TABLE, ids=[sample[0] for sample in TABLE])
def test_it_is_told_in_one_paragraph_and_nothing_is_touched(place, monkeypatch, what, prepare, command, said):
    if prepare is not None:
        prepare(place)
    if what.startswith(("foreign code", "own code")):
        monkeypatch.delenv(VARIABLE)
    before = standing(place)
    text = say(*(token.replace("{p}", str(place)) for token in command), code=2)
    check(text, said)
    assert standing(place) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is not a number of processes"),
        ({"WORLD_SIZE": "1", "RANK": "-x"}, "RANK: '-x' is not a number of a process"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "the launch is incomplete"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, "gradient_accumulation_steps in the launch file"),
    ],
    ids=str,
)
def test_a_launch_that_contradicts_itself(place, monkeypatch, changes, said):
    before = standing(place)
    monkeypatch.chdir(launching.ROOT)
    done = launching.run("train", f"--run_dir={place / 'new'}", *SMALL, code=2, **changes)
    check(done.stderr, said)
    assert standing(place) == before
