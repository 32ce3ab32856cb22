"""Tests of the datasets for a PyTorch DataLoader: items equal to those of a run, all kinds of source, and invalid arguments."""

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import kd_accel as kd
from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.errors import UserError
from kd_accel.io.user_code import VARIABLE
from tests.support.image_files import encoded, write_parquet

SIZE = 12
IMAGES = np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)
LABELS = [position % 3 for position in range(20)]
TRANSFORMS = {
    "none": kd.transforms.Identity(32),
    "crop": kd.transforms.Compose([kd.transforms.RandomCrop(padding=4)], image_size=32),
    "crop_flip": kd.transforms.CropFlip(32),
    "resized_crop_flip": kd.transforms.Compose(
        [kd.transforms.RandomResizedCrop(), kd.transforms.RandomHorizontalFlip()], image_size=32
    ),
    "trivial_augment": kd.transforms.Compose(
        [kd.transforms.RandomCrop(padding=4), kd.transforms.RandomHorizontalFlip(), kd.transforms.TrivialAugmentWide()],
        image_size=32,
    ),
}


class Columns:
    """Dataset of dicts with column names chosen by the user."""

    def __len__(self):
        return 20

    def __getitem__(self, position):
        return {"picture": Image.fromarray(IMAGES[position]), "kind": np.int64(LABELS[position]), "more": None}


def pairs(convert):
    return [(convert(image), label) for image, label in zip(IMAGES, LABELS, strict=True)]


def hub_dataset():
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])})
    cells = {"picture": [{"bytes": encoded(Image.fromarray(image)), "path": None} for image in IMAGES], "kind": LABELS}
    return datasets.Dataset.from_dict(cells, features=features)


@pytest.fixture(scope="module")
def digits():
    return kd.ImageDataset("digits", limit_train=40, limit_test=30)


def wrapped(source, **arguments):
    return kd.ImageDataset(source, **{"image_size": SIZE, "val_fraction": 0.2, **arguments})


def assert_item(item, images, labels):
    assert list(item) == ["image", "label", "index"]
    assert [type(item[key]) for key in item] == [torch.Tensor, int, int]
    assert item["image"].dtype == torch.uint8 and item["image"].is_contiguous()
    assert torch.equal(item["image"], torch.from_numpy(images[item["index"]]).permute(2, 0, 1))
    assert item["label"] == labels[item["index"]]


@pytest.mark.parametrize("is_parquet", [False, True])
def test_sources_equal_the_data_of_a_run(tmp_path, is_parquet):
    source, columns = "digits", {}
    if is_parquet:
        source, columns = f"parquet:{tmp_path}", {"image_column": "picture", "label_column": "kind"}
        for split in ("train", "test"):
            cells = [encoded(Image.fromarray(image)) for image in IMAGES]
            write_parquet(tmp_path, split, cells, LABELS, *columns.values())
    settings = {"image_size": SIZE, "val_fraction": 0.2, "limit_train": 15, "limit_test": 7, **columns}
    dataset, expected = kd.ImageDataset(source, **settings), load_data(DataConfig(source=source, **settings))
    assert (dataset.class_names, dataset.mean, dataset.std) == (expected.label_names, expected.mean, expected.std)
    assert len(dataset) == len(dataset.split("train")) == 15 and len(dataset.split("test")) == 7
    for split, indices in expected.splits.by_name().items():
        images = expected.test if split == "test" else expected.train
        items = list(dataset.split(split))
        assert [item["index"] for item in items] == indices.tolist()
        by_index = dict(zip(indices.tolist(), images.pixels(indices), strict=True))
        for item in items:
            assert_item(item, by_index, images.labels)
    assert torch.equal(dataset[-1]["image"], list(dataset.split("train"))[-1]["image"])


