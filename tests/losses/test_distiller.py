"""The distiller: its loss against the formula bit for bit, terms, weights, state dict, layers, dtypes and compilation."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kd_accel.errors import UserError
from kd_accel.losses.base import FeatureLoss, LogitLoss
from kd_accel.losses.distiller import Distiller, LossWeights
from kd_accel.losses.features import MSE, mse_loss
from kd_accel.losses.logits import KL, cross_entropy, kl_loss
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import FeatureExtractor
from kd_accel.types import TeacherOutput
from tests.support.float64_references import LABELS, STUDENT, TEACHER, reference_cross_entropy, reference_kl
from tests.support.losses import ClassShareLoss, TrueClassLoss

STATISTICS = {"mean": [0.5] * 3, "std": [0.2] * 3}
LAYERS = {"layer1": "layer1", "layer2": "layer2"}
TARGETS = {"layer1": (12, 8, 8), "layer2": (20, 2, 2)}
WEIGHTS = LossWeights(temperature=0.5, alpha=0.7, features={"mse": 0.1})


class FixedOutput(nn.Module):
    """Student whose logits and feature map are those of the references, for any images [B, 3, 1, 1]."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(STUDENT))
        self.layer = nn.Identity()

    def forward(self, images):
        return self.layer(self.logits[: len(images), :, None, None])[:, :, 0, 0]


def batch(samples=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (samples, 3, 32, 32), generator=generator, dtype=torch.uint8)
    features = {layer: torch.randn(samples, *shape, generator=generator) for layer, shape in TARGETS.items()}
    return images, TeacherOutput(torch.randn(samples, 4, generator=generator), features), torch.arange(samples) % 4


def build(arch="student", **settings):
    network = build_model(f"import:tests.support.models:{arch}", num_classes=4)
    return Distiller(network, **{**STATISTICS, **settings})


def hybrid(**settings):
    direction = settings.pop("direction", "student_to_teacher")
    losses = {"logits": KL(), "features": {"mse": MSE(direction=direction)}}
    distiller = build(**{**losses, "layers": LAYERS, "target_shapes": TARGETS, **settings})
    distiller.start_recording()
    return distiller


def reference_distiller(**settings):
    """Build a distiller with the logits of the references, and its arguments (images, target, labels)."""
    distiller = Distiller(FixedOutput().double(), image_size=1, **STATISTICS, **settings)
    distiller.start_recording()
    teacher = torch.tensor(TEACHER)
    target = TeacherOutput(teacher, {"layer": teacher[:, :, None, None]})
    return distiller, (torch.zeros(len(STUDENT), 3, 1, 1, dtype=torch.uint8), target, torch.tensor(LABELS))


@pytest.mark.parametrize("t_squared", [True, False])
@pytest.mark.parametrize("direction", ["student_to_teacher", "both"])
def test_loss_equals_its_formula_bit_for_bit(direction, t_squared):
    shapes = TARGETS if direction == "student_to_teacher" else {"layer1": (8, 8, 8), "layer2": (16, 2, 2)}
    distiller = hybrid(direction=direction, logits=KL(t_squared=t_squared), target_shapes=shapes, label_smoothing=0.1)
    images, target, labels = batch()
    features = {layer: target.features[layer][:, : shape[0]] for layer, shape in shapes.items()}
    if direction == "both":
        features["layer2"] = torch.randn(4, 16, 2, 2)
    target = TeacherOutput(target.logits, features)
    output = distiller(images, target, labels, WEIGHTS)

    student = distiller.student
    with FeatureExtractor(student, list(LAYERS)) as extractor:
        logits = student(distiller.normalize(images))
        maps = extractor.take()
    projectors = distiller.feature_losses["mse"].projectors
    parts = [mse_loss(projectors[layer](maps[layer]), features[layer]) for layer in LAYERS]
    kl, ce = (
        kl_loss(logits, target.logits, temperature=0.5, t_squared=t_squared),
        cross_entropy(logits, labels, label_smoothing=0.1),
    )
    assert torch.equal(output.loss, 0.7 * kl + (1 - 0.7) * ce + 0.1 * (parts[0] + parts[1]))
    assert list(output.terms) == distiller.term_names == ["ce", "kl", "features/mse"]
    expected = {"ce": ce, "kl": kl, "features/mse": parts[0] + parts[1]}
    assert all(torch.equal(output.terms[name], term) for name, term in expected.items())
    assert torch.equal(output.logits, logits)


