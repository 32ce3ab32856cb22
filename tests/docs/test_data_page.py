"""Examples of docs/data.md: each row of its table reads small files of that layout, with the settings of the row."""

import io
import json
import re
import shlex
import tarfile
from pathlib import Path
from typing import get_args

import datasets
import numpy as np
import pytest
import sklearn.datasets  # noqa: F401  (its import takes seconds)
import torchvision  # noqa: F401
import yaml
from PIL import Image

import kd_accel
from kd_accel.config.fields import section_of
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.config.transform_schema import Preset, TransformConfig
from kd_accel.config.validation import SOURCES
from kd_accel.data.datamodule import load_data
from kd_accel.data.operations import operation_name
from tests.support.image_files import encoded

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()
TABLE = PAGE.split("\n\n")[2]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines()[2:]]
LOCAL = [row for row in ROWS if "hub:uoft-cs" not in row[2]]


def flags(row):
    return shlex.split(row[2].strip("`"))


def named_files(row):
    """Return the files of a row, and the columns of a list."""
    names, _, columns = row[1].partition(" with ")
    return re.findall(r"`([^`]+)`", names), re.findall(r"[\w.]+", columns)


def images(count, first=0):
    return [Image.fromarray(np.random.default_rng(first + n).integers(0, 256, (8, 8, 3), dtype=np.uint8)) for n in range(count)]


def write_folders(names):
    """Write ten images in each class folder that is named, and in the same folder of another class."""
    folders = {Path(name).parent.parent / label for name in names for label in ("cat", "dog")}
    for number, folder in enumerate(sorted(folders)):
        folder.mkdir(parents=True)
        for n, image in enumerate(images(10, first=10 * number)):
            image.save(folder / f"{n}.png")


def write_lists(names, columns):
    for number, name in enumerate(names):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [",".join(columns)]
        for n, image in enumerate(images(10, first=10 * number)):
            image.save(path.parent / f"{path.stem}-{n}.png")
            rows.append(
                ",".join([f"{path.stem}-{n}.png", "ox" if n % 2 else "ant", "train" if n < 6 else "test"][: len(columns)])
            )
        path.write_text("\n".join(rows) + "\n")


def dataset(number, column="image"):
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(names=["ox", "ant"])})
    cells = [{"bytes": encoded(image), "path": None} for image in images(10, first=10 * number)]
    return datasets.Dataset.from_dict({column: cells, "label": [n % 2 for n in range(10)]}, features=features)


def write_metadata(names, columns):
    for number, split in enumerate(("train", "test")):
        folder = Path(names[0]).parents[1] / split
        folder.mkdir(parents=True)
        for n, image in enumerate(images(10, first=10 * number)):
            image.save(folder / f"{n}.png")
        rows = "".join(f"{n}.png,{'ox' if n % 2 else 'ant'}\n" for n in range(10))
        (folder / "metadata.csv").write_text(f"{','.join(columns)}\n{rows}")


def write_parquet_files(names, column):
    for number, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        dataset(number, column).to_parquet(name)


def write_tars(names):
    for number, name in enumerate(names):
        Path(name).parent.mkdir(exist_ok=True)
        with tarfile.open(name, "w") as tar:
            for n, image in enumerate(images(10, first=10 * number)):
                for ending, content in (("png", encoded(image)), ("cls", str(n % 2).encode())):
                    info = tarfile.TarInfo(f"{n:04}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def write(row):
    """Write the files of a row."""
    names, columns = named_files(row)
    source = flags(row)[1]
    if "metadata.csv" in row[1]:
        write_metadata(names, columns)
    elif source.startswith("imagefolder:"):
        write_folders(names)
    elif source.startswith("csv:"):
        write_lists(names, columns)
    elif source.startswith("parquet:"):
        write_parquet_files(names, "img")
    elif source == "hub:./copy":
        files = "[{split: train, path: first.parquet}, {split: test, path: b.parquet}]"
        write_parquet_files(["copy/first.parquet", "copy/b.parquet"], "image")
        Path("copy/README.md").write_text(f"---\nconfigs: [{{config_name: default, data_files: {files}}}]\n---\n")
    elif source == "hub:./tars":
        write_tars(names)
    elif source.startswith("disk:"):
        datasets.DatasetDict({"train": dataset(0), "test": dataset(1)}).save_to_disk("saved")
    elif source.startswith("import:"):
        (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        Path(names[0]).write_text(code)


@pytest.mark.parametrize("row", LOCAL, ids=lambda row: row[0])
def test_an_example_is_read(tmp_path, monkeypatch, row):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    write(row)
    config, _ = parse_config(RunConfig, flags(row))
    data = load_data(config.data)
    sizes = {split: len(samples) for split, samples in data.splits.by_name().items()}
    assert len(data.label_names) > 1 and min(sizes.values()) > 0
    assert data.val is data.train or "validation" in row[0]


def test_each_kind_of_source_has_an_example():
    kinds = {flags(row)[1].partition(":")[0] + ":" for row in ROWS}
    assert kinds == {*SOURCES, "digits:"}


def transforms_section():
    return PAGE.split("## Transforms")[1].split("\n## ")[0]


def test_the_table_of_transforms_is_that_of_the_settings():
    rows = dict(
        re.findall(
            r"^\| `(\w+)` \| (.*`.*|`padding` \(required\)) \|$", transforms_section().split("| preset")[0], re.MULTILINE
        )
    )
    assert set(rows) == set(TransformConfig.model_fields)
    for name, cells in rows.items():
        documented = dict(re.findall(r"`(\w+): ([^`]+)`", cells)) | dict.fromkeys(re.findall(r"`(\w+)` \(required\)", cells))
        fields = section_of(TransformConfig.model_fields[name].annotation).model_fields
        assert set(documented) == set(fields)
        for setting, field in fields.items():
            if field.is_required():
                assert documented[setting] is None
            else:
                shown, default = yaml.safe_load(documented[setting]), field.default
                assert shown == pytest.approx(default, abs=1e-4) if isinstance(default, list) else shown == default, setting


def test_the_table_of_presets_is_complete_and_its_example_is_valid():
    assert re.findall(r"^\| `(\w+)`(?: \(default\))? \|", transforms_section().split("| preset")[1], re.MULTILINE) == list(
        get_args(Preset)
    )
    example = yaml.safe_load(re.search(r"```yaml\n(.*?)```", transforms_section(), re.DOTALL)[1])
    config, _ = parse_config(RunConfig, [f"--data.transform={json.dumps(example['data']['transform'])}"])
    assert [name for name, _ in config.data.transform.items()] == [
        "random_resized_crop",
        "random_horizontal_flip",
        "random_erasing",
    ]
    python = re.search(r"`(kd\.transforms\.Compose.*)`", transforms_section())[1]
    names = [operation_name(operation) for operation in eval(python, {"kd": kd_accel}).operations]  # noqa: S307
    assert names == ["random_crop", "random_erasing"]
