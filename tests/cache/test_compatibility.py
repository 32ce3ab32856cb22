"""Compatibility of a cache with a config: differences are refused by setting; a request for less is accepted."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_accel.builders.cache import cache_request
from kd_accel.builders.student import Losses
from kd_accel.cache.manifest import read_spec
from kd_accel.cache.verify import largest_difference, tolerance
from kd_accel.data.datamodule import load_data
from kd_accel.models.factory import build_model
from kd_accel.teacher.teacher import Teacher
from kd_accel.types import TeacherOutput
from tests.support.caches import FEATURE, files_of, flags_of
from tests.support.in_process import cache, train
from tests.support.launching import SMALL, losses, summary
from tests.support.parsing import parse


@pytest.fixture(scope="module")
def built(tmp_path_factory, teacher_run):
    """Return (flags, directory) of a cache that no test changes."""
    directory = tmp_path_factory.mktemp("caches") / "cache"
    flags = flags_of(teacher_run, directory)
    cache("build", *flags)
    return flags, directory


@pytest.fixture
def copied(built, tmp_path, teacher_run):
    """Return (flags, directory) of a copy."""
    shutil.copytree(built[1], tmp_path / "cache")
    return flags_of(teacher_run, tmp_path / "cache"), tmp_path / "cache"


def test_any_memory_format_is_accepted_if_the_config_has_none(built, tmp_path):
    flags, directory = built
    before = files_of(directory)
    for memory_format in ("null", "true"):
        train(tmp_path / memory_format, *flags, f"--train.channels_last={memory_format}", "--train.max_steps=3")
    assert read_spec(directory).fingerprint_fields["numerics"]["channels_last"] is True and files_of(directory) == before
    assert losses(tmp_path / "null") == pytest.approx(losses(tmp_path / "true"), rel=1e-5)


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ("--train.tf32=false", {"tf32": None}),
        ("--train.precision=bf16", {"precision": "bf16"}),
        ("--train.channels_last=false", {"channels_last": False}),
        ("--train.compile=true", {"compile": True}),
        ("--train.cpu_kernels=always", {"cpu_kernels": "always"}),
    ],
)
def test_settings_of_the_numerics_reach_the_fingerprint_on_a_gpu(flag, changed):
    def numerics(*flags):
        config = parse(*SMALL, *flags_of("unused", "unused"), "--train.channels_last=null", *flags)
        teacher = Teacher(build_model("import:tests.support.models:teacher", num_classes=4), [0.5] * 3, [0.2] * 3)
        request = cache_request(config, load_data(config.data), teacher, Losses(), {}, torch.device("cuda"))
        return request.fingerprint_fields["numerics"]

    default = {"precision": "float32", "channels_last": True, "compile": False, "tf32": True, "conv_bn": "fused"}
    assert numerics() == default
    expected = {**default, **changed}
    assert numerics(flag) == {name: value for name, value in expected.items() if value is not None}


MATCH = "does not match this config: "
DATA = "was built from other data: data.source or data.train_split: "
INTERNAL = r"\b(numerics|views|targets|data\.contents|data\.label_names)\.\w|conv_bn|fingerprint"
"""Names of the fingerprint, which a message translates into settings."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--data.view_seed=1", f"{MATCH}data.view_seed: 0 in the cache, 1 now. Restore"),
        (
            "--data.transform=crop",
            f"{MATCH}data.transform.random_horizontal_flip.p: 0.5 in the cache, not set now. Restore",
        ),
        (
            "--data.transform={random_crop: {padding: 2}, random_horizontal_flip: {}}",
            f"{MATCH}data.transform.random_crop.padding: 4 in the cache, 2 now. Restore",
        ),
        (
            "--data.transform={random_horizontal_flip: {}, random_crop: {padding: 4}}",
            f"{MATCH}data.transform: the usual order in the cache, ['random_horizontal_flip', 'random_crop'] now (order of",
        ),
        ("--data.crop_pct=0.9", f"{MATCH}data.crop_pct: 1.0 in the cache, 0.9 now. Restore"),
        ("--data.image_size=24", f"{MATCH}data.image_size: 32 in the cache, 24 now. Restore"),
        ("--train.precision=bf16", f"{MATCH}train.precision: float32 in the cache, bf16 now. Restore"),
        (
            "--distill.features.mse.layers=[layer1.0, layer2]",
            f"{MATCH}distill.features.mse.layers or teacher.outputs: BatchNorm fused into the teacher's convolutions in the "
            "cache, BatchNorm separate now (separate if a cached layer ends between a convolution and its BatchNorm). Restore",
        ),
        ("--train.channels_last=false", f"{MATCH}train.channels_last: true in the cache, false now. Restore"),
        ("--train.cpu_kernels=never", f"{MATCH}train.cpu_kernels: auto in the cache, never now. Restore"),
        (
            "--teacher.cache.dtype=float32",
            f"{MATCH}teacher.cache.dtype: float16 in the cache, float32 now (logits, layer1, layer2). Restore",
        ),
        (
            "--model.arch=import:tests.support.models:wide_student",
            f"{MATCH}model.arch or distill.features.mse.layers (channels of the student's layer): 8 in the cache, 12 now "
            "(target of layer1); ",
        ),
        (
            ["--distill.features.mse.args.direction=student_to_teacher", "--distill.features.mse.args.pca_images=null"],
            f"{MATCH}distill.features.mse.args.direction: pca in the cache, identity now (target of layer1, layer2). Restore",
        ),
        (
            FEATURE.replace("64", "65"),
            f"{MATCH}distill.features.mse.args.pca_images: 64 in the cache, 65 now (target of layer1, layer2). Restore",
        ),
        (
            ["--data.view_seed=1", "--train.precision=bf16"],
            f"{MATCH}train.precision: float32 in the cache, bf16 now; data.view_seed: 0 in the cache, 1 now. Restore",
        ),
        (
            "--data.source=import:tests.support.models:swapped_images",
            f"{DATA}2 of 128 training samples have another image or label than in the cache (samples 3, 5). Restore the data, "
            "or set another teacher.cache.dir",
        ),
        ("--data.source=import:tests.support.models:touched_images", f"{DATA}1 of 128 training samples have"),
        ("--data.source=import:tests.support.models:relabelled_images", "label than in the cache (samples 5)"),
    ],
)
def test_a_cache_of_another_config_is_refused(built, tmp_path, change, message):
    """The refusal names settings, with the values in the cache and now, and never a field of the fingerprint."""
    flags, directory = built
    before = files_of(directory)
    changed = [*flags, *([change] if isinstance(change, str) else change)]
    for text in (train(tmp_path / "run", *changed, code=2), cache("build", *changed, code=2)):
        refusal = text[text.index("kd-accel: teacher.cache.dir: the cache in ") :]
        assert message in " ".join(refusal.split())
        assert re.findall(INTERNAL, refusal) == []
        assert "kd-accel cache build" in refusal
    assert files_of(directory) == before
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("name", ["layer1.0.weight", "layer1.1.running_mean", "layer1.1.num_batches_tracked"])
def test_another_weight_or_buffer_of_the_teacher_is_refused(built, tmp_path, teacher_run, name):
    shutil.copytree(teacher_run, tmp_path / "teacher")
    tensors = load_file(tmp_path / "teacher/model.safetensors")
    tensors[name].view(-1)[0] += 1
    save_file(tensors, tmp_path / "teacher/model.safetensors")
    text = train(tmp_path / "run", *built[0], f"--teacher.run={tmp_path / 'teacher'}", code=2)
    assert _found(r"teacher.run or teacher.weights: [0-9a-f]{32} in the cache, [0-9a-f]{32} now \(digest of the", text)