@pytest.mark.parametrize(
    ("source", "columns"),
    [
        (pairs(Image.fromarray), {}),
        (pairs(lambda image: image), {}),
        (pairs(lambda image: torch.from_numpy(image).permute(2, 0, 1)), {}),
        (TensorDataset(torch.from_numpy(IMAGES).permute(0, 3, 1, 2), torch.tensor(LABELS)), {}),
        (Subset(pairs(Image.fromarray), range(20)), {}),
        (Columns(), {"image_column": "picture", "label_column": "kind"}),
        (hub_dataset(), {"image_column": "picture", "label_column": "kind"}),
    ],
    ids=["pil", "arrays", "tensors", "tensor_dataset", "subset", "dicts", "hugging_face"],
)
def test_datasets_of_any_library_can_be_wrapped(source, columns):
    dataset = wrapped(source, test=source, **columns)
    assert (len(dataset), len(dataset.split("val")), len(dataset.split("test"))) == (16, 4, 20)
    assert dataset.class_names == (("a", "b", "c") if isinstance(source, datasets.Dataset) else ("0", "1", "2"))
    for split in ("train", "val", "test"):
        for item in dataset.split(split):
            assert_item(item, IMAGES, LABELS)
    trained_on = IMAGES[[item["index"] for item in dataset]] / 255
    assert np.allclose(dataset.mean, trained_on.mean((0, 1, 2))) and np.allclose(dataset.std, trained_on.std((0, 1, 2)))


def test_a_torchvision_dataset_is_resized_like_a_source(tmp_path):
    fake = torchvision.datasets.FakeData(size=10, image_size=(3, 20, 16), num_classes=2)
    for split in ("train", "test"):
        write_parquet(tmp_path, split, [encoded(image) for image, _ in fake], [int(label) for _, label in fake])
    expected = kd.ImageDataset(f"parquet:{tmp_path}", image_size=SIZE, image_column="img")
    dataset = wrapped(fake, val_fraction=0.1)
    assert (dataset.mean, len(dataset.split("test"))) == (expected.mean, 0)
    for item, other in zip(dataset, expected, strict=True):
        assert torch.equal(item["image"], other["image"]) and item["label"] == other["label"]


def test_settings_and_class_names_of_a_wrapped_dataset(tmp_path):
    names = ["red", "green", "blue"]
    statistics = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    dataset = wrapped(pairs(Image.fromarray), class_names=names, limit_train=5, **statistics)
    assert (dataset.class_names, len(dataset)) == (tuple(names), 5)
    assert (dataset.mean, dataset.std) == (statistics["mean"], statistics["std"])
    for folder in ("cat", "dog"):
        (tmp_path / folder).mkdir()
        Image.fromarray(IMAGES[0]).save(tmp_path / folder / "0.png")
    folder = torchvision.datasets.ImageFolder(tmp_path)
    assert wrapped(folder, val_fraction=0.0).class_names == ("cat", "dog")
    with pytest.raises(ValueError, match="^test: the classes of the test split differ from .*missing here: '0'"):
        wrapped(pairs(Image.fromarray), test=folder, val_fraction=0.0)


@pytest.mark.parametrize(
    ("labels", "settings", "names"),
    [
        (["ox", "ant", "ox"], {}, ("ant", "ox")),
        ([torch.tensor(True), torch.tensor([False]), np.bool_(True)], {}, ("False", "True")),
        ([100, np.int16(0), torch.tensor(100)], {"labels": "remap"}, ("0", "100")),
        (["ox", "ant", "ox"], {"class_names": ["cow", "ant", "ox"]}, ("cow", "ant", "ox")),
    ],
)
def test_labels_of_a_wrapped_dataset_become_class_indices(labels, settings, names):
    samples = [(IMAGE, label) for label in labels]
    dataset = wrapped(samples, test=samples[::-1], val_fraction=0.0, **settings)
    expected = [names.index(str(label.item() if hasattr(label, "item") else label)) for label in labels]
    assert dataset.class_names == names
    assert [item["label"] for item in dataset] == expected
    assert [item["label"] for item in dataset.split("test")] == expected[::-1]


