"""Views of a cache in the memory of a device, and the two stages of a cached teacher. The device is the CPU."""

import copy
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from kd_accel.cache import reader as reader_module
from kd_accel.cache.manifest import CachedSamples
from kd_accel.cache.reader import CachedTeacher, OpenCache, Reader, decode_on
from kd_accel.cache.rows import RowFormat
from kd_accel.cache.shard import decode
from kd_accel.cache.spec import TensorSpec
from kd_accel.data.unlabeled import UNLABELED_OFFSET
from kd_accel.errors import UserError
from kd_accel.types import Batch, StagedTeacher
from tests.cache.test_reader import LAYERS, mixed_spec
from tests.support.caches import flip_bit, store

CPU = torch.device("cpu")
TYPES = ["float32", "float16", "bfloat16", "int8"]
ROW_BYTES = 144
"""10 logits and 24 values in float16, 45 in int8, 3 in float32, and the number of the file: 133 bytes, padded to 16."""


def spec(dtype="float16"):
    """Return a spec of tensors in three types, whose last labeled and last unlabeled files are short."""
    cache_spec = mixed_spec(dtype)
    return replace(cache_spec, samples={**cache_spec.samples, "unlabeled": 40}, views=3)


def always(needed_bytes, device):
    return True


def reader_of(directory, cache_spec, keeps=None, *, unlabeled=None):
    names = list(cache_spec.tensors)
    return Reader(directory, cache_spec, "train", np.arange(100), names, unlabeled=unlabeled, keeps=keeps)


def teacher_of(*place, channels_last=False, **options):
    return CachedTeacher(reader_of(*place, **options), LAYERS, channels_last=channels_last)


def batch_of(indices, view):
    images = torch.zeros(len(indices), 3, 2, 2, dtype=torch.uint8)
    return Batch(images, torch.zeros(len(indices), dtype=torch.int64), torch.as_tensor(indices), view)


def tensors_of(output):
    return {"logits": output.logits, **output.features}


def assert_same(output, expected):
    found, wanted = tensors_of(output), tensors_of(expected)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(found[name], values) and found[name].stride() == values.stride(), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_kept_view_has_the_rows_of_its_files(tmp_path, dtype, channels_last):
    cache_spec = spec(dtype)
    stored = store(tmp_path, cache_spec)
    from_files, kept = (teacher_of(tmp_path, cache_spec, keeps, channels_last=channels_last) for keeps in (None, always))
    generator = np.random.default_rng(0)
    for view in (0, 2, 1, 0):
        batch = batch_of(np.append(generator.integers(0, 100, 37), [0, 31, 32, 99]), view)
        fetched, expected = kept.fetch(batch), from_files.fetch(batch)
        assert len(fetched) == len(expected) == 2
        assert all(map(torch.equal, fetched, expected))
        output = kept(batch)
        assert_same(output, from_files(batch))
        for name, values in tensors_of(output).items():
            assert torch.equal(values, stored["train", view, name][batch.index])


@pytest.mark.parametrize("samples", [0, 1])
def test_batches_without_samples_and_with_one_have_their_shapes(tmp_path, samples):
    cache_spec = spec()
    store(tmp_path, cache_spec)
    for keeps in (None, always):
        output = teacher_of(tmp_path, cache_spec, keeps)(batch_of(np.arange(samples), 1))
        assert {name: values.shape for name, values in tensors_of(output).items()} == {
            name: (samples, *tensor.shape) for name, tensor in cache_spec.tensors.items()
        }


def test_a_kept_view_needs_no_file(tmp_path):
    cache_spec = spec("int8")
    store(tmp_path / "cache", cache_spec)
    teacher, batches = teacher_of(tmp_path / "cache", cache_spec, always), [batch_of([99, 3], view) for view in (0, 1)]
    expected = [teacher(batch) for batch in batches]
    shutil.rmtree(tmp_path / "cache")
    for batch, output in zip(batches, expected, strict=True):
        assert_same(teacher(batch), output)
    with pytest.raises(UserError, match=r"view-0002/.* is missing"):
        teacher(batch_of([99, 3], 2))


def test_views_that_do_not_fit_are_read_from_their_files(tmp_path, monkeypatch):
    cache_spec = spec()
    stored = store(tmp_path, cache_spec)
    asked, loaded = [], []
    original = reader_module.DeviceView
    monkeypatch.setattr(reader_module, "DeviceView", lambda files: loaded.append(files) or original(files))

    def first_two(needed_bytes, device):
        asked.append((needed_bytes, device))
        return len(loaded) < 2

    teacher = teacher_of(tmp_path, cache_spec, first_two)
    for view in (0, 1, 2, 0, 1, 2):
        output = teacher.read(np.arange(100), view, CPU)
        for name, values in tensors_of(output).items():
            assert torch.equal(values, stored["train", view, name])
    assert asked == [(100 * ROW_BYTES, CPU)] * 3
    assert len(loaded) == 2


def test_closing_files_of_other_views_keeps_the_views_on_the_device(tmp_path, monkeypatch):
    cache_spec = spec()
    store(tmp_path / "cache", cache_spec)
    monkeypatch.setattr(reader_module, "_MAX_FILES", 1)
    kept = iter([True, False, False])
    teacher = teacher_of(tmp_path / "cache", cache_spec, lambda needed_bytes, device: next(kept))
    expected, *_ = [teacher.read(np.arange(9), view, CPU) for view in (0, 1, 2)]
    shutil.rmtree(tmp_path / "cache")
    assert_same(teacher.read(np.arange(9), 0, CPU), expected)


