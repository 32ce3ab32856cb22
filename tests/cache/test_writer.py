"""The pipeline of a build: threads write files while the teacher computes; same bytes, and no error or file is lost."""

import errno
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kd_accel.cache import writer
from kd_accel.cache.manifest import CachedSamples
from kd_accel.cache.shard import TORCH_TYPE, encode, find_damage, write_shard
from kd_accel.cache.writer import blocks_of, write_blocks
from kd_accel.errors import UserError
from kd_accel.types import Batch, TeacherOutput
from tests.support.caches import spec_of

TYPES = ["float32", "float16", "bfloat16", "int8"]
WAIT_S = 20.0


def outputs_of(batch, cache_spec, dtype=torch.float32):
    """Return outputs that depend on the samples and the view alone; the maps are channels_last."""
    values = {}
    for name, spec in cache_spec.tensors.items():
        generators = [torch.Generator().manual_seed(1000 * batch.view + index) for index in batch.index.tolist()]
        values[name] = torch.stack([torch.randn(spec.shape, generator=generator) for generator in generators]).to(dtype)
    layer = values["layer1"].to(memory_format=torch.channels_last)
    return TeacherOutput(values["logits"], {"layer1": layer})


def batch_of(indices, view):
    return Batch(torch.empty(0), torch.empty(0), torch.from_numpy(indices), view)


def build(directory, cache_spec, teacher=None):
    samples = {split: CachedSamples(np.arange(count), np.arange(count)) for split, count in cache_spec.samples.items()}
    done = []
    checksums = write_blocks(
        blocks_of(cache_spec.all_shards()),
        directory=directory,
        cache_spec=cache_spec,
        samples=samples,
        teacher=teacher or (lambda batch: outputs_of(batch, cache_spec)),
        batches=lambda split, shares: (batch_of(indices, view) for indices, view in shares),
        advance=done.append,
    )
    assert sum(done) == sum(block.samples for block in blocks_of(cache_spec.all_shards()))
    return checksums


def only_training_samples():
    """Return a spec with four blocks of two batches and two files, except that the last block has one batch."""
    return replace(spec_of(views=1), samples={"train": 100})


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def check_files(directory, cache_spec, complete):
    """Check that these files are intact, and that nothing else is in the directory."""
    assert contents(directory).keys() == {shard.name for shard in complete}
    for shard in complete:
        assert find_damage(directory, cache_spec, shard) is None


def writers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("cache")]


@pytest.fixture
def disk(monkeypatch):
    """Return a dict {tensor or number of a file: function to call before the file is written}."""
    before = {}

    def write(directory, cache_spec, shard, values, scale):
        for key in (shard.tensor, shard.number):
            before.get(key, lambda shard: None)(shard)
        return write_shard(directory, cache_spec, shard, values, scale)

    monkeypatch.setattr(writer, "write_shard", write)
    return before


def full(shard):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", TYPES)
def test_files_are_those_of_all_samples_encoded_together(tmp_path, dtype, computed):
    cache_spec = spec_of(dtype)
    checksums = build(tmp_path / "built", cache_spec, lambda batch: outputs_of(batch, cache_spec, computed))
    expected = {}
    for shard in cache_spec.all_shards():
        batch = batch_of(np.arange(shard.first, shard.first + shard.samples), shard.view)
        output = outputs_of(batch, cache_spec, computed)
        values = (output.logits if shard.tensor == "logits" else output.features[shard.tensor]).float()
        encoded = encode(values, cache_spec.tensors[shard.tensor].dtype, name=shard.tensor)
        expected[shard.name] = write_shard(tmp_path / "expected", cache_spec, shard, *encoded)
    assert checksums == expected
    assert contents(tmp_path / "built") == contents(tmp_path / "expected")


def test_the_order_in_which_files_are_completed_does_not_matter(tmp_path, disk):
    cache_spec = spec_of()
    expected = build(tmp_path / "expected", cache_spec)
    disk["logits"] = lambda shard: time.sleep(0.02)
    assert list(build(tmp_path / "built", cache_spec).items()) == list(expected.items())
    assert contents(tmp_path / "built") == contents(tmp_path / "expected")


