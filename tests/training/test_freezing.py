"""Frozen modules: weights and statistics that a training leaves as they are, with gradients for everything else."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kd_accel.errors import UserError
from kd_accel.losses.distiller import Distiller
from kd_accel.models.factory import build_model
from kd_accel.models.freezing import freeze_modules
from kd_accel.training.state import needs_buffers_exchanged
from kd_accel.types import TeacherOutput
from tests.support import launching
from tests.support.in_process import train
from tests.support.launching import losses
from tests.support.resuming import EVERYTHING, assert_same_run

FROZEN = ["--model.freeze=[layer1]", *EVERYTHING]
MEAN, STD = [0.5, 0.5, 0.5], [0.2, 0.2, 0.2]


@pytest.fixture
def initial():
    """Initial weights of the network of `EVERYTHING`."""
    return build_model("import:tests.support.models:student_with_everything", num_classes=4, seed=0).state_dict()


def changed(run_dir, initial):
    """Return the first names of the tensors that differ from the initial ones."""
    trained = load_file(run_dir / "model.safetensors")
    return {name.partition(".")[0] for name, tensor in trained.items() if not torch.equal(tensor, initial[name])}


@pytest.mark.parametrize("average", [[], ["--train.ema_decay=null"]], ids=["average", "last"])
def test_frozen_weights_and_statistics_keep_their_bits(tmp_path, initial, distilled, average):
    """The features of the frozen layer are compared, too."""
    text = train(tmp_path / "run", *distilled, *FROZEN, *average)
    assert changed(tmp_path / "run", initial) == {"layer2", "fc"}
    assert "model.freeze: layer1 keeps random weights, because model.weights is null" in text
    train(tmp_path / "free", *distilled, *EVERYTHING, *average)
    assert changed(tmp_path / "free", initial) == {"layer1", "layer2", "fc"}


def test_a_feature_loss_on_frozen_layers_alone_is_refused(tmp_path, distilled):
    flags = [*distilled[:-1], *EVERYTHING, "--distill.features.mse={layers: [layer1]}"]
    text = train(tmp_path / "run", *flags, "--model.freeze=[layer1]", code=2)
    expected = "features.mse: its layers (layer1) depend on frozen modules alone (layer1), so that it has no effect"
    assert expected in text and not (tmp_path / "run").exists()
    train(tmp_path / "run", *flags, "--model.freeze=[layer1.1]", "--train.max_steps=2")


def test_a_single_norm_can_be_frozen(tmp_path, initial):
    train(tmp_path / "run", *FROZEN, "--model.freeze=[layer1.1]")
    trained = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(trained[name], initial[name]) for name in initial if name.startswith("layer1.1."))
    assert not torch.equal(trained["layer1.0.weight"], initial["layer1.0.weight"])


def test_weights_are_loaded_before_they_are_frozen(tmp_path, teacher_run):
    flags = ["--model.arch=import:tests.support.models:teacher", f"--model.weights={teacher_run}", "--model.freeze=[layer1]"]
    text = train(tmp_path / "run", *flags, "--train.max_steps=3")
    assert "random weights" not in text
    assert changed(tmp_path / "run", load_file(teacher_run / "model.safetensors")) == {"layer2", "fc"}


def test_a_frozen_norm_uses_its_running_statistics_in_training():
    """The loss of a training forward is that of the network with the frozen half in evaluation mode, in float64."""
    network = build_model("import:tests.support.models:teacher", num_classes=4, seed=0).double()
    with torch.no_grad():
        network.layer1[1].running_mean.uniform_(-1, 1)
        network.layer1[1].running_var.uniform_(0.5, 2)
    distiller = Distiller(network, mean=MEAN, std=STD, freeze=["layer1"]).double()
    images, labels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 4
    distiller.eval().train()
    assert distiller.training and network.layer2[1].training and not network.layer1[1].training
    norm = network.layer1[1]
    pixels = (images.double() / 255 - 0.5) / 0.2
    mean, variance = (value.view(1, -1, 1, 1) for value in (norm.running_mean, norm.running_var))
    scale, shift = (value.view(1, -1, 1, 1) for value in (norm.weight, norm.bias))
    hidden = ((network.layer1[0](pixels) - mean) / (variance + norm.eps).sqrt() * scale + shift).relu()
    expected = nn.functional.cross_entropy(network.fc(network.layer2(hidden).mean((2, 3))), labels)
    before = norm.running_mean.clone()
    found = distiller(images, TeacherOutput(), labels).loss
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-6)
    assert torch.equal(norm.running_mean, before)


def test_ranks_do_not_exchange_the_statistics_of_frozen_norms():
    network = build_model("import:tests.support.models:teacher", num_classes=4)
    assert not needs_buffers_exchanged(Distiller(network, mean=MEAN, std=STD, freeze=["layer1"]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layr1"], "model.freeze: SmallNet has no module 'layr1'; did you mean layer1 or layer2"),
        (["layer1", "layer2", "fc"], "model.freeze: layer1, layer2, fc leaves no parameter of the model to train"),
        (["layer1", "layer1"], "model.freeze: layer1 is listed more than once"),
    ],
)
def test_wrong_names_are_refused(tmp_path, names, message):
    assert message in train(tmp_path / "run", f"--model.freeze={names}", code=2)
    assert not (tmp_path / "run").exists()


def test_the_field_of_the_message_is_that_of_the_caller():
    network = build_model("import:tests.support.models:student", num_classes=4)
    with pytest.raises(UserError, match="^freeze: SmallNet has no module ''"):
        freeze_modules(network, [""])


def test_a_resumed_training_keeps_frozen_modules(tmp_path, distilled):
    flags = [*distilled, *FROZEN]
    train(tmp_path / "straight", *flags)
    train(tmp_path / "stopped", *flags, "--checkpoint.stop_after_steps=7")
    train(tmp_path / "stopped", *flags)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    other = train(tmp_path / "stopped", *flags, "--model.freeze=[]", code=2)
    assert "model.freeze: ['layer1'] in the run, [] now" in other


@pytest.mark.slow
@pytest.mark.parametrize("step", ["grad_accum_steps=2", "precision=bf16", "compile=true"])
def test_frozen_modules_in_other_kinds_of_steps(tmp_path, initial, step):
    train(tmp_path / "run", *FROZEN, f"--train.{step}", "--train.max_steps=4")
    assert changed(tmp_path / "run", initial) == {"layer2", "fc"}


@pytest.mark.slow
def test_two_processes_leave_frozen_modules_alone_and_resume(tmp_path, initial, distilled):
    flags = [*distilled, *FROZEN]
    launching.train(tmp_path / "straight", *flags, processes=2)
    launching.train(tmp_path / "stopped", *flags, "--checkpoint.stop_after_steps=7", processes=2)
    launching.train(tmp_path / "stopped", *flags, processes=2)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    assert changed(tmp_path / "straight", initial) == {"layer2", "fc"}


@pytest.mark.slow
def test_two_processes_train_what_one_does_below_a_frozen_norm(tmp_path):
    """All norms are frozen, so that the results do not depend on the parts of a batch."""
    flags = ["--model.arch=import:tests.support.models:teacher", "--model.freeze=[layer1, layer2.1]", "--train.max_steps=12"]
    for processes in (1, 2):
        launching.train(tmp_path / str(processes), *flags, processes=processes)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


def test_a_forward_of_one_sample_is_allowed_if_all_norms_are_frozen(tmp_path):
    flags = ["--model.arch=import:tests.support.models:teacher", "--train.batch_size=2", "--train.grad_accum_steps=2"]
    flags += ["--train.max_steps=2"]
    assert "too few for the model's BatchNorm layers" in train(tmp_path / "free", *flags, code=2)
    train(tmp_path / "frozen", *flags, "--model.freeze=[layer1, layer2.1]")
