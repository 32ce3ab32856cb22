"""The layouts in which people have their data: each kind of source from real files, small and above the memory limit."""

import io
import json
import shutil
import tarfile

import datasets
import numpy as np
import pytest

from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.encoded import EncodedImages
from kd_accel.data.sources import load_splits
from kd_accel.errors import UserError
from tests.support.image_files import color, encoded, write_folder, write_named, write_parquet

SIZE = 600


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path_factory, monkeypatch):
    """Cache directory of `datasets` for each test, and no network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("arrow")))
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)


def load(source, **settings):
    return load_splits(DataConfig(**{"source": source, "image_size": 16, **settings}))


def reds(images):
    return images.pixels(np.arange(images.num_samples))[:, 0, 0, 0].tolist()


def write_tables(directory, *names, first=0):
    """Write a Parquet file of two samples for each name; each image has another color."""
    for number, name in enumerate(names):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = [first + 2 * number, first + 2 * number + 1]
        images = [encoded(color(sample)) for sample in samples]
        write_parquet(path.parent, path.stem, images, [0, 1], image_column="image")
        (path.parent / f"{path.stem}-00000-of-00001.parquet").rename(path)


def write_image_files(directory):
    """Write five images a/0.png ... and return their names, relative to the directory."""
    names = [f"a/{number}.png" for number in range(5)]
    write_folder(directory, names)
    return names


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet", "test.parquet"],
        ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
        ["default/train/0000.parquet", "default/test/0000.parquet"],
        ["default/train-00000-of-00001.parquet", "default/test-00000-of-00001.parquet"],
        ["pets_train.parquet", "pets_test.parquet"],
        ["train/part-0-abc.snappy.parquet", "test/part-0-abc.snappy.parquet"],
    ],
)
def test_parquet_files_are_found_in_the_layouts_of_repositories(tmp_path, names):
    write_tables(tmp_path / "data [1]", *names)
    (tmp_path / "data [1]/.cache").mkdir()
    shutil.copy(tmp_path / "data [1]" / names[0], tmp_path / "data [1]/.cache/train.parquet")
    train, val, test = load(f"parquet:{tmp_path}/data [1]")
    assert (reds(train), val, reds(test)) == ([0, 10], None, [20, 30])


def test_parquet_takes_a_file_or_a_pattern(tmp_path, monkeypatch):
    write_tables(tmp_path, "a/train-0.parquet", "a/train-1.parquet", "b/all.parquet", "a/test-0.parquet")
    monkeypatch.chdir(tmp_path)
    train, _, test = load("parquet:a/t*.parquet")
    assert (reds(train), reds(test)) == ([0, 10, 20, 30], [60, 70])
    train, _, test = load("parquet:b/all.parquet", train_split="all", test_fraction=0.5)
    assert test is train and reds(train) == [40, 50]
    with pytest.raises(UserError, match="^data.source: directory or file 'a/x.*.parquet' not found; check the path"):
        load("parquet:a/x*.parquet")


def test_parquet_files_of_several_configurations_are_not_mixed(tmp_path):
    write_tables(tmp_path, "fine/train-0.parquet", "coarse/train-0.parquet", "fine/test-0.parquet")
    with pytest.raises(
        UserError,
        match=r"has files of the train split in several directories \('coarse', 'fine'\); name one of them, as parquet:",
    ):
        load(f"parquet:{tmp_path}")
    assert load(f"parquet:{tmp_path}/fine")[0].num_samples == 2


@pytest.mark.parametrize("memory_limit_mib", [1, 100])
def test_a_table_may_name_image_files_relative_to_the_data_set(tmp_path, monkeypatch, memory_limit_mib):
    names = write_image_files(tmp_path / "data")
    table = {"image": names, "label": [0, 1, 0, 1, 0]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / f"data/{split}.parquet")
    monkeypatch.chdir(tmp_path)
    train, *_ = load("parquet:data", image_size=SIZE, memory_limit_mib=memory_limit_mib)
    assert isinstance(train, EncodedImages) == (memory_limit_mib == 1)
    assert reds(train) == [0, 10, 20, 30, 40]


def test_a_changed_image_file_of_a_table_changes_the_stamp(tmp_path):
    names = write_image_files(tmp_path)
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"image": names, "label": [0, 1, 0, 1, 0]}).to_parquet(tmp_path / f"{split}.parquet")

    def stamp():
        return load(f"parquet:{tmp_path}", image_size=SIZE, memory_limit_mib=1)[0].stamp

    before = stamp()
    assert before is not None and before == stamp()
    color(9, (20, 20)).save(tmp_path / names[3])
    assert stamp() != before


@pytest.mark.parametrize("memory_limit_mib", [1, 100])
def test_a_saved_data_set(tmp_path, memory_limit_mib):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ox", "ant"])})

    def split(samples):
        cells = {"image": [color(sample) for sample in samples], "label": [sample % 2 for sample in samples]}
        return datasets.Dataset.from_dict(cells, features=features)

    datasets.DatasetDict({"train": split(range(3)), "test": split([7, 5])}).save_to_disk(tmp_path / "both")
    train, _, test = load(f"disk:{tmp_path}/both", image_size=SIZE, memory_limit_mib=memory_limit_mib)
    assert (reds(train), reds(test), test.labels.tolist()) == ([0, 10, 20], [70, 50], [1, 1])
    assert train.label_names == ("ox", "ant") and train.is_in_memory == (memory_limit_mib == 100)
    split(range(6)).save_to_disk(tmp_path / "one")
    train, _, test = load(f"disk:{tmp_path}/one", test_fraction=0.5)
    assert test is train and train.num_samples == 6
    with pytest.raises(
        UserError, match="has no split 'test'; use one of train; set data.test_fraction: 0.2 to hold out a part"
    ):
        load(f"disk:{tmp_path}/one")
    with pytest.raises(UserError, match="is not a data set of datasets' save_to_disk"):
        load(f"disk:{tmp_path}")


def test_a_local_copy_of_a_repository_through_its_loader(tmp_path, monkeypatch):
    """The README of a repository may name its files in any way, which only the loader of the Hub reads."""
    write_tables(tmp_path / "copy", "first.parquet", "second.parquet")
    files = "data_files: [{split: train, path: second.parquet}, {split: test, path: first.parquet}]"
    (tmp_path / "copy/README.md").write_text(f"---\nconfigs: [{{config_name: default, {files}}}]\n---\n")
    monkeypatch.chdir(tmp_path)
    for name in ("./copy", "copy", str(tmp_path / "copy")):
        train, _, test = load(f"hub:{name}")
        assert (reds(train), reds(test)) == ([20, 30], [0, 10])


@pytest.mark.parametrize("memory_limit_mib", [1, 100])
def test_tars_of_webdataset_through_the_loader_of_the_hub(tmp_path, memory_limit_mib):
    for split, samples in (("train", range(4)), ("test", [7, 5])):
        with tarfile.open(tmp_path / f"{split}-0000.tar", "w") as tar:
            for sample in samples:
                for ending, content in (("png", encoded(color(sample))), ("cls", str(sample % 2).encode())):
                    info = tarfile.TarInfo(f"{sample:04}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    columns = {"image_column": "png", "label_column": "cls"}
    train, _, test = load(f"hub:{tmp_path}", **columns, image_size=SIZE, memory_limit_mib=memory_limit_mib)
    assert (reds(train), train.labels.tolist(), reds(test)) == ([0, 10, 20, 30], [0, 1, 0, 1], [70, 50])


def test_a_directory_without_data_is_refused_by_the_loader_of_the_hub(tmp_path):
    with pytest.raises(UserError, match="^data.source: cannot read hub:.*; check that its files are intact"):
        load(f"hub:{tmp_path}")


@pytest.mark.parametrize("memory_limit_mib", [1, 100])
def test_a_csv_list_with_a_column_of_splits(tmp_path, monkeypatch, memory_limit_mib):
    names = write_image_files(tmp_path / "lists/images")
    rows = ["path;class;split", *(f"images/{name};{'ox' if number % 2 else 'ant'};train" for number, name in enumerate(names))]
    rows[2], rows[5] = f"{tmp_path}/lists/images/a/1.png;ox;test", rows[5].replace("train", "val")
    (tmp_path / "lists/all.csv").write_text("\ufeff" + "\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    columns = {"image_column": "path", "label_column": "class"}
    train, val, test = load("csv:lists/all.csv", **columns, image_size=SIZE, memory_limit_mib=memory_limit_mib)
    assert (reds(train), reds(val), reds(test)) == ([0, 20, 30], [40], [10])
    assert train.label_names == ("ant", "ox") and train.labels.tolist() == [0, 0, 1]
    assert train.is_in_memory == (memory_limit_mib == 100)


def test_csv_lists_of_one_split_each(tmp_path):
    names = write_image_files(tmp_path)
    for split, chosen in (("train", names[:3]), ("test", names[3:])):
        (tmp_path / f"{split}.csv").write_text("image,label\n" + "".join(f"{name},{7 + i}\n" for i, name in enumerate(chosen)))
    train, _, test = load(f"csv:{tmp_path}", labels="remap")
    assert (reds(train), train.label_names, test.labels.tolist()) == ([0, 10, 20], ("7", "8", "9"), [0, 1])
    train, _, test = load(f"csv:{tmp_path}/train.csv", labels="remap", test_fraction=0.5)
    assert test is train and train.num_samples == 3


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["2", "0", "10"], tuple(map(str, range(11))), [2, 0, 10]),
        (["007", "1", "1"], ("007", "1"), [0, 1, 1]),
        (["b", "a", ""], ("a", "b"), [1, 0, -1]),
        (["--1", "-", "5"], ("-", "--1", "5"), [1, 0, 2]),
    ],
)
def test_labels_of_a_csv_list_are_integers_if_all_are(tmp_path, labels, names, expected):
    files = write_image_files(tmp_path)
    rows = "".join(f"{name},{label}\n" for name, label in zip(files, labels, strict=False))
    (tmp_path / "train.csv").write_text(f"image,label\n{rows}")
    train, *_ = load(f"csv:{tmp_path}/train.csv", test_fraction=0.1)
    assert (train.label_names, train.labels.tolist()) == (names, expected)


def test_labels_of_a_test_list_are_names_if_those_of_the_training_list_are(tmp_path):
    files = write_image_files(tmp_path)
    for split, labels in (("train", ["1", "2", "x"]), ("test", ["2", "1"])):
        rows = "".join(f"{name},{label}\n" for name, label in zip(files, labels, strict=False))
        (tmp_path / f"{split}.csv").write_text(f"image,label\n{rows}")
    train, _, test = load(f"csv:{tmp_path}")
    assert (train.label_names, test.labels.tolist()) == (("1", "2", "x"), [1, 0])


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b"image,label\na/0.png\n", {}, "row 2 of .*all.csv has 1 values, but the header has 2; fix the row"),
        (b"file,label\na/0.png,1\n", {}, "^data.image_column: .*all.csv has no column 'image'; use one of file, label"),
        (b"image,class\na/0.png,1\n", {}, "^data.label_column: .*all.csv has no column 'label'; use one of image, class"),
        (b"image,label\na/\xff.png,1\n", {}, "cannot read .*all.csv .*it must be a CSV file, encoded as UTF-8"),
        (b"image,label\n", {}, "has no samples of the train split"),
        (b"", {}, "^data.image_column: .*all.csv has no column 'image'"),
        (b"image,label\na/9.png,1\n", {}, "sample 0 of the train split, .*a/9.png, cannot be decoded .file not found."),
        (b"image,label,split\na/0.png,1,training\n", {}, "has no split 'train'; use one of training"),
    ],
)
def test_faulty_csv_lists_are_refused(tmp_path, content, settings, message):
    write_image_files(tmp_path)
    (tmp_path / "all.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(f"csv:{tmp_path}/all.csv", test_fraction=0.5, **settings)


@pytest.mark.parametrize("location", ["nothing.csv", "empty"])
def test_a_missing_csv_list_is_refused(tmp_path, location):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="^data.source: directory (or file .* not found|.* has no CSV files); check the path"):
        load(f"csv:{tmp_path}/{location}")


def write_metadata(directory, rows, header="file_name,label"):
    (directory / "metadata.csv").write_text("\n".join([header, *rows]) + "\n")


@pytest.mark.parametrize("memory_limit_mib", [1, 100])
def test_an_image_folder_with_a_list_of_labels(tmp_path, memory_limit_mib):
    for split in ("train", "test"):
        write_folder(tmp_path / split, ["x/1.png", "2.png", "3.png"])
    write_metadata(tmp_path / "train", ["3.png,dog", "x/1.png,cat"])
    write_metadata(tmp_path / "test", ["2.png,cat", "3.png,cat", "x/1.png,dog"])
    train, _, test = load(f"imagefolder:{tmp_path}", image_size=SIZE, memory_limit_mib=memory_limit_mib)
    assert (train.label_names, train.labels.tolist(), test.labels.tolist()) == (("cat", "dog"), [1, 0], [0, 0, 1])
    assert (reds(train), reds(test)) == ([30, 10], [20, 30, 10])
    assert train.notices == (f"data.source: {tmp_path}/train: 1 file left out (not in metadata.csv)",)
    assert test.notices == ()


def test_the_label_column_of_a_list_of_labels_can_be_chosen(tmp_path):
    write_folder(tmp_path, ["1.png", "2.png", "3.png", "4.png"])
    write_metadata(tmp_path, [f"{number}.png,x,{number % 2}" for number in range(1, 5)], header="file_name,name,kind")
    train, *_ = load(f"imagefolder:{tmp_path}", label_column="kind", test_fraction=0.25)
    assert train.labels.tolist() == [1, 0, 1, 0]
    with pytest.raises(
        UserError, match="^data.label_column: .*metadata.csv has no column 'label'; use one of file_name, name, kind"
    ):
        load(f"imagefolder:{tmp_path}", test_fraction=0.25)


def test_files_that_a_list_of_labels_names_must_exist(tmp_path):
    write_folder(tmp_path, ["train/1.png", "test/1.png"])
    write_metadata(tmp_path / "train", ["1.png,cat", "../test/1.png,cat", "9.png,dog"])
    with pytest.raises(UserError, match=r"2 files of metadata.csv not found \('../test/1.png', '9.png'\); remove their rows"):
        load(f"imagefolder:{tmp_path}")


def test_a_label_column_without_a_list_of_labels_has_no_effect(tmp_path):
    write_folder(tmp_path, ["train/cat/1.png", "test/cat/1.png"])
    with pytest.raises(UserError, match="^data.label_column: has no effect .*train has no metadata.csv"):
        load(f"imagefolder:{tmp_path}", label_column="kind")


def test_class_folders_without_split_folders_are_read_with_a_fraction_for_the_test(tmp_path):
    write_folder(tmp_path, [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(5)])
    with pytest.raises(
        UserError,
        match=r"^data.train_split: .* no folder 'train', but 'cat', 'dog'; if they are the classes, set data.test_fraction",
    ):
        load(f"imagefolder:{tmp_path}")
    data = load_data(DataConfig(source=f"imagefolder:{tmp_path}", test_fraction=0.2, val_fraction=0.25))
    assert data.label_names == ("cat", "dog") and data.test is data.train
    assert {split: np.bincount(data.train.labels[samples]).tolist() for split, samples in data.splits.by_name().items()} == {
        "train": [3, 3],
        "val": [1, 1],
        "test": [1, 1],
    }


def test_the_directory_of_one_split_suggests_the_one_above(tmp_path):
    write_folder(tmp_path, [f"{split}/{name}/1.png" for split in ("train", "test") for name in ("cat", "dog")])
    with pytest.raises(UserError) as refused:
        load(f"imagefolder:{tmp_path}/train")
    assert str(refused.value).endswith(f"train/CLASS/IMAGE and test/CLASS/IMAGE files (imagefolder:{tmp_path}, perhaps)")


def test_folders_named_as_splits_are_never_classes(tmp_path):
    write_folder(tmp_path, ["training/cat/1.png", "testing/cat/2.png"])
    with pytest.raises(UserError, match="^data.train_split: .* has no split 'train'; use one of testing, training"):
        load(f"imagefolder:{tmp_path}", test_fraction=0.2)


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev"])
def test_a_split_for_validation_is_used_and_said(tmp_path, name):
    numbers = {"train": 1, name: 2, "test": 3}
    write_folder(tmp_path, [f"{split}/{label}/{numbers[split]}.png" for split in numbers for label in ("cat", "dog")])
    source, settings = f"imagefolder:{tmp_path}", {"image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    data = load_data(DataConfig(source=source, **settings))
    (notice,) = data.notices
    assert notice.startswith(f"data.val_split: {source} has the split '{name}', so it is used for validation")
    assert (data.splits.train.tolist(), data.splits.val.tolist(), reds(data.val)) == ([0, 1], [0, 1], [20, 120])
    (batch,) = data.batches("val", [(data.splits.val, 0)])
    assert batch.images[:, 0, 0, 0].tolist() == [20, 120]
    assert np.array_equal(data.covered_samples()["val"][1], data.val.digests(data.splits.val))
    named = load_data(DataConfig(source=source, val_split=name, **settings))
    assert named.notices == [] and reds(named.val) == [20, 120]
    off = load_data(DataConfig(source=source, val_split=None, val_fraction=0.5, **settings))
    assert off.notices == [] and off.val is off.train


def test_a_validation_folder_that_cannot_be_read_can_be_left_out(tmp_path):
    write_folder(tmp_path, [f"{split}/{name}/1.png" for split in ("train", "test") for name in ("cat", "dog")])
    write_folder(tmp_path, ["val/images/2.png", "val/images/3.png"])
    with pytest.raises(UserError, match=r"/val: the classes differ .* or set data.val_split to null to validate on training"):
        load(f"imagefolder:{tmp_path}")
    assert load(f"imagefolder:{tmp_path}", val_split=None)[1] is None


def test_the_splits_of_a_source_decide_what_is_held_out(tmp_path):
    names = {"train": ["ox", "ant"], "validation": ["ox", "ant"]}
    write_named(tmp_path, **names)
    source, columns = f"parquet:{tmp_path}", {"image_column": "img"}
    with pytest.raises(
        UserError,
        match="^data.test_split: .* has no split 'test'; use one of train, validation; set data.test_split: validation to test "
        "on that split, or data.test_fraction: 0.2",
    ):
        load(source, **columns)
    train, val, test = load(source, **columns, test_split="validation")
    assert val is None and test is not train
    train, val, test = load(source, **columns, test_fraction=0.5)
    assert val is not None and test is train
    with pytest.raises(UserError, match="^data.val_fraction: 0.3 has no effect, because .* has the split 'validation'"):
        load(source, **columns, test_fraction=0.5, val_fraction=0.3)
    with pytest.raises(UserError, match="^data.val_split: .* has no split 'valid'; use one of train, validation"):
        load(source, **columns, test_split="validation", val_split="valid")
    write_named(tmp_path, test=["ox", "ant"])
    train, *_ = load(source, **columns, test_fraction=0.5, val_split=None)
    assert f"data.test_fraction: the split 'test' of {source} is not used" in train.notices


def test_different_classes_of_a_table_are_named_with_escapes(tmp_path):
    write_named(tmp_path, train=["caf\u00e9", "dog"], test=["cafe\u0301", "dog"])
    with pytest.raises(UserError) as refused:
        load(f"parquet:{tmp_path}", image_column="img")
    assert r"(missing here: 'caf\xe9'; not in the training split: 'cafe\u0301')" in str(refused.value)


def test_the_stamp_of_a_list_covers_the_list(tmp_path):
    names = write_image_files(tmp_path)
    (tmp_path / "all.csv").write_text("image,label\n" + "".join(f"{name},0\n" for name in names))

    def stamp():
        return load(f"csv:{tmp_path}/all.csv", test_fraction=0.2, image_size=SIZE, memory_limit_mib=1)[0].stamp

    before = stamp()
    (tmp_path / "all.csv").write_text("image,label\n" + "".join(f"{name},10\n" for name in names))
    assert before is not None and stamp() != before


def test_json_lines_are_refused_by_name(tmp_path):
    write_folder(tmp_path, ["train/1.png", "test/1.png"])
    (tmp_path / "train/metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "label": 1}))
    with pytest.raises(UserError, match="has the file metadata.jsonl, which is not read: convert it to metadata.csv"):
        load(f"imagefolder:{tmp_path}")
