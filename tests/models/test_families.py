"""Tests of the families of torchvision and timm as teacher and student: feature maps, losses, and the commands."""

import json

import pytest
import timm  # noqa: F401  (seconds that would count for the first test)
import torch
import yaml

from kd_accel.losses.distiller import Distiller
from kd_accel.losses.features import MSE
from kd_accel.models.auto_layers import auto_layers, pair_layers
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import FeatureExtractor, probe_layers
from kd_accel.models.inference import fuse_conv_bn
from kd_accel.types import TeacherOutput
from tests.support.in_process import say
from tests.support.launching import SMALL, metrics, summary

VIT = {"img_size": 32, "patch_size": 4, "depth": 4}
FAMILIES = {
    "torchvision/resnet18": (["layer1", "layer2", "layer3", "layer4"], "map"),
    "torchvision/vit_b_16": ([f"encoder.layers.encoder_layer_{block}" for block in (2, 5, 8, 11)], "tokens"),
    "torchvision/swin_t": ([f"features.{stage}" for stage in (1, 3, 5, 7)], "last"),
    "torchvision/convnext_tiny": ([f"features.{stage}" for stage in (1, 3, 5, 7)], "map"),
    "torchvision/efficientnet_b0": ([f"features.{stage}" for stage in (1, 2, 3, 5, 7)], "map"),
    "torchvision/regnet_y_400mf": ([f"trunk_output.block{stage}" for stage in (1, 2, 3, 4)], "map"),
    "torchvision/mobilenet_v3_small": ([f"features.{block}" for block in (1, 3, 8, 11)], "map"),
    "timm/vit_tiny_patch16_224": ([f"blocks.{block}" for block in range(4)], "tokens"),
    "timm/deit_tiny_distilled_patch16_224": ([f"blocks.{block}" for block in range(4)], "tokens"),
    "timm/swin_tiny_patch4_window7_224": ([f"layers.{stage}" for stage in range(4)], "last"),
    "timm/convnext_atto": ([f"stages.{stage}" for stage in range(4)], "map"),
    "timm/efficientnet_b0": ([f"blocks.{stage}" for stage in (0, 1, 2, 4, 6)], "map"),
    "timm/regnety_002": (["s1", "s2", "s3", "s4"], "map"),
    "timm/mobilenetv3_small_100": ([f"blocks.{stage}" for stage in (0, 1, 3, 4)], "map"),
}
"""Layers that `layers: auto` compares, and the kind of their outputs."""

ARGUMENTS = {
    "torchvision/vit_b_16": {"image_size": 32},
    "timm/vit_tiny_patch16_224": VIT,
    "timm/deit_tiny_distilled_patch16_224": VIT,
    "timm/swin_tiny_patch4_window7_224": {"img_size": 32},
}
PREFIX = {"torchvision/vit_b_16": 1, "timm/vit_tiny_patch16_224": 1, "timm/deit_tiny_distilled_patch16_224": 2}
STATISTICS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
LARGE = {
    *(f"torchvision/{name}" for name in ("vit_b_16", "swin_t", "convnext_tiny", "efficientnet_b0", "regnet_y_400mf")),
    *(f"timm/{name}" for name in ("swin_tiny_patch4_window7_224", "efficientnet_b0", "regnety_002")),
}
"""Architectures whose tests take seconds."""
EACH = pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.slow) if arch in LARGE else arch for arch in FAMILIES]
)


def build(arch, **arguments):
    return build_model(arch, num_classes=4, arch_args={**ARGUMENTS.get(arch, {}), **arguments})


def images():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def turned(output, kind, prefix):
    """Turn an output into a map by its documented format."""
    if kind == "last":
        return output.permute(0, 3, 1, 2)
    if kind == "map":
        return output
    batch, number, channels = output.shape
    side = round((number - prefix) ** 0.5)
    return output[:, prefix:].permute(0, 2, 1).reshape(batch, channels, side, side)


