"""Networks and configs of the papers' pairs on CIFAR-100: sizes, settings, and a step on generated images."""

import pytest
import torch
import yaml

import kd_accel as kd
from examples import cifar_networks
from kd_accel.config.parsing import load_config_file
from kd_accel.config.schema import RunConfig
from tests.support.launching import ROOT

# Millions of parameters with 100 classes, as Tian et al. (ICLR 2020) and later papers print them.
SIZES = {"resnet20": 0.28, "resnet56": 0.86, "resnet8x4": 1.23, "resnet32x4": 7.43, "wrn_16_2": 0.70, "wrn_40_2": 2.26}
PAIRS = {"resnet32x4": "resnet8x4", "resnet56": "resnet20", "wrn_40_2": "wrn_16_2"}
CONFIGS = ROOT / "configs/cifar100"
ONE_STEP = {
    "data.source": "import:tests.support.models:images",
    "data.image_column": "image",
    "data.label_column": "label",
    "data.limit_train": 16,
    "data.limit_test": 8,
    "train.batch_size": 8,
    "train.max_steps": 1,
    "train.epochs": 1,
    "optim.schedule": "constant",
    "optim.step_epochs": [],
    "tracking.wandb": "disabled",
}


@pytest.mark.parametrize("name", SIZES)
def test_networks_have_the_sizes_and_maps_of_the_papers(name):
    network = getattr(cifar_networks, name)(100).eval()
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 2) == SIZES[name]
    shapes = {}
    for layer in ("layer1", "layer2", "layer3"):
        getattr(network, layer).register_forward_hook(lambda *call, layer=layer: shapes.update({layer: call[2].shape[1:]}))
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    assert [tuple(shape[1:]) for shape in shapes.values()] == [(32, 32), (16, 16), (8, 8)]
    assert shapes["layer3"][0] == network.fc.in_features


def test_depth_counts_convolutions_on_the_main_path_and_the_classifier():
    depths = {"resnet20": 20, "resnet56": 56, "resnet8x4": 8, "resnet32x4": 32, "wrn_16_2": 16, "wrn_40_2": 40}
    for name, depth in depths.items():
        modules = getattr(cifar_networks, name)(10).modules()
        convolutions = [module for module in modules if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3)]
        # A WRN of depth n also counts the three projections: n = 6 blocks + 4.
        assert len(convolutions) + 1 == depth - (2 if name.startswith("wrn") else 0)


def test_every_pair_has_configs_of_the_same_data():
    expected = {f"{teacher}.yaml" for teacher in PAIRS} | {f"{teacher}_{student}.yaml" for teacher, student in PAIRS.items()}
    assert {path.name for path in CONFIGS.iterdir()} == expected
    for teacher, student in PAIRS.items():
        first, second = (load_config_file(RunConfig, CONFIGS / f"{name}.yaml") for name in (teacher, f"{teacher}_{student}"))
        assert second.teacher.run == first.run_dir and first.role == "teacher"
        assert (first.data, first.optim, first.train) == (second.data, second.optim, second.train)
        assert (first.train.epochs, first.train.batch_size, first.optim.step_epochs) == (240, 64, [150, 180, 210])
        assert (first.model.arch, second.model.arch) == tuple(
            f"import:examples.cifar_networks:{each}" for each in (teacher, student)
        )
        assert (second.distill.temperature, second.distill.alpha, second.distill.label_weight) == (4.0, 0.9, 0.1)
        assert all("Not run." in (CONFIGS / f"{name}.yaml").read_text() for name in (teacher, f"{teacher}_{student}"))


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), PAIRS.items())
def test_a_pair_trains(teacher, student, tmp_path):
    own = {"run_dir": str(tmp_path / "teacher"), **ONE_STEP}
    first = kd.train(CONFIGS / f"{teacher}.yaml", **own)
    own |= {"run_dir": str(tmp_path / "student"), "teacher.run": own["run_dir"], "teacher.min_accuracy": None}
    second = kd.train(CONFIGS / f"{teacher}_{student}.yaml", **own)
    assert (first.summary["steps"], second.summary["steps"], second.summary["role"]) == (1, 1, "distilled")
    assert second.summary["teacher_fingerprint"] == kd.Teacher.from_run(first.directory).fingerprint
    stored = yaml.safe_load((second.directory / "config.yaml").read_text())
    assert stored["model"]["arch"] == f"import:examples.cifar_networks:{student}"
