"""Faults of a cache: killed builds, damaged files, full and read-only disks. Files are named, and a build repairs them."""

import json
import re
import shutil
import signal
import subprocess
import time

import psutil
import pytest

from tests.support import in_process
from tests.support.caches import files_of, flags_of
from tests.support.launching import SMALL, kill_all, losses, run, start, train

SMALL_FILES = ["--teacher.cache.batch_size=16", "--teacher.cache.shard_mib=0.04"]
"""32 samples in a file: four files for each view and tensor."""


@pytest.fixture(scope="module")
def slow_teacher_run(tmp_path_factory):
    """Train a teacher whose forward takes KD_TEST_FORWARD_S seconds."""
    run_dir = tmp_path_factory.mktemp("teachers") / "slow"
    in_process.train(run_dir, "--role=teacher", "--model.arch=import:tests.support.models:slow_teacher", "--train.max_steps=4")
    return run_dir


@pytest.fixture(scope="module")
def built(tmp_path_factory, slow_teacher_run):
    directory = tmp_path_factory.mktemp("caches") / "cache"
    in_process.cache("build", *flags_of(slow_teacher_run, directory), *SMALL_FILES)
    return directory


@pytest.fixture
def copied(built, tmp_path, slow_teacher_run):
    shutil.copytree(built, tmp_path / "cache")
    return flags_of(slow_teacher_run, tmp_path / "cache"), tmp_path / "cache"


def contents(directory):
    """Return the bytes by name of all shards and of the manifest."""
    found = {str(path.relative_to(directory)): content for path, (_, content) in files_of(directory).items()}
    return {**found, "manifest.json": (directory / "manifest.json").read_bytes()}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 8
    path.write_bytes(data)


FILE = "train/view-0001/layer1-00002-of-00004.safetensors"
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "emptied": lambda path: path.write_bytes(b""),
    "data": lambda path: flip(path, -200),
    "header": lambda path: flip(path, 100),
    "length": lambda path: flip(path, 1),
    "another shard": lambda path: shutil.copy(path.with_name(path.name.replace("00002", "00001")), path),
    "another view": lambda path: shutil.copy(str(path).replace("view-0001", "view-0000"), path),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_only_the_damaged_file_is_named_and_repaired(built, copied, tmp_path, kind):
    flags, directory = copied
    DAMAGES[kind](directory / FILE)
    before = files_of(directory)
    report = in_process.cache("verify", *flags, code=2)
    assert f"{FILE}: " in report
    assert re.search(r"teacher\.cache\.dir: 1 .*damaged.* run `kd-accel cache build`", " ".join(report.split()))
    refused = in_process.train(tmp_path / "run", *flags, code=2)
    assert FILE in refused and "kd-accel cache build" in refused
    assert "1 of 27 files to write" in in_process.cache("build", *flags)
    assert contents(directory) == contents(built)
    after = files_of(directory)
    assert {path for path in before if after[path] != before[path]} <= {directory / FILE}
    assert json.loads(in_process.cache("verify", *flags, "--json"))["is_intact"]


def test_a_file_of_another_cache_is_detected(built, copied, tmp_path, teacher_run):
    flags, directory = copied
    other = tmp_path / "other"
    in_process.cache("build", *flags_of(teacher_run, other), *SMALL_FILES)
    shutil.copy(other / FILE, directory / FILE)
    assert f"{FILE}: has the header of another cache" in in_process.cache("verify", *flags, code=2)
    in_process.cache("build", *flags)
    assert contents(directory) == contents(built)


