"""Public API: its names, trainings and evaluations from Python, predictions, the teacher, and errors for wrong use."""

import ast
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import kd_accel as kd
from tests.support import launching
from tests.support.launching import LAUNCH, ROOT, environment, metrics, summary
from tests.support.models import images as own_images
from tests.support.models import teacher as teacher_network

SMALL = {
    "data": {"source": "import:tests.support.models:images", "transform": "crop_flip", "val_fraction": 0.2},
    "model": {"arch": "import:tests.support.models:student"},
    "optim": {"lr": 0.05},
    "train": {"batch_size": 16, "epochs": 3, "log_every_steps": 1},
    "tracking": {"wandb": "disabled"},
}
"""The settings of tests/support/launching.py, nested."""


def comparable(run_dir):
    """Return the model, metrics and summary of a run, without its name."""
    content = {key: value for key, value in summary(run_dir).items() if key != "name"}
    return (Path(run_dir) / "model.safetensors").read_bytes(), metrics(run_dir), content


@pytest.fixture(scope="module")
def command_run(tmp_path_factory):
    """Return a run of `kd-accel train` in another process."""
    run_dir = tmp_path_factory.mktemp("runs") / "command"
    launching.train(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return kd.train(SMALL, run_dir=tmp_path_factory.mktemp("runs") / "python")


@pytest.fixture(scope="module")
def pictures():
    """Return the test samples, uint8 [41, 32, 32, 3]."""
    return own_images("test", 32)["images"]


def test_every_public_name_is_importable_and_documented():
    assert len(set(kd.__all__)) == len(kd.__all__) and dir(kd) == sorted(kd.__all__)
    for name in kd.__all__:
        assert getattr(kd, name).__doc__, name
    with pytest.raises(AttributeError, match="module 'kd_accel' has no attribute 'Techer'"):
        kd.Techer  # noqa: B018


def test_names_for_type_checkers_are_the_same():
    (block,) = [node for node in ast.parse(Path(kd.__file__).read_text()).body if isinstance(node, ast.If)]
    imported = {f"{node.module}.{alias.name}": alias.asname for node in block.body for alias in node.names}
    places = {f"{place}.{name}": name for name, place in kd._ATTRIBUTES.items()}
    assert imported == {**places, **{place: name for name, place in kd._SUBMODULES.items()}}


def test_import_does_not_import_torch():
    code = "import sys, kd_accel; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def as_file(directory):
    return str(ROOT / "tests/support/small.yaml"), {}


def as_path(directory):
    return ROOT / "tests/support/small.yaml", {"seed": 0}


def as_mapping(directory):
    return {**SMALL, "optim": {"lr": 0.7}}, {"optim.lr": 0.05}


def as_config(directory):
    return kd.RunConfig(**SMALL), {}


@pytest.mark.parametrize("form", [as_file, as_path, as_mapping, as_config])
def test_training_from_python_equals_the_command(command_run, tmp_path, form):
    config, settings = form(tmp_path)
    result = kd.train(config, run_dir=tmp_path / "run", **settings)
    assert result.directory == tmp_path / "run" and result.summary["steps"] == 24
    assert comparable(result.directory) == comparable(command_run)


def test_trainings_of_one_process_are_independent(command_run, tmp_path):
    """Precision, failure and process-wide switches of a training have no effect on the next."""
    first = kd.train(SMALL, run_dir=tmp_path / "first", **{"train.precision": "bf16"})
    with pytest.raises(kd.UserError, match="train.batch_size: 999 is more than the 128 training samples"):
        kd.train(SMALL, run_dir=tmp_path / "failed", **{"train.precision": "bf16", "train.batch_size": 999})
    second = kd.train(SMALL, run_dir=tmp_path / "second", **{"train.deterministic": True})
    launching.train(tmp_path / "command", "--train.precision=bf16")
    assert comparable(first.directory) == comparable(tmp_path / "command")
    assert comparable(second.directory)[:2] == comparable(command_run)[:2]
    assert not torch.are_deterministic_algorithms_enabled()


def test_accelerator_of_the_caller_is_unchanged(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    own = Accelerator(cpu=True, gradient_accumulation_steps=4)
    run = kd.train(SMALL, run_dir=tmp_path / "run", **{"train.precision": "bf16", "train.epochs": 1})
    kd.evaluate(run.directory)
    assert (own.mixed_precision, own.gradient_accumulation_steps, own.num_processes) == ("no", 4, 1)
    assert Accelerator().device == own.device == torch.device("cpu")


def test_random_generators_of_the_caller_are_unchanged(tmp_path):
    """A random search would draw the same point again after each training."""
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    expected = [random.random(), np.random.rand(), torch.rand(()).item()]
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    run = kd.train(SMALL, run_dir=tmp_path / "run", **{"train.max_steps": 1})
    kd.evaluate(run.directory)
    assert [random.random(), np.random.rand(), torch.rand(()).item()] == expected


def test_training_in_a_thread(tmp_path):
    """Only the main thread can handle signals."""
    found = []
    thread = threading.Thread(target=lambda: found.append(kd.train(SMALL, run_dir=tmp_path / "run", **{"train.max_steps": 2})))
    thread.start()
    thread.join()
    assert found[0].summary["steps"] == 2


SWITCHES = """
import torch
from kd_accel.api import _kernel_choices_restored
from kd_accel.models.inference import choose_kernels

before = set_and_read()
with _kernel_choices_restored():
    choose_kernels(deterministic=False, tf32=False)
print(before, read())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choose", "read"),
    [
        ("torch.set_float32_matmul_precision('medium')", "torch.get_float32_matmul_precision()"),
        ("setattr(torch.backends.cuda.matmul, 'allow_tf32', True)", "torch.backends.cuda.matmul.allow_tf32"),
        ("setattr(torch.backends.cuda.matmul, 'fp32_precision', 'tf32')", "torch.backends.cuda.matmul.fp32_precision"),
        ("setattr(torch.backends, 'fp32_precision', 'ieee')", "torch.backends.cuda.matmul.fp32_precision"),
    ],
)
def test_switches_of_tf32_are_restored_by_either_of_their_names(choose, read):
    functions = f"def read():\n    return {read}\n\ndef set_and_read():\n    {choose}\n    return read()\n"
    done = launching.python("-c", SWITCHES.replace("before = ", f"{functions}\nbefore = ", 1))
    before, after = done.stdout.split()
    assert before == after


def test_cache_after_a_training_in_another_precision(tmp_path):
    kd.train(SMALL, run_dir=tmp_path / "run", **{"train.precision": "bf16", "train.epochs": 1})
    data = kd.ImageDataset("import:tests.support.models:images", limit_train=16, limit_test=8)
    views = kd.ViewDataset(data, kd.transforms.Crop(32), num_views=1)
    teacher = kd.Teacher.from_run(tmp_path / "run")
    cache = kd.TeacherCache.build(tmp_path / "cache", teacher, views, dtype="float32", batch_size=16)
    indices = torch.tensor([item["index"] for item in views])
    live = teacher(torch.stack([item["image"] for item in views]))
    assert torch.allclose(cache.read(indices, 0).logits, live.logits, atol=1e-5)  # bf16 would differ by 1e-3


def test_cache_of_a_wrapped_dataset_without_test_samples(tmp_path):
    content = own_images("train", 32)
    data = kd.ImageDataset(list(zip(content["images"][:40], content["labels"], strict=False)), val_fraction=0.0)
    views = kd.ViewDataset(data, kd.transforms.CropFlip(32), num_views=2)
    teacher = kd.Teacher(teacher_network(4), mean=data.mean, std=data.std)
    layers = {"layer2": kd.targets.PCA(4, images=20)}
    kd.TeacherCache.build(tmp_path, teacher, views, layers=layers, dtype="float32", batch_size=8)
    cache = kd.TeacherCache.open(tmp_path, teacher=teacher)
    views = cache.views(data)
    views.set_view(1)
    for batch in DataLoader(views, batch_size=8):
        target, live = cache.read(batch["index"], batch["view"]), teacher(batch["image"], layers=layers)
        assert torch.allclose(target.logits, live.logits, atol=1e-4)
        assert torch.allclose(target.features["layer2"], layers["layer2"](live.features["layer2"]), atol=1e-4)


def test_finished_run_is_returned_and_paused_run_resumes(tmp_path, command_run):
    with pytest.raises(kd.UserError, match="checkpoint.stop_after_steps: the training is paused"):
        kd.train(SMALL, run_dir=tmp_path / "run", **{"checkpoint.stop_after_steps": 10})
    resumed = kd.train(SMALL, run_dir=tmp_path / "run")
    assert comparable(resumed.directory)[0] == comparable(command_run)[0]
    written = (resumed.directory / "summary.json").stat().st_mtime_ns
    again = kd.train(SMALL, run_dir=tmp_path / "run")
    assert again == resumed and (again.directory / "summary.json").stat().st_mtime_ns == written


def test_evaluations_equal_the_summary(tmp_path, result):
    evaluated = kd.evaluate(str(result.directory))
    assert (evaluated["samples"], evaluated["accuracy"]) == (41, result.summary["accuracy"])
    assert evaluated["loss"] == metrics(result.directory, "test")[0]["loss"]
    validated, last = kd.evaluate(result.directory, split="val"), metrics(result.directory, "val")[-1]
    assert (validated["samples"], validated["loss"], validated["accuracy"]) == (32, last["loss"], last["accuracy"])
    teacher = {"run": str(result.directory)}
    distilled = kd.train({**SMALL, "teacher": teacher}, run_dir=tmp_path / "distilled", seed=1)
    evaluated = kd.evaluate(distilled.directory)
    assert evaluated["agreement"] == distilled.summary["agreement"] > 0
    assert evaluated["accuracy"] == distilled.summary["accuracy"]


@pytest.mark.slow
def test_two_trainings_in_one_launch(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nimport kd_accel as kd\n"
        "for precision in ('float32', 'bf16'):\n"
        "    directory = f'{sys.argv[1]}/{precision}'\n"
        "    run = kd.train('tests/support/small.yaml', run_dir=directory, **{'train.precision': precision})\n"
        "    assert run.summary['world_size'] == 2\n"
        "    assert kd.evaluate(run.directory)['accuracy'] == run.summary['accuracy']\n"
    )
    launch = [*LAUNCH, "--config_file", "launch/cpu2.yaml", program, tmp_path]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        launch, cwd=ROOT, env=environment(PYTHONPATH=paths), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launching.train(tmp_path / "command", "--train.precision=bf16", processes=2)
    assert comparable(tmp_path / "bf16") == comparable(tmp_path / "command")


@pytest.mark.parametrize(
    ("config", "settings", "error", "message"),
    [
        (3, {}, TypeError, "config: must be a RunConfig, a path or a mapping, not int"),
        ("absent.yaml", {}, ValueError, "config: file 'absent.yaml' not found"),
        ({"modle": {}}, {}, ValueError, "modle: no such setting; did you mean model"),
        (SMALL, {"optim.lr": "fast"}, ValueError, "optim.lr: must be a number"),
        (SMALL, {"optim.lr": -1.0}, ValueError, "optim.lr: -1.0"),
        (SMALL, {"distill.logits.loss": "kll", "teacher.run": "runs/x"}, ValueError, "distill.logits.loss: .*kl"),
        ({**SMALL, "teacher": {"run": "absent"}}, {}, ValueError, "absent"),
    ],
)
def test_wrong_trainings_are_refused(tmp_path, config, settings, error, message):
    with pytest.raises(error, match=message):
        kd.train(config, run_dir=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_wrong_evaluations_are_refused(tmp_path, result):
    with pytest.raises(ValueError, match="split: 'train' is not a held-out split; use one of val, test"):
        kd.evaluate(result.directory, split="train")
    for function in (kd.evaluate, kd.load_model, kd.Teacher.from_run):
        with pytest.raises(kd.UserError, match="no finished run in this directory"):
            function(tmp_path)


def test_loaded_model_has_the_stored_weights(result):
    model = result.load_model()
    stored = load_file(result.directory / "model.safetensors")
    assert stored.keys() == model.network.state_dict().keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.network.state_dict().items())
    assert model.class_names == ["red", "green", "blue", "olive"] and not model.network.training


def test_predictions_have_the_accuracy_of_the_summary(result, pictures):
    predicted = [prediction.label for prediction in result.load_model().predict(pictures)]
    names, labels = result.load_model().class_names, own_images("test", 32)["labels"]
    correct = [name == names[label] for name, label in zip(predicted, labels, strict=True)]
    assert sum(correct) / len(correct) == pytest.approx(result.summary["accuracy"])


PICTURE = np.zeros((32, 32, 3), dtype=np.uint8)


def test_teacher_from_a_module(pictures):
    torch.manual_seed(0)
    network = teacher_network(4)
    teacher = kd.Teacher(network, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    output = teacher(images, layers=["layer1", "layer2"])
    normalized = (images / 255 - torch.tensor(teacher.mean).view(1, 3, 1, 1)) / torch.tensor(teacher.std).view(1, 3, 1, 1)
    layer1 = network.eval().layer1(normalized)
    assert list(output.features) == ["layer1", "layer2"] and output.logits.requires_grad is False
    assert torch.allclose(output.features["layer1"], layer1, atol=1e-5)
    assert torch.allclose(output.features["layer2"], network.layer2(layer1), atol=1e-5)
    assert torch.allclose(output.logits, network(normalized), atol=1e-5)
    assert teacher(images).features == {} and teacher.class_names is None


def test_teacher_from_a_run(result, pictures):
    teacher, model = kd.Teacher.from_run(result.directory), result.load_model()
    assert (teacher.mean, teacher.std) == (model.card.mean, model.card.std)
    assert teacher.class_names == tuple(model.class_names) and teacher.arch == "import:tests.support.models:student"
    probabilities = teacher(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()).logits.softmax(1)
    for prediction, row in zip(model.predict(pictures), probabilities, strict=True):
        assert list(prediction.probabilities.values()) == row.tolist()


@pytest.mark.parametrize(
    ("images", "layers", "error", "message"),
    [
        (torch.rand(2, 3, 32, 32), [], TypeError, r"images: must be a uint8 tensor .*, not torch.float32 \[2, 3, 32, 32\]"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), [], TypeError, r"images: .* not torch.uint8 \[3, 32, 32\]"),
        (PICTURE[None], [], TypeError, "images: must be a uint8 tensor .*, not ndarray"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ["layer9"], ValueError, "layers: .*layer9"),
    ],
)
def test_wrong_calls_of_a_teacher_are_refused(images, layers, error, message):
    teacher = kd.Teacher(teacher_network(4), mean=[0.5] * 3, std=[0.2] * 3)
    with pytest.raises(error, match=message):
        teacher(images, layers=layers)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [([0.5], [0.2] * 3, "mean: .* must be three numbers"), ([0.5] * 3, [0.2, 0.0, 0.2], "std: .* must be three positive")],
)
def test_wrong_statistics_of_a_teacher_are_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        kd.Teacher(teacher_network(4), mean=mean, std=std)
