"""Caches with unlabeled samples as a split of their own: contents, requests for less and for other samples, and damage."""

import json
import shutil

import numpy as np
import pytest
import torch

import kd_accel as kd
from kd_accel.cache.manifest import read_samples, read_spec
from kd_accel.cache.spec import spec_to_json
from kd_accel.data.unlabeled import UNLABELED_OFFSET
from kd_accel.errors import UserError
from tests.support.caches import files_of, spec_of
from tests.support.in_process import cache, say, train
from tests.support.launching import SMALL

UNLABELED = ["--data.unlabeled=import:tests.support.models:unlabeled_images", "--data.unlabeled_split=val"]
FEATURE = "--distill.features=mse: {weight: 0.1, layers: [layer1], args: {pca_images: 32}}"


def flags_of(teacher, directory, *flags):
    stored = ["--teacher.outputs=cached", f"--teacher.cache.dir={directory}", "--teacher.min_accuracy=null"]
    return [f"--teacher.run={teacher}", *stored, "--data.views=2", *flags]


@pytest.fixture(scope="module")
def built(tmp_path_factory, teacher_run):
    """(flags, directory) of a cache of labeled and unlabeled samples."""
    directory = tmp_path_factory.mktemp("built") / "cache"
    flags = flags_of(teacher_run, directory, FEATURE)
    cache("build", *flags, *UNLABELED)
    return flags, directory


def test_the_unlabeled_samples_have_a_directory_of_their_own(built):
    _, directory = built
    cache_spec = read_spec(directory)
    assert cache_spec.samples == {"train": 128, "val": 32, "test": 41, "unlabeled": 24}
    names = {str(path.relative_to(directory)) for path in files_of(directory)}
    assert {name for name in names if name.startswith("unlabeled/")} == {
        f"unlabeled/view-000{view}/{tensor}-00000-of-00001.safetensors" for view in (0, 1) for tensor in ("logits", "layer1")
    }
    assert len(names) == cache_spec.num_files() == 2 * 2 * 2 + 2
    assert cache_spec.total_bytes() == (128 + 24) * 2 * cache_spec.sample_bytes() + (32 + 41) * 8
    samples = read_samples(directory, cache_spec)["unlabeled"]
    assert np.array_equal(samples.indices, np.arange(24))
    assert cache_spec.fingerprint_fields["data"]["unlabeled_size"] == 24


def test_info_and_verify_count_them(built):
    flags, directory = built
    assert "128 train, 32 val, 41 test, 24 unlabeled" in cache("info", *flags, *UNLABELED)
    report = json.loads(say("cache", "verify", *SMALL, *flags, *UNLABELED, "--json").splitlines()[-1])
    assert report["is_intact"] and report["files"] == 10


def test_a_training_without_unlabeled_samples_reads_the_same_cache(tmp_path, built):
    flags, directory = built
    train(tmp_path / "run", *flags, "--train.max_steps=2")
    refused = cache("build", *flags, code=2)
    assert "data.unlabeled: not set, but the cache in" in refused and "also holds outputs for such samples" in refused


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["--data.unlabeled_split=test"], "data.unlabeled or data.unlabeled_split: 24 in the cache, 41 now (number of samples"),
        (
            ["--data.unlabeled=import:tests.cache.test_unlabeled_split:inverted"],
            "from other data: data.unlabeled or data.unlabel",
        ),
    ],
)
def test_other_unlabeled_data_is_refused_by_name(tmp_path, built, other, message):
    flags, _ = built
    assert message in train(tmp_path / "run", *flags, *UNLABELED, *other, code=2)
    assert message in cache("build", *flags, *UNLABELED, *other, code=2)


def inverted(split, image_size):
    from tests.support.models import unlabeled_images

    return {"images": 255 - unlabeled_images(split, image_size)["images"]}


def test_a_cache_without_them_is_refused_and_stays_as_it_was(tmp_path, teacher_run):
    flags = flags_of(teacher_run, tmp_path / "cache")
    cache("build", *flags)
    before = files_of(tmp_path / "cache")
    message = "data.unlabeled or data.unlabeled_split: null in the cache, 24 now"
    assert message in train(tmp_path / "run", *flags, *UNLABELED, code=2)
    assert message in cache("build", *flags, *UNLABELED, code=2)
    assert files_of(tmp_path / "cache") == before


