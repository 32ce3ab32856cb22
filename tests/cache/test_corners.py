"""Unusual caches: file sizes, layers, outliers, symbolic links, and a config that requests more than a cache holds."""

import json
import shutil

import pytest

from kd_accel.cache.verify import tolerance
from tests.support.caches import FEATURE, RAW, files_of, flags_of
from tests.support.in_process import cache, train
from tests.support.launching import losses, metrics

CACHED = "--teacher.outputs=cached"


@pytest.fixture(scope="module")
def plain_teacher_run(tmp_path_factory):
    """Train a teacher without BatchNorm."""
    run_dir = tmp_path_factory.mktemp("teachers") / "plain"
    train(run_dir, "--role=teacher", "--model.arch=import:tests.support.models:wide_student", "--train.max_steps=8")
    return run_dir


@pytest.mark.parametrize(
    ("teacher", "case"),
    [
        ("teacher_run", [FEATURE, "--data.val_fraction=0", "--data.limit_test=1"]),
        ("teacher_run", [FEATURE.replace("layer1, layer2", "layer1.0, layer2.0")]),
        ("teacher_run", [FEATURE.replace("[layer1, layer2]", "{layer1: layer1.0, layer2: layer2.1}")]),
        ("teacher_run", [RAW.replace("[layer1, layer2]", "{layer1: layer2, layer2: layer1}")]),
        ("teacher_run", [RAW.replace("[layer1, layer2]", "{layer1: layer2, layer2: layer2}")]),
        ("teacher_run", [FEATURE.replace("[layer1, layer2]", "{layer1.0: layer2, layer1: layer2}")]),
        ("plain_teacher_run", [FEATURE]),
    ],
)
def test_cached_equals_live(tmp_path, request, teacher, case):
    common = [
        f"--teacher.run={request.getfixturevalue(teacher)}",
        "--data.views=2",
        "--train.max_steps=12",
        *case,
    ]
    use = [*common, CACHED, f"--teacher.cache.dir={tmp_path / 'cache'}", "--teacher.cache.dtype=float32"]
    train(tmp_path / "live", *common)
    cache("build", *use)
    cache("verify", *use)
    train(tmp_path / "cached", *use)
    assert metrics(tmp_path / "cached") == metrics(tmp_path / "live")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cached", "live")]
    assert weights[0] == weights[1]


def test_file_and_batch_sizes_do_not_change_what_is_learned(tmp_path, teacher_run):
    """The sizes are one sample, the usual size, and a teacher's batch that is larger than any split."""
    few = ["--data.limit_train=32", "--data.limit_test=5", FEATURE.replace("64", "32")]
    found = []
    for batch_samples, files in ((1, 2 * 32 * 3 + 8 + 5), (16, 8), (1000, 8)):
        directory = tmp_path / f"cache{batch_samples}"
        flags = [*flags_of(teacher_run, directory), *few, f"--teacher.cache.batch_size={batch_samples}"]
        tiny = ["--teacher.cache.shard_mib=0.0000001"] if batch_samples == 1 else []
        cache("build", *flags, *tiny)
        assert len(files_of(directory)) == files
        train(tmp_path / f"run{batch_samples}", *flags)
        found.append(losses(tmp_path / f"run{batch_samples}"))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[2] == pytest.approx(found[1], rel=1e-4)


def test_verify_names_what_the_cache_lacks(tmp_path, teacher_run):
    flags = flags_of(teacher_run, tmp_path / "cache", FEATURE.replace("layer1, layer2", "layer2"))
    cache("build", *flags)
    both = flags_of(teacher_run, tmp_path / "cache")
    lacks_layer = "lacks the features of layer1 (distill.features.mse.layers)"
    assert f"{lacks_layer}. Run" in cache("verify", *both, code=2)
    lacks_views = "views 2 to 3 (data.views: 2 in the cache, 4 needed). Run"
    four = ["--data.views=4", "--train.epochs=5"]
    assert f"lacks {lacks_views}" in cache("verify", *flags, *four, code=2)
    assert f"{lacks_layer} and {lacks_views}" in cache("verify", *both, *four, code=2)
    cache("verify", *flags, "--data.views=4", "--train.epochs=2")


