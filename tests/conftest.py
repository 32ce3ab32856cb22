"""Plugins and fixtures of a session: the time limit, a teacher trained by the program itself, and the record of faults."""

import os
import sys
import tempfile

import pytest

from kd_accel.io.home import VARIABLE as HOME_VARIABLE
from kd_accel.io.user_code import VARIABLE
from tests.support.fault_record import FaultRecord
from tests.support.launching import train

pytest_plugins = ["tests.support.time_limit"]
os.environ[VARIABLE] = "1"
"""Runs that tests leave name `import:tests.support.models:...`; what happens without the allowance is in test_imports.py."""
_HOME = tempfile.TemporaryDirectory(prefix="kd-accel-home-")
os.environ[HOME_VARIABLE] = _HOME.name
"""No test reads or changes what the developer's own starts have kept."""


def pytest_collection_finish(session):
    """Start the fork server before the tests that need it, whose time would otherwise include its imports."""
    warm = sys.modules.get("tests.support.warm")
    if warm is not None and not session.config.option.collectonly and is_needed_by(session.items):
        warm.start_server()


def is_needed_by(items):
    return any(hasattr(item.module, name) for item in items for name in ("start", "train", "run", "launching", "WarmProcess"))


@pytest.fixture(scope="session")
def fault_record():
    record = FaultRecord()
    yield record
    record.finish()


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory):
    """A finished run of a small teacher with BatchNorm."""
    run_dir = tmp_path_factory.mktemp("runs") / "teacher"
    train(run_dir, "--role=teacher", "--model.arch=import:tests.support.models:teacher", "--train.log_every_steps=4")
    return run_dir


@pytest.fixture
def distilled(teacher_run):
    """Flags of a hybrid distillation with scheduled T and alpha."""
    return [
        f"--teacher.run={teacher_run}",
        "--distill.temperature={start: 4.0, floor: 2.0, decay: 0.9}",
        "--distill.alpha={start: 0.8, floor: 0.5, decay: 0.95}",
        "--distill.features.mse={weight: 0.1, layers: [layer1, layer2], args: {direction: both, pca_images: 64}}",
    ]


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    """An empty directory for what the program keeps between runs."""
    monkeypatch.setenv("KD_ACCEL_HOME", str(tmp_path / "home"))