def test_a_wrapped_dataset_with_gaps_between_its_labels_is_reported():
    with pytest.warns(UserWarning, match="labels: 1 of 3 classes have no training sample: '1'; set labels to remap"):
        dataset = wrapped([(IMAGE, 0), (IMAGE, 2)], val_fraction=0.0)
    assert dataset.class_names == ("0", "1", "2") and [item["label"] for item in dataset] == [0, 2]


class Unbounded(IterableDataset):
    """Dataset without positions or length."""

    def __iter__(self):
        return iter(pairs(Image.fromarray))


IMAGE = Image.fromarray(IMAGES[0])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (7, TypeError, "source: must be the name of a source or a dataset with __len__ and __getitem__, not int"),
        (Unbounded(), TypeError, "source: must be .*, not Unbounded"),
        (datasets.DatasetDict(train=hub_dataset()), TypeError, "not DatasetDict; pass its splits as source and test"),
        ([], ValueError, "source: the dataset has no items"),
        ([IMAGE], TypeError, r"source: item 0: must be a pair \(image, label\) or a dict, not Image"),
        ([(IMAGE, 0), (IMAGE, 0, 0)], TypeError, "source: item 1: must be a pair"),
        (Columns(), ValueError, "image_column: source: item 0 has no key 'image'; use one of picture, kind, more"),
        ([{"image": IMAGE}], ValueError, "label_column: source: item 0 has no key 'label'"),
        (
            [(torch.rand(3, 8, 8), 0)],
            TypeError,
            "source: item 0: the image must be a PIL image or a uint8 array or tensor, not float32 array",
        ),
        ([(IMAGES[0][..., 0], 0)], TypeError, r"source: item 0: the image must have the shape .*, not \[12, 12\]"),
        ([(IMAGES[0][..., :1], 0)], TypeError, r"not \[12, 12, 1\]"),
        ([(IMAGES[0][:0], 0)], TypeError, r"not \[0, 12, 3\]"),
        ([("image.png", 0)], TypeError, "the image must be .*, not str"),
        ([(IMAGE, torch.tensor(1.7))], ValueError, "source: the labels of the train split are floating-point numbers .*1.7"),
        ([(IMAGE, torch.tensor([0, 1]))], ValueError, "source: the labels .* are lists .multi-label. .sample 0: .0, 1..,"),
        ([(IMAGE, 0), (IMAGE, "cat")], ValueError, "of several types .sample 0: 0, sample 1: 'cat'."),
        ([(IMAGE, -1)], ValueError, "source: no sample of the train split has a label"),
        ([(IMAGE, 10**9)], ValueError, "sample 0 of the train split is 1000000000, .* below 1000000; .* set labels to remap"),
    ],
)
def test_invalid_datasets_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        wrapped(source)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("digits", {"test": []}, "test: has no effect with the source 'digits'"),
        ("digits", {"class_names": ["a"]}, "class_names: has no effect"),
        ("digits", {"transform": "crop"}, "transform: is a setting of the views; pass it to ViewDataset"),
        ("digits", {"image_column": "x"}, "image_column: has no effect"),
        ("digits", {"keep_originals": True}, "keep_originals: has no effect with digits"),
        ("digits", {"sampling": "balanced"}, "sampling: is a setting of the order; pass is_balanced to EpochBatchSampler"),
        (pairs(Image.fromarray), {"limit_test": 3}, "limit_test: has no effect without test or test_fraction; leave it out"),
        ("digits", {"limit_trian": 5}, "limit_trian: no such setting; did you mean data.limit_train"),
        ("digits", {"image_size": 0}, "image_size: 0 must be at least 1"),
        ("digit", {}, "source: 'digit' must be digits or start with one of hub:"),
        (
            pairs(Image.fromarray),
            {"test_split": "val"},
            "test_split: has no effect with a dataset; pass its splits as source and test",
        ),
        (pairs(Image.fromarray), {"test": []}, "test: the dataset has no items"),
        (pairs(Image.fromarray), {"val_fraction": 1.0}, "val_fraction: 1.0 must be at least 0 and below 1"),
        (
            pairs(Image.fromarray),
            {"class_names": ["a", "b"]},
            "source: the label of sample 2 of the train split is 2, but labels must be integers, at least 0 and below 2",
        ),
        (pairs(Image.fromarray), {"class_names": ["a", "b", "a"]}, "class_names: two classes have the same name"),
    ],
)
def test_invalid_settings_are_refused(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        wrapped(source, **arguments)


def test_images_without_labels_are_wrapped_with_class_names():
    """A loop of one's own can learn from a teacher alone."""
    dataset = wrapped([(IMAGE, -1), (IMAGE, None)], class_names=["a", "b"], val_fraction=0.0)
    assert [item["label"] for item in dataset] == [-1, -1]


def test_datasets_are_wrapped_where_no_user_code_is_allowed(monkeypatch):
    """The tests allow all user code; a program of a user does not."""
    monkeypatch.setenv(VARIABLE, "")
    assert len(wrapped(pairs(Image.fromarray))) == 16


def test_views_of_the_original_images_equal_those_of_a_run(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / "a" / f"{number}.png")
    source, transform = f"imagefolder:{tmp_path}", TRANSFORMS["resized_crop_flip"]
    run = load_data(DataConfig(source=source, transform="resized_crop_flip", val_fraction=0.0))
    expected = run.view_batch(run.splits.train, 0).images
    data = kd.ImageDataset(source, val_fraction=0.0, keep_originals=True)
    views = kd.ViewDataset(data, transform, num_views=2)
    assert [torch.equal(item["image"], image) for item, image in zip(views, expected, strict=True)] == [True] * 4
    assert (data.mean, data.module.num_views) == (run.mean, 1)
    reduced = kd.ImageDataset(source, val_fraction=0.0)
    with pytest.warns(UserWarning, match="RandomResizedCrop cuts from the images of 32 pixels .* pass keep_originals=True"):
        other = kd.ViewDataset(reduced, transform, num_views=2)
    assert not any(torch.equal(item["image"], image) for item, image in zip(other, expected, strict=True))


def test_a_crop_of_reduced_images_does_not_depend_on_memory(tmp_path):
    """Images in memory would be those of the center alone if crop_pct is below 1."""
    for split in ("train", "test"):
        write_parquet(tmp_path, split, [encoded(Image.fromarray(image)) for image in IMAGES], LABELS, image_column="image")
    everything = {"random_resized_crop": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}}
    for source in (f"parquet:{tmp_path}", "import:tests.data.test_views:noise"):
        config = DataConfig(source=source, image_size=SIZE, crop_pct=0.5, transform=everything)
        data = load_data(config)
        views = data.view_batch(data.splits.train, 0).images.permute(0, 2, 3, 1)
        assert np.array_equal(views, IMAGES[data.splits.train]), source


