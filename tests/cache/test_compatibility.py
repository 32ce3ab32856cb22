"""A cache of something else is refused by field, with both values and the remedy; a request for less is accepted."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_accel.cache.manifest import read_spec
from tests.support.caches import FEATURE, files_of, flags_of
from tests.support.in_process import cache, train
from tests.support.launching import losses, summary


@pytest.fixture(scope="module")
def built(tmp_path_factory, teacher_run):
    """(flags, directory) of a cache that no test changes."""
    directory = tmp_path_factory.mktemp("caches") / "cache"
    flags = flags_of(teacher_run, directory)
    cache("build", *flags)
    return flags, directory


@pytest.fixture
def copied(built, tmp_path, teacher_run):
    """Return (flags, directory) of a copy."""
    shutil.copytree(built[1], tmp_path / "cache")
    return flags_of(teacher_run, tmp_path / "cache"), tmp_path / "cache"


def test_a_memory_format_left_to_the_device_is_accepted(built, tmp_path):
    flags, directory = built
    before = files_of(directory)
    for memory_format in ("null", "true"):
        train(tmp_path / memory_format, *flags, f"--train.channels_last={memory_format}", "--train.max_steps=3")
    assert read_spec(directory).fingerprint_fields["numerics"]["channels_last"] is True and files_of(directory) == before
    assert losses(tmp_path / "null") == pytest.approx(losses(tmp_path / "true"), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--data.view_seed=1", r"views.view_seed: 0 stored, 1 requested"),
        ("--data.augment=crop", r"views.transform: crop_flip stored, crop requested"),
        ("--data.crop_padding=2", r"views.crop_padding: 4 stored, 2 requested"),
        ("--data.image_size=24", r"views.image_size: 32 stored, 24 requested"),
        ("--train.precision=bf16", r"numerics.precision: float32 stored, bf16 requested"),
        ("--distill.features.mse.layers=[layer1.0, layer2]", r"numerics.conv_bn: fused stored, separate requested"),
        ("--train.channels_last=false", r"numerics.channels_last: True stored, False requested"),
        ("--train.cpu_kernels=never", r"numerics.cpu_kernels: None stored, never requested"),
        ("--teacher.cache.dtype=float32", r"teacher.cache.dtype: logits is float16 stored, float32 requested"),
        (
            "--model.arch=import:tests.support.models:wide_student",
            r"images=64\) stored, pca\(channels=12, images=64\)",
        ),
        (
            ["--distill.features.mse.args.direction=student_to_teacher", "--distill.features.mse.args.pca_images=null"],
            r"targets.layer1: pca\(channels=8, images=64\) stored, identity requested",
        ),
        (FEATURE.replace("64", "65"), r"images=64\) stored, pca\(channels=8, images=65\) requested"),
        (
            "--data.source=import:tests.support.models:swapped_images",
            r"samples 3, 5\).*Restore the data, or set another teacher.cache.dir",
        ),
        (
            "--data.source=import:tests.support.models:touched_images",
            r"data.contents.train: 1 of 128 requested samples .*\(samples 5\)",
        ),
        (
            "--data.source=import:tests.support.models:relabelled_images",
            r"another image or label than the stored samples \(samples 5\)",
        ),
    ],
)
def test_a_cache_of_something_else_is_refused(built, tmp_path, change, message):
    flags, directory = built
    before = files_of(directory)
    changed = [*flags, *([change] if isinstance(change, str) else change)]
    for text in (train(tmp_path / "run", *changed, code=2), cache("build", *changed, code=2)):
        assert text.startswith("kd-accel: teacher.cache.dir: ")
        assert _found(message, text)
        assert "kd-accel cache build" in text
    assert files_of(directory) == before
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer1.0.weight", "layer1.1.running_mean", "layer1.1.num_batches_tracked"])
def test_another_weight_or_buffer_of_the_teacher_is_refused(built, tmp_path, teacher_run, name):
    shutil.copytree(teacher_run, tmp_path / "teacher")
    tensors = load_file(tmp_path / "teacher/model.safetensors")
    tensors[name].view(-1)[0] += 1
    save_file(tensors, tmp_path / "teacher/model.safetensors")
    text = train(tmp_path / "run", *built[0], f"--teacher.run={tmp_path / 'teacher'}", code=2)
    assert _found(r"teacher.weights: [0-9a-f]{32} stored, [0-9a-f]{32} requested", text)


def test_another_normalization_of_the_teacher_is_refused(built, tmp_path, teacher_run):
    shutil.copytree(teacher_run, tmp_path / "teacher")
    card = json.loads((tmp_path / "teacher/model.json").read_text())
    card["mean"][0] = 0.123
    (tmp_path / "teacher/model.json").write_text(json.dumps(card))
    text = train(tmp_path / "run", *built[0], f"--teacher.run={tmp_path / 'teacher'}", code=2)
    assert _found(r"teacher.mean: .* stored, \[0.123", text)


@pytest.mark.slow
def test_exchanged_targets_are_refused(copied, tmp_path):
    flags, directory = copied
    tensors = load_file(directory / "targets.safetensors")
    tensors["layer1|conv.bias"] += 1e-6
    save_file(tensors, directory / "targets.safetensors")
    assert "the tensors of layer1 do not match spec.json" in train(tmp_path / "run", *flags, code=2)
    assert "the tensors of layer1 do not match" in cache("verify", *flags, code=2)
    before = files_of(directory)
    cache("build", *flags)
    assert files_of(directory) == before
    train(tmp_path / "run", *flags, "--train.max_steps=1")


@pytest.mark.parametrize(
    "less",
    [
        ["--data.views=1"],
        ["--data.limit_train=64"],
        ["--data.limit_test=20"],
        [FEATURE.replace("layer1, layer2", "layer2")],
        [FEATURE.replace("both", "teacher_to_student")],
        ["--distill.features.mse=null"],
        [
            "--seed=5",
            "--distill.temperature=1.5",
            "--distill.alpha=0.2",
            "--distill.features.mse.weight=0.7",
            "--train.batch_size=8",
        ],
        ["--train.epochs=1", "--data.views=9"],
    ],
)
def test_less_is_accepted(built, tmp_path, less):
    train(tmp_path / "run", *built[0], *less, "--train.max_steps=1")
    assert (tmp_path / "run/summary.json").is_file()


@pytest.mark.slow
def test_more_views_are_named_and_added_without_touching_what_is_there(copied, tmp_path):
    flags, directory = copied
    more = [*flags, "--data.views=3"]
    text = train(tmp_path / "run", *more, code=2)
    assert "lacks views 2 to 2 (data.views: 2 stored, 3 requested). Run `kd-accel cache build` with this config" in text
    before = files_of(directory)
    assert "3 of 11 files to write" in cache("build", *more)
    after = files_of(directory)
    assert {name: after[name] for name in before} == before
    assert {name.parent.name for name in after.keys() - before.keys()} == {"view-0002"}
    train(tmp_path / "run", *more, "--train.max_steps=1")
    train(tmp_path / "less", *flags, "--train.max_steps=1")


@pytest.mark.slow
def test_more_layers_are_named_and_added_without_touching_what_is_there(tmp_path, teacher_run, built):
    directory = tmp_path / "cache"
    flags = flags_of(teacher_run, directory, FEATURE.replace("layer1, layer2", "layer2"))
    cache("build", *flags)
    before = files_of(directory)
    more = flags_of(teacher_run, directory)
    assert "lacks tensor layer1" in train(tmp_path / "run", *more, code=2)
    assert "2 of 8 files to write" in cache("build", *more)
    after = files_of(directory)
    assert {name: after[name] for name in before} == before
    assert {name.name.split("-")[0] for name in after.keys() - before.keys()} == {"layer1"}
    train(tmp_path / "run", *more, "--train.max_steps=1")
    at_once = {name.relative_to(built[1]): content for name, (_, content) in files_of(built[1]).items()}
    assert {name.relative_to(directory): content for name, (_, content) in after.items()} == at_once


def test_an_added_layer_has_the_stored_type(tmp_path, teacher_run):
    flags = flags_of(teacher_run, tmp_path / "cache", FEATURE.replace("layer1, layer2", "layer2"))
    cache("build", *flags, "--teacher.cache.dtype=float32")
    cache("build", *flags_of(teacher_run, tmp_path / "cache"))
    tensors = json.loads((tmp_path / "cache/spec.json").read_text())["tensors"]
    assert {spec["dtype"] for spec in tensors.values()} == {"float32"}


def test_more_samples_are_named(tmp_path, teacher_run):
    flags = flags_of(teacher_run, tmp_path / "cache")
    few = [*flags, "--data.limit_train=64", "--data.limit_test=20"]
    cache("build", *few)
    for text in (train(tmp_path / "run", *flags, code=2), cache("build", *flags, code=2)):
        assert _found(
            r"lacks 64 of 128 requested train samples \(samples .*\); it was built with another data.limit_train", text
        )
    text = train(tmp_path / "run", *few[:-1], code=2)
    assert "lacks 21 of 41 requested test samples" in text


def test_a_subset_of_the_samples_can_be_extended_by_views(copied):
    """The new view covers all samples of the cache, not only those of the config that requests it."""
    flags, directory = copied
    cache("build", *flags, "--data.views=3", "--data.limit_train=64")
    cache("verify", *flags, "--data.views=3")
    assert json.loads((directory / "spec.json").read_text())["samples"]["train"] == 128


def test_a_resume_on_another_cache_is_refused(built, copied, tmp_path, teacher_run):
    train(tmp_path / "run", *built[0], "--checkpoint.stop_after_steps=3")
    other = flags_of(teacher_run, tmp_path / "other")
    cache("build", *other, "--teacher.cache.dtype=float32")
    assert _found(r"was trained from the cache [0-9a-f]{32}, the present one is", train(tmp_path / "run", *other, code=2))
    train(tmp_path / "run", *copied[0])
    assert (tmp_path / "run/summary.json").is_file()


def test_verify_and_info_describe_a_cache(built, tmp_path, teacher_run):
    flags, directory = built
    report = json.loads(cache("verify", *flags, "--json"))
    assert report["is_intact"] and report["wrong"] == {} and report["files"] == 8
    assert report["largest_difference"] < 1e-3
    about = json.loads(cache("info", *flags, "--json"))
    assert about["is_complete"] and about["bytes"] == report["bytes"] == 2 * 128 * 1160 + (32 + 41) * 8
    assert about["bytes_per_sample_and_view"] == {
        "logits": 8,
        "layer1": 1024,
        "layer2": 128,
        "all": 1160,
        "all with raw features": 8 + 2048 + 256,
    }
    assert about["teacher_accuracy"] == summary(teacher_run)["accuracy"]
    text = cache("info", *flags)
    assert "complete, 8 files" in text and "pca(channels=8, images=64), keeps" in text
    assert f"the teacher's accuracy on the test samples is {100 * about['teacher_accuracy']:.2f} %" in text
    assert "holds no cache" in cache("info", *flags, f"--teacher.cache.dir={tmp_path}", code=2)
    assert "uses no cache" in cache("info", "--teacher.run=x", code=2)


@pytest.mark.parametrize("accuracy", [None, "high", 7.0])
def test_a_manifest_without_the_teachers_accuracy_is_complete(copied, tmp_path, accuracy):
    flags, directory = copied
    path = directory / "manifest.json"
    built = path.read_text()
    manifest = json.loads(built)
    del manifest["teacher_accuracy"]
    path.write_text(json.dumps(manifest if accuracy is None else {**manifest, "teacher_accuracy": accuracy}))
    about = json.loads(cache("info", *flags, "--json"))
    assert about["is_complete"] and about["teacher_accuracy"] is None
    assert "teacher's accuracy" not in cache("info", *flags)
    train(tmp_path / "run", *flags, "--train.max_steps=1")
    cache("build", *flags)
    assert path.read_text() == built


def _found(pattern, text):
    import re

    return re.search(pattern, " ".join(text.split())) is not None


def test_outputs_that_are_wrong_by_a_tenth_are_noticed():
    from kd_accel.cache.verify import largest_difference, tolerance
    from kd_accel.types import TeacherOutput

    live = TeacherOutput(torch.ones(4, 3), {"a": torch.ones(4, 2, 1, 1)})
    wrong = TeacherOutput(torch.ones(4, 3), {"a": torch.full((4, 2, 1, 1), 1.1)})
    assert largest_difference(wrong, live, {}) == ("a", pytest.approx(0.1))
    assert largest_difference(wrong, live, {})[1] > tolerance("float16", "bf16") > tolerance("float32", "float32") > 0
    assert largest_difference(wrong, live, {"a": 10.0}) == ("a", pytest.approx(0.01))
    not_a_number = TeacherOutput(torch.ones(4, 3), {"a": torch.full((4, 2, 1, 1), torch.nan)})
    assert largest_difference(live, not_a_number, {}) == ("a", torch.inf)
