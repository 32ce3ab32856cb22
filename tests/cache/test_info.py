"""Description of a cache by `kd-accel cache info`: missing files and files of another size, found without reading them."""

import json
import shutil
from pathlib import Path

import pytest

from kd_accel.cache.info import cache_info
from tests.support.caches import files_of, flags_of, flip_bit
from tests.support.in_process import cache

SHARDS = [
    "train/view-0000/logits-00000-of-00001.safetensors",
    "train/view-0001/layer1-00000-of-00001.safetensors",
    "test/view-0000/logits-00000-of-00001.safetensors",
]
REMEDY = "run `kd-accel cache build` with the same config, which writes only what is missing or damaged"


@pytest.fixture(scope="module")
def built(tmp_path_factory, teacher_run):
    """A cache that no test changes."""
    directory = tmp_path_factory.mktemp("caches") / "cache"
    cache("build", *flags_of(teacher_run, directory))
    return directory


@pytest.fixture
def copied(built, tmp_path, teacher_run):
    """Return (flags, directory) of a copy."""
    shutil.copytree(built, tmp_path / "cache")
    return flags_of(teacher_run, tmp_path / "cache"), tmp_path / "cache"


def described(flags):
    """Return (fields of `--json`, text) of `cache info`, which exits with 0 for any cache that can be described."""
    return json.loads(cache("info", *flags, "--json")), cache("info", *flags)


def shards_of(directory):
    return {path.relative_to(directory): content for path, (_, content) in files_of(directory).items()}


def check_repaired(flags, directory, built):
    """Check that the command that `info` names repairs the cache."""
    cache("build", *flags)
    about, text = described(flags)
    assert about["is_complete"] and ": complete, 8 files" in text
    assert shards_of(directory) == shards_of(built)


def test_an_intact_cache_is_complete(copied):
    flags, _ = copied
    about, text = described(flags)
    assert about["is_complete"]
    assert (about["missing_files"], about["wrong_size_files"], about["unlisted_files"]) == ([], {}, [])
    assert ": complete, 8 files" in text.splitlines()[0]
    assert "missing" not in text and "cache build" not in text
    assert "data transform={random_crop: {padding: 4}, random_horizontal_flip: {p: 0.5}}, image_size=32, view_seed=0" in text


@pytest.mark.parametrize("names", [SHARDS[:1], SHARDS])
def test_missing_shards_are_named_with_the_remedy(copied, built, names):
    flags, directory = copied
    for name in names:
        (directory / name).unlink()
    about, text = described(flags)
    assert not about["is_complete"] and sorted(about["missing_files"]) == sorted(names)
    assert (about["wrong_size_files"], about["unlisted_files"]) == ({}, [])
    lines = text.splitlines()
    assert ": not complete, 8 files" in lines[0]
    assert lines[1].startswith(f"{len(names)} file{'s' if len(names) > 1 else ''} missing: ")
    assert all(name in lines[1] for name in names)
    assert lines[2] == REMEDY
    check_repaired(flags, directory, built)


def test_shards_of_another_size_are_named_with_both_sizes(copied, built):
    flags, directory = copied
    sizes = {}
    for name, change in zip(SHARDS, (lambda data: data[:-3], lambda data: data + b"\0", lambda data: b""), strict=True):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(change(content))
        sizes[name] = f"has {len(change(content))} bytes instead of {len(content)}"
    about, text = described(flags)
    assert not about["is_complete"] and about["missing_files"] == []
    assert about["wrong_size_files"] == sizes
    lines = text.splitlines()
    assert lines[1].startswith("3 files of another size: ")
    assert all(f"{name} {size}" in lines[1] for name, size in sizes.items())
    assert lines[2] == REMEDY
    check_repaired(flags, directory, built)


def test_only_the_first_missing_files_are_listed_in_the_text(copied, built):
    flags, directory = copied
    names = sorted(str(name) for name in shards_of(directory))
    shutil.rmtree(directory / "train")
    shutil.rmtree(directory / "test")
    shutil.rmtree(directory / "val")
    about, text = described(flags)
    assert sorted(about["missing_files"]) == names and len(names) == 8
    assert "8 files missing: " in text and text.count(".safetensors") == 5 and ", ...\n" in text
    check_repaired(flags, directory, built)


@pytest.mark.parametrize("name", ["samples.safetensors", "targets.safetensors"])
def test_missing_samples_and_targets_are_named(copied, built, name):
    flags, directory = copied
    (directory / name).unlink()
    about, text = described(flags)
    assert about["missing_files"] == [name] and f"1 file missing: {name}" in text
    check_repaired(flags, directory, built)


def test_a_cache_whose_build_has_not_finished_is_not_complete(copied, built):
    flags, directory = copied
    (directory / "manifest.json").unlink()
    about, text = described(flags)
    assert not about["is_complete"] and about["missing_files"] == []
    assert len(about["unlisted_files"]) == 8
    assert "8 files not listed in manifest.json, which a build writes last" in text and REMEDY in text
    check_repaired(flags, directory, built)


def test_a_directory_in_place_of_a_shard_is_named(copied):
    flags, directory = copied
    (directory / SHARDS[0]).unlink()
    (directory / SHARDS[0]).mkdir()
    about, text = described(flags)
    assert about["wrong_size_files"] == {SHARDS[0]: "is not a regular file"}
    assert f"{SHARDS[0]} is not a regular file" in text


def test_no_shard_is_opened(copied, monkeypatch):
    """Contents are for `cache verify`: a flipped bit keeps the size, and no byte of a shard is read."""
    flags, directory = copied
    flip_bit(directory / SHARDS[1])
    opened, open_path = [], Path.open

    def recording(path, *arguments, **options):
        opened.append(path.name)
        return open_path(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", recording)
    about = cache_info(directory)
    assert about["is_complete"] and set(opened) == {"spec.json", "manifest.json"}
    monkeypatch.undo()
    assert f"{SHARDS[1]}: does not match its checksum" in cache("verify", *flags, code=2)
