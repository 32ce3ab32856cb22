"""Changed settings at a resume: accepted changes keep the training exact, others are refused with a remedy that works."""

import copy
import re
import shlex
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from kd_accel.config.fields import as_one_teacher, leaves
from kd_accel.config.schema import RunConfig
from kd_accel.training.resume_settings import ACCEPTED, REFUSED, setting_changes
from tests.support import in_process
from tests.support.image_files import encoded, write_parquet
from tests.support.launching import metrics, summary, train
from tests.support.resuming import EVERYTHING

SETTINGS = [".".join(keys) for keys, _ in leaves(RunConfig)]


def test_each_setting_is_either_accepted_or_refused():
    assert not ACCEPTED.keys() & REFUSED.keys()
    assert {as_one_teacher(name) for name in (*ACCEPTED, *REFUSED)} == {as_one_teacher(name) for name in SETTINGS}


def test_changes_are_found_by_name():
    before = {"name": "a", "teacher": None, "optim": {"lr": 0.1, "betas": [0.9]}}
    now = {"name": "a", "teacher": {"run": "t", "weights": None}, "optim": {"lr": 0.2, "betas": [0.9]}}
    assert setting_changes(before, now) == {
        "optim.lr": "optim.lr: 0.1 in the run, 0.2 now",
        "teacher.run": "teacher.run: None in the run, 't' now",
    }


CHANGES = {
    "name": ("before", "after"),
    "role": ("student", "teacher"),
    "data.num_workers": (0, 2),
    "data.memory_limit_mib": (2, 1),
    "data.on_error": ("stop", "skip"),
    "train.eval_batch_size": (256, 7),
    "train.log_every_steps": (3, 5),
    "train.timeout_s": (None, 300.0),
    "checkpoint.every_epochs": (1, None),
    "checkpoint.every_steps": (2, 3),
    "checkpoint.keep": (3, 1),
    "checkpoint.resume": ("auto", "must"),
    "checkpoint.stop_after_steps": (7, None),
    "tracking.wandb": ("disabled", "offline"),
    "tracking.project": ("one", "other"),
    "tracking.entity": (None, "team"),
    "tracking.group": (None, "pairs"),
    "tracking.tags": ([], ["resumed"]),
    "tracking.log_model": (False, True),
    "tracking.tensorboard": (False, True),
    "tracking.timeout_s": (15, 5),
    "profile": (None, 2),
}
"""Changes at the resume of a training without a teacher: (before, after)."""

MOVED = {"run_dir", "teacher.run", "teacher.weights", "teacher.cache.dir", "tracking.dir"}
"""Settings that change because a directory is moved."""

_DESCRIBED = "arch stem arch_args mean std image_size interpolation crop_pct class_map"
WITHOUT_TEACHER = {f"teacher.{name}" for name in _DESCRIBED.split()}
"""Settings of a teacher that a training from a cache alone lacks: tests/cache/test_without_teacher.py changes them."""

OF_THE_TEST_SPLIT = {"data.test_split", "data.limit_test"}
"""Settings of the results: tests/training/test_unreadable.py changes them."""

OF_A_TEACHER = {"teacher.min_accuracy"}
"""Settings that need a teacher: tests/teacher/test_loading.py changes them."""

NEW_CACHE = {"teacher.cache.shard_mib": (64.0, 1.0), "teacher.cache.batch_size": (16, 8)}


def test_each_accepted_setting_is_changed_by_a_test():
    assert {*CHANGES, *MOVED, *NEW_CACHE, *OF_THE_TEST_SPLIT, *OF_A_TEACHER, *WITHOUT_TEACHER} == set(ACCEPTED)


def flags_of(changes, place):
    return [
        f"--{name}={yaml.safe_dump(pair[place], default_flow_style=True).splitlines()[0]}" for name, pair in changes.items()
    ]


@pytest.fixture
def large_images(tmp_path):
    """Flags of a Parquet source whose training split is decoded in memory, or with 1 MiB of memory on demand."""
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for split, samples in (("train", 160), ("test", 41)):
        pixels = generator.integers(0, 256, (samples, 48, 48, 3), dtype=np.uint8)
        images = [encoded(Image.fromarray(image)) for image in pixels]
        write_parquet(tmp_path / "data", split, images, [sample % 4 for sample in range(samples)])
    return [f"--data.source=parquet:{tmp_path}/data", "--data.image_column=img", "--data.image_size=48"]


