"""The example with its own training loop: the same weights and cache, byte for byte, as the commands of kd-accel."""

import pytest

import kd_accel as kd
from tests.support.launching import LAUNCH, python, run

pytestmark = pytest.mark.slow

DATA = ["--data.source=digits", "--data.transform=crop", "--data.views=2", "--data.limit_train=192"]
DISTILLATION = [
    "--teacher.min_accuracy=null",
    "--teacher.outputs=cached",
    "--teacher.cache.dtype=float32",
    "--distill.features.mse={layers: [layer3, layer4], args: {direction: student_to_teacher}}",
    "--distill.alpha={start: 0.9, floor: 0.5, decay: 0.95}",
]
TRAINING = ["--train.epochs=3", "--train.batch_size=64", "--optim.lr=0.05", "--optim.schedule=cosine"]
UNTRACKED = "--tracking.wandb=disabled"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Teacher trained for two steps."""
    settings = {"data": {"source": "digits", "limit_train": 64, "limit_test": 16}, "tracking": {"wandb": "disabled"}}
    run_dir = tmp_path_factory.mktemp("runs") / "teacher"
    return kd.train(settings, run_dir=run_dir, **{"train.max_steps": 2, "train.batch_size": 32}).directory


@pytest.mark.parametrize("processes", [1, 2])
def test_own_loop_trains_the_same_bytes_as_the_command(tmp_path, teacher, processes):
    launcher = () if processes == 1 else [*LAUNCH, "--config_file", "launch/cpu2.yaml"]
    flags = ["--teacher", teacher, "--cache", tmp_path / "cache", "--epochs", "3", "--limit_train", "192"]
    python("examples/own_loop.py", *flags, "--out", tmp_path / "own.safetensors", launcher=launcher)
    shared = [f"--teacher.run={teacher}", *DATA, *DISTILLATION, *TRAINING, UNTRACKED]
    run_dir, command_cache = tmp_path / "run", tmp_path / "cache_of_the_command"
    run("train", *shared, f"--teacher.cache.dir={tmp_path / 'cache'}", f"--run_dir={run_dir}", processes=processes)
    assert (tmp_path / "own.safetensors").read_bytes() == (run_dir / "model.safetensors").read_bytes()
    run("cache", "build", *shared, f"--teacher.cache.dir={command_cache}", f"--run_dir={run_dir}", processes=processes)
    contents = files_of(tmp_path / "cache")
    assert contents == files_of(command_cache) and len(contents) > 8


def files_of(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