def test_a_spec_without_the_split_has_the_same_digests_as_before():
    content = spec_to_json(spec_of())
    assert content["samples"] == {"train": 100, "val": 5, "test": 7} and content["version"] == 2
    assert content["checksum"] == "a5f37a6e6deaf1d829c846256b183d41"


@pytest.mark.parametrize("name", ["logits", "layer1"])
def test_a_damaged_file_of_the_split_is_found_and_rewritten(tmp_path, teacher_run, name):
    flags = flags_of(teacher_run, tmp_path / "cache", FEATURE)
    cache("build", *flags, *UNLABELED)
    path = tmp_path / f"cache/unlabeled/view-0001/{name}-00000-of-00001.safetensors"
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    assert f"{path.name} does not match its checksum" in train(tmp_path / "run", *flags, *UNLABELED, code=2)
    assert f"unlabeled/view-0001/{path.name}: does not match" in cache("verify", *flags, *UNLABELED, code=2)
    path.unlink()
    assert "has missing or damaged files (1 of" in train(tmp_path / "run", *flags, *UNLABELED, code=2)
    cache("build", *flags, *UNLABELED)
    assert path.read_bytes() == intact


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_of_both_splits_are_joined_in_the_order_of_the_batch(tmp_path, teacher_run, dtype):
    """Also with scales, which differ between the files of int8."""
    unlabeled = {"unlabeled": "import:tests.support.models:unlabeled_images", "unlabeled_split": "val"}
    data = kd.ImageDataset("import:tests.support.models:images", image_size=32, **unlabeled)
    views = kd.ViewDataset(data, kd.transforms.CropFlip(32), num_views=2)
    teacher = kd.Teacher.from_run(teacher_run)
    stored = kd.TeacherCache.build(
        tmp_path / "cache", teacher, views, layers=["layer1"], dtype=dtype, batch_size=8, shard_mib=1e-3
    )
    assert len(stored.views(data)) == len(views)
    index = np.array([UNLABELED_OFFSET + 23, 3, UNLABELED_OFFSET, 77, 5])
    for order in (index, index[[0, 2]], index[[1, 3]], index[:0]):
        output = stored.read(order, 1)
        for position, sample in enumerate(order.tolist()):
            split, own = ("unlabeled", sample - UNLABELED_OFFSET) if sample >= UNLABELED_OFFSET else ("train", sample)
            alone = stored.read(np.array([own]), 1, split=split) if split == "unlabeled" else stored.read(np.array([own]), 1)
            assert torch.equal(output.logits[position], alone.logits[0])
            assert torch.equal(output.features["layer1"][position], alone.features["layer1"][0])
        assert output.logits.shape == (len(order), 4)
    with pytest.raises(ValueError, match="index: the cache does not cover all of these samples"):
        stored.read(np.array([3, UNLABELED_OFFSET + 24]), 0)
    with pytest.raises(UserError, match="data.unlabeled or data.unlabeled_split: 24 in the cache, 41 now"):
        other = {**unlabeled, "unlabeled_split": "test"}
        stored.check_data(
            kd.ViewDataset(
                kd.ImageDataset("import:tests.support.models:images", image_size=32, **other),
                kd.transforms.CropFlip(32),
                num_views=2,
            ).module
        )


def test_a_training_without_unlabeled_samples_does_not_read_their_files(built, tmp_path):
    flags, directory = built
    shutil.copytree(directory, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/unlabeled")
    own = [f"--teacher.cache.dir={tmp_path / 'cache'}" if flag.startswith("--teacher.cache.dir") else flag for flag in flags]
    train(tmp_path / "run", *own, "--train.max_steps=2")
    text = train(tmp_path / "other", *own, *UNLABELED, "--train.max_steps=2", code=2)
    assert "unlabeled/view-0000/" in text and "missing" in text
