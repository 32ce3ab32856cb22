"""Networks by name, their stems and weights; taps that leave no trace; projectors against a reference of their own."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kd_accel.models.files import ModelCard, load_card, load_run_model, load_weights, save_model
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import FeatureProjector, NormalizedProjector, PcaFit, build_projectors
from kd_accel.models.student import StudentModule
from kd_accel.models.taps import TapRecorder, probe_taps
from kd_accel.models.zoo import build_model
from kd_accel.types import UserError

TAPS = ["layer1", "layer2", "layer3", "layer4"]


def small(num_classes=4, seed=0):
    return build_model("import:tests.own_models:student_with_everything", num_classes=num_classes, seed=seed)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(("arch", "count"), [("resnet50", 23_528_522), ("resnet18", 11_181_642)])
def test_the_references_parameter_counts(library, arch, count):
    assert parameters(build_model(f"{library}/{arch}", num_classes=10)) == count


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(("stem", "sizes"), [("imagenet", (8, 4, 2, 1)), ("no_pool", (16, 8, 4, 2)), ("cifar", (32, 16, 8, 4))])
def test_each_stem_doubles_the_resolution(library, stem, sizes):
    model = build_model(f"{library}/resnet18", num_classes=10, stem=stem)
    shapes = probe_taps(model, TAPS, image_size=32)
    assert [shapes[tap] for tap in TAPS] == [(d, s, s) for d, s in zip((64, 128, 256, 512), sizes, strict=True)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_weights_depend_on_the_seed_alone_and_the_generator_stays():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = build_model("torchvision/resnet18", num_classes=10, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again = build_model("torchvision/resnet18", num_classes=10, seed=1).state_dict()
    other = build_model("torchvision/resnet18", num_classes=10, seed=2).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_arch_args_reach_the_builder():
    model = build_model("torchvision/resnet18", num_classes=10, arch_args={"zero_init_residual": True})
    assert model.layer1[0].bn2.weight.abs().sum() == 0


@pytest.mark.parametrize(
    ("arch", "settings", "said"),
    [
        ("torchvision/resnet81", {}, "did you mean torchvision/resnet18"),
        ("timm/resnet81", {}, "did you mean timm/resnet18"),
        ("torchvision/resnet18", {"arch_args": {"wings": 2}}, "model.arch_args: .* does not take"),
        ("torchvision/vgg11", {"stem": "cifar"}, "is for ResNets"),
        ("import:tests.own_models:nothing", {}, "has no function 'nothing'"),
        ("import:nowhere.at_all:model", {}, "cannot import 'nowhere.at_all'"),
        ("import:tests", {}, "must have the form import:package.module:function"),
        ("import:builtins:dict", {}, "not a torch.nn.Module"),
    ],
)
def test_what_cannot_be_built(arch, settings, said):
    with pytest.raises(UserError, match=said):
        build_model(arch, num_classes=10, **settings)


CARD = ModelCard("import:tests.own_models:student_with_everything", "imagenet", {}, list("abcd"), [0.5] * 3, [0.2] * 3, 32)


def test_a_saved_model_is_the_same_model(tmp_path):
    model = small(seed=5).eval()
    save_model(tmp_path, model, card=CARD)
    loaded, card = load_run_model(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert card == CARD
    assert not loaded.training
    assert torch.equal(loaded(images), model(images))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_other_classes_replace_the_head_of_the_trained_model_and_refuse_a_teacher(tmp_path):
    save_file(small(num_classes=7).state_dict(), tmp_path / "w.safetensors")
    target = small(num_classes=4, seed=9)
    head = target.fc.weight.clone()
    notices = load_weights(target, str(tmp_path / "w.safetensors"), arch="x", is_exact=False)
    assert len(notices) == 1
    assert notices[0].startswith("fc: starts from random weights")
    assert torch.equal(target.fc.weight, head)
    assert torch.equal(target.layer1[0].weight, small(num_classes=7).layer1[0].weight)
    with pytest.raises(UserError, match="has 7 classes .*but 4 are wanted"):
        load_weights(small(), str(tmp_path / "w.safetensors"), arch="x", is_exact=True, field="teacher")


def test_another_stem_replaces_the_stem(tmp_path):
    save_file(build_model("torchvision/resnet18", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    target = build_model("torchvision/resnet18", num_classes=10, stem="cifar")
    assert [
        notice.split(":")[0] for notice in load_weights(target, str(tmp_path / "w.safetensors"), arch="x", is_exact=False)
    ] == ["conv1"]


def test_half_precision_files_are_widened(tmp_path):
    save_file(
        {name: t.half() if t.is_floating_point() else t for name, t in small().state_dict().items()}, tmp_path / "w.safetensors"
    )
    model = small(seed=3)
    load_weights(model, str(tmp_path / "w.safetensors"), arch="x", is_exact=True)
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, small().fc.weight.half().float())


def test_weights_of_another_architecture_are_refused(tmp_path):
    save_file(build_model("torchvision/resnet50", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="does not fit torchvision/resnet18.*unknown.*Set arch and stem"):
        load_weights(
            build_model("torchvision/resnet18", num_classes=10),
            str(tmp_path / "w.safetensors"),
            arch="torchvision/resnet18",
            is_exact=False,
        )


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("nowhere.safetensors", "no file nowhere.safetensors"),
        ("model.pth", "is a pickle"),
        ("runs/nowhere", "there is no run directory"),
        ("IMAGENET1K_V9", "has no weights 'IMAGENET1K_V9' .there are: IMAGENET1K_V1"),
    ],
)
def test_weights_that_are_not_there(weights, said):
    with pytest.raises(UserError, match=said):
        load_weights(build_model("torchvision/resnet18", num_classes=10), weights, arch="torchvision/resnet18", is_exact=False)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        load_card(tmp_path)
    save_model(tmp_path, small(), card=CARD)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-7])
    with pytest.raises(UserError, match="damaged"):
        load_run_model(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({"arch": "x"}))
    with pytest.raises(UserError, match="stem, arch_args.* missing"):
        load_card(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        load_card(tmp_path)


def test_normalisation():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.25, 0.3]
    expected = (images.numpy() / 255 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    normalised = Normalize(mean, std)(images)
    np.testing.assert_allclose(normalised.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(Normalize(mean, std)(images.float()), normalised)
    assert Normalize(mean, std).state_dict() == {}


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_taps_give_what_the_modules_gave_and_leave_no_trace():
    model = build_model("torchvision/resnet18", num_classes=10).eval()
    images = torch.rand(2, 3, 32, 32)
    plain = model(images)
    with TapRecorder(model, ["layer2", "layer4.1.conv2"]) as recorder:
        assert torch.equal(model(images), plain)
        features = recorder.take()
        assert recorder.take() == {}
    assert torch.equal(
        features["layer2"], model.layer2(model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(images))))))
    )
    assert features["layer4.1.conv2"].shape == (2, 512, 1, 1)
    assert hooks(model) == 0


def test_hooks_go_away_when_something_fails():
    model = small()
    with pytest.raises(ZeroDivisionError), TapRecorder(model, ["layer1"]):
        assert hooks(model) == 1
        raise ZeroDivisionError
    assert hooks(model) == 0


def test_a_probe_changes_nothing():
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert probe_taps(model, ["layer1", "layer2"], image_size=32) == {"layer1": (8, 8, 8), "layer2": (16, 2, 2)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert hooks(model) == 0


def test_taps_that_are_not_there_or_no_maps():
    model = build_model("torchvision/resnet18", num_classes=10)
    with pytest.raises(UserError, match="no module 'layer5'; did you mean layer4.*top level: conv1, bn1"):
        TapRecorder(model, ["layer5"])
    with pytest.raises(UserError, match="'fc' of ResNet is no feature map .*shape .2, 10.*use one of conv1"):
        probe_taps(model, ["fc"], image_size=32)


def test_taps_of_a_compiled_model():
    model = small().eval()
    with TapRecorder(model, ["layer1"]) as recorder:
        model.compile(backend="eager")
        model(torch.rand(2, 3, 32, 32))
        first = recorder.take()["layer1"]
        model(torch.rand(2, 3, 32, 32))
        assert not torch.equal(first, recorder.take()["layer1"])


SHAPES = {"a.b": (4, 8, 8)}, {"a.b": (16, 8, 8)}


@pytest.mark.parametrize(
    ("direction", "kind", "student", "teacher", "pca"),
    [
        ("student_to_teacher", "pca", (4, 16), None, None),
        ("both", "pca", (4, 4), None, 4),
        ("teacher_to_student", "pca", None, None, 4),
        ("teacher_to_student", "learned", None, (16, 4), None),
    ],
)
def test_the_three_directions(direction, kind, student, teacher, pca):
    projectors = build_projectors(*SHAPES, direction=direction, teacher_projector=kind)

    def widths(side):
        return (side["a.b"].conv.in_channels, side["a.b"].conv.out_channels) if side else None

    assert (widths(projectors.student), widths(projectors.teacher), projectors.pca_channels.get("a.b")) == (
        student,
        teacher,
        pca,
    )
    module = StudentModule(
        nn.Sequential(), nn.Identity(), student_projectors=projectors.student, teacher_projectors=projectors.teacher
    )
    assert len(list(module.parameters())) == (0 if student is None and teacher is None else 2)


def test_a_pca_cannot_add_channels():
    with pytest.raises(UserError, match="a PCA only removes channels; use student_to_teacher"):
        build_projectors(*reversed(SHAPES), direction="both")


def test_multiply_adds_of_the_learned_projectors():
    """What student_to_teacher and both add to ResNet-18's 37 M at 32x32: about 4.2 M and 1 M."""
    from kd_accel.bench.params import count_macs

    sizes = (8, 4, 2, 1)
    student = {tap: (d, s, s) for tap, d, s in zip(TAPS, (64, 128, 256, 512), sizes, strict=True)}
    teacher = {tap: (d, s, s) for tap, d, s in zip(TAPS, (256, 512, 1024, 2048), sizes, strict=True)}
    for direction, expected in (("student_to_teacher", 4_194_304), ("both", 1_048_576)):
        projectors = build_projectors(student, teacher, direction=direction).student
        assert sum(count_macs(projectors[tap], torch.zeros(1, *student[tap])) for tap in TAPS) == expected