def test_hybrid_loss_and_gradient_match_the_float64_reference():
    losses = {"logits": KL(), "features": {"mse": MSE(direction="teacher_to_student")}}
    distiller, arguments = reference_distiller(**losses, layers={"layer": "layer"}, target_shapes={"layer": (5, 1, 1)})
    output = distiller(*arguments, WEIGHTS)
    output.loss.backward()
    kl, kl_gradient = reference_kl(STUDENT, TEACHER, 0.5, True)
    ce, ce_gradient = reference_cross_entropy(STUDENT, LABELS, 0.0)
    mse, mse_gradient = ((STUDENT - TEACHER) ** 2).mean(), 2 * (STUDENT - TEACHER) / STUDENT.size
    assert output.loss.item() == pytest.approx(0.7 * kl + 0.3 * ce + 0.1 * mse, rel=1e-12)
    assert [term.item() for term in output.terms.values()] == pytest.approx([ce, kl, mse])
    expected = 0.7 * kl_gradient + 0.3 * ce_gradient + 0.1 * mse_gradient
    np.testing.assert_allclose(distiller.student.logits.grad.numpy(), expected, atol=1e-14)


@pytest.mark.parametrize(
    ("logits", "weights", "expected"),
    [
        (KL(), LossWeights(alpha=0.7, label_weight=0.2), {"ce": 0.2, "kl": 0.7}),
        (KL(), LossWeights(alpha=0.7), {"ce": 1 - 0.7, "kl": 0.7}),
        (KL(), None, {"ce": 0.5, "kl": 0.5}),
        (None, LossWeights(alpha=0.7, label_weight=0.2), {"ce": 0.2}),
        (None, LossWeights(alpha=0.7), {"ce": 1}),
    ],
)
def test_loss_is_the_weighted_sum_of_its_terms(logits, weights, expected):
    distiller, arguments = reference_distiller(logits=logits)
    output = distiller(*arguments, weights)
    assert output.loss.item() == pytest.approx(
        sum(expected[name] * term.item() for name, term in output.terms.items()), rel=1e-12
    )
    assert output.terms.keys() == expected.keys()


def test_loss_without_distillation_is_the_cross_entropy():
    distiller, (images, _, labels) = reference_distiller(label_smoothing=0.1)
    output = distiller(images, TeacherOutput(), labels)
    assert output.loss is output.terms["ce"]
    expected = functional.cross_entropy(torch.tensor(STUDENT), labels, label_smoothing=0.1)
    assert output.loss.item() == pytest.approx(expected.item())
    assert distiller.term_names == ["ce"]


def test_projectors_receive_a_gradient_with_weight_zero():
    distiller = hybrid()
    distiller(*batch(), LossWeights(features={"mse": 0.0})).loss.backward()
    gradients = [weight.grad for weight in distiller.feature_losses.parameters()]
    assert len(gradients) == 4 and not any(gradient.any() for gradient in gradients)


def test_several_feature_losses_with_own_layers_and_weights():
    losses = {"deep": MSE(direction="student_to_teacher"), "crossed": MSE(direction="student_to_teacher")}
    layers = {"deep": {"layer2": "layer2"}, "crossed": {"layer1": "layer2"}}
    distiller = build(features=losses, layers=layers, target_shapes=TARGETS)
    distiller.start_recording()
    output = distiller(*batch(), LossWeights(features={"deep": 2.0, "crossed": 3.0}))
    ce, deep, crossed = output.terms.values()
    assert list(output.terms) == ["ce", "features/deep", "features/crossed"]
    assert torch.equal(output.loss, ce + 2.0 * deep + 3.0 * crossed)
    projector = distiller.feature_losses["crossed"].projectors["layer1"].conv
    assert (projector.in_channels, projector.out_channels) == (8, 20)


class Recorder(FeatureLoss):
    """Feature loss that keeps its arguments."""

    uses_index = True

    def forward(self, features, targets, *, index=None):
        self.arguments = features, targets, index
        return sum((feature.mean() for feature in features.values()), torch.zeros(()))


class LogitRecorder(LogitLoss):
    """Logit loss that keeps its arguments."""

    uses_index = True

    def forward(self, student_logits, teacher_logits, *, temperature, labels, index=None):
        self.arguments = student_logits, teacher_logits, temperature, labels, index
        return student_logits.mean()


