"""Loading of a teacher from a weights file, and the comparison of its classes with those of the data."""

import pytest
import torch
from safetensors.torch import save_file

from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.teacher.loading import load_own_teacher, load_run_teacher, refuse_other_classes
from kd_accel.teacher.teacher import Teacher

ARCH = "import:tests.support.models:teacher"
STATISTICS = {"mean": [0.4, 0.5, 0.6], "std": [0.2] * 3}


def test_a_teacher_is_loaded_from_a_weights_file(tmp_path):
    network = build_model(ARCH, num_classes=4, seed=7)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    teacher = load_own_teacher(ARCH, str(tmp_path / "weights.safetensors"), num_classes=4, **STATISTICS)
    for name, tensor in teacher.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])
    assert (teacher.mean, teacher.std, teacher.class_names, teacher.arch) == ([0.4, 0.5, 0.6], [0.2] * 3, None, ARCH)
    refuse_other_classes(teacher, ["any", "four", "class", "names"], run=None)


def test_weights_that_do_not_fit_exactly_are_refused(tmp_path):
    save_file(build_model(ARCH, num_classes=5).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"^teacher.*fc\.weight"):
        load_own_teacher(ARCH, str(tmp_path / "weights.safetensors"), num_classes=4, **STATISTICS)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path.name}/model.json.*no finished run in this directory"):
        load_run_teacher(tmp_path)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("a", "b"), "teacher.run: runs/t has 3 classes, the data has 2"),
        (("a", "c", "b"), "teacher.run: class 1 is 'b' in runs/t, but 'c' in the data"),
        (("a", "b", "d"), "teacher.run: class 2 is 'c' in runs/t, but 'd' in the data"),
    ],
)
def test_other_classes_are_refused(classes, message):
    teacher = Teacher(torch.nn.Identity(), [0.5] * 3, [0.2] * 3, ("a", "b", "c"))
    refuse_other_classes(teacher, ["a", "b", "c"], run="runs/t")
    with pytest.raises(UserError, match=message):
        refuse_other_classes(teacher, classes, run="runs/t")
