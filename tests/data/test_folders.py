"""Image folders as people have them: classes by directory, links, and files that are left out and named."""

import numpy as np
import pytest
from PIL import Image

from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.decode import FORMATS
from kd_accel.data.folders import ENDINGS
from kd_accel.data.sources import load_splits
from kd_accel.data.views import ImageDataset
from kd_accel.errors import UserError
from tests.support.image_files import color, write_folder

BOTH = ["train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png"]


def config(directory, **settings):
    return DataConfig(source=f"imagefolder:{directory}", **settings)


def load(directory, *extra, **settings):
    """Write a folder of two classes and more files, and load it."""
    write_folder(directory, [*BOTH, *extra])
    return load_splits(config(directory, **settings))


def test_the_class_is_the_first_directory_below_the_split(tmp_path):
    train, _, test = load(tmp_path, "train/cat/2023/5.png", "train/cat/2024/may/6.png")
    assert train.label_names == test.label_names == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1]
    assert train.pixels(np.arange(4))[:, 0, 0, 0].tolist() == [10, 50, 60, 120]


def test_samples_have_the_order_of_torchvision(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    train, *_ = load(
        tmp_path, "train/cat/10.png", "train/cat/a/b/0.png", "train/cat/a-b/2.png", "train/Zebra/1.png", "test/Zebra/1.png"
    )
    folder = torchvision.datasets.ImageFolder(tmp_path / "train", transform=lambda image: np.asarray(image)[0, 0, 0])
    assert train.label_names == tuple(folder.classes) == ("Zebra", "cat", "dog")
    assert list(zip(train.pixels(np.arange(6))[:, 0, 0, 0].tolist(), train.labels.tolist(), strict=True)) == list(folder)


def test_linked_class_folders_and_files_are_read(tmp_path):
    write_folder(tmp_path / "elsewhere", ["wolf/7.png", "one/8.png"])
    write_folder(tmp_path / "data", [*BOTH, "test/wolf/1.png"])
    (tmp_path / "data/train/wolf").symlink_to(tmp_path / "elsewhere/wolf")
    (tmp_path / "data/train/dog/linked.png").symlink_to(tmp_path / "elsewhere/one/8.png")
    (tmp_path / "data/train/dog/loop").symlink_to(tmp_path / "data/train/dog")
    train, *_ = load_splits(config(tmp_path / "data"))
    assert train.label_names == ("cat", "dog", "wolf")
    assert train.labels.tolist() == [0, 1, 1, 2]
    assert train.pixels(np.arange(4))[:, 0, 0, 0].tolist() == [10, 120, 80, 70]
    assert train.notices == ()


def test_underscores_make_a_class_and_archives_of_macos_do_not(tmp_path):
    train, *_ = load(tmp_path, "train/__background__/5.png", "test/__background__/5.png", "train/__MACOSX/cat/1.png")
    assert train.label_names == ("__background__", "cat", "dog")
    assert train.notices == (f"data.source: {tmp_path}/train: 1 file left out (in __MACOSX)",)


def test_left_out_files_are_counted_by_kind(tmp_path):
    write_folder(tmp_path, [*BOTH, "train/.thumbnails/1.png", "train/cat/.cache/1.png"])
    for name in ("cat/a.heic", "dog/b.HEIC", "cat/README", "cat/.DS_Store", "notes.txt"):
        (tmp_path / "train" / name).write_text("x")
    (tmp_path / "train/bird").mkdir()
    train, _, test = load_splits(config(tmp_path))
    assert train.num_samples == 2 and test.notices == ()
    assert set(train.notices) == {
        f"data.source: {tmp_path}/train: {line}"
        for line in (
            "1 file left out (files without an ending)",
            "2 files left out (files of type .heic)",
            "1 file left out (in folders whose name begins with a dot)",
            "1 file left out (outside of the class folders)",
            "2 files left out (their name, or that of a folder, begins with a dot)",
            "class folders without files left out: 'bird'",
        )
    }


def test_notices_reach_the_user(tmp_path):
    write_folder(tmp_path, BOTH)
    (tmp_path / "test/cat/a.heic").write_text("x")
    line = f"data.source: {tmp_path}/test: 1 file left out (files of type .heic)"
    assert load_data(config(tmp_path, val_fraction=0.0)).notices == [line]
    with pytest.warns(UserWarning, match="1 file left out .files of type .heic."):
        ImageDataset(f"imagefolder:{tmp_path}", val_fraction=0.0)


def test_a_class_of_which_no_file_is_read_is_refused(tmp_path):
    write_folder(tmp_path, BOTH)
    for folder in ("bird", "wolf"):
        (tmp_path / "train" / folder).mkdir()
        (tmp_path / "train" / folder / "1.heic").write_text("x")
    message = r"none of the files of the classes 'bird', 'wolf' is read; 2 files left out .files of type .heic.; convert them"
    with pytest.raises(UserError, match=message):
        load_splits(config(tmp_path))


@pytest.mark.parametrize("paths", [["train/1.png", "test/cat/1.png"], ["train/.cat/1.png", "test/cat/1.png"]])
def test_a_split_without_class_folders_is_refused(tmp_path, paths):
    write_folder(tmp_path, paths)
    with pytest.raises(
        UserError, match=r"train has no class folders with images; it must contain train/CLASS/IMAGE files; 1 file"
    ):
        load_splits(config(tmp_path))


def test_different_classes_are_named_with_escapes(tmp_path):
    write_folder(tmp_path, ["train/café/1.png", "train/dog/1.png", "test/cafe\u0301/1.png", "test/dog/1.png"])
    with pytest.raises(UserError) as refused:
        load_splits(config(tmp_path))
    assert r"(missing here: 'caf\xe9'; not expected: 'cafe\u0301')" in str(refused.value)


def test_an_empty_class_folder_of_the_test_split_is_a_class_without_samples(tmp_path):
    write_folder(tmp_path, BOTH[:3])
    (tmp_path / "test/dog").mkdir()
    *_, test = load_splits(config(tmp_path))
    assert test.label_names == ("cat", "dog") and test.labels.tolist() == [0]
    assert test.notices == (f"data.source: {tmp_path}/test: class folders without files left out: 'dog'",)


def test_avif_is_read(tmp_path):
    write_folder(tmp_path, BOTH)
    color(9).save(tmp_path / "train/cat/photo.AVIF", "AVIF", quality=100)
    train, *_ = load_splits(config(tmp_path))
    assert abs(int(train.pixels(np.array([1]))[0, 0, 0, 0]) - 90) <= 3


def test_each_format_has_its_endings():
    Image.init()
    formats = {Image.EXTENSION[ending] for ending in ENDINGS}
    assert formats <= {*FORMATS, "DIB"} and set(FORMATS) <= formats


def test_files_outside_the_directory_are_reached_by_links_only(tmp_path, monkeypatch):
    """The paths of samples are below the directory, without `..`."""
    train, *_ = load(tmp_path / "a" / ".." / "a")
    assert train.num_samples == 2
    monkeypatch.chdir(tmp_path)
    assert load_splits(config("a"))[0].num_samples == 2