def noise(split, image_size):
    return pairs(lambda image: image)


def test_an_unknown_split_is_refused(digits):
    with pytest.raises(ValueError, match="name: 'validation' is not a split; use one of train, val, test"):
        digits.split("validation")


@pytest.mark.parametrize("preset", TRANSFORMS)
def test_views_equal_those_of_a_run(digits, preset):
    settings = {} if preset == "none" else {"views": 3, "view_seed": 5}
    expected = load_data(DataConfig(source="digits", transform=preset, limit_train=40, limit_test=30, **settings))
    seeds = {} if preset == "none" else {"num_views": 3, "view_seed": 5}
    views = kd.ViewDataset(digits, TRANSFORMS[preset], **seeds)
    assert (len(views), views.num_views) == (40, expected.num_views)
    for view in range(views.num_views):
        views.set_view(view)
        batch = expected.view_batch(expected.splits.train, view)
        for position, item in enumerate(views):
            assert list(item) == ["image", "label", "index", "view"]
            assert torch.equal(item["image"], batch.images[position])
            assert (item["label"], item["index"]) == (batch.labels[position], batch.index[position])
            assert type(item["view"]) is int and item["view"] == view == views.view


def test_the_view_of_an_epoch(digits):
    unlimited = kd.ViewDataset(digits, kd.transforms.Crop(32))
    repeating = kd.ViewDataset(digits, kd.transforms.Crop(32), num_views=3)
    for epoch in (0, 2, 7):
        unlimited.set_epoch(epoch)
        repeating.set_epoch(epoch)
        assert (unlimited.view, repeating.view) == (epoch, epoch % 3)


