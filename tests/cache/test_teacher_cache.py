"""TeacherCache, the Python interface of a cache: outputs equal the live teacher's, and errors name the argument."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from kd_accel.cache.manifest import read_spec
from kd_accel.cache.spec import spec_to_json
from kd_accel.cache.teacher_cache import TeacherCache
from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.views import ImageDataset
from kd_accel.errors import UserError
from kd_accel.losses.targets import PCA, Identity
from kd_accel.teacher.teacher import LiveTeacher, Teacher
from kd_accel.types import StagedTeacher
from tests.support.models import teacher as teacher_network

MEAN, STD = [0.5, 0.4, 0.5], [0.2, 0.3, 0.2]


def data_of(source="images", **changes):
    source = f"import:tests.support.models:{source}"
    return load_data(DataConfig(**{"source": source, "transform": "crop_flip", "views": 2, "val_fraction": 0.2, **changes}))


def teacher_of(seed=0):
    torch.manual_seed(seed)
    network = teacher_network(4)
    network.layer1[1].running_mean.uniform_(-0.1, 0.1)
    return Teacher(network, MEAN, STD, ("red", "green", "blue", "olive"))


@pytest.fixture(scope="module")
def data():
    return data_of()


@pytest.fixture(scope="module")
def built(tmp_path_factory, data):
    """Build a cache that no test changes: the raw map of layer1 and 8 channels of layer2, in float32."""
    directory = tmp_path_factory.mktemp("caches") / "cache"
    layers = {"layer1": Identity(), "layer2": PCA(8, images=64)}
    return TeacherCache.build(directory, teacher_of(), data, layers=layers, dtype="float32", batch_size=32)


def live_of(cache, data, layers=("layer1", "layer2")):
    network, normalize = teacher_of().on_device(torch.device("cpu"), layers=layers, image_size=32)
    targets = {"layer1": Identity(), "layer2": PCA(8, images=64)}
    cache._cache.load_targets(targets)
    return LiveTeacher(network, normalize, targets=targets)


def test_reads_equal_the_live_teacher(built, data):
    live = live_of(built, data)
    indices = data.splits.train[:32]  # the first batch of the build: the same shape, so the same bits
    for view in (0, 1):
        expected = live(data.view_batch(indices, view))
        output = built.read(torch.from_numpy(indices), torch.full((32,), view))
        assert torch.equal(output.logits, expected.logits)
        assert output.features.keys() == expected.features.keys() == {"layer1", "layer2"}
        for layer, feature in expected.features.items():
            assert torch.equal(output.features[layer], feature)
            assert built.shapes[layer] == feature.shape[1:]
    order = np.random.default_rng(0).permutation(128)
    shuffled = built.read(data.splits.train[order], 1)
    assert torch.equal(shuffled.logits[np.argsort(order)[:32]], output.logits)
    live.close()


def test_a_live_teacher_reads_nothing_and_computes_its_output_in_the_second_stage(built, data):
    live = live_of(built, data)
    batch = data.view_batch(data.splits.train[:8], 1)
    assert isinstance(live, StagedTeacher) and live.fetch(batch) == ()
    output, expected = live.finish(batch, ()), live(batch)
    assert torch.equal(output.logits, expected.logits) and not output.logits.requires_grad
    for layer, feature in expected.features.items():
        assert torch.equal(output.features[layer], feature) and not output.features[layer].requires_grad
    live.close()


def test_held_out_splits_have_logits_of_plain_images(built, data):
    live = live_of(built, data)
    for split, indices in (("val", data.splits.val), ("test", data.splits.test)):
        output = built.read(indices, 0, split=split)
        (batch,) = data.batches(split, [(indices, 0)])
        assert torch.allclose(output.logits, live(batch).logits, atol=1e-5) and output.features == {}
    live.close()


def test_the_teacher_of_an_opened_cache_is_checked(built):
    assert TeacherCache.open(built.directory, teacher_of()).fingerprint == built.fingerprint
    with pytest.raises(
        UserError, match=r"another teacher: teacher.run or teacher.weights: [0-9a-f]{32} in the cache, [0-9a-f]{32} now"
    ):
        TeacherCache.open(built.directory, teacher_of(seed=1))


def test_a_teacher_that_was_trained_further_has_the_outputs_of_its_new_weights(tmp_path, data):
    """The copy with fused layers that an earlier build has made is of the old weights."""
    teacher, other = teacher_of(), teacher_of(seed=1)
    TeacherCache.build(tmp_path / "before", teacher, data, batch_size=32)
    teacher.network.load_state_dict(other.network.state_dict())
    after = TeacherCache.build(tmp_path / "after", teacher, data, dtype="float32", batch_size=32)
    expected = TeacherCache.build(tmp_path / "other", other, data, dtype="float32", batch_size=32)
    assert after.fingerprint == expected.fingerprint
    indices = torch.from_numpy(data.splits.train)
    assert torch.equal(after.read(indices, 1).logits, expected.read(indices, 1).logits)


class Bent(torch.nn.Module):
    """The teacher's network with another function behind its logits, and the same state dict."""

    def __init__(self, network, function):
        super().__init__()
        self.network, self.function = network, function

    def forward(self, images):
        return self.function(self.network(images))


