"""Reader of a cache: the block of memory that holds the samples of a batch, and the files that stay open."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kd_accel.cache import reader as reader_module
from kd_accel.cache.reader import CachedTeacher, Reader
from kd_accel.cache.shard import decode, open_shard
from kd_accel.cache.spec import TensorSpec
from kd_accel.cache.view_files import PositionTable
from tests.support.caches import PCA, spec_of, store

CPU = torch.device("cpu")
LAYERS = ("layer1", "layer2", "layer3")


def mixed_spec(dtype):
    """Return a spec whose tensors differ in storage type, and in size: 64 bytes do not divide that of three samples."""
    cache_spec = spec_of(dtype)
    more = {
        "layer2": TensorSpec((5, 3, 3), "int8", PCA | {"channels": 5}, target_digest="q" * 32, raw_channels=24),
        "layer3": TensorSpec((3, 1, 1), "float32", PCA | {"channels": 3}, target_digest="r" * 32, raw_channels=24),
    }
    return replace(cache_spec, tensors={**cache_spec.tensors, **more})


def open_reader(directory, cache_spec):
    return Reader(directory, cache_spec, "train", np.arange(100), list(cache_spec.tensors))


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("samples", [0, 1, 3, 64])
def test_tensors_of_all_types_share_a_block(tmp_path, dtype, samples):
    cache_spec = mixed_spec(dtype)
    stored = store(tmp_path, cache_spec)
    positions = np.random.default_rng(0).integers(0, 100, samples)
    found = open_reader(tmp_path, cache_spec).read(1, positions)
    for name, spec in cache_spec.tensors.items():
        assert found[name].values.shape == (samples, *spec.shape)
        assert (found[name].scale is not None) == spec.is_scaled
        expected = stored["train", 1, name][torch.from_numpy(positions)]
        assert torch.equal(decode(found[name].values, found[name].scale), expected)
    assert len({samples.values.untyped_storage().data_ptr() for samples in found.values()}) == 1


def test_int8_tensors_in_different_files_have_their_own_scales(tmp_path):
    cache_spec = mixed_spec("int8")
    store(tmp_path, cache_spec)
    reader = open_reader(tmp_path, cache_spec)
    found = reader.read(0, np.array([99, 0, 98, 33]))
    for name, channels in (("layer1", 6), ("layer2", 5)):
        scale = found[name].scale
        assert scale.shape == (4, channels)
        assert torch.equal(scale[0], scale[2])
        assert len(scale.unique(dim=0)) == 3


def test_positions_of_few_samples_with_large_indices_need_no_large_table():
    """Indices that a file of a cache claims must not decide how much memory is used."""
    dense, far = PositionTable(np.array([1, 4, 6]), first_position=10), np.array([1, 4, 10**12])
    sparse = PositionTable(far, first_index=2**40, first_position=10)
    assert dense.look_up(np.array([-5, 0, 1, 4, 5, 6, 7, 99])).tolist() == [-1, -1, 10, 11, -1, 12, -1, -1]
    asked = 2**40 + np.array([-5, 0, 1, 4, 5, 10**12 - 1, 10**12, 10**12 + 1])
    assert sparse.look_up(asked).tolist() == [-1, -1, 10, 11, -1, -1, 12, -1]
    assert sparse.look_up(np.array([1, 4])).tolist() == [-1, -1]


@pytest.mark.parametrize(("most_files", "openings"), [(32, [0, 1]), (31, [0, 1, 0, 1])])
def test_views_stay_open_up_to_a_number_of_files(tmp_path, monkeypatch, most_files, openings):
    cache_spec = mixed_spec("float16")
    stored = store(tmp_path, cache_spec)
    opened = []
    monkeypatch.setattr(reader_module, "_MAX_FILES", most_files)
    monkeypatch.setattr(reader_module, "open_shard", lambda *place: opened.append(place[2]) or open_shard(*place))
    reader = open_reader(tmp_path, cache_spec)
    for view in (0, 1, 1, 0, 1):
        assert torch.equal(reader.read(view, np.arange(100))["layer3"].values, stored["train", view, "layer3"])
    assert [shard.view for shard in opened if shard.tensor == "logits" and shard.number == 0] == openings
    assert len(opened) == 16 * len(openings)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_outputs_on_a_cpu_are_aligned_as_those_of_a_live_teacher(tmp_path, dtype):
    """A matrix product may have other last bits if its input is aligned otherwise."""
    cache_spec = mixed_spec(dtype)
    store(tmp_path, cache_spec)
    teacher = CachedTeacher(open_reader(tmp_path, cache_spec), LAYERS, channels_last=False)
    output = teacher.read(np.arange(64), 0, CPU)
    for values in (output.logits, *output.features.values()):
        assert values.data_ptr() % 64 == 0