def test_missing_validation_samples_are_named(tmp_path, teacher_run):
    flags = flags_of(teacher_run, tmp_path / "cache")
    cache("build", *flags, "--data.val_fraction=0")
    text = " ".join(train(tmp_path / "run", *flags, code=2).split())
    assert "lacks 32 of 32 validation samples" in text and "with another data.limit_train or data.val_fraction" in text


def test_a_damaged_file_of_a_later_view_is_named_before_the_first_step(tmp_path, teacher_run):
    """The view is neither the first nor the last, which are read at the start in any case."""
    flags = [*flags_of(teacher_run, tmp_path / "cache"), "--data.views=3"]
    cache("build", *flags)
    file = next((tmp_path / "cache").glob("train/view-0001/layer2-*"))
    file.write_bytes(file.read_bytes()[:-1])
    text = train(tmp_path / "run", *flags, code=2)
    assert "has missing or damaged files (1 of 11): train/view-0001/layer2-00000-of-00001.safetensors has " in text
    assert not (tmp_path / "run/checkpoints").exists()


def test_an_outlier_makes_int8_coarser_and_passes_the_comparison_with_the_teacher(tmp_path, teacher_run):
    flags = [
        *flags_of(teacher_run, tmp_path / "cache"),
        "--data.source=import:tests.support.models:images_with_an_outlier",
        "--teacher.min_accuracy=null",
    ]
    int8 = [*flags, "--teacher.cache.dtype=int8"]
    cache("build", *int8)
    report = json.loads(cache("verify", *int8, "--json"))
    assert report["is_intact"]
    assert 0 < report["largest_difference"] < tolerance("int8", "float32")
    train(tmp_path / "run", *int8, "--train.max_steps=1")
    assert (tmp_path / "run/summary.json").is_file()


def test_a_teacher_layer_named_logits_cannot_be_cached(tmp_path, teacher_run):
    arch = "--model.arch=import:tests.support.models:named_logits"
    train(tmp_path / "teacher", "--role=teacher", arch, "--train.max_steps=4")
    teacher_layer = FEATURE.replace("[layer1, layer2]", "{layer1: layer1, layer2: logits}")
    flags = flags_of(tmp_path / "teacher", tmp_path / "cache", teacher_layer.replace("both", "student_to_teacher"))
    flags = [flag.replace(", pca_images: 64", "") for flag in flags]
    for text in (cache("build", *flags, code=2), train(tmp_path / "run", *flags, code=2)):
        assert "distill.features: the teacher's layer logits cannot be cached" in text
    only_logits = [*flags, "--teacher.outputs=mixed"]
    cache("build", *only_logits)
    train(tmp_path / "run", *only_logits, "--train.max_steps=1")
    student_layer = FEATURE.replace("[layer1, layer2]", "{layer1: layer1, logits: layer2}")
    flags = [*flags_of(teacher_run, tmp_path / "other", student_layer), arch]
    cache("build", *flags)
    train(tmp_path / "student", *flags, "--train.max_steps=1")


def test_a_cache_may_be_behind_links_but_a_build_never_writes_through_a_link_to_a_file(tmp_path, teacher_run):
    flags = flags_of(teacher_run, tmp_path / "link")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    cache("build", *flags)
    shutil.move(tmp_path / "elsewhere/train/view-0001", tmp_path / "other_disk")
    (tmp_path / "elsewhere/train/view-0001").symlink_to(tmp_path / "other_disk")
    file = next((tmp_path / "elsewhere").glob("train/view-0000/layer1-*"))
    file.rename(tmp_path / "precious")
    file.symlink_to(tmp_path / "precious")
    cache("verify", *flags)
    train(tmp_path / "run", *flags, "--train.epochs=2")
    (tmp_path / "precious").write_text("something else")
    assert "1 of 8 files to write" in cache("build", *flags)
    assert (tmp_path / "precious").read_text() == "something else"
    assert not file.is_symlink()
    cache("verify", *flags)
