"""Equality of students trained from a cache and with the live teacher, bit for bit (one process, CPU)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kd_accel.cache.manifest import read_manifest, read_spec, write_manifest
from kd_accel.cache.shard import write_shard
from kd_accel.cache.verify import drawn_samples
from kd_accel.config.schema import DataConfig
from kd_accel.data.splits import split_samples
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.types import TeacherOutput
from tests.support import launching
from tests.support.in_process import cache, train
from tests.support.launching import losses, metrics

FEATURE = "--distill.features={mse: {weight: 0.1, layers: [layer1, layer2], args: {%s}}}"
DIRECTIONS = {
    "both": "direction: both, pca_images: 64",
    "teacher_to_student": "direction: teacher_to_student, pca_images: 64",
    "student_to_teacher": "direction: student_to_teacher",
}
MANY = "{random_crop: {padding: 4}, rand_augment: {}, color_jitter: {brightness: 0.4, hue: 0.1}, random_erasing: {}}"
STUDENT = "--model.arch=import:tests.support.models:student_with_everything"


def flags(teacher_run, direction, *, transform="crop_flip"):
    return [
        STUDENT,
        f"--teacher.run={teacher_run}",
        "--distill.temperature={start: 4.0, floor: 2.0, decay: 0.9}",
        FEATURE % DIRECTIONS[direction],
        f"--data.transform={transform}",
        "--data.views=2",
    ]


def cached(cache_dir, *, outputs="cached", dtype="float32"):
    return [f"--teacher.outputs={outputs}", f"--teacher.cache.dir={cache_dir}", f"--teacher.cache.dtype={dtype}"]


def build(*arguments):
    return cache("build", *arguments)


def weights(run_dir):
    return (Path(run_dir) / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("direction", "transform", "image_size"),
    [("both", "crop_flip", 32), ("both", "trivial_augment", 32), ("both", "none", 32), ("teacher_to_student", "crop_flip", 32)]
    + [("student_to_teacher", "trivial_augment", 32)]
    + [("student_to_teacher", "crop_flip", 16), ("both", "crop_flip", 16)]  # maps of one pixel
    + [("both", "resized_crop_flip", 32), ("both", MANY, 32)],
)
def test_cached_equals_live(tmp_path, teacher_run, direction, transform, image_size):
    common = [*flags(teacher_run, direction, transform=transform)]
    common += [f"--data.image_size={image_size}", f"--teacher.image_size={image_size}"]
    if transform == "none":
        common.remove("--data.views=2")
    train(tmp_path / "live", *common)
    build(*common, *cached(tmp_path / "cache"))
    train(tmp_path / "cached", *common, *cached(tmp_path / "cache"))
    assert weights(tmp_path / "cached") == weights(tmp_path / "live")
    assert metrics(tmp_path / "cached") == metrics(tmp_path / "live")


def rounding_finish(dtype):
    """Return a `LiveTeacher.finish` that rounds logits and features to a type."""
    finish = LiveTeacher.finish

    def rounded(teacher, batch, fetched):
        outputs = finish(teacher, batch, fetched)
        features = {layer: feature.to(dtype).float() for layer, feature in outputs.features.items()}
        return TeacherOutput(outputs.logits.to(dtype).float(), features)

    return rounded


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cache_of_half_types_equals_rounded_live_outputs(tmp_path, teacher_run, dtype, monkeypatch):
    common = flags(teacher_run, "both")
    train(tmp_path / "exact", *common)
    with monkeypatch.context() as patched:
        patched.setattr(LiveTeacher, "finish", rounding_finish(getattr(torch, dtype)))
        train(tmp_path / "live", *common)
    build(*common, *cached(tmp_path / "cache", dtype=dtype))
    train(tmp_path / "cached", *common, *cached(tmp_path / "cache", dtype=dtype))
    assert weights(tmp_path / "cached") == weights(tmp_path / "live") != weights(tmp_path / "exact")


def test_mixed_outputs_equal_live_outputs(tmp_path, teacher_run):
    common = flags(teacher_run, "both")
    train(tmp_path / "live", *common)
    use = cached(tmp_path / "cache", outputs="mixed")
    build(*common, *use)
    assert set(read_spec(tmp_path / "cache").tensors) == {"logits"}
    train(tmp_path / "cached", *common, *use)
    assert weights(tmp_path / "cached") == weights(tmp_path / "live")


def test_int8_features_stay_close(tmp_path, teacher_run):
    common = flags(teacher_run, "both")
    train(tmp_path / "live", *common)
    build(*common, *cached(tmp_path / "cache", dtype="int8"))
    train(tmp_path / "cached", *common, *cached(tmp_path / "cache", dtype="int8"))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=0.02)
    assert weights(tmp_path / "cached") != weights(tmp_path / "live")


def test_outputs_of_other_samples_are_detected(tmp_path, teacher_run):
    """The files have valid headers and checksums, but their samples are reversed."""
    common = flags(teacher_run, "both")
    use = cached(tmp_path / "cache")
    build(*common, *use)
    _reverse_samples(tmp_path / "cache")
    for refused in (train(tmp_path / "run", *common, *use, code=2), cache("verify", *common, *use, code=2)):
        assert "differs from the teacher's outputs: " in refused


def test_outputs_of_other_samples_change_the_student(teacher_run, tmp_path):
    """The comparisons of students above can fail."""
    common = flags(teacher_run, "both")
    use = cached(tmp_path / "cache")
    build(*common, *use)
    train(tmp_path / "right", *common, *use)
    train(tmp_path / "wrong", *common, *use, "--checkpoint.stop_after_steps=1")
    _reverse_samples(tmp_path / "cache", keep=_drawn_samples())
    train(tmp_path / "wrong", *common, *use)
    assert weights(tmp_path / "wrong") != weights(tmp_path / "right")


def test_one_cache_serves_every_seed(tmp_path, teacher_run):
    """Another seed visits the samples in another order."""
    common = flags(teacher_run, "both")
    build(*common, *cached(tmp_path / "cache"))
    for seed in (1, 2):
        train(tmp_path / f"live{seed}", *common, f"--seed={seed}")
        train(tmp_path / f"cached{seed}", *common, *cached(tmp_path / "cache"), f"--seed={seed}")
        assert weights(tmp_path / f"cached{seed}") == weights(tmp_path / f"live{seed}")
    assert weights(tmp_path / "cached1") != weights(tmp_path / "cached2")


def test_a_resumed_run_reads_the_same_cache(tmp_path, teacher_run):
    common = [*flags(teacher_run, "both"), *cached(tmp_path / "cache")]
    build(*common)
    train(tmp_path / "straight", *common)
    train(tmp_path / "stopped", *common, "--checkpoint.stop_after_steps=11")
    (tmp_path / "cache").rename(tmp_path / "moved")
    moved = [*flags(teacher_run, "both"), *cached(tmp_path / "moved")]
    train(tmp_path / "stopped", *moved)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.proof
def test_two_processes_read_the_cache_of_one(tmp_path, teacher_run):
    common = flags(teacher_run, "both")
    common[0] = "--model.arch=import:tests.support.models:student"
    use = cached(tmp_path / "cache")
    build(*common, *use)
    train(tmp_path / "one", *common, *use)
    launching.train(tmp_path / "two", *common, *use, processes=2)
    launching.train(tmp_path / "live", *common, processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)


def _reverse_samples(cache_dir, keep=()):
    """Write each training shard again with its samples reversed, except at the positions in `keep`."""
    cache_spec = read_spec(cache_dir)
    files = dict(read_manifest(cache_dir, cache_spec))
    for shard in cache_spec.all_shards():
        if shard.split == "train":
            with safe_open(cache_dir / shard.name, "pt") as file:
                values = file.get_tensor("values")
            order = np.arange(len(values))
            free = np.setdiff1d(order, keep)
            order[free] = free[::-1]
            files[shard.name] = write_shard(cache_dir, cache_spec, shard, values[torch.from_numpy(order)], None)
    write_manifest(cache_dir, cache_spec, files)


def _drawn_samples():
    """Return the positions of the samples that a training recomputes at its start, among the 128 training samples."""
    train_samples = split_samples(np.arange(160) % 4, DataConfig(val_fraction=0.2), num_test=41).train
    return np.searchsorted(train_samples, drawn_samples(train_samples, rank=0))
