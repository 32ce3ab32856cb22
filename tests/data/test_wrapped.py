"""Data sets of user code: small ones are read into memory, large ones item by item, with equal images, labels and digests."""

import io

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import Subset

import kd_accel as kd
from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.sources import load_splits
from kd_accel.errors import UserError
from tests.support.image_files import color, encoded

SIZE = 400
FEW = {"image_size": SIZE, "memory_limit_mib": 1}
COLORS = [color(sample, (8, 8)) for sample in range(6)]
LABELS = [0, 1, 2, 0, 1, 2]
SOURCE = "import:tests.support.models:images"


class Counting:
    """Data set of pairs that counts how often its items are read."""

    def __init__(self, labels=LABELS):
        self.labels, self.reads = labels, 0

    def __len__(self):
        return len(COLORS)

    def __getitem__(self, position):
        self.reads += 1
        return COLORS[position], self.labels[position]


class WithTargets(Counting):
    """Data set with its labels in `targets`, as those of torchvision."""

    targets = LABELS


def dicts():
    return [{"image": image, "label": label} for image, label in zip(COLORS, LABELS, strict=True)]


def hugging_face():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["0", "1", "2"])})
    cells = {"image": [{"bytes": encoded(image), "path": None} for image in COLORS], "label": LABELS}
    return datasets.Dataset.from_dict(cells, features=features)


def arrays():
    return {"images": np.stack(COLORS), "labels": LABELS, "label_names": ["0", "1", "2"]}


def returned(monkeypatch, content, **settings):
    """Load the splits of a user's function that returns `content`."""
    monkeypatch.setattr("tests.support.models.images", lambda split, image_size: content)
    return load_splits(DataConfig(source=SOURCE, **settings))


@pytest.mark.parametrize("content", [Counting, WithTargets, dicts, hugging_face, arrays])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_large_data_set_of_user_code_is_read_as_a_small_one(monkeypatch, content, workers):
    large, _, test = returned(monkeypatch, content(), **FEW)
    small, *_ = returned(monkeypatch, content(), image_size=SIZE)
    samples = np.array([4, 0, 4])
    assert not large.is_in_memory and not test.is_in_memory and small.is_in_memory
    assert np.array_equal(large.pixels(samples), small.pixels(samples))
    assert large.pixels(samples)[:, 0, 0, 0].tolist() == [40, 0, 40]
    assert large.labels.tolist() == small.labels.tolist() == LABELS
    assert large.label_names == small.label_names == ("0", "1", "2")
    assert np.array_equal(large.digests(samples), small.digests(samples))
    assert np.array_equal(large.content_digests(samples), small.content_digests(samples))
    data = load_data(DataConfig(source=SOURCE, **FEW, num_workers=workers, mean=[0.5] * 3, std=[0.5] * 3))
    (batch,) = data.batches("test", [(samples, 0)])
    assert batch.images[:, 0, 0, 0].tolist() == [40, 0, 40] and batch.labels.tolist() == [1, 0, 1]


def test_labels_in_targets_are_read_without_the_items(monkeypatch):
    with_targets, without = WithTargets(), Counting()
    returned(monkeypatch, with_targets, **FEW)
    returned(monkeypatch, without, **FEW)
    # The first item is read three times for each split: for its type, and twice to find random transforms.
    assert with_targets.reads == 2 * 3
    assert without.reads == 2 * (len(COLORS) + 3)


def test_python_wraps_large_data_sets_too(tmp_path):
    for number, image in enumerate(COLORS):
        (tmp_path / str(LABELS[number])).mkdir(exist_ok=True)
        image.save(tmp_path / str(LABELS[number]) / f"{number}.png")
    folder = torchvision.datasets.ImageFolder(tmp_path)
    for dataset in (folder, Subset(folder, range(6)), hugging_face()):
        large = kd.ImageDataset(dataset, test=dataset, val_fraction=0.0, **FEW)
        small = kd.ImageDataset(dataset, test=dataset, val_fraction=0.0, image_size=SIZE)
        assert not large.module.train.is_in_memory and small.module.train.is_in_memory
        assert large.class_names == ("0", "1", "2")
        assert (large.mean, large.std) == (small.mean, small.std)
        for item, other in zip(large.split("test"), small.split("test"), strict=True):
            assert torch.equal(item["image"], other["image"]) and item["label"] == other["label"]


