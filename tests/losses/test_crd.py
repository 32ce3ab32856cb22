"""Contrastive representation distillation: steps against a reference, negatives, memory banks, resume, processes."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kd_accel.errors import UserError
from kd_accel.losses.crd import CRD
from kd_accel.losses.distiller import Distiller
from kd_accel.losses.mgd import MGD
from kd_accel.models.factory import build_model
from kd_accel.training.state import needs_buffers_exchanged
from tests.support.feature_losses import LAYER, random_maps
from tests.support.float64_feature_references import (
    numeric_slope,
    reference_crd,
    reference_embeddings,
    reference_words,
)
from tests.support.in_process import train
from tests.support.launching import metrics
from tests.support.losses import BankLoss

POSITIONS = [2, 3, 5, 7, 11, 13, 17, 19, 23, 2**40, 2**40 + 4]
"""Positions of the training samples: not consecutive, as with validation samples, and with unlabeled ones."""
BATCHES = [[13, 2, 2**40 + 4], [5, 13, 2**40], [2, 23, 3]]
SETTINGS = {"feat_dim": 5, "nce_k": 12, "nce_t": 0.3, "nce_m": 0.3}


def built(*, seed=0, **settings):
    loss = CRD(**{**SETTINGS, **settings})
    loss.set_samples(torch.tensor(POSITIONS))
    loss.build({LAYER: (3, 4, 4)}, {LAYER: (4, 1, 1)}, seed=seed)
    return loss.double()


def batch_of(index):
    """Return maps that depend on the positions alone: features, targets, index."""
    student, teacher = (
        torch.cat([random_maps(1, *shape, seed=position % 1000 + seed) for position in index])
        for seed, shape in ((0, (3, 4, 4)), (5000, (4, 1, 1)))
    )
    return {LAYER: student.requires_grad_()}, {LAYER: teacher}, torch.tensor(index)


def step(loss, index):
    features, targets, positions = batch_of(index)
    return loss(features, targets, index=positions)


def state_of(loss):
    """Return copies of the tensors of the layer in numpy."""
    return {key: value.numpy().copy() for key, value in loss.contrasts[LAYER].state_dict().items()}


@pytest.mark.parametrize("seed", [0, 3])
def test_values_gradients_and_banks_of_three_steps_match_the_reference(seed):
    loss = built(seed=seed)
    z, memory = None, state_of(loss)["memory"]
    for draw, index in enumerate(BATCHES):
        features, targets, positions = batch_of(index)
        state, rows = state_of(loss), [POSITIONS.index(position) for position in index]
        student, teacher = features[LAYER].detach().numpy(), targets[LAYER].numpy()
        negatives = reference_words(seed, draw, index, 12) % len(POSITIONS)
        settings = {"rows": rows, "negatives": negatives, "temperature": 0.3}
        expected, z = reference_crd(state, student, teacher, **settings, z=z)

        value = loss(features, targets, index=positions)
        assert value.item() == pytest.approx(expected, rel=1e-12)
        parameters = dict(loss.contrasts[LAYER].named_parameters())
        gradients = torch.autograd.grad(value, [features[LAYER], *parameters.values()])
        direction = random_maps(*student.shape, seed=8).numpy()
        slope = numeric_slope(lambda maps: reference_crd(state, maps, teacher, **settings, z=z)[0], student, direction)  # noqa: B023
        assert (gradients[0].numpy() * direction).sum() == pytest.approx(slope, rel=1e-6)
        for name, gradient in zip(parameters, gradients[1:], strict=True):
            direction = random_maps(*gradient.shape, seed=9).numpy()
            changed = lambda tensor: reference_crd({**state, name: tensor}, student, teacher, **settings, z=z)[0]  # noqa: B023, E731
            slope = numeric_slope(changed, state[name], direction)
            assert (gradient.numpy() * direction).sum() == pytest.approx(slope, rel=1e-6)

        for bank, embeddings in zip(memory, reference_embeddings(state, student, teacher), strict=True):
            for row, own in zip(rows, embeddings, strict=True):
                moved = 0.3 * bank[row] + 0.7 * own
                bank[row] = moved / np.sqrt(moved @ moved)
        after = state_of(loss)
        np.testing.assert_allclose(after["memory"], memory, rtol=0, atol=1e-14)
        np.testing.assert_allclose(after["log_z"], np.log(z), rtol=1e-13)
    untouched = [POSITIONS.index(position) for position in (7, 11, 17, 19)]
    assert np.array_equal(after["memory"][:, untouched], state_of(built(seed=seed))["memory"][:, untouched])
    assert loss.drawn.item() == loss.state_dict()["drawn"].item() == 3, "a checkpoint lacks the count"


def test_negatives_are_drawn_uniformly_for_each_sample_and_step():
    loss = built(nce_k=5000)
    one, next_step = loss._draw(torch.arange(40)), loss._draw(torch.arange(40))
    assert (one.sum(1) == 5000).all()
    expected = 40 * 5000 / len(POSITIONS)
    assert (one.sum(0) - expected).abs().max() < 5 * expected**0.5
    assert (one.sum(0).sub(expected).square() / expected).sum() < 35, "chi-square of 10 degrees of freedom"
    deviation = one - 5000 / len(POSITIONS)
    for other in (next_step, one.roll(1, 0), one.roll(1, 1)):
        correlation = (deviation * (other - 5000 / len(POSITIONS))).mean() / deviation.square().mean()
        assert abs(correlation) < 0.25
    again = built(nce_k=5000)
    assert torch.equal(again._draw(torch.arange(40).flip(0)).flip(0), one), "negatives depend on the batch"


def test_an_evaluation_changes_nothing_and_gathers_nothing():
    loss = built()
    step(loss, BATCHES[0])
    loss.eval()
    loss.gather = None
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    values = [step(loss, BATCHES[1]).item() for _ in range(2)]
    assert values[0] == values[1]
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())


def test_rows_of_a_sample_that_is_twice_in_a_batch_are_those_of_the_last():
    loss, once = built(), built()
    features, targets, index = batch_of([13, 2, 5, 13])
    with torch.no_grad():
        features[LAYER][3] += 1  # another view
    loss(features, targets, index=index)
    once({LAYER: features[LAYER][1:]}, {LAYER: targets[LAYER][1:]}, index=index[1:])
    np.testing.assert_allclose(state_of(loss)["memory"], state_of(once)["memory"], rtol=0, atol=1e-15)


def test_embeddings_that_are_not_finite_do_not_enter_the_banks():
    loss, reference = built(), built()
    step(loss, BATCHES[0])
    step(reference, BATCHES[0])
    features, targets, index = batch_of(BATCHES[1])
    with torch.no_grad():
        features[LAYER][1] = torch.inf
    assert not loss(features, targets, index=index).isfinite()
    step(reference, BATCHES[1])
    banks, expected = (torch.as_tensor(state_of(each)["memory"]) for each in (loss, reference))
    start = torch.as_tensor(state_of(built())["memory"])
    student, row = 0, POSITIONS.index(13)
    assert banks.isfinite().all()
    others = [other for other in range(len(POSITIONS)) if other != row]
    assert torch.equal(banks[:, others], expected[:, others]) and torch.equal(banks[1], expected[1])
    assert not torch.equal(banks[student, row], expected[student, row])
    assert not torch.equal(banks[student, row], start[student, row]), "the row of the step before is kept"


def test_constants_that_are_not_finite_are_estimated_again():
    loss = built()
    features, targets, index = batch_of(BATCHES[0])
    with torch.no_grad():
        features[LAYER][0] = torch.nan
    loss(features, targets, index=index)
    assert step(loss, BATCHES[1]).isfinite()
    assert loss.contrasts[LAYER].log_z.isfinite().all()


def test_gradient_is_finite_at_a_temperature_whose_exponentials_overflow():
    loss = built(nce_t=1e-4).float()
    features, targets, index = batch_of(BATCHES[0])
    student = features[LAYER].detach().float().requires_grad_()
    for _ in range(2):
        value = loss({LAYER: student}, targets, index=index)
        assert value.isfinite() and torch.autograd.grad(value, student)[0].isfinite().all()


@pytest.mark.parametrize(
    "settings", [{"nce_t": 0.0}, {"nce_t": float("inf")}, {"nce_m": 1.0}, {"nce_m": -0.1}, {"nce_k": 0}, {"feat_dim": 0}]
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(UserError, match=f"args.{next(iter(settings))}: "):
        CRD.checked_settings(settings, field="args")


def test_missing_samples_and_positions_are_refused():
    with pytest.raises(ValueError, match="samples: missing; call set_samples of the loss crd"):
        CRD().build({LAYER: (3, 4, 4)}, {LAYER: (4, 1, 1)}, seed=0)
    features, targets, _ = batch_of(BATCHES[0])
    with pytest.raises(ValueError, match="index: missing; crd finds rows of its memory banks by the positions"):
        built()(features, targets)


def test_seed_decides_embeddings_and_banks():
    one, other = (built(seed=seed).state_dict() for seed in (0, 1))
    for name in ("embed_s.weight", "embed_t.weight", "memory"):
        assert not torch.equal(one[f"contrasts.{LAYER}.{name}"], other[f"contrasts.{LAYER}.{name}"])


class Ranks:
    """Gather of threads that stand for processes."""

    def __init__(self, number):
        self.barrier, self.parts = threading.Barrier(number, timeout=20), [None] * number

    def gather_of(self, rank):
        def gather(tensor):
            self.parts[rank] = tensor
            self.barrier.wait()
            gathered = torch.cat(self.parts)
            self.barrier.wait()
            return gathered

        return gather


def test_value_gradient_and_banks_do_not_depend_on_the_number_of_processes():
    alone, losses, ranks, values = built(), [built(), built()], Ranks(2), {}

    def run(rank):
        loss = losses[rank]
        loss.gather = ranks.gather_of(rank)
        for number, index in enumerate(([2, 13, 5, 7], [13, 23, 2, 2**40])):
            value = step(loss, index[2 * rank :][:2])
            values[rank, number] = value.item(), torch.autograd.grad(value, loss.contrasts[LAYER].embed_t.weight)[0]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for number, index in enumerate(([2, 13, 5, 7], [13, 23, 2, 2**40])):
        value = step(alone, index)
        (gradient,) = torch.autograd.grad(value, alone.contrasts[LAYER].embed_t.weight)
        for thread in threads if number else []:
            thread.join()
        values[number] = value.item(), gradient
    for number in (0, 1):
        (one, first), (other, second) = values[0, number], values[1, number]
        assert (one + other) / 2 == pytest.approx(values[number][0], rel=1e-12) and one != other
        torch.testing.assert_close((first + second) / 2, values[number][1], rtol=1e-10, atol=1e-12)
    zero, one, expected = (loss.state_dict() for loss in (*losses, alone))
    for key, value in expected.items():
        assert torch.equal(zero[key], one[key])
        torch.testing.assert_close(zero[key], value, rtol=1e-12, atol=1e-14)


def test_buffers_are_exchanged_unless_all_losses_synchronize_their_own():
    def needs(loss):
        loss.set_samples(torch.arange(9))
        student = build_model("import:tests.support.models:student_with_everything", num_classes=4)
        shapes = {"layer2": (32, 1, 1)}
        statistics = {"mean": [0.5] * 3, "std": [0.25] * 3}
        return needs_buffers_exchanged(
            Distiller(student, **statistics, features={"own": loss}, layers={"layer2": "layer2"}, target_shapes=shapes)
        )

    class Declared(BankLoss):
        synchronizes_buffers = True

    class Undeclared(BankLoss):
        synchronizes_buffers = False

    assert not needs(CRD()) and not needs(MGD())
    assert needs(Undeclared(samples=9)) and not needs(Declared(samples=9))


def flags(teacher_run, *further):
    settings = "{weight: 0.1, layers: [layer2], args: {feat_dim: 8, nce_k: 64}}"
    return [f"--teacher.run={teacher_run}", f"--distill.features.crd={settings}", "--train.epochs=2", *further]


def last_state(run_dir):
    return load_file(max((Path(run_dir) / "checkpoints").glob("step-*")) / "module.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_training_ends_with_the_same_banks(tmp_path, teacher_run, accumulation):
    own = flags(teacher_run, f"--train.grad_accum_steps={accumulation}", "--model.arch=import:tests.support.models:student")
    train(tmp_path / "straight", *own)
    train(tmp_path / "stopped", *own, "--checkpoint.stop_after_steps=5")
    train(tmp_path / "stopped", *own)
    one, other = (tmp_path / name for name in ("straight", "stopped"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert metrics(one) == metrics(other)
    states = last_state(one), last_state(other)
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())

    prefix = "feature_losses.crd."
    assert states[0][f"{prefix}drawn"].item() == 16 * accumulation
    memory = states[0][f"{prefix}contrasts.layer2.memory"]
    assert memory.shape == (2, 128, 8), "each bank has a row for each training sample, and for no other"
    torch.testing.assert_close(memory.norm(dim=2), torch.ones(2, 128))
    student = build_model("import:tests.support.models:student", num_classes=4).state_dict()
    assert load_file(one / "model.safetensors").keys() == student.keys()


@pytest.mark.slow
def test_unlabeled_samples_have_rows_of_their_own(tmp_path, teacher_run):
    unlabeled = ["--data.unlabeled=import:tests.support.models:unlabeled_images", "--data.unlabeled_split=train"]
    train(tmp_path / "run", *flags(teacher_run, *unlabeled), "--train.epochs=1")
    state = last_state(tmp_path / "run")
    assert state["feature_losses.crd.contrasts.layer2.memory"].shape == (2, 128 + 160, 8)
    torch.testing.assert_close(state["feature_losses.crd.contrasts.layer2.memory"].norm(dim=2), torch.ones(2, 288))


@pytest.mark.slow
def test_mixed_views_are_trained(tmp_path, teacher_run):
    train(tmp_path / "run", *flags(teacher_run), "--data.transform={mixup: {alpha: 0.8}}")
    terms = [line["features/crd"] for line in metrics(tmp_path / "run", "train")]
    assert np.isfinite(terms).all() and np.mean(terms[-4:]) < np.mean(terms[:4])