def bent(function):
    return Teacher(Bent(teacher_of().network, function), MEAN, STD, ("red", "green", "blue", "olive"))


def test_other_features_of_the_teacher_are_found_by_a_build(tmp_path, data):
    """Its logits are equal: the first layer is scaled up, and the next one down."""
    first, second = teacher_of(), teacher_of()
    second.network.layer1.register_forward_hook(lambda module, inputs, maps: maps * 2)
    second.network.layer2.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))
    TeacherCache.build(tmp_path, first, data, layers=["layer1"], dtype="int8", batch_size=32)
    TeacherCache.build(tmp_path, first, data, layers=["layer1"], dtype="int8", batch_size=32)
    with pytest.raises(UserError, match=r"the teacher computes other layer1 than .* for view 0 of the train samples"):
        TeacherCache.build(tmp_path, second, data, layers=["layer1"], dtype="int8", batch_size=32)


@pytest.mark.parametrize("is_complete", [True, False])
def test_other_code_of_the_teacher_is_found_by_a_build(tmp_path, data, is_complete):
    """The fingerprint has the weights, and these are equal."""
    first, second = bent(torch.nn.Identity()), bent(torch.nn.Tanh())
    assert first.fingerprint == second.fingerprint
    TeacherCache.build(tmp_path, first, data, batch_size=32)
    if not is_complete:
        next(tmp_path.glob("train/view-0001/logits-*")).unlink()
        (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"the teacher computes other logits than .* differ by .* the code of its network"):
        TeacherCache.build(tmp_path, second, data, batch_size=32)
    TeacherCache.build(tmp_path, first, data, batch_size=32).verify()


def test_logits_that_are_not_those_of_the_data_are_refused_before_anything_is_written(tmp_path, data):
    torch.manual_seed(0)
    network = teacher_network(7)
    with pytest.raises(UserError, match=r"^teacher: .* returns a tensor of shape \(2, 7\) .* set class_map of the teacher"):
        TeacherCache.build(tmp_path, Teacher(network, MEAN, STD), data)
    TeacherCache.build(tmp_path, Teacher(network, MEAN, STD, class_map=[6, 0, 1, 3]), data)


def test_sequences_of_any_type_are_the_same_teacher(tmp_path, data):
    network = teacher_of().network
    teachers = [
        Teacher(network, convert(MEAN), convert(STD), arch_args={"sizes": convert([1, 2])}) for convert in (tuple, list)
    ]
    built = TeacherCache.build(tmp_path, teachers[0], data)
    for teacher in teachers:
        assert TeacherCache.build(tmp_path, teacher, data).fingerprint == built.fingerprint
        assert TeacherCache.open(tmp_path, teacher).fingerprint == built.fingerprint


def test_a_cache_that_was_built_with_other_batches_is_another_one(tmp_path, data):
    """The last bits of its values may differ, so that a training must not be resumed from it."""
    caches = [TeacherCache.build(tmp_path / str(size), teacher_of(), data, batch_size=size) for size in (32, 16)]
    assert caches[0].fingerprint == caches[1].fingerprint
    assert caches[0]._cache.digest != caches[1]._cache.digest


def test_a_spec_without_a_part_of_the_fingerprint_is_damaged(tmp_path, data):
    TeacherCache.build(tmp_path, teacher_of(), data)
    spec = read_spec(tmp_path)
    for name in ("numerics", "teacher", "data", "views"):
        fields = {key: value for key, value in spec.fingerprint_fields.items() if key != name}
        content = spec_to_json(replace(spec, fingerprint_fields=fields))
        (tmp_path / "spec.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"spec.json is damaged .no {name}."):
            TeacherCache.open(tmp_path)


def test_views_equal_those_of_the_build(built, data):
    other = data_of(views=None, view_seed=5, transform="none", limit_train=64)
    views = built.views(ImageDataset.from_module(other))
    assert (views.num_views, views.module.transform) == (2, data.transform)
    assert np.array_equal(views.module.splits.train, other.splits.train)
    with pytest.raises(UserError, match=r"for other data or views: data.image_size: 32 in the cache, 24 now. Open another"):
        built.views(ImageDataset.from_module(data_of(image_size=24)))
    with pytest.raises(UserError, match=r"data.source or data.train_split: 1 of 128 training samples have another image"):
        built.views(ImageDataset.from_module(data_of("touched_images")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"view": 2}, "view: 2 is not in the cache; the train split has views 0 to 1"),
        ({"view": torch.tensor([0, 1])}, "view: all samples of a read must have the same view"),
        ({"index": torch.tensor([10**6])}, "index: the cache does not cover"),
        ({"index": torch.tensor([-1])}, "index: the cache does not cover"),
        ({"split": "unlabeled"}, "split: 'unlabeled' is not in the cache; use one of train, val, test"),
        (
            {"view": 1, "split": "test", "index": torch.tensor([0])},
            "view: 1 is not in the cache; the test split has only view 0",
        ),
    ],
)
def test_wrong_reads_name_the_argument(built, data, arguments, message):
    with pytest.raises(ValueError, match=message):
        built.read(**{"index": torch.from_numpy(data.splits.train[:1]), "view": 0, **arguments})


