"""Inventory of images that are decoded on demand: what a start computes once and keeps, and what makes it compute again."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import xxhash
from tqdm import tqdm

from benchmarks.second_start import write_photos
from kd_accel.config.schema import DataConfig
from kd_accel.data import passes
from kd_accel.data.check import check_data
from kd_accel.data.datamodule import load_data
from kd_accel.data.encoded import EncodedImages
from kd_accel.data.inventory import Inventory, stamp_of
from kd_accel.io.home import home
from tests.support import image_files
from tests.support.in_process import train
from tests.support.launching import LAUNCH, python

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def folder(tmp_path):
    """Images of which 1 MiB holds 85: both splits are decoded on demand."""
    return image_files.write_noise(tmp_path / "images", train=50, test=45)


@pytest.fixture
def reads(monkeypatch):
    """Record the cells that are read in this process."""
    seen, read = [], EncodedImages._read

    def recorded(self, cell):
        seen.append(cell)
        return read(self, cell)

    monkeypatch.setattr(EncodedImages, "_read", recorded)
    return seen


def settings(folder, **changes):
    return DataConfig(source=f"imagefolder:{folder}", image_size=64, memory_limit_mib=1, **changes)


def found(data):
    """Return what a start determines from the images."""
    return data.fingerprint_fields(), data.fields_of_test_split(), data.mean, data.std, data.notices


def test_a_second_start_reads_no_image(folder, reads):
    first = found(load_data(settings(folder)))
    assert len(reads) == 190 + 90  # a digest of each image, and the colors of the training samples
    reads.clear()
    assert found(load_data(settings(folder))) == first
    assert not reads


@pytest.mark.slow
@pytest.mark.alone
def test_a_second_start_on_many_more_images_is_nearly_as_fast(tmp_path):
    """2 s for 99,000 more images are 0.4 s for 19,000."""
    numbers, seconds = (1_000, 20_000), {}
    for number in numbers:
        write_photos(tmp_path / str(number), train=number, test=20)
    flags = ["--data.memory_limit_mib=1", "--data.val_fraction=0", "--train.max_steps=1"]
    for turn in range(4):
        for number in numbers:
            run_dir, before = tmp_path / f"run-{number}-{turn}", processor_seconds()
            train(run_dir, f"--data.source=imagefolder:{tmp_path}/{number}", *flags, "--data.num_workers=1")
            seconds.setdefault(number, []).append(processor_seconds() - before)
    few, many = (min(seconds[number][1:]) for number in numbers)
    assert many - few < 0.4


def processor_seconds():
    """Return the processor time of this process and of those it has waited for, which other load does not lengthen."""
    return sum(os.times()[:4])


def test_a_pass_over_the_images_has_a_bar(folder, monkeypatch, capsys):
    monkeypatch.setattr(passes, "tqdm", lambda **options: tqdm(**{**options, "delay": 0}))
    check_data(settings(folder))
    shown = capsys.readouterr().err
    assert re.search(r"check train: +100%.* 100/100 ", shown) and re.search(r"check test: +100%.* 90/90 ", shown)


def test_the_digests_are_those_of_the_file_and_of_the_file_with_the_label(folder):
    images = load_data(settings(folder)).train
    files = sorted((folder / "train").rglob("*.png"))
    samples = np.arange(len(files))
    contents = [xxhash.xxh3_64_intdigest(file.read_bytes()) for file in files]
    pairs = zip(files, images.labels.tolist(), strict=True)
    labeled = [xxhash.xxh3_64_intdigest(file.read_bytes(), seed=label) for file, label in pairs]
    assert images.content_digests(samples).tolist() == contents and images.digests(samples).tolist() == labeled


def test_images_in_memory_have_the_same_digests_and_keep_nothing(folder, reads):
    on_demand = load_data(settings(folder))
    shutil.rmtree(home())
    reads.clear()
    in_memory = load_data(settings(folder).model_copy(update={"memory_limit_mib": 4096}))
    assert in_memory.train.is_in_memory and not on_demand.train.is_in_memory
    assert in_memory.fingerprint_fields() == on_demand.fingerprint_fields()
    # A file is read once, for pixels and digest.
    assert len(reads) == 190 and not home().exists()


def touch(file):
    os.utime(file, ns=(1, 1))


def rewrite(file):
    image_files.noise(np.random.default_rng(77), side=9).save(file)


@pytest.mark.parametrize("change", [touch, rewrite, lambda file: file.rename(file.with_name("900.png"))])
def test_a_changed_time_size_or_name_of_any_file_reads_the_split_again(folder, reads, change):
    load_data(settings(folder))
    reads.clear()
    change(folder / "train" / "dog" / "049.png")
    load_data(settings(folder))
    assert {cell["path"].split("/")[-3] for cell in reads} == {"train"} and len(reads) == 100 + 90


def test_bytes_that_change_under_the_same_size_and_time_are_found_by_reading_again(folder):
    before = load_data(settings(folder)).fields_of_test_split()
    file = folder / "test" / "cat" / "000.png"
    content, state = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert load_data(settings(folder)).fields_of_test_split() == before
    found_again = load_data(settings(folder), rereads=True).fields_of_test_split()
    assert found_again != before
    assert load_data(settings(folder)).fields_of_test_split() == found_again


def test_other_labels_and_other_decoding_do_not_use_the_same_files(folder, reads):
    images = load_data(settings(folder)).train
    changed = EncodedImages(
        images._column,
        1 - images.labels,
        images.label_names,
        split="train",
        decoder=images.decoder,
        roots=images._roots,
        stamp=images.stamp,
    )
    Inventory().take(changed)
    samples = np.arange(100)
    assert np.array_equal(changed.content_digests(samples), images.content_digests(samples))
    assert not np.isin(changed.digests(samples), images.digests(samples)).any()
    reads.clear()
    load_data(settings(folder).model_copy(update={"image_size": 65}))
    assert len(reads) == 90


def test_the_colors_depend_on_the_samples_alone(folder):
    whole, half = (load_data(settings(folder, limit_train=limit)) for limit in (None, 45))
    again = load_data(settings(folder, limit_train=45))
    assert whole.mean != half.mean and half.mean == again.mean


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""])
def test_a_damaged_file_is_computed_again(folder, reads, damage):
    first = found(load_data(settings(folder)))
    for file in home().rglob("*.safetensors"):
        file.write_bytes(damage(file.read_bytes()))
    reads.clear()
    assert found(load_data(settings(folder))) == first and len(reads) == 280


def test_a_renamed_file_is_not_used(folder, reads):
    load_data(settings(folder))
    one, other = sorted(home().rglob("digests-*.safetensors"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    reads.clear()
    load_data(settings(folder))
    assert len(reads) == 190


def test_a_home_that_cannot_be_written_is_a_notice(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KD_ACCEL_HOME", str(tmp_path / "file"))
    data = load_data(settings(folder))
    (notice,) = data.notices
    assert notice.startswith(f"KD_ACCEL_HOME: cannot write in {tmp_path / 'file'} (Not a directory); ")
    assert len(data.train.digests(data.splits.train)) == 90


def test_a_stamp_is_a_function_of_paths_sizes_times_and_selection(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    one, other = [tmp_path / "a", tmp_path / "b"], [tmp_path / "b", tmp_path / "a"]
    assert stamp_of(one) == stamp_of(one) != stamp_of(other)
    assert len({stamp_of(one), stamp_of(one, selection=["image"]), stamp_of(one[:1]), stamp_of([*one, tmp_path / "c"])}) == 4


def test_worker_processes_find_the_same_as_one_process(tmp_path, monkeypatch):
    folder = image_files.write_noise(tmp_path / "images", train=300, test=1, side=4)
    first = load_data(settings(folder, num_workers=2))
    shutil.rmtree(home())
    monkeypatch.setattr("kd_accel.data.passes._FEW_SAMPLES", 1000)
    alone = load_data(settings(folder))
    assert found(first) == found(alone)


def test_worker_processes_decode_into_memory(tmp_path, monkeypatch):
    folder = image_files.write_noise(tmp_path / "images", train=300, test=1, side=4)
    config = DataConfig(source=f"imagefolder:{folder}", image_size=4, num_workers=2)
    samples, parallel = np.arange(600), load_data(config).train
    monkeypatch.setattr("kd_accel.data.passes._FEW_SAMPLES", 1000)
    alone = load_data(config).train
    assert (
        np.array_equal(parallel.pixels(samples), alone.pixels(samples))
        and len(np.unique(parallel.pixels(samples), axis=0)) == 600
    )
    assert np.array_equal(parallel.digests(samples), alone.digests(samples))


@pytest.mark.slow
def test_the_ranks_of_a_launch_share_the_work_and_find_the_same(folder, tmp_path):
    """Each rank reads half of the images, and a second launch reads none."""
    launcher = [*LAUNCH, "--config_file", "launch/cpu2.yaml", "--num_processes", "2"]
    for reads in (140, 0):
        lines = python("-m", "tests.support.shared_inventory", folder, launcher=launcher).stdout.splitlines()
        ranks = [json.loads(line) for line in lines if line.startswith("{")]
        assert [rank.pop("reads") for rank in ranks] == [reads, reads]
        alone = load_data(settings(folder))
        assert (
            ranks[0]
            == ranks[1]
            == {"train": alone.fingerprint_fields(), "test": alone.fields_of_test_split(), "mean": alone.mean}
        )
        assert len(list(home().rglob("*.safetensors"))) == 3


@pytest.mark.slow
def test_ranks_with_other_files_are_refused(folder, tmp_path):
    """Each rank has a directory of its own, as on nodes with local disks, and one image differs."""
    shutil.copytree(folder, tmp_path / "other")
    image_files.noise(np.random.default_rng(1)).save(tmp_path / "other" / "train" / "cat" / "003.png")
    launcher = [*LAUNCH, "--config_file", "launch/cpu2.yaml", "--num_processes", "2"]
    lines = python("-m", "tests.support.shared_inventory", folder, tmp_path / "other", launcher=launcher).stdout.splitlines()
    assert len([line for line in lines if "read different images or labels in the train split; make the copies" in line]) == 2


@pytest.mark.slow
def test_a_file_that_one_rank_cannot_read_is_reported_by_all(folder):
    (folder / "test" / "dog" / "044.png").unlink()
    (folder / "test" / "dog" / "044.png").symlink_to("nowhere.png")
    launcher = [*LAUNCH, "--config_file", "launch/cpu2.yaml", "--num_processes", "2"]
    lines = python("-m", "tests.support.shared_inventory", folder, launcher=launcher).stdout.splitlines()
    errors = [line for line in lines if "044.png, cannot be decoded (file not found)" in line]
    assert len(errors) == 2
