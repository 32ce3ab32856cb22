"""Networks by name: what is built, what it depends on, and what a user can get wrong about a name and its arguments."""

import pytest
import torch

from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import probe_layers

LAYERS = ["layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(("arch", "count"), [("resnet50", 23_528_522), ("resnet18", 11_181_642)])
def test_the_references_parameter_counts(library, arch, count):
    model = build_model(f"{library}/{arch}", num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(("stem", "sizes"), [("imagenet", (8, 4, 2, 1)), ("no_pool", (16, 8, 4, 2)), ("cifar", (32, 16, 8, 4))])
def test_each_stem_doubles_the_resolution(library, stem, sizes):
    model = build_model(f"{library}/resnet18", num_classes=10, stem=stem)
    shapes = probe_layers(model, LAYERS, image_size=32)
    assert [shapes[layer] for layer in LAYERS] == [(d, s, s) for d, s in zip((64, 128, 256, 512), sizes, strict=True)]
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


def test_building_leaves_the_generators_of_gpus_alone(monkeypatch):
    def moved(seed):
        raise AssertionError("moved")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", moved)
    build_model("import:tests.own_models:student", num_classes=4, seed=3)


def test_arch_args_reach_the_builder():
    model = build_model("torchvision/resnet18", num_classes=10, arch_args={"zero_init_residual": True})
    assert model.layer1[0].bn2.weight.abs().sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "settings", "said"),
    [
        ("torchvision/resnet81", {}, "did you mean torchvision/resnet18"),
        ("timm/resnet81", {}, "did you mean timm/resnet18"),
        ("resnet18", {}, "bench.arch: 'resnet18' must start with torchvision/.*did you mean torchvision/resnet18"),
        ("torchvision/zzz", {}, "torchvision has no classifier 'zzz'; name one that it has, such as torchvision/resnet18"),
        ("keras/zzz", {}, "must start with torchvision/.*such as torchvision/resnet18"),
        ("timm/resnet18.nope", {}, "bench.arch: timm/resnet18.nope cannot be built .*nope"),
        ("torchvision/resnet18", {"arch_args": {"num_classes": 5}}, "bench.arch_args: num_classes is set by the data"),
        ("torchvision/resnet18", {"arch_args": {"width_per_group": 128}}, "bench.arch_args: .* does not take .*base_width=64"),
        ("timm/resnet18", {"arch_args": {"wings": 2}}, "bench.arch_args: .* does not take .'wings': 2"),
        (
            "import:tests.own_models:student",
            {"arch_args": {"wings": 2}},
            "does not take its arguments .*called with wings, num_classes",
        ),
        ("import:builtins:dict", {"stem": "cifar"}, "gave dict, not a torch.nn.Module"),
        ("import:tests.own_models:nothing", {}, "has no function 'nothing'"),
        ("import:nowhere.at_all:model", {}, "cannot import 'nowhere.at_all'"),
        ("import:tests", {}, "must have the form import:package.module:function"),
        ("torchvision/vgg11", {"stem": "cifar"}, "bench.stem: cifar is for ResNets .* torchvision/vgg11 is none: use imagenet"),
        ("timm/resnet18d", {"stem": "cifar"}, "is for ResNets"),
    ],
)
def test_what_cannot_be_built(arch, settings, said):
    with pytest.raises(UserError, match=said):
        build_model(arch, num_classes=10, field="bench", **settings)


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="needs timm; pip install 'kd-accel.timm.'"):
        build_model("timm/resnet18", num_classes=10)


def broken_model(num_classes):
    raise TypeError("a fault inside the user's own code")


def test_a_fault_inside_own_code_is_told_with_its_place():
    told = r"model.arch: .*broken_model fails with TypeError: a fault inside the user's own code in .*test_factory.py, line \d+"
    with pytest.raises(UserError, match=told) as raised:
        build_model(f"import:{__name__}:broken_model", num_classes=10)
    assert isinstance(raised.value.__cause__, TypeError)  # for who calls from Python
