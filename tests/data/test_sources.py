"""Sources: the same two splits wherever they lie; what cannot be read is named by sample."""

import pickle
import shutil
import sys

import datasets
import numpy as np
import pyarrow as pa
import pytest

from kd_accel.config.schema import DataConfig
from kd_accel.data.sources import EncodedImages, MemoryImages, load_splits
from kd_accel.errors import UserError
from tests.support.image_files import colour, encoded, write_folder, write_named, write_parquet


@pytest.fixture(autouse=True)
def arrow_copies(tmp_path_factory, monkeypatch):
    """Where `datasets` keeps what it read: not in the cache of whoever runs the tests."""
    directory = tmp_path_factory.mktemp("arrow")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(directory))
    return directory


@pytest.fixture
def no_network(monkeypatch):
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)


@pytest.fixture
def parquet(tmp_path):
    """Twelve training and five test images of three classes, and the settings that read them."""
    directory = tmp_path / "data"
    directory.mkdir()
    write_parquet(directory, "train", [encoded(colour(sample)) for sample in range(12)], [sample % 3 for sample in range(12)])
    write_parquet(directory, "test", [encoded(colour(sample)) for sample in range(5)], [sample % 3 for sample in range(5)])
    return directory


def config(directory, kind="parquet", **settings):
    return DataConfig(**{"source": f"{kind}:{directory}", "image_column": "img", "image_size": 16, **settings})


def test_parquet(parquet):
    train, test = load_splits(config(parquet))
    assert (train.num_samples, test.num_samples, train.label_names) == (12, 5, ("0", "1", "2"))
    assert isinstance(train, MemoryImages)
    assert train.labels.tolist() == [sample % 3 for sample in range(12)]
    for sample in (11, 0):
        assert np.array_equal(train.pixels(np.array([sample]))[0], np.asarray(colour(sample)))


def test_a_set_that_does_not_fit_is_decoded_when_asked(parquet, tmp_path):
    big = tmp_path / "big"
    big.mkdir()
    for split in ("train", "test"):
        write_parquet(big, split, [encoded(colour(sample, (700, 600))) for sample in range(3)], [0, 1, 2])
    train, _ = load_splits(config(big, image_size=600, memory_limit_mib=1))
    whole, _ = load_splits(config(big, image_size=600))
    assert isinstance(train, EncodedImages)
    assert not train.is_in_memory
    samples = np.array([2, 0, 2])
    assert np.array_equal(train.pixels(samples), whole.pixels(samples))
    assert np.array_equal(pickle.loads(pickle.dumps(train)).pixels(samples), whole.pixels(samples))  # noqa: S301  (workers do this)


def test_imagefolder(tmp_path):
    counts = {"train": 4, "test": 2}
    paths = [f"{split}/{name}/{index}.png" for split in counts for name in ("cat", "dog") for index in range(counts[split])]
    write_folder(tmp_path / "data [1]*", paths)
    train, test = load_splits(config(tmp_path / "data [1]*", "imagefolder"))
    assert (train.num_samples, test.num_samples, train.label_names) == (8, 4, ("cat", "dog"))
    reds = train.pixels(np.arange(8))[:, 0, 0, 0]
    assert sorted(reds[train.labels == 0]) == [0, 10, 20, 30]
    assert sorted(reds[train.labels == 1]) == [100, 110, 120, 130]


def test_a_folder_of_one_class(tmp_path):
    write_folder(tmp_path, ["train/cat/0.png", "train/cat/1.png", "test/cat/2.png"])
    train, test = load_splits(config(tmp_path, "imagefolder"))
    assert (train.label_names, train.num_samples, test.label_names) == (("cat",), 2, ("cat",))


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["train/cat/0.png", "train/dog/0.png", "test/cat/0.png"], "the test split has other classes than the train split"),
        (["train/cat/0.png", "train/1.png", "test/cat/0.png"], "the test split has other classes than the train split"),
        (["train/cat/0.png"], "has no split 'test' .available: train"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, paths, said):
    write_folder(tmp_path, paths)
    with pytest.raises(UserError, match=said):
        load_splits(config(tmp_path, "imagefolder"))


