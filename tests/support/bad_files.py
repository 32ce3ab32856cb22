"""Makers of bad input, each a function of the directory in which the case plays: what test_bad_inputs.py lists.

`run` there is a finished teacher, `paused` a training in the middle, `cache` a whole cache, `data` two splits of Parquet.
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
from tests.support.image_files import colour, encoded, write_folder, write_named, write_parquet
from tests.support.models import student

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{one}: &{one} [{','.join([f'*{other}'] * 9)}]\n" for other, one in zip("abcdefgh", "bcdefghi", strict=True)
)
SMALL_CARD = {"arch": "torchvision/resnet18", "stem": "imagenet", "arch_args": {}, "label_names": ["a", "b"]}
SMALL_CARD |= {"mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 32}


def write(name, content):
    """A file with this text or these bytes."""

    def make(place):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def config(text):
    return write("bad.yaml", text)


def change(name, edit):
    """A JSON file, edited as a structure: `edit` changes it in place or returns another."""

    def make(place):
        content = json.loads((place / name).read_text())
        changed = edit(content)
        (place / name).write_text(json.dumps(content if changed is None else changed))

    return make


def put(name, **values):
    return change(name, lambda content: content.update(values))


def cut(name, length=-9):
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:length])


def remove(name):
    return lambda place: (place / name).unlink()


def link(name, target):
    """`name` becomes a link to `target`, which holds what stood there, if anything did."""

    def make(place):
        if (place / name).exists():
            (place / name).rename(place / target)
        (place / name).symlink_to(place / target)

    return make


def pipe(name):
    def make(place):
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)

    return make


def sparse(name, length):
    def make(place):
        with (place / name).open("wb") as file:
            file.truncate(length)

    return make


def nested(depth):
    return "[" * depth + "]" * depth


# weights


def header(content, data=b"", length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return write("w.safetensors", (len(text) if length is None else length).to_bytes(8, "little") + text + data)


def tensor(dtype, shape, begin, end):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


def weights(edit):
    """Those of the student, edited."""

    def make(place):
        tensors = dict(student(4).state_dict())
        edit(tensors)
        save_file(tensors, place / "w.safetensors")

    return make


def pickled(name):
    return lambda place: torch.save(student(4).state_dict(), place / name)


def library_run(place):
    """A run whose model needs no own code, and whose data does."""
    model = models.resnet18(num_classes=2)
    save_file(model.state_dict(), place / "run/model.safetensors")
    put("run/model.json", **SMALL_CARD)(place)
    write("run/config.yaml", "data: {source: import:spy:f}")(place)


# checkpoints


def newest(place):
    return max((place / "paused/checkpoints").iterdir())


def state(edit):
    def make(place):
        for directory in (place / "paused/checkpoints").iterdir():
            content = json.loads((directory / "state.json").read_text())
            edit(content)
            (directory / "state.json").write_text(json.dumps(content))

    return make


def state_text(text):
    return lambda place: [path.write_text(text) for path in (place / "paused/checkpoints").glob("*/state.json")]


def checkpoint_file(name, content):
    """Bytes, or an edit of the tensors, with size and checksum to match: not an accident but a forgery."""

    def make(place):
        path = newest(place) / name
        if callable(content):
            tensors = load_file(path)
            content(tensors)
            save_file(tensors, path)
        else:
            path.write_bytes(content)
        about = json.loads((newest(place) / "state.json").read_text())
        data = path.read_bytes()
        about["files"][name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
        (newest(place) / "state.json").write_text(json.dumps(about))

    return make


# caches


def cache_spec(edit):
    """spec.json, edited, with matching fingerprint and checksum."""

    def make(place):
        path = place / "cache/spec.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(sealed(content)))

    return make


def sealed(content):
    inner = {key: value for key, value in content.items() if key not in ("version", "fingerprint", "checksum")}
    return {**content, "fingerprint": settings_digest(inner["fingerprint_fields"]), "checksum": settings_digest(inner)}


def far_samples(place):
    """Indices that would need a table of a terabyte, with a spec that has their digest."""
    tensors = load_file(place / "cache/samples.safetensors")
    tensors["train.indices"][-1] = 2**40
    save_file(tensors, place / "cache/samples.safetensors")
    arrays = [tensors["train.indices"].numpy(), tensors["train.digests"].numpy().view(np.uint64)]
    digest = arrays_digest(*arrays)
    cache_spec(lambda content: content["fingerprint_fields"]["data"]["contents"].update(train=digest))(place)
    fingerprint = json.loads((place / "cache/spec.json").read_text())["fingerprint"]
    put("cache/manifest.json", fingerprint=fingerprint)(place)


# data sets


def table(split="train", images=None, labels=None, **options):
    images = images or [encoded(colour(sample)) for sample in range(8)]
    labels = labels or [sample % 4 for sample in range(len(images))]
    return lambda place: write_parquet(place / "data", split, images, labels, **options)


def cells(values):
    """A training split whose images are these cells."""

    def make(place):
        import pyarrow as pa
        import pyarrow.parquet as pq

        samples = [{"bytes": None, "path": None, **value} for value in values]
        struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {"img": pa.array(samples, struct_type), "label": pa.array([0] * len(samples))}
        pq.write_table(pa.table(columns), place / "data/train-00000-of-00001.parquet")

    return make


def bomb(side=50_000):
    """A PNG of some dozen bytes that declares side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    about = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def folder(*paths, texts=()):
    def make(place):
        write_folder(place / "folder", paths)
        for path in texts:
            (place / "folder" / path).write_text("no image")

    return make


def named(**classes):
    def make(place):
        for path in (place / "data").iterdir():
            path.unlink()
        write_named(place / "data", **classes)

    return make


# own code


def module(name, text):
    """Python below the working directory of the case, which is where it is looked for."""
    return write(f"{name}.py", text)