def test_a_block_is_written_while_the_next_one_is_computed_and_before_another_one_is(tmp_path, disk):
    cache_spec = only_training_samples()
    blocks = blocks_of(cache_spec.all_shards())
    is_computed = [threading.Event() for _ in blocks]
    is_computed[-1].set()
    for number in range(len(blocks) - 1):
        disk[number] = lambda shard: is_computed[shard.number + 1].wait(WAIT_S) or full(shard)

    def teacher(batch):
        number = int(batch.index[0]) // 32
        for shard in [shard for block in blocks[: max(0, number - 1)] for shard in block.shards]:
            assert (tmp_path / shard.name).is_file()
        is_computed[number].set()
        return outputs_of(batch, cache_spec)

    build(tmp_path, cache_spec, teacher)
    check_files(tmp_path, cache_spec, list(cache_spec.all_shards()))


def test_files_are_flushed_by_the_threads_and_an_error_of_the_flush_is_reported(tmp_path, monkeypatch):
    cache_spec = only_training_samples()
    flushed = {}
    monkeypatch.setattr(writer, "flush", lambda path: flushed.setdefault(path, threading.current_thread().name))
    names = build(tmp_path / "intact", cache_spec)
    assert flushed.keys() == {tmp_path / "intact" / name for name in names}
    assert all(name.startswith("cache") for name in flushed.values())
    monkeypatch.setattr(writer, "flush", full)
    with pytest.raises(UserError, match=r"cannot write .*\(No space left on device\)"):
        build(tmp_path / "full", cache_spec)


@pytest.mark.parametrize("number", range(4))
def test_a_full_disk_is_reported_at_the_next_block_or_at_the_end_and_no_other_file_is_lost(tmp_path, disk, number):
    cache_spec = only_training_samples()
    blocks = blocks_of(cache_spec.all_shards())
    failed = next(shard for shard in blocks[number].shards if shard.tensor == "layer1")
    disk[number] = lambda shard: shard != failed or full(shard)
    computed = []

    def teacher(batch):
        computed.append(int(batch.index[0]))
        return outputs_of(batch, cache_spec)

    with pytest.raises(UserError) as raised:
        build(tmp_path, cache_spec, teacher)
    assert str(raised.value).startswith(f"teacher.cache.dir: cannot write {tmp_path / failed.name} (No space left on device); ")
    assert "keeps the complete files" in str(raised.value)
    assert computed == [first for first in range(0, 100, 16) if first < (number + 2) * 32]
    written = [shard for block in blocks[: number + 1] for shard in block.shards if shard != failed]
    check_files(tmp_path, cache_spec, written)
    assert not writers()


def test_an_output_that_cannot_be_stored_is_reported_and_earlier_blocks_are_kept(tmp_path):
    cache_spec = only_training_samples()

    def teacher(batch):
        output = outputs_of(batch, cache_spec)
        output.features["layer1"][batch.index == 40] = float("nan")
        return output

    with pytest.raises(UserError, match="layer1 has a value that is not finite"):
        build(tmp_path, cache_spec, teacher)
    first, second, *_ = blocks_of(cache_spec.all_shards())
    check_files(tmp_path, cache_spec, [*first.shards, *(shard for shard in second.shards if shard.tensor == "logits")])


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_files_in_writing_are_completed_when_a_build_is_interrupted(tmp_path, disk, error):
    cache_spec = only_training_samples()
    disk[0] = lambda shard: time.sleep(0.2)

    def teacher(batch):
        if batch.index[0] == 48:
            raise error
        return outputs_of(batch, cache_spec)

    with pytest.raises(error):
        build(tmp_path, cache_spec, teacher)
    check_files(tmp_path, cache_spec, blocks_of(cache_spec.all_shards())[0].shards)
    assert not writers()


@pytest.mark.parametrize("dtype", TYPES)
def test_the_main_thread_casts_on_the_device_and_never_synchronizes_it(tmp_path, monkeypatch, dtype):
    """Fake tensors of a GPU, whose values cannot be read; int8 is encoded by the threads."""
    cache_spec = spec_of(dtype)
    written = {}
    monkeypatch.setattr(writer, "_write_file", lambda directory, spec, shard, values: written.setdefault(shard, values))

    def teacher(batch):
        logits, layer = (torch.empty(len(batch.index), *spec.shape, device="cuda") for spec in cache_spec.tensors.values())
        return TeacherOutput(logits, {"layer1": layer})

    with FakeTensorMode():
        build(tmp_path, cache_spec, teacher)
    assert set(written) == set(cache_spec.all_shards())
    for shard, values in written.items():
        spec = cache_spec.tensors[shard.tensor]
        assert values.device.type == "cuda" and values.shape == (shard.samples, *spec.shape)
        assert values.dtype == (torch.float32 if spec.is_scaled else TORCH_TYPE[spec.dtype])
