"""Small datasets of real image files on disk, for tests of sources."""

import io
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(image, kind="PNG", **options):
    """Return the bytes of an image file. kind: Pillow's name of the format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def color(sample, size=(16, 16)):
    """Return an image of one color, which depends on the sample index."""
    return Image.new("RGB", size, (sample * 10 % 256, 128, 255 - sample))


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