def test_pca_against_numpys_svd():
    generator = np.random.default_rng(0)
    features = (generator.standard_normal((40, 6, 3, 3)) * np.array([5, 4, 3, 2, 1, 0.5])[:, None, None] + 7).astype(np.float32)
    fit = PcaFit(6)
    for start in range(0, 40, 16):
        fit.update(torch.from_numpy(features[start : start + 16]))
    projector, share = fit.finish(3, tap="x")
    samples = features.transpose(0, 2, 3, 1).reshape(-1, 6).astype(np.float64)
    centred = samples - samples.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:3] * np.sign(directions[:3][np.arange(3), np.abs(directions[:3]).argmax(1)])[:, None]
    scores = projector(torch.from_numpy(features)).detach().numpy().transpose(0, 2, 3, 1).reshape(-1, 3)
    np.testing.assert_allclose(projector.conv.weight[:, :, 0, 0].numpy(), directions, atol=1e-6)
    np.testing.assert_allclose(scores, centred @ directions.T, atol=1e-4)
    assert share == pytest.approx((singular[:3] ** 2).sum() / (singular**2).sum())
    assert not any(parameter.requires_grad for parameter in projector.parameters())


def test_too_few_samples_for_the_rank():
    fit = PcaFit(6)
    fit.update(torch.rand(3, 6, 1, 1))
    with pytest.raises(UserError, match="pca_images: 3 samples at layer4, but 3 directions need more"):
        fit.finish(3, tap="layer4")


