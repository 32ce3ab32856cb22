"""Configs of this repository: each is valid, and its model can be built."""

from pathlib import Path

import pytest

from kd_accel.config.parsing import load_config_file, parse_config
from kd_accel.config.schema import FeatureLossConfig, LogitLossConfig, ReproduceConfig, RunConfig, Schedule

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.stem not in ("reproduce", "by_resnet50", "wandb_sweep"))
RUNS = [path for path in RUNS if path.parent.name != "cifar100"]  # tests/examples/test_cifar_networks.py
CHAINS = sorted(CONFIGS.glob("*/reproduce.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_run_config_is_valid_and_its_model_is_built(path):
    from kd_accel.models.factory import build_model

    config = load_config_file(RunConfig, path)
    model = build_model(
        config.model.arch, stem=config.model.stem, num_classes=10, arch_args=config.model.arch_args, seed=config.seed
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    expected = 23_528_522 if "resnet50" in config.model.arch else 11_181_642
    if config.model.stem == "cifar":
        expected += 64 * 3 * (3 * 3 - 7 * 7)
    assert parameters == expected


def test_teacher_of_a_short_run_can_be_replaced_by_the_resnet50():
    teacher = load_config_file(RunConfig, CONFIGS / "cifar10/teacher_scratch.yaml")
    for path in (CONFIGS / "cifar10_short").glob("hybrid*.yaml"):
        alone = load_config_file(RunConfig, path)
        files = [f"--config={path}", f"--config={CONFIGS / 'cifar10_short/by_resnet50.yaml'}"]
        both, _ = parse_config(RunConfig, files)
        assert both.teacher.run == str(teacher.directory) and both.teacher.cache.dir != alone.teacher.cache.dir
        assert both.model_copy(update={"teacher": alone.teacher}) == alone


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.parent.name)
def test_files_of_a_chain_exist(path):
    chain = load_config_file(ReproduceConfig, path)
    runs = [load_config_file(RunConfig, CONFIGS.parent / file) for file in chain.runs]
    assert (CONFIGS.parent / chain.launch).is_file()
    assert [run.role if run.teacher is None else "distilled" for run in runs] == [
        "teacher",
        "student",
        "distilled",
        "distilled",
    ]
    assert {run.teacher.run for run in runs if run.teacher} == {str(runs[0].directory)}


def test_cifar10_configs_have_the_values_of_the_reference():
    fixed = load_config_file(RunConfig, CONFIGS / "cifar10/hybrid_fixed.yaml").distill
    scheduled = load_config_file(RunConfig, CONFIGS / "cifar10/hybrid_scheduled.yaml").distill
    assert (fixed.temperature, fixed.alpha) == (0.5, 0.7)
    assert scheduled.temperature == Schedule(start=0.5, floor=0.3, decay=0.95)
    assert scheduled.alpha == Schedule(start=0.8, floor=0.5, decay=0.95)
    assert fixed.logits == scheduled.logits == LogitLossConfig(loss="kl", args={"t_squared": True})
    stages = ["layer1", "layer2", "layer3", "layer4"]
    assert fixed.features == scheduled.features
    assert fixed.features == {"mse": FeatureLossConfig(weight=0.1, layers=stages, args={"direction": "both"})}


def test_students_of_a_chain_differ_only_in_the_distillation():
    names = ("student", "hybrid_fixed", "hybrid_scheduled")
    runs = [load_config_file(RunConfig, CONFIGS / "cifar10" / f"{name}.yaml") for name in names]
    assert len({str((run.data, run.model, run.optim, run.train, run.seed)) for run in runs}) == 1


def test_students_of_the_demo_differ_in_what_they_learn_from():
    names = ("few_labels", "no_labels_fixed", "no_labels_scheduled")
    few, *distilled = (load_config_file(RunConfig, CONFIGS / "digits" / f"{name}.yaml") for name in names)
    assert len({str((run.model, run.optim, run.seed, run.train.batch_size)) for run in (few, *distilled)}) == 1
    assert len({str((run.data.test_fraction, run.data.val_fraction, run.data.transform)) for run in (few, *distilled)}) == 1
    assert len({str((run.data, run.train)) for run in distilled}) == 1
    assert {run.distill.label_weight for run in distilled} == {0.0}
    # 970 images for the distilled ones; a batch of 32 is all that 50 images fill.
    assert few.train.epochs == 60 == distilled[0].train.epochs * (970 // 32)
