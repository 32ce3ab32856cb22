"""The files of a cache: safetensors reads them, rows come back by number, and every flipped bit is noticed."""

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

from kd_accel.engine.cache_pass import balanced_share, blocks_of
from kd_accel.teacher.store.codec import RELATIVE_ERROR, decode, encode
from kd_accel.teacher.store.layout import Plan, TensorSpec, plan_from_json, plan_to_json, rows_in_a_shard
from kd_accel.teacher.store.reader import Reader
from kd_accel.teacher.store.shards import damage, data_offset, stored_checksum, write_shard
from kd_accel.types import UserError

TYPES = ["float32", "float16", "bfloat16", "int8"]


def plan_of(dtype="float16", *, rows=100, views=2, rows_per_shard=32, channels=6):
    return Plan(
        identity={"teacher": "a", "data": {"contents": {}}},
        rows={"train": rows, "val": 5, "test": 7},
        views=views,
        tensors={
            "logits": TensorSpec((10,), "float32" if dtype == "float32" else "float16"),
            "layer1": TensorSpec((channels, 2, 2), dtype, projector="p" * 32, raw_channels=24),
        },
        rows_per_shard=rows_per_shard,
        batch_rows=16,
    )


def answers(plan, shard):
    """What the teacher is taken to have said: different for every row and view."""
    generator = torch.Generator().manual_seed(1000 * shard.view + shard.first)
    return torch.randn(shard.rows, *plan.tensors[shard.tensor].shape, generator=generator)


def written(directory, plan):
    """All files of a cache; returns {(split, view, tensor): float32 values as they come back}."""
    whole = {}
    for shard in plan.all_shards():
        stored, scale = encode(answers(plan, shard), plan.tensors[shard.tensor].dtype, name=shard.tensor)
        write_shard(directory, plan, shard, stored, scale)
        whole.setdefault((shard.split, shard.view, shard.tensor), []).append(decode(stored, scale))
    return {place: torch.cat(parts) for place, parts in whole.items()}


@pytest.mark.parametrize("dtype", TYPES)
def test_safetensors_reads_what_is_written(tmp_path, dtype):
    plan = plan_of(dtype)
    shard = plan.shards("train", 1, "layer1")[3]
    values, scale = encode(answers(plan, shard), dtype, name="layer1")
    checksum = write_shard(tmp_path, plan, shard, values, scale)
    with safe_open(tmp_path / shard.name, "pt") as file:
        assert torch.equal(file.get_tensor("values"), values)
        assert set(file.keys()) == ({"values", "scale"} if dtype == "int8" else {"values"})
        if scale is not None:
            assert torch.equal(file.get_tensor("scale"), scale)
        assert list(file.metadata()) == ["kd_accel"]
        for part in (plan.digest, checksum, '"first_row":96', '"rows":4', '"split":"train"', '"view":1', '"tensor":"layer1"'):
            assert part in file.metadata()["kd_accel"]
    assert damage(tmp_path, plan, shard, checksum=checksum) is None
    assert stored_checksum(tmp_path, plan, shard) == checksum
    assert data_offset(plan, shard) % 64 == 0


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_stays_within_what_is_said(dtype):
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
def test_numbers_that_a_type_cannot_hold_are_refused(value, dtype):
    values = torch.zeros(2, 3, 1, 1)
    values[1, 2] = value
    with pytest.raises(UserError, match=f"layer1 is not finite, or too large for {dtype}"):
        encode(values, dtype, name="layer1")


def test_every_flipped_bit_of_a_header_and_of_the_data_is_noticed(tmp_path):
    plan = plan_of("int8", rows_per_shard=2, channels=2)
    shard = plan.shards("train", 0, "layer1")[0]
    write_shard(tmp_path, plan, shard, *encode(answers(plan, shard), "int8", name="layer1"))
    path = tmp_path / shard.name
    whole = path.read_bytes()
    for byte in range(len(whole)):
        flipped = bytearray(whole)
        flipped[byte] ^= 1 << (byte % 8)
        path.write_bytes(flipped)
        assert damage(tmp_path, plan, shard) is not None, byte
    for length in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert damage(tmp_path, plan, shard) is not None, length
    path.write_bytes(whole + b"\0")
    assert "bytes instead of" in damage(tmp_path, plan, shard)
    path.write_bytes(whole)
    assert damage(tmp_path, plan, shard) is None
    assert "another checksum than the manifest" in damage(tmp_path, plan, shard, checksum="0" * 32)
    path.unlink()
    assert damage(tmp_path, plan, shard) == "is missing"


