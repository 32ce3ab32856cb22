"""Loading of a teacher: weights, mean and std from where they are known, classes compared and selected, notices, resumption."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.models.weights import ModelCard, save_model
from kd_accel.teacher.loading import load_own_teacher, load_run_teacher
from tests.support.in_process import cache, say, train
from tests.support.launching import SMALL, metrics, summary

ARCH = "import:tests.support.models:teacher"
NAMES = ["any", "four", "class", "names"]
STATISTICS = {"mean": [0.4, 0.5, 0.6], "std": [0.2] * 3}
CARD = ModelCard(ARCH, "imagenet", {}, NAMES, [0.1, 0.2, 0.3], [0.7, 0.8, 0.9], 64)
REORDERED = "--data.source=import:tests.support.models:olive_and_red_images"


def test_a_teacher_is_loaded_from_a_weights_file(tmp_path):
    network = build_model(ARCH, num_classes=4, seed=7)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    teacher = load_own_teacher(ARCH, str(tmp_path / "weights.safetensors"), class_names=NAMES, **STATISTICS)
    for name, tensor in teacher.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])
    assert (teacher.mean, teacher.std, teacher.class_names, teacher.arch) == ([0.4, 0.5, 0.6], [0.2] * 3, None, ARCH)
    assert teacher.for_classes(NAMES).class_indices is None


def test_weights_that_do_not_fit_exactly_are_refused(tmp_path):
    save_file(build_model(ARCH, num_classes=5).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"^teacher.*fc\.weight.*or for a teacher set teacher.class_map"):
        load_own_teacher(ARCH, str(tmp_path / "weights.safetensors"), class_names=NAMES, **STATISTICS)


def test_a_class_map_accepts_weights_with_more_classes(tmp_path):
    network = build_model(ARCH, num_classes=7, seed=7).eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    teacher = load_own_teacher(
        ARCH, str(tmp_path / "weights.safetensors"), class_names=["x", "y"], **STATISTICS, class_map=[6, 2]
    )
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    plain = dataclasses.replace(teacher, class_map=None, _indices=None)
    assert torch.equal(teacher.for_classes(["x", "y"])(images).logits, plain(images).logits[:, [6, 2]])


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_weights_of_a_run_have_its_classes_mean_and_std(tmp_path, name):
    save_model(tmp_path, build_model(ARCH, num_classes=4), card=CARD)
    teacher = load_own_teacher(ARCH, str(tmp_path / name), class_names=NAMES)
    assert (teacher.mean, teacher.std, teacher.class_names, teacher.image_size) == (CARD.mean, CARD.std, tuple(NAMES), 64)
    assert load_own_teacher(ARCH, str(tmp_path / name), class_names=NAMES, **STATISTICS).mean == STATISTICS["mean"]
    with pytest.raises(UserError, match="teacher.class_map: null, but class 0 is 'any' for the teacher and 'four' in the data"):
        teacher.for_classes(["four", "any", "class", "names"])


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_run_whose_network_has_other_outputs_is_refused(tmp_path, name):
    """The tensors fit with and without a max-pool. An argument of the initial weights makes no difference after loading."""
    card = dataclasses.replace(CARD, arch="torchvision/resnet18", stem="no_pool", arch_args={"zero_init_residual": True})
    save_model(tmp_path, build_model(card.arch, num_classes=4, stem="no_pool"), card=card)
    path = str(tmp_path / name)
    for own in ({"stem": card.stem, "arch_args": card.arch_args}, {"stem": card.stem}):
        assert load_own_teacher(card.arch, path, class_names=NAMES, **own).stem == "no_pool"
    with pytest.raises(UserError, match=f"teacher.weights: {path} was trained with stem no_pool, .*and this network has other"):
        load_own_teacher(card.arch, path, class_names=NAMES)


def test_weights_with_an_unknown_mean_are_refused(tmp_path):
    save_file(build_model(ARCH, num_classes=4).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"teacher.mean and teacher.std: missing, and .*model.safetensors does not contain them"
    ):
        load_own_teacher(ARCH, str(tmp_path / "model.safetensors"), class_names=NAMES)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Return the name of library weights that are in torchvision's download directory; they are random."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints" / models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(models.squeezenet1_1().state_dict(), path)
    return "IMAGENET1K_V1"


def test_library_weights_have_the_mean_std_and_classes_of_the_library(imagenet):
    data = ["tench", "hen", "ostrich"]
    load = {"arch": "torchvision/squeezenet1_1", "weights": imagenet}
    teacher = load_own_teacher(**load, class_names=data, class_map="auto").for_classes(data)
    assert (teacher.mean, teacher.std, teacher.image_size) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 224)
    assert teacher.class_indices == (0, 8, 9)
    assert teacher(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).logits.shape == (2, 3)
    categories = list(models.SqueezeNet1_1_Weights.DEFAULT.meta["categories"])
    assert load_own_teacher(**load, class_names=categories).for_classes(categories).class_indices is None
    with pytest.raises(UserError, match="teacher.class_map: null, .*the same classes in another order; set it to auto"):
        load_own_teacher(**load, class_names=categories[::-1]).for_classes(categories[::-1])
    numbered = [f"n{number:08}" for number in range(1000)]
    assert load_own_teacher(**load, class_names=numbered).for_classes(numbered).class_names is None


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path.name}/model.json.*no finished run in this directory"):
        load_run_teacher(tmp_path)


@pytest.fixture
def mapped(teacher_run):
    """Flags of a distillation on two of the teacher's four classes, in another order."""
    return [REORDERED, f"--teacher.run={teacher_run}", "--data.views=1", "--train.channels_last=true", "--train.epochs=1"]


