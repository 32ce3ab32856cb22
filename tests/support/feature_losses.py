"""Feature losses by name, built for maps of one layer, and random maps to compare them on."""

import torch

from kd_accel.losses.registry import load_loss

NAMES = ("at", "cosine", "crd", "mgd", "pkt", "review", "rkd", "sp")
LAYER = "layer"
SAMPLES = torch.tensor([*range(64), 2**40])
"""Positions of the samples of a training."""


def built(name, student_shape, teacher_shape, *, seed=0, **settings):
    """Build a loss for maps of shapes (D, H, W), as a training does; return it with its target function."""
    loss = load_loss("features", name)(**settings)
    target = loss.target_function(student_shape, teacher_shape)
    loss.set_samples(SAMPLES)
    loss.build({LAYER: student_shape}, {LAYER: target.output_shape(teacher_shape)}, seed=seed)
    return loss, target


def value_of(name, student, teacher, *, dtype=None, index=None, **settings):
    """Compute a loss between two maps, as a training with a live teacher does. dtype: of the parameters."""
    loss, target = built(name, tuple(student.shape[1:]), tuple(teacher.shape[1:]), **settings)
    loss.to(dtype or student.dtype)
    index = torch.arange(len(student)) if index is None else index
    return loss({LAYER: student}, {LAYER: target(teacher)}, index=index)


def random_maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient_of(value, *tensors):
    """Return the gradients of a loss; a loss without a graph is an error."""
    return torch.autograd.grad(value, tensors)
