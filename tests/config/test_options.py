"""No setting is silent: each field is read somewhere, and those that change a training change it."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from kd_accel import config as declared
from tests import launching
from tests.in_process import train
from tests.launching import losses, metrics, summary

PACKAGE = Path(__file__).parents[2] / "kd_accel"
SECTIONS = [getattr(declared, name) for name in dir(declared) if name.endswith("Config") or name == "Schedule"]


def attributes_read():
    """Names read as attributes anywhere but in the rules."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "checks.py"]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


SINGLE_CHOICE = {"loss", "response"}
"""Contract names with one value so far: there is nothing to read yet."""


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_each_field_is_read(section):
    names = {field.name for field in fields(section)} - SINGLE_CHOICE
    assert names <= attributes_read(), names - attributes_read()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    train(run_dir, "--train.max_steps=6")
    return run_dir


CHANGES = {
    "label smoothing": ["--train.label_smoothing=0.1"],
    "clipping": ["--optim.clip_norm=0.01"],
    "bf16": ["--train.precision=bf16"],
    "augmentation": ["--data.augment=trivial_augment"],
    "weight decay": ["--optim.weight_decay=0.5"],
    "views": ["--data.view_seed=3"],
    "seed": ["--seed=3"],
}


@pytest.mark.parametrize("flags", CHANGES.values(), ids=CHANGES.keys())
def test_it_changes_the_losses(tmp_path, plain, flags):
    train(tmp_path / "run", "--train.max_steps=6", *flags)
    assert losses(tmp_path / "run") != losses(plain)
    assert losses(tmp_path / "run")[-1] == pytest.approx(losses(plain)[-1], rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--data.num_workers=1"], ["--train.channels_last=true"], ["--train.compile=true"]], ids=str)
def test_it_changes_the_speed_alone(tmp_path, plain, flags):
    train(tmp_path / "run", "--train.max_steps=6", *flags)
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=1e-4)


def test_the_summary_says_whether_tf32_was_allowed(plain):
    assert summary(plain)["tf32"] is None, "a CPU has none"


def test_the_moving_average_is_what_is_evaluated_and_saved(tmp_path, plain):
    train(tmp_path / "run", "--train.max_steps=6", "--train.ema_decay=0.99")
    assert losses(tmp_path / "run") == losses(plain)
    assert metrics(tmp_path / "run", "test") != metrics(plain, "test")
    assert (tmp_path / "run/model.safetensors").read_bytes() != (plain / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_compiled_distillation_layers_what_an_eager_one_does(tmp_path, distilled):
    train(tmp_path / "eager", "--train.max_steps=4", *distilled)
    train(tmp_path / "compiled", "--train.max_steps=4", *distilled, "--train.compile=true")
    for one, two in zip(metrics(tmp_path / "eager", "train"), metrics(tmp_path / "compiled", "train"), strict=True):
        assert two["loss_feature"] == pytest.approx(one["loss_feature"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "more"),
    [
        ("student_to_teacher", ""),
        ("teacher_to_student", ", pca_images: 64"),
    ],
)
def test_each_direction_trains_in_two_processes(tmp_path, teacher_run, direction, more):
    feature = f"--distill.feature={{weight: 3.0, layers: [layer1, layer2], direction: {direction}{more}}}"
    flags = ["--optim.lr=0.01", f"--teacher.run={teacher_run}", feature]
    launching.train(tmp_path / "run", *flags, processes=2)
    terms = [line["loss_feature"] for line in metrics(tmp_path / "run", "train")]
    assert terms[-1] < terms[0]
    assert summary(tmp_path / "run")["agreement"] is not None


def test_fine_tuning_onto_other_classes_starts_from_the_weights(tmp_path, teacher_run):
    flags = ["--model.arch=import:tests.own_models:teacher", f"--model.weights={teacher_run}", "--train.max_steps=2"]
    same = train(tmp_path / "same", *flags, "--optim.lr=1e-9")
    assert "starts from random weights" not in same
    assert summary(tmp_path / "same")["accuracy"] == summary(teacher_run)["accuracy"]
    digits = train(tmp_path / "digits", *flags, "--data.source=digits", "--data.augment=crop")
    assert "fc: starts from random weights" in digits