@pytest.mark.parametrize("name", ["spec.json", "manifest.json", "samples.safetensors", "targets.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "truncated", "data"])
def test_damaged_spec_manifest_samples_and_targets_are_repaired(built, copied, tmp_path, name, kind):
    flags, directory = copied
    content = (directory / name).read_bytes()
    middle = content.index(b"logits") if name == "manifest.json" else len(content) // 2  # in a file name, not in a checksum
    damages = {
        "missing": lambda path: path.unlink(),
        "truncated": lambda path: path.write_bytes(content[: len(content) // 2]),
        "data": lambda path: flip(path, middle),
    }
    damages[kind](directory / name)
    before = files_of(directory)
    assert in_process.cache("verify", *flags, code=2).strip()
    refused = in_process.train(tmp_path / "run", *flags, code=2)
    assert "kd-accel cache build" in refused
    in_process.cache("build", *flags, *SMALL_FILES)
    assert files_of(directory) == before
    assert contents(directory) == contents(built)
    assert json.loads(in_process.cache("verify", *flags, "--json"))["is_intact"]


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hosts", "train/../../x.safetensors"])
def test_a_manifest_with_paths_outside_the_cache_is_refused_and_nothing_changes(copied, tmp_path, name):
    flags, directory = copied
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name] = "0" * 32
    (directory / "manifest.json").write_text(json.dumps(manifest))
    (directory / FILE).unlink()
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    for text in (
        in_process.cache("build", *flags, code=2),
        in_process.cache("verify", *flags, code=2),
        in_process.cache("info", *flags, code=2),
        in_process.train(tmp_path / "run", *flags, code=2),
    ):
        assert f"lists {name!r}, a path outside the cache" in text
    after = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert after == before


@pytest.mark.parametrize("name", ["spec.json", "manifest.json"])
def test_a_later_version_is_refused_and_nothing_changes(copied, tmp_path, name):
    flags, directory = copied
    content = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps({**content, "version": 3}))
    (directory / FILE).unlink()
    before = files_of(directory)
    for action in ("build", "verify", "info"):
        assert "has version 3, but this version of kd_accel reads version 2" in in_process.cache(action, *flags, code=2)
    assert files_of(directory) == before


@pytest.mark.parametrize("place", ["/proc/kd_accel/cache", "/dev/null/cache"])
def test_a_directory_that_cannot_be_written_is_refused(slow_teacher_run, place):
    text = in_process.cache("build", *flags_of(slow_teacher_run, place), code=2)
    assert f"cannot write to {place}" in text


@pytest.mark.slow
def test_a_full_disk_keeps_complete_files_and_a_read_only_disk_can_be_read(built, tmp_path, slow_teacher_run):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    flags = flags_of(slow_teacher_run, disk / "cache")
    try:
        (disk / "ballast").write_bytes(b"x" * 500_000)
        text = in_process.cache("build", *flags, *SMALL_FILES, code=2)
        assert "needs another" in text and "are free; decrease data.views" in text
        (disk / "ballast").write_bytes(b"x" * 200_000)
        process = start("cache", "build", *SMALL, *flags, *SMALL_FILES, KD_TEST_FORWARD_S="0.3")
        while not (disk / "cache/train/view-0000").is_dir():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        (disk / "ballast").write_bytes(b"x" * 450_000)  # another program fills the disk during the build
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2, stderr
        assert "cannot write" in stderr and "No space left" in stderr and "keeps the complete files" in stderr
        before = files_of(disk / "cache")
        (disk / "ballast").unlink()
        in_process.cache("build", *flags)
        after = files_of(disk / "cache")
        assert before.items() <= after.items()
        assert contents(disk / "cache") == contents(built)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert "cannot write to" in in_process.cache("build", *flags, code=2)
        in_process.cache("verify", *flags)
        in_process.train(tmp_path / "run", *flags, "--train.max_steps=1")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_second_build_at_the_same_time_is_refused(tmp_path, slow_teacher_run):
    """The lock also holds while only one process of the first build is left."""
    flags = [*flags_of(slow_teacher_run, tmp_path / "cache"), *SMALL_FILES]
    first = start_build(flags, processes=2, forward_s=6.0)
    try:
        wait_for(tmp_path / "cache/spec.json", first)
        for text in (
            in_process.cache("build", *flags, code=2),
            run("cache", "build", *SMALL, *flags, processes=2, code=None).stderr,
        ):
            assert text.count("kd-accel: teacher.cache.dir: another build is writing to") == 1
        ranks = ranks_of(first.pid)
        first.kill()  # the launcher, then rank 0; rank 1 still runs for a while
        ranks[0].kill()
        assert "another build is writing to" in in_process.cache("build", *flags, code=2)
        ranks[1].kill()
        psutil.wait_procs(ranks, timeout=30)
    finally:
        first.kill()
        first.wait()
    in_process.cache("build", *flags)


@pytest.mark.slow
def test_an_interrupted_build_prints_one_line(tmp_path, slow_teacher_run):
    flags = [*flags_of(slow_teacher_run, tmp_path / "cache"), *SMALL_FILES]
    process = start("cache", "build", *SMALL, *flags, KD_TEST_FORWARD_S="0.5")
    wait_for(tmp_path / "cache/train", process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert stderr.splitlines() == ["kd-accel: stopped by SIGINT; files written so far are complete"]
    in_process.cache("build", *flags)


def start_build(flags, *, processes, forward_s):
    return start("cache", "build", *SMALL, *flags, processes=processes, quiet=True, KD_TEST_FORWARD_S=str(forward_s))


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ranks_of(pid):
    alive = [child for child in psutil.Process(pid).children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    children = [child for child in alive if "RANK" in child.environ()]
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def kill_builds(directory, flags, *, kills, processes, generator):
    """Kill builds at random instants. Yields (complete files before a kill, complete files after it, temporary files left)."""
    while kills:
        if (directory / "manifest.json").exists():
            shutil.rmtree(directory)
        before = files_of(directory)
        process = start_build(flags, processes=processes, forward_s=0.1)
        instant = generator.uniform(0, 1.5)
        if generator.random() < 0.8:  # most kills fall into the pass of the teacher
            wait_for(directory / "train", process)
        time.sleep(instant)
        if process.poll() is not None:  # the build has already finished
            continue
        kill_all(process)
        kills -= 1
        yield before, files_of(directory), list(directory.rglob(".*.tmp-*"))


SHORT = [pytest.param(processes, 2, marks=pytest.mark.slow) for processes in (1, 2)]
FULL = [pytest.param(processes, kills, marks=pytest.mark.faults) for processes, kills in ((1, 13), (2, 12))]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [*SHORT, *FULL])
def test_killed_builds_end_in_the_same_bytes(tmp_path, fault_record, built, slow_teacher_run, processes, kills):
    directory = tmp_path / "cache"
    flags = [*flags_of(slow_teacher_run, directory), *SMALL_FILES]
    generator = fault_record.generator("build", processes, kills)
    for before, after, lost in kill_builds(directory, flags, kills=kills, processes=processes, generator=generator):
        with fault_record.trial(f"SIGKILL of a cache build, {processes} process{'es' if processes > 1 else ''}"):
            assert before.items() <= after.items(), "a complete file was replaced"
            assert len(lost) <= 3 * processes, "more than the files of one block"
    with fault_record.trial("cache builds that resume after all kills"):
        before = files_of(directory)
        in_process.cache("build", *flags)
        assert before.items() <= files_of(directory).items()
        assert contents(directory) == contents(built)
        assert not list(directory.rglob(".*.tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.faults)])
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, built, slow_teacher_run, processes):
    flags = [*flags_of(slow_teacher_run, tmp_path / "cache"), *SMALL_FILES]
    run("cache", "build", *SMALL, *flags, processes=processes)
    assert contents(tmp_path / "cache") == contents(built)
    assert "complete, 27 files checked" in run("cache", "build", *SMALL, *flags, processes=processes).stdout
    if processes == 2:
        train(tmp_path / "two", *flags, processes=2)
        train(tmp_path / "one", *flags)
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