def test_a_fraction_of_a_wrapped_data_set_is_held_out_for_the_test():
    dataset = kd.ImageDataset(Counting(), test_fraction=0.5, val_fraction=0.0)
    assert (len(dataset), len(dataset.split("test"))) == (3, 3)
    assert not {item["index"] for item in dataset} & {item["index"] for item in dataset.split("test")}
    with pytest.raises(ValueError, match="^test_fraction: has no effect with test; leave one of them out"):
        kd.ImageDataset(Counting(), test=Counting(), test_fraction=0.5)


def test_a_hugging_face_data_set_has_the_digests_of_its_files(tmp_path):
    hugging_face().to_parquet(tmp_path / "train.parquet")
    of_files, *_ = load_splits(DataConfig(source=f"parquet:{tmp_path}", test_fraction=0.1))
    wrapped = kd.ImageDataset(hugging_face()).module.train
    assert np.array_equal(wrapped.digests(np.arange(6)), of_files.digests(np.arange(6)))


def test_a_transform_of_a_hugging_face_data_set_is_applied(monkeypatch):
    def invert(batch):
        return {**batch, "image": [Image.eval(image, lambda level: 255 - level) for image in batch["image"]]}

    train, *_ = returned(monkeypatch, hugging_face().with_transform(invert))
    assert train.pixels(np.array([2]))[0, 0, 0].tolist() == [255 - level for level in COLORS[2].getpixel((0, 0))]


def test_a_memory_mapped_array_is_not_copied(tmp_path, monkeypatch):
    images = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (6, 8, 8, 3))
    images[:] = np.stack(COLORS)
    train, *_ = returned(monkeypatch, {**arrays(), "images": images}, **FEW)
    assert not train.is_in_memory
    images[3] = 77
    assert train.pixels(np.array([3]))[0, 0, 0].tolist() == [77, 77, 77]


def test_an_item_whose_label_differs_from_targets_is_refused(monkeypatch):
    train, *_ = returned(monkeypatch, WithTargets([0, 1, 2, 0, 0, 2]), **FEW)
    with pytest.raises(UserError, match="sample 4 of the train split cannot be decoded .its label is 0, but was 1 when"):
        train.pixels(np.array([4]))


def test_a_large_data_set_with_a_random_transform_is_refused(monkeypatch):
    class Random(Counting):
        def __getitem__(self, position):
            return np.random.default_rng().integers(0, 256, (8, 8, 3), dtype=np.uint8), LABELS[position]

    with pytest.raises(
        UserError, match="^data.source: item 0 of the train split has other pixels at each call; remove the random"
    ):
        returned(monkeypatch, Random(), **FEW)
    assert returned(monkeypatch, Random())[0].is_in_memory


@pytest.mark.parametrize("settings", [{}, FEW])
def test_unreadable_items_are_named_or_skipped(monkeypatch, settings):
    class Broken(WithTargets):
        def __getitem__(self, position):
            if position == 3:
                raise RuntimeError("truncated")
            return super().__getitem__(position)

    statistics = {"mean": [0.5] * 3, "std": [0.5] * 3, "val_fraction": 0.0}
    monkeypatch.setattr("tests.support.models.images", lambda split, image_size: Broken() if split == "train" else dicts())
    with pytest.raises(UserError, match="(?s)RuntimeError: truncated"):
        load_data(DataConfig(source=SOURCE, **statistics, **settings))
    data = load_data(DataConfig(source=SOURCE, on_error="skip", **statistics, **settings))
    assert data.splits.train.tolist() == [0, 1, 2, 4, 5]


