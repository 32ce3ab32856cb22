"""Arrays kept under `$KD_ACCEL_HOME`: complete or absent, for any number of writers."""

import multiprocessing
import resource
import signal

import numpy as np
import pytest

from kd_accel.io.home import home, keep_arrays, load_arrays

pytestmark = pytest.mark.usefixtures("own_home")


def write_often(value):
    for _ in range(40):
        assert keep_arrays("a/b", {"values": np.full(1000, value)}) is None


def test_arrays_are_returned_as_they_were_kept():
    arrays = {"counts": np.arange(6).reshape(2, 3), "none": np.zeros(0, np.int64)}
    assert load_arrays("a/b") is None and keep_arrays("a/b", arrays) is None
    loaded = load_arrays("a/b")
    assert loaded.keys() == arrays.keys()
    assert all(np.array_equal(loaded[name], array) and loaded[name].dtype == array.dtype for name, array in arrays.items())


def test_two_processes_may_write_the_same_file_at_once():
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_often, args=(value,)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        arrays = load_arrays("a/b")
        if arrays is not None:
            (value,) = set(arrays["values"].tolist())
            seen.add(value)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen and [path.name for path in (home() / "a").iterdir()] == ["b.safetensors"]


def test_a_full_disk_keeps_the_earlier_file():
    keep_arrays("a", {"values": np.zeros(10)})
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        problem = keep_arrays("a", {"values": np.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert problem.startswith(f"KD_ACCEL_HOME: cannot write in {home()} (")
    assert load_arrays("a")["values"].tolist() == [0] * 10 and len(list(home().iterdir())) == 1


def test_the_default_is_in_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("KD_ACCEL_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".cache" / "kd_accel"
