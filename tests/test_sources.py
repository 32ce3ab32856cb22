"""Sources: what kind of image there is, it becomes RGB of one size; what cannot be read is named by row."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kd_accel.config import DataConfig
from kd_accel.data.decode import MAX_PIXELS, decode
from kd_accel.data.sources import EncodedImages, MemoryImages, load_splits
from kd_accel.types import UserError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(row, size=(16, 16)):
    return Image.new("RGB", size, (row * 10 % 256, 128, 255 - row))


def write_parquet(directory, split, images, labels, image_column="img", label_column="label", label_type=None):
    cells = [{"bytes": data, "path": None} for data in images]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image_column: pa.array(cells, struct), label_column: pa.array(labels, label_type)})
    pq.write_table(table, directory / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Twelve training and five test images of three classes, and the settings that read them."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    directory = tmp_path / "data"
    directory.mkdir()
    write_parquet(directory, "train", [encoded(colour(row)) for row in range(12)], [row % 3 for row in range(12)])
    write_parquet(directory, "test", [encoded(colour(row)) for row in range(5)], [row % 3 for row in range(5)])
    return directory


def config(directory, kind="parquet", **settings):
    return DataConfig(**{"source": f"{kind}:{directory}", "image_column": "img", "image_size": 16, **settings})


def test_parquet(parquet):
    train, test = load_splits(config(parquet))
    assert (train.num_rows, test.num_rows, train.label_names) == (12, 5, ("0", "1", "2"))
    assert isinstance(train, MemoryImages)
    assert train.labels.tolist() == [row % 3 for row in range(12)]
    for row in (11, 0):
        assert np.array_equal(train.pixels(np.array([row]))[0], np.asarray(colour(row)))


def test_a_set_that_does_not_fit_is_decoded_when_asked(parquet, tmp_path):
    import pickle

    big = tmp_path / "big"
    big.mkdir()
    for split in ("train", "test"):
        write_parquet(big, split, [encoded(colour(row, (700, 600))) for row in range(3)], [0, 1, 2])
    train, _ = load_splits(config(big, image_size=600, memory_limit_mib=1))
    whole, _ = load_splits(config(big, image_size=600))
    assert isinstance(train, EncodedImages)
    assert not train.is_in_memory
    rows = np.array([2, 0, 2])
    assert np.array_equal(train.pixels(rows), whole.pixels(rows))
    assert np.array_equal(pickle.loads(pickle.dumps(train)).pixels(rows), whole.pixels(rows))  # noqa: S301  (workers do this)


def test_imagefolder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                colour(index + (100 if name == "dog" else 0)).save(folder / f"{index}.png")
    train, test = load_splits(config(tmp_path / "data", "imagefolder"))
    assert (train.num_rows, test.num_rows, train.label_names) == (8, 4, ("cat", "dog"))
    reds = train.pixels(np.arange(8))[:, 0, 0, 0]
    assert sorted(reds[train.labels == 0]) == [0, 10, 20, 30]


def test_digits():
    train, test = load_splits(DataConfig())
    assert (train.num_rows, test.num_rows, train.label_names[3]) == (1437, 360, "3")
    assert train.pixels(np.array([0])).shape == (1, 32, 32, 3)


def test_own_code():
    train, test = load_splits(DataConfig(source="import:tests.own_models:images", image_size=24))
    assert (train.num_rows, test.num_rows, train.label_names[0]) == (160, 41, "red")
    assert train.pixels(np.arange(3)).shape == (3, 24, 24, 3)


def rgb(mode, value, **info):
    image = Image.new(mode, (8, 8), value)
    image.info.update(info)
    return image


PALETTE = Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4)
DEEP = Image.fromarray(np.full((8, 8), 51 * 257, dtype=np.uint16))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(rgb("L", 77)), (77, 77, 77)),
        (encoded(rgb("1", 1)), (255, 255, 255)),
        (encoded(PALETTE), (10, 200, 30)),
        (encoded(rgb("RGBA", (200, 100, 50, 0))), (0, 0, 0)),
        (encoded(rgb("RGBA", (200, 100, 50, 255))), (200, 100, 50)),
        (encoded(rgb("LA", (90, 255))), (90, 90, 90)),
        (encoded(rgb("CMYK", (0, 0, 0, 0)), "TIFF"), (255, 255, 255)),
        (encoded(DEEP), (51, 51, 51)),
    ],
    ids=["grey", "1-bit", "palette", "transparent", "opaque", "grey-alpha", "cmyk", "16-bit"],
)
def test_every_kind_becomes_rgb(data, expected):
    assert (decode(data, 8) == np.array(expected)).all()


def test_other_sizes_are_scaled_and_cut_at_the_centre():
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (10, 0, 30, 20))
    assert (decode(encoded(wide), 10)[:, 2:-2] == np.array([0, 0, 255])).all()  # the filter reaches over the edge
    assert decode(encoded(colour(1, (3, 5))), 10).shape == (10, 10, 3)


def test_orientation_is_applied():
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 8, 4))
    exif = image.getexif()
    exif[0x0112] = 3
    turned = decode(encoded(image, exif=exif), 8)
    assert turned[7].min() == 255
    assert turned[0].max() == 0


def test_a_huge_image_is_refused():
    side = int(MAX_PIXELS**0.5) + 2
    with pytest.raises(ValueError, match="pixels are more than"):
        decode(encoded(Image.new("1", (side, side))), 8)


def damaged(parquet, split="train", images=None, labels=None, **columns):
    images = images or [encoded(colour(row)) for row in range(3)]
    write_parquet(parquet, split, images, labels or [0, 1, 2], **columns)


def cut_image(parquet):
    damaged(parquet, images=[encoded(colour(0)), encoded(colour(1))[:40], encoded(colour(2))])


def no_bytes(parquet):
    damaged(parquet, images=[encoded(colour(0)), None, encoded(colour(2))])


@pytest.mark.parametrize(
    ("prepare", "settings", "said"),
    [
        (lambda d: None, {"source": "parquet:/nowhere/at/all"}, "there is no directory"),
        (lambda d: None, {"test_split": "tset"}, "has no split 'tset' .there are: test, train"),
        (lambda d: None, {"image_column": "image"}, "data.image_column: .* no column 'image' .there are: img, label"),
        (lambda d: None, {"label_column": "fine"}, "data.label_column: .* no column 'fine'"),
        (lambda d: None, {"image_column": "label"}, "holds no images|no column"),
        (cut_image, {}, "the image in row 1 of the train split cannot be decoded"),
        (no_bytes, {}, "the image in row 1 of the train split cannot be decoded"),
        (lambda d: damaged(d, labels=[0, -1, 2]), {}, "the label in row 1 is -1, but classes are 0 or above"),
        (lambda d: damaged(d, labels=[0, None, 2], label_type=pa.int64()), {}, "the label in row 1 is None"),
        (lambda d: damaged(d, labels=["a", "b", "c"]), {}, "the label in row 0 is 'a', not a whole number"),
        (lambda d: damaged(d, "test", labels=[0, 1, 3]), {}, "the label in row 2 is 3, but classes are 0..2"),
        (lambda d: (d / "train-00000-of-00001.parquet").write_bytes(b"PAR1"), {}, "cannot read parquet:"),
        (lambda d: None, {"source": "hub:nobody/nothing"}, "cannot reach hub:nobody/nothing"),
        (lambda d: None, {"source": "import:tests.own_models:no_images"}, "must return a mapping"),
        (lambda d: None, {"source": "import:tests.own_models:odd_images"}, "images must be uint8"),
    ],
)
def test_what_does_not_fit_is_named(parquet, monkeypatch, prepare, settings, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prepare(parquet)
    with pytest.raises(UserError, match=said):
        load_splits(config(parquet, **settings))