def test_what_lies_in_a_folder_is_named(tmp_path):
    write_folder(tmp_path, ["train/cat/0.png", "test/cat/0.png"])
    (tmp_path / "train/cat/1.png").write_text("not an image")
    with pytest.raises(
        UserError, match="sample 1 of the train split, .*train/cat/1.png, .*not an image file of a supported format"
    ):
        load_splits(config(tmp_path, "imagefolder"))
    (tmp_path / "train/metadata.csv").write_text("file_name,age\ncat/0.png,3\n")
    with pytest.raises(UserError, match="must hold train/CLASS/IMAGE files, and no metadata files"):
        load_splits(config(tmp_path, "imagefolder"))
    (tmp_path / "train/metadata.csv").unlink()
    (tmp_path / "test/cat/0.png").unlink()
    with pytest.raises(UserError, match="cannot read imagefolder:.*no data"):
        load_splits(config(tmp_path, "imagefolder"))


def test_parts_are_joined_in_the_order_of_their_names(parquet):
    for part, samples in ((2, [7, 8]), (0, [3]), (1, [])):
        write_parquet(
            parquet,
            "train",
            [encoded(colour(sample)) for sample in samples],
            [sample % 3 for sample in samples],
            label_type=pa.int64(),
        )
        (parquet / "train-00000-of-00001.parquet").rename(parquet / f"train-0000{part}-of-00003.parquet")
    train, _ = load_splits(config(parquet))
    assert train.labels.tolist() == [0, 1, 2]
    assert train.pixels(np.arange(3))[:, 0, 0, 0].tolist() == [30, 70, 80]


def test_names_of_classes_come_with_the_column(tmp_path):
    write_named(tmp_path, train=["ox", "ant"], test=["ox", "ant"])
    assert load_splits(config(tmp_path))[0].label_names == ("ox", "ant")
    write_named(tmp_path, test=["ant", "ox"])
    with pytest.raises(UserError, match="the test split has other classes than the train split; .* in the same order"):
        load_splits(config(tmp_path))


def test_the_hub_without_a_network(parquet, arrow_copies, no_network):
    """What was read once is read again, but never another revision than the one that is named."""
    load_splits(config(parquet))
    files = {split: str(parquet / f"{split}-00000-of-00001.parquet") for split in ("train", "test")}
    datasets.load_dataset("parquet", data_files=files)
    stored = next(
        path.parent for path in arrow_copies.rglob("dataset_info.json") if len(list(path.parent.glob("*.arrow"))) == 2
    )
    copy = arrow_copies / "nobody___nothing/default/0.0.0" / ("b" * 40)
    shutil.copytree(stored, copy)
    for path in copy.glob("*.arrow"):
        path.rename(copy / path.name.replace("parquet-", "nothing-"))
    for revision in ("", "@" + "b" * 40):
        train, test = load_splits(config(f"nobody/nothing{revision}", "hub"))
        assert (train.num_samples, test.num_samples) == (12, 5)
    with pytest.raises(UserError, match="the newest local copy is revision bbbb.*, not aaaa"):
        load_splits(config("nobody/nothing@" + "a" * 40, "hub"))


def test_digits():
    train, test = load_splits(DataConfig())
    assert (train.num_samples, test.num_samples, train.label_names[3]) == (1437, 360, "3")
    assert train.pixels(np.array([0])).shape == (1, 32, 32, 3)


def test_own_code():
    train, test = load_splits(DataConfig(source="import:tests.support.models:images", image_size=24))
    assert (train.num_samples, test.num_samples, train.label_names[0]) == (160, 41, "red")
    assert train.pixels(np.arange(3)).shape == (3, 24, 24, 3)


def test_digits_need_their_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install 'kd-accel.demo.'"):
        load_splits(DataConfig())


ONE = np.zeros((1, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "names", "said"),
    [
        (ONE[:0], [], ["a"], "has no samples"),
        (ONE[:, :0], [0], ["a"], "images without pixels"),
        (ONE, 0, ["a"], r"images must be uint8 .N, H, W, 3. and labels .N.; they are uint8 .1, 8, 8, 3. and \[\]"),
        (ONE, [1], ["a"], "the label of sample 0 is 1, but classes are 0..0"),
        (ONE, [0], [], "the label of sample 0 is 0, but classes are"),
        (ONE, [0.0], ["a"], "the label of sample 0 is .*0.0.*, not a whole number"),
    ],
)
def test_own_code_that_does_not_fit(monkeypatch, images, labels, names, said):
    content = {"images": images, "labels": labels, "label_names": names}
    monkeypatch.setattr("tests.support.models.images", lambda split, image_size: content)
    with pytest.raises(UserError, match=said):
        load_splits(DataConfig(source="import:tests.support.models:images"))


def test_own_code_with_other_names_per_split(monkeypatch):
    def images(split, image_size):
        return {"images": ONE, "labels": [0], "label_names": [split]}

    monkeypatch.setattr("tests.support.models.images", images)
    with pytest.raises(UserError, match="other label_names for the test split"):
        load_splits(DataConfig(source="import:tests.support.models:images"))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("import:tests.support.models", "must have the form"),
        ("import:.models:images", "must have the form"),
        ("import:tests.nowhere:images", "data.source: cannot import 'tests.nowhere'"),
        ("import:tests.support.models:nothing", "has no function 'nothing'"),
        ("import:half_a_function:f", "not valid Python .*half_a_function.py, line 1"),
    ],
)
def test_own_code_that_is_not_there(tmp_path, monkeypatch, spec, said):
    (tmp_path / "half_a_function.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=said):
        load_splits(DataConfig(source=spec))


def damaged(parquet, split="train", images=None, labels=None, **columns):
    images = images or [encoded(colour(sample)) for sample in range(3)]
    write_parquet(parquet, split, images, labels or [0, 1, 2], **columns)


def cut_image(parquet):
    damaged(parquet, images=[encoded(colour(0)), encoded(colour(1))[:40], encoded(colour(2))])


def no_bytes(parquet):
    damaged(parquet, images=[encoded(colour(0)), None, encoded(colour(2))])


@pytest.mark.parametrize(
    ("prepare", "settings", "said"),
    [
        (lambda d: None, {"source": "parquet:/nowhere/at/all"}, "directory .* not found"),
        (lambda d: None, {"test_split": "tset"}, "has no split 'tset' .available: test, train"),
        (lambda d: None, {"image_column": "image"}, "data.image_column: .* no column 'image' .available: img, label"),
        (lambda d: None, {"label_column": "fine"}, "data.label_column: .* no column 'fine'"),
        (lambda d: None, {"image_column": "label"}, "holds no images|no column"),
        (cut_image, {}, "data: sample 1 of the train split cannot be decoded"),
        (no_bytes, {}, "data: sample 1 of the train split cannot be decoded"),
        (lambda d: damaged(d, labels=[0, -1, 2]), {}, "the label of sample 1 is -1, but classes are 0 or above"),
        (lambda d: damaged(d, labels=[0, None, 2], label_type=pa.int64()), {}, "the label of sample 1 is None"),
        (
            lambda d: damaged(d, labels=[0, 2_000_000, 2]),
            {},
            "the label of sample 1 is 2000000, but classes are 0 or above, below",
        ),
        (lambda d: damaged(d, labels=["a", "b", "c"]), {}, "the label of sample 0 is 'a', not a whole number"),
        (lambda d: damaged(d, "test", labels=[0, 1, 3]), {}, "the label of sample 2 is 3, but classes are 0..2"),
        (lambda d: write_parquet(d, "test", [], []), {}, "the test split of parquet:.* has no samples"),
        (lambda d: damaged(d), {"label_column": "img"}, "holds no images"),
        (lambda d: (d / "train-00000-of-00001.parquet").write_bytes(b"PAR1"), {}, "cannot read parquet:"),
        (lambda d: None, {"source": "hub:nobody/nothing"}, "cannot reach hub:nobody/nothing"),
        (lambda d: None, {"source": "import:tests.support.models:no_images"}, "must return a mapping"),
        (lambda d: None, {"source": "import:tests.support.models:odd_images"}, "images must be uint8"),
    ],
)
def test_what_does_not_fit_is_named(parquet, no_network, prepare, settings, said):
    prepare(parquet)
    with pytest.raises(UserError, match=said) as raised:
        load_splits(config(parquet, **settings))
    assert "\n" not in str(raised.value)