def test_another_normalization_of_the_teacher_is_refused(built, tmp_path, teacher_run):
    shutil.copytree(teacher_run, tmp_path / "teacher")
    card = json.loads((tmp_path / "teacher/model.json").read_text())
    card["mean"][0] = 0.123
    (tmp_path / "teacher/model.json").write_text(json.dumps(card))
    text = train(tmp_path / "run", *built[0], f"--teacher.run={tmp_path / 'teacher'}", code=2)
    assert _found(r"teacher.run or teacher.mean: \[.*\] in the cache, \[0.123, .*\] now", text)


def test_changed_targets_are_refused(copied, tmp_path):
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
def test_a_request_for_less_is_accepted(built, tmp_path, less):
    train(tmp_path / "run", *built[0], *less, "--train.max_steps=1")
    assert (tmp_path / "run/summary.json").is_file()


def test_missing_views_are_named_and_added_without_changing_existing_files(copied, tmp_path):
    flags, directory = copied
    more = [*flags, "--data.views=3"]
    text = train(tmp_path / "run", *more, code=2)
    assert "lacks view 2 (data.views: 2 in the cache, 3 needed). Run `kd-accel cache build` with this config" in text
    before = files_of(directory)
    assert "3 of 11 files to write" in cache("build", *more)
    after = files_of(directory)
    assert {name: after[name] for name in before} == before
    assert {name.parent.name for name in after.keys() - before.keys()} == {"view-0002"}
    train(tmp_path / "run", *more, "--train.max_steps=1")
    train(tmp_path / "less", *flags, "--train.max_steps=1")


