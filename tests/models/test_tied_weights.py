"""Models of which two state dict keys are one parameter: saved, reloaded, averaged, resumed, distilled."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save_model as save_without_duplicates

from kd_accel.errors import UserError
from kd_accel.models.weights import ModelCard, load_run_model, load_weights, save_model
from kd_accel.teacher.teacher import Teacher
from kd_accel.training.average import MovingAverage
from tests.support.caches import FEATURE
from tests.support.edge_models import tied
from tests.support.in_process import cache, train
from tests.support.resuming import EVERYTHING, assert_same_run

ARCH = "import:tests.support.edge_models:tied"
CARD = ModelCard(ARCH, "imagenet", {}, ["a", "b", "c", "d"], [0.5] * 3, [0.25] * 3, 32)
STUDENT = [*EVERYTHING, f"--model.arch={ARCH}"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tied(4)


def is_tied(network):
    return network.fc.weight is network.codes.weight


def test_a_saved_model_is_reloaded_bit_for_bit_and_tied(tmp_path, model):
    save_model(tmp_path, model, card=CARD)
    loaded, _ = load_run_model(tmp_path)
    assert is_tied(loaded) and len(list(loaded.parameters())) == len(list(model.parameters()))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images))
    teachers = (Teacher(network, [0.5] * 3, [0.25] * 3) for network in (model, loaded))
    assert len({teacher.fingerprint for teacher in teachers}) == 1


@pytest.mark.parametrize("is_exact", [True, False])
def test_weights_saved_without_duplicates_are_loaded(tmp_path, model, is_exact):
    """`safetensors.torch.save_model` writes a shared tensor under one name."""
    save_without_duplicates(model, str(tmp_path / "weights.safetensors"))
    assert len(load_file(tmp_path / "weights.safetensors")) == len(model.state_dict()) - 1
    other = tied(4)
    assert load_weights(other, str(tmp_path / "weights.safetensors"), arch=ARCH, is_exact=is_exact) == []
    assert is_tied(other)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_different_values_for_one_parameter_are_refused(tmp_path, model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["codes.weight"] += 1
    save_file(state, tmp_path / "weights.safetensors")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"different values of fc.weight and codes.weight, which are one parameter"):
        load_weights(model, str(tmp_path / "weights.safetensors"), arch=ARCH, is_exact=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_missing_parameter_is_still_missing(tmp_path, model):
    state = {name: value.clone() for name, value in model.state_dict().items() if name not in ("fc.weight", "codes.weight")}
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"2 missing \(fc.weight, codes.weight\)"):
        load_weights(model, str(tmp_path / "weights.safetensors"), arch=ARCH, is_exact=True)


def test_a_tied_classifier_of_other_classes_starts_from_random_weights(tmp_path, model):
    save_model(tmp_path, model, card=CARD)
    other = tied(7)
    notices = load_weights(other, str(tmp_path), arch=ARCH, is_exact=False)
    assert [notice.partition(":")[0] for notice in notices] == ["codes", "fc"]
    assert is_tied(other) and torch.equal(other.layer1[0].weight, model.layer1[0].weight)
    with pytest.raises(UserError, match="3 of another shape"):
        load_weights(tied(7), str(tmp_path), arch=ARCH, is_exact=True)


def test_the_average_stays_tied(model):
    average, before = MovingAverage(model, decay=0.75), model.fc.weight.detach().clone()
    with torch.no_grad():
        model.fc.weight += 1
    average.update(model, step=10_000)
    assert is_tied(average.module)
    torch.testing.assert_close(average.module.codes.weight, before + 0.25)


def test_a_training_that_was_stopped_and_resumed_ends_in_the_same_bytes(tmp_path):
    train(tmp_path / "straight", *STUDENT)
    train(tmp_path / "stopped", *STUDENT, "--checkpoint.stop_after_steps=7")
    train(tmp_path / "stopped", *STUDENT, "--checkpoint.resume=must")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    saved = load_file(tmp_path / "straight/model.safetensors")
    assert torch.equal(saved["fc.weight"], saved["codes.weight"])


def test_a_tied_teacher_has_equal_outputs_live_and_cached(tmp_path):
    train(tmp_path / "teacher", "--role=teacher", f"--model.arch={ARCH}", "--train.max_steps=8")
    common = [*STUDENT, f"--teacher.run={tmp_path / 'teacher'}", FEATURE.replace("layer1, layer2", "layer2")]
    cached = ["--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path / 'cache'}", "--teacher.cache.dtype=float32"]
    train(tmp_path / "live", *common)
    cache("build", *common, *cached)
    train(tmp_path / "cached", *common, *cached)
    assert (tmp_path / "cached/model.safetensors").read_bytes() == (tmp_path / "live/model.safetensors").read_bytes()