def assert_same_results(straight, resumed):
    """Compare a run that logs each step with one that was resumed: equal weights, and metrics equal up to rounding."""
    assert (straight / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    for split in ("val", "test"):
        expected = [{**line, "loss": pytest.approx(line["loss"], rel=1e-6)} for line in metrics(straight, split)]
        assert metrics(resumed, split) == expected
    single = {line["step"]: line for line in metrics(straight, "train")}
    start = 0
    for line in metrics(resumed, "train"):
        steps = range(start + 1, line["step"] + 1)
        for name in ("loss", "accuracy"):
            assert line[name] == pytest.approx(sum(single[step][name] for step in steps) / len(steps)), line
        start = line["step"]
    labels = {"name", "role", "commit"}
    assert {k: v for k, v in summary(resumed).items() if k not in labels} == {
        k: v for k, v in summary(straight).items() if k not in labels
    }


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_accepted_changes_keep_the_training(tmp_path, large_images, processes):
    flags = [*EVERYTHING, *large_images]
    train(tmp_path / "straight", *flags, "--train.log_every_steps=1", processes=processes)
    train(tmp_path / "before", *flags, *flags_of(CHANGES, 0), processes=processes)
    assert [line["step"] for line in metrics(tmp_path / "before", "train")] == [3, 6]
    (tmp_path / "before").rename(tmp_path / "after")
    done = train(tmp_path / "after", *flags, *flags_of(CHANGES, 1), processes=processes)
    assert [line["step"] for line in metrics(tmp_path / "after", "train")] == [3, 6, 8, 10, 15, 16, 20]
    assert_same_results(tmp_path / "straight", tmp_path / "after")

    (line,) = [line for line in done.stdout.splitlines() if "resumes with changed settings" in line]
    assert line.startswith("after: resumes with changed settings: ")
    assert all(f" {name}: {pair[0]!r} in the run, {pair[1]!r} now" in line for name, pair in CHANGES.items())
    config = yaml.safe_load((tmp_path / "after/config.yaml").read_text())
    assert config["train"]["log_every_steps"] == 5 and config["name"] == "after" and config["tracking"]["group"] == "pairs"
    assert len(list((tmp_path / "after/checkpoints").iterdir())) == 1


def test_a_moved_teacher_and_a_moved_cache_are_accepted(tmp_path, distilled, teacher_run):
    shutil.copytree(teacher_run, tmp_path / "teacher")
    cached = ["--teacher.outputs=cached", f"--teacher.run={tmp_path / 'teacher'}", f"--teacher.cache.dir={tmp_path / 'cache'}"]
    flags = [*EVERYTHING, *distilled, *cached]
    in_process.cache("build", *flags, *flags_of(NEW_CACHE, 0))
    in_process.train(tmp_path / "straight", *flags, *flags_of(NEW_CACHE, 0), "--train.log_every_steps=1")
    in_process.train(tmp_path / "run", *flags, *flags_of(NEW_CACHE, 0), "--checkpoint.stop_after_steps=7")
    for name in ("teacher", "cache"):
        (tmp_path / name).rename(tmp_path / f"moved_{name}")
    moved = [f"--teacher.run={tmp_path / 'moved_teacher'}", f"--teacher.cache.dir={tmp_path / 'moved_cache'}"]
    moved += [f"--tracking.dir={tmp_path / 'tracking'}"]
    in_process.train(tmp_path / "run", *flags, *moved, *flags_of(NEW_CACHE, 1))
    assert_same_results(tmp_path / "straight", tmp_path / "run")


def test_moved_weights_of_a_teacher_are_accepted_and_other_weights_are_refused(tmp_path, teacher_run):
    shutil.copy(teacher_run / "model.safetensors", tmp_path / "teacher.safetensors")
    own = ["--teacher.arch=import:tests.support.models:teacher", "--teacher.mean=[0.5,0.5,0.5]", "--teacher.std=[0.2,0.2,0.2]"]
    flags = [*EVERYTHING, *own]
    weights = f"--teacher.weights={tmp_path / 'teacher.safetensors'}"
    in_process.train(tmp_path / "straight", *flags, weights, "--train.log_every_steps=1")
    in_process.train(tmp_path / "run", *flags, weights, "--checkpoint.stop_after_steps=7")
    data = bytearray((tmp_path / "teacher.safetensors").read_bytes())
    data[-2] ^= 1
    (tmp_path / "other.safetensors").write_bytes(data)
    other = in_process.train(tmp_path / "run", *flags, f"--teacher.weights={tmp_path / 'other.safetensors'}", code=2)
    assert "was trained with the teacher" in other
    in_process.train(tmp_path / "run", *flags, f"--teacher.weights={teacher_run}")
    assert_same_results(tmp_path / "straight", tmp_path / "run")


def test_the_rate_after_a_resume_is_that_of_the_resumed_steps(tmp_path, monkeypatch):
    """The sums of the next line include samples from before the stop, but the clock starts at the resume."""
    monkeypatch.setenv("KD_TEST_FORWARD_S", "0.05")
    flags = ["--model.arch=import:tests.support.models:slow_teacher", "--train.log_every_steps=6", "--train.max_steps=7"]
    flags += ["--data.val_fraction=0"]
    in_process.train(tmp_path / "run", *flags, "--checkpoint.stop_after_steps=5")
    in_process.train(tmp_path / "run", *flags)
    text = (tmp_path / "run/metrics.jsonl").read_text()
    rates = [float(rate) for rate in re.findall(r'"images_per_second": ([0-9.e+]+)', text)]
    assert len(rates) == 2 and all(0 < rate <= 16 / 0.05 for rate in rates)


def test_a_finished_run_is_extended_by_the_flags_of_the_message(tmp_path):
    run_dir, flags = tmp_path / "a run", ["--train.epochs=1", "--data.val_fraction=0"]
    in_process.train(run_dir, *flags)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    longer = [*flags, "--train.epochs=2", "--optim.lr=1e-9"]
    text = in_process.train(run_dir, *longer, code=2)
    assert "train.epochs: 1 in the run, 2 now; " in text or "; train.epochs: 1 in the run, 2 now" in text
    printed = shlex.split(re.search(r"train a new run from the weights of this run: add (.*) to the command", text)[1])
    assert printed == [f"--run_dir={run_dir}-2", f"--model.weights={run_dir}"]
    in_process.train(run_dir, *longer, *printed)
    extended = tmp_path / "a run-2"
    assert summary(extended)["steps"] == 20 and summary(extended)["accuracy"] == summary(run_dir)["accuracy"]
    assert metrics(extended, "test")[0]["loss"] == pytest.approx(metrics(run_dir, "test")[0]["loss"], rel=1e-5)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    again = in_process.train(run_dir, *longer, code=2)
    assert f"{run_dir}-3" in again, "the name of an existing directory is not proposed"


def test_a_stopped_run_is_extended_as_the_message_describes(tmp_path):
    run_dir, stopped, longer = tmp_path / "run", ["--checkpoint.stop_after_steps=3"], ["--optim.lr=1e-9", "--train.epochs=4"]
    in_process.train(run_dir, *stopped)
    text = in_process.train(run_dir, *longer, code=2)
    assert "Set them back to resume, or start from scratch in another run_dir." in text
    printed = shlex.split(re.search(r"finish this run with its own settings first, then add (.*) to the command", text)[1])
    in_process.train(run_dir)
    in_process.train(run_dir, *longer, *printed)
    assert summary(tmp_path / "run-2")["accuracy"] == summary(run_dir)["accuracy"]


def test_weights_of_another_architecture_are_not_proposed(tmp_path):
    in_process.train(tmp_path / "run", "--train.max_steps=1")
    other = ["--train.max_steps=1", "--model.arch=import:tests.support.models:wide_student"]
    text = in_process.train(tmp_path / "run", *other, code=2)
    assert "Set them back, or start from scratch in another run_dir" in text and "model.weights" not in text


def test_a_run_of_an_earlier_version_is_compared_as_if_it_had_the_later_settings():
    present = RunConfig().model_dump(mode="json")
    stored = copy.deepcopy(present)
    del stored["train"]["cuda_graph"]
    assert setting_changes(stored, present) == {}
    present["train"]["cuda_graph"] = "never"
    assert list(setting_changes(stored, present)) == ["train.cuda_graph"]
