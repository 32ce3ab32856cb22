"""What describes a cache (its plan, rows and projectors) is whole or refused, and never replaced by another config's."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from kd_accel.teacher.identity import tensors_digest
from kd_accel.teacher.store.layout import SPLITS
from kd_accel.teacher.store.manifest import (
    CachedRows,
    read_plan,
    read_projectors,
    read_rows,
    write_plan,
    write_projectors,
    write_rows,
)
from kd_accel.types import UserError
from tests.in_process import cache, train
from tests.test_cache_identity import FEATURE, asking, files_of
from tests.test_store import plan_of

ONE_TAP = FEATURE.replace("layer1, layer2", "layer2")


@pytest.fixture(scope="module")
def built(tmp_path_factory, teacher_run):
    """A cache that no test here changes."""
    directory = tmp_path_factory.mktemp("caches") / "cache"
    cache("build", *asking(teacher_run, directory))
    return directory


@pytest.fixture
def copied(built, tmp_path, teacher_run):
    shutil.copytree(built, tmp_path / "cache")
    return asking(teacher_run, tmp_path / "cache"), tmp_path / "cache"


def flipped_bits(path):
    """The file once for each of its bytes, with one bit of it flipped."""
    whole = path.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        yield place
    path.write_bytes(whole)


def records(directory):
    """A plan, rows and projectors that agree, on the disk."""
    rows = {split: CachedRows(np.arange(2, dtype=np.int64), np.arange(2, dtype=np.uint64)) for split in SPLITS}
    projectors = {"layer1": {"conv.weight": torch.randn(2, 3, 1, 1), "conv.bias": torch.randn(2)}}
    drawn = plan_of(rows=2, views=1)
    projected = replace(drawn.tensors["layer1"], projector=tensors_digest(projectors["layer1"]))
    plan = replace(
        drawn,
        identity={"data": {"contents": {split: cached.digest for split, cached in rows.items()}}},
        rows=dict.fromkeys(SPLITS, 2),
        tensors={**drawn.tensors, "layer1": projected},
    )
    write_rows(directory, rows)
    write_projectors(directory, projectors)
    write_plan(directory, plan)
    return plan


def test_every_flipped_bit_of_a_plan_is_noticed(tmp_path):
    plan = records(tmp_path)
    survived = 0
    for _ in flipped_bits(tmp_path / "plan.json"):
        try:
            assert read_plan(tmp_path) == plan
            survived += 1
        except UserError:
            pass
    assert survived < 10  # a blank that became another, and the version of an earlier program
    assert read_plan(tmp_path) == plan


@pytest.mark.parametrize(("name", "read"), [("rows.safetensors", read_rows), ("projectors.safetensors", read_projectors)])
def test_every_flipped_bit_of_rows_and_projectors_is_noticed(tmp_path, name, read):
    plan = records(tmp_path)
    read(tmp_path, plan)
    for place in flipped_bits(tmp_path / name):
        try:
            read(tmp_path, plan)
        except UserError:
            continue
        raise AssertionError(f"a bit of byte {place} of {name} makes no difference")
    read(tmp_path, plan)


@pytest.mark.parametrize(
    "changed", [{"views": 1}, {"batch_rows": 17}, {"rows_per_shard": 64}, {"rows": {"train": 129, "val": 32, "test": 41}}]
)
def test_a_changed_plan_is_named_and_mended(built, copied, tmp_path, changed):
    flags, directory = copied
    content = json.loads((directory / "plan.json").read_text())
    assert content["views"] == 2 and content["rows"]["train"] == 128
    (directory / "plan.json").write_text(json.dumps({**content, **changed}))
    before = files_of(directory)
    for text in (cache("verify", *flags, code=2), train(tmp_path / "run", *flags, code=2)):
        assert "plan.json: is damaged: run `kd-accel cache build`" in text
    cache("build", *flags)
    assert files_of(directory) == before
    assert read_plan(directory).batch_rows == 16
    cache("verify", *flags)


@pytest.mark.parametrize("other", ["--data.view_seed=3", "--data.limit_train=64"])
@pytest.mark.parametrize("plan", [None, "{"])
def test_a_cache_without_its_plan_is_not_overwritten_by_another_config(copied, plan, other):
    flags, directory = copied
    (directory / "plan.json").unlink()
    if plan is not None:
        (directory / "plan.json").write_text(plan)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.*")}
    text = cache("build", *flags, other, code=2)
    assert "manifest.json beside it belongs to a cache of something else" in text
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*.*")} == before
    cache("build", *flags)


@pytest.mark.parametrize("is_file_lost", [False, True])
def test_lost_projectors_are_fitted_again_by_a_config_that_has_all_of_them(built, copied, teacher_run, is_file_lost):
    flags, directory = copied
    (directory / "projectors.safetensors").unlink()
    if is_file_lost:
        next(directory.glob("train/view-0000/layer1-*")).unlink()
    text = cache("build", *asking(teacher_run, directory, ONE_TAP), code=2)
    assert "does not ask for all that it held (layer1)" in text
    assert not (directory / "projectors.safetensors").exists()
    cache("build", *flags)
    cache("verify", *asking(teacher_run, directory, ONE_TAP))
    bytes_of = {path.relative_to(directory): content for path, (_, content) in files_of(directory).items()}
    assert bytes_of == {path.relative_to(built): content for path, (_, content) in files_of(built).items()}


def test_a_lost_manifest_is_written_again(built, copied):
    flags, directory = copied
    (directory / "manifest.json").unlink()
    assert "complete, 8 files checked; manifest.json written" in cache("build", *flags)
    assert (directory / "manifest.json").read_bytes() == (built / "manifest.json").read_bytes()
    assert "complete, 8 files checked; nothing to do" in cache("build", *flags)
