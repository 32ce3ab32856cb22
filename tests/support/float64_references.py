"""Independent float64 references of the losses in numpy, with logits and labels to compare them on."""

import numpy as np
import torch

GENERATOR = np.random.default_rng(0)
STUDENT = 3 * GENERATOR.standard_normal((6, 5))
TEACHER = 3 * GENERATOR.standard_normal((6, 5))
LABELS = np.array([0, 4, 2, 2, 1, 3])
MIXED = np.array(
    [[0.25, 0, 0, 0.75, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 0], [0.125, 0, 0.875, 0, 0]]
)
"""Mixed labels; two samples have no label."""


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def reference_kl(student, teacher, temperature, t_squared):
    """Compute the KL divergence of logits [B, C], and its gradient with respect to the student's logits."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    scale = temperature**2 if t_squared else 1.0
    return scale * (p * (np.log(p) - np.log(q))).sum() / len(p), scale * (q - p) / temperature / len(p)


def reference_cross_entropy(student, labels, smoothing):
    """Compute the cross-entropy of logits [B, C], and its gradient with respect to the logits.

    Labels are classes [B], or probabilities [B, C] with zeros for a sample without a label.
    """
    classes = student.shape[1]
    probabilities = np.eye(classes)[labels] if labels.ndim == 1 else labels
    is_labeled = probabilities.sum(1, keepdims=True)
    target = probabilities * (1 - smoothing) + is_labeled * smoothing / classes
    q = softmax(student)
    return -(target * np.log(q)).sum() / len(q), (is_labeled * q - target) / len(q)


def value_and_gradient(function, student, dtype=torch.float64):
    """Compute the value of a loss, and its gradient with respect to the student's tensor."""
    leaf = torch.tensor(student, dtype=dtype, requires_grad=True)
    value = function(leaf)
    value.backward()
    return value.item(), leaf.grad.double().numpy()