@pytest.mark.parametrize(
    "workers",
    [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}],
    ids=["in_process", "workers", "persistent_workers"],
)
def test_a_dataloader_collates_the_selected_view(digits, workers):
    views = kd.ViewDataset(digits, kd.transforms.CropFlip(32), num_views=4, view_seed=1)
    loader = DataLoader(views, batch_size=16, **workers)
    for view in (0, 3, 1):
        views.set_view(view)
        batches = list(loader)
        expected = views.module.view_batch(views.module.splits.train, view)
        images = torch.cat([batch["image"] for batch in batches])
        assert images.dtype == torch.uint8 and images.shape == (40, 3, 32, 32)
        assert torch.equal(images, expected.images)
        for key, values in (("label", expected.labels), ("index", expected.index), ("view", torch.full((40,), view))):
            collated = torch.cat([batch[key] for batch in batches])
            assert collated.dtype == torch.int64 and torch.equal(collated, values)


def test_a_dataloader_collates_images_without_views(digits):
    batches = list(DataLoader(digits, batch_size=16))
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), torch.stack([item["image"] for item in digits]))
    (batch,) = DataLoader(digits.split("test"), batch_size=30)
    assert batch["index"].tolist() == [item["index"] for item in digits.split("test")]
    assert batch["image"].shape == (30, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": [1]}, TypeError, "data: must be an ImageDataset, not list"),
        ({"transform": torchvision.transforms.ToTensor()}, TypeError, "transform: must be one of .*, not ToTensor"),
        ({"transform": kd.transforms.Crop(24)}, ValueError, "transform: image_size 24 must equal that of data .32."),
        ({"num_views": 0}, ValueError, "num_views: 0 must be at least 1, or None"),
        ({"view_seed": -1}, ValueError, "view_seed: -1 must be at least 0"),
        (
            {"transform": kd.transforms.Identity(32), "num_views": 2},
            ValueError,
            "num_views: 2 views are all equal without augmentation",
        ),
    ],
)
def test_invalid_arguments_of_a_view_dataset_are_refused(digits, arguments, error, message):
    with pytest.raises(error, match=message):
        kd.ViewDataset(**{"data": digits, "transform": kd.transforms.Crop(32), **arguments})


def test_view_and_epoch_out_of_range_are_refused(digits):
    views = kd.ViewDataset(digits, kd.transforms.Crop(32), num_views=2)
    for view in (-1, 2):
        with pytest.raises(ValueError, match=rf"view: {view} must be at least 0 and below num_views \(2\)"):
            views.set_view(view)
    with pytest.raises(ValueError, match="epoch: -1 must be at least 0"):
        views.set_epoch(-1)
    assert views.view == 0
    with pytest.raises(ValueError, match="view: -1 must be at least 0$"):
        kd.ViewDataset(digits, kd.transforms.Crop(32)).set_view(-1)


def test_an_unreadable_image_is_reported_with_its_index(tmp_path):
    cells = [encoded(Image.fromarray(image)) for image in IMAGES]
    for split in ("train", "test"):
        write_parquet(tmp_path, split, [b"damaged", *cells[1:]] if split == "train" else cells, LABELS, "image")
    with pytest.raises(UserError, match="data.source: sample 0 of the train split cannot be decoded"):
        kd.ImageDataset(f"parquet:{tmp_path}", image_size=SIZE)