@pytest.mark.parametrize("keeps", [None, always])
@pytest.mark.parametrize("dtype", TYPES)
def test_labeled_and_unlabeled_samples_are_read_in_the_order_of_a_batch(tmp_path, dtype, keeps):
    """The last labeled file is short, and each int8 file has scales of its own."""
    cache_spec = spec(dtype)
    stored = store(tmp_path, cache_spec)
    own = np.arange(40) * 2 + 5
    indices = np.concatenate([np.arange(100), UNLABELED_OFFSET + own])
    reader = reader_of(tmp_path, cache_spec, keeps, unlabeled=own)
    order = np.random.default_rng(1).permutation(140)
    for view in (1, 0):
        for name, samples in reader.read(view, indices[order]).items():
            expected = torch.cat([stored["train", view, name], stored["unlabeled", view, name]])[torch.from_numpy(order)]
            assert torch.equal(decode(samples.values, samples.scale), expected)


@pytest.mark.parametrize("outside", [-1, 100, UNLABELED_OFFSET - 1, UNLABELED_OFFSET, UNLABELED_OFFSET + 45])
def test_samples_outside_of_both_splits_are_never_read(tmp_path, outside):
    cache_spec = spec()
    store(tmp_path, cache_spec)
    reader = reader_of(tmp_path, cache_spec, always, unlabeled=np.arange(40) + 5)
    inside = np.array([0, 99, UNLABELED_OFFSET + 5, UNLABELED_OFFSET + 44])
    assert reader.covers(inside) and reader.covers(inside[:0])
    assert not reader.covers(np.append(inside, outside))
    with pytest.raises(AssertionError):
        reader.read(0, np.append(inside, outside))


@pytest.mark.parametrize("dtype", TYPES)
def test_the_second_stage_depends_on_the_fetched_tensors_alone(tmp_path, dtype):
    """The tensors are copied into the same memory for all batches, as for the replay of a graph."""
    cache_spec = spec(dtype)
    store(tmp_path, cache_spec)
    teacher = teacher_of(tmp_path, cache_spec, lambda needed_bytes, device: bool(kept) and kept.pop())
    kept = [True, False, True]
    assert isinstance(teacher, StagedTeacher)
    batches = [batch_of(np.random.default_rng(view).permutation(100)[:8], view) for view in (0, 1, 2, 0)]
    static = [tensor.clone() for tensor in teacher.fetch(batches[0])]
    without_index = replace(batches[0], index=torch.full((8,), -1), view=-1)
    for batch in batches:
        for memory, tensor in zip(static, teacher.fetch(batch), strict=True):
            assert (memory.shape, memory.dtype) == (tensor.shape, tensor.dtype)
            memory.copy_(tensor)
        assert_same(teacher.finish(without_index, tuple(static)), teacher(batch))


def test_a_damaged_file_is_found_before_its_view_is_kept(tmp_path):
    cache_spec = spec()
    store(tmp_path, cache_spec)
    shard = cache_spec.shards("train", 1, "layer1")[2]
    flip_bit(tmp_path / shard.name)
    teacher = teacher_of(tmp_path, cache_spec, always)
    teacher.read(np.arange(3), 0, CPU)
    with pytest.raises(UserError, match=r"view-0001/layer1-00002-of-00004.* does not match its checksum"):
        teacher.read(np.arange(3), 1, CPU)


def test_a_pickled_reader_has_no_views(tmp_path):
    cache_spec = spec()
    stored = store(tmp_path, cache_spec)
    reader = reader_of(tmp_path, cache_spec, always)
    reader.read(0, np.arange(100))
    assert len(pickle.dumps(reader)) < 100 * ROW_BYTES / 2
    assert torch.equal(copy.deepcopy(reader).read(0, np.arange(100))["layer3"].values, stored["train", 0, "layer3"])


def test_a_source_on_a_cpu_keeps_no_view(tmp_path, monkeypatch):
    cache_spec = replace(spec(), fingerprint_fields={"numerics": {"channels_last": False}})
    stored = store(tmp_path, cache_spec)
    samples = {split: CachedSamples(np.arange(count), np.arange(count)) for split, count in cache_spec.samples.items()}
    monkeypatch.setattr(reader_module, "DeviceView", None)
    source = OpenCache(tmp_path, cache_spec, samples, LAYERS).source("train", keeps_views=True)
    assert torch.equal(source.read(np.arange(100), 0, CPU).logits, stored["train", 0, "logits"])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_on_any_device_do_not_stay_slices_of_their_rows(memory_format):
    """The device has shapes, types and strides alone; nothing is computed."""
    specs = {"logits": TensorSpec((10,), "float32"), "layer1": TensorSpec((3, 2, 2), "float32")}
    row_format, device = RowFormat(specs), torch.device("meta")
    stored = row_format.split(torch.zeros(4, row_format.words, dtype=torch.int64, device=device))
    for name, tensor in specs.items():
        values = decode_on(device, stored[name], memory_format)
        assert values.shape == (4, *tensor.shape)
        assert values.is_contiguous(memory_format=memory_format if values.ndim == 4 else torch.contiguous_format)
