"""Flags, specs and files of small caches."""

import torch

from kd_accel.cache.shard import decode, encode, write_shard
from kd_accel.cache.spec import CacheSpec, TensorSpec

FEATURE = "--distill.features={mse: {weight: 0.1, layers: [layer1, layer2], args: {direction: both, pca_images: 64}}}"
RAW = "--distill.features={mse: {weight: 0.1, layers: [layer1, layer2], args: {direction: student_to_teacher}}}"
PCA = {"name": "pca", "channels": 6, "images": 64}


def flags_of(teacher, cache_dir, feature=FEATURE):
    return [
        f"--teacher.run={teacher}",
        feature,
        "--data.views=2",
        "--train.channels_last=true",
        "--teacher.outputs=cached",
        f"--teacher.cache.dir={cache_dir}",
    ]


def files_of(directory):
    """Return {path: (modification time, content)} of the shards."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(directory.glob("*/view-*/*.safetensors"))}


def flip_bit(path, at=-1):
    """Flip a bit of one byte of a file, which keeps its size."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def spec_of(dtype="float16", *, samples=100, views=2, samples_per_shard=32, channels=6):
    return CacheSpec(
        fingerprint_fields={"teacher": "a", "data": {"contents": {}}},
        samples={"train": samples, "val": 5, "test": 7},
        views=views,
        tensors={
            "logits": TensorSpec((10,), "float32" if dtype == "float32" else "float16"),
            "layer1": TensorSpec((channels, 2, 2), dtype, PCA, target_digest="p" * 32, raw_channels=24),
        },
        samples_per_shard=samples_per_shard,
        batch_samples=16,
    )


def teacher_values(cache_spec, shard):
    """Return random values in place of the teacher's outputs, different for every sample and view."""
    generator = torch.Generator().manual_seed(1000 * shard.view + shard.first)
    return torch.randn(shard.samples, *cache_spec.tensors[shard.tensor].shape, generator=generator)


def store(directory, cache_spec):
    """Write all shards of a cache, and return {(split, view, tensor): decoded values}."""
    stored_values = {}
    for shard in cache_spec.all_shards():
        stored, scale = encode(teacher_values(cache_spec, shard), cache_spec.tensors[shard.tensor].dtype, name=shard.tensor)
        write_shard(directory, cache_spec, shard, stored, scale)
        stored_values.setdefault((shard.split, shard.view, shard.tensor), []).append(decode(stored, scale))
    return {place: torch.cat(parts) for place, parts in stored_values.items()}
