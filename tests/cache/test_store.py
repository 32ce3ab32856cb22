"""Files of a cache: readable by safetensors, samples by index, and every flipped bit is detected."""

import copy
import multiprocessing
import pickle
import resource
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kd_accel.cache.reader import Reader
from kd_accel.cache.shard import RELATIVE_ERROR, data_offset, decode, encode, find_damage, stored_checksum, write_shard
from kd_accel.cache.spec import TensorSpec, samples_in_a_shard, spec_from_json, spec_to_json
from kd_accel.cache.verify import balanced_share
from kd_accel.cache.writer import blocks_of
from kd_accel.errors import UserError
from tests.support.caches import PCA, flip_bit, spec_of, store, teacher_values

TYPES = ["float32", "float16", "bfloat16", "int8"]


@pytest.mark.parametrize("dtype", TYPES)
def test_safetensors_reads_a_shard(tmp_path, dtype):
    cache_spec = spec_of(dtype)
    shard = cache_spec.shards("train", 1, "layer1")[3]
    values, scale = encode(teacher_values(cache_spec, shard), dtype, name="layer1")
    checksum = write_shard(tmp_path, cache_spec, shard, values, scale)
    with safe_open(tmp_path / shard.name, "pt") as file:
        assert torch.equal(file.get_tensor("values"), values)
        assert set(file.keys()) == ({"values", "scale"} if dtype == "int8" else {"values"})
        if scale is not None:
            assert torch.equal(file.get_tensor("scale"), scale)
        assert list(file.metadata()) == ["kd_accel"]
        for part in (
            cache_spec.fingerprint,
            checksum,
            '"first_sample":96',
            '"samples":4',
            '"split":"train"',
            '"view":1',
            '"tensor":"layer1"',
        ):
            assert part in file.metadata()["kd_accel"]
    assert find_damage(tmp_path, cache_spec, shard, checksum=checksum) is None
    assert stored_checksum(tmp_path, cache_spec, shard) == checksum
    assert data_offset(cache_spec, shard) % 64 == 0


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_stays_within_its_bound(dtype):
    values = torch.randn(64, 6, 3, 3) * torch.logspace(-3, 3, 6)[:, None, None]
    stored, scale = encode(values, dtype, name="layer1")
    error = (decode(stored, scale).double() - values.double()).abs()
    if dtype == "int8":
        largest = values.abs().amax((0, 2, 3))[:, None, None]
        assert (error <= largest * (RELATIVE_ERROR["int8"] * 1.0001)).all()
        assert scale.shape == (6,)
    else:
        assert (error <= values.abs() * RELATIVE_ERROR[dtype] + 1e-7).all()
        assert torch.equal(values.to(getattr(torch, dtype)).float(), decode(stored, scale))
    assert (error.max() == 0) == (dtype == "float32")


def test_a_channel_of_zeros_stays_zero():
    values = torch.randn(4, 3, 2, 2)
    values[:, 1] = 0
    assert (decode(*encode(values, "int8", name="a"))[:, 1] == 0).all()


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (float("nan"), "float32"), (float("inf"), "int8")])
def test_values_that_a_type_cannot_represent_are_refused(value, dtype):
    values = torch.zeros(2, 3, 1, 1)
    values[1, 2] = value
    with pytest.raises(UserError, match=f"layer1 has a value that is not finite, or too large for {dtype}"):
        encode(values, dtype, name="layer1")


def test_every_flipped_bit_of_a_header_and_of_the_data_is_detected(tmp_path):
    cache_spec = spec_of("int8", samples_per_shard=2, channels=2)
    shard = cache_spec.shards("train", 0, "layer1")[0]
    write_shard(tmp_path, cache_spec, shard, *encode(teacher_values(cache_spec, shard), "int8", name="layer1"))
    path = tmp_path / shard.name
    intact = path.read_bytes()
    for byte in range(len(intact)):
        flipped = bytearray(intact)
        flipped[byte] ^= 1 << (byte % 8)
        path.write_bytes(flipped)
        assert find_damage(tmp_path, cache_spec, shard) is not None, byte
    for length in (0, 7, 8, 100, len(intact) - 1):
        path.write_bytes(intact[:length])
        assert find_damage(tmp_path, cache_spec, shard) is not None, length
    path.write_bytes(intact + b"\0")
    assert "bytes instead of" in find_damage(tmp_path, cache_spec, shard)
    path.write_bytes(intact)
    assert find_damage(tmp_path, cache_spec, shard) is None
    assert "another checksum than in manifest.json" in find_damage(tmp_path, cache_spec, shard, checksum="0" * 32)
    path.unlink()
    assert find_damage(tmp_path, cache_spec, shard) == "is missing"


def test_a_file_of_another_shard_or_cache_is_detected(tmp_path):
    cache_spec = spec_of()
    store(tmp_path, cache_spec)
    request = cache_spec.shards("train", 0, "layer1")[1]
    other_cache = replace(cache_spec, fingerprint_fields={"teacher": "b", "data": {"contents": {}}})
    other_target = replace(
        cache_spec, tensors={**cache_spec.tensors, "layer1": replace(cache_spec.tensors["layer1"], target_digest="q" * 32)}
    )
    others = [
        (cache_spec, cache_spec.shards("train", 1, "layer1")[1]),
        (cache_spec, cache_spec.shards("train", 0, "layer1")[2]),
    ]
    others += [(other_cache, request), (other_target, request)]
    for other_spec, other in others:
        elsewhere = tmp_path / "elsewhere"
        write_shard(elsewhere, other_spec, other, *encode(teacher_values(cache_spec, other), "float16", name="layer1"))
        (elsewhere / other.name).replace(tmp_path / request.name)
        assert "header of another cache or another shard" in find_damage(tmp_path, cache_spec, request)


@pytest.mark.parametrize("dtype", TYPES)
def test_samples_are_read_by_index(tmp_path, dtype):
    cache_spec = spec_of(dtype)
    stored = store(tmp_path, cache_spec)
    covered = np.arange(100) * 3 + 1
    reader = Reader(tmp_path, cache_spec, "train", covered, ["logits", "layer1"])
    generator = np.random.default_rng(0)
    for view in (0, 1, 0):
        positions = generator.integers(0, 100, 40)
        found = reader.read(view, covered[positions])
        for name in ("logits", "layer1"):
            expected = stored["train", view, name][torch.from_numpy(positions)]
            assert torch.equal(decode(found[name].values, found[name].scale), expected)


@pytest.mark.parametrize("sample", [0, 3, 299])
def test_a_sample_that_is_not_covered_is_never_read(tmp_path, sample):
    cache_spec = spec_of()
    store(tmp_path, cache_spec)
    reader = Reader(tmp_path, cache_spec, "train", np.arange(100) * 3 + 1, ["logits"])
    with pytest.raises((AssertionError, IndexError)):
        reader.read(0, np.array([1, sample, 4]))


def test_a_damaged_file_is_named_when_its_view_is_first_read(tmp_path):
    cache_spec = spec_of()
    store(tmp_path, cache_spec)
    shard = cache_spec.shards("train", 1, "layer1")[2]
    flip_bit(tmp_path / shard.name)
    reader = Reader(tmp_path, cache_spec, "train", np.arange(100), ["layer1"])
    reader.read(0, np.arange(3))
    with pytest.raises(
        UserError, match=r"view-0001/layer1-00002-of-00004.* does not match its checksum; run `kd-accel cache build`"
    ):
        reader.read(1, np.arange(3))


def _read_elsewhere(reader, queue):
    queue.put(reader.read(1, np.array([7, 99, 7]))["layer1"].values.numpy())


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_reader_can_be_pickled_for_another_process(tmp_path, method):
    cache_spec = spec_of()
    store(tmp_path, cache_spec)
    reader = Reader(tmp_path, cache_spec, "train", np.arange(100), ["layer1"])
    expected = reader.read(1, np.array([7, 99, 7]))["layer1"].values.numpy()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_read_elsewhere, args=(reader, queue))
    process.start()
    assert np.array_equal(queue.get(timeout=120), expected)
    process.join()
    assert len(pickle.dumps(reader)) < 20_000


@pytest.mark.alone
def test_memory_does_not_grow_with_the_cache(tmp_path):
    """Anonymous memory does not include mapped pages of files."""
    cache_spec = spec_of("float32", samples=4096, views=1, samples_per_shard=512, channels=4096)
    for shard in cache_spec.all_shards():
        write_shard(
            tmp_path,
            cache_spec,
            shard,
            torch.ones(shard.samples, *cache_spec.tensors[shard.tensor].shape).to(torch.float32),
            None,
        )
    reader = Reader(tmp_path, cache_spec, "train", np.arange(4096), ["layer1"])
    reader.read(0, np.arange(8))
    before = _anonymous_bytes()
    for start in range(0, 4096, 64):
        reader.read(0, np.arange(start, start + 64))
    assert cache_spec.total_bytes() > 250 * 2**20
    assert _anonymous_bytes() - before < 30 * 2**20


