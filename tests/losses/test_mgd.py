"""Masked generative distillation: masks as a function of the micro-batch and the sample, layers, resume, processes."""

from pathlib import Path

import pytest
import torch

from kd_accel.errors import UserError
from kd_accel.losses.mgd import MGD
from tests.support import launching
from tests.support.feature_losses import LAYER, built, random_maps
from tests.support.float64_feature_references import reference_mask
from tests.support.in_process import train
from tests.support.launching import losses, metrics


def masks(loss, index, *sizes):
    return loss._masks(torch.as_tensor(index), [torch.Size(size) for size in sizes])


def drawn(*, seed=0, draws=0, probability=0.3):
    loss = MGD(lambda_mgd=probability)
    loss._seed = seed
    loss.drawn.fill_(draws)
    return loss


@pytest.mark.parametrize("seed", [0, 1, 12345678901])
@pytest.mark.parametrize("draws", [0, 1, 10**6])
def test_masks_match_their_definition_in_unbounded_integers(seed, draws):
    index = [0, 1, 49_999, 2**40 + 7]
    first, second = masks(drawn(seed=seed, draws=draws), index, (3, 4), (1, 2))
    expected = reference_mask(seed, draws, index, 14, 0.3)
    assert first.shape == (4, 1, 3, 4) and second.shape == (4, 1, 1, 2)
    assert first.flatten(1).tolist() == expected[:, :12].tolist() and second.flatten(1).tolist() == expected[:, 12:].tolist()


def test_seed_of_the_run_decides_the_masks():
    loss, _ = built("mgd", (3, 4, 4), (5, 4, 4), seed=3, lambda_mgd=0.3)
    assert masks(loss, [8, 2], (4, 4))[0].flatten(1).tolist() == reference_mask(3, 0, [8, 2], 16, 0.3).tolist()


def test_masks_are_those_of_independent_draws():
    """Shares of masked pixels, and of pixels in which two masks agree, are those of coins with the probability 0.3."""
    index = torch.arange(1000)
    (one,), (next_draw,), (other_seed,) = (masks(loss, index, (8, 8)) for loss in (drawn(), drawn(draws=1), drawn(seed=1)))
    tolerance = 5 * (0.3 * 0.7 / one.numel()) ** 0.5
    assert abs(one.logical_not().double().mean().item() - 0.3) < tolerance
    assert (one.double().mean((0, 1)) - 0.7).abs().max() < 5 * (0.3 * 0.7 / 1000) ** 0.5, "a pixel is masked more than others"
    for other in (
        next_draw,
        other_seed,
        one.roll(1, 0),
        one.roll(1, 2),
        one.roll(1, 3),
        next_draw.roll(1, 0),
        next_draw.roll(1, 3),
    ):
        assert abs((one == other).double().mean().item() - (0.3**2 + 0.7**2)) < tolerance


def test_each_forward_draws_the_next_mask():
    loss = drawn()
    found = [masks(loss, [5, 6], (4, 4))[0] for _ in range(3)]
    assert loss.drawn.item() == loss.state_dict()["drawn"].item() == 3, "a checkpoint lacks the count"
    again = [masks(drawn(draws=draws), [5, 6], (4, 4))[0] for draws in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert not torch.equal(found[0], found[1])


def test_an_evaluation_leaves_the_masks_of_the_training():
    loss = drawn(draws=3).eval()
    assert torch.equal(masks(loss, [5], (4, 4))[0], masks(drawn(draws=3), [5], (4, 4))[0]) and loss.drawn.item() == 3


def test_mask_of_a_sample_does_not_depend_on_its_batch():
    (batch,), (alone,) = masks(drawn(), [3, 9, 4], (5, 5)), masks(drawn(), [9], (5, 5))
    assert torch.equal(batch[1:2], alone)


def test_probability_zero_masks_nothing_and_one_is_refused():
    assert masks(drawn(probability=0.0), range(50), (8, 8))[0].all()
    assert masks(drawn(probability=0.999), range(50), (8, 8))[0].double().mean() < 0.01
    for probability in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match="args.lambda_mgd: "):
            MGD.checked_settings({"lambda_mgd": probability}, field="args")


def test_masked_pixels_have_no_gradient():
    loss, _ = built("mgd", (3, 4, 4), (5, 4, 4), lambda_mgd=0.5)
    student = random_maps(6, 3, 4, 4, dtype=torch.float32).requires_grad_()
    kept = reference_mask(0, 0, range(6), 16, 0.5).reshape(6, 4, 4)
    loss({LAYER: student}, {LAYER: random_maps(6, 5, 4, 4, dtype=torch.float32)}, index=torch.arange(6)).backward()
    assert student.grad.any(1).tolist() == kept.tolist()


def test_samples_without_positions_are_refused():
    loss, _ = built("mgd", (3, 2, 2), (3, 2, 2))
    assert loss.uses_index
    with pytest.raises(ValueError, match="index: missing; mgd masks pixels by the positions of the samples"):
        loss({LAYER: torch.zeros(1, 3, 2, 2)}, {LAYER: torch.zeros(1, 3, 2, 2)})


def flags(teacher_run):
    feature = "{mgd: {weight: 0.001, layers: [layer1, layer2], args: {lambda_mgd: 0.5}}}"
    return [f"--teacher.run={teacher_run}", f"--distill.features={feature}", "--train.epochs=2"]


@pytest.mark.slow
def test_a_resumed_training_draws_the_same_masks(tmp_path, teacher_run):
    train(tmp_path / "straight", *flags(teacher_run))
    train(tmp_path / "stopped", *flags(teacher_run), "--checkpoint.stop_after_steps=5")
    train(tmp_path / "stopped", *flags(teacher_run))
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "stopped"))
    assert one == other and metrics(tmp_path / "straight") == metrics(tmp_path / "stopped")


@pytest.mark.slow
def test_two_processes_draw_the_masks_of_one(tmp_path, teacher_run):
    for processes in (1, 2):
        launching.train(Path(tmp_path) / str(processes), *flags(teacher_run), processes=processes)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)