def test_items_that_are_opened_but_not_decoded_are_skipped(monkeypatch):
    """A data set that returns `Image.open(path)` has a label although the file is truncated."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)

    class Lazy(Counting):
        def __getitem__(self, position):
            content = encoded(Image.fromarray(noise[position]), "JPEG")
            return Image.open(io.BytesIO(content[:1500] if position == 3 else content)), LABELS[position]

    data = load_data_of(monkeypatch, Lazy(), on_error="skip")
    assert data.splits.train.tolist() == [0, 1, 2, 4, 5] and data.train.is_in_memory
    with pytest.raises(UserError, match="cannot be read"):
        load_data_of(monkeypatch, Lazy())


def load_data_of(monkeypatch, train, **settings):
    monkeypatch.setattr("tests.support.models.images", lambda split, image_size: train if split == "train" else dicts())
    return load_data(DataConfig(source=SOURCE, mean=[0.5] * 3, std=[0.5] * 3, val_fraction=0.0, **settings))


@pytest.mark.parametrize("content", [Counting, WithTargets, dicts])
def test_labels_that_are_not_used_are_not_compared(monkeypatch, content):
    monkeypatch.setattr("tests.support.models.images", lambda split, image_size: content())
    train, *_ = load_splits(DataConfig(source=SOURCE, label_column=None, **FEW), ["a", "b", "c"])
    assert not train.is_in_memory and train.labels.tolist() == [-1] * len(COLORS)
    assert train.pixels(np.array([4, 0]))[:, 0, 0, 0].tolist() == [40, 0]


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (
            iter([]),
            {},
            "^data.source: must be a dataset with __len__ and __getitem__, not list_iterator; import:.* must return",
        ),
        ([], {}, "^data.source: the dataset has no items"),
        (
            {"train": dicts()},
            {},
            "must return for the train split a mapping with images, labels and label_names, or a data set",
        ),
        (
            [(COLORS[0], 0, 1)],
            {},
            "^data.source: item 0 of the train split: must be a pair .image, label. or a dict, not tuple",
        ),
        ([(np.zeros((8, 8, 3)), 0)], {}, "item 0 of the train split: the image must be a PIL image .*, not float64 array"),
        (
            dicts(),
            {"image_column": "img"},
            "^data.image_column: data.source: item 0 .* has no key 'img'; use one of image, label",
        ),
        (Counting(), {"label_column": "kind"}, "^data.label_column: has no effect .import:.* returns pairs, not dicts.; leave"),
        (arrays(), {"image_column": "img"}, "^data.image_column: has no effect .import:.* returns arrays, not dicts.; leave"),
        (
            hugging_face(),
            {"label_column": "kind"},
            "^data.label_column: the train split has no column 'kind'; use one of image",
        ),
        (Counting([0.5] * 6), {}, "^data.source: the labels of the train split are floating-point numbers"),
    ],
)
def test_what_a_function_must_return_is_said(monkeypatch, content, settings, message):
    with pytest.raises(UserError, match=message) as refused:
        returned(monkeypatch, content, **settings)
    assert "\n" not in str(refused.value)


def test_an_error_in_an_item_of_a_small_data_set_is_a_user_error(monkeypatch):
    class Broken(Counting):
        def __getitem__(self, position):
            raise KeyError("gone")

    with pytest.raises(UserError, match="returns a data set for the train split that cannot be read .KeyError: 'gone'.; fix"):
        returned(monkeypatch, Broken())


def test_the_splits_of_user_code_are_called_by_name(monkeypatch):
    called = []

    def images(split, image_size):
        called.append(split)
        return dicts()

    monkeypatch.setattr("tests.support.models.images", images)
    train, val, test = load_splits(DataConfig(source=SOURCE, train_split="a", val_split="b", test_split="c"))
    assert called == ["a", "c", "b"] and val is not None
    assert load_splits(DataConfig(source=SOURCE, train_split="a", test_fraction=0.5))[1] is None
    assert called[3:] == ["a"]