@EACH
def test_features_are_the_outputs_of_the_last_blocks_as_maps(arch):
    layers, kind = FAMILIES[arch]
    model, outputs = build(arch).eval(), {}
    assert auto_layers(model, image_size=32) == layers
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update({name: output})
        )
        for name in layers
    ]
    with torch.no_grad(), FeatureExtractor(model, layers) as extractor:
        model(images() / 255)
        features = extractor.take()
    for handle in handles:
        handle.remove()
    shapes = probe_layers(model, layers, image_size=32)
    for name in layers:
        assert torch.equal(features[name], turned(outputs[name], kind, PREFIX.get(arch, 0)))
        assert features[name].shape[1:] == shapes[name]
    assert len({shape[1] for shape in shapes.values()}) == (1 if kind == "tokens" else len(layers))


@pytest.mark.parametrize("arch", ["timm/vit_tiny_patch16_224", "timm/deit_tiny_distilled_patch16_224", "timm/convnext_atto"])
def test_features_equal_the_intermediates_of_timm(arch):
    model, layers = build(arch).eval(), FAMILIES[arch][0]
    assert_equal_intermediates(model, layers)


@pytest.mark.slow
def test_features_of_swin_equal_the_intermediates_of_timm():
    arch = "timm/swin_tiny_patch4_window7_224"
    assert_equal_intermediates(build(arch).eval(), FAMILIES[arch][0])


def assert_equal_intermediates(model, layers):
    with torch.no_grad(), FeatureExtractor(model, layers) as extractor:
        expected = model.forward_intermediates(
            images() / 255, indices=list(range(4)), norm=False, output_fmt="NCHW", intermediates_only=True
        )
        model(images() / 255)
        features = extractor.take()
    for name, each in zip(layers, expected, strict=True):
        torch.testing.assert_close(features[name], each)