def test_arguments_of_the_losses():
    logits, feature = LogitRecorder(), Recorder()
    layers = {"layer1": "theirs.1", "layer2": "theirs.2"}
    distiller = build(
        logits=logits, features={"own": feature}, layers=layers, target_shapes={"theirs.1": (1, 2, 2), "theirs.2": (1, 1, 1)}
    )
    distiller.start_recording()
    images, target, labels = batch()
    target = TeacherOutput(target.logits, {"theirs.1": torch.zeros(4, 1, 2, 2), "theirs.2": torch.ones(4, 1, 1, 1)})
    index = torch.tensor([9, 3, 5, 1])
    output = distiller(images, target, labels, LossWeights(temperature=3.0), index=index)
    maps, targets, given_index = feature.arguments
    assert {layer: tuple(value.shape) for layer, value in maps.items()} == {"layer1": (4, 8, 8, 8), "layer2": (4, 16, 2, 2)}
    assert targets["layer1"] is target.features["theirs.1"] and targets["layer2"] is target.features["theirs.2"]
    assert given_index is index and logits.arguments[4] is index
    assert logits.arguments[0] is output.logits and logits.arguments[1] is target.logits
    assert logits.arguments[2] == 3.0 and logits.arguments[3] is labels
    assert distiller.term_names == ["ce", "logits", "features/own"]
    assert distiller.uses_index and not hybrid().uses_index


def test_state_dict_has_student_and_losses():
    names = set(hybrid(arch="student_with_everything").state_dict())
    student = {
        f"student.{name}"
        for name in build_model("import:tests.support.models:student_with_everything", num_classes=4).state_dict()
    }
    own = {f"feature_losses.mse.projectors.{layer}.conv.{name}" for layer in LAYERS for name in ("weight", "bias")}
    assert names == student | own


def test_hooks_are_registered_only_while_recording():
    distiller = hybrid()
    assert distiller.student.layer1._forward_hooks
    distiller.stop_recording()
    assert not any(part._forward_hooks for part in distiller.student.modules())
    with pytest.raises(RuntimeError, match="call start_recording"):
        distiller(*batch())


def test_recording_twice_is_recording():
    distiller = hybrid()
    distiller.start_recording()
    assert len(distiller.student.layer1._forward_hooks) == 1 and distiller(*batch(), WEIGHTS).loss.isfinite()


@pytest.mark.parametrize("is_recording", [True, False])
def test_a_copy_records_its_own_maps(is_recording):
    """Maps that the original has recorded outside of a forward of its own are not copied."""
    distiller = hybrid()
    distiller.student(torch.zeros(1, 3, 32, 32))
    if not is_recording:
        distiller.stop_recording()
    copied = copy.deepcopy(distiller)
    if not is_recording:
        copied.start_recording()
        distiller.start_recording()
    with torch.no_grad():
        copied.student.layer1[0].weight.mul_(2)
    expected = distiller(*batch(), WEIGHTS).terms["features/mse"]
    assert copied(*batch(), WEIGHTS).terms["features/mse"] != expected
    assert distiller(*batch(), WEIGHTS).terms["features/mse"] == expected
    copied.stop_recording()
    assert not any(part._forward_hooks for part in copied.student.modules())


