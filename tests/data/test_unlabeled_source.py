"""A second source of training images without labels: reading, indices, order, turns, notices and errors."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch

import kd_accel as kd
from kd_accel.config.schema import DataConfig
from kd_accel.data.check import check_data
from kd_accel.data.datamodule import images_on, load_data
from kd_accel.data.held_out import load_held_out
from kd_accel.data.loader import epoch_order
from kd_accel.data.unlabeled import UNLABELED_OFFSET, Turns, sample_name
from kd_accel.errors import UnreadableImage, UserError
from tests.support.image_files import color, encoded, write_folder, write_noise, write_parquet

LABELED = {"source": "import:tests.support.models:images", "image_size": 8, "transform": "crop_flip", "view_seed": 5}
UNLABELED = {"unlabeled": "import:tests.support.models:unlabeled_images", "unlabeled_split": "val"}


def load(**settings):
    return load_data(DataConfig(**LABELED, **settings))


@pytest.fixture(scope="module")
def labeled():
    return load()


@pytest.fixture(scope="module")
def joined():
    return load(**UNLABELED)


def epoch_indices(data, epoch, **settings):
    return [batch.index.tolist() for step in data.train_loader(batch_size=8, **settings).epoch(epoch) for batch in step]


def test_the_unlabeled_samples_are_a_split_of_their_own(labeled, joined):
    assert [len(samples) for samples in joined.splits.by_name().values()] == [144, 16, 41, 24]
    for split, samples in labeled.splits.by_name().items():
        assert np.array_equal(samples, joined.splits.by_name()[split])
    assert (joined.mean, joined.std, joined.label_names) == (labeled.mean, labeled.std, labeled.label_names)
    assert np.array_equal(joined.training_samples, [*labeled.splits.train, *UNLABELED_OFFSET + np.arange(24)])
    assert joined.epoch_samples == 168 and joined.has_unlabeled and not labeled.has_unlabeled
    assert len(joined.unlabeled_samples) == 0


def test_views_and_order_of_the_labeled_samples_do_not_change(labeled, joined):
    samples = labeled.splits.train[:7]
    assert torch.equal(joined.view_batch(samples, 2).images, labeled.view_batch(samples, 2).images)
    for epoch in (0, 3):
        own, mixed = (epoch_order(each.splits.train, seed=1, epoch=epoch, turns=each.turns) for each in (labeled, joined))
        assert np.array_equal(mixed[mixed < UNLABELED_OFFSET], own)
        assert set(mixed[mixed >= UNLABELED_OFFSET]) == set(joined.turns.samples)


def test_views_of_unlabeled_samples_depend_on_their_number_alone(joined):
    """Neither the labeled samples nor other unlabeled ones change them, and no labeled sample shares their random numbers."""
    own = UNLABELED_OFFSET + np.array([3, 9])
    batch = joined.view_batch(np.array([own[0], 5, own[1]]), 1)
    assert batch.labels.tolist() == [-1, 1, -1]
    fewer = load(**UNLABELED, limit_train=40, unlabeled_ratio=0.1)
    assert torch.equal(batch.images[[0, 2]], fewer.view_batch(own, 1).images)
    pixels = joined.unlabeled.pixels(np.array([3, 9]))
    assert np.array_equal(joined.transform(pixels, own, 1).transpose(0, 3, 1, 2), batch.images[[0, 2]].numpy())
    assert not np.array_equal(joined.transform(pixels, np.array([3, 9]), 1), joined.transform(pixels, own, 1))


def test_batches_have_the_pixels_of_both_sources_at_any_number_of_workers(joined):
    in_workers = replace(joined, num_workers=2)
    for step, other in zip(
        joined.train_loader(batch_size=8).epoch(1), in_workers.train_loader(batch_size=8).epoch(1), strict=True
    ):
        (batch,), (expected,) = step, other
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.index, expected.index)
        assert torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.labels < 0, batch.index >= UNLABELED_OFFSET)
        for image, index in zip(batch.images, batch.index.numpy(), strict=True):
            assert torch.equal(image, joined.view_batch(np.array([index]), 1).images[0])
    in_workers.batch_loader.close()


def test_images_kept_on_a_device_give_the_same_batches(joined):
    loader, on_device = (joined.train_loader(batch_size=8) for _ in range(2))
    on_device.keep_images(images_on(torch.device("cpu"), joined))
    for (batch,), (expected,) in zip(on_device.epoch(2), loader.epoch(2), strict=True):
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.index, expected.index)


def test_ranks_and_accumulation_steps_partition_each_batch(joined):
    expected = epoch_indices(joined, 0)
    assert len(expected) == joined.train_loader(batch_size=8).steps_per_epoch == 168 // 8
    parts = [epoch_indices(joined, 0, rank=rank, world_size=2, grad_accum_steps=2) for rank in (0, 1)]
    steps = [sum((part[2 * step + half] for part in parts for half in (0, 1)), []) for step in range(len(expected))]
    assert steps == expected


def test_a_ratio_takes_disjoint_parts_in_turn():
    data = load(**UNLABELED, limit_train=40, unlabeled_ratio=0.2)
    assert data.epoch_samples == 40 + 8 and data.train_loader(batch_size=8).steps_per_epoch == 6
    epochs = [np.concatenate(epoch_indices(data, epoch)) for epoch in range(6)]
    drawn = [set(indices[indices >= UNLABELED_OFFSET]) for indices in epochs]
    assert [len(each) for each in drawn] == [8] * 6
    assert set.union(*drawn[:3]) == set(data.turns.samples) and drawn[:3] == drawn[3:]
    assert all(len(indices[indices < UNLABELED_OFFSET]) == 40 for indices in epochs)
    other = np.concatenate(epoch_indices(data, 0, seed=1))
    assert set(other[other >= UNLABELED_OFFSET]) != drawn[0]


@pytest.mark.parametrize("per_epoch", [1, 5, 7])
def test_each_sample_has_as_many_turns_as_any_other(per_epoch):
    turns = Turns(np.arange(7), per_epoch)
    counts = np.zeros(7, dtype=int)
    for epoch in range(20):
        samples = turns.at(epoch, seed=3)
        assert len(set(samples)) == per_epoch
        counts[samples] += 1
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("ratio", "count", "largest"), [(0.7, 28, 0.6), (0.001, 0, 0.6)])
def test_a_ratio_that_cannot_be_met_is_refused_with_the_largest(ratio, count, largest):
    with pytest.raises(UserError, match=f"data.unlabeled_ratio: {ratio} .* 40 .* {count} of 24 .* at most {largest}, or null"):
        load(**UNLABELED, limit_train=40, unlabeled_ratio=ratio)
    assert load(**UNLABELED, limit_train=40, unlabeled_ratio=largest).unlabeled_per_epoch == 24


def test_the_fingerprint_has_the_unlabeled_samples(labeled, joined):
    plain, fields = labeled.fingerprint_fields(), joined.fingerprint_fields()
    assert "unlabeled" not in plain and {**plain, "unlabeled": fields["unlabeled"]} == fields
    other = load(unlabeled="import:tests.support.models:unlabeled_images", unlabeled_split="test").fingerprint_fields()
    assert fields["unlabeled"]["samples"] == 24 and other["unlabeled"]["samples"] == 41
    # An image that could not be read may be replaced.
    replaced = joined.fingerprint_fields(replaceable=[UNLABELED_OFFSET + 3])
    assert replaced["digest"] == fields["digest"] and replaced["unlabeled"] != fields["unlabeled"]


def test_held_out_samples_among_the_unlabeled_ones_are_counted():
    (line,) = load(unlabeled="import:tests.support.models:unlabeled_images", unlabeled_split="test").notices
    assert line.startswith("data.unlabeled: 41 of 41 test samples are also unlabeled samples (the same image: test sample 0 = ")
    lines = load(unlabeled="import:tests.support.models:unlabeled_images", unlabeled_split="train").notices
    assert [line.partition(" (")[0] for line in lines] == [
        "data.unlabeled: 16 of 16 validation samples are also unlabeled samples"
    ]


def write_labeled(directory):
    write_noise(directory, train=12, test=4)
    return {"source": f"imagefolder:{directory}", "image_size": 8, "val_fraction": 0.25, "transform": "crop_flip"}


def flat_folder(directory):
    write_folder(directory, [f"{sample}.png" for sample in range(6)])
    return f"imagefolder:{directory}"


def nested_folder(directory):
    write_folder(directory, [f"{'abc'[sample % 3]}/2024/{sample}.png" for sample in range(6)])
    return f"imagefolder:{directory}"


def folder_of_a_split(directory):
    write_folder(directory, [*(f"train/{sample}.png" for sample in range(6)), "test/0.png"])
    return f"imagefolder:{directory}"


def parquet(directory):
    directory.mkdir()
    write_parquet(directory, "images", [encoded(color(sample)) for sample in range(6)], ["x"] * 6, image_column="image")
    return f"parquet:{directory}"


def csv(directory):
    write_folder(directory, [f"{sample}.png" for sample in range(6)])
    (directory / "all.csv").write_text("image,kind\n" + "".join(f"{sample}.png,{sample}\n" for sample in range(6)))
    return f"csv:{directory / 'all.csv'}"


def disk(directory):
    images = [{"bytes": encoded(color(sample)), "path": None} for sample in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["other", "classes"])})
    datasets.Dataset.from_dict({"image": images, "label": [0] * 6}, features).save_to_disk(directory)
    return f"disk:{directory}"


@pytest.mark.parametrize("write", [flat_folder, nested_folder, folder_of_a_split, parquet, csv, disk])
@pytest.mark.parametrize("memory", [4096, 0])
def test_files_of_every_kind_are_read_without_their_labels(tmp_path, own_home, monkeypatch, write, memory):
    if not memory:
        monkeypatch.setattr("kd_accel.data.source_splits.fits_in_memory", lambda samples, config: False)
    settings = write_labeled(tmp_path / "labeled")
    data = load_data(DataConfig(**settings, unlabeled=write(tmp_path / "more")))
    assert data.label_names == ("cat", "dog") and len(data.splits.unlabeled) == 6
    assert data.training_images.is_in_memory == bool(memory)
    batch = data.view_batch(data.training_samples[[0, -1, 1, -2]], 0)
    assert (batch.labels < 0).tolist() == [False, True, False, True]
    assert len(set(data.unlabeled.content_digests(np.arange(6)))) == 6


def test_views_from_the_original_images_are_joined(tmp_path):
    settings = {**write_labeled(tmp_path / "labeled"), "transform": "resized_crop_flip", "image_size": 4}
    data = load_data(DataConfig(**settings, unlabeled=flat_folder(tmp_path / "more")))
    both, one = data.view_batch(data.training_samples[[0, -1, 1]], 3), data.view_batch(data.training_samples[[-1]], 3)
    alone = load_data(DataConfig(**settings)).view_batch(data.splits.train[:2], 3)
    assert torch.equal(both.images[[0, 2]], alone.images) and torch.equal(both.images[1], one.images[0])


def test_a_split_is_named_where_the_source_has_several(tmp_path):
    settings = write_labeled(tmp_path / "labeled")
    write_folder(tmp_path / "more", ["extra/0.png", "test/0.png", "test/1.png"])
    write_folder(tmp_path / "upper", ["Extra/0.png"])
    source = f"imagefolder:{tmp_path}/more"
    with pytest.raises(UserError, match="^data.unlabeled_split: .*/more has no split 'train'; use one of extra, test"):
        load_data(DataConfig(**settings, unlabeled=source))
    for named in (
        {"unlabeled": source, "unlabeled_split": "extra"},
        {"unlabeled": f"imagefolder:{tmp_path}/upper", "unlabeled_split": "Extra"},
    ):
        assert len(load_data(DataConfig(**settings, **named)).splits.unlabeled) == 1


def test_settings_of_the_unlabeled_images_alone_are_accepted(tmp_path):
    source = parquet(tmp_path / "more")
    digits = DataConfig(source="digits", unlabeled=source, background="white", limit_train=32, limit_test=8)
    assert len(load_data(digits).splits.unlabeled) == 6
    settings = DataConfig(**LABELED, unlabeled=source, image_column="picture", mean=[0.5] * 3, std=[0.5] * 3)
    held_out = load_held_out(settings, "val", load().label_names)
    assert len(held_out.splits.val) == 16 and held_out.unlabeled is None


@pytest.mark.parametrize(
    ("unlabeled", "message"),
    [
        ("imagefolder:missing", "^data.unlabeled: directory 'missing' not found"),
        ("imagefolder:{}/empty", "^data.unlabeled: .*empty has no images; 1 file left out .files of type .txt.; use another"),
        ("parquet:missing", "^data.unlabeled: directory or file 'missing' not found"),
        ("import:tests.support.models:no_images", "^data.unlabeled: item 0 of the train split"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_by_its_setting(tmp_path, unlabeled, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.txt").write_text("x")
    with pytest.raises(UserError, match=message):
        load(unlabeled=unlabeled.format(tmp_path))


def test_folders_next_to_one_with_the_name_of_a_split_are_named(tmp_path):
    """`train` is also a class of some data sets."""
    for folder in ("bus", "train", "test"):
        (tmp_path / "more" / folder).mkdir(parents=True)
        color(1).save(tmp_path / "more" / folder / "1.png")
    data = load(unlabeled=f"imagefolder:{tmp_path}/more")
    assert len(data.splits.unlabeled) == 1
    (notice,) = data.notices
    assert f"only {tmp_path}/more/train is read, because of its name, and not 'bus' next to it" in notice


def test_files_that_are_left_out_are_counted_by_the_setting(tmp_path):
    source = flat_folder(tmp_path / "more")
    (tmp_path / "more/list.txt").write_text("x")
    assert load(unlabeled=source).notices == [f"data.unlabeled: {tmp_path}/more: 1 file left out (files of type .txt)"]


def test_an_unreadable_unlabeled_image_is_named_or_left_out(tmp_path, own_home, monkeypatch):
    settings = write_labeled(tmp_path / "labeled")
    source = flat_folder(tmp_path / "more")
    (tmp_path / "more/2.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match="^data.unlabeled: sample 2 of the unlabeled split, .*2.png, cannot"):
        load_data(DataConfig(**settings, unlabeled=source))
    monkeypatch.setattr("kd_accel.data.source_splits.fits_in_memory", lambda samples, config: False)
    data = load_data(DataConfig(**settings, unlabeled=source))
    with pytest.raises(UnreadableImage, match="^data.unlabeled: sample 2 of the unlabeled split, .*2.png, cannot") as caught:
        data.view_batch(data.training_samples, 0)
    assert caught.value.sample == UNLABELED_OFFSET + 2
    report = check_data(DataConfig(**settings, unlabeled=source))
    assert list(report.splits) == ["train", "test", "unlabeled"] and list(report.splits["unlabeled"].unreadable) == [2]
    assert report.used_samples["unlabeled"] == 5
    assert "unlabeled: 6 samples, 5 readable" in report.as_text()
    skipped = load_data(DataConfig(**settings, unlabeled=source, on_error="skip"))
    assert skipped.splits.unlabeled.tolist() == [0, 1, 3, 4, 5]
    assert skipped.fingerprint_fields()["left_out"] == {"unlabeled": [2]}
    (line,) = skipped.notices
    assert line.startswith("data.on_error: skip leaves out 1 of 6 unlabeled samples (sample 2 of the unlabeled split")
    for number in range(6):
        (tmp_path / f"more/{number}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="skip leaves out all unlabeled samples"):
        load_data(DataConfig(**settings, unlabeled=source, on_error="skip"))


def test_the_python_datasets_have_the_unlabeled_samples(joined):
    data = kd.ImageDataset(LABELED["source"], image_size=8, **UNLABELED, unlabeled_ratio=0.1)
    views = kd.ViewDataset(data, kd.transforms.CropFlip(8), view_seed=5)
    assert (len(data), len(data.split("unlabeled")), len(views)) == (144, 24, 168)
    item = views[-1]
    assert (item["label"], item["index"]) == (-1, UNLABELED_OFFSET + 23)
    assert torch.equal(item["image"], joined.view_batch(joined.training_samples[-1:], 0).images[0])
    sampler, loader = kd.EpochBatchSampler(views, batch_size=8), views.module.train_loader(batch_size=8)
    sampler.set_epoch(2)
    expected = [batch.index.tolist() for (batch,) in loader.epoch(2)]
    assert [[views[position]["index"] for position in batch] for batch in sampler] == expected
    wrapped = kd.ImageDataset([(color(sample, (8, 8)), sample % 2) for sample in range(8)], image_size=8, **UNLABELED)
    assert len(wrapped.module.splits.unlabeled) == 24
    with pytest.raises(ValueError, match="transform: MixUp and CutMix mix labeled samples alone"):
        kd.ViewDataset(data, kd.transforms.Compose([kd.transforms.MixUp()], image_size=8))
    with pytest.raises(ValueError, match="data.unlabeled: 'floppy' must start with"):
        kd.ImageDataset(LABELED["source"], image_size=8, unlabeled="floppy")


def test_messages_have_the_number_of_a_sample_in_its_own_source():
    assert (sample_name(7), sample_name(UNLABELED_OFFSET + 7)) == ("7", "7 of data.unlabeled")