def test_a_file_of_another_place_or_cache_is_noticed(tmp_path):
    plan = plan_of()
    written(tmp_path, plan)
    wanted = plan.shards("train", 0, "layer1")[1]
    other_cache = replace(plan, identity={"teacher": "b", "data": {"contents": {}}})
    other_projector = replace(plan, tensors={**plan.tensors, "layer1": replace(plan.tensors["layer1"], projector="q" * 32)})
    others = [(plan, plan.shards("train", 1, "layer1")[1]), (plan, plan.shards("train", 0, "layer1")[2])]
    others += [(other_cache, wanted), (other_projector, wanted)]
    for other_plan, other in others:
        elsewhere = tmp_path / "elsewhere"
        write_shard(elsewhere, other_plan, other, *encode(answers(plan, other), "float16", name="layer1"))
        (elsewhere / other.name).replace(tmp_path / wanted.name)
        assert "header of another cache or place" in damage(tmp_path, plan, wanted)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_come_back_by_their_number(tmp_path, dtype):
    plan = plan_of(dtype)
    whole = written(tmp_path, plan)
    covered = np.arange(100) * 3 + 1
    reader = Reader(tmp_path, plan, "train", covered, ["logits", "layer1"])
    generator = np.random.default_rng(0)
    for view in (0, 1, 0):
        positions = generator.integers(0, 100, 40)
        found = reader.read(view, covered[positions])
        for name in ("logits", "layer1"):
            expected = whole["train", view, name][torch.from_numpy(positions)]
            assert torch.equal(decode(found[name].values, found[name].scale), expected)
    out = torch.empty(40, *plan.tensors["logits"].shape, dtype=found["logits"].values.dtype)
    reader.read_into(0, covered[positions], "logits", out)
    assert torch.equal(out, found["logits"].values)


@pytest.mark.parametrize("row", [0, 3, 299])
def test_a_row_that_is_not_covered_is_never_answered_for(tmp_path, row):
    plan = plan_of()
    written(tmp_path, plan)
    reader = Reader(tmp_path, plan, "train", np.arange(100) * 3 + 1, ["logits"])
    with pytest.raises((AssertionError, IndexError)):
        reader.read(0, np.array([1, row, 4]))


def test_a_damaged_file_is_named_when_its_view_is_first_read(tmp_path):
    plan = plan_of()
    written(tmp_path, plan)
    shard = plan.shards("train", 1, "layer1")[2]
    data = bytearray((tmp_path / shard.name).read_bytes())
    data[-1] ^= 4
    (tmp_path / shard.name).write_bytes(data)
    reader = Reader(tmp_path, plan, "train", np.arange(100), ["layer1"])
    reader.read(0, np.arange(3))
    with pytest.raises(
        UserError, match=r"view-0001/layer1-00002-of-00004.* does not match its checksum; run `kd-accel cache build`"
    ):
        reader.read(1, np.arange(3))


def _read_elsewhere(reader, queue):
    queue.put(reader.read(1, np.array([7, 99, 7]))["layer1"].values.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_travels_to_another_process(tmp_path, method):
    plan = plan_of()
    written(tmp_path, plan)
    reader = Reader(tmp_path, plan, "train", np.arange(100), ["layer1"])
    here = reader.read(1, np.array([7, 99, 7]))["layer1"].values.numpy()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_read_elsewhere, args=(reader, queue))
    process.start()
    assert np.array_equal(queue.get(timeout=120), here)
    process.join()
    assert len(pickle.dumps(reader)) < 20_000


def test_memory_does_not_grow_with_the_cache(tmp_path):
    """Anonymous memory, in which mapped pages of files do not count."""
    plan = plan_of("float32", rows=4096, views=1, rows_per_shard=512, channels=4096)
    for shard in plan.all_shards():
        write_shard(tmp_path, plan, shard, torch.ones(shard.rows, *plan.tensors[shard.tensor].shape).to(torch.float32), None)
    reader = Reader(tmp_path, plan, "train", np.arange(4096), ["layer1"])
    reader.read(0, np.arange(8))
    before = _anonymous_bytes()
    for start in range(0, 4096, 64):
        reader.read(0, np.arange(start, start + 64))
    assert plan.total_bytes() > 250 * 2**20
    assert _anonymous_bytes() - before < 30 * 2**20


