"""Files that describe a cache: damage is detected and repaired, and another config never overwrites them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from kd_accel.cache.manifest import (
    CachedSamples,
    read_samples,
    read_spec,
    read_targets,
    write_samples,
    write_spec,
    write_targets,
)
from kd_accel.cache.spec import SPLITS
from kd_accel.errors import UserError
from kd_accel.io.hashing import tensors_digest
from kd_accel.losses.targets import PCA
from tests.support.caches import FEATURE, files_of, flags_of, spec_of
from tests.support.in_process import cache, train

ONE_LAYER = FEATURE.replace("layer1, layer2", "layer2")


@pytest.fixture(scope="module")
def built(tmp_path_factory, teacher_run):
    """A cache that no test changes."""
    directory = tmp_path_factory.mktemp("caches") / "cache"
    cache("build", *flags_of(teacher_run, directory))
    return directory


@pytest.fixture
def copied(built, tmp_path, teacher_run):
    shutil.copytree(built, tmp_path / "cache")
    return flags_of(teacher_run, tmp_path / "cache"), tmp_path / "cache"


def flipped_bits(path):
    """Write the file once for each of its bytes, with one bit of the byte flipped, and restore it at the end."""
    intact = path.read_bytes()
    for place in range(len(intact)):
        data = bytearray(intact)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        yield place
    path.write_bytes(intact)


def records(directory):
    """Write spec, samples and targets that agree."""
    samples = {split: CachedSamples(np.arange(2, dtype=np.int64), np.arange(2, dtype=np.uint64)) for split in SPLITS}
    target = PCA(2, images=64)
    target.load({"conv.weight": torch.randn(2, 3, 1, 1), "conv.bias": torch.randn(2)})
    drawn = spec_of(samples=2, views=1)
    digest = tensors_digest(target.tensors())
    mapped = replace(drawn.tensors["layer1"], target=target.description(), target_digest=digest, explained=0.5)
    cache_spec = replace(
        drawn,
        fingerprint_fields={"data": {"contents": {split: cached.digest for split, cached in samples.items()}}},
        samples=dict.fromkeys(SPLITS, 2),
        tensors={**drawn.tensors, "layer1": mapped},
    )
    write_samples(directory, samples)
    write_targets(directory, {"layer1": target})
    write_spec(directory, cache_spec)
    return cache_spec


def test_every_flipped_bit_of_a_spec_is_detected(tmp_path):
    cache_spec = records(tmp_path)
    survived = 0
    for _ in flipped_bits(tmp_path / "spec.json"):
        try:
            assert read_spec(tmp_path) == cache_spec
            survived += 1
        except UserError:
            pass
    assert survived < 10  # flips of one kind of white space to another
    assert read_spec(tmp_path) == cache_spec


@pytest.mark.parametrize(("name", "read"), [("samples.safetensors", read_samples), ("targets.safetensors", read_targets)])
def test_every_flipped_bit_of_samples_and_targets_is_detected(tmp_path, name, read):
    cache_spec = records(tmp_path)
    read(tmp_path, cache_spec)
    for place in flipped_bits(tmp_path / name):
        try:
            read(tmp_path, cache_spec)
        except UserError:
            continue
        raise AssertionError(f"a bit of byte {place} of {name} makes no difference")
    read(tmp_path, cache_spec)


@pytest.mark.parametrize(
    "changed",
    [{"views": 1}, {"batch_samples": 17}, {"samples_per_shard": 64}, {"samples": {"train": 129, "val": 32, "test": 41}}],
)
def test_a_changed_spec_is_named_and_repaired(built, copied, tmp_path, changed):
    flags, directory = copied
    content = json.loads((directory / "spec.json").read_text())
    assert content["views"] == 2 and content["samples"]["train"] == 128
    (directory / "spec.json").write_text(json.dumps({**content, **changed}))
    before = files_of(directory)
    for text in (cache("verify", *flags, code=2), train(tmp_path / "run", *flags, code=2)):
        assert "spec.json: is damaged: run `kd-accel cache build`" in text
    cache("build", *flags)
    assert files_of(directory) == before
    assert read_spec(directory).batch_samples == 16
    cache("verify", *flags)


@pytest.mark.parametrize("other", ["--data.view_seed=3", "--data.limit_train=64"])
@pytest.mark.parametrize("cache_spec", [None, "{"])
def test_a_cache_without_its_spec_is_not_overwritten_by_another_config(copied, cache_spec, other):
    flags, directory = copied
    (directory / "spec.json").unlink()
    if cache_spec is not None:
        (directory / "spec.json").write_text(cache_spec)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.*")}
    text = cache("build", *flags, other, code=2)
    assert "manifest.json next to it belongs to the cache of another config" in text
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*.*")} == before
    cache("build", *flags)


@pytest.mark.parametrize("is_shard_missing", [False, True])
def test_missing_targets_are_fitted_again_by_a_config_that_has_all_layers(built, copied, teacher_run, is_shard_missing):
    flags, directory = copied
    (directory / "targets.safetensors").unlink()
    if is_shard_missing:
        next(directory.glob("train/view-0000/layer1-*")).unlink()
    text = cache("build", *flags_of(teacher_run, directory, ONE_LAYER), code=2)
    assert "distill.features of this config lacks some of its layers (layer1)" in text
    assert not (directory / "targets.safetensors").exists()
    cache("build", *flags)
    cache("verify", *flags_of(teacher_run, directory, ONE_LAYER))
    bytes_of = {path.relative_to(directory): content for path, (_, content) in files_of(directory).items()}
    assert bytes_of == {path.relative_to(built): content for path, (_, content) in files_of(built).items()}


def test_a_missing_manifest_is_written_again(built, copied):
    flags, directory = copied
    (directory / "manifest.json").unlink()
    assert "complete, 8 files checked; manifest.json written again" in cache("build", *flags)
    assert (directory / "manifest.json").read_bytes() == (built / "manifest.json").read_bytes()
    assert "complete, 8 files checked; nothing to do" in cache("build", *flags)