def test_a_student_of_any_image_size_needs_no_layers():
    """Without feature losses no forward is needed to measure maps."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 4))
    distiller = Distiller(network, logits=KL(), **STATISTICS)
    images = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    assert distiller(images, TeacherOutput(torch.zeros(2, 4)), torch.zeros(2, dtype=torch.int64)).loss.isfinite()


def test_a_loss_belongs_to_one_distiller():
    loss = MSE(direction="student_to_teacher")
    build(features={"mse": loss}, layers=LAYERS, target_shapes=TARGETS)
    with pytest.raises(ValueError, match="features: the loss mse is that of another distiller; create one for each"):
        build(features={"mse": loss}, layers=LAYERS, target_shapes=TARGETS)


def test_maps_of_other_channels_need_a_projection():
    with pytest.raises(UserError, match=r"direction: teacher_to_student .* layer1 has 8, and its target 12; use PCA\(8\)"):
        build(features={"mse": MSE(direction="teacher_to_student")}, layers=LAYERS, target_shapes=TARGETS)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"layers": {}},
            ValueError,
            "layers: missing for the feature losses mse; pass {student layer: teacher layer} for each",
        ),
        (
            {"layers": {"mes": LAYERS}},
            ValueError,
            r"layers: mes not found among the feature losses \(mse\); use their names as keys",
        ),
        ({"layers": {"layer9": "layer1"}}, UserError, "has no module 'layer9'"),
        (
            {"target_shapes": {"layer1": (12, 8, 8)}},
            ValueError,
            r"target_shapes: missing for .* layer2 \(given: layer1\); pass \(D, H, W\)",
        ),
        ({"target_shapes": None}, ValueError, "target_shapes: missing for .* layer1, layer2"),
    ],
)
def test_mismatched_layers_and_shapes_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        hybrid(**settings)


@pytest.mark.parametrize(
    ("logits", "layers", "weights", "message"),
    [
        (False, LAYERS, {}, "target: lacks logits, which the logit loss compares; pass TeacherOutput"),
        (True, ["layer1"], {}, "target: lacks features of the teacher's layers layer2; pass TeacherOutput"),
        (True, LAYERS, {"mes": 0.1}, r"weights.features: mes not found among the feature losses \(mse\); use their names"),
    ],
)
def test_teacher_outputs_and_weights_that_do_not_match_the_losses_are_refused(logits, layers, weights, message):
    images, target, labels = batch()
    target = TeacherOutput(target.logits if logits else None, {layer: target.features[layer] for layer in layers})
    with pytest.raises(ValueError, match=message):
        hybrid()(images, target, labels, LossWeights(features=weights))


def test_layer_and_loss_names_with_dots():
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 1)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    shapes = {"layers": {"0.0": "a.b"}, "target_shapes": {"a.b": (7, 4, 4)}, "image_size": 4}
    distiller = Distiller(network, **STATISTICS, features={"own.mse": MSE(direction="student_to_teacher")}, **shapes)
    distiller.start_recording()
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    output = distiller(images, TeacherOutput(None, {"a.b": torch.zeros(2, 7, 4, 4)}), torch.zeros(2, dtype=torch.int64))
    output.loss.backward()
    assert list(output.terms) == ["ce", "features/own.mse"]
    assert distiller.feature_losses["own/mse"].projectors["0/0"].conv.weight.grad.any()


def test_losses_are_float32_under_autocast():
    distiller = hybrid()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = distiller(*batch(), WEIGHTS)
    assert {output.loss.dtype, output.logits.dtype, *(term.dtype for term in output.terms.values())} == {torch.float32}
    assert torch.equal(output.logits, output.logits.bfloat16().float()), "the logits were not computed in bfloat16"
    images, target, labels = batch()
    assert torch.equal(output.terms["kl"], kl_loss(output.logits, target.logits, temperature=0.5))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_have_the_memory_format_of_the_module(memory_format):
    recorder = Recorder()
    distiller = build(features={"own": recorder}, layers=LAYERS, target_shapes=TARGETS, memory_format=memory_format)
    distiller.to(memory_format=memory_format).start_recording()
    expected = build(features={"own": Recorder()}, layers=LAYERS, target_shapes=TARGETS)
    expected.start_recording()
    output = distiller(*batch())
    assert all(feature.is_contiguous(memory_format=memory_format) for feature in recorder.arguments[0].values())
    torch.testing.assert_close(output.logits, expected(*batch()).logits)


@pytest.mark.slow
def test_compiled_distiller_has_the_same_gradients():
    images, target, labels = batch()
    plain, compiled = hybrid(), hybrid()
    compiled.compile(backend="aot_eager", fullgraph=True)
    for order in (slice(None), torch.arange(3, -1, -1)):
        outputs = []
        for module in (plain, compiled):
            module.zero_grad()
            outputs.append(module(images[order], target, labels, WEIGHTS))
            outputs[-1].loss.backward()
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad)


def test_mixed_labels_reach_the_losses_that_support_them():
    """A one-hot row is the label of one class, so that both losses agree on such labels."""
    images, target, labels = batch()
    mixed = 0.75 * functional.one_hot(labels, 4) + 0.25 * functional.one_hot(labels.flip(0), 4)
    distiller = build(logits=ClassShareLoss(), label_smoothing=0.1)
    output = distiller(images, target, mixed)
    assert output.terms["ce"].equal(cross_entropy(output.logits, mixed, label_smoothing=0.1))
    expected = ClassShareLoss()(output.logits, target.logits, temperature=4.0, labels=mixed)
    assert output.terms["logits"].equal(expected) and expected > 0
    certain = functional.one_hot(labels, 4).float()
    of_class = build(logits=TrueClassLoss())(images, target, labels).terms["logits"]
    assert torch.allclose(build(logits=ClassShareLoss())(images, target, certain).terms["logits"], of_class)


def test_mixed_labels_are_refused_by_a_loss_that_needs_the_class():
    images, target, labels = batch()
    distiller = build(logits=TrueClassLoss())
    distiller(images, target, labels)
    with pytest.raises(ValueError, match=r"labels: logits needs the class of each sample, .*without mixup and cutmix"):
        distiller(images, target, functional.one_hot(labels, 4).float())


def test_float_images_and_one_hot_labels_give_the_loss_of_pixels_and_classes():
    distiller, (images, target, labels) = hybrid(), batch()
    expected = distiller(images, target, labels, WEIGHTS)
    output = distiller(images.float(), target, functional.one_hot(labels, 4).float(), WEIGHTS)
    assert torch.equal(output.logits, expected.logits)
    assert torch.allclose(output.loss, expected.loss, rtol=1e-6)
