"""Preparation of invalid input for test_bad_inputs.py: each function returns a function that changes the directory of a case.

The directory contains `run`, a finished teacher; `paused`, an interrupted training; `cache`, a complete cache; and `data`, two
splits of Parquet files.
"""

import json
import os
import struct
import zlib

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torchvision import models

from kd_accel.io.hashing import arrays_digest, settings_digest
from tests.support.image_files import color, encoded, write_folder, write_named, write_parquet
from tests.support.models import student

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{one}: &{one} [{','.join([f'*{other}'] * 9)}]\n" for other, one in zip("abcdefgh", "bcdefghi", strict=True)
)
SMALL_CARD = {"arch": "torchvision/resnet18", "stem": "imagenet", "arch_args": {}, "label_names": ["a", "b"]}
SMALL_CARD |= {"mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 32}


def write(name, content):
    """Write a file with the given text or bytes."""

    def make(directory):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def config(text):
    """Write the config file of a case."""
    return write("bad.yaml", text)


def change(name, edit):
    """Edit a JSON file: `edit` changes the parsed content in place or returns new content."""

    def make(directory):
        content = json.loads((directory / name).read_text())
        changed = edit(content)
        (directory / name).write_text(json.dumps(content if changed is None else changed))

    return make


def put(name, **values):
    """Set values of a JSON object in a file."""
    return change(name, lambda content: content.update(values))


def cut(name, length=-9):
    """Truncate a file to `length` bytes, or by `-length` bytes."""
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:length])


def remove(name):
    return lambda directory: (directory / name).unlink()


def link(name, target):
    """Replace `name` by a symbolic link to `target`; existing content is moved to `target`."""

    def make(directory):
        if (directory / name).exists():
            (directory / name).rename(directory / target)
        (directory / name).symlink_to(directory / target)

    return make


def pipe(name):
    """Replace a file by a named pipe."""

    def make(directory):
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return make


def sparse(name, length):
    """Write a sparse file of `length` bytes."""

    def make(directory):
        with (directory / name).open("wb") as file:
            file.truncate(length)

    return make


def nested(depth):
    return "[" * depth + "]" * depth


# weights


def header(content, data=b"", length=None):
    """Write a safetensors file with the given header. length: declared size of the header; None = its actual size."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return write("w.safetensors", (len(text) if length is None else length).to_bytes(8, "little") + text + data)


def tensor(dtype, shape, begin, end):
    """Return a safetensors header with one tensor."""
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


def weights(edit):
    """Write the weights of the student, changed in place by `edit`."""

    def make(directory):
        tensors = dict(student(4).state_dict())
        edit(tensors)
        save_file(tensors, directory / "w.safetensors")

    return make


def pickled(name):
    """Write the weights of the student as a pickle file."""
    return lambda directory: torch.save(student(4).state_dict(), directory / name)


def library_run(directory):
    """Change a run so that its model needs no user code but its data does."""
    model = models.resnet18(num_classes=2)
    save_file(model.state_dict(), directory / "run/model.safetensors")
    put("run/model.json", **SMALL_CARD)(directory)
    write("run/config.yaml", "data: {source: import:spy:f}")(directory)


# checkpoints


def newest(directory):
    return max((directory / "paused/checkpoints").iterdir())


def state(edit):
    """Edit the state of all checkpoints in place."""

    def make(directory):
        for path in (directory / "paused/checkpoints").glob("*/state.json"):
            content = json.loads(path.read_text())
            edit(content)
            path.write_text(json.dumps(content))

    return make


def state_text(text):
    """Replace the state of all checkpoints by a text."""
    return lambda directory: [path.write_text(text) for path in (directory / "paused/checkpoints").glob("*/state.json")]


def checkpoint_file(name, content):
    """Replace or edit a file of the newest checkpoint, and update its size and checksum, as in a forged checkpoint."""

    def make(directory):
        path = newest(directory) / name
        if callable(content):
            tensors = load_file(path)
            content(tensors)
            save_file(tensors, path)
        else:
            path.write_bytes(content)
        updated = json.loads((newest(directory) / "state.json").read_text())
        data = path.read_bytes()
        updated["files"][name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
        (newest(directory) / "state.json").write_text(json.dumps(updated))

    return make


# caches


def cache_spec(edit):
    """Edit spec.json in place, and update its fingerprint and checksum."""

    def make(directory):
        path = directory / "cache/spec.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(sealed(content)))

    return make


def sealed(content):
    """Return the content of a spec.json with updated fingerprint and checksum."""
    inner = {key: value for key, value in content.items() if key not in ("version", "fingerprint", "checksum")}
    return {**content, "fingerprint": settings_digest(inner["fingerprint_fields"]), "checksum": settings_digest(inner)}


def far_samples(directory):
    """Write sample indices that would need a table of a terabyte, and their digest into the spec and the manifest."""
    tensors = load_file(directory / "cache/samples.safetensors")
    tensors["train.indices"][-1] = 2**40
    save_file(tensors, directory / "cache/samples.safetensors")
    arrays = [tensors["train.indices"].numpy(), tensors["train.digests"].numpy().view(np.uint64)]
    digest = arrays_digest(*arrays)
    cache_spec(lambda content: content["fingerprint_fields"]["data"]["contents"].update(train=digest))(directory)
    fingerprint = json.loads((directory / "cache/spec.json").read_text())["fingerprint"]
    put("cache/manifest.json", fingerprint=fingerprint)(directory)


# datasets


def table(split="train", images=None, labels=None, **options):
    """Write a split of Parquet files."""
    images = images or [encoded(color(sample)) for sample in range(8)]
    labels = labels or [sample % 4 for sample in range(len(images))]
    return lambda directory: write_parquet(directory / "data", split, images, labels, **options)


def cells(values):
    """Write a training split whose image column has the given cells."""

    def make(directory):
        import pyarrow as pa
        import pyarrow.parquet as pq

        samples = [{"bytes": None, "path": None, **value} for value in values]
        struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {"img": pa.array(samples, struct_type), "label": pa.array([sample % 4 for sample in range(len(samples))])}
        pq.write_table(pa.table(columns), directory / "data/train-00000-of-00001.parquet")

    return make


def bomb(side=50_000):
    """Return a PNG file of about a hundred bytes that declares side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header_data = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header_data) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def folder(*paths, texts=()):
    """Write an image folder. texts: paths of text files in it."""

    def make(directory):
        write_folder(directory / "folder", paths)
        for path in texts:
            (directory / "folder" / path).write_text("not an image")

    return make


def named(**classes):
    """Replace the Parquet files by splits with the given class names."""

    def make(directory):
        for path in (directory / "data").iterdir():
            path.unlink()
        write_named(directory / "data", **classes)

    return make


# user code


def module(name, text):
    """Write a Python module into the working directory of the case, where it can be imported."""
    return write(f"{name}.py", text)