def _anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def test_a_cache_of_many_files_opens_with_few_open_files(tmp_path):
    cache_spec = spec_of(samples_per_shard=1)
    stored = store(tmp_path, cache_spec)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(160, before[0]), before[1]))
    try:
        reader = Reader(tmp_path, cache_spec, "train", np.arange(100), ["logits", "layer1"])
        found = [reader.read(view, np.arange(100))["layer1"] for view in (0, 1)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for view, samples in enumerate(found):
        assert torch.equal(decode(samples.values, samples.scale), stored["train", view, "layer1"])


def test_names_and_samples_of_files_follow_from_the_spec():
    cache_spec = spec_of(samples=100, samples_per_shard=32)
    shards = cache_spec.shards("train", 1, "layer1")
    assert [(shard.first, shard.samples) for shard in shards] == [(0, 32), (32, 32), (64, 32), (96, 4)]
    assert shards[3].name == "train/view-0001/layer1-00003-of-00004.safetensors"
    names = [shard.name for shard in cache_spec.all_shards()]
    assert len(names) == len(set(names)) == 2 * 2 * 4 + 2
    assert {name for name in names if not name.startswith("train")} == {
        "val/view-0000/logits-00000-of-00001.safetensors",
        "test/view-0000/logits-00000-of-00001.safetensors",
    }
    blocks = blocks_of(cache_spec.all_shards())
    assert sum(len(block.shards) for block in blocks) == len(names)
    assert len(blocks) == 2 * 4 + 2
    odd = replace(cache_spec, tensors={**cache_spec.tensors, "../a b": cache_spec.tensors["layer1"]})
    assert odd.shards("train", 0, "../a b")[0].name == "train/view-0000/..%2Fa%20b-00000-of-00004.safetensors"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_shares_of_a_build_are_balanced(world_size):
    """Each view is a full file and a short file; assigned in turns, two processes would get 517 and 135 samples."""
    sizes = [block.samples for block in blocks_of(spec_of(samples=40, views=16, samples_per_shard=32).all_shards())]
    shares = [balanced_share(sizes, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)
    samples = [sum(sizes[index] for index in share) for share in shares]
    assert max(samples) - min(samples) <= 32


def test_shards_are_complete_batches_of_about_the_requested_size():
    specs = {"logits": TensorSpec((10,), "float16"), "layer1": TensorSpec((64, 8, 8), "float16")}
    assert samples_in_a_shard(specs, shard_mib=1, batch_samples=32) == 128  # of 8,192 bytes each
    assert samples_in_a_shard(specs, shard_mib=0.001, batch_samples=32) == 32


def test_sizes_of_the_reference_pair():
    """ResNet-50's four stages at 32x32, projected to ResNet-18's widths, in float16."""
    widths, sizes = (64, 128, 256, 512), (8, 4, 2, 1)
    specs = {"logits": TensorSpec((10,), "float16")} | {
        f"layer{i + 1}": TensorSpec((w, s, s), "float16", raw_channels=4 * w)
        for i, (w, s) in enumerate(zip(widths, sizes, strict=True))
    }
    cache_spec = replace(spec_of(), tensors=specs)
    assert cache_spec.sample_bytes() == 15_380
    assert sum(spec.raw_sample_bytes for spec in specs.values()) == 61_460


def test_a_spec_survives_json_and_an_invalid_spec_is_refused():
    cache_spec = spec_of()
    content = spec_to_json(cache_spec)
    assert asdict(spec_from_json(content)) == asdict(cache_spec)
    for break_it in (
        lambda c: c.pop("fingerprint_fields"),
        lambda c: c["fingerprint_fields"].update(teacher="other"),
        lambda c: c["tensors"].pop("logits"),
        lambda c: c["tensors"]["logits"].update(dtype="float8"),
        lambda c: c["tensors"]["logits"].update(shape=None),
        lambda c: c["tensors"]["logits"].update(target={"name": "identity"}),
        lambda c: c["tensors"]["layer1"].update(target=None),
        lambda c: c["tensors"]["layer1"].update(target={"channels": 6}),
        lambda c: c["tensors"]["layer1"].update(target={**PCA, "images": 65}),
        lambda c: c["tensors"]["layer1"].update(target_digest=1),
        lambda c: c["tensors"]["layer1"].update(raw_channels=None),
        lambda c: c["samples"].pop("val"),
        lambda c: c.update(views=0),
        lambda c: c.update(samples_per_shard=0),
        lambda c: c.update(tensors=[]),
    ):
        broken = copy.deepcopy(content)
        break_it(broken)
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
            spec_from_json(broken)


def test_a_sealed_spec_with_countless_views_is_refused():
    """Without samples it has no file, but each view would be looked at."""
    endless = replace(spec_of(), views=2**40, samples=dict.fromkeys(spec_of().samples, 0))
    assert endless.num_files() == 0
    with pytest.raises(ValueError, match="too many files"):
        spec_from_json(spec_to_json(endless))