def test_a_sample_of_another_split_is_not_covered(built, data):
    with pytest.raises(ValueError, match="index: the cache does not cover"):
        built.read(data.splits.val[:1], 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"views": None}}, "views: num_views is None"),
        ({"batch_size": 0}, "batch_size and shard_mib must be positive"),
        (
            {"teacher": Teacher(teacher_network(4), MEAN, STD, ("a", "b", "c", "d"))},
            "teacher.class_map: null, but .* lacks 4 by name",
        ),
    ],
)
def test_wrong_builds_name_the_argument(tmp_path, data, changes, message):
    views = data_of(**changes["config"]) if "config" in changes else data
    arguments = {key: value for key, value in changes.items() if key != "config"}
    with pytest.raises(ValueError, match=message):
        TeacherCache.build(tmp_path / "cache", **{"teacher": teacher_of(), "views": views, **arguments})
    assert not (tmp_path / "cache").exists()


def test_a_build_completes_an_existing_cache(tmp_path, data):
    directory = tmp_path / "cache"
    TeacherCache.build(directory, teacher_of(), data, layers=["layer2"], dtype="int8", batch_size=32)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*-of-*")}
    cache = TeacherCache.build(directory, teacher_of(), data, layers=["layer1"], dtype="int8", batch_size=32)
    assert cache.shapes == {"layer1": (16, 8, 8), "layer2": (32, 2, 2)}
    assert {name: spec.dtype for name, spec in read_spec(directory).tensors.items()} == {
        "logits": "float16",
        "layer1": "int8",
        "layer2": "int8",
    }
    assert {path: path.stat().st_mtime_ns for path in before} == before
    cache.verify()
    path = next(directory.glob("train/view-0001/layer1-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(
        UserError, match=r"damaged files \(1\): train/view-0001/layer1-.*does not match its checksum; call TeacherCache.build"
    ):
        cache.verify()
    with pytest.raises(UserError, match=r"layers: identity in the cache, pca now \(target of layer1\)"):
        TeacherCache.build(directory, teacher_of(), data, layers={"layer1": PCA(4, images=9)}, batch_size=32)


def test_fitted_targets_must_equal_those_of_the_cache(built, data, tmp_path):
    other = PCA(8, images=64)
    other.load({"conv.weight": torch.ones(8, 32, 1, 1), "conv.bias": torch.zeros(8)})
    with pytest.raises(UserError, match=r"layers: other fitted tensors, digest [0-9a-f]{32} in the cache, [0-9a-f]{32} now"):
        TeacherCache.build(built.directory, teacher_of(), data, layers={"layer2": other}, dtype="float32", batch_size=32)
    stored = PCA(8, images=64)
    built._cache.load_targets({"layer2": stored})
    same = TeacherCache.build(built.directory, teacher_of(), data, layers={"layer2": stored}, dtype="float32", batch_size=32)
    assert same.fingerprint == built.fingerprint
    alone = TeacherCache.build(tmp_path, teacher_of(), data, layers={"layer2": stored}, dtype="float32", batch_size=32)
    spec, expected = (read_spec(cache.directory).tensors["layer2"] for cache in (alone, built))
    assert spec.target_digest == expected.target_digest


@pytest.mark.parametrize("is_old_spec", [True, False])
def test_a_cache_of_version_1_is_refused_and_kept(built, data, tmp_path, is_old_spec):
    """The spec of version 1 had the name plan.json."""
    content = json.loads((built.directory / "spec.json").read_text())
    name = "plan.json" if is_old_spec else "spec.json"
    (tmp_path / name).write_text(json.dumps({**content, "version": 1}))
    before = sorted(tmp_path.iterdir())
    for attempt in (
        lambda: TeacherCache.open(tmp_path),
        lambda: TeacherCache.build(tmp_path, teacher_of(), data, batch_size=32),
    ):
        with pytest.raises(
            UserError, match=r"version 1, but this version of kd_accel reads version 2; run `kd-accel cache build` with"
        ):
            attempt()
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != ".lock"] == before


def test_a_damaged_version_is_repaired_by_a_build(tmp_path, data):
    directory = tmp_path / "cache"
    cache = TeacherCache.build(directory, teacher_of(), data, batch_size=32)
    content = json.loads((directory / "spec.json").read_text())
    (directory / "spec.json").write_text(json.dumps({**content, "version": "two"}))
    with pytest.raises(UserError, match=r"is damaged \(version two\)"):
        TeacherCache.open(directory)
    assert TeacherCache.build(directory, teacher_of(), data, batch_size=32).fingerprint == cache.fingerprint