def test_missing_layers_are_named_and_added_without_changing_existing_files(tmp_path, teacher_run, built):
    directory = tmp_path / "cache"
    flags = flags_of(teacher_run, directory, FEATURE.replace("layer1, layer2", "layer2"))
    cache("build", *flags)
    before = files_of(directory)
    more = flags_of(teacher_run, directory)
    assert "lacks the features of layer1 (distill.features.mse.layers). Run" in train(tmp_path / "run", *more, code=2)
    assert "2 of 8 files to write" in cache("build", *more)
    after = files_of(directory)
    assert {name: after[name] for name in before} == before
    assert {name.name.split("-")[0] for name in after.keys() - before.keys()} == {"layer1"}
    train(tmp_path / "run", *more, "--train.max_steps=1")
    at_once = {name.relative_to(built[1]): content for name, (_, content) in files_of(built[1]).items()}
    assert {name.relative_to(directory): content for name, (_, content) in after.items()} == at_once


def test_an_added_layer_has_the_storage_type_of_the_cache(tmp_path, teacher_run):
    flags = flags_of(teacher_run, tmp_path / "cache", FEATURE.replace("layer1, layer2", "layer2"))
    cache("build", *flags, "--teacher.cache.dtype=float32")
    cache("build", *flags_of(teacher_run, tmp_path / "cache"))
    tensors = json.loads((tmp_path / "cache/spec.json").read_text())["tensors"]
    assert {spec["dtype"] for spec in tensors.values()} == {"float32"}


def test_missing_samples_are_named(tmp_path, teacher_run):
    flags = flags_of(teacher_run, tmp_path / "cache")
    few = [*flags, "--data.limit_train=64", "--data.limit_test=20"]
    cache("build", *few)
    for text in (train(tmp_path / "run", *flags, code=2), cache("build", *flags, code=2)):
        assert _found(
            r"lacks 64 of 128 training samples \(samples .*\), because it was built with another data.limit_train or "
            r"data.val_fraction. Restore data.limit_train or data.val_fraction, or set another teacher.cache.dir",
            text,
        )
    text = train(tmp_path / "run", *few[:-1], code=2)
    assert "lacks 21 of 41 test samples" in text
    assert "with another data.limit_test or data.test_fraction. Restore data.limit_test or data.test_fraction, or" in text


def test_a_subset_of_the_samples_can_be_extended_by_views(copied):
    """The new view covers all samples of the cache, not only those of the config that requests it."""
    flags, directory = copied
    cache("build", *flags, "--data.views=3", "--data.limit_train=64")
    cache("verify", *flags, "--data.views=3")
    assert json.loads((directory / "spec.json").read_text())["samples"]["train"] == 128


def test_resuming_from_another_cache_is_refused(built, copied, tmp_path, teacher_run):
    train(tmp_path / "run", *built[0], "--checkpoint.stop_after_steps=3")
    other = flags_of(teacher_run, tmp_path / "other")
    cache("build", *other, "--teacher.cache.dtype=float32")
    said = r"was trained from the cache [0-9a-f]{32}-16, the present one is [0-9a-f]{32}-16; use the same cache"
    assert _found(said, train(tmp_path / "run", *other, code=2))
    batches = flags_of(teacher_run, tmp_path / "batches")
    cache("build", *batches, "--teacher.cache.batch_size=8")
    assert _found(r"cache ([0-9a-f]{32})-16, the present one is \1-8;", train(tmp_path / "run", *batches, code=2))
    # Checkpoints of earlier versions lack the batch size of the build.
    (path,) = tmp_path.glob("run/checkpoints/*/state.json")
    content = json.loads(path.read_text())
    content["state"]["cache"] = content["state"]["cache"].partition("-")[0]
    path.write_text(json.dumps(content))
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
    assert "no cache found in" in cache("info", *flags, f"--teacher.cache.dir={tmp_path}", code=2)
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
    return re.search(pattern, " ".join(text.split())) is not None


def test_outputs_that_differ_by_a_tenth_are_detected():
    live = TeacherOutput(torch.ones(4, 3), {"a": torch.ones(4, 2, 1, 1)})
    wrong = TeacherOutput(torch.ones(4, 3), {"a": torch.full((4, 2, 1, 1), 1.1)})
    assert largest_difference(wrong, live, {}) == ("a", pytest.approx(0.1))
    assert largest_difference(wrong, live, {})[1] > tolerance("float16", "bf16") > tolerance("float32", "float32") > 0
    assert largest_difference(wrong, live, {"a": 10.0}) == ("a", pytest.approx(0.01))
    not_a_number = TeacherOutput(torch.ones(4, 3), {"a": torch.full((4, 2, 1, 1), torch.nan)})
    assert largest_difference(live, not_a_number, {}) == ("a", torch.inf)