def test_a_class_map_is_the_same_in_live_and_cached_trainings_and_in_evaluations(tmp_path, mapped):
    assert (
        "teacher.class_map: null, but the teacher has 4 classes, and the data 2, without 'green', 'blue'; set it to auto"
        in train(tmp_path / "none", *mapped, code=2)
    )
    said = train(tmp_path / "live", *mapped, "--teacher.class_map=auto")
    assert "teacher.class_map: 2 of 4 logits of the teacher are used, by class of the data: 'olive' = 3, 'red' = 0" in said
    assert summary(tmp_path / "live")["teacher_accuracy"] > 0.9
    stored = ["--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path}/cache"]
    assert "teacher.class_map: 2 of 4 logits" in cache("build", *mapped, *stored, "--teacher.class_map=auto")
    train(tmp_path / "cached", *mapped, *stored, "--teacher.class_map.olive=3", "--teacher.class_map.red=red")
    live, cached = metrics(tmp_path / "live", "train"), metrics(tmp_path / "cached", "train")
    assert [line["kl"] for line in cached] == pytest.approx([line["kl"] for line in live], rel=1e-2)
    assert summary(tmp_path / "cached")["teacher_accuracy"] == summary(tmp_path / "live")["teacher_accuracy"]
    said = train(tmp_path / "other", *mapped, *stored, "--teacher.class_map=[0, 3]", "--teacher.min_accuracy=null", code=2)
    assert "teacher.class_map: class 0 is 3 in the cache, 0 now (index of the teacher's logit for each class)" in said
    assert '"agreement"' in say("evaluate", tmp_path / "live")
    assert not math.isnan(summary(tmp_path / "live")["agreement"])


def test_another_class_map_is_refused_on_resume(tmp_path, mapped):
    flags = [*mapped, "--train.epochs=2", "--teacher.min_accuracy=null"]
    train(tmp_path / "run", *flags, "--teacher.class_map=auto", "--checkpoint.stop_after_steps=3")
    said = train(tmp_path / "run", *flags, "--teacher.class_map=[0, 3]", code=2)
    assert "use the same teacher with the same mean, std, class_map and image_size" in said
    train(tmp_path / "run", *flags[:-1], "--teacher.class_map=auto")
    assert summary(tmp_path / "run")["steps"] == 8


def test_fine_tuning_normalizes_as_the_weights_were_trained_unless_the_data_has_settings(tmp_path, teacher_run):
    card = dataclasses.replace(CARD, label_names=["red", "green", "blue", "olive"])
    save_model(tmp_path, build_model(ARCH, num_classes=4), card=card)
    flags = [f"--model.arch={ARCH}", f"--model.weights={tmp_path}", "--train.max_steps=1"]
    said = train(tmp_path / "tuned", *flags)
    assert (
        "model.weights: images are normalized with mean [0.1, 0.2, 0.3] and std [0.7, 0.8, 0.9], with which "
        f"{tmp_path} was trained; data.mean and data.std override them"
    ) in said
    assert '"mean": [\n    0.1,\n    0.2,\n    0.3\n  ]' in (tmp_path / "tuned/model.json").read_text()
    said = train(tmp_path / "own", *flags, "--data.mean=[0.5, 0.5, 0.5]", "--data.std=[0.2, 0.2, 0.2]")
    assert "images are normalized with" not in said
    assert '"mean": [\n    0.5,' in (tmp_path / "own/model.json").read_text()


def test_a_student_that_starts_from_another_network_is_noticed(tmp_path):
    """The weights of a ResNet fit with and without its max-pool."""
    own = ["--model.arch=torchvision/resnet18", "--train.max_steps=1"]
    card = dataclasses.replace(CARD, arch="torchvision/resnet18", stem="no_pool", label_names=["red", "green", "blue", "olive"])
    (tmp_path / "weights").mkdir()
    save_model(tmp_path / "weights", build_model(card.arch, num_classes=4, stem="no_pool"), card=card)
    text = f"model.stem: imagenet, but {tmp_path / 'weights'} was trained with no_pool, whose outputs differ"
    said = train(tmp_path / "other", *own, f"--model.weights={tmp_path / 'weights'}")
    assert text in said
    said = train(tmp_path / "same", *own, f"--model.weights={tmp_path / 'weights'}", "--model.stem=no_pool")
    assert "was trained with no_pool" not in said


def test_random_weights_are_noticed_for_a_library_and_not_for_user_code(tmp_path):
    said = say("train", f"--run_dir={tmp_path}/own", *SMALL, "--train.max_steps=1")
    assert "random weights" not in said
    said = train(tmp_path / "lib", "--model.arch=torchvision/squeezenet1_1", "--data.limit_train=40", "--train.max_steps=1")
    assert (
        "model.weights: null, so that torchvision/squeezenet1_1 starts from random weights; torchvision has IMAGENET1K_V1"
        in said
    )
