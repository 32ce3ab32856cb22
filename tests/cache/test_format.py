"""Conformance with docs/cache_format.md, checked by an independent reader; command and Python build the same files."""

import json
from urllib.parse import quote

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from kd_accel.cache.teacher_cache import TeacherCache
from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.losses.targets import PCA
from kd_accel.teacher.loading import load_run_teacher
from tests.support.caches import FEATURE, flags_of
from tests.support.in_process import cache

TYPES = ["float32", "float16", "bfloat16", "int8"]
SMALL_FILES = ["--teacher.cache.batch_size=16", "--teacher.cache.shard_mib=0.04"]


def digest_of(content):
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


class PageReader:
    """Reader of a cache that follows docs/cache_format.md and uses no part of kd_accel."""

    def __init__(self, directory):
        self.directory = directory
        self.spec = json.loads((directory / "spec.json").read_text())
        self.manifest = json.loads((directory / "manifest.json").read_text())
        self.samples = load_file(directory / "samples.safetensors")
        self.check()

    def check(self):
        spec, fields = self.spec, self.spec["fingerprint_fields"]
        assert spec["version"] == self.manifest["version"] == 2
        assert spec["fingerprint"] == self.manifest["fingerprint"] == digest_of(fields)
        own = {key: value for key, value in spec.items() if key not in ("version", "fingerprint", "checksum")}
        assert spec["checksum"] == digest_of(own)
        for split, count in spec["samples"].items():
            indices, digests = (self.samples[f"{split}.{name}"].numpy() for name in ("indices", "digests"))
            assert indices.dtype == digests.dtype == np.int64 and indices.shape == digests.shape == (count,)
            assert fields["data"]["contents"][split] == xxhash.xxh3_128_hexdigest(indices.tobytes() + digests.tobytes())
            assert (np.diff(indices) > 0).all()

    def shard_names(self, split, view, tensor):
        count = -(-self.spec["samples"][split] // self.spec["samples_per_shard"])
        start = f"{split}/view-{view:04d}/{quote(tensor, safe='')}"
        return [f"{start}-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]

    def all_names(self):
        splits = {"train": (self.spec["views"], list(self.spec["tensors"])), "val": (1, ["logits"]), "test": (1, ["logits"])}
        return {
            name
            for split, (views, tensors) in splits.items()
            for view in range(views)
            for tensor in tensors
            for name in self.shard_names(split, view, tensor)
        }

    def read(self, split, view, tensor):
        """Return float32 [N, ...] of all samples, in the order of their indices."""
        parts = [
            self.read_shard(name, split, view, tensor, number)
            for number, name in enumerate(self.shard_names(split, view, tensor))
        ]
        return torch.cat(parts)

    def read_shard(self, name, split, view, tensor, number):
        path, spec, step = self.directory / name, self.spec["tensors"][tensor], self.spec["samples_per_shard"]
        data = path.read_bytes()
        offset = 8 + int.from_bytes(data[:8], "little")
        assert offset % 64 == 0
        count = min(step, self.spec["samples"][split] - number * step)
        with safe_open(path, "pt") as file:
            (key,) = file.metadata()
            assert (key, json.loads(file.metadata()[key])) == (
                "kd_accel",
                {
                    "checksum": xxhash.xxh3_128_hexdigest(data[offset:]),
                    "fingerprint": self.spec["fingerprint"],
                    "first_sample": number * step,
                    "samples": count,
                    "split": split,
                    "target": spec["target_digest"],
                    "tensor": tensor,
                    "view": view,
                },
            )
            assert self.manifest["files"][name] == json.loads(file.metadata()[key])["checksum"]
            values = file.get_tensor("values")
            scale = file.get_tensor("scale") if spec["dtype"] == "int8" else None
        assert values.shape == (count, *spec["shape"]) and values.dtype == getattr(torch, spec["dtype"])
        if scale is None:
            return values.float()
        assert scale.dtype == torch.float32 and scale.shape == (spec["shape"][0],)
        return values.float() * scale[:, None, None]


def check_targets(page):
    """Check that the digests of fitted tensors follow the page."""
    tensors = load_file(page.directory / "targets.safetensors")
    for layer, spec in page.spec["tensors"].items():
        if spec["target_digest"] is not None:
            digest = xxhash.xxh3_128()
            for name in ("conv.bias", "conv.weight"):
                tensor = tensors[f"{layer}|{name}"]
                digest.update(f"{name}|torch.float32|{tuple(tensor.shape)}|".encode() + tensor.numpy().tobytes())
            assert digest.hexdigest() == spec["target_digest"]
            assert tensors[f"{layer}|conv.weight"].shape == (spec["shape"][0], spec["raw_channels"], 1, 1)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_page_suffices_to_read_a_cache(tmp_path, teacher_run, dtype):
    cache("build", *flags_of(teacher_run, tmp_path), f"--teacher.cache.dtype={dtype}", *SMALL_FILES)
    page, opened = PageReader(tmp_path), TeacherCache.open(tmp_path)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*/*") if not path.name.startswith(".")}
    assert found == page.all_names() == set(page.manifest["files"])
    check_targets(page)
    for split, views in (("train", page.spec["views"]), ("val", 1), ("test", 1)):
        indices = page.samples[f"{split}.indices"]
        for view in range(views):
            output = opened.read(indices, view, split=split)
            assert torch.equal(page.read(split, view, "logits"), output.logits)
            for layer, feature in output.features.items():
                assert torch.equal(page.read(split, view, layer), feature)
    assert output.features == {} and set(opened.shapes) == set(page.spec["tensors"]) - {"logits"}
    assert page.spec["tensors"]["layer1"]["target"] == {"name": "pca", "channels": 8, "images": 64}


def test_python_and_the_command_build_the_same_files(tmp_path, teacher_run):
    """All files are equal byte for byte, spec.json included."""
    flags = [flag for flag in flags_of(teacher_run, tmp_path / "command") if "channels_last" not in flag]
    cache("build", *flags, "--teacher.cache.dtype=float16", *SMALL_FILES)
    data = load_data(
        DataConfig(source="import:tests.support.models:images", transform="crop_flip", val_fraction=0.2, views=2, num_workers=0)
    )
    layers = {"layer1": PCA(8, images=64), "layer2": PCA(16, images=64)}
    assert "layers: [layer1, layer2]" in FEATURE and "pca_images: 64" in FEATURE
    TeacherCache.build(tmp_path / "python", load_run_teacher(teacher_run), data, layers=layers, batch_size=16, shard_mib=0.04)
    files = [
        {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        for directory in (tmp_path / "command", tmp_path / "python")
    ]
    assert files[0].keys() == files[1].keys() and len(files[0]) == 27 + 5
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []
