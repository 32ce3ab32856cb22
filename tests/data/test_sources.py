"""Tests of image sources: images, labels and class names of each kind of source, and errors in their data and settings."""

import pickle
import shutil
import sys

import datasets
import numpy as np
import pyarrow as pa
import pytest

from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.encoded import EncodedImages
from kd_accel.data.sources import MemoryImages, load_splits
from kd_accel.errors import UserError
from tests.support.image_files import color, encoded, write_folder, write_named, write_parquet


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path_factory, monkeypatch):
    """Cache directory of `datasets` for each test, instead of the user's own."""
    directory = tmp_path_factory.mktemp("arrow")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(directory))
    return directory


@pytest.fixture
def no_network(monkeypatch):
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)


@pytest.fixture
def parquet(tmp_path):
    """Return a directory of Parquet files with twelve training and five test images of three classes."""
    directory = tmp_path / "data"
    directory.mkdir()
    write_parquet(directory, "train", [encoded(color(sample)) for sample in range(12)], [sample % 3 for sample in range(12)])
    write_parquet(directory, "test", [encoded(color(sample)) for sample in range(5)], [sample % 3 for sample in range(5)])
    return directory


def config(directory, kind="parquet", **settings):
    return DataConfig(**{"source": f"{kind}:{directory}", "image_column": "img", "image_size": 16, **settings})


def test_parquet_files(parquet):
    train, _, test = load_splits(config(parquet))
    assert (train.num_samples, test.num_samples, train.label_names) == (12, 5, ("0", "1", "2"))
    assert isinstance(train, MemoryImages)
    assert train.labels.tolist() == [sample % 3 for sample in range(12)]
    for sample in (11, 0):
        assert np.array_equal(train.pixels(np.array([sample]))[0], np.asarray(color(sample)))


def test_a_split_above_the_memory_limit_is_decoded_on_demand(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path, split, [encoded(color(sample, (700, 600))) for sample in range(3)], [0, 1, 2])
    train, *_ = load_splits(config(tmp_path, image_size=600, memory_limit_mib=1))
    decoded, *_ = load_splits(config(tmp_path, image_size=600))
    assert isinstance(train, EncodedImages)
    assert not train.is_in_memory
    samples = np.array([2, 0, 2])
    assert np.array_equal(train.pixels(samples), decoded.pixels(samples))
    # A DataLoader pickles the dataset for its workers.
    assert np.array_equal(pickle.loads(pickle.dumps(train)).pixels(samples), decoded.pixels(samples))  # noqa: S301


def test_an_image_folder(tmp_path):
    counts = {"train": 4, "test": 2}
    paths = [f"{split}/{name}/{index}.png" for split in counts for name in ("cat", "dog") for index in range(counts[split])]
    write_folder(tmp_path / "data [1]*", paths)
    train, _, test = load_splits(config(tmp_path / "data [1]*", "imagefolder"))
    assert (train.num_samples, test.num_samples, train.label_names) == (8, 4, ("cat", "dog"))
    reds = train.pixels(np.arange(8))[:, 0, 0, 0]
    assert sorted(reds[train.labels == 0]) == [0, 10, 20, 30]
    assert sorted(reds[train.labels == 1]) == [100, 110, 120, 130]


def test_an_image_folder_may_have_one_class(tmp_path):
    write_folder(tmp_path, ["train/cat/0.png", "train/cat/1.png", "test/cat/2.png"])
    train, _, test = load_splits(config(tmp_path, "imagefolder"))
    assert (train.label_names, train.num_samples, test.label_names) == (("cat",), 2, ("cat",))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            ["train/cat/0.png", "train/dog/0.png", "test/cat/0.png"],
            "^data.source: .*/test: the classes differ from those of the training split or the trained model "
            ".missing here: 'dog'.;",
        ),
        (
            ["train/cat/0.png", "test/cat/0.png", "test/dog/0.png"],
            "^data.source: .*/test: the classes differ .* .not expected: 'dog'.;",
        ),
        (
            ["train/cat/0.png"],
            "^data.test_split: imagefolder:.* has no split 'test'; use one of train; set data.test_fraction",
        ),
    ],
)
def test_image_folders_with_different_or_missing_splits_are_refused(tmp_path, paths, message):
    write_folder(tmp_path, paths)
    with pytest.raises(UserError, match=message):
        load_splits(config(tmp_path, "imagefolder"))


def test_errors_inside_an_image_folder_are_reported(tmp_path):
    write_folder(tmp_path, ["train/cat/0.png", "test/cat/0.png"])
    (tmp_path / "train/cat/1.png").write_text("not an image")
    with pytest.raises(
        UserError, match="sample 1 of the train split, .*train/cat/1.png, .*not an image file of a supported format"
    ):
        load_splits(config(tmp_path, "imagefolder"))
    (tmp_path / "train/metadata.jsonl").write_text("{}")
    with pytest.raises(UserError, match="has the file metadata.jsonl, which is not read: convert it to metadata.csv"):
        load_splits(config(tmp_path, "imagefolder"))
    (tmp_path / "train/metadata.jsonl").unlink()
    (tmp_path / "test/cat/0.png").unlink()
    with pytest.raises(UserError, match="has no class folders with images; it must contain test/CLASS/IMAGE files"):
        load_splits(config(tmp_path, "imagefolder"))


def test_parquet_shards_are_read_in_the_order_of_their_names(parquet):
    for part, samples in ((2, [7, 8]), (0, [3]), (1, [])):
        write_parquet(
            parquet,
            "train",
            [encoded(color(sample)) for sample in samples],
            [sample % 3 for sample in samples],
            label_type=pa.int64(),
        )
        (parquet / "train-00000-of-00001.parquet").rename(parquet / f"train-0000{part}-of-00003.parquet")
    train, *_ = load_splits(config(parquet))
    assert train.labels.tolist() == [0, 1, 2]
    assert train.pixels(np.arange(3))[:, 0, 0, 0].tolist() == [30, 70, 80]


def test_class_names_are_those_of_the_label_column(tmp_path):
    write_named(tmp_path, train=["ox", "ant"], test=["ox", "ant"])
    assert load_splits(config(tmp_path))[0].label_names == ("ox", "ant")
    write_named(tmp_path, test=["ant", "ox"])
    with pytest.raises(
        UserError,
        match="^data.label_column: the classes of the test split differ .*class 0 is 'ant' here and 'ox' in the",
    ):
        load_splits(config(tmp_path))


def test_hub_copies_are_read_without_network_access_but_not_another_revision(parquet, arrow_cache, no_network):
    load_splits(config(parquet))
    files = {split: str(parquet / f"{split}-00000-of-00001.parquet") for split in ("train", "test")}
    datasets.load_dataset("parquet", data_files=files)
    stored = next(path.parent for path in arrow_cache.rglob("dataset_info.json") if len(list(path.parent.glob("*.arrow"))) == 2)
    copy = arrow_cache / "nobody___nothing/default/0.0.0" / ("b" * 40)
    shutil.copytree(stored, copy)
    for path in copy.glob("*.arrow"):
        path.rename(copy / path.name.replace("parquet-", "nothing-"))
    for revision in ("", "@" + "b" * 40):
        train, _, test = load_splits(config(f"nobody/nothing{revision}", "hub"))
        assert (train.num_samples, test.num_samples) == (12, 5)
    with pytest.raises(UserError, match="the newest local copy is revision bbbb.*, not aaaa"):
        load_splits(config("nobody/nothing@" + "a" * 40, "hub"))


def test_digits_of_scikit_learn():
    train, _, test = load_splits(DataConfig())
    assert (train.num_samples, test.num_samples, train.label_names[3]) == (1437, 360, "3")
    assert train.pixels(np.array([0])).shape == (1, 32, 32, 3)


def test_user_code():
    train, _, test = load_splits(DataConfig(source="import:tests.support.models:images", image_size=24))
    assert (train.num_samples, test.num_samples, train.label_names[0]) == (160, 41, "red")
    assert train.pixels(np.arange(3)).shape == (3, 24, 24, 3)


def test_a_larger_part_of_the_digits_is_held_out():
    data = load_data(DataConfig(source="digits", test_fraction=0.4, val_fraction=0.0))
    train, test = data.splits.train, data.splits.test
    assert len(test) == 719 and len(train) == 1797 - 719 and not set(train) & set(test)
    usual = load_data(DataConfig(source="digits"))
    assert data.test is data.train and data.train.num_samples == usual.train.num_samples + usual.test.num_samples


def test_digits_without_scikit_learn_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install 'kd-accel.demo.'"):
        load_splits(DataConfig())


ONE = np.zeros((1, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (ONE[:0], [], ["a"], r"returns images \[0, 8, 8, 3\] and label_names \['a'\] for the train split; at least one sample"),
        (ONE[:, :0], [0], ["a"], r"returns images \[1, 0, 8, 3\] .*one pixel per image"),
        (ONE, [0], [], r"returns images \[1, 8, 8, 3\] and label_names \[\] .*one class are required"),
        (
            ONE,
            [0, 1],
            ["a"],
            r"returns images uint8 \[1, 8, 8, 3\] and 2 labels .*; images must be uint8 \[N, H, W, 3\] and labels",
        ),
        (ONE, [1], ["a"], "^data.source: the label of sample 0 of the train split is 1, but labels .* at least 0 and below 1,"),
        (ONE, [0.0], ["a"], r"the labels of the train split are floating-point numbers \(sample 0: 0.0\)"),
    ],
)
def test_invalid_images_and_labels_of_user_code_are_refused(monkeypatch, images, labels, names, message):
    content = {"images": images, "labels": labels, "label_names": names}
    monkeypatch.setattr("tests.support.models.images", lambda split, image_size: content)
    with pytest.raises(UserError, match=message):
        load_splits(DataConfig(source="import:tests.support.models:images"))


