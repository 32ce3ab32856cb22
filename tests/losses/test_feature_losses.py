"""Properties that all feature losses share: float64 references, extreme maps, half precision, halves of a batch, training."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kd_accel.losses.base import FeatureLoss
from kd_accel.losses.cosine import cosine_loss
from kd_accel.losses.distiller import Distiller, LossWeights
from kd_accel.losses.registry import load_loss
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import probe_layers
from kd_accel.models.preprocess import Normalize
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.types import Batch
from tests.support import float64_feature_references as references
from tests.support.feature_losses import LAYER, NAMES, SAMPLES, built, gradient_of, random_maps, value_of

SIZES = [((3, 4, 4), (5, 4, 4)), ((5, 4, 4), (5, 2, 2)), ((3, 2, 2), (4, 4, 4)), ((4, 4, 2), (4, 2, 4))]
EXTREMES = ["large", "zero student", "zero teacher", "zeros", "a zero sample", "equal samples", "one pixel"]
LEARNED = ("crd", "mgd", "review")
"""Losses with parameters also where the channels are the same."""
SETTINGS = {"crd": {"feat_dim": 5, "nce_k": 12}, "mgd": {"lambda_mgd": 0.4}}
"""Settings with which the references are compared."""


def reference_of(name, loss, target, teacher):
    """Return the reference of a loss as a function of the student's map in numpy."""
    state = {key: value.numpy().copy() for key, value in loss.state_dict().items()}
    raw = teacher.numpy()
    if name == "cosine":
        project = {key.rpartition(".")[2]: value for key, value in state.items()}

        def cosine(student):
            return references.reference_cosine(
                references.reference_conv(student, project["weight"], project["bias"]) if project else student, raw
            )

        return cosine
    if name == "crd":
        layer = {key.removeprefix("contrasts.layer."): value for key, value in state.items()}
        negatives = references.reference_words(0, 0, range(len(raw)), SETTINGS["crd"]["nce_k"]) % len(SAMPLES)
        settings = {"rows": range(len(raw)), "negatives": negatives, "temperature": 0.07}
        known = []

        def crd(student):
            # The constants Z have no gradient: they are those of the first call.
            value, z = references.reference_crd(layer, student, raw, **settings, z=known[0] if known else None)
            known.append(z)
            return value

        return crd
    if name == "mgd":
        layer = {key.removeprefix("generators.layer."): value for key, value in state.items()}
        layer |= {key.replace("projectors.layer.conv", "align"): value for key, value in state.items()}

        def mgd(student):
            pixels = min(student.shape[2], raw.shape[2]) * min(student.shape[3], raw.shape[3])
            kept = references.reference_mask(0, 0, range(len(student)), pixels, 0.4)
            return references.reference_mgd(layer, student, raw, kept)

        return mgd
    if name == "review":
        layer = {key.removeprefix("fusions.layer."): value for key, value in state.items()}
        return lambda student: references.reference_review({LAYER: layer}, {LAYER: student}, {LAYER: raw})
    return {
        "at": lambda student: references.reference_at(student, references.reference_attention(raw, 2), 2),
        "pkt": lambda student: references.reference_pkt(student, raw),
        "rkd": lambda student: references.reference_rkd(student, raw, 25, 50),
        "sp": lambda student: references.reference_sp(student, raw),
    }[name]


