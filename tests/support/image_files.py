"""Small data sets on disk, of real image files: what the tests of sources read."""

import io
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(sample, size=(16, 16)):
    return Image.new("RGB", size, (sample * 10 % 256, 128, 255 - sample))


def write_parquet(directory, split, images, labels, image_column="img", label_column="label", label_type=None):
    cells = [{"bytes": data, "path": None} for data in images]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image_column: pa.array(cells, struct), label_column: pa.array(labels, label_type)})
    pq.write_table(table, directory / f"{split}-00000-of-00001.parquet")


def write_folder(directory, paths):
    """Images whose red is ten times their name, plus 100 for dogs."""
    for path in map(Path, paths):
        (directory / path.parent).mkdir(parents=True, exist_ok=True)
        colour(int(path.stem) + (10 if path.parent.name == "dog" else 0)).save(directory / path)


def write_named(directory, **names):
    """Two images for each split, of the classes that the column's type names."""
    for split, classes in names.items():
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
        cells = {"img": [{"bytes": encoded(colour(sample)), "path": None} for sample in range(2)], "label": [0, 1]}
        datasets.Dataset.from_dict(cells, features=features).to_parquet(str(directory / f"{split}.parquet"))