def distill(student, teacher, pairs):
    """Run a step with one pair of networks, and return the loss of the features and the distiller."""
    shapes = probe_layers(teacher, list(pairs.values()), image_size=32)
    feature_losses = {"mse": MSE(direction="student_to_teacher")}
    distiller = Distiller(student, **STATISTICS, features=feature_losses, layers=pairs, target_shapes=shapes, image_size=32)
    distiller.train().start_recording()
    mean, std = (torch.tensor(STATISTICS[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad(), FeatureExtractor(teacher.eval(), list(pairs.values())) as extractor:
        teacher((images() / 255 - mean) / std)
        target = TeacherOutput(features=extractor.take())
    output = distiller(images(), target, torch.tensor([0, 1, 2]))
    output.loss.backward()
    distiller.stop_recording()
    return output.terms["features/mse"], distiller


@EACH
def test_each_family_is_teacher_and_student_of_a_resnet(arch):
    resnet, network = build("torchvision/resnet18"), build(arch)
    layers = FAMILIES[arch][0][-4:]
    for student, teacher in ((resnet, network), (network, resnet)):
        pairs = pair_layers(student, teacher, image_size=32)
        assert list(pairs) == (layers if student is network else FAMILIES["torchvision/resnet18"][0])
        assert list(pairs.values()) == (layers if teacher is network else FAMILIES["torchvision/resnet18"][0])
        loss, distiller = distill(student, teacher, pairs)
        assert loss.isfinite() and loss > 0
        missing = [name for name, parameter in distiller.named_parameters() if parameter.grad is None]
        assert missing == []
        projectors = distiller.feature_losses["mse"].projectors
        assert len(projectors) == 4 and all(parameter.grad.abs().sum() > 0 for parameter in projectors.parameters())


def test_the_loss_and_gradient_of_token_maps_equal_a_float64_reference():
    """A student of 8x8 tokens and a teacher of 4x4 pixels, so that the student's map is pooled."""
    student, teacher = build("timm/vit_tiny_patch16_224", embed_dim=24), build("torchvision/resnet18")
    loss, distiller = distill(student, teacher, {"blocks.3": "layer2"})
    (projector,) = distiller.feature_losses["mse"].projectors.values()
    weight, bias = (parameter.detach().double() for parameter in (projector.conv.weight.flatten(1), projector.conv.bias))
    mean, std = (torch.tensor(STATISTICS[name]).view(3, 1, 1) for name in ("mean", "std"))
    normalized = (images() / 255 - mean) / std
    with torch.no_grad():
        tokens = student.blocks(student.norm_pre(student._pos_embed(student.patch_embed(normalized))))[:, 1:].double()
        resnet = teacher.maxpool(teacher.relu(teacher.bn1(teacher.conv1(normalized))))
        expected = teacher.layer2(teacher.layer1(resnet)).double()
    weight.requires_grad_()
    rows = (tokens @ weight.T + bias).view(3, 4, 2, 4, 2, 128).mean((2, 4))
    reference = (rows - expected.permute(0, 2, 3, 1)).square().mean()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(projector.conv.weight.grad.flatten(1).double(), weight.grad, rtol=1e-3, atol=1e-6)


def test_the_teacher_with_fused_batchnorm_has_the_same_features():
    model, layers = build("torchvision/mobilenet_v3_small").eval(), FAMILIES["torchvision/mobilenet_v3_small"][0]
    fused = fuse_conv_bn(model, layers=layers, image_size=32)
    found = []
    for network in (model, fused):
        with torch.no_grad(), FeatureExtractor(network, layers) as extractor:
            network(images() / 255)
            found.append(extractor.take())
    for name in layers:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


PAIRS = {
    "vit_to_resnet": ("timm/vit_tiny_patch16_224", VIT, "torchvision/resnet18", "student_to_teacher"),
    "resnet_to_mobilenet": ("torchvision/resnet50", {}, "torchvision/mobilenet_v3_small", "student_to_teacher"),
    "convnext_to_efficientnet": ("timm/convnext_atto", {}, "timm/efficientnet_b0", "both"),
}
COMPARED = {
    "vit_to_resnet": dict(zip(FAMILIES["torchvision/resnet18"][0], [f"blocks.{block}" for block in range(4)], strict=True)),
    "resnet_to_mobilenet": dict(
        zip(FAMILIES["torchvision/mobilenet_v3_small"][0], FAMILIES["torchvision/resnet18"][0], strict=True)
    ),
    "convnext_to_efficientnet": dict(
        zip(FAMILIES["timm/efficientnet_b0"][0][1:], FAMILIES["timm/convnext_atto"][0], strict=True)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_of_families_runs_through_all_commands(tmp_path, pair):
    teacher, arguments, student, direction = PAIRS[pair]
    common = [*SMALL, "--data.views=1", "--train.epochs=1", "--train.max_steps=2", "--optim.lr=0.001", "--data.limit_train=48"]
    architecture = [f"--model.arch={teacher}", f"--model.arch_args={arguments}", "--role=teacher"]
    say("train", *common, f"--run_dir={tmp_path}/teacher", *architecture)
    settings = "" if direction == "student_to_teacher" else ", pca_images: 32"
    distilled = [
        *common,
        f"--model.arch={student}",
        f"--teacher={{run: {tmp_path}/teacher, outputs: cached, min_accuracy: null, cache: {{dir: {tmp_path}/cache}}}}",
        f"--distill.features.mse={{layers: auto, args: {{direction: {direction}{settings}}}}}",
    ]
    built = say("cache", "build", *distilled)
    line = ", ".join(f"{layer}: {other}" for layer, other in COMPARED[pair].items())
    assert f"layers      mse: {{{line}}}\n" in built
    trained = say("train", *distilled, f"--run_dir={tmp_path}/student")
    assert f"layers      mse: {{{line}}}\n" in trained
    config = yaml.safe_load((tmp_path / "student/config.yaml").read_text())
    assert config["distill"]["features"]["mse"]["layers"] == COMPARED[pair]
    assert metrics(tmp_path / "student", "train")[-1]["features/mse"] > 0
    evaluated = json.loads(say("evaluate", f"{tmp_path}/student").splitlines()[-1])
    assert evaluated["accuracy"] == summary(tmp_path / "student")["accuracy"]
    runs = [f"{tmp_path}/teacher", f"{tmp_path}/student"]
    say("bench", *runs, "--batch_sizes=[1]", "--min_iterations=2", "--min_time_s=0", f"--out={tmp_path}/bench.json")
    models = json.loads((tmp_path / "bench.json").read_text())["models"]
    assert [each["arch"] for each in models] == [teacher, student]
    assert all(each["macs"] > 0 and each["latency"] for each in models)
