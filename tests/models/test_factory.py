"""Tests of networks built by name: shapes, initial weights, and errors in names and arguments."""

import pytest
import torch

from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import probe_layers

LAYERS = ["layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(("arch", "count"), [("resnet50", 23_528_522), ("resnet18", 11_181_642)])
def test_parameter_counts_of_the_reference(library, arch, count):
    model = build_model(f"{library}/{arch}", num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(("stem", "sizes"), [("imagenet", (8, 4, 2, 1)), ("no_pool", (16, 8, 4, 2)), ("cifar", (32, 16, 8, 4))])
def test_each_stem_doubles_the_resolution(library, stem, sizes):
    model = build_model(f"{library}/resnet18", num_classes=10, stem=stem)
    shapes = probe_layers(model, LAYERS, image_size=32)
    assert [shapes[layer] for layer in LAYERS] == [(d, s, s) for d, s in zip((64, 128, 256, 512), sizes, strict=True)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_weights_depend_only_on_the_seed_and_the_generator_is_not_changed():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = build_model("torchvision/resnet18", num_classes=10, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again = build_model("torchvision/resnet18", num_classes=10, seed=1).state_dict()
    other = build_model("torchvision/resnet18", num_classes=10, seed=2).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_gpu_generators_are_not_changed(monkeypatch):
    def fail(seed):
        raise AssertionError("seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    build_model("import:tests.support.models:student", num_classes=4, seed=3)


def test_arch_args_reach_the_builder():
    model = build_model("torchvision/resnet18", num_classes=10, arch_args={"zero_init_residual": True})
    assert model.layer1[0].bn2.weight.abs().sum() == 0


def test_arch_args_replace_the_defaults_of_networks_with_auxiliary_heads():
    arguments = {"aux_logits": False, "init_weights": False}
    assert build_model("torchvision/googlenet", num_classes=4, arch_args=arguments).aux1 is None


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("torchvision/resnet81", {}, "did you mean torchvision/resnet18"),
        ("timm/resnet81", {}, "did you mean timm/resnet18"),
        (
            "resnet18",
            {},
            "bench.arch: 'resnet18' must start with torchvision/, timm/ or import: .did you mean torchvision/resnet18",
        ),
        ("torchvision/zzz", {}, "torchvision has no classifier 'zzz'; .*for example torchvision/resnet18"),
        ("keras/zzz", {}, "must start with torchvision/.*for example torchvision/resnet18"),
        ("timm/resnet18.nope", {}, "bench.arch: timm/resnet18.nope cannot be built .*nope.*; use another arch$"),
        ("torchvision/resnet18", {"arch_args": {"num_classes": 5}}, "bench.arch_args: num_classes is set by the data"),
        (
            "torchvision/resnet18",
            {"arch_args": {"width_per_group": 128}},
            "bench.arch_args: .* does not accept .*base_width=64",
        ),
        (
            "timm/resnet18",
            {"arch_args": {"wings": 2}},
            "bench.arch_args: .* does not accept .'wings': 2.*; fix or remove them$",
        ),
        (
            "import:tests.support.models:student",
            {"arch_args": {"wings": 2}},
            "bench.arch_args: import:tests.support.models:student .*wings, num_classes",
        ),
        ("import:builtins:dict", {"stem": "cifar"}, "bench.arch: .* returns dict, not a torch.nn.Module"),
        ("import:tests.support.models:nothing", {}, "bench.arch: .*'nothing'"),
        ("import:nowhere.at_all:model", {}, "bench.arch: .*'nowhere.at_all'"),
        ("import:tests", {}, "bench.arch: .*import:package.module:function"),
        ("torchvision/vgg11", {"stem": "cifar"}, "bench.stem: 'cifar' needs a ResNet .*torchvision/vgg11; use imagenet"),
        ("timm/resnet18d", {"stem": "cifar"}, "needs a ResNet"),
        (
            "torchvision/googlenet",
            {"arch_args": {"aux_logits": True}},
            "bench.arch_args: aux_logits adds outputs .*leave it out$",
        ),
    ],
)
def test_networks_that_cannot_be_built_are_refused(arch, settings, message):
    with pytest.raises(UserError, match=message):
        build_model(arch, num_classes=10, field="bench", **settings)


def test_timm_networks_without_timm_are_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="model.arch: timm/resnet18 needs timm; pip install 'kd-accel.timm.'"):
        build_model("timm/resnet18", num_classes=10)


def broken_model(num_classes):
    raise TypeError("an error inside user code")


def test_an_error_inside_user_code_is_reported_with_its_line():
    message = r"model.arch: .*broken_model .*TypeError: an error inside user code .*test_factory.py, line \d+"
    with pytest.raises(UserError, match=message) as raised:
        build_model(f"import:{__name__}:broken_model", num_classes=10)
    assert isinstance(raised.value.__cause__, TypeError)
