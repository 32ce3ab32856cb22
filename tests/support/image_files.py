"""Small datasets of real image files on disk, for tests of sources."""

import io
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(image, kind="PNG", **options):
    """Return the bytes of an image file. kind: Pillow's name of the format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(values, depth, kind, *chunks):
    """Return the bytes of a PNG file that Pillow cannot write.

    Args:
        values: Channels of each pixel, integers [H, W, C].
        depth: Bits per channel.
        kind: Color type of the format: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGB and alpha.
        chunks: (name, content) of each chunk between header and pixels.
    """
    height, width, _ = np.shape(values)
    levels = np.asarray(values, dtype=">u2").reshape(height, -1)
    bits = np.unpackbits(levels.view(np.uint8).reshape(height, -1, 2), axis=2)[:, :, 16 - depth :]
    rows = b"".join(b"\0" + np.packbits(row.ravel()).tobytes() for row in bits)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def png_chunk(name, content):
    """Return a chunk of a PNG file with its length and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def tiff(content, size, bits, *, samples=1, sample_format=1, photometric=1, compression=1):
    """Return the bytes of a little-endian TIFF file that Pillow cannot write.

    Args:
        content: Bytes of the pixels.
        size: Width and height.
        bits: Bits per sample.
        samples: Samples per pixel.
        sample_format: 1 unsigned integer, 2 signed integer, 3 float.
        photometric: 0 gray with white as the smallest value, 1 gray, 2 RGB, 8 CIELAB.
        compression: 1 none, 8 deflate.
    """
    content = zlib.compress(content) if compression == 8 else content
    width, height = size
    # (type, count, value) by tag; 3 is a short, 4 a long. The bits of several samples precede the pixels.
    shorts = struct.pack(f"<{samples}H", *[bits] * samples)
    values = {256: width, 257: height, 259: compression, 262: photometric, 277: samples, 278: height, 279: len(content)}
    entries = {tag: (4, 1, value) for tag, value in (values | {273: 0, 339: sample_format}).items()}
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries[258] = (3, samples, bits if samples == 1 else start)
    entries[273] = (4, 1, start + len(shorts))
    directory = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + struct.pack("<I", 0) + shorts + content


def color(sample, size=(16, 16)):
    """Return an image of one color, which depends on the sample index."""
    return Image.new("RGB", size, (sample * 10 % 256, 128 + sample % 16, 255 - sample))


def write_parquet(directory, split, images, labels, image_column="img", label_column="label", label_type=None):
    """Write a split as one Parquet file. images: encoded images. label_type: Arrow type of the labels; None = inferred."""
    cells = [{"bytes": data, "path": None} for data in images]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image_column: pa.array(cells, struct), label_column: pa.array(labels, label_type)})
    pq.write_table(table, directory / f"{split}-00000-of-00001.parquet")


def write_folder(directory, paths):
    """Write images at relative paths CLASS/NUMBER.png; their red is 10 times the number, plus 100 in the class dog."""
    for path in map(Path, paths):
        (directory / path.parent).mkdir(parents=True, exist_ok=True)
        color(int(path.stem) + (10 if path.parent.name == "dog" else 0)).save(directory / path)


def write_named(directory, **names):
    """Write two images per split to Parquet files with a `ClassLabel` column. names: class names by split."""
    for split, classes in names.items():
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
        cells = {"img": [{"bytes": encoded(color(sample)), "path": None} for sample in range(2)], "label": [0, 1]}
        datasets.Dataset.from_dict(cells, features=features).to_parquet(str(directory / f"{split}.parquet"))


def write_noise(directory, *, seed=0, side=8, **images_per_class):
    """Write different PNG files of random pixels at SPLIT/CLASS/NUMBER.png, in the classes cat and dog."""
    generator = np.random.default_rng(seed)
    for split, count in images_per_class.items():
        for name in ("cat", "dog"):
            folder = Path(directory) / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise(generator, side).save(folder / f"{number:03}.png")
    return Path(directory)


def noise(generator, side=8):
    """Return an image of random pixels."""
    return Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