def _anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def test_a_cache_of_many_files_opens_with_few_open_files(tmp_path):
    plan = plan_of(rows_per_shard=1)
    whole = written(tmp_path, plan)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(160, before[0]), before[1]))
    try:
        reader = Reader(tmp_path, plan, "train", np.arange(100), ["logits", "layer1"])
        found = [reader.read(view, np.arange(100))["layer1"] for view in (0, 1)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for view, rows in enumerate(found):
        assert torch.equal(decode(rows.values, rows.scale), whole["train", view, "layer1"])


def test_names_and_cuts_follow_from_the_plan():
    plan = plan_of(rows=100, rows_per_shard=32)
    shards = plan.shards("train", 1, "layer1")
    assert [(shard.first, shard.rows) for shard in shards] == [(0, 32), (32, 32), (64, 32), (96, 4)]
    assert shards[3].name == "train/view-0001/layer1-00003-of-00004.safetensors"
    names = [shard.name for shard in plan.all_shards()]
    assert len(names) == len(set(names)) == 2 * 2 * 4 + 2
    assert {name for name in names if not name.startswith("train")} == {
        "val/view-0000/logits-00000-of-00001.safetensors",
        "test/view-0000/logits-00000-of-00001.safetensors",
    }
    blocks = blocks_of(plan.all_shards())
    assert sum(len(block.shards) for block in blocks) == len(names)
    assert len(blocks) == 2 * 4 + 2
    odd = replace(plan, tensors={**plan.tensors, "../a b": plan.tensors["layer1"]})
    assert odd.shards("train", 0, "../a b")[0].name == "train/view-0000/..%2Fa%20b-00000-of-00004.safetensors"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_build_is_cut_into_shares_of_about_as_many_rows(world_size):
    """A full file and a short one in each view: dealt out in turns, two processes would get 517 and 135 rows."""
    sizes = [block.rows for block in blocks_of(plan_of(rows=40, views=16, rows_per_shard=32).all_shards())]
    shares = [balanced_share(sizes, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)
    rows = [sum(sizes[index] for index in share) for share in shares]
    assert max(rows) - min(rows) <= 32


def test_shards_are_whole_batches_of_about_the_size_asked_for():
    specs = {"logits": TensorSpec((10,), "float16"), "layer1": TensorSpec((64, 8, 8), "float16")}
    assert rows_in_a_shard(specs, shard_mib=1, batch_rows=32) == 128  # of 8,192 bytes each
    assert rows_in_a_shard(specs, shard_mib=0.001, batch_rows=32) == 32


def test_bytes_are_those_of_the_reference_pair():
    """ResNet-50's four stages at 32x32, projected to ResNet-18's widths, in float16."""
    widths, sizes = (64, 128, 256, 512), (8, 4, 2, 1)
    specs = {"logits": TensorSpec((10,), "float16")} | {
        f"layer{i + 1}": TensorSpec((w, s, s), "float16", raw_channels=4 * w)
        for i, (w, s) in enumerate(zip(widths, sizes, strict=True))
    }
    plan = replace(plan_of(), tensors=specs)
    assert plan.row_bytes() == 15_380
    assert sum(spec.raw_row_bytes for spec in specs.values()) == 61_460


def test_a_plan_comes_back_from_json_and_a_wrong_one_does_not():
    plan = plan_of()
    content = plan_to_json(plan)
    assert asdict(plan_from_json(content)) == asdict(plan)
    for break_it in (
        lambda c: c.pop("identity"),
        lambda c: c["identity"].update(teacher="other"),
        lambda c: c["tensors"].pop("logits"),
        lambda c: c["tensors"]["logits"].update(dtype="float8"),
        lambda c: c["tensors"]["logits"].update(shape=None),
        lambda c: c["rows"].pop("val"),
        lambda c: c.update(views=0),
        lambda c: c.update(rows_per_shard=0),
        lambda c: c.update(tensors=[]),
    ):
        broken = copy.deepcopy(content)
        break_it(broken)
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
            plan_from_json(broken)