@pytest.mark.parametrize(("student_shape", "teacher_shape"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_match_the_float64_reference(name, student_shape, teacher_shape):
    loss, target = built(name, student_shape, teacher_shape, **SETTINGS.get(name, {}))
    loss.double()
    teacher = random_maps(4, *teacher_shape, seed=1)
    reference = reference_of(name, loss, target, teacher)
    student = random_maps(4, *student_shape).requires_grad_()
    value = loss({LAYER: student}, {LAYER: target(teacher)}, index=torch.arange(4))
    expected = student.detach().numpy()
    assert value.ndim == 0
    assert value.item() == pytest.approx(reference(expected), rel=1e-12)
    (gradient,) = gradient_of(value, student)
    for seed in range(4):
        direction = random_maps(4, *student_shape, seed=7 + seed)
        slope = references.numeric_slope(reference, expected, direction.numpy())
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_parameters_match_finite_differences(name):
    loss, target = built(name, (3, 2, 2), (2, 2, 2), **SETTINGS.get(name, {}))
    loss.double()
    student, teacher = random_maps(3, 3, 2, 2), target(random_maps(3, 2, 2, 2, seed=1))
    parameters = dict(loss.named_parameters())
    assert bool(parameters) == (name in (*LEARNED, "cosine"))
    if not parameters:
        return
    if name == "crd":  # its constants are those of the first step, and an evaluation changes nothing
        loss({LAYER: student}, {LAYER: teacher}, index=torch.arange(3))
        loss.eval()

    def value(*tensors):
        values = {**dict(zip(parameters, tensors, strict=True)), **({"drawn": torch.tensor(3)} if name == "mgd" else {})}
        return torch.func.functional_call(loss, values, ({LAYER: student}, {LAYER: teacher}), {"index": torch.arange(3)})

    assert torch.autograd.gradcheck(value, tuple(parameters.values()))


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_finite_for_extreme_maps(name, extreme):
    size = 1 if extreme == "one pixel" else 4
    if (name, size) == ("at", 1):
        return
    student, teacher = (random_maps(4, 6, size, size, seed=seed, dtype=torch.float32) for seed in (0, 1))
    if extreme == "large":
        student, teacher = 1e8 * student, 1e8 * teacher
    if extreme in ("zero student", "zeros"):
        student = torch.zeros_like(student)
    if extreme in ("zero teacher", "zeros"):
        teacher = torch.zeros_like(teacher)
    if extreme == "a zero sample":
        student[1] = 0
    if extreme == "equal samples":
        student = student[:1].expand(4, -1, -1, -1).clone()
    student.requires_grad_()
    value = value_of(name, student, teacher)
    (gradient,) = gradient_of(value, student)
    assert value.isfinite() and gradient.isfinite().all()
    assert extreme == "large" or gradient.abs().max() < 1e3, "an epsilon in a denominator multiplies the gradient"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_maps_are_compared_in_float32(name, dtype):
    student, teacher = (random_maps(4, 6, 4, 4, seed=seed, dtype=dtype) for seed in (0, 1))
    student.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        value = value_of(name, student, teacher, dtype=torch.float32)
    (gradient,) = gradient_of(value, student)
    assert value.dtype == torch.float32 and gradient.dtype == dtype and gradient.isfinite().all()
    exact = value_of(name, student.double(), teacher.double()).item()
    # Convolutions are computed in half precision, all else in float32.
    assert value.item() == pytest.approx(exact, rel=0.02 if name in ("mgd", "review") else 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_mean_over_halves_is_the_loss_of_a_batch_if_it_is_per_sample(name):
    student, teacher = random_maps(8, 3, 4, 4), random_maps(8, 5, 4, 4, seed=1)
    index = torch.tensor([7, 3, 30, 1, 2**40, 9, 8, 5])
    full = value_of(name, student, teacher, index=index).item()
    # Each half has a loss of its own, as on two processes.
    halves = [value_of(name, student[half], teacher[half], index=index[half]).item() for half in (slice(4), slice(4, 8))]
    difference = abs(full - sum(halves) / 2) / full
    # Halves of `crd` differ in their constants Z alone.
    least = 1e-6 if name == "crd" else 1e-3
    assert difference < 1e-10 if load_loss("features", name).per_sample else difference > least


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_batches_of_one_and_two_samples(name, samples):
    student, teacher = random_maps(samples, 6, 4, 4).requires_grad_(), random_maps(samples, 6, 4, 4, seed=1)
    value = value_of(name, student, teacher)
    (gradient,) = gradient_of(value, student)
    assert value.isfinite() and gradient.isfinite().all()
    has_no_relation = name in ("pkt", "rkd") or (name == "sp" and samples == 1)
    assert (value.item() < 1e-14) == (gradient.abs().max() < 1e-12) == has_no_relation


def test_batchnorm_of_one_value_is_refused_by_torch():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        value_of("review", random_maps(1, 6, 1, 1), random_maps(1, 6, 1, 1))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LEARNED])
def test_loss_is_zero_at_agreement(name):
    student = random_maps(4, 6, 4, 4).requires_grad_()
    value = value_of(name, student, student.detach())
    (gradient,) = gradient_of(value, student)
    assert abs(value.item()) < 1e-14
    # The norm of `at` has a slope also at a difference of one rounding.
    assert name == "at" or gradient.abs().max() < 1e-14


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_summed(name):
    loss = load_loss("features", name)()
    loss.set_samples(SAMPLES)
    shapes = {"a.b": (6, 4, 4), "keys": (6, 4, 4)}
    functions = {layer: loss.target_function(shape, shape) for layer, shape in shapes.items()}
    loss.build(shapes, {layer: function.output_shape(shapes[layer]) for layer, function in functions.items()}, seed=0)
    loss.double()
    maps = {layer: random_maps(4, *shape, seed=seed) for seed, (layer, shape) in enumerate(shapes.items())}
    targets = {layer: function(random_maps(4, *shapes[layer], seed=9)) for layer, function in functions.items()}
    value = loss(maps, targets, index=torch.arange(4)).item()
    if name in LEARNED:
        assert value > 0
    else:
        parts = [loss({layer: maps[layer]}, {layer: targets[layer]}).item() for layer in shapes]
        assert min(parts) > 0 and parts[0] != parts[1] and value == pytest.approx(sum(parts), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_forward_has_no_control_flow_that_depends_on_data(name):
    """A step with such a loss can be captured in a CUDA graph: `fullgraph` refuses `.item()` and branches on values."""
    student, teacher = random_maps(4, 6, 4, 4, dtype=torch.float32), random_maps(4, 5, 4, 4, seed=1, dtype=torch.float32)
    values = []
    for compiles in (False, True):
        loss, target = built(name, (6, 4, 4), (5, 4, 4))
        forward = torch.compile(loss, backend="eager", fullgraph=True) if compiles else loss
        values.append(forward({LAYER: student}, {LAYER: target(teacher)}, index=torch.arange(4)))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_depend_on_the_seed_alone(name):
    def state(seed):
        torch.manual_seed(seed * 77)
        before = torch.get_rng_state()
        loss, _ = built(name, (6, 4, 4), (5, 4, 4), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return loss.state_dict()

    first, other = state(0), state(1)
    torch.manual_seed(5)
    again, _ = built(name, (6, 4, 4), (5, 4, 4), seed=0)
    assert first.keys() == again.state_dict().keys()
    assert all(torch.equal(first[key], value) for key, value in again.state_dict().items())
    convolutions = [key for key, value in first.items() if value.ndim == 4]
    assert not any(torch.equal(first[key], other[key]) for key in convolutions)


@pytest.mark.parametrize("name", NAMES)
def test_training_through_the_distiller_reduces_the_loss(name):
    """Three real steps with a live teacher and mixed labels; every parameter receives a gradient."""
    layers = {"layer1": "layer1", "layer2": "layer2"}
    network, student = (build_model(f"import:tests.support.models:{arch}", num_classes=4) for arch in ("teacher", "student"))
    loss: FeatureLoss = load_loss("features", name)()
    loss.set_samples(SAMPLES)
    own, theirs = (probe_layers(model, list(layers), image_size=32) for model in (student, network))
    functions = {layer: loss.target_function(own[layer], theirs[layer]) for layer in layers}
    shapes = {layer: function.output_shape(theirs[layer]) for layer, function in functions.items()}
    statistics = {"mean": [0.5] * 3, "std": [0.25] * 3}
    distiller = Distiller(student, **statistics, features={"own": loss}, layers=layers, target_shapes=shapes)
    teacher = LiveTeacher(network, Normalize(*statistics.values()), targets=functions)
    distiller.start_recording()
    images = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = functional.one_hot(torch.arange(16) % 4, 4) * 0.75 + 0.0625
    batch = Batch(images, labels, torch.arange(16), 0)
    # The term alone is trained, with a weight that suits its scale.
    weights = LossWeights(label_weight=0.0, features={"own": {"mgd": 1e-2, "rkd": 0.05}.get(name, 1.0)})
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05)
    terms = []
    for _ in range(3):
        output = distiller(batch.images, teacher(batch), batch.labels, weights, index=batch.index)
        optimizer.zero_grad()
        output.loss.backward()
        assert all(each.grad is not None and each.grad.isfinite().all() for each in distiller.parameters())
        assert distiller.student.layer1[0].weight.grad.any()
        optimizer.step()
        terms.append(output.terms["features/own"].item())
    teacher.close()
    assert terms[2] < terms[1] < terms[0] or (name == "mgd" and terms[2] < terms[0])


def test_cosine_ignores_positive_scales_of_pixels():
    student, target = random_maps(2, 5, 4, 4), random_maps(2, 5, 4, 4, seed=1)
    scales = [random_maps(2, 1, 4, 4, seed=seed).exp() for seed in (2, 3)]
    scaled = cosine_loss(student * scales[0], target * scales[1])
    assert scaled.item() == pytest.approx(cosine_loss(student, target).item(), rel=1e-12)
    assert cosine_loss(-student, target).item() == pytest.approx(2 - cosine_loss(student, target).item(), rel=1e-12)


def test_cosine_projects_the_student_only_where_channels_differ():
    loss = load_loss("features", "cosine")()
    loss.build({"a": (3, 2, 2), "b": (4, 2, 2)}, {"a": (4, 2, 2), "b": (4, 2, 2)}, seed=0)
    assert [(key, each.conv.in_channels, each.conv.out_channels) for key, each in loss.projectors.items()] == [("a", 3, 4)]
    assert not any(isinstance(each, nn.BatchNorm2d) for each in loss.modules())