def test_user_code_with_different_class_names_per_split_is_refused(monkeypatch):
    def images(split, image_size):
        return {"images": ONE, "labels": [0], "label_names": [split]}

    monkeypatch.setattr("tests.support.models.images", images)
    with pytest.raises(UserError, match="^data.source: the classes of the test split differ .*missing here: 'train'"):
        load_splits(DataConfig(source="import:tests.support.models:images"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("import:tests.support.models", "must have the form"),
        ("import:.models:images", "must have the form"),
        ("import:tests.nowhere:images", "data.source: cannot import 'tests.nowhere'"),
        ("import:tests.support.models:nothing", "has no function 'nothing'"),
        ("import:half_a_function:f", "not valid Python .*half_a_function.py, line 1"),
    ],
)
def test_user_code_that_cannot_be_imported_is_refused(tmp_path, monkeypatch, spec, message):
    (tmp_path / "half_a_function.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        load_splits(DataConfig(source=spec))


def rewrite(parquet, split="train", images=None, labels=None, **columns):
    images = images or [encoded(color(sample)) for sample in range(3)]
    write_parquet(parquet, split, images, labels or [0, 1, 2], **columns)


def truncate_an_image(parquet):
    rewrite(parquet, images=[encoded(color(0)), encoded(color(1))[:40], encoded(color(2))])


def remove_an_image(parquet):
    rewrite(parquet, images=[encoded(color(0)), None, encoded(color(2))])


@pytest.mark.parametrize(
    ("prepare", "settings", "message"),
    [
        (lambda d: None, {"source": "parquet:/nowhere/at/all"}, "^data.source: directory .* not found; check the path"),
        (lambda d: None, {"test_split": "tset"}, "^data.test_split: parquet:.* has no split 'tset'; use one of test, train; "),
        (lambda d: None, {"image_column": "image"}, "^data.image_column: .* no column 'image'; use one of img, label$"),
        (lambda d: None, {"label_column": "fine"}, "^data.label_column: .* no column 'fine'"),
        (lambda d: None, {"image_column": "label"}, "^data.image_column: column 'label' .* does not contain images|no column"),
        (truncate_an_image, {}, "^data.source: sample 1 of the train split cannot be decoded"),
        (remove_an_image, {}, "^data.source: sample 1 of the train split cannot be decoded"),
        (
            lambda d: rewrite(d, labels=[0, -2, 2]),
            {},
            "^data.label_column: the label of sample 1 of the train split is -2, but labels",
        ),
        (
            lambda d: rewrite(d, labels=[0, 2_000_000, 2]),
            {},
            "the label of sample 1 of the train split is 2000000, but labels must be integers, at least 0 and below 1000000",
        ),
        (
            lambda d: rewrite(d, labels=["a", "b", "c"]),
            {},
            "the labels of the train split are strings, those of the test split are integers",
        ),
        (
            lambda d: rewrite(d, "test", labels=[0, 1, 3]),
            {},
            "the label of sample 2 of the test split is 3, but labels must be integers, at least 0 and below 3",
        ),
        (lambda d: write_parquet(d, "test", [], []), {}, "the test split of parquet:.* has no samples"),
        (lambda d: rewrite(d), {"label_column": "img"}, "the labels of the train split are dicts"),
        (
            lambda d: (d / "train-00000-of-00001.parquet").write_bytes(b"PAR1"),
            {},
            "cannot read parquet:.*; check that its files are intact$",
        ),
        (lambda d: None, {"source": "hub:nobody/nothing"}, "cannot reach hub:nobody/nothing"),
        (
            lambda d: None,
            {"source": "import:tests.support.models:no_images"},
            "data.source: item 0 of the train split: must be a pair .* not int; import:.* must return a data set",
        ),
        (lambda d: None, {"source": "import:tests.support.models:odd_images"}, "images must be uint8"),
    ],
)
def test_data_that_does_not_match_the_settings_is_refused(parquet, no_network, prepare, settings, message):
    prepare(parquet)
    with pytest.raises(UserError, match=message) as raised:
        load_splits(config(parquet, **settings))
    assert "\n" not in str(raised.value)


def test_classes_without_training_samples_are_named(tmp_path):
    """Labels from 1 on make a class 0 that no sample has."""
    for split, first in (("train", 0), ("test", 4)):
        write_parquet(tmp_path, split, [encoded(color(first + sample)) for sample in range(4)], [1, 2, 4, 4])
    assert load_data(config(tmp_path, val_fraction=0.0)).notices == [
        "data.labels: 2 of 5 classes have no training sample: '0', '3'; set data.labels to remap if only the labels that occur "
        "are classes"
    ]
    remapped = load_data(config(tmp_path, val_fraction=0.0, labels="remap"))
    assert (remapped.notices, remapped.label_names) == ([], ("1", "2", "4"))
    assert remapped.train.labels.tolist() == remapped.test.labels.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("is_named", [False, True])
def test_labels_of_user_code_become_class_indices(monkeypatch, is_named):
    names = {"label_names": ["ox", "ant"]} if is_named else {}

    def images(split, image_size):
        labels = {"train": ["ox", "ant", "ox"], "test": ["ant"] * 3}[split]
        return {"images": np.zeros((3, 8, 8, 3), dtype=np.uint8), "labels": labels, **names}

    monkeypatch.setattr("tests.support.models.images", images)
    train, _, test = load_splits(DataConfig(source="import:tests.support.models:images"))
    expected = ("ox", "ant") if is_named else ("ant", "ox")
    assert train.label_names == test.label_names == expected
    assert [expected[label] for label in train.labels] == ["ox", "ant", "ox"]
    assert [expected[label] for label in test.labels] == ["ant"] * 3


def test_remap_is_refused_where_the_source_defines_the_classes(tmp_path):
    with pytest.raises(UserError, match="^data.labels: remap has no effect, because the source defines the class names"):
        load_splits(DataConfig(labels="remap"))
    write_folder(tmp_path, ["train/3/0.png", "train/7/1.png", "test/3/2.png", "test/7/2.png"])
    with pytest.raises(UserError, match="^data.labels: remap has no effect, because the source defines the class names"):
        load_splits(config(tmp_path, "imagefolder", labels="remap"))
