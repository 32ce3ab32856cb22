"""Caches of mixed views: outputs equal the live teacher's bit for bit, and serve exactly the training samples of the build."""

from dataclasses import replace

import pytest
import torch

import kd_accel as kd
from kd_accel.cache.differences import describe_views
from kd_accel.cache.teacher_cache import TeacherCache
from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.views import ImageDataset
from kd_accel.errors import UserError
from kd_accel.losses.targets import PCA, Identity
from kd_accel.teacher.teacher import LiveTeacher, Teacher
from tests.support.models import teacher as teacher_network

MIXING = {
    "mixup": {"random_crop": {"padding": 4}, "mixup": {"alpha": 0.8}},
    "cutmix": {"random_horizontal_flip": {}, "cutmix": {"p": 0.7}},
    "both": {"random_crop": {"padding": 4}, "cutmix": {"p": 0.5}, "mixup": {"p": 0.5}},
}
SETTINGS = (
    r"data.limit_train or data.val_fraction or data.test_fraction or data.on_error: [0-9a-f]{32} in the cache, [0-9a-f]{32} "
    r"now \(digest of the list of the training samples, among which mixup and cutmix draw\)"
)


def data_of(name="both", **settings):
    source = "import:tests.support.models:images"
    return load_data(DataConfig(**{"source": source, "transform": MIXING[name], "views": 2, "val_fraction": 0.2, **settings}))


def teacher_of():
    torch.manual_seed(0)
    return Teacher(teacher_network(4), [0.5] * 3, [0.2] * 3, ("red", "green", "blue", "olive"))


def build(directory, data, layers=()):
    return TeacherCache.build(directory, teacher_of(), data, layers=layers, dtype="float32", batch_size=32)


@pytest.mark.parametrize("name", MIXING)
def test_stored_outputs_equal_the_live_teacher(tmp_path, name):
    data, targets = data_of(name), {"layer1": Identity(), "layer2": PCA(8, images=64)}
    cache = build(tmp_path, data, targets)
    network, normalize = teacher_of().on_device(torch.device("cpu"), layers=targets, image_size=32)
    live = LiveTeacher(network, normalize, targets=targets)
    for view in (0, 1):
        for start in (0, 32, 64, 96):  # the batches of the build: the same shape, so the same bits
            indices = data.splits.train[start : start + 32]
            batch, output = data.view_batch(indices, view), cache.read(indices, view)
            assert batch.labels.dtype == torch.float32
            expected = live(batch)
            assert torch.equal(output.logits, expected.logits) and len(expected.features) == 2
            assert all(torch.equal(output.features[layer], feature) for layer, feature in expected.features.items())
    plain = replace(data, transform=replace(data.transform, operations=data.transform.unmixed))
    other = live(plain.view_batch(data.splits.train[:32], 0))
    assert not torch.allclose(other.logits, cache.read(data.splits.train[:32], 0).logits, atol=1e-2)
    (held_out,) = data.batches("test", [(data.splits.test, 0)])
    assert torch.allclose(cache.read(data.splits.test, 0, split="test").logits, live(held_out).logits, atol=1e-5)
    live.close()


def test_a_cache_of_mixed_views_serves_the_training_samples_of_its_build(tmp_path):
    data = data_of()
    cache = build(tmp_path / "mixed", data)
    views = cache.views(ImageDataset.from_module(data_of(transform="none", views=None)))
    assert views.module.transform.fingerprint_fields() == data.transform.fingerprint_fields()
    assert torch.equal(views.module.view_batch(data.splits.train, 1).images, data.view_batch(data.splits.train, 1).images)
    cache.check_data(data_of(views=1, limit_test=7))
    assert "limit_train" not in describe_views(data.transform.fingerprint_fields())
    for fewer in (data_of(limit_train=100), data_of(val_fraction=0.3), data_of(test_fraction=0.1)):
        with pytest.raises(UserError, match=f"the outputs for other data or views: .*{SETTINGS}"):
            cache.check_data(fewer)
    with pytest.raises(UserError, match=f"does not match this config: {SETTINGS}. Restore these settings, or set another"):
        build(tmp_path / "mixed", data_of(limit_train=100))
    with pytest.raises(UserError, match=SETTINGS):
        cache.views(kd.ImageDataset("import:tests.support.models:images", val_fraction=0.2, limit_train=100))
    # Without mixing, a part of the samples is enough.
    build(tmp_path / "plain", data_of(transform="crop_flip")).check_data(data_of(transform="crop_flip", limit_train=100))


def test_another_transform_is_named_without_the_partners(tmp_path):
    cache = build(tmp_path, data_of("mixup"))
    with pytest.raises(UserError, match=r"views: data.transform.mixup.alpha: 0.8 in the cache, 0.3 now. Open another"):
        cache.check_data(data_of(transform={**MIXING["mixup"], "mixup": {"alpha": 0.3}}))
    with pytest.raises(UserError, match=r"mixup.p: 1.0 in the cache, not set now. Open another"):
        cache.check_data(data_of(transform={"random_crop": {"padding": 4}}))


def test_fewer_views_are_accepted_and_more_are_added(tmp_path):
    cache = build(tmp_path, data_of())
    before = cache.read(data_of().splits.train, 1).logits
    more = build(tmp_path, data_of(views=3))
    assert (more.num_views, more.fingerprint) == (3, cache.fingerprint)
    assert torch.equal(more.read(data_of().splits.train, 1).logits, before)
    assert build(tmp_path, data_of(views=1)).num_views == 3