def test_a_learned_teacher_projector_cannot_collapse():
    projector = NormalizedProjector(6, 2)
    with torch.no_grad():
        projector.conv.weight *= 1e-3
    out = projector(torch.randn(64, 6, 2, 2))
    torch.testing.assert_close(out.var((0, 2, 3), correction=0), torch.ones(2), atol=0.02, rtol=0)
    assert len(list(projector.parameters())) == 2


def test_learned_projectors_start_from_seed_and_tap_alone():
    def weight(seed):
        torch.manual_seed(seed * 77)
        return build_projectors(*SHAPES, direction="both", seed=seed).student["a.b"].conv.weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))
    assert isinstance(build_projectors(*SHAPES, direction="both").student["a.b"], FeatureProjector)


def test_the_student_module_pairs_taps_only_for_a_teacher():
    network = small()
    projectors = build_projectors({"layer1": (8, 8, 8)}, {"layer1": (12, 8, 8)}, direction="student_to_teacher")
    module = StudentModule(network, Normalize([0.5] * 3, [0.2] * 3), taps=["layer1"], student_projectors=projectors.student)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    module.open_taps()
    target = torch.zeros(2, 12, 8, 8)
    logits, pairs = module(images, {"layer1": target})
    assert logits.shape == (2, 4)
    assert pairs["layer1"][0].shape == (2, 12, 8, 8)
    assert pairs["layer1"][1] is target
    assert module(images)[1] == {}
    module.close_taps()
    assert hooks(network) == 0
    assert not any("normalize" in name for name in module.state_dict())
